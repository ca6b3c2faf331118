"""Bytes that survive: places of storage, and the checkpoints, runs and models kept in them."""

from __future__ import annotations

from treadle.store.blobs import Blobs, Entry
from treadle.store.checkpoints import CheckpointManifest, Checkpoints
from treadle.store.journal import Journal, JournalReader, follow, read_journal
from treadle.store.models import Code, ModelDraft, ModelFile, ModelVersion
from treadle.store.places import open_blobs
from treadle.store.probe import probe_conditional_writes
from treadle.store.records import (
    Attempt,
    AttemptEnd,
    AttemptStatus,
    Backend,
    Request,
    RequestKind,
    RunRecord,
    RunState,
    RunStatus,
)
from treadle.store.registry import Registry
from treadle.store.runs import Runs

__all__ = [
    "Attempt",
    "AttemptEnd",
    "AttemptStatus",
    "Backend",
    "Blobs",
    "CheckpointManifest",
    "Checkpoints",
    "Code",
    "Entry",
    "Journal",
    "JournalReader",
    "ModelDraft",
    "ModelFile",
    "ModelVersion",
    "Registry",
    "Request",
    "RequestKind",
    "RunRecord",
    "RunState",
    "RunStatus",
    "Runs",
    "follow",
    "open_blobs",
    "probe_conditional_writes",
    "read_journal",
]

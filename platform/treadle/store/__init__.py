"""Bytes that survive: places of storage."""

from __future__ import annotations

from treadle.store.blobs import Blobs, Entry
from treadle.store.places import open_blobs

__all__ = ["Blobs", "Entry", "open_blobs"]

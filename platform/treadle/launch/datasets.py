"""The data set of a job, as it stands in the store."""

from __future__ import annotations

from pathlib import Path

from treadle.data.load.block_cache import BlockCache
from treadle.data.load.reader import RowReader
from treadle.data.manifest import Finding, Manifest
from treadle.data.shelf import Note, find_dataset, find_note, find_rows, recipe_digest, rows_recipe, unprepared
from treadle.data.splits.audit import audit
from treadle.data.splits.fit import fit_preprocessing
from treadle.errors import ConfigError
from treadle.spec import JobSpec
from treadle.store import Blobs

__all__ = ["audit_again", "find_data", "noted_rows", "open_reader", "script_of"]

SCRIPT = "prepare.py"
CACHE_SHARE = 0.5
"""Of the free space of the home's disk, for blocks of far stores."""


def script_of(spec: JobSpec, folder: Path) -> Path | None:
    """The preparation script of the job in `folder`; None where the job declares its columns instead.

    Raises:
        ConfigError: neither of both.
    """
    script = folder / SCRIPT
    if script.is_file():
        return script
    if spec.columns.inputs:
        return None
    raise ConfigError(
        f"{script}: not found, and no columns.inputs",
        hint="a job prepares its data with a `prepare(spec) -> Draft` there, or says columns.inputs=[<column>]",
    )


def open_reader(blobs: Blobs, manifest: Manifest) -> RowReader:
    """A reader of a data set, which keeps what it reads of a far store on this machine."""
    is_near = blobs.local_path(manifest.header.blocks[0].key) is not None
    return RowReader(blobs, manifest, cache=None if is_near else _block_cache())


def _block_cache() -> BlockCache | None:
    """None where this user has no home to keep blocks in."""
    try:
        return BlockCache.of_share(Path.home() / ".cache" / "treadle" / "blocks", CACHE_SHARE)
    except (OSError, RuntimeError):
        return None


def find_data(spec: JobSpec, folder: Path, blobs: Blobs, *, asked: str) -> str:
    """The digest of the job's data set.

    Args:
        asked: the job and its overrides as they were typed, for the hint.

    Raises:
        DataError: it is not built; the hint is the command.
    """
    rows = noted_rows(spec, script_of(spec, folder), blobs)
    if rows is None:
        raise unprepared(spec.data.name, asked)
    return find_dataset(blobs, spec.data.name, recipe_digest(spec.data, spec.split, rows.digest), job=asked)


def noted_rows(spec: JobSpec, script: Path | None, blobs: Blobs) -> Note | None:
    """The rows that were last made for the job, from this place, or from any where all files are pinned."""
    data, columns = spec.data, spec.columns
    note = find_note(blobs, data.name, rows_recipe(data, columns, script))
    if note is None and data.sha256:
        note = find_note(blobs, data.name, rows_recipe(data, columns, script, pinned=True))
    return note


def audit_again(spec: JobSpec, folder: Path, blobs: Blobs, manifest: Manifest) -> tuple[Finding, ...]:
    """What the audit says of a data set now, its statistics fitted once more to compare.

    Raises:
        IntegrityError: a block is not what was written.
    """
    note = noted_rows(spec, script_of(spec, folder), blobs)
    # The rows say which split the source gave; a data set says which split a row is in.
    rows = None if note is None else find_rows(blobs, spec.data.name, note.digest)
    if rows is None or rows.header.blocks != manifest.header.blocks:
        rows = manifest
    split_R = manifest.columns["split"]
    with open_reader(blobs, rows) as reader:
        fitted = fit_preprocessing(rows, split_R, reader, spec.data)
        return audit(rows, split_R, manifest.preprocessing, reader, spec.data, spec.split, fitted=fitted)

"""Where prepared data sets are found in a store: by name and recipe.

A recipe is the digest of what something is made by. That of rows: the data section of the job, its columns and the text
of its preparation script. It names the source by its place, and a second one does without, for rows whose files are all
pinned by checksums. That of a data set: these rows, and how they are split and read. Two recipes of one name live side
by side; the same recipe twice is one. Data sets that differ in their split alone share the rows, and so the shards.

What a recipe gave is noted, with what the files of the source looked like: files that are not pinned may change.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from treadle import wire
from treadle.data.manifest import REBUILD, SCHEMA, Manifest
from treadle.errors import ConfigError, DataError, IntegrityError, NotFoundError
from treadle.spec import ColumnsSpec, DataSpec, Missing, SplitSpec

__all__ = [
    "Note",
    "check_shards",
    "find_dataset",
    "find_note",
    "find_rows",
    "load_manifest",
    "note_dataset",
    "recipe_digest",
    "rows_recipe",
    "unprepared",
]


class Readable(Protocol):
    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes: ...
    def put(self, key: str, data: bytes) -> Any: ...
    def head(self, key: str) -> Any: ...
    def local_path(self, key: str) -> Path | None: ...


@dataclass(frozen=True, kw_only=True)
class Note:
    """What a recipe gave.

    Args:
        digest: of the data set or the rows. made_at: when it was noted, an ISO time in UTC.
        files: what the files of the source looked like before they were read; "" where nobody could look.
    """

    digest: str
    made_at: str = ""
    files: str = ""


def rows_recipe(data: DataSpec, columns: ColumnsSpec, script: Path | None, *, pinned: bool = False) -> str:
    """The recipe of the rows of a data set.

    Args:
        script: that prepares them; None where the columns of the source are declared.
        pinned: whether `data.sha256` names every file, so that it does not count where they lie.
    """
    body = wire.encode(data)
    del body["allow_leaks"]
    if pinned:
        del body["source"]
    if script is None:  # a script may read these two as it likes
        del body["gaps"]
        body["missing"] = data.missing is not Missing.refuse
    text = hashlib.sha256(script.read_bytes()).hexdigest() if script else ""
    made_by = {"data": body, "columns": wire.encode(columns), "script": text, "schema": SCHEMA}
    return wire.digest(made_by | {"of": "rows", "pinned": pinned})


def recipe_digest(data: DataSpec, split: SplitSpec, rows: str) -> str:
    """The recipe of a data set: the digest of its rows, and how they are split and read."""
    body = wire.encode(data)
    del body["source"]  # the rows say what was read
    return wire.digest({"rows": rows, "data": body, "split": wire.encode(split), "schema": SCHEMA})


def note_dataset(blobs: Readable, name: str, recipe: str, digest: str, *, files: str = "") -> None:
    """Say that `recipe` gave the data set, or the rows, `digest`, from `files`, as a `Note` has them."""
    made_at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    note = Note(digest=digest, made_at=made_at, files=files)
    blobs.put(f"data/{name}/recipes/{recipe}.json", wire.canonical(wire.encode(note)))


def find_note(blobs: Readable, name: str, recipe: str) -> Note | None:
    """What `recipe` gave, if it was ever followed.

    Raises:
        IntegrityError: the note of it is damaged.
    """
    key = f"data/{name}/recipes/{recipe}.json"
    try:
        note = wire.parse_json(blobs.get(key), where=key)
        return Note(digest=str(note["digest"]), made_at=str(note["made_at"]), files=str(note.get("files", "")))
    except NotFoundError:
        return None
    except (KeyError, TypeError):
        raise IntegrityError(f"{key}: not a note of a data set", hint=REBUILD) from None


def find_dataset(blobs: Readable, name: str, recipe: str, *, job: str) -> str:
    """The digest of the data set that `recipe` gave.

    Raises:
        DataError: it was not prepared in this store; the hint is the command that does it.
    """
    note = find_note(blobs, name, recipe)
    if note is None:
        raise unprepared(name, job)
    return note.digest


def unprepared(name: str, job: str) -> DataError:
    """The error that says so, with the command that prepares `job`."""
    return DataError(
        f"data.{name}: not prepared yet, or prepared otherwise than this job asks", hint=f"treadle prepare {job}"
    )


def find_rows(blobs: Readable, name: str, digest: str) -> Manifest | None:
    """The rows of this digest, if they and their shards are all in the store and whole."""
    key = f"data/{name}/rows/{digest}.arrow"
    try:
        rows = Manifest.from_bytes(blobs.get(key), where=key, digest=digest)
        check_shards(blobs, rows)
    except (NotFoundError, IntegrityError):
        return None
    return rows


def load_manifest(blobs: Readable, name: str, digest: str) -> Manifest:
    """The verified manifest of a data set.

    Raises:
        DataError: it is not in the store. IntegrityError: it is not what was written.
    """
    key = f"data/{name}/manifests/{digest}.arrow"
    try:
        data = blobs.get(key)
    except NotFoundError:
        raise DataError(f"{key}: the data set is gone from the store", hint=REBUILD) from None
    return Manifest.from_bytes(data, where=key, digest=digest)


def check_shards(blobs: Readable, manifest: Manifest) -> None:
    """Nothing, if every shard is there and long enough for its blocks; no block is read.

    Raises:
        IntegrityError: otherwise; the message names the shard.
    """
    ends: defaultdict[str, int] = defaultdict(int)
    for block in manifest.header.blocks:
        ends[block.key] = max(ends[block.key], block.offset + block.size)
    for key, end in ends.items():
        try:
            entry = blobs.head(key)
        except ConfigError as error:  # a symbolic link: what it leads to is not what was written here
            raise IntegrityError(f"{key}: {error.message}", hint=error.hint) from None
        if entry is None or entry.size_bytes < end:
            seen = "no such file" if entry is None else f"{entry.size_bytes} bytes"
            raise IntegrityError(f"{key}: got {seen}, expected {end} bytes or more", hint=REBUILD)

"""Where prepared data sets are found in a store: by name and recipe.

A recipe is the digest of what something is made by: of rows the data section of the job, its columns and the text of
its preparation script; of a data set also how rows are split and read. Two recipes of one name live side by side; the
same recipe twice is one. Data sets that differ in their split alone share the rows, and so the shards.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

from treadle import wire
from treadle.data.manifest import REBUILD, SCHEMA, Manifest
from treadle.errors import ConfigError, DataError, IntegrityError, NotFoundError
from treadle.spec import ColumnsSpec, DataSpec, Missing, SplitSpec

__all__ = ["check_shards", "find_dataset", "find_rows", "load_manifest", "note_dataset", "recipe_digest", "rows_recipe"]


class Readable(Protocol):
    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes: ...
    def put(self, key: str, data: bytes) -> Any: ...
    def head(self, key: str) -> Any: ...
    def local_path(self, key: str) -> Path | None: ...


def rows_recipe(data: DataSpec, columns: ColumnsSpec, script: Path | None) -> str:
    """The recipe of the rows of a data set. Where checksums pin the source, its place does not count.

    Args:
        script: that prepares them; None where the columns of the source are declared.
    """
    body = _recipe(data, columns, script)
    del body["data"]["allow_leaks"]
    if script is None:  # a script may read these two as it likes
        del body["data"]["gaps"]
        body["data"]["missing"] = data.missing is not Missing.refuse
    return wire.digest(body | {"of": "rows"})


def recipe_digest(data: DataSpec, columns: ColumnsSpec, split: SplitSpec, script: Path | None) -> str:
    """The recipe of a data set: that of its rows, and how they are split and read."""
    return wire.digest(_recipe(data, columns, script) | {"split": wire.encode(split)})


def _recipe(data: DataSpec, columns: ColumnsSpec, script: Path | None) -> dict[str, Any]:
    body = wire.encode(data)
    if data.sha256:
        del body["source"]
    text = hashlib.sha256(script.read_bytes()).hexdigest() if script else ""
    return {"data": body, "columns": wire.encode(columns), "script": text, "schema": SCHEMA}


def note_dataset(blobs: Readable, name: str, recipe: str, digest: str) -> None:
    """Say that `recipe` gave the data set, or the rows, `digest`."""
    made_at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    blobs.put(f"data/{name}/recipes/{recipe}.json", wire.canonical({"digest": digest, "made_at": made_at}))


def find_dataset(blobs: Readable, name: str, recipe: str, *, job: str) -> str:
    """The digest of the data set that `recipe` gave.

    Raises:
        DataError: it was not prepared in this store; the hint is the command that does it.
    """
    digest = _noted(blobs, name, recipe)
    if digest is None:
        raise DataError(
            f"data.{name}: not prepared yet, or prepared otherwise than this job asks",
            hint=f"treadle prepare {job}",
        )
    return digest


def find_rows(blobs: Readable, name: str, recipe: str) -> Manifest | None:
    """The rows that `recipe` gave, if they and their shards are all in the store."""
    digest = _noted(blobs, name, recipe)
    if digest is None:
        return None
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


def _noted(blobs: Readable, name: str, recipe: str) -> str | None:
    key = f"data/{name}/recipes/{recipe}.json"
    try:
        return str(wire.parse_json(blobs.get(key), where=key)["digest"])
    except NotFoundError:
        return None
    except (KeyError, TypeError):
        raise IntegrityError(f"{key}: not a note of a data set", hint=REBUILD) from None

"""Where prepared data sets are found in a store: by name and recipe.

A recipe is the digest of what a data set is made by: the data section of the job, the text of its
preparation script, and the form of the manifest. Two recipes of one name live side by side; the same
recipe twice is one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

from treadle import wire
from treadle.data.manifest import SCHEMA, Manifest
from treadle.errors import DataError, NotFoundError
from treadle.spec import DataSpec

__all__ = ["find_dataset", "load_manifest", "note_dataset", "recipe_digest"]


class Readable(Protocol):
    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes: ...
    def put(self, key: str, data: bytes) -> Any: ...
    def local_path(self, key: str) -> Path | None: ...


def recipe_digest(spec: DataSpec, script: Path) -> str:
    """The recipe of `spec` prepared by `script`. Where checksums pin the source, its place does not count."""
    body = wire.encode(spec)
    if spec.sha256:
        del body["source"]
    return wire.digest({"data": body, "script": hashlib.sha256(script.read_bytes()).hexdigest(), "schema": SCHEMA})


def note_dataset(blobs: Readable, name: str, recipe: str, digest: str) -> None:
    """Say that `recipe` gave the data set `digest`."""
    blobs.put(f"data/{name}/recipes/{recipe}.json", wire.canonical({"digest": digest}))


def find_dataset(blobs: Readable, name: str, recipe: str, *, job: str) -> str:
    """The digest of the data set that `recipe` gave.

    Raises:
        DataError: it was not prepared in this store; the hint is the command that does it.
    """
    key = f"data/{name}/recipes/{recipe}.json"
    try:
        return str(wire.parse_json(blobs.get(key), where=key)["digest"])
    except NotFoundError:
        raise DataError(
            f"data.{name}: not prepared yet, or prepared otherwise than this job asks",
            hint=f"treadle prepare {job}",
        ) from None


def load_manifest(blobs: Readable, name: str, digest: str) -> Manifest:
    """The verified manifest of a data set.

    Raises:
        DataError: it is not in the store. IntegrityError: it is not what was written.
    """
    key = f"data/{name}/manifests/{digest}.arrow"
    try:
        data = blobs.get(key)
    except NotFoundError:
        raise DataError(f"{key}: the data set is gone from the store", hint="prepare it again") from None
    return Manifest.from_bytes(data, where=key, digest=digest)

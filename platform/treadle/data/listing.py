"""Which data sets a store holds, told from a few hundred bytes of each."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from treadle import wire
from treadle.data.manifest import REBUILD, SCHEMA, Header
from treadle.errors import ConflictError, IntegrityError, NotFoundError, did_you_mean

__all__ = ["Listed", "find_manifest", "list_datasets", "read_header"]

_MAGIC = b"ARROW1\0\0"
_HEAD = len(_MAGIC) + 8  # and the continuation mark and size of the schema message


class Stored(Protocol):
    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes: ...
    def list(self, prefix: str) -> Any: ...
    def children(self, prefix: str) -> list[str]: ...


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One data set of a store.

    Args:
        rows: all of them, those in no split included. num_bytes: of its blocks.
        is_split: whether it is one to train on; else it holds rows alone.
        made_at: when it was built, an ISO time in UTC, or "" where that is not known.
        damage: why its manifest cannot be read, and nothing else is known of it; "" where it can.
    """

    name: str
    digest: str
    rows: int
    num_bytes: int
    num_blocks: int
    is_split: bool
    licence: str
    made_at: str
    damage: str = ""


def list_datasets(blobs: Stored, name: str | None = None) -> list[Listed]:
    """The data sets of a store by name, those of a name in the order they were made."""
    found = []
    for each in blobs.children("data") if name is None else [name]:
        made = _made_at(blobs, each)
        found += [_listed(blobs, each, digest, made.get(digest, "")) for digest in _digests(blobs, each)]
    return sorted(found, key=lambda listed: (listed.name, listed.made_at, listed.digest))


def find_manifest(blobs: Stored, name: str, start: str = "") -> str:
    """The digest of the data set `name` that starts with `start`; of several the one made last.

    Raises:
        NotFoundError: there is none. ConflictError: several, and nothing says which was made last.
    """
    found = [digest for digest in _digests(blobs, name) if digest.startswith(start)]
    if not found:
        asked = f"{name}@{start}" if start else name
        names = blobs.children("data")
        raise NotFoundError(
            f"data set: got {asked!r}, expected one in the store{did_you_mean(name, [n for n in names if n != name])}",
            hint="treadle data ls",
        )
    if len(found) == 1:
        return found[0]
    made = _made_at(blobs, name)
    last = sorted(found, key=lambda digest: made.get(digest, ""))
    if made.get(last[-1], "") == made.get(last[-2], ""):
        raise ConflictError(
            f"data set: got {name!r}, which is {len(found)} of them: {', '.join(digest[:12] for digest in found)}",
            hint=f"treadle data show {name}@{found[0][:12]}",
        )
    return last[-1]


def read_header(blobs: Stored, name: str, digest: str) -> Header:
    """Everything of a manifest but its columns, by two small reads; its digest is not checked.

    Raises:
        IntegrityError: not a manifest of a known schema.
    """
    key = f"data/{name}/manifests/{digest}.arrow"
    head = blobs.get(key, size=_HEAD)
    if len(head) < _HEAD or not head.startswith(_MAGIC):
        raise IntegrityError(f"{key}: not a manifest (no Arrow file)", hint=REBUILD)
    (size,) = struct.unpack("<i", head[-4:])
    if size <= 0:
        raise IntegrityError(f"{key}: not a manifest (got a schema of {size} bytes, expected some)", hint=REBUILD)
    try:
        meta = pa.ipc.read_schema(pa.py_buffer(blobs.get(key, offset=len(_MAGIC), size=8 + size))).metadata[b"treadle"]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{key}: not a manifest ({error})", hint=REBUILD) from None
    return wire.unrecord(Header, meta, kind="dataset", schema=SCHEMA, where=key)


def _digests(blobs: Stored, name: str) -> list[str]:
    start, end = f"data/{name}/manifests/", ".arrow"
    keys = [entry.key for entry in blobs.list(start)]
    return [key[len(start) : -len(end)] for key in keys if key.endswith(end)]


def _made_at(blobs: Stored, name: str) -> dict[str, str]:
    """The last time that each digest was made, where the recipes say it."""
    made: dict[str, str] = {}
    for entry in blobs.list(f"data/{name}/recipes/"):
        with contextlib.suppress(IntegrityError, AttributeError):  # a damaged note costs an order, not a list
            note = wire.parse_json(blobs.get(entry.key), where=entry.key)
            at, digest = str(note.get("made_at", "")), str(note.get("digest"))
            made[digest] = max(at, made.get(digest, ""))
    return made


def _listed(blobs: Stored, name: str, digest: str, made_at: str) -> Listed:
    try:
        header = read_header(blobs, name, digest)
    except IntegrityError as error:  # one file must not hide all others
        return Listed(
            name=name,
            digest=digest,
            rows=0,
            num_bytes=0,
            num_blocks=0,
            is_split=False,
            licence="",
            made_at=made_at,
            damage=error.message,
        )
    return Listed(
        name=name,
        digest=digest,
        rows=sum(block.rows for block in header.blocks),
        num_bytes=sum(block.size for block in header.blocks),
        num_blocks=len(header.blocks),
        is_split=header.preprocessing is not None,
        licence=header.licence,
        made_at=made_at,
    )

"""The three races over one key: be the first, swap what I saw, take the next number.

A conditional write whose reply was lost is tried again by the client underneath and then
meets its own success, which looks like a rival. So the winner is told by content, and what is
written here must differ between writers: it carries a nonce.
"""

from __future__ import annotations

from collections.abc import Callable

from treadle.errors import ConflictError, NotFoundError
from treadle.store.blobs import Blobs, Entry

__all__ = ["claim_next", "create_once", "numbers", "swap"]


def create_once(blobs: Blobs, key: str, data: bytes) -> bool:
    """Whether `key` holds `data` by this write; False where another writer was first."""
    return swap(blobs, key, data, version=None) is not None


def swap(blobs: Blobs, key: str, data: bytes, *, version: str | None) -> Entry | None:
    """The new entry of `key`, or None where it no longer has `version` (None: did not exist)."""
    try:
        return blobs.create(key, data) if version is None else blobs.replace(key, data, version=version)
    except ConflictError:
        pass
    entry = blobs.head(key)
    try:
        return entry if entry is not None and blobs.get(key) == data else None
    except NotFoundError:
        return None


def numbers(blobs: Blobs, folder: str) -> list[int]:
    """The numbers n for which `folder/<n>.json` exists, ascending."""
    stems = (name.removesuffix(".json") for name in blobs.children(folder) if name.endswith(".json"))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def claim_next(blobs: Blobs, folder: str, body: Callable[[int], bytes], *, width: int) -> int:
    """The number now ours: `folder/<number>.json` holds `body(number)`.

    Numbers start at 1 and leave no holes: n + 1 is tried only where n exists.
    """
    number = max(numbers(blobs, folder), default=0) + 1
    while not create_once(blobs, f"{folder}/{number:0{width}d}.json", body(number)):
        number += 1
    return number

"""Bytes under names: the one protocol that every place of storage keeps.

Two places implement it, a local folder and S3; one test-suite runs against both
(tests/unit/store/blob_contract.py). Keys are relative, "/"-separated, and never leave the root.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from treadle.errors import ConfigError

__all__ = ["Blobs", "Data", "Entry", "check_key", "check_prefix", "check_range", "is_key"]

Data: TypeAlias = bytes | bytearray | memoryview
"""Bytes to be written; those of a view are read where they lie."""

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,127}")
_MAX_KEY = 900  # S3 takes 1024 bytes, the store's own prefix included


def is_key(text: str) -> bool:
    """Whether `text` may be a key. What is not (temporary files, markers of other programs) is never listed."""
    return len(text) <= _MAX_KEY and all(_PART.fullmatch(part) for part in text.split("/"))


def check_key(key: str) -> str:
    """`key`, if each part is a plain name: no "..", no absolute path, no empty part.

    Raises:
        ConfigError: otherwise.
    """
    if not is_key(key):
        raise ConfigError(f"key: got {key!r}, expected plain names joined by '/'")
    return key


def check_prefix(prefix: str) -> str:
    """`prefix`, if it can start a key: "", or a key, or a key and a "/".

    Raises:
        ConfigError: otherwise.
    """
    if prefix and not is_key(prefix.removesuffix("/")):
        raise ConfigError(f"prefix: got {prefix!r}, expected plain names joined by '/', or nothing")
    return prefix


def check_range(key: str, offset: int, size: int | None) -> None:
    """Nothing, if the range can be read.

    Raises:
        ConfigError: a negative offset or size.
    """
    if offset < 0 or (size is not None and size < 0):
        raise ConfigError(f"{key}: got offset {offset} and size {size}, expected neither below 0")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One stored object.

    `version` is opaque and changes with every write of other bytes; it is what `replace` compares.
    A place may give equal bytes equal versions (S3 does), so what is replaced carries a growing
    revision or a nonce: else a writer that saw A cannot tell A from A again after B.
    """

    key: str
    size_bytes: int
    version: str


class Blobs(Protocol):
    """A flat map from keys to bytes. Every write is all or nothing and durable on return.

    No key is at the same time the folder of another key ("a" beside "a/b"): a local folder refuses it.
    To change a value, take `head` first, then `get`, then `replace` with the version of the head:
    in this order a write in between makes the replacement fail and is never lost.

    All methods raise TransientError where the place cannot be reached, ConfigError where it
    refuses the credentials, the bucket does not exist or the key is not a plain name.
    """

    uri: str

    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes:
        """The bytes of `key`, or at most `size` of them from `offset`; past the end there are none.

        Raises:
            NotFoundError: no such key.
        """
        ...

    def head(self, key: str) -> Entry | None:
        """The entry of `key`, or None."""
        ...

    def put(self, key: str, data: Data) -> Entry:
        """Write `key`, whatever was there, in parts where it is large."""
        ...

    def holds(self, key: str, data: Data) -> bool:
        """Whether `key` is there with these very bytes, found out as cheaply as the place can.

        A bit that was flipped on the way shows: S3 answers with the checksum of what it stored, and is read back where
        it has none or does not check uploads. A folder compares the size: `put` has flushed the bytes, and reading them
        back would ask the same memory that they were written from (tests/unit/store/blob_contract.py).
        """
        ...

    def create(self, key: str, data: bytes) -> Entry:
        """Write `key` if it does not exist; of several racing writers exactly one wins.

        Raises:
            ConflictError: it exists.
        """
        ...

    def replace(self, key: str, data: bytes, *, version: str) -> Entry:
        """Write `key` if its version still is `version`; of racing writers exactly one wins.

        Raises:
            ConflictError: it has another version, or is gone.
        """
        ...

    def upload(self, key: str, path: Path) -> Entry:
        """Write `key` from a file, in parts where it is large.

        Raises:
            NotFoundError: no such file.
        """
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """The entries whose keys start with `prefix`, in key order."""
        ...

    def children(self, prefix: str) -> list[str]:
        """The names directly below the folder `prefix` ("" or "a/b"), sorted."""
        ...

    def delete(self, key: str) -> None:
        """Remove `key`; a missing one is no error."""
        ...

    def local_path(self, key: str) -> Path | None:
        """Where the file of `key` lies, or would lie, in a local folder; elsewhere None."""
        ...

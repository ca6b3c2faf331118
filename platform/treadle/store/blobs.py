"""Bytes under names: the one protocol that every place of storage keeps.

Two places implement it, a local folder and S3; one test-suite runs against both
(tests/unit/store/blob_contract.py). Keys are relative, "/"-separated, and never leave the root.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from treadle.errors import ConfigError

__all__ = ["Blobs", "Entry", "check_key"]

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,127}")


def check_key(key: str) -> str:
    """`key`, if each part is a plain name: no "..", no absolute path, no empty part.

    Raises:
        ConfigError: otherwise.
    """
    parts = key.split("/")
    if not all(_PART.fullmatch(part) for part in parts) or len(key) > 900:
        raise ConfigError(f"key: got {key!r}, expected plain names joined by '/'")
    return key


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One stored object.

    `version` is opaque and changes with every write of other bytes; it is what `replace` compares.
    """

    key: str
    size_bytes: int
    version: str


class Blobs(Protocol):
    """A flat map from keys to bytes. Every write is all or nothing and durable on return.

    All methods raise TransientError where the place cannot be reached, ConfigError where it
    refuses the credentials or the bucket does not exist.
    """

    uri: str

    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes:
        """The bytes of `key`, or `size` of them from `offset`.

        Raises:
            NotFoundError: no such key.
        """
        ...

    def head(self, key: str) -> Entry | None:
        """The entry of `key`, or None."""
        ...

    def put(self, key: str, data: bytes) -> Entry:
        """Write `key`, whatever was there."""
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
        """Write `key` from a file, in parts where it is large."""
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
        """The file that holds `key`, where the place is a local folder; else None."""
        ...

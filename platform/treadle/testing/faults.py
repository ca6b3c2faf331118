"""Places of storage that fail where a test tells them to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from treadle.errors import ConflictError, TransientError
from treadle.store.blobs import Blobs, Data, Entry

__all__ = ["Died", "FaultBlobs"]

T = TypeVar("T")


class Died(BaseException):
    """The process ends here. Not an `Exception`: nothing in the program may outlive it."""


class FaultBlobs:
    """`inner`, whose writes are counted from 1 and go wrong at chosen numbers.

    Args:
        inner: the store that holds the bytes.
        die_before: the write that never happens because the process dies.
        die_after: the write that happens, and then the process dies.
        lose_reply: the conditional write that happens and is then answered as a conflict, which
            is what a client sees that lost the first reply and tried again.
        refuse: how many writes are answered with TransientError before any goes through.
        flip: how many plain writes arrive with one bit of another value, and are acknowledged.
    """

    def __init__(
        self,
        inner: Blobs,
        *,
        die_before: int = 0,
        die_after: int = 0,
        lose_reply: int = 0,
        refuse: int = 0,
        flip: int = 0,
    ) -> None:
        self.uri = inner.uri
        self.writes = 0
        self._inner = inner
        self._die_before = die_before
        self._die_after = die_after
        self._lose_reply = lose_reply
        self._refuse = refuse
        self._flip = flip
        self._lock = threading.Lock()

    def put(self, key: str, data: Data) -> Entry:
        return self._write(lambda: self._inner.put(key, self._on_the_way(data)))

    def holds(self, key: str, data: Data) -> bool:
        return self._inner.holds(key, data)

    def create(self, key: str, data: bytes) -> Entry:
        return self._write(lambda: self._inner.create(key, data), conditional=True)

    def replace(self, key: str, data: bytes, *, version: str) -> Entry:
        return self._write(lambda: self._inner.replace(key, data, version=version), conditional=True)

    def upload(self, key: str, path: Path) -> Entry:
        return self._write(lambda: self._inner.upload(key, path))

    def delete(self, key: str) -> None:
        self._write(lambda: self._inner.delete(key))

    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes:
        return self._inner.get(key, offset=offset, size=size)

    def head(self, key: str) -> Entry | None:
        return self._inner.head(key)

    def children(self, prefix: str) -> list[str]:
        return self._inner.children(prefix)

    def local_path(self, key: str) -> Path | None:
        return self._inner.local_path(key)

    def list(self, prefix: str) -> Iterator[Entry]:
        return self._inner.list(prefix)

    def _on_the_way(self, data: Data) -> Data:
        with self._lock:
            if not self._flip or not data:
                return data
            self._flip -= 1
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 0x10
        return flipped

    def _write(self, act: Callable[[], T], *, conditional: bool = False) -> T:
        with self._lock:
            self.writes += 1
            number = self.writes
        if number <= self._refuse:
            raise TransientError(f"{self.uri}: refused write {number}")
        if number == self._die_before:
            raise Died(f"before write {number}")
        result = act()
        if number == self._die_after:
            raise Died(f"after write {number}")
        if number == self._lose_reply and conditional:
            raise ConflictError(f"{self.uri}: exists, expected none (write {number})")
        return result

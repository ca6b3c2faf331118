"""A store that is only read: what is written below one folder stands in another place, and nothing else is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from treadle.errors import InternalError
from treadle.store.blobs import Blobs, Data, Entry

__all__ = ["Aside"]


class Aside:
    """`Blobs` of two places.

    Args:
        blobs: read; never written to. side: holds what stands below `folder`.
        folder: such as "runs/trial".
    """

    def __init__(self, blobs: Blobs, side: Blobs, *, folder: str) -> None:
        self.uri = blobs.uri
        self._blobs = blobs
        self._side = side
        self._folder = f"{folder}/"

    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes:
        return self._place(key).get(key, offset=offset, size=size)

    def head(self, key: str) -> Entry | None:
        return self._place(key).head(key)

    def put(self, key: str, data: Data) -> Entry:
        return self._writable(key).put(key, data)

    def holds(self, key: str, data: Data) -> bool:
        return self._place(key).holds(key, data)

    def create(self, key: str, data: bytes) -> Entry:
        return self._writable(key).create(key, data)

    def replace(self, key: str, data: bytes, *, version: str) -> Entry:
        return self._writable(key).replace(key, data, version=version)

    def upload(self, key: str, path: Path) -> Entry:
        return self._writable(key).upload(key, path)

    def list(self, prefix: str) -> Iterator[Entry]:
        return self._place(prefix).list(prefix)

    def children(self, prefix: str) -> list[str]:
        return self._place(prefix).children(prefix)

    def delete(self, key: str) -> None:
        self._writable(key).delete(key)

    def local_path(self, key: str) -> Path | None:
        return self._place(key).local_path(key)

    def _place(self, key: str) -> Blobs:
        return self._side if f"{key}/".startswith(self._folder) else self._blobs

    def _writable(self, key: str) -> Blobs:
        if not key.startswith(self._folder):
            raise InternalError(f"{key}: got a write to a store that is only read, expected one below {self._folder}")
        return self._side

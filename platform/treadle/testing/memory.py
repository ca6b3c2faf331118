"""A place of storage inside the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import xxhash

from treadle.errors import ConfigError, ConflictError, NotFoundError
from treadle.store.blobs import Data, Entry, check_key, check_prefix, check_range

__all__ = ["MemoryBlobs"]


class MemoryBlobs:
    """`Blobs` in a dictionary, safe to share between threads.

    A version is a hash of the content, as S3's ETag is: writing old bytes back brings the old
    version back, so a compare-and-swap that relies on fresh versions fails here too.
    """

    def __init__(self, uri: str = "memory://test") -> None:
        self.uri = uri
        self._data: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes:
        check_range(key, offset, size)
        with self._lock:
            data = self._data.get(check_key(key))
        if data is None:
            raise NotFoundError(f"{self.uri}/{key}: got no such key, expected one that was written")
        return data[offset:] if size is None else data[offset : offset + size]

    def head(self, key: str) -> Entry | None:
        with self._lock:
            data = self._data.get(check_key(key))
        return None if data is None else _entry(key, data)

    def put(self, key: str, data: Data) -> Entry:
        with self._lock:
            return self._write(key, bytes(data))

    def holds(self, key: str, data: Data) -> bool:
        with self._lock:
            return self._data.get(check_key(key)) == bytes(data)

    def create(self, key: str, data: bytes) -> Entry:
        with self._lock:
            if check_key(key) in self._data:
                raise ConflictError(f"{self.uri}/{key}: got a key that exists, expected to create it")
            return self._write(key, data)

    def replace(self, key: str, data: bytes, *, version: str) -> Entry:
        with self._lock:
            seen = self._data.get(check_key(key))
            if seen is None or _entry(key, seen).version != version:
                raise ConflictError(f"{self.uri}/{key}: got another version or none, expected version {version}")
            return self._write(key, data)

    def upload(self, key: str, path: Path) -> Entry:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise NotFoundError(f"upload to {key}: got no file {path}, expected one") from None
        return self.put(key, data)

    def children(self, prefix: str) -> list[str]:
        below = f"{check_prefix(prefix).removesuffix('/')}/" if prefix else ""
        with self._lock:
            return sorted({key[len(below) :].split("/", 1)[0] for key in self._data if key.startswith(below)})

    def delete(self, key: str) -> None:
        with self._lock:
            self._data.pop(check_key(key), None)

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def list(self, prefix: str) -> Iterator[Entry]:
        check_prefix(prefix)
        with self._lock:
            found = sorted((key, data) for key, data in self._data.items() if key.startswith(prefix))
        return iter([_entry(key, data) for key, data in found])

    def _write(self, key: str, data: bytes) -> Entry:
        parts = check_key(key).split("/")
        folders = {"/".join(parts[:depth]) for depth in range(1, len(parts))}
        if folders & self._data.keys() or any(other.startswith(f"{key}/") for other in self._data):
            raise ConfigError(f"{self.uri}/{key}: got a key that is the folder of another key, expected plain names")
        self._data[key] = data
        return _entry(key, data)


def _entry(key: str, data: bytes) -> Entry:
    return Entry(key=key, size_bytes=len(data), version=xxhash.xxh3_128_hexdigest(data))

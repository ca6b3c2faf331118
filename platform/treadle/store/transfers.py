"""Files that arrive as they left: several beside one another, and none believed before it was looked at."""

from __future__ import annotations

import io
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from treadle.errors import IntegrityError, NotFoundError
from treadle.store.blobs import Blobs, Data
from treadle.store.sealed import checksum, read_verified

__all__ = ["Sums", "read_files", "write_files"]

Sums = dict[str, tuple[int, str]]
"""Size in bytes and xxh3_128 of each file."""

_NUM_AT_ONCE = 4
_NUM_TRIES = 3
_PART_BYTES = 16 << 20


def write_files(blobs: Blobs, files: Mapping[str, Data]) -> Sums:
    """Write each key; returns when the place holds the very bytes, with what to check them by later.

    A file that was damaged on the way up is sent again.

    Raises:
        IntegrityError: it was damaged every time; the message names the key.
    """

    def write(key: str) -> tuple[int, str]:
        data = files[key]
        told = len(data), checksum(data)  # of the bytes in memory, before anything could happen to them
        for _ in range(_NUM_TRIES):
            blobs.put(key, data)
            if blobs.holds(key, data):
                return told
        entry = blobs.head(key)
        seen = "nothing" if entry is None else f"{entry.size_bytes} bytes" + " of other content" * (told[0] > 0)
        raise IntegrityError(
            f"{blobs.uri}/{key}: got {seen} after writing it {_NUM_TRIES} times, expected {told[0]} bytes as sent",
            hint="look for a proxy or a disk that changes bytes",
        )

    with ThreadPoolExecutor(min(_NUM_AT_ONCE, max(1, len(files))), thread_name_prefix="treadle-write") as pool:
        return dict(zip(files, pool.map(write, files), strict=True))


def read_files(blobs: Blobs, files: Mapping[str, tuple[int, str]]) -> dict[str, bytes]:
    """The bytes of each key, equal to those that were written; large ones come in parts.

    Raises:
        IntegrityError: one is missing, of another size or of another content; the message names its key.
    """
    pool = ThreadPoolExecutor(_NUM_AT_ONCE, thread_name_prefix="treadle-read")
    try:
        begun = {key: _Reading(pool, blobs, key, size_bytes) for key, (size_bytes, _) in files.items()}
        return {key: begun[key].verified(size_bytes, xxh3_128) for key, (size_bytes, xxh3_128) in files.items()}
    finally:
        pool.shutdown(cancel_futures=True)


class _Reading:
    """One file on its way. A store next door gives it whole, a far one in parts that are read beside one another."""

    def __init__(self, pool: ThreadPoolExecutor, blobs: Blobs, key: str, size_bytes: int) -> None:
        self._blobs = blobs
        self._key = key
        self._buffer = io.BytesIO()  # lends its memory to be filled, and gives it away as bytes without a copy
        self._whole: Future[bytes] | None = None
        self._parts: list[Future[bool]] = []
        if size_bytes <= _PART_BYTES or blobs.local_path(key) is not None:
            self._whole = pool.submit(blobs.get, key)
            return
        self._buffer.seek(size_bytes - 1)
        self._buffer.write(b"\0")
        self._parts = [pool.submit(self._fill, start, size_bytes) for start in range(0, size_bytes, _PART_BYTES)]

    def verified(self, size_bytes: int, xxh3_128: str) -> bytes:
        data = self._arrived(size_bytes)
        if data is not None and len(data) == size_bytes and checksum(data) == xxh3_128:
            return data
        del data
        # Damage on the way must not condemn what is stored; what is said of it is said there.
        return read_verified(self._blobs, self._key, size_bytes=size_bytes, xxh3_128=xxh3_128)

    def _arrived(self, size_bytes: int) -> bytes | None:
        try:
            if self._whole is not None:
                return self._whole.result()
            if all(part.result() for part in self._parts):
                entry = self._blobs.head(self._key)  # ranges do not show what lies behind them
                return self._buffer.getvalue() if entry and entry.size_bytes == size_bytes else None
        except (IntegrityError, NotFoundError):
            pass
        return None

    def _fill(self, start: int, size_bytes: int) -> bool:
        end = min(start + _PART_BYTES, size_bytes)
        part = self._blobs.get(self._key, offset=start, size=end - start)
        if len(part) != end - start:
            return False
        with self._buffer.getbuffer() as memory:
            memory[start:end] = part
        return True

"""Blocks of shards that lie in a store far away: read by range, many at a time, and kept on this machine.

A link with a delay gives its rate only to whoever asks for much at once: over one of 25 ms, requests of 1 MB bring 20
MB/s one after the other and 150 MB/s sixteen at a time.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from treadle.data.blocks import checksum
from treadle.data.load.block_cache import BlockCache
from treadle.data.manifest import REBUILD, Block
from treadle.errors import IntegrityError, TransientError

__all__ = ["FarBlocks", "Ranged", "Reading"]


_KEPT = 8
"""Blocks read ahead and not taken yet, in windows, that may be in memory where there is no cache."""


class _Coming(NamedTuple):
    """A block that was asked for: its request, and how many blocks had been taken before."""

    future: Future[dict[int, bytes]]
    taken: int


class Ranged(Protocol):
    """A store that gives parts of what it holds."""

    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes: ...


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a far store is read.

    Args:
        num_requests: at a time. max_request_bytes: neighbouring blocks share a request up to this size.
        waits_s: before each new try of a request that failed for now, each made longer or shorter by a half at most.
        held_bytes: of blocks in use at a time. In a cache folder they are files in memory, which the system may write
            off; without one they are this process's own.
        window: requests under way, from which on nothing more is read ahead.
    """

    num_requests: int = 16
    max_request_bytes: int = 2 << 20
    waits_s: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    held_bytes: int = 1 << 30
    window: int = 32


class FarBlocks:
    """Blocks of any store.

    Args:
        store: where shards are.
        blocks: of the manifest.
        cache: where blocks are kept between epochs and runs; None: in memory alone, while they are held.
        reading: requests, tries and sizes.
    """

    def __init__(
        self, store: Ranged, blocks: Sequence[Block], cache: BlockCache | None, reading: Reading | None = None
    ) -> None:
        self._store = store
        self._blocks = blocks
        self._cache = cache
        self._reading = reading or Reading()
        self.max_bytes: int | None = self._reading.held_bytes
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[int, _Coming] = {}
        self._taken = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def expect(self, numbers: Iterable[int]) -> bool:
        """Begin to read what is neither kept nor under way; False where enough is."""
        most = _KEPT * self._reading.window
        with self._lock:
            if len(self._coming) >= most:
                self._forget(most)
                return False
            self._start([n for n in set(numbers) if self._cache is None or not self._cache.has(self._checksum(n))])
            under_way = {coming.future for coming in self._coming.values() if not coming.future.done()}
            return len(under_way) < self._reading.window

    def raw(self, numbers: Sequence[int]) -> list[Any]:
        """The bytes of these blocks, of the cache or of the store.

        Raises:
            TransientError: the store does not answer, however often it is asked.
            IntegrityError: the shard is cut off.
        """
        found = {n: None if self._cache is None else self._cache.get(self._checksum(n)) for n in numbers}
        missing = [n for n in numbers if found[n] is None]
        with self._lock:
            self._start(missing)
            futures = {n: self._coming[n].future for n in missing}
        for n, future in futures.items():
            found[n] = future.result()[n]
            with self._lock:
                self._taken += 1
                if n in self._coming and self._coming[n].future is future:
                    del self._coming[n]
        return [found[n] for n in numbers]

    def damaged(self, number: int) -> bool:
        """Asking once more may help: the disk of the cache or the way may be to blame."""
        if self._cache is not None:
            self._cache.drop(self._checksum(number))
        return True

    def close(self) -> None:
        """End all threads; what is under way is given up."""
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _checksum(self, number: int) -> str:
        return self._blocks[number].checksum

    def _start(self, numbers: Iterable[int]) -> None:
        """Ask for what is not under way; called under the lock."""
        wanted = sorted(n for n in set(numbers) if n not in self._coming)
        for part in _joined(wanted, self._blocks, self._reading.max_request_bytes):
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._reading.num_requests, thread_name_prefix="treadle-fetch")
            future = self._pool.submit(self._fetch, part)
            self._coming.update(dict.fromkeys(part, _Coming(future, self._taken)))

    def _forget(self, most: int) -> None:
        """Let go of what came and was passed over, such as the rest of an epoch that ended early."""
        passed = [n for n, c in self._coming.items() if c.future.done() and self._taken - c.taken > most]
        for n in passed:
            del self._coming[n]

    def _fetch(self, part: Sequence[int]) -> dict[int, bytes]:
        """The bytes of neighbouring blocks; those that are what was written go into the cache."""
        needed: set[int] = set()
        try:
            found = self._parted(part)
            needed = {n for n, data in found.items() if not self._keep(n, data)}
            return found
        finally:
            # What the disk has need not stay in memory, and what failed is asked for anew when it is needed; who
            # waits for it already has the future.
            with self._lock:
                for n in set(part) - needed:
                    self._coming.pop(n, None)

    def _keep(self, number: int, data: bytes) -> bool:
        """Whether there is no need to hold a block in memory: the cache has it, or it is damaged."""
        if self._cache is None:
            return False
        return checksum(data) != self._checksum(number) or self._cache.put(self._checksum(number), data)

    def _parted(self, part: Sequence[int]) -> dict[int, bytes]:
        first, last = self._blocks[part[0]], self._blocks[part[-1]]
        size = last.offset + last.size - first.offset
        whole = self._asked(first.key, first.offset, size)
        if len(whole) < size:
            got = first.offset + len(whole)
            raise IntegrityError(f"{first.key}: got {got} bytes, expected {first.offset + size} or more", hint=REBUILD)
        starts = {n: self._blocks[n].offset - first.offset for n in part}
        return {n: whole[start : start + self._blocks[n].size] for n, start in starts.items()}

    def _asked(self, key: str, offset: int, size: int) -> bytes:
        """A range, asked for again while the store says that this may help."""
        for wait_s in self._reading.waits_s:
            try:
                return self._store.get(key, offset=offset, size=size)
            except TransientError:
                if self._stop.wait(wait_s * (0.5 + secrets.randbelow(1000) / 1000)):
                    raise
        return self._store.get(key, offset=offset, size=size)


def _joined(numbers: Sequence[int], blocks: Sequence[Block], max_bytes: int) -> Iterator[list[int]]:
    """`numbers`, sorted, in parts that one request each brings: neighbours in one shard."""
    part: list[int] = []
    for n in numbers:
        if part:
            first, last, block = blocks[part[0]], blocks[part[-1]], blocks[n]
            is_next = block.key == last.key and block.offset == last.offset + last.size
            if not is_next or block.offset + block.size - first.offset > max_bytes:
                yield part
                part = []
        part.append(n)
    if part:
        yield part

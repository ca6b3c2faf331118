"""Pieces of work carried out by a few threads of this process: NumPy, hashing and files let them run side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["run_inline"]

T = TypeVar("T")
U = TypeVar("U")

NUM_THREADS = 2
"""Each holds a run or a zone with what becomes of it in memory, some 150 MB: more of them would be more of that."""


def run_inline(work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """`work` of each item, in order; items are taken as there are threads for them, so that they may be many.

    Raises:
        What `work` raises first, in the order of the items; no further item is begun.
    """
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="treadle-build") as pool:
        running: deque[Future[U]] = deque()
        try:
            for item in items:
                running.append(pool.submit(work, item))
                if len(running) > NUM_THREADS:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()

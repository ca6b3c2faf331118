"""Pieces of work carried out by a few threads of this process: NumPy, hashing and files let them run side by side."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["leave_if_stopped", "run_inline"]

T = TypeVar("T")
U = TypeVar("U")

NUM_THREADS = 2
"""Each holds a run or a zone with what becomes of it in memory, some 150 MB: more of them would be more of that."""
_own = threading.local()
"""Of each thread: the event that asks it to leave, where it has one."""


def run_inline(work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """`work` of each item, in order; items are taken as there are threads for them, so that they may be many.

    Raises:
        What `work` raises first, in the order of the items; no further item is begun.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(NUM_THREADS, "treadle-build", initializer=_enter, initargs=(stop,)) as pool:
        running: deque[Future[U]] = deque()
        try:
            for item in items:
                running.append(pool.submit(work, item))
                if len(running) > NUM_THREADS:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            stop.set()
            for future in running:
                future.cancel()


def leave_if_stopped() -> None:
    """Nothing, unless nobody waits any more for the work of this thread: an interrupt must not wait for it either.

    Raises:
        CancelledError: then.
    """
    stop: threading.Event | None = getattr(_own, "stop", None)
    if stop is not None and stop.is_set():
        raise CancelledError


def _enter(stop: threading.Event) -> None:
    _own.stop = stop

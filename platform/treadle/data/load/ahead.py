"""Work done ahead by one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["ahead"]


def ahead(make: Callable[[], Iterator[Any]], *, depth: int = 2) -> Iterator[Any]:
    """The items of `make()`, produced by one thread at most `depth` items ahead.

    NumPy's copies release the interpreter lock, so one thread costs a fifth of worker processes. The
    thread ends when the iterator is closed or exhausted; an error in it is raised here.
    """
    items: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()
    end = object()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                items.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def run() -> None:
        try:
            for item in make():
                if not put((item, None)):
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))

    thread = threading.Thread(target=run, name="treadle-loader", daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join()

"""Something done again and again beside the work."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from treadle.errors import TreadleError

__all__ = ["beating"]


@contextmanager
def beating(beat: Callable[[], object], *, every_s: float) -> Iterator[None]:
    """`beat` is called at once and every so many seconds while the block runs; a store that is away is only said."""
    closed = threading.Event()

    def go_on() -> None:
        while True:
            try:
                beat()
            except TreadleError as error:
                print(f"heartbeat: {error.message}", file=sys.stderr)
            if closed.wait(every_s):
                return

    thread = threading.Thread(target=go_on, name="treadle-heart", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()

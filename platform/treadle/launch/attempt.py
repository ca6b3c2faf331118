"""What every attempt does besides its work, whoever makes it: it beats, keeps its log, and records how it ended."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from treadle.errors import PreemptedError, TreadleError
from treadle.store import AttemptEnd, AttemptStatus, Journal
from treadle.track import now_s

__all__ = ["BEAT_S", "beating", "end_of", "failed_with", "logging_to"]

BEAT_S = 5.0
_END_OF_LOG = b"\0end of log\0"


def end_of(summary: dict[str, Any]) -> AttemptEnd:
    """The end that the summary of rank 0 tells of."""
    status = AttemptStatus(summary["status"])
    return AttemptEnd(
        status=status,
        exit_code=PreemptedError.exit_code if status is AttemptStatus.preempted else 0,
        update=summary["update"],
        metrics=summary["metrics"],
        model_version=summary["model_version"],
    )


def failed_with(error: TreadleError) -> AttemptEnd:
    """The end by an error."""
    return AttemptEnd(status=AttemptStatus.failed, exit_code=error.exit_code, error=error.to_json())


@contextmanager
def beating(beat: Callable[[], object], *, every_s: float = BEAT_S) -> Iterator[None]:
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


@contextmanager
def logging_to(journal: Journal) -> Iterator[None]:
    """Everything this process and its children print goes into the store as well as to where it went."""
    read_end, write_end = os.pipe()
    kept = os.dup(2)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(write_end, 1)
    os.dup2(write_end, 2)
    os.close(write_end)

    def copy() -> None:
        rest = b""
        while not rest.endswith(_END_OF_LOG):
            data = os.read(read_end, 1 << 16)
            *lines, rest = (rest + data).split(b"\n")
            os.write(kept, data.removesuffix(_END_OF_LOG))
            for line in lines:
                journal.append({"time": now_s(), "text": line.decode("utf-8", "replace")})

    thread = threading.Thread(target=copy, name="treadle-log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.write(1, _END_OF_LOG)  # children may still hold the pipe open, so its end never comes
        thread.join(timeout=10)
        os.dup2(kept, 1)
        os.dup2(kept, 2)
        os.close(read_end)
        journal.close()

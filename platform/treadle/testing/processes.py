"""Processes that stand still."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from treadle.errors import NotFoundError, TransientError

__all__ = ["stopped"]


@contextlib.contextmanager
def stopped(pid: int, *, timeout_s: float = 5.0) -> Iterator[None]:
    """Within the block no thread of the process runs (SIGSTOP); afterwards it goes on (SIGCONT).

    Raises:
        NotFoundError: no such process.
        TransientError: it did not stop in time.
    """
    try:
        os.kill(pid, signal.SIGSTOP)
    except ProcessLookupError:
        raise NotFoundError(f"pid: got {pid}, expected a process that lives") from None
    try:
        deadline = time.monotonic() + timeout_s
        while not _state(pid).startswith(("T", "t")):
            if time.monotonic() > deadline:
                raise TransientError(f"pid {pid}: got state {_state(pid)!r} after SIGSTOP, expected 'T'")
            time.sleep(0.005)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.stdout.strip()

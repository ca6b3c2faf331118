"""What people ask of a running attempt, read from the store by a thread of rank 0."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from treadle.errors import TreadleError
from treadle.store import Request, RequestKind, Runs

__all__ = ["Mailbox", "NoMailbox"]

POLL_S = 0.5
LAST_S = 2.5
"""Least time kept for the last commit before a machine goes away."""


class Committing(Protocol):
    """Who knows how long a commit takes."""

    @property
    def last_commit_s(self) -> float: ...


class Mailbox:
    """Wishes as flags; the loop only reads them.

    Args:
        attempt: whose wishes; those to others are left alone. saver: what a second commit before a deadline takes.
    """

    def __init__(self, runs: Runs, run: str, attempt: int, saver: Committing) -> None:
        self._runs = runs
        self._run = run
        self._attempt = attempt
        self._saver = saver
        self._seen = 0
        self._deadline_s: float | None = None
        self._stop = threading.Event()
        self._checkpoint = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="treadle-mailbox", daemon=True)
        self._thread.start()

    @property
    def is_drained(self) -> bool:
        """Whether the machine is going away."""
        return self._deadline_s is not None

    def wants_stop(self) -> bool:
        if self._stop.is_set():
            return True
        # Work goes on as long as there is time for a last commit: one on sight alone would lose all after it.
        deadline_s = self._deadline_s
        return deadline_s is not None and time.monotonic() > deadline_s - max(LAST_S, 2 * self._saver.last_commit_s)

    def wants_checkpoint(self) -> bool:
        if not self._checkpoint.is_set():
            return False
        self._checkpoint.clear()  # only what was seen: a wish that arrives meanwhile stays
        return True

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            try:
                found = self._runs.requests(self._run, after=self._seen, attempt=self._attempt)
            except TreadleError:
                continue  # the store is away for a moment; the wish stays there
            for request in found:
                self._seen = max(self._seen, request.seq)
                self._take(request)

    def _take(self, request: Request) -> None:
        if request.kind is RequestKind.stop:
            self._stop.set()
            return
        self._checkpoint.set()
        if request.kind is RequestKind.drain:
            until_s = time.monotonic() + (request.within_s or 0.0)
            self._deadline_s = until_s if self._deadline_s is None else min(self._deadline_s, until_s)


class NoMailbox:
    """For ranks above 0, which hear of wishes through rank 0."""

    def wants_stop(self) -> bool:
        return False

    def wants_checkpoint(self) -> bool:
        return False

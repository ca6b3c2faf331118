"""Signs of life of a rank, in memory that it shares with the process that watches it.

They are written outside of any collective, so that a rank that waits for another looks different from one that hangs.
"""

from __future__ import annotations

import enum
import mmap
import time
from dataclasses import dataclass

__all__ = ["Beat", "Phase", "Pulse"]

_UPDATE, _PHASE, _WAITING, _COMMITTED = range(4)
_WAITED, _CHANGED = range(2)
_TIMES, _WORDS = 4, 6
"""Where the times begin, and where all ends."""


class Phase(enum.IntEnum):
    """What a rank does; each has its own patience (launch/agent.py)."""

    starting = 0
    training = 1
    reading = 2
    evaluating = 3
    ending = 4


@dataclass(frozen=True, kw_only=True)
class Beat:
    """One look at a rank.

    Args:
        update: updates made. committed: the update of the last checkpoint of this process, or -1.
        is_waiting: inside a collective, for others. waited_s: seconds spent so, in all.
        changed_s: on the monotonic clock of the machine, when any of this changed.
    """

    update: int
    phase: Phase
    is_waiting: bool
    waited_s: float
    changed_s: float
    committed: int


class Pulse:
    """Written by one process, read by its parent. Any thread of the writer may write.

    Each field is one aligned word with a single writer, stored at once: a reader never sees half of one, nor a field
    that another call had not changed yet. (`struct.pack_into` zeroes its whole target before it fills it, which a
    reader sees in one of ten looks at a busy writer.)

    Cost: half a microsecond a call.
    """

    def __init__(self) -> None:
        memory = memoryview(mmap.mmap(-1, mmap.PAGESIZE))  # anonymous and shared: a fork sees the same pages
        self._numbers, self._times = memory[: 8 * _TIMES].cast("q"), memory[8 * _TIMES : 8 * _WORDS].cast("d")
        self._numbers[_COMMITTED] = -1
        self._waiting_since = 0.0
        self._touch()

    def at(self, update: int) -> None:
        """So many updates are made."""
        self._touch()
        self._numbers[_UPDATE] = update

    def enter(self, phase: str) -> None:
        """What comes now: the name of a `Phase`."""
        self._touch()
        self._numbers[_PHASE] = Phase[phase]

    def meet(self, state: str) -> None:
        """Say "waiting" before a collective and "computing" after it."""
        now = self._touch()
        if state == "waiting":
            self._waiting_since = now
            self._numbers[_WAITING] = 1
        elif self._numbers[_WAITING]:
            self._times[_WAITED] += now - self._waiting_since
            self._numbers[_WAITING] = 0

    def commit(self, update: int) -> None:
        """The state after so many updates is durable."""
        self._touch()
        self._numbers[_COMMITTED] = update

    def read(self) -> Beat:
        update, phase, waiting, committed = self._numbers
        waited_s = self._times[_WAITED]
        return Beat(
            update=update,
            phase=Phase(phase),
            is_waiting=bool(waiting),
            waited_s=waited_s,
            changed_s=self._times[_CHANGED],  # written first and read last: never older than what is seen beside it
            committed=committed,
        )

    def _touch(self) -> float:
        now = time.monotonic()
        self._times[_CHANGED] = now
        return now

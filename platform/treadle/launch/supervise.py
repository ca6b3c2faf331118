"""What to do about a lost rank: decided from values alone, without a process, a clock or a store."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from treadle.errors import (
    InfeasibleError,
    InternalError,
    PreemptedError,
    TransientError,
    TreadleError,
    error_from_json,
)
from treadle.spec import ClusterSpec

__all__ = ["Cause", "Loss", "Losses", "slow_ranks"]

SAME_UPDATE = 3
"""Losses at one update after which it is the update that is wrong, not the machine."""
SLOW = 2.0
"""A rank that computes so many times as long as the median of the others is named."""
LEAST_SLOW_S = 0.002
"""Shorter updates differ by chance."""


class Cause(enum.Enum):
    """How a rank was lost."""

    killed = "killed"
    exited = "exited"
    hung = "hung"
    memory = "memory"
    node = "node"
    preempted = "preempted"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One lost rank.

    Args:
        update: the updates it had made. error: what it said at the end, as `TreadleError.to_json` gives it.
    """

    rank: int
    cause: Cause
    update: int
    words: str = ""
    error: Mapping[str, Any] | None = None


class Losses:
    """The losses of an attempt, and whether it goes on after another.

    Args:
        spec: says how many it outlives. run: for hints.
    """

    def __init__(self, spec: ClusterSpec, run: str) -> None:
        self._spec = spec
        self._run = run
        self._committed = -1
        self._in_a_row = 0
        self._preemptions = 0
        self._out_of_memory = 0
        self._at_update: Counter[int] = Counter()

    def judge(self, loss: Loss, committed: int, *, is_new: bool = True) -> TreadleError | None:
        """None where the run goes on, else the error that ends it.

        Args:
            committed: update of the newest checkpoint; losses before it no longer count.
            is_new: False for one that came with another, which was judged.
        """
        if loss.error is not None:
            error = error_from_json(loss.error)
            if not error.retry:
                return error
        if committed > self._committed:
            self._committed, self._in_a_row = committed, 0
        if not is_new:
            return None
        if loss.cause is Cause.preempted:
            return self._preempted(loss)
        self._in_a_row += 1
        # What can be tried again, such as a store that is away, has nothing to do with the update.
        if loss.cause is not Cause.node and loss.error is None:
            self._at_update[self._at(loss)] += 1
        return self._repeated(loss) or self._memory(loss) or self._exhausted(loss)

    def _at(self, loss: Loss) -> int:
        """The updates before the one that was lost: none is of a process that had not been restored yet."""
        return loss.update or max(0, self._committed)

    def _preempted(self, loss: Loss) -> TreadleError | None:
        self._preemptions += 1
        limit = self._spec.max_preemptions
        if limit is None or self._preemptions <= limit:
            return None
        return PreemptedError(
            f"cluster.max_preemptions: got preemption {self._preemptions}, expected at most {limit}",
            hint=self._resume(),
        )

    def _repeated(self, loss: Loss) -> TreadleError | None:
        if loss.cause is Cause.node or loss.error is not None or self._at_update[self._at(loss)] < SAME_UPDATE:
            return None
        update = self._at(loss) + 1
        return InternalError(
            f"update {update} was lost {SAME_UPDATE} times, the last time on rank {loss.rank}: {_said(loss)}",
            hint=f"treadle logs {self._run}; another try would end there again",
            update=loss.update,
            rank=loss.rank,
        )

    def _memory(self, loss: Loss) -> TreadleError | None:
        self._out_of_memory += loss.cause is Cause.memory
        if self._out_of_memory < 2:
            return None
        return InfeasibleError(
            f"rank {loss.rank} was killed for memory a second time, at update {loss.update}: {_said(loss)}",
            hint="a smaller batch.max_slots, fewer workers on a machine, or more memory",
        )

    def _exhausted(self, loss: Loss) -> TreadleError | None:
        if self._in_a_row <= self._spec.max_failures:
            return None
        return TransientError(
            f"rank {loss.rank} was lost at update {loss.update} ({_said(loss)}): loss {self._in_a_row} without a "
            f"checkpoint between, expected at most cluster.max_failures = {self._spec.max_failures}",
            hint=self._resume(),
        )

    def _resume(self) -> str:
        return f"treadle resume {self._run}"


def _said(loss: Loss) -> str:
    if loss.error is not None:
        return str(loss.error.get("message", loss.cause.value))
    return loss.words or loss.cause.value


def slow_ranks(busy_s: Sequence[float]) -> list[int]:
    """The ranks that hold the others up, by what an update costs each rank without waiting for others.

    Args:
        busy_s: seconds an update, by rank; the mean over a window of updates.
    """
    found: list[int] = []
    for rank, seconds in enumerate(busy_s):
        others = [*busy_s[:rank], *busy_s[rank + 1 :]]
        if others and seconds > SLOW * median(others) and seconds - median(others) > LEAST_SLOW_S:
            found.append(rank)
    return found

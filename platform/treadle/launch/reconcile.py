"""Runs whose attempt has no end and shows no sign of life: the store remembers what no cluster does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from treadle.errors import ConflictError, TransientError
from treadle.launch.attempt import BEAT_S
from treadle.store import AttemptEnd, AttemptStatus, Runs, RunState, RunStatus

__all__ = ["LOST_S", "find_lost", "mark_lost"]

LOST_S = 2 * BEAT_S + 1
"""Without a beat for so long an attempt counts as lost. It cannot commit any more once another has begun."""


def find_lost(runs: Runs, names: Sequence[str] | None = None) -> dict[str, RunStatus]:
    """The runs among `names` (all of the store where None) that are running and did not beat for LOST_S.

    By two looks at the beat and the clock of this process: clocks of other machines are not asked. Returns as soon as
    all that are looked at have beaten.
    """
    if names is None:
        names = [run.run for run in runs.list() if run.state is RunState.running]
    first = {run: status for run in names if (status := runs.status(run)).state is RunState.running}
    deadline, quiet = time.monotonic() + LOST_S, dict(first)
    while quiet and time.monotonic() < deadline:
        time.sleep(0.5)
        for run in list(quiet):
            now = runs.status(run)
            if now.end is not None or now.attempt != first[run].attempt or now.beat != first[run].beat:
                del quiet[run]
    return quiet


def mark_lost(runs: Runs, run: str, status: RunStatus) -> AttemptEnd:
    """The end of a lost attempt, written down for it."""
    error = TransientError(
        f"attempt {status.attempt} gave no sign of life for {LOST_S:.0f} s: its driver or its machine is gone",
        hint=f"treadle resume {run}",
    )
    end = AttemptEnd(status=AttemptStatus.lost, exit_code=error.exit_code, error=error.to_json(), update=status.update)
    with contextlib.suppress(ConflictError):  # somebody else saw it first
        runs.end_attempt(run, status.attempt, end)
    return end

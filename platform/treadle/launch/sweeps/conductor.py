"""Between a course and whatever runs its trials: what to start, what an evaluation means, what an end means."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import suppress
from typing import Any

from treadle.errors import ConflictError, TransientError, error_from_json
from treadle.launch.sweeps.courses import Task, build_course
from treadle.launch.sweeps.desk import Desk
from treadle.launch.sweeps.halving import build_halving
from treadle.spec.sweeps import words
from treadle.store import AttemptEnd, AttemptStatus, Journal, RequestKind, RunState
from treadle.store.sweeps import MemberState
from treadle.track import now_s

__all__ = ["Conductor"]

MOST_STARTS = 3
"""Of one trial in one attempt of the sweep: a lost process is started again, a broken one not for ever."""


class Conductor:
    """Decides for one attempt of a sweep; threads may share it.

    Args:
        events: where what happens is written, for those who follow.
    """

    def __init__(self, desk: Desk, events: Journal) -> None:
        self.desk = desk
        self._events = events
        self._lock = threading.RLock()
        self._course = build_course(desk)
        self._halving = build_halving(desk.frozen.asked, desk.trials())
        self._again: list[Task] = []
        self._running: dict[int, Task] = {}
        self._starts: Counter[int] = Counter()
        self._stopped = ""
        self._tell("began", trials=len(desk.members()), of=desk.frozen.asked.trials)

    def next_task(self) -> Task | None:
        """A trial to start now, or None."""
        with self._lock:
            if self._stopped:
                return None
            task = self._again.pop() if self._again else self._course.next_task()
            if task is not None:
                self._running[task.member.number] = task
                self._starts[task.member.number] += 1
                values = words(self.desk.frozen.asked.ordered(task.member.values))
                self._tell("trial", number=task.member.number, run=task.member.run, state="running", values=values)
            return task

    @property
    def is_over(self) -> bool:
        """Whether nothing will be started any more, as long as nothing under way comes back."""
        with self._lock:
            return bool(self._stopped) or (self._course.is_over and not self._again)

    def evaluated(self, number: int, evaluation: int, value: float) -> None:
        """Take note of an evaluation; a trial that is behind is asked to stop."""
        with self._lock:
            task = self._running.get(number)
            self._tell("evaluated", number=number, evaluation=evaluation, value=value)
            if task is None or not self._halving.is_behind(number, evaluation, value):
                return
            reason = f"behind at evaluation {evaluation} with {value:.4g}"
            self._ask_to_stop(task, reason)
            self.desk.end(number, MemberState.pruned, reason)

    def ended(self, task: Task, *, is_lost: bool = False) -> None:
        """Take note that a trial's process is gone, whatever it left in the store; a lost one was killed."""
        with self._lock:
            number, run = task.member.number, task.member.run
            self._running.pop(number, None)
            is_lost = self._close_lost(run) or is_lost
            self._settle(task, is_lost=is_lost)
            trial = next(t for t in self.desk.trials() if t.number == number)
            self._tell("trial", number=number, run=run, state=trial.state, value=trial.value, reason=trial.reason)
            if not any(again.member.number == number for again in self._again):
                self._course.ended(task, trial)

    def stop(self, reason: str) -> None:
        """Start nothing more, and ask every trial to stop with a checkpoint."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = reason
            for task in self._running.values():
                self._ask_to_stop(task, reason)

    @property
    def stopped(self) -> str:
        """Why it was stopped, or ""."""
        return self._stopped

    def _settle(self, task: Task, *, is_lost: bool) -> None:
        """Record the end of a trial where its run's end is one; start it again where it was lost."""
        number = task.member.number
        status = self.desk.runs.status(task.member.run)
        if status.state is RunState.finished:
            self.desk.end(number, MemberState.finished)
        elif status.state in (RunState.failed, RunState.lost):
            error = error_from_json((status.end.error if status.end is not None else None) or {})
            if not (error.retry or is_lost) or self._starts[number] >= MOST_STARTS:
                self.desk.end(number, MemberState.failed, error.message)
            elif not self._stopped:
                self._again.append(task)

    def _close_lost(self, run: str) -> bool:
        """Whether an attempt's process was killed; its end is written down then."""
        status = self.desk.runs.status(run)
        is_lost = status.attempt > 0 and status.end is None
        if is_lost:
            lost = TransientError("the process of the trial ended without a word", hint="treadle sweep --resume")
            end = AttemptEnd(status=AttemptStatus.lost, exit_code=lost.exit_code, error=lost.to_json())
            with suppress(ConflictError):
                self.desk.runs.end_attempt(run, status.attempt, end)
        return is_lost

    def _ask_to_stop(self, task: Task, reason: str) -> None:
        with suppress(ConflictError):  # it ended in the meantime
            self.desk.runs.request(task.member.run, RequestKind.stop, f"{self.desk.record.sweep}: {reason}")

    def _tell(self, event: str, /, **facts: Any) -> None:
        self._events.append({"time": now_s(), "event": event, **facts})

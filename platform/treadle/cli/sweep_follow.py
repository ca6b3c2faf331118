"""Watching a sweep from its store until it ends."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any

from treadle.cli.options import say

if TYPE_CHECKING:
    from treadle.launch.sweeps.records import Asked
    from treadle.launch.sweeps.start import LocalSweeper
    from treadle.store import Blobs, RunStatus

__all__ = ["SweepLine", "follow_sweep"]

POLL_S = 0.3


def follow_sweep(blobs: Blobs, sweep: str, asked: Asked, *, before: int, sweeper: LocalSweeper | None) -> int:
    """Show progress until the attempt ends; returns the exit code.

    Ctrl-C asks a sweep on this machine to stop and waits for the checkpoints of its trials (a second one kills it), and
    detaches from one on a cluster.
    """
    from treadle.store import follow
    from treadle.store.sweeps import Sweeps
    from treadle.track.screen import Screen

    sweeps, events = Sweeps(blobs), follow(blobs, f"sweeps/{sweep}/events.jsonl")
    events.poll()  # what earlier attempts did
    course = SweepLine(Screen(sys.stderr), asked)
    course.say("starting ...")
    interrupts = 0
    while True:
        try:
            status = sweeps.status(sweep)
            ended = status if status.attempt > before and status.end is not None else None
            if ended is None and sweeper is not None and not sweeper.is_alive():
                sweeper.record_death(blobs, before)
                ended = sweeps.status(sweep)
            for row in events.poll():
                course.take(row)
            course.draw()
            if ended is not None:
                return _tell(course, sweep, ended)
            time.sleep(POLL_S)
        except KeyboardInterrupt:
            interrupts += 1
            course.end()
            if sweeper is None:
                say(f"detached, the sweep continues; treadle sweep --show {sweep}")
                return 130
            if interrupts > 1:
                say("killing the sweep; the checkpoints of its trials stay")
                sweeper.process.kill()
                continue
            say("stopping every trial after a checkpoint ... (Ctrl-C again kills)")
            sweeps.request_stop(sweep, before + 1, "Ctrl-C")


def _tell(course: SweepLine, sweep: str, ended: RunStatus) -> int:
    from treadle.errors import error_from_json

    course.end()
    assert ended.end is not None
    if ended.end.error is not None:
        error = error_from_json(ended.end.error)
        say(f"error: {error.message}")
        say(f"hint: {error.hint or f'treadle sweep --resume {sweep}'}")
    elif ended.end.status.value == "stopped":
        say(f"stopped; go on with: treadle sweep --resume {sweep}")
    return ended.end.exit_code


class SweepLine:
    """One line that says how far a sweep is, and a line for each trial that ends."""

    def __init__(self, screen: Any, asked: Asked) -> None:
        self._screen = screen
        self._asked = asked
        self._states: dict[int, str] = {}
        self._values: dict[int, str] = {}
        self._last: dict[int, tuple[int, float]] = {}
        self._drawn = ""

    def take(self, row: dict[str, Any]) -> None:
        """Take note of an event."""
        number = row.get("number")
        if row["event"] == "evaluated" and number is not None:
            self._last[number] = (row["evaluation"], float(row["value"]))
        elif row["event"] == "trial" and number is not None:
            self._states[number] = row["state"]
            if row["state"] == "running":
                self._values[number] = row["values"]
            else:
                self.say(self._ended(number, row))

    def _ended(self, number: int, row: dict[str, Any]) -> str:
        value = "" if row["value"] is None else f" {float(row['value']):.4g}"
        why = f" ({row['reason']})" if row["reason"] else ""
        return f"trial {number} {row['state']}{value}  {self._values.get(number, '')}{why}"

    @property
    def line(self) -> str:
        """`3 of 8 done, 2 running (trial 4: 2 of 6), best val/accuracy 0.912 (trial 2)`."""
        running = [number for number, state in self._states.items() if state == "running"]
        parts = [f"{len(self._states) - len(running)} of {self._asked.trials} done, {len(running)} running"]
        shown = [f"{n}: {self._last[n][0]} of {self._asked.evaluations}" for n in running if n in self._last]
        if shown:
            parts[0] += f" (evaluations {', '.join(shown)})"
        finite = {number: value for number, (_, value) in self._last.items() if math.isfinite(value)}
        if finite:
            choose = max if self._asked.larger_is_better else min
            number = choose(finite, key=lambda n: finite[n])
            parts.append(f"best {self._asked.metric} {finite[number]:.4g} (trial {number})")
        return ", ".join(parts)

    def draw(self) -> None:
        """Show the line, if it says something new."""
        from treadle.track.screen import cut

        if self._states and self.line != self._drawn and self._screen.is_live:
            self._drawn = self.line
            self._screen.draw(cut(self._drawn, self._screen.columns))

    def say(self, line: str) -> None:
        """A line above."""
        self._screen.say(line)
        self._drawn = ""

    def end(self) -> None:
        """Leave the line as it is."""
        self._screen.end()

from __future__ import annotations

import io
from typing import Any

from treadle.cli.sweep_follow import SweepLine
from treadle.launch.sweeps.records import Asked
from treadle.spec.sweeps import Scheduler, Search
from treadle.track.screen import Screen

ASKED = Asked(
    job="toy",
    arguments=(),
    axes=(),
    search=Search.grid,
    scheduler=Scheduler.none,
    metric="val/accuracy",
    larger_is_better=True,
    trials=8,
    parallel=2,
    seed=0,
    grace=1,
    reduction=3,
    interval=1,
    evaluations=6,
)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def events() -> list[dict[str, Any]]:
    running = {"event": "trial", "state": "running", "run": "r"}
    return [
        {"event": "began", "trials": 0, "of": 8},
        {**running, "number": 1, "values": "optim.lr=0.1"},
        {**running, "number": 2, "values": "optim.lr=0.2"},
        {**running, "number": 3, "values": "optim.lr=9"},
        {"event": "evaluated", "number": 3, "evaluation": 1, "value": "NaN"},
        {"event": "evaluated", "number": 1, "evaluation": 2, "value": 0.5},
        {"event": "evaluated", "number": 2, "evaluation": 2, "value": 0.75},
        {"event": "trial", "number": 3, "run": "r", "state": "failed", "value": None, "reason": "lost"},
        {"event": "trial", "number": 1, "run": "r", "state": "pruned", "value": 0.5, "reason": "behind"},
    ]


def test_one_line_says_how_far_a_sweep_is() -> None:
    stream = Terminal()
    line = SweepLine(Screen(stream, width=100), ASKED)
    for event in events():
        line.take(event)
        line.draw()
    assert line.line == "2 of 8 done, 1 running (evaluations 2: 2 of 6), best val/accuracy 0.75 (trial 2)"
    assert "trial 1 pruned 0.5  optim.lr=0.1 (behind)\n" in stream.getvalue()


def test_a_log_gets_a_line_for_each_trial_that_ended() -> None:
    stream = io.StringIO()
    line = SweepLine(Screen(stream, width=100), ASKED)
    for event in events():
        line.take(event)
        line.draw()
    line.end()
    assert stream.getvalue() == "trial 3 failed  optim.lr=9 (lost)\ntrial 1 pruned 0.5  optim.lr=0.1 (behind)\n"

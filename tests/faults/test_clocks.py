"""Clocks an hour off, running backwards, and set while a process runs (F18)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fault_victims import RUN, files_at, open_run

from treadle.store import Runs, open_blobs, read_journal
from treadle.testing import SkewedClock

HOUR = 3600.0
VICTIMS = Path(__file__).with_name("fault_victims.py")


def run_at(clock: SkewedClock, seconds: float, function: str, *arguments: Any) -> list[Any]:
    """What a process says whose clock is so far ahead."""
    clock.move(seconds)
    command = [sys.executable, "-P", str(VICTIMS), function, *map(json.dumps, arguments)]
    done = subprocess.run(command, env=os.environ | clock.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.fault(18, "processes with other clocks, one after the other")
def test_order_is_that_of_what_happened(clock: SkewedClock, folder: Path, matrix, choose) -> None:
    rng = random.Random(0)
    skews = [0.0, HOUR, -HOUR, *[rng.uniform(-HOUR, HOUR) for _ in range(choose(0, 20))]]
    told = [run_at(clock, s, "live", str(folder / "store"), f"n{i}", i)[0] for i, s in enumerate(skews, 1)]
    stamps = [each["created_at"] for each in told]
    assert stamps != sorted(stamps)  # the clocks did differ
    blobs = open_blobs(str(folder / "store"))
    numbers = list(range(1, len(skews) + 1))
    assert [each["number"] for each in told] == numbers
    runs = Runs(blobs).list()
    assert [run.run for run in runs] == [f"toy-n{i}" for i in reversed(numbers)]
    assert Runs(blobs).get("toy-n1").number == 1
    assert [row["update"] for row in read_journal(blobs, "runs/toy/events.jsonl")] == numbers
    found = open_run(blobs, 0).restore()
    assert found is not None
    assert (found[0].update, found[0].attempt, found[1]) == (numbers[-1], numbers[-1], files_at(numbers[-1]))
    matrix.note(injected=len(skews) - 1, seen="runs, attempts, rows, checkpoints in the order of what happened")


@pytest.mark.fault(18, "an old attempt whose clock is ahead")
def test_a_lease_is_held_by_number_not_by_time(clock: SkewedClock, folder: Path, matrix) -> None:
    root = str(folder / "store")
    assert run_at(clock, -HOUR, "commit", root, 2, 1, 2) == [1, 2]
    clock.move(HOUR)
    command = [sys.executable, "-P", str(VICTIMS), "commit", json.dumps(root), "1", "3", "4"]
    done = subprocess.run(command, env=os.environ | clock.environment, capture_output=True, text=True, check=False)
    assert "ConflictError" in done.stderr
    assert done.stdout == ""
    assert run_at(clock, -2 * HOUR, "commit", root, 3, 5, 5) == [5]
    found = open_run(open_blobs(root), 0).restore()
    assert found is not None
    assert (found[0].update, found[0].attempt) == (5, 3)
    matrix.note(injected=3, seen="fencing goes by attempt: an old one an hour ahead is refused")


@pytest.mark.fault(18, "a clock that is set back while a run commits")
def test_a_clock_that_runs_backwards_confuses_no_version(clock: SkewedClock, folder: Path, matrix, choose) -> None:
    root = str(folder / "store")
    num_updates, num_moves = choose(8, 60), 0
    command = [sys.executable, "-P", str(VICTIMS), "commit", json.dumps(root), "1", "1", str(num_updates)]
    with subprocess.Popen(command, env=os.environ | clock.environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            num_moves += 1
            clock.move(-60.0 * int(line))
    assert process.returncode == 0
    found = open_run(open_blobs(root), 0).restore()
    assert found is not None
    assert (found[0].update, found[1]) == (num_updates, files_at(num_updates))
    assert len(open_blobs(root).children(f"runs/{RUN}/ckpt")) == 2
    matrix.note(injected=num_moves, seen=f"set back {num_moves} times by a minute: {num_updates} commits, none lost")

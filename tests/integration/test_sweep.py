"""Sweeps as a user runs them: in Ray Tune, killed, stopped and taken up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import Here, Treadle
from treadle.store import Registry, Runs, open_blobs, read_journal
from treadle.store.sweeps import Sweeps

LONG = ["optim.lr=1e-2,1e-6,2e-2", "model.hidden_size=8", "train.epochs=40", "checkpoint.every_updates=10"]


def newest(treadle: Treadle) -> tuple[str, list[dict[str, Any]]]:
    """The newest sweep and its events."""
    blobs = open_blobs(treadle.environment["TREADLE_STORE"])
    found = Sweeps(blobs).list()
    return (found[0].sweep, read_journal(blobs, f"sweeps/{found[0].sweep}/events.jsonl")) if found else ("", [])


def wait_for_evaluations(treadle: Treadle, num: int, beside: subprocess.Popen[str], *, seconds: float = 150) -> str:
    """The newest sweep, once `num` evaluations were told since this call."""
    first = sum(row["event"] == "evaluated" for row in newest(treadle)[1])
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert beside.poll() is None, beside.communicate()
        sweep, events = newest(treadle)
        if sum(row["event"] == "evaluated" for row in events) >= first + num:
            return sweep
        time.sleep(0.1)
    raise AssertionError(f"not evaluated {num} times: {newest(treadle)}")


def below(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def left_of(processes: list[psutil.Process], *, seconds: float = 30) -> list[str]:
    """Those that still run after a while."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [" ".join(process.cmdline()) for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.ray
@pytest.mark.timeout(500)
def test_a_killed_and_a_stopped_sweep_go_on(
    treadle: Treadle, prepared: Path, interrupt: Callable[[subprocess.Popen[str]], None]
) -> None:
    first = treadle.start("sweep", "./toy", *LONG, "--scheduler", "asha", "--grace", "5", "--parallel", "1")
    sweep = wait_for_evaluations(treadle, 6, first)
    blobs = open_blobs(treadle.environment["TREADLE_STORE"])
    attempt = json.loads(blobs.get(f"sweeps/{sweep}/attempts/0001.json"))
    sweeper = attempt["body"]["info"]["pid"]
    processes = below(sweeper)
    assert any("raylet" in process.name() for process in processes)
    folders = {process.environ()["RAY_TMPDIR"] for process in processes if "raylet" in process.name()}
    os.kill(sweeper, signal.SIGKILL)
    _, told = first.communicate(timeout=60)
    assert first.returncode == 70
    assert f"treadle sweep --resume {sweep}" in told
    assert left_of(processes) == []
    assert not any(Path(folder).exists() for folder in folders)

    second = treadle.start("sweep", "--resume", sweep)
    wait_for_evaluations(treadle, 3, second)
    interrupt(second)
    _, told = second.communicate(timeout=60)
    assert second.returncode == 0, told
    assert f"stopped; go on with: treadle sweep --resume {sweep}" in told
    runs, members = Runs(blobs), [member for member, _ in Sweeps(blobs).members(sweep)]
    assert {runs.status(member.run).state.value for member in members} <= {"stopped", "finished"}
    assert Registry(blobs).models() == [] or "candidate" not in Registry(blobs).aliases("toy")

    found = treadle.ok("sweep", "--resume", sweep, "-o", "sweep.html", timeout=200)
    again = treadle("sweep", "--resume", sweep)
    assert again.code == 7
    assert "is finished" in again.err
    check_each_trial_finished_once(treadle, found)
    check_the_best_is_named(treadle, found)
    page = (treadle.folder / "sweep.html").read_text()
    ET.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    assert all(trial["run"] in page for trial in found["trials"])


def check_each_trial_finished_once(treadle: Treadle, found: dict[str, Any]) -> None:
    blobs = open_blobs(treadle.environment["TREADLE_STORE"])
    runs, restored = Runs(blobs), 0
    assert sorted(trial["number"] for trial in found["trials"]) == [1, 2, 3]
    for trial in found["trials"]:
        attempts = runs.attempts(trial["run"])
        ends = [attempt.end.status.value for attempt in attempts if attempt.end]
        assert ends.count("finished") == (trial["state"] == "finished")
        assert runs.get(trial["run"]).info["sweep"] == found["sweep"]
        if trial["state"] == "pruned":  # behind: stopped with a checkpoint, as by `treadle stop`
            assert ends[-1] == "stopped"
            assert "behind at evaluation" in trial["reason"]
        else:
            assert trial["updates"] == 200
        events = read_journal(blobs, f"runs/{trial['run']}/events.jsonl")
        states = [row["update"] for row in events if row["event"] == "restored"]
        assert len(attempts) == 1 or states  # goes on, does not begin anew
        restored = max([restored, *states])
    assert restored > 0


def check_the_best_is_named(treadle: Treadle, found: dict[str, Any]) -> None:
    blobs, best = open_blobs(treadle.environment["TREADLE_STORE"]), found["best"]
    finished = [trial for trial in found["trials"] if trial["state"] == "finished"]
    assert (found["status"], found["metric"], found["mode"]) == ("finished", "val/letter_error_rate", "min")
    assert best in finished
    assert best["last"] == min(trial["last"] for trial in finished)
    assert best["values"]["optim.lr"] != "1e-06"
    assert Registry(blobs).aliases("toy") == {"candidate": best["model_version"]}
    assert sorted(v.run for v in Registry(blobs).versions("toy")) == sorted(trial["run"] for trial in finished)
    end = Sweeps(blobs).status(found["sweep"]).end
    assert end is not None
    assert end.metrics["leaked_groups"] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["./toy", "optim.lr=1,-1", "model=gru,grru", "train.epochs=0,1"], 2, ["optim.lr", "model", "train.epochs"]),
        (["./toy", "optim.lr=interval(1e-3,200)", "--trials", "2"], 2, ["optim.lr: got 200"]),
        (["./toy", "optim.lr=range(1,20)"], 2, ["got 19 combinations", "--trials 19"]),
        (["./toy", "optim.lr=1e-3,1e-2", "--metric", "val/letter_err"], 2, ["--metric", "val/letter_error_rate"]),
        (["./toy", "optim.lr=1e-3,1e-2", "--parallel", "99"], 3, ["--parallel 2"]),
        (["./toy", "batch.max_slots=2,3", "optim.lr=1e-3,1e-2"], 2, ["batch.max_slots=2 optim.lr=0.001"]),
        (["./toy", "split.valid=0,40", "optim.lr=1e-2"], 4, ["not prepared", "treadle prepare ./toy split.valid=0"]),
        (["./toy", "optim.lr=1e-3,1e-2", "train.epochs=1", "--scheduler", "asha"], 2, ["--grace"]),
        (["./toy", "optim.lr=1e-3,1e-2", "train.keep=best", "--search", "pbt"], 2, ["train.keep: got best"]),
        (["./toy"], 2, ["no key with several values"]),
        (["--show", "nothing"], 8, ["treadle sweep --ls"]),
        (["./toy", "optim.lr=1,2", "--ls"], 2, ["one of"]),
    ],
)
def test_refuses_before_anything_runs(
    here: Here, prepared: Path, arguments: list[str], code: int, told: list[str]
) -> None:
    found = here("sweep", *arguments)
    assert found.code == code, found.err
    assert all(text in found.err for text in told), found.err
    assert Sweeps(open_blobs(here.environment["TREADLE_STORE"])).list() == []
    assert Runs(open_blobs(here.environment["TREADLE_STORE"])).list() == []


def test_without_validation_rows_there_is_nothing_to_compare(here: Here, prepared: Path) -> None:
    here.ok("prepare", "./toy", "split.valid=0")
    found = here("sweep", "./toy", "optim.lr=1e-3,1e-2", "split.valid=0")
    assert found.code == 2
    assert "split.valid" in found.err
    assert here.ok("sweep", "--ls") == {"schema": 1, "sweeps": []}


def test_a_range_test_suggests_a_rate_and_leaves_nothing(here: Here, prepared: Path) -> None:
    store = Path(here.environment["TREADLE_STORE"])
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    found = here.ok("tune", "lr", "./toy", "--updates", "60", "--out", "lr.svg")
    assert 1e-4 < found["lr"] < 1
    assert found["lr"] == pytest.approx(min(found["steepest"], found["tenth_of_lowest"]), rel=0.05)
    assert len(found["rates"]) == len(found["losses"]) <= 60
    ET.parse(here.folder / "lr.svg")
    assert before == {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    shown = here("tune", "lr", "./toy", "--updates", "12", "--from", "1e-9", "--to", "1e-8")
    assert shown.code == 0
    assert "end of the range after 12 updates" in shown.out
    assert here("tune", "lr", "./toy", "--from", "1", "--to", "0.1").code == 2

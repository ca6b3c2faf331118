"""The run of treadle in the bench of recoveries: a made-up job, submitted, watched through its store."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from recovery_marks import WORLD, Log, Mark, Tail, wait_for

__all__ = ["NETWORK", "PER_EPOCH", "Treadle", "prepare_store"]

NETWORK = {"hidden": 96, "layers": 2, "embedding": 32, "symbols": 32, "length": 64, "rows": 32, "rate": 1e-3}
"""Of every arm: an LSTM that names the label of each frame; `rows` of `length` frames on each rank."""
PER_EPOCH = 20

_JOB = """
defaults:
  - /base
  - override /task: tag
  - override /model: lstm
  - override /cluster: laptop
  - override /precision: fp32
  - _self_
name: recovery
summary: every symbol's label
model: {{hidden_size: {hidden}, num_layers: {layers}, embedding_size: {embedding}}}
data: {{name: recovery}}
split: {{valid: 8, test: 8}}
batch: {{max_slots: {slots}, lanes: 2, noise: 0}}
optim: {{lr: {rate}}}
train: {{epochs: 1, evaluate_every: 1000, log_every: 1ms}}
track: {{wandb: disabled}}
"""

_PREPARE = """
import numpy as np
from treadle.data import Draft, Labels, Row, Tokens
from treadle.spec import TargetPer

def prepare(spec):
    rng = np.random.default_rng(0)
    rows = []
    for number in range({count}):
        symbols = rng.integers(0, {symbols}, {length})
        labels = (symbols + np.roll(symbols, 1)) % {symbols}
        rows.append(Row(entity=f"r{{number}}", inputs=[f"s{{i}}" for i in symbols], target=[f"t{{i}}" for i in labels]))
    names = tuple(f"t{{i}}" for i in range({symbols}))
    return Draft(rows=rows, inputs=Tokens(), target=Labels(names=names, per=TargetPer.frame), licence="made up")
"""
STOP_S = 30.0
_STAGES = ("rank_failed", "regrouped", "rank_started", "restored", "rejoined")
_BEGINS = ("rank_started", "regrouped", "rejoined", "restored")


def write_job(folder: Path) -> Path:
    """A job folder as a user would write it: PER_EPOCH updates an epoch."""
    job = folder / "recovery"
    job.mkdir(parents=True)
    (job / "job.yaml").write_text(_JOB.format(**NETWORK, slots=NETWORK["length"] * NETWORK["rows"]))
    count = PER_EPOCH * NETWORK["rows"] * WORLD + 16
    (job / "prepare.py").write_text(_PREPARE.format(**NETWORK, count=count))
    return job


def prepare_store(folder: Path) -> Path:
    """The job folder, its data set in `folder`/store."""
    job = write_job(folder / "work")
    _treadle(folder, "prepare", str(job))
    return job


class Treadle:
    """See `recovery_marks.Arm`.

    Args:
        folder: with `store` in it. updates: of the whole run. every: updates between checkpoints.
        victim: "rank", or "actor": the Ray Train worker that holds the rank's place, two processes above it.
    """

    def __init__(
        self, folder: Path, job: Path, *, updates: int, every: int, recovery: str = "replace", victim: str = "rank"
    ) -> None:
        self._folder = folder
        self._victim = victim
        told = _treadle(
            folder,
            "submit",
            str(job),
            f"train.epochs={updates // PER_EPOCH}",
            f"checkpoint.every_updates={every}",
            "checkpoint.every=1h",
            f"cluster.recovery={recovery}",
            "--detach",
        )
        self._run = folder / "store" / "runs" / told["run"]
        self._metrics, self._events = Tail(self._run / "metrics.jsonl"), Tail(self._run / "events.jsonl")
        self._log = Log()
        self._pids: dict[int, int] = {}
        self._begins: list[float] = []
        self.events: list[dict[str, Any]] = []

    def look(self) -> Log:
        for row in self._events.rows():
            self._note(row)
        for row in self._metrics.rows():
            if "perf/update_ms" in row["metrics"]:
                # Rank 0's row: the gradients of all ranks are in it. It began where the one before ended,
                # or where the group came together.
                last = self._log.marks[-1].done_s if self._log.marks else 0.0
                begun_s = max([last] + [at_s for at_s in self._begins if at_s <= row["time"]])
                ranks = frozenset(range(WORLD))
                self._log.marks.append(Mark(update=row["update"], ranks=ranks, begun_s=begun_s, done_s=row["time"]))
        if (end := self._end()) is not None and end["status"] != "finished":
            raise RuntimeError(f"treadle: {end}")
        return self._log

    def _note(self, row: dict[str, Any]) -> None:
        self.events.append(row)
        if row["event"] in _BEGINS:
            self._begins.append(row["time"])
        if row["event"] == "rank_started":
            self._pids[row["rank"]] = row["pid"]
        elif row["event"] == "rank_failed":
            self._log.reached.append((row["time"], row["update"]))
        elif row["event"] == "checkpoint":
            self._log.commits.append((row["time"], row["update"]))

    def pid(self, rank: int) -> int:
        pid = self._pids.get(rank, 0)
        if pid and self._victim == "actor":
            pid = _parent(_parent(pid))
        return pid if pid > 1 else 0

    def stages(self, at_s: float) -> str:
        """What came when since `at_s`: each event's last time, in seconds."""
        times = {row["event"]: row["time"] - at_s for row in self.events if row["time"] > at_s}
        return ", ".join(f"{name} {times[name]:.2f}" for name in _STAGES if name in times)

    def finish(self) -> str:
        end = wait_for(self._end, "the end of the run", every_s=0.1)
        self.look()
        if end["status"] != "finished":
            raise RuntimeError(f"treadle: {end}")
        (kept,) = self._run.glob("model-a*/model.safetensors")
        return hashlib.sha256(kept.read_bytes()).hexdigest()

    def stop(self) -> None:
        deadline = time.monotonic() + STOP_S
        while not (driver := self._driver()) and self._end() is None and time.monotonic() < deadline:
            time.sleep(0.1)  # it was only just started
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + STOP_S
            if driver and _is_driver(driver, self._run.name):
                os.kill(driver, number)
            while driver and _is_driver(driver, self._run.name) and time.monotonic() < deadline:
                time.sleep(0.1)

    def _driver(self) -> int:
        beats = sorted((self._run / "attempts").glob("*.beat.json"))
        return int(json.loads(beats[-1].read_text())["body"]["payload"]["pid"]) if beats else 0

    def _end(self) -> dict[str, Any] | None:
        ends = sorted((self._run / "attempts").glob("*.end.json"))
        return json.loads(ends[-1].read_text())["body"] if ends else None


def _treadle(folder: Path, *arguments: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "WANDB_"))}
    environment |= {"TREADLE_STORE": str(folder / "store"), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "treadle", *arguments, "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"treadle {arguments[0]}: exit code {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _is_driver(pid: int, run: str) -> bool:
    """Whether the process with this number still is what it was."""
    try:
        return run.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False

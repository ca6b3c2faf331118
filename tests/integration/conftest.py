"""Real commands in real processes, and a job small enough to train in seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

JOB_YAML = """
defaults: [/base, override /task: ctc, override /model: gru, override /cluster: inline, _self_]
name: toy
summary: every letter twice
task: {frames_per_step: 4, label_name: letter, sequence_name: word}
model: {hidden_size: 24, embedding_size: 12, bidirectional: true}
data: {name: toy}
split: {valid: 40, test: 60}
batch: {max_slots: 256, lanes: 2}
optim: {lr: 1e-2}
train: {epochs: 6, log_every: 10ms}
track: {wandb: disabled}
"""

PREPARE_PY = """
import random
from treadle.data import Draft, Labels, Row, Tokens
from treadle.spec import TargetPer

def prepare(spec):
    rng = random.Random(0)
    words = sorted({"".join(rng.choice("abcde") for _ in range(rng.randint(2, 7))) for _ in range(700)})
    rows = [Row(entity=w, inputs=list(w), target=[c.upper() for c in w for _ in range(2)]) for w in words]
    labels = Labels(names=tuple("ABCDE"), per=TargetPer.sequence)
    return Draft(rows=rows, inputs=Tokens(), target=labels, licence="made up")
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out.strip().splitlines()[-1])


@dataclass(frozen=True)
class Treadle:
    """Runs `treadle` with a store of its own."""

    environment: dict[str, str]
    folder: Path

    def __call__(self, *arguments: str, timeout: float = 110) -> Done:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "treadle", *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def ok(self, *arguments: str, timeout: float = 110) -> dict[str, Any]:
        """The JSON answer of a verb that must succeed."""
        done = self(*arguments, "--json", timeout=timeout)
        assert done.code == 0, done.err + done.out
        return done.json

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "treadle", *arguments],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A job folder as a user would write it."""
    folder = tmp_path / "work" / "toy"
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text(JOB_YAML)
    (folder / "prepare.py").write_text(PREPARE_PY)
    return folder


@pytest.fixture
def treadle(tmp_path: Path) -> Treadle:
    folder = tmp_path / "work"
    folder.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "WANDB_"))}
    environment |= {"TREADLE_STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path / "home")}
    return Treadle(environment=environment, folder=folder)


@pytest.fixture
def interrupt() -> Callable[[subprocess.Popen[str]], None]:
    """Ctrl-C in the terminal of a process: to its whole foreground group."""

    def send(process: subprocess.Popen[str]) -> None:
        os.killpg(process.pid, signal.SIGINT)

    return send

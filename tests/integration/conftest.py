"""Real commands, most in real processes, and a job small enough to train in seconds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from treadle.cli.main import main
from treadle.store import Runs, open_blobs, read_journal

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
    started: list[subprocess.Popen[str]] = field(default_factory=list)

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
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "treadle", *arguments],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def newest(self) -> tuple[str, str]:
        """The newest run and its state, or nothing twice. Read here: a verb takes half a second of a busy machine."""
        runs = Runs(open_blobs(self.environment["TREADLE_STORE"])).list()
        return (runs[0].run, runs[0].state.value) if runs else ("", "")

    def wait_for_update(
        self, at_least: int, *, after: str = "", beside: subprocess.Popen[str] | None = None, seconds: float = 100
    ) -> str:
        """The newest run, once it has logged that many updates.

        Args:
            after: a run from before, which is not meant.
            beside: a process that must live until then.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert beside is None or beside.poll() is None, beside.communicate()
            run, _ = self.newest()
            if run != after:
                rows = read_journal(open_blobs(self.environment["TREADLE_STORE"]), f"runs/{run}/metrics.jsonl")
                if rows and rows[-1]["update"] >= at_least:
                    return run
            time.sleep(0.1)
        raise AssertionError(f"no update {at_least} was logged: {self('logs', run).out}")


def write_toy(folder: Path) -> Path:
    (folder / "toy").mkdir(parents=True)
    (folder / "toy" / "job.yaml").write_text(JOB_YAML)
    (folder / "toy" / "prepare.py").write_text(PREPARE_PY)
    return folder / "toy"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A job folder as a user would write it."""
    return write_toy(tmp_path / "work")


@dataclass(frozen=True, kw_only=True)
class Here(Treadle):
    """Runs `treadle` in this process."""

    capfd: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str, timeout: float = 0) -> Done:
        code = main(arguments)
        out, err = self.capfd.readouterr()
        return Done(code, out, err)


def treadle_in(folder: Path) -> Treadle:
    """Commands in `folder`/work, with the store `folder`/store."""
    (folder / "work").mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "WANDB_"))}
    environment |= {"TREADLE_STORE": str(folder / "store"), "OMP_NUM_THREADS": "1", "HOME": str(folder / "home")}
    return Treadle(environment=environment, folder=folder / "work")


@pytest.fixture
def treadle(tmp_path: Path) -> Iterator[Treadle]:
    found = treadle_in(tmp_path)
    yield found
    for process in found.started:
        if process.poll() is None:  # its test has failed
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=30)
            process.kill()
            process.communicate()


@pytest.fixture
def here(treadle: Treadle, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Here:
    """`treadle` in this process, for verbs that only look, prepare or refuse: seconds less each."""
    monkeypatch.chdir(treadle.folder)
    for name, value in treadle.environment.items():
        monkeypatch.setenv(name, value)
    return Here(environment=treadle.environment, folder=treadle.folder, capfd=capfd)


@pytest.fixture(scope="session")
def toy_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the data set of `toy`."""
    folder = tmp_path_factory.mktemp("prepared")
    treadle = treadle_in(folder)
    write_toy(folder / "work")
    treadle.ok("prepare", "./toy")
    return folder / "store"


@pytest.fixture
def prepared(treadle: Treadle, toy: Path, toy_store: Path) -> Path:
    """The job `toy`, its data set in the store already."""
    shutil.copytree(toy_store, treadle.environment["TREADLE_STORE"])
    return toy


@pytest.fixture
def interrupt() -> Callable[[subprocess.Popen[str]], None]:
    """Ctrl-C in the terminal of a process: to its whole foreground group."""

    def send(process: subprocess.Popen[str]) -> None:
        os.killpg(process.pid, signal.SIGINT)

    return send

"""Secrets of the environment, as canaries: a run uses them and leaves them nowhere (F23)."""

from __future__ import annotations

import base64
import os
import secrets
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_wandb import FakeWandb

pytestmark = pytest.mark.timeout(300)  # whole commands, one after the other
JOB = """
defaults: [/base, override /task: ctc, override /model: gru, override /cluster: inline, _self_]
name: toy
summary: every letter twice
task: {frames_per_step: 4, label_name: letter, sequence_name: word}
model: {hidden_size: 8, embedding_size: 4}
data: {name: toy}
split: {valid: 20, test: 20}
batch: {max_slots: 512, lanes: 1}
train: {epochs: 1, log_every: 10ms}
track: {wandb: auto}
"""
PREPARE = """
import random
from treadle.data import Draft, Labels, Row, Tokens
from treadle.spec import TargetPer

def prepare(spec):
    rng = random.Random(0)
    words = sorted({"".join(rng.choice("abcde") for _ in range(rng.randint(2, 7))) for _ in range(200)})
    rows = [Row(entity=w, inputs=list(w), target=[c.upper() for c in w for _ in range(2)]) for w in words]
    labels = Labels(names=tuple("ABCDE"), per=TargetPer.sequence)
    return Draft(rows=rows, inputs=Tokens(), target=labels, licence="made up")
"""
FAILS = """
def prepare(spec):
    import os
    raise RuntimeError("the preparation failed")
"""


def canaries() -> dict[str, str]:
    """A secret for each variable that a deployment sets, of the form that its reader expects."""
    return {
        "AWS_SECRET_ACCESS_KEY": f"canary/aws+{secrets.token_hex(16)}",
        "AWS_SESSION_TOKEN": f"canary-session-{secrets.token_hex(16)}",
        "WANDB_API_KEY": secrets.token_hex(20),
        "RAY_AUTH_TOKEN": f"canary-ray-{secrets.token_hex(16)}",
        "TREADLE_SERVE_TOKEN": f"canary-serve-{secrets.token_hex(16)}",
    }


def spellings(secret: str) -> Iterator[bytes]:
    """What a secret looks like after the usual encodings."""
    yield secret.encode()
    yield urllib.parse.quote(secret, safe="").encode()
    yield secret[::-1].encode()
    for start in range(3):  # wherever it stands in what was encoded
        encoded = base64.b64encode(bytes(start) + secret.encode())
        yield encoded[4 * ((start + 2) // 3) : -4]


def leaks(folder: Path, known: dict[str, str], texts: dict[str, str]) -> list[str]:
    """The variables whose value stands in a file below `folder` or in one of `texts`, with the place."""
    places = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    places |= {name: text.encode() for name, text in texts.items()}
    return [
        f"{variable} in {place}"
        for place, data in places.items()
        for variable, secret in known.items()
        if any(spelling in data for spelling in spellings(secret))
    ]


@pytest.mark.fault(23, "control: secrets that are there")
def test_the_search_finds_what_is_there(tmp_path: Path, matrix) -> None:
    known = canaries()
    for number, (variable, secret) in enumerate(known.items()):
        places = [secret, urllib.parse.quote(secret, safe=""), base64.b64encode(f"api:{secret}".encode()).decode()]
        for text in places:
            (tmp_path / "file").write_bytes(b"\0x" + text.encode() + b"\n")
            assert leaks(tmp_path, known, {}) == [f"{variable} in {tmp_path / 'file'}"], (number, text)
    (tmp_path / "file").unlink()
    assert len(leaks(tmp_path, known, {"out": known["RAY_AUTH_TOKEN"]})) == 1
    matrix.note(injected=3 * len(known), seen="control: every planted secret found")


@pytest.mark.fault(23, "a run with secrets in its environment")
@pytest.mark.parametrize("wandb", ["offline", "online"])
def test_a_run_leaves_no_secret_behind(tmp_path: Path, matrix, choose, wandb: str) -> None:
    if wandb == "online" and choose(True, False):
        pytest.skip("in full runs only")
    job = tmp_path / "work" / "toy"
    job.mkdir(parents=True)
    (job / "job.yaml").write_text(JOB)
    (job / "prepare.py").write_text(PREPARE)
    known = canaries()
    said: dict[str, str] = {}
    with FakeWandb() as server:
        environment = {n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "AWS_", "WANDB_"))} | known
        environment |= {
            "TREADLE_STORE": str(tmp_path / "store"),
            "OMP_NUM_THREADS": "1",
            "WANDB_BASE_URL": server.url,
            "AWS_ACCESS_KEY_ID": "canary",
        }

        def treadle(*arguments: str, code: int = 0) -> None:
            command = [sys.executable, "-P", "-m", "treadle", *arguments]
            done = subprocess.run(
                command, env=environment, cwd=tmp_path / "work", capture_output=True, text=True, timeout=200
            )
            said[" ".join(arguments)] = done.stdout + done.stderr
            assert done.returncode == code, done.stderr

        treadle("prepare", "./toy")
        treadle("submit", "./toy", f"track.wandb={wandb}", "--follow")
        if choose(False, True):
            treadle("logs", "toy")
            treadle("status", "toy", "--json")
            treadle("report", "toy", "-o", "report.html")
            treadle("submit", "./toy", "track.wandb=nowhere", code=2)  # an error, with all that it tells
            (job / "prepare.py").write_text(FAILS)
            treadle("prepare", "./toy", "data.name=other", code=4)
        if wandb == "online":
            assert server.keys == {known["WANDB_API_KEY"]}  # it was used, where it belongs
            said["what W&B was told"] = repr(server.runs) + repr(server.alerts)
    assert list((tmp_path / "store").rglob("*.safetensors"))
    assert list((tmp_path / "store").rglob("*.wandb")) or wandb == "online"
    num_files = sum(path.is_file() for path in tmp_path.rglob("*"))
    assert leaks(tmp_path, known, said) == []
    matrix.note(injected=len(known), seen=f"W&B {wandb}: 0 hits in {num_files} files and {len(said)} outputs")

"""A job over streams, as a user writes it: trained without Ray, stopped in the middle of an epoch, resumed, asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from treadle.store import Registry, open_blobs

pytestmark = pytest.mark.timeout(240)  # several commands in turn, each of seconds

JOB_YAML = """
defaults: [/base, override /task: language, override /batch: streams, override /model: gru,
  override /cluster: inline, _self_]
name: chatter
summary: texts that repeat their key; the next symbol of each
model: {hidden_size: 16, embedding_size: 8}
data: {name: chatter}
split: {valid: 6, test: 6}
batch: {streams: 8, chunk: 16}
optim: {lr: 1e-2}
precision: {mode: fp32}
train: {epochs: 8, log_every: 10ms}
track: {wandb: disabled}
"""

PREPARE_PY = """
import random
from treadle.data import Draft, Row, Tokens

def text(rng):
    symbols = [rng.choice("ABCD")]
    while len(symbols) < 120:
        symbols += ["."] * rng.randint(1, 9) + ["?", symbols[0]]
    return symbols

def prepare(spec):
    rng = random.Random(0)
    rows = [Row(entity=str(i), inputs=text(rng)) for i in range(80)]
    return Draft(rows=rows, inputs=Tokens(), target=None, licence="made up")
"""


@pytest.fixture
def chatter(treadle) -> Path:
    folder = treadle.folder / "chatter"
    folder.mkdir()
    (folder / "job.yaml").write_text(JOB_YAML)
    (folder / "prepare.py").write_text(PREPARE_PY)
    return folder


def weights(treadle, ref):
    registry = Registry(open_blobs(treadle.environment["TREADLE_STORE"]))
    return registry.read(registry.resolve(ref), "model.safetensors")


def test_a_stopped_run_over_streams_resumes_to_the_same_bits(treadle, here, chatter, interrupt):
    here("prepare", "./chatter")
    shown = here("plan", "./chatter").out
    assert "updates an epoch of up to 16 frames of 8 streams, the state carried on" in shown
    assert here("plan", "./chatter", "model.bidirectional=true").code == 2
    whole = treadle.ok("submit", "./chatter", "--follow")
    assert whole["metrics"]["test/perplexity"] < 2.2
    process = treadle.start("submit", "./chatter", "--follow", "--json")
    run = treadle.wait_for_update(5, after=whole["run"], beside=process)
    interrupt(process)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    stopped = json.loads(out.strip().splitlines()[-1])
    assert (stopped["status"], stopped["run"]) == ("stopped", run)
    assert 0 < stopped["update"] < whole["update"]
    resumed = treadle.ok("resume", run, "--follow")
    assert (resumed["status"], resumed["update"]) == ("finished", whole["update"])
    assert resumed["metrics"] == whole["metrics"]
    assert weights(treadle, "chatter@2") == weights(treadle, "chatter@1")
    answer = json.loads(here("predict", "chatter@1", "B..?", "--json").out)["outputs"][0]
    assert answer["label"] == "B"
    assert answer["likeliest"]["B"] == pytest.approx(answer["confidence"])

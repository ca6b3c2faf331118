"""What a rank does around the loop: when states are committed, wishes, and runs that stop, resume or diverge."""

from __future__ import annotations

import dataclasses
import json
import threading

import numpy as np
import pytest
import safetensors.torch
import torch

from treadle.data import Draft, Labels, Row, Tokens, build_dataset
from treadle.errors import ConfigError, DivergenceError, IntegrityError, InternalError
from treadle.launch import mailbox
from treadle.launch.records import Assignment, freeze, read_job
from treadle.launch.worker import train_rank
from treadle.plan import Capacity, make_plan
from treadle.spec import (
    AdamWSpec,
    AugmentSpec,
    BatchSpec,
    CheckpointSpec,
    ClusterSpec,
    CtcSpec,
    DataSpec,
    JobSpec,
    LstmSpec,
    Precision,
    PrecisionSpec,
    SgdSpec,
    SplitSpec,
    StoreSpec,
    TargetPer,
    TrackSpec,
    TrainSpec,
    WandbMode,
)
from treadle.store import Backend, Checkpoints, Registry, RequestKind, Runs
from treadle.store.local import LocalBlobs
from treadle.train import TrainState, World


def job(store, **changes):
    spec = JobSpec(
        name="toy",
        task=CtcSpec(frames_per_step=2, label_name="letter", sequence_name="word"),
        model=LstmSpec(hidden_size=6, embedding_size=5, num_layers=2, dropout=0.2),
        data=DataSpec(name="toy"),
        split=SplitSpec(valid=5, test=5),
        batch=BatchSpec(max_slots="24", lanes=2, rounds_per_update=2),
        optim=AdamWSpec(lr=1e-2),
        precision=PrecisionSpec(mode=Precision.fp32),  # auto is a measurement, and runs are compared here
        train=TrainSpec(epochs=2, seed=1, log_every="0s"),
        cluster=ClusterSpec(workers=0),
        track=TrackSpec(wandb=WandbMode.disabled),
        checkpoint=CheckpointSpec(every="1h", keep_last=3),
        store=StoreSpec(uri=str(store)),
    )
    return dataclasses.replace(spec, **changes)


class Job:
    """A run in a store of its own, and as many attempts as a test makes."""

    def __init__(self, folder, **changes):
        self.store = folder / "store"
        self.blobs = LocalBlobs(self.store)
        self.runs = Runs(self.blobs)
        self.spec = job(self.store, **changes)
        rng = np.random.default_rng(0)
        words = sorted({"".join(rng.choice(list("abcd"), rng.integers(2, 9))) for _ in range(60)})
        rows = [Row(entity=w, inputs=list(w), target=list(w.upper())) for w in words]
        target = Labels(names=tuple("ABCD"), per=TargetPer.sequence)
        draft = Draft(rows=rows, inputs=Tokens(), target=target, licence="none")
        self.digest, manifest = build_dataset(draft, self.spec.data, self.blobs, recipe="r", split=self.spec.split)
        here = Capacity(where="a test", cpus=4, gpus=0, memory_bytes=0)
        self.plan = make_plan(self.spec, manifest.card(self.digest), here)
        self.run = self.runs.create(*freeze(self.spec, self.plan), job="toy", backend=Backend.inline).run

    def attempt(self, before=lambda attempt: None):
        number = self.runs.claim_attempt(self.run, Backend.inline)
        before(number)
        code = {"git": "abc", "dirty": False}
        return train_rank(Assignment(store=str(self.store), run=self.run, attempt=number, code=code), World())

    def checkpoint(self):
        checkpoints = Checkpoints(
            self.blobs,
            self.run,
            attempt=0,
            keep_last=2,
            spec_digest=self.plan.spec_digest,
            data_digest=self.plan.data_digest,
        )
        return checkpoints.restore()

    def events(self):
        text = self.blobs.get(f"runs/{self.run}/events.jsonl").decode()
        return [json.loads(line) for line in text.splitlines()]


def ask_to_stop(made):
    return lambda attempt: made.runs.request(made.run, RequestKind.stop, "a test", attempt=attempt)


@pytest.fixture
def quick_mailbox(monkeypatch):
    monkeypatch.setattr(mailbox, "POLL_S", 0.002)


def test_a_run_is_trained_and_its_model_registered(tmp_path):
    others = set(threading.enumerate())
    made = Job(tmp_path)
    summary = made.attempt()
    assert (summary["status"], summary["model_version"]) == ("finished", 1)
    assert summary["update"] == made.plan.num_updates
    assert set(summary["metrics"]) == {"test/loss", "test/letter_error_rate", "test/word_error_rate"}
    version = Registry(made.blobs).resolve("toy@1")
    assert set(version.files) == {"model.safetensors", "config.json", "eval.json", "card.md"}
    kept, _ = made.checkpoint()
    assert kept.update == summary["update"]
    state = TrainState.from_json(kept.state, where="x")
    assert (state.epoch, state.index) == (2, 0)
    names = [event["event"] for event in made.events()]
    assert names[0] == "precision"
    assert names[-2:] == ["registered", "end"]
    assert names.index("checkpoint") < names.index("registered")
    assert not [t for t in set(threading.enumerate()) - others if t.name.startswith("treadle-")]


@pytest.mark.usefixtures("quick_mailbox")
def test_a_run_that_is_stopped_and_resumed_registers_the_same_bits(tmp_path):
    whole = Job(tmp_path / "whole", train=TrainSpec(epochs=8, seed=1))
    whole.attempt()
    parts = Job(tmp_path / "parts", train=TrainSpec(epochs=8, seed=1))
    # Two wishes, each before its attempt begins: it leaves as soon as it hears of it.
    seen = []
    for _ in range(2):
        summary = parts.attempt(ask_to_stop(parts))
        if summary["status"] == "stopped":
            kept, _ = parts.checkpoint()
            assert kept.update == summary["update"]
            seen.append(summary["update"])
    assert seen
    assert seen == sorted(set(seen))
    assert parts.attempt()["status"] == "finished"
    found, wanted = (
        Registry(made.blobs).read(Registry(made.blobs).resolve("toy@1"), "model.safetensors") for made in (parts, whole)
    )
    assert found == wanted
    assert [event["update"] for event in parts.events() if event["event"] == "restored"] == seen


def test_divergence_leaves_the_checkpoints_before_it(tmp_path):
    made = Job(
        tmp_path,
        optim=SgdSpec(lr=1e25, clip_norm=None, warmup_share=0.0, momentum=0.0),
        checkpoint=CheckpointSpec(every="1h", every_updates=1),
    )
    with pytest.raises(DivergenceError) as refused:
        made.attempt()
    found = made.checkpoint()
    if found is not None:
        assert found[0].update < refused.value.context["update"]
        tensors = safetensors.torch.load(found[1]["model.safetensors"])
        assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
    assert [event["event"] for event in made.events()][-2:] == ["error", "end"]
    with pytest.raises(DivergenceError):  # the same spec gives the same, resumed or not
        made.attempt()


def test_a_checkpoint_of_another_form_is_refused(tmp_path):
    made = Job(tmp_path)
    spec, plan = read_job(made.runs, made.run)
    digests = {"spec_digest": plan.spec_digest, "data_digest": plan.data_digest}
    early = Checkpoints(made.blobs, made.run, attempt=0, keep_last=2, **digests)
    early.commit(3, {"model.safetensors": b"x", "optim.safetensors": b"y"}, {"update": 3})
    with pytest.raises(IntegrityError, match="not readable as safetensors"):
        made.attempt()
    assert spec == made.spec


def test_a_batch_plan_of_another_version_is_refused(tmp_path):
    made = Job(tmp_path)
    plan = dataclasses.replace(made.plan, batch_digest="0" * 64)
    made.run = made.runs.create(*freeze(made.spec, plan), job="toy", backend=Backend.inline).run
    with pytest.raises(InternalError, match="this rank plans other batches"):
        made.attempt()


def commit_state(made, change):
    """Write the newest checkpoint once more, as a later one, with another state."""
    kept, files = made.checkpoint()
    digests = {"spec_digest": made.plan.spec_digest, "data_digest": made.plan.data_digest}
    late = Checkpoints(made.blobs, made.run, attempt=1, keep_last=3, **digests)
    late.acquire()
    state = dict(kept.state)
    change(state)
    late.commit(kept.update + 1, files, state | {"update": kept.update + 1})


def half_way(tmp_path):
    made = Job(tmp_path, train=TrainSpec(epochs=8, seed=1))
    assert made.attempt(ask_to_stop(made))["status"] == "stopped"
    return made


@pytest.mark.usefixtures("quick_mailbox")
def test_a_state_says_which_batches_it_is_of(tmp_path):
    made = half_way(tmp_path)
    inputs = made.checkpoint()[0].state["inputs"]
    assert inputs["slots"] == 24
    assert inputs["data"] == made.digest[:16]
    commit_state(made, lambda state: state["inputs"].update(slots=48, seed=2))
    with pytest.raises(ConfigError) as refused:
        made.attempt()
    assert refused.value.context["changed"] == ["seed", "slots"]
    assert "batch.max_slots: got 24, expected 48, with which the run began" in refused.value.message


@pytest.mark.usefixtures("quick_mailbox")
def test_a_state_of_the_former_form_is_gone_on_from(tmp_path):
    made = half_way(tmp_path)
    commit_state(made, lambda state: state.pop("inputs"))
    assert made.attempt()["status"] == "finished"
    assert made.checkpoint()[0].state["inputs"]["slots"] == 24


# Budgets that are found


def auto(tmp_path, **changes):
    return Job(tmp_path, batch=BatchSpec(max_slots="auto", lanes=2), **changes)


def recorded(made):
    return json.loads(made.blobs.get(f"runs/{made.run}/budget.json"))["body"]


@pytest.mark.usefixtures("quick_mailbox")
def test_a_found_budget_is_kept_and_read_by_later_attempts(tmp_path, monkeypatch):
    made = auto(tmp_path, train=TrainSpec(epochs=8, seed=1))
    assert made.attempt(ask_to_stop(made))["status"] == "stopped"
    found = recorded(made)
    assert 0 < found["measured_bytes"] <= found["limit_bytes"]
    assert found["slots"] in {trial["slots"] for trial in found["trials"]}
    monkeypatch.setattr("treadle.launch.assemble.find_budget", lambda *_, **__: pytest.fail("looked again"))
    assert made.attempt()["status"] == "finished"
    assert recorded(made) == found
    told = [event for event in made.events() if event["event"] == "budget"]
    assert len(told) == 2
    assert {event["slots"] for event in told} == {found["slots"]}
    assert told[0]["measured_bytes"] == found["measured_bytes"]
    assert made.checkpoint()[0].state["inputs"]["slots"] == found["slots"]
    version = Registry(made.blobs).resolve("toy@1")
    assert version.spec_digest == read_job(made.runs, made.run)[0].digest  # of the job as it was asked


@pytest.mark.usefixtures("quick_mailbox")
def test_a_found_budget_gives_the_same_bits_as_the_same_number(tmp_path):
    made = auto(tmp_path / "auto")
    made.attempt()
    slots = str(recorded(made)["slots"])
    given = Job(tmp_path / "given", batch=BatchSpec(max_slots=slots, lanes=2))
    given.attempt()
    one, two = (
        Registry(job.blobs).read(Registry(job.blobs).resolve("toy@1"), "model.safetensors") for job in (made, given)
    )
    assert one == two


# Changed rows


@pytest.mark.usefixtures("quick_mailbox")
def test_changed_rows_are_changed_alike_after_a_restart(tmp_path):
    options = {"train": TrainSpec(epochs=8, seed=1), "augment": AugmentSpec(time_masks=2, time_mask_share=0.4)}
    whole, parts = Job(tmp_path / "whole", **options), Job(tmp_path / "parts", **options)
    plain = Job(tmp_path / "plain", train=TrainSpec(epochs=8, seed=1))
    assert parts.attempt(ask_to_stop(parts))["status"] == "stopped"
    for made in (whole, parts, plain):
        made.attempt()
    found, wanted, other = (
        Registry(made.blobs).read(Registry(made.blobs).resolve("toy@1"), "model.safetensors")
        for made in (parts, whole, plain)
    )
    assert found == wanted
    assert found != other


def test_rows_that_cannot_be_changed_so_are_said_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"augment\.drop: got 0\.1, expected 0 with task=ctc"):
        Job(tmp_path, augment=AugmentSpec(drop=0.1)).attempt()

"""Saved states put back while a run goes on: after a divergence, and the best at the end."""

from __future__ import annotations

import dataclasses
import math

import safetensors.torch
import torch
from test_worker import Job

import treadle.launch.worker as ranks
from treadle.spec import AdamWSpec, CheckpointSpec, GuardSpec, Keep, TrainSpec
from treadle.store import Checkpoints, Registry
from treadle.train import fit

GUARD = GuardSpec(roll_back_after=2, max_roll_backs=1)
OPTIM = AdamWSpec(lr=1e-2, ema=0.5)


def spoiling(monkeypatch, updates):
    """Gradients of these updates are NaN, once each; gives the runs that are made."""
    made, left = [], set(updates)

    def spoilt(run):
        made.append(run)
        scaled = run.updater.scaled

        def bad(loss):
            update = (run.reached.state or run.start).update + 1
            if update not in left:
                return scaled(loss)
            told.add(update)
            return scaled(loss) * math.nan

        told: set[int] = set()
        move = run.updater.move

        def moved(rate):
            left.difference_update(told)
            return move(rate)

        run.updater.scaled, run.updater.move = bad, moved
        return fit(run)

    monkeypatch.setattr(ranks, "fit", spoilt)
    return made


def told(made, name):
    return [event for event in made.events() if event["event"] == name]


def test_a_run_goes_back_to_its_last_checkpoint(tmp_path, monkeypatch):
    made = Job(tmp_path, optim=OPTIM, guard=GUARD, checkpoint=CheckpointSpec(every="1h", every_updates=3))
    spoiling(monkeypatch, [5, 6])
    assert made.attempt()["status"] == "finished"
    assert [event["update"] for event in told(made, "skipped")] == [5, 6]
    (event,) = told(made, "rolled_back")
    assert (event["update"], event["to"], event["level"]) == (6, 3, "alert")
    kept, _ = made.checkpoint()
    assert kept.state["updater"]["roll_backs"] == 1
    assert kept.update == made.plan.num_updates


def test_a_run_without_a_checkpoint_begins_anew(tmp_path, monkeypatch):
    made = Job(tmp_path, optim=OPTIM, guard=GUARD)
    spoiling(monkeypatch, [1, 2])
    made.attempt()
    assert [event["to"] for event in told(made, "rolled_back")] == [0]
    other = Job(tmp_path / "other", optim=dataclasses.replace(OPTIM, lr=OPTIM.lr / 2), guard=GUARD)
    monkeypatch.setattr(ranks, "fit", fit)
    other.attempt()
    models = [made.checkpoint()[1]["model.safetensors"], other.checkpoint()[1]["model.safetensors"]]
    assert models[0] == models[1]


def test_the_best_checkpoint_becomes_the_model(tmp_path, monkeypatch):
    train = TrainSpec(epochs=4, seed=1, keep=Keep.best, patience=2)
    made = Job(tmp_path, optim=OPTIM, train=train, checkpoint=CheckpointSpec(every="1h", keep_last=1))

    def worse_and_worse(run):
        evaluate, left = run.valid, iter([0.5, 0.4, 0.6, 0.7])

        class Told:
            def __len__(self):
                return len(evaluate)

            def __call__(self, *given):
                found = evaluate(*given)
                return dataclasses.replace(found, metrics=found.metrics | {"letter_error_rate": next(left)})

        return fit(dataclasses.replace(run, valid=Told()))

    monkeypatch.setattr(ranks, "fit", worse_and_worse)
    made.attempt()
    (event,) = told(made, "best_restored")
    per_epoch = made.plan.num_updates // 4
    assert (event["update"], event["best"]) == (2 * per_epoch, 0.4)
    checkpoints = Checkpoints(
        made.blobs,
        made.run,
        attempt=0,
        keep_last=1,
        spec_digest=made.plan.spec_digest,
        data_digest=made.plan.data_digest,
    )
    best = checkpoints.best()
    assert best.update == 2 * per_epoch
    assert made.checkpoint()[0].update == 4 * per_epoch
    wanted = safetensors.torch.load(checkpoints.read(best)["ema.safetensors"])
    version = Registry(made.blobs).resolve("toy@1")
    found = safetensors.torch.load(made.blobs.get(version.files["model.safetensors"].key))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)

"""Checkpoints of the loop: bytes there and back, and what is refused."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from train_rig import ADAMW, SGD, Toy, toy_spec, weights

from treadle.errors import IntegrityError
from treadle.spec import GruSpec, RmsPropSpec, SgdSpec
from treadle.train import TrainState, build_optimizer, load_weights, pack, unpack
from treadle.train.guard import GuardState
from treadle.train.state import MODEL_FILE, OPTIM_FILE, snapshot
from treadle.train.updater import UpdaterState
from treadle.train.watch import Watch


def stepped(optim, steps=2, **changes):
    toy = Toy(toy_spec(optim=optim, **changes))
    network = toy.network()
    optimizer = build_optimizer(optim, network)
    for _ in range(steps):
        for p in network.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return toy, network, optimizer


@given(st.builds(TrainState, **{name: st.integers(0, 10**12) for name in ("update", "epoch", "index", "frames_seen")}))
def test_a_state_survives_json(state):
    assert TrainState.from_json(json.loads(json.dumps(state.to_json())), where="x") == state


def test_a_state_advances_within_and_over_epochs():
    state = TrainState(update=4, epoch=1, index=2, frames_seen=10, precision="fp32")
    updater = UpdaterState(rate_factor=0.5, roll_backs=1, guard=GuardState(log_mean=-1.5, accepted=4, skipped=1))
    assert state.advanced(5, updater, is_last_of_epoch=False) == TrainState(
        update=5, epoch=1, index=3, frames_seen=15, precision="fp32", updater=updater
    )
    after = state.advanced(5, updater, is_last_of_epoch=True)
    assert (after.epoch, after.index) == (2, 0)
    assert TrainState.from_json(json.loads(json.dumps(after.to_json())), where="x") == after


def test_a_state_of_an_older_version_is_read():
    old = {"update": 4, "epoch": 1, "index": 2, "frames_seen": 10, "precision": "fp32", "evaluated": 2}
    assert TrainState.from_json(old, where="x") == TrainState(**old)


def test_a_state_says_whether_it_is_the_best():
    watch = Watch(best=0.5, best_update=4)
    assert TrainState(update=4, evaluated=4, watch=watch).is_best
    assert not TrainState(update=5, evaluated=4, watch=watch).is_best  # moved on since
    assert not TrainState(update=5, evaluated=5, watch=watch).is_best
    assert not TrainState().is_best


@pytest.mark.parametrize("value", [{"update": 1, "step": 2}, {"update": "1"}, {"update": 1.5}, {"update": True}, []])
def test_a_state_of_another_form_is_refused(value):
    with pytest.raises(IntegrityError, match="there"):
        TrainState.from_json(value, where="there")


@pytest.mark.parametrize(
    "optim",
    [ADAMW, SGD, SgdSpec(momentum=0.0), RmsPropSpec(), RmsPropSpec(momentum=0.5)],
    ids=["adamw", "sgd", "plain", "rmsprop", "rmsprop-momentum"],
)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_everything_comes_back(optim, steps):
    toy, network, optimizer = stepped(optim, steps)
    files = pack(snapshot(network, optimizer))
    other = toy.network()
    fresh = build_optimizer(optim, other)
    unpack(files, other, fresh)
    assert pack(snapshot(other, fresh)) == files
    for first, second in ((network, optimizer), (other, fresh)):
        for p in first.parameters():
            p.grad = torch.full_like(p, 0.1)
        second.step()
    assert pack(snapshot(other, fresh)) == pack(snapshot(network, optimizer))


def test_a_snapshot_owns_its_values():
    _, network, optimizer = stepped(ADAMW)
    taken = snapshot(network, optimizer)
    before = pack(taken)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert pack(taken) == before
    assert pack(snapshot(network, optimizer)) != before


def damaged(files, change, name=OPTIM_FILE):
    tensors = safetensors.torch.load(files[name])
    change(tensors)
    return files | {name: safetensors.torch.save(tensors)}


FIRST = "embedding.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{FIRST}/exp_avg"), "some parameters lack moments"),
        (lambda t: [t.pop(key) for key in list(t) if key.startswith(FIRST)], "some parameters lack moments"),
        (lambda t: t.update({"other/exp_avg": torch.zeros(1)}), "got other/exp_avg"),
        (lambda t: t.update({f"{FIRST}/exp_avg": torch.zeros(3)}), r"got shape \(3,\), expected"),
        (lambda t: t.update({f"{FIRST}/more": t[f"{FIRST}/exp_avg"].clone()}), "some parameters lack moments"),
    ],
)
def test_moments_of_another_optimizer_are_refused_before_anything_changes(change, words):
    toy, network, optimizer = stepped(ADAMW)
    files = damaged(pack(snapshot(network, optimizer)), change)
    other = toy.network()
    before = weights_of(other)
    with pytest.raises(IntegrityError, match=words):
        unpack(files, other, build_optimizer(ADAMW, other))
    assert torch.equal(weights_of(other), before)


def weights_of(network):
    return torch.cat([p.detach().reshape(-1).clone() for p in network.parameters()])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(FIRST), f"missing {FIRST}"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown extra"),
        (lambda t: t.update({FIRST: torch.zeros(2, 2)}), r"got shape \(2, 2\)"),
    ],
)
def test_weights_of_another_network_are_refused(change, words):
    toy, network, optimizer = stepped(ADAMW)
    files = damaged(pack(snapshot(network, optimizer)), change, MODEL_FILE)
    with pytest.raises(IntegrityError, match=words):
        load_weights(toy.network(), files[MODEL_FILE], where="w")


def test_a_checkpoint_of_another_cell_is_refused():
    _, network, optimizer = stepped(ADAMW)
    files = pack(snapshot(network, optimizer))
    other = Toy(toy_spec(model=GruSpec(hidden_size=6))).network()
    with pytest.raises(IntegrityError):
        unpack(files, other, build_optimizer(ADAMW, other))


@pytest.mark.parametrize("name", [MODEL_FILE, OPTIM_FILE])
def test_files_that_are_missing_or_no_safetensors_are_refused(name):
    toy, network, optimizer = stepped(ADAMW)
    files = pack(snapshot(network, optimizer))
    with pytest.raises(IntegrityError, match=name):
        unpack({key: value for key, value in files.items() if key != name}, network, optimizer)
    with pytest.raises(IntegrityError, match="not readable as safetensors"):
        unpack(files | {name: files[name][:40]}, network, optimizer)
    run = toy.run(saved=(files, json.dumps(TrainState(update=2).to_json())))
    assert torch.equal(weights(run), weights_of(network))

"""A carried state: the outputs of whole sequences for any chunk, their gradients where no chunk cuts one, and nothing
that depends on which rank held it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from streams_rig import STREAMS, StreamToy, state_of, stream_spec, texts_draft
from train_rig import SGD, weights

from treadle.data import RowReader
from treadle.errors import IntegrityError
from treadle.spec import (
    BatchSpec,
    GruSpec,
    LstmSpec,
    MinGruSpec,
    MinLstmSpec,
    RnnSpec,
    TagSpec,
    TrainSpec,
)
from treadle.train import World, fit, pack
from treadle.train.backward import counted, go_back
from treadle.train.carry import CARRY_FILE, NoCarry, _sound
from treadle.train.task import run_network

SIZES = {"hidden_size": 6, "num_layers": 2, "embedding_size": 5}
MODELS = {
    "rnn": RnnSpec(**SIZES),
    "lstm": LstmSpec(**SIZES),
    "gru": GruSpec(**SIZES),
    "mingru": MinGruSpec(**SIZES),
    "minlstm": MinLstmSpec(**SIZES, expansion=2.0),
    "learned": GruSpec(**SIZES, learned_state=True),
    "conv": LstmSpec(**SIZES, conv_size=3, norm=True, residual=True),
    "packed conv": MinGruSpec(**SIZES, conv_size=4, mlp_factor=2.0),
    "window": GruSpec(**SIZES, attention_every=1, attention_heads=1, attention_window=5),
    "packed window": MinLstmSpec(**SIZES, conv_size=2, attention_every=2, attention_heads=1, attention_window=9),
}


def begun(run):
    """With an initial state that is not zero, where it is learned."""
    with torch.no_grad():
        for name, p in run.network.named_parameters():
            if ".initial" in name:
                p.normal_()
    return run


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [3, 11])
def test_outputs_are_those_of_whole_sequences_whatever_the_chunk(name, chunk):
    batch = dataclasses.replace(STREAMS, chunk=chunk, lanes=2)
    toy = StreamToy(stream_spec(model=MODELS[name], batch=batch))
    run = begun(toy.run())
    run.network.eval()
    feed, device = toy.stream_feed(World()), torch.device("cpu")
    plan, got = feed.plan(0), {}
    with torch.no_grad():
        for update in feed.starting_at(0, 0):
            if update.epoch:
                break
            for micro in update.micros:
                logits_NV = run.carry.logits(run.network, micro, device)
                pieces, at = plan.pieces(update.index, micro.lane), 0
                for row, start, stop in zip(pieces.rows_P, pieces.starts_P, pieces.stops_P, strict=True):
                    got |= {(int(row), t): logits_NV[at + t - start] for t in range(start, stop)}
                    at += stop - start
    # Sequences in whose middle a stream begins are read anew from there: not those.
    begins = [plan.pieces(0, lane) for lane in range(2)]
    cut = {int(row) for p in begins for row, start in zip(p.rows_P, p.starts_P, strict=True) if start}
    reader, compared = RowReader(toy.blobs, toy.manifest), 0
    for place, row in enumerate(feed._rows):
        if place not in cut:
            whole = reader.batch(np.array([row]))
            with torch.no_grad():
                wanted_TV = run_network(run.network, whole, device)
            found_TV = torch.stack([got[place, t] for t in range(len(wanted_TV))])
            assert torch.allclose(found_TV, wanted_TV, atol=2e-6)
            compared += len(wanted_TV)
    assert compared > 250


def gradient(run, micros, count, *, logits=None):
    for micro in micros:
        go_back(run, [micro], count)
    found = torch.cat([p.grad.reshape(-1) for p in run.network.parameters()])
    run.network.zero_grad()
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("streams", "chunk"), [(2, 24), (3, 8), (1, 1000)])
def test_gradients_are_those_of_whole_sequences_where_no_chunk_cuts_one(name, streams, chunk):
    batch = BatchSpec(max_slots="1000", lanes=1, streams=streams, chunk=chunk)
    toy = StreamToy(stream_spec(model=MODELS[name], batch=batch), texts_draft(18, length=8))
    run = begun(toy.run())
    run.network.double().eval()
    run = dataclasses.replace(run, carry=toy.carry(run.network, run.world))
    whole = dataclasses.replace(run, carry=NoCarry())
    feed = toy.stream_feed(World())
    for update in feed.starting_at(0, 0):
        if update.epoch:
            break
        count = counted(run, update)
        assert count == update.frames - update.frames / 8
        found = gradient(run, update.micros, count)
        batch = RowReader(toy.blobs, toy.manifest).batch(np.array(feed.rows_of(0, update.index)))
        wanted = gradient(whole, [dataclasses.replace(update.micros[0], batch=batch)], count)
        assert wanted.abs().max() > 1e-3
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_a_state_carried_over_is_a_constant_of_the_update():
    toy = StreamToy()
    run = toy.run()
    for update in toy.stream_feed(World()).starting_at(0, 0):
        for micro in update.micros:
            go_back(run, [micro], 1.0)
        assert not any(part.requires_grad for state in run.carry._next.values() for part in state.values())
        if update.index == 2:
            break


def test_an_update_that_is_made_again_begins_where_it_began():
    toy = StreamToy()
    run, device = toy.run(), torch.device("cpu")
    run.network.eval()
    with torch.no_grad():
        for update in toy.stream_feed(World()).starting_at(0, 0):
            first = [run.carry.logits(run.network, micro, device) for micro in update.micros]
            for micro, logits in zip(update.micros, first, strict=True):
                assert torch.equal(run.carry.logits(run.network, micro, device), logits)
            if update.index < 3:
                continue
            # In parts, as after a lack of memory; the update after must not see a difference.
            left = {lane: dict(state) for lane, state in run.carry._next.items()}
            for micro, logits in zip(update.micros, first, strict=True):
                halves = [dataclasses.replace(micro, batch=micro.batch.part(n, n + 1), part=n) for n in range(2)]
                parts = [run.carry.logits(run.network, half, device) for half in halves]
                assert torch.allclose(torch.cat(parts), logits, atol=1e-6)
            for lane, state in run.carry._next.items():
                assert all(torch.allclose(state[name], part, atol=1e-6) for name, part in left[lane].items())
            break


def test_a_stream_that_left_the_finite_numbers_begins_anew():
    state = {"h": torch.ones(2, 3, 4), "c": torch.full((2, 3, 4), 2.0)}
    state["c"][1, 1, 2] = float("inf")
    state["h"][0, 2, 0] = float("nan")
    sound = _sound(state)
    for name, value in {"h": 1.0, "c": 2.0}.items():
        assert sound[name][:, 0].eq(value).all()
        assert sound[name][:, 1:].eq(0).all()


def saved_after(toy, update):
    run = toy.run()
    fit(run)
    return run, run.checkpoints.states[update]


def test_checkpoints_hold_the_states_of_all_lanes():
    toy = StreamToy()
    run, (files, _) = saved_after(toy, 2)
    again = toy.run(saved=run.checkpoints.states[2])
    shapes = {name: tuple(part.shape) for name, part in again.carry.tensors(at=(0, 2))[CARRY_FILE].items()}
    assert shapes == {f"lane/{lane}/h": (2, 2, 6) for lane in range(3)}
    assert again.carry.tensors(at=(0, 2))[CARRY_FILE]["lane/0/h"].abs().max() > 0
    assert {CARRY_FILE, "model.safetensors", "optim.safetensors"} <= files.keys()


def test_a_zero_keeps_its_sign_on_its_way_into_a_checkpoint():
    """Ranks add up the bits of their lanes: as numbers, -0.0 + 0.0 would be 0.0, and the files of two worlds differ."""
    toy = StreamToy()
    carry = toy.carry(toy.network(), World(rank=0, size=1))
    carry._states[1] = {"h": torch.full((2, 2, 6), -0.0)}
    kept = carry.tensors(at=(0, 1))[CARRY_FILE]
    carry._world = Doubled()
    assert torch.signbit(carry.tensors(at=(0, 1))[CARRY_FILE]["lane/1/h"]).all()
    assert torch.signbit(kept["lane/1/h"]).all()


class Doubled(World):
    """A world whose other rank has no lanes."""

    def sum_tensor(self, value):
        return value + torch.zeros_like(value)


def test_what_is_saved_is_a_copy():
    toy = StreamToy()
    run = toy.run()
    updates = toy.stream_feed(World()).starting_at(0, 0)
    for _ in range(2):
        for micro in next(updates).micros:
            run.carry.logits(run.network, micro, torch.device("cpu"))
    kept = run.carry.tensors(at=(0, 2))[CARRY_FILE]
    before = {name: part.clone() for name, part in kept.items()}
    for state in run.carry._states.values():
        state["h"].fill_(7.0)
    assert all(torch.equal(kept[name], part) for name, part in before.items())
    updates.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": GruSpec(hidden_size=4)}, "states of another network"),
        ({"batch": dataclasses.replace(STREAMS, lanes=2)}, "of other lanes or streams"),
    ],
)
def test_states_of_something_else_are_refused(changes, words):
    _, (files, _) = saved_after(StreamToy(), 2)
    toy = StreamToy(stream_spec(**changes))
    with pytest.raises(IntegrityError, match=words):
        toy.carry(toy.network(), World()).load(files, at=(0, 2))


def test_a_checkpoint_without_states_does_where_all_streams_begin():
    toy = StreamToy()
    carry = toy.carry(toy.network(), World())
    carry.load({}, at=(1, 0))
    with pytest.raises(IntegrityError, match=r"got no carry\.safetensors"):
        carry.load({}, at=(1, 1))


def test_whole_rows_carry_nothing():
    carry = NoCarry()
    carry.load({}, at=(3, 4))
    assert carry.tensors(at=(3, 4)) == {}


@pytest.mark.parametrize("task", ["language", "tag"])
def test_going_on_from_any_update_gives_the_same_bits(task):
    toy = StreamToy(stream_spec(task=TagSpec()) if task == "tag" else stream_spec())
    run = toy.run()
    outcome = fit(run)
    states, last = run.checkpoints.states, outcome.state.update
    per_epoch = toy.stream_feed(World()).plan(0).num_updates
    assert last == 2 * per_epoch
    for update in (1, 2, per_epoch - 1, per_epoch, per_epoch + 2, last):
        resumed = toy.run(saved=states[update])
        assert fit(resumed) == outcome
        assert torch.equal(weights(resumed), weights(run)), update
        for later, files in resumed.checkpoints.states.items():
            assert files == states[later], (update, later)


def test_the_state_matters():
    toy = StreamToy()
    run, (files, state) = saved_after(toy, 3)
    lost = files | pack(toy.carry(toy.network(), World()).tensors(at=(0, 3)))
    resumed = toy.run(saved=(lost, state))
    fit(resumed)
    assert state_of((files, state)).index == 3
    assert not torch.equal(weights(resumed), weights(run))


def test_a_roll_back_puts_the_states_back():
    """A run whose gradients are refused goes back to a checkpoint: weights, position and states of the same update."""
    toy = StreamToy(stream_spec(optim=SGD, train=TrainSpec(epochs=1, seed=5)))
    run = toy.run()
    fit(run)
    saved = run.checkpoints.states[4]
    again = toy.run(saved=saved)
    updates = toy.stream_feed(World()).starting_at(0, 4)
    for _ in range(3):
        for micro in next(updates).micros:
            again.carry.logits(again.network, micro, torch.device("cpu"))
    updates.close()
    again.checkpoints.newest = saved
    back = again.restore.newest()
    assert (back.epoch, back.index) == (0, 4)
    found = again.carry.tensors(at=(0, 4))[CARRY_FILE]
    wanted = toy.run(saved=saved).carry.tensors(at=(0, 4))[CARRY_FILE]
    assert all(torch.equal(found[name], part) for name, part in wanted.items())

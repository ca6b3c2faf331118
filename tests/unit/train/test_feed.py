"""Which batches a rank gets, from any position."""

from __future__ import annotations

import itertools

import pytest
from train_rig import Toy, toy_spec

from treadle.spec import BatchSpec, TrainSpec
from treadle.train import World

SPEC = toy_spec(batch=BatchSpec(slots=40, lanes=12, rounds_per_update=2), train=TrainSpec(epochs=2, seed=3))


@pytest.fixture(scope="module")
def toy():
    return Toy(SPEC)


def seen(feed, epoch=0, index=0):
    return [
        (update.epoch, update.index, [(m.number, m.lane, m.batch.rows_B.tolist()) for m in update.micros])
        for update in feed.starting_at(epoch, index)
    ]


def test_any_position_continues_the_whole(toy):
    feed = toy.feed(World())
    whole = seen(feed)
    for i, (epoch, index, _) in enumerate(whole):
        assert seen(feed, epoch, index) == whole[i:]
    assert seen(feed, SPEC.train.epochs, 0) == []


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 12])
def test_ranks_share_what_one_rank_has(toy, size):
    alone = seen(toy.feed(World()))
    ranks = [seen(toy.feed(World(rank=rank, size=size))) for rank in range(size)]
    for updates in zip(alone, *ranks, strict=True):
        (epoch, index, wanted), *shares = updates
        assert {(e, i) for e, i, _ in shares} == {(epoch, index)}
        dealt = list(itertools.chain.from_iterable(micros for _, _, micros in shares))
        assert sorted(dealt) == sorted(wanted)


def test_the_last_update_is_known_as_such(toy):
    updates = list(toy.feed(World()).starting_at(0, 0))
    last = [update.is_last_of_epoch for update in updates]
    assert sum(last) == 2
    assert last[-1] is True
    assert all(update.num_updates * 2 == len(updates) for update in updates)


def test_an_empty_share_is_an_update_without_batches():
    toy = Toy(toy_spec(batch=BatchSpec(slots=2000, lanes=100), train=TrainSpec(epochs=1)))  # more lanes than rows
    updates = list(toy.feed(World(rank=99, size=100)).starting_at(0, 0))
    assert [update.micros for update in updates] == [()]
    assert updates[0].rows > 0
    assert updates[0].frames > updates[0].rows


def test_the_largest_batch_is_the_largest_of_the_epoch_on_every_rank(toy):
    feed = toy.feed(World())
    largest = feed.largest()
    batches = [m.batch for update in feed.starting_at(0, 0) if update.epoch == 0 for m in update.micros]
    assert largest.slots == max(batch.slots for batch in batches) <= 40
    assert (toy.feed(World(rank=3, size=4)).largest().rows_B == largest.rows_B).all()


def test_an_update_knows_what_all_ranks_have(toy):
    for size in (1, 5):
        ranks = [toy.feed(World(rank=rank, size=size)).starting_at(0, 0) for rank in range(size)]
        for shares in zip(*ranks, strict=True):
            batches = [micro.batch for share in shares for micro in share.micros]
            assert {share.frames for share in shares} == {sum(batch.frames for batch in batches)}
            assert {share.rows for share in shares} == {sum(len(batch.rows_B) for batch in batches)}


def test_every_batch_keeps_to_the_budget(toy):
    for update in toy.feed(World()).starting_at(0, 0):
        for micro in update.micros:
            assert micro.batch.slots <= 40
            assert micro.batch.inputs.shape == (len(micro.batch.rows_B), micro.batch.lengths_B.max())

"""Which batches a rank gets, from any position."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from train_rig import Toy, toy_draft, toy_spec

from treadle.data import Draft, Form, Labels, Row, RowReader, Tokens
from treadle.plan import plan_epoch
from treadle.spec import (
    AugmentSpec,
    BatchSpec,
    Budget,
    ClassifySpec,
    ClassWeights,
    LongRows,
    SplitSpec,
    TrainSpec,
)
from treadle.train import World

SPEC = toy_spec(batch=BatchSpec(max_slots="40", lanes=12, rounds_per_update=2), train=TrainSpec(epochs=2, seed=3))


@pytest.fixture(scope="module")
def toy():
    return Toy(SPEC, toy_draft(240))


def seen(feed, epoch=0, index=0, **options):
    return [
        (update.epoch, update.index, [(m.number, m.lane, m.batch.rows_B.tolist()) for m in update.micros])
        for update in feed.starting_at(epoch, index, **options)
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
    toy = Toy(toy_spec(batch=BatchSpec(max_slots="2000", lanes=100), train=TrainSpec(epochs=1)))  # more lanes than rows
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


def ids(updates):
    """The rows of each update over all ranks."""
    return [sorted(row for _, _, rows in micros for row in rows) for _, _, micros in updates]


def test_any_number_of_ranks_goes_on_where_another_stopped():
    """2 -> 1 -> 3 -> 4 ranks over 12 lanes, with batches read ahead that nobody took, and each row once an epoch."""
    toy = Toy(toy_spec(batch=BatchSpec(max_slots="12", lanes=12), train=TrainSpec(epochs=2, seed=3)), toy_draft(300))
    whole = seen(toy.feed(World()))
    num_updates = len(whole) // 2
    assert num_updates > 6
    stops = [0, 2, 3, num_updates, num_updates + 1, len(whole)]  # three of them in the first epoch, one at its end
    found = []
    for size, start, stop in zip((2, 1, 3, 4, 6), stops, stops[1:], strict=False):
        parts = []
        for rank in range(size):
            feed = toy.feed(World(rank=rank, size=size))
            updates = feed.starting_at(*divmod(start, num_updates), depth=4)
            taken = itertools.islice(updates, stop - start)
            parts.append([[(m.number, m.lane, m.batch.rows_B.tolist()) for m in update.micros] for update in taken])
            updates.close()
        found += [(0, 0, list(itertools.chain(*shares))) for shares in zip(*parts, strict=True)]
    assert ids(found) == ids(whole)
    for epoch in range(2):
        rows = list(itertools.chain(*ids(found)[epoch * num_updates : (epoch + 1) * num_updates]))
        assert sorted(rows) == sorted(toy.feed(World())._rows.tolist())


def values_of(update):
    return [(m.batch.inputs.copy(), m.batch.labels_BU.copy(), m.batch.lengths_B.copy()) for m in update.micros]


@pytest.mark.parametrize("form", Form)
def test_a_batch_stays_until_the_next_update_is_asked_for(toy, form):
    feed, reader = toy.feed(World(), form=form), RowReader(toy.blobs, toy.manifest)
    kept = []
    for update in feed.starting_at(0, 0, depth=4):
        for inputs, micro in kept:  # given back, and poisoned or used again
            assert not np.array_equal(inputs, reader.batch(micro.batch.rows_B, form=form).inputs)
        for micro in update.micros:
            wanted = reader.batch(micro.batch.rows_B, form=form)
            assert np.array_equal(micro.batch.inputs, wanted.inputs)
            assert np.array_equal(micro.batch.labels_BU, wanted.labels_BU)
            micro.batch.inputs[...] = 1  # nobody else reads it
        kept = [(micro.batch.inputs, micro) for micro in update.micros]


def test_open_files_threads_and_buffers_stay_the_same_over_epochs():
    toy = Toy(toy_spec(batch=BatchSpec(max_slots="40", lanes=2), train=TrainSpec(epochs=4)))
    feed = toy.feed(World())
    found = {}
    for update in feed.starting_at(0, 0, depth=4):
        if update.is_last_of_epoch:
            found[update.epoch] = (
                len(list(Path("/proc/self/fd").iterdir())),
                threading.active_count(),
            )
    # In the last epoch, the thread may be done already.
    assert len({found[epoch] for epoch in (0, 1, 2)}) == 1
    # Inputs and labels of two microbatches, of updates in use, in line, in hand and in the making.
    assert feed._buffers.num_allocated <= 4 * (1 + 4 + 1 + 1)


def test_packed_updates_hold_the_same_rows(toy):
    padded, packed = (toy.feed(World(rank=1, size=3), form=form) for form in Form)
    for first, second in zip(padded.starting_at(0, 0), packed.starting_at(0, 0), strict=True):
        assert (first.frames, first.rows, first.index) == (second.frames, second.rows, second.index)
        for mine, theirs in zip(first.micros, second.micros, strict=True):
            assert np.array_equal(mine.batch.rows_B, theirs.batch.rows_B)
            offsets = np.cumsum([0, *theirs.batch.lengths_B])
            for i, n in enumerate(mine.batch.lengths_B):
                assert np.array_equal(mine.batch.inputs[i, :n], theirs.batch.inputs[offsets[i] : offsets[i + 1]])
            assert theirs.batch.slots == theirs.batch.frames <= mine.batch.slots


def test_padding_goes_to_a_multiple():
    toy = Toy(toy_spec(batch=BatchSpec(max_slots="64", lanes=2, multiple_of=8)))
    shapes = {m.batch.inputs.shape[1] for update in toy.feed(World()).starting_at(0, 0) for m in update.micros}
    assert shapes <= {8, 16}
    assert toy.feed(World()).largest().inputs.shape[1] in shapes


# ---- weights ----


def weighted_toy(**changes):
    rng = np.random.default_rng(3)
    words = ["".join(rng.choice(list("abc"), rng.integers(2, 9))) for _ in range(300)]
    rows = [Row(entity=w, inputs=list(w), target=w[0].upper(), weight=1 + len(w) / 4) for w in dict.fromkeys(words)]
    draft = Draft(rows=rows, inputs=Tokens(), target=Labels(names=tuple("ABC")), licence="none")
    return Toy(toy_spec(**{"batch": BatchSpec(max_slots="60", lanes=3, rounds_per_update=2), **changes}), draft)


@pytest.mark.parametrize("weights", ClassWeights)
def test_an_update_sums_what_rows_count_over_all_ranks(weights):
    toy = weighted_toy(task=ClassifySpec(class_weights=weights))
    task = toy.task()
    for size in (1, 3):
        feeds = [toy.feed(World(rank=rank, size=size)).starting_at(0, 0) for rank in range(size)]
        for shares in zip(*feeds, strict=True):
            batches = [micro.batch for share in shares for micro in share.micros]
            rows = sum(task.row_weights(b.weights_B, b.labels_BU[:, 0]).sum() for b in batches)
            frames = sum(task.row_weights(b.weights_B, b.labels_BU[:, 0]) @ b.lengths_B for b in batches)
            for share in shares:
                assert share.weighted_rows == pytest.approx(rows, rel=1e-12)
                assert share.weighted_frames == pytest.approx(frames, rel=1e-12)
                assert rows != share.rows
            assert sum(task.count(batch) for batch in batches) == pytest.approx(rows, rel=1e-12)


def test_without_weights_the_sums_are_the_counts(toy):
    for update in toy.feed(World()).starting_at(0, 0):
        assert update.weighted_rows == update.rows
        assert update.weighted_frames == update.frames
        break


def test_rare_labels_stand_more_often():
    rows = [Row(entity=f"w{i}", inputs=list("abc"[: 1 + i % 3]), target="AB"[i % 10 == 0]) for i in range(200)]
    draft = Draft(rows=rows, inputs=Tokens(), target=Labels(names=("A", "B")), licence="none")
    batch = BatchSpec(max_slots="40", lanes=2, class_balance=1.0)
    toy = Toy(toy_spec(task=ClassifySpec(), split=SplitSpec(), batch=batch, train=TrainSpec(epochs=1)), draft)
    labels = np.concatenate([m.batch.labels_BU[:, 0] for u in toy.feed(World()).starting_at(0, 0) for m in u.micros])
    counts = np.bincount(labels)
    assert counts[0] == counts[1] == 180


# ---- long rows, augmentation ----


@pytest.mark.parametrize("form", Form)
def test_the_pieces_of_a_long_row_are_the_row(form):
    batch = BatchSpec(max_slots="5", lanes=2, long_rows=LongRows.chunk, budget=Budget.slots)
    toy = Toy(toy_spec(batch=batch, train=TrainSpec(epochs=1)))
    reader = RowReader(toy.blobs, toy.manifest)
    pieces, whole = {}, 0
    for update in toy.feed(World(), form=form).starting_at(0, 0):
        for micro in update.micros:
            assert micro.batch.slots <= 5
            whole += micro.num_pieces == 1
            if micro.num_pieces > 1:
                assert micro.piece == len(pieces.setdefault((micro.number, micro.lane), []))
                pieces[micro.number, micro.lane].append(
                    (micro.batch.rows_B.copy(), micro.batch.inputs.reshape(-1)[: micro.batch.frames].copy())
                )
    assert whole > 0
    assert len(pieces) > 10
    for parts in pieces.values():
        rows = {tuple(rows.tolist()) for rows, _ in parts}
        assert len(rows) == 1
        wanted = reader.batch(np.array(rows.pop())).inputs[0]
        assert np.array_equal(np.concatenate([values for _, values in parts]), wanted)
    plan = plan_epoch(toy.feed(World())._lengths, batch, lanes=2, seed=5, epoch=0)
    assert {number for number, _ in pieces} == {i for i in range(plan.num_rounds) if plan.pieces(i) > 1}


def test_rows_are_changed_by_epoch_and_alike_on_any_rank(toy):
    spec = dataclasses.replace(SPEC, augment=AugmentSpec(time_masks=2, time_mask_share=0.5))
    changed, plain = Toy(spec, toy_draft(240)), toy.feed(World())

    def rows(feed, epoch):
        found = {}
        for update in itertools.takewhile(lambda update: update.epoch == epoch, feed.starting_at(epoch, 0)):
            for micro in update.micros:
                for i, row in enumerate(micro.batch.rows_B.tolist()):
                    found[row] = micro.batch.inputs[i, : micro.batch.lengths_B[i]].tolist()
        return found

    first = rows(changed.feed(World()), 0)
    assert rows(changed.feed(World()), 0) == first
    assert first.keys() == rows(plain, 0).keys()
    assert first != rows(plain, 0)
    assert rows(changed.feed(World()), 1) != first
    parts = [rows(changed.feed(World(rank=rank, size=3)), 0) for rank in range(3)]
    assert parts[0] | parts[1] | parts[2] == first

"""Every row leaves once, within the budget, and none waits longer than its place in the line."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import OverloadError
from treadle.serve.batcher import Batcher

LENGTHS = st.lists(st.integers(1, 40), max_size=30)


@dataclass(frozen=True)
class Item:
    number: int
    length: int


def items(lengths, start=0):
    return [Item(start + i, length) for i, length in enumerate(lengths)]


@given(st.lists(st.one_of(LENGTHS, st.just("take")), max_size=20), st.integers(1, 200))
def test_each_row_leaves_exactly_once_and_the_oldest_always_next(steps, budget):
    batcher: Batcher[Item] = Batcher(max_queue_slots=10**6)
    waiting: dict[int, int] = {}  # number -> batches it may still wait for, one per older row
    number, left = 0, []

    def take():
        oldest = min(waiting) if waiting else None
        batch = batcher.take(budget)
        assert (oldest is None) == (not batch)
        for item in batch:
            del waiting[item.number]  # KeyError: it left twice, or never came
            left.append(item.number)
        if batch:
            assert oldest in {item.number for item in batch}
            assert len(batch) == 1 or len(batch) * max(item.length for item in batch) <= budget
        waiting.update({other: turns - 1 for other, turns in waiting.items()})
        assert min(waiting.values(), default=0) >= 0
        assert batcher.queued_slots == sum(lengths[n] for n in waiting)
        assert len(batcher) == len(waiting)

    lengths: dict[int, int] = {}
    for step in steps:
        if step == "take":
            take()
            continue
        rows = items(step, number)
        batcher.offer(rows)
        for row in rows:
            waiting[row.number] = len(waiting)
            lengths[row.number] = row.length
        number += len(rows)
    while waiting:
        take()
    assert sorted(left) == list(range(number))
    assert batcher.take(budget) == []


@given(LENGTHS.filter(bool), st.integers(1, 200))
def test_a_batch_is_at_least_four_fifths_frames(lengths, budget):
    batcher: Batcher[Item] = Batcher(max_queue_slots=10**6)
    batcher.offer(items(lengths))
    while batch := batcher.take(budget):
        frames = sum(item.length for item in batch)
        assert frames + 1e-9 >= 0.8 * (len(batch) * max(item.length for item in batch))


def test_like_lengths_go_together_and_the_budget_is_used():
    batcher: Batcher[Item] = Batcher(max_queue_slots=10**6)
    batcher.offer(items([10, 500, 11, 490, 10, 9, 510]))
    assert [item.length for item in batcher.take(10_000)] == [9, 10, 10, 11]
    assert [item.length for item in batcher.take(1020)] == [500, 510]
    assert [item.length for item in batcher.take(10_000)] == [490]


def test_equal_rows_fill_the_budget_to_the_last_slot():
    batcher: Batcher[Item] = Batcher(max_queue_slots=10**6)
    batcher.offer(items([8] * 100))
    assert [len(batcher.take(64)) for _ in range(13)] == [8] * 12 + [4]


def test_a_row_longer_than_the_budget_goes_alone():
    batcher: Batcher[Item] = Batcher(max_queue_slots=10**6)
    batcher.offer(items([50, 50]))
    assert [item.number for item in batcher.take(10)] == [0]
    assert [item.number for item in batcher.take(10)] == [1]


def test_what_does_not_fit_the_queue_is_refused_whole():
    batcher: Batcher[Item] = Batcher(max_queue_slots=10)
    batcher.offer(items([4, 4]))
    with pytest.raises(OverloadError, match="got 3 time steps while 8 wait"):
        batcher.offer(items([1, 2]))
    assert (len(batcher), batcher.queued_slots) == (2, 8)
    batcher.offer(items([2]))
    assert batcher.queued_slots == 10


@given(LENGTHS, st.sets(st.integers(0, 29)))
def test_withdrawn_rows_never_leave(lengths, unwanted):
    batcher: Batcher[Item] = Batcher(max_queue_slots=10**6)
    tickets = batcher.offer(items(lengths))
    assert list(tickets) == list(range(len(lengths)))
    known = {n for n in unwanted if n < len(lengths)}
    assert batcher.withdraw(unwanted) == len(known)
    assert batcher.withdraw(unwanted) == 0
    left = []
    while batch := batcher.take(100):
        left += [item.number for item in batch]
    assert sorted(left) == sorted(set(range(len(lengths))) - known)
    assert batcher.queued_slots == 0

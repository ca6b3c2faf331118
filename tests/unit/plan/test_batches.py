"""Batch plans: cover, budget, any world size, and stability of the bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.errors import ConfigError
from treadle.plan import plan_epoch
from treadle.spec import BatchSpec

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=200).map(lambda v: np.array(v, np.int64))


@settings(max_examples=150, deadline=None)
@given(
    lengths,
    st.integers(300, 2000),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.integers(0, 3),
)
def test_every_row_once_and_no_microbatch_above_the_budget(lengths_N, slots, lanes, rounds, noise, epoch):
    batch = BatchSpec(slots=slots, rounds_per_update=rounds, noise=noise)
    plan = plan_epoch(lengths_N, batch, lanes=lanes, seed=1, epoch=epoch)
    seen: list[int] = []
    for update in range(plan.num_updates):
        for number in plan.rounds_of(update):
            for lane in range(lanes):
                rows = plan.lane_rows(number, lane)
                seen += rows.tolist()
                if len(rows):
                    assert len(rows) * lengths_N[rows].max() <= slots
    assert sorted(seen) == list(range(len(lengths_N)))
    assert plan.worst_slots <= slots


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 3))
def test_rows_of_an_update_do_not_depend_on_the_number_of_ranks(lengths_N, rounds):
    plan = plan_epoch(lengths_N, BatchSpec(slots=600, rounds_per_update=rounds), lanes=12, seed=0, epoch=0)
    for update in range(plan.num_updates):
        whole = sorted(r for n in plan.rounds_of(update) for r in plan.round_rows(n).tolist())
        for world in (1, 2, 3, 4, 6, 12):
            dealt = [
                row
                for rank in range(world)
                for number in plan.rounds_of(update)
                for lane in range(rank, 12, world)
                for row in plan.lane_rows(number, lane).tolist()
            ]
            assert sorted(dealt) == whole


def test_epochs_differ_and_one_epoch_is_one_plan():
    lengths_N = np.arange(1, 500)
    plans = [plan_epoch(lengths_N, BatchSpec(slots=2000), lanes=4, seed=7, epoch=e) for e in (0, 1, 0)]
    assert plans[0].digest == plans[2].digest != plans[1].digest


def test_the_bits_are_these_on_every_machine():
    lengths_N = (np.arange(1000) * 7919) % 97 + 1
    plan = plan_epoch(lengths_N, BatchSpec(slots=1000), lanes=4, seed=3, epoch=2)
    assert plan.digest[:16] == GOLDEN


GOLDEN = "a6920c2f9ebe356e"


def test_padding_is_small_on_long_tailed_lengths():
    rng = np.random.default_rng(0)
    lengths_N = np.clip(np.exp(rng.normal(4.1, 0.98, 20_000)), 1, 2000).astype(np.int64)
    plan = plan_epoch(lengths_N, BatchSpec(slots=2048), lanes=4, seed=0, epoch=0)
    assert plan.fill > 0.92


def test_a_row_above_the_budget_is_named():
    with pytest.raises(ConfigError, match=r"batch\.slots: got 64, expected at least 65, the length of row 2"):
        plan_epoch(np.array([3, 9, 65]), BatchSpec(slots=64), lanes=1, seed=0, epoch=0)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(300, 2000), st.integers(1, 9), st.integers(0, 3))
def test_the_largest_microbatch_is_the_largest(lengths_N, slots, lanes, epoch):
    plan = plan_epoch(lengths_N, BatchSpec(slots=slots), lanes=lanes, seed=1, epoch=epoch)
    rows = plan.lane_rows(*plan.largest)
    assert len(rows) * lengths_N[rows].max() == plan.worst_slots
    assert plan.frames == lengths_N.sum()
    assert plan.frames <= plan.slots
    assert plan.fill == plan.frames / plan.slots


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 9), st.integers(1, 5))
def test_a_budget_of_rows_holds_too(lengths_N, lanes, max_rows):
    plan = plan_epoch(lengths_N, BatchSpec(slots=10_000, max_rows=max_rows), lanes=lanes, seed=0, epoch=0)
    found = [len(plan.lane_rows(r, lane)) for r in range(plan.num_rounds) for lane in range(lanes)]
    assert max(found) <= max_rows
    assert sum(found) == len(lengths_N)


def test_lanes_of_a_round_differ_by_one_row_at_most():
    lengths_N = np.random.default_rng(0).integers(1, 90, 1000)
    plan = plan_epoch(lengths_N, BatchSpec(slots=700), lanes=7, seed=0, epoch=0)
    for number in range(plan.num_rounds):
        sizes = [len(plan.lane_rows(number, lane)) for lane in range(7)]
        assert max(sizes) - min(sizes) <= 1


def test_seeds_differ():
    lengths_N = np.arange(1, 300)
    digests = {plan_epoch(lengths_N, BatchSpec(slots=2000), lanes=2, seed=s, epoch=0).digest for s in (0, 1, 2**31 - 1)}
    assert len(digests) == 3


def test_no_rows_is_an_error():
    with pytest.raises(ConfigError, match="no training rows"):
        plan_epoch(np.array([], np.int64), BatchSpec(), lanes=1, seed=0, epoch=0)

"""What a plan costs, against a loop over its microbatches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle import wire
from treadle.plan import Explained, explain, plan_epoch
from treadle.spec import BatchSpec, Budget, LongRows

lengths = st.lists(st.integers(1, 120), min_size=1, max_size=150).map(lambda v: np.array(v, np.int64))
batches = st.builds(
    BatchSpec,
    max_slots=st.integers(30, 600).map(str),
    budget=st.sampled_from(Budget),
    noise=st.sampled_from([0.0, 0.2]),
    multiple_of=st.sampled_from([1, 8]),
    rounds_per_update=st.integers(1, 3),
    long_rows=st.just(LongRows.chunk),
)


def in_words(plan, batch, ranks):
    """The same numbers, microbatch by microbatch."""
    cells = np.zeros((plan.num_rounds, ranks), int)
    steps = np.zeros((plan.num_rounds, ranks), int)
    rows_of, shapes, worst = [], Counter(), 0
    for number in range(plan.num_rounds):
        for lane in range(plan.lanes):
            rows = plan.lane_rows(number, lane)
            if not len(rows):
                continue
            rows_of.append(len(rows))
            if plan.pieces(number) == 1:
                parts = [plan.lengths_N[rows].astype(int)]
            else:
                spans = [plan.piece_span(number, lane, piece) for piece in range(plan.pieces(number))]
                parts = [np.array([stop - start]) for start, stop in spans if stop > start]
            for part in parts:
                padded = -(-part.max() // batch.multiple_of) * batch.multiple_of
                time, count = int(padded), int(padded) * len(part)
                if batch.budget is Budget.frames:
                    time, count = int(part.max()), int(part.sum())
                cells[number, lane % ranks] += count
                steps[number, lane % ranks] += time
                shapes[len(part), time] += 1
                worst = max(worst, count)
    return cells, steps, rows_of, shapes, worst


@settings(max_examples=150, deadline=None)
@given(lengths, batches, st.integers(1, 6), st.integers(1, 6))
def test_numbers_are_those_of_the_microbatches(lengths_N, batch, lanes, ranks):
    ranks = min(ranks, lanes)
    plan = plan_epoch(lengths_N, batch, lanes=lanes, seed=0, epoch=0)
    found = explain(plan, ranks=ranks, plan_s=0.5)
    cells, steps, rows_of, shapes, worst = in_words(plan, batch, ranks)
    assert found.slots == cells.sum()
    assert found.pad == pytest.approx(1 - lengths_N.sum() / cells.sum())
    assert found.worst_over_budget == worst / batch.slots <= 1
    assert found.cells_balance == pytest.approx(cells.mean(axis=1).sum() / cells.max(axis=1).sum())
    assert found.time_balance == pytest.approx(steps.mean(axis=1).sum() / steps.max(axis=1).sum())
    assert found.serial == steps.max(axis=1).sum()
    assert (found.rows_min, found.rows_max) == (min(rows_of), max(rows_of))
    assert found.rows_median == int(np.median(rows_of))
    assert found.shapes == len(shapes)
    assert (found.updates, found.rounds, found.plan_s) == (plan.num_updates, plan.num_rounds, 0.5)
    assert found.long_rounds == sum(plan.pieces(number) > 1 for number in range(plan.num_rounds))


@settings(max_examples=100, deadline=None)
@given(lengths, batches)
def test_lengths_are_those_of_the_rows(lengths_N, batch):
    found = explain(plan_epoch(lengths_N, batch, lanes=2, seed=0, epoch=0), ranks=2)
    wanted = np.percentile(lengths_N, found.length_shares, method="inverted_cdf").astype(int).tolist()
    assert list(found.lengths) == wanted
    counts, _ = np.histogram(lengths_N, [*found.bin_edges[:-1], found.bin_edges[-1] - 0.5])
    assert list(found.bin_rows) == counts.tolist()
    assert sum(found.bin_rows) == len(lengths_N)
    assert sum(zone.rounds for zone in found.zones) == found.rounds
    assert sum(zone.frames_share for zone in found.zones) == pytest.approx(1)
    assert max(found.edges) == lengths_N.max()
    assert min(zone.shortest for zone in found.zones) == lengths_N.min()


def test_a_legal_length_is_explained_whatever_its_size():
    """A table of all lengths up to this one would take 32 GiB."""
    lengths_N = np.array([1, 7, 7, (1 << 32) - 1])
    batch = BatchSpec(max_slots="4G", long_rows=LongRows.chunk)
    found = explain(plan_epoch(lengths_N, batch, lanes=1, seed=0, epoch=0), ranks=1)
    assert found.lengths == (1, 1, 1, 7, 7, *[(1 << 32) - 1] * 3)
    assert (found.bin_edges[-1], sum(found.bin_rows), found.bin_rows[-1]) == (1 << 32, 4, 1)
    assert found.frames == 15 + (1 << 32) - 1


def test_repeated_rows_count_as_often_as_they_stand():
    lengths_N, repeats_N = np.array([5, 10]), np.array([3.0, 1.0])
    plan = plan_epoch(lengths_N, BatchSpec(), lanes=1, seed=0, epoch=0, repeats_N=repeats_N)
    found = explain(plan, ranks=1)
    assert (found.entries, found.frames, found.slots) == (4, 25, 40)


def test_it_survives_the_wire():
    found = explain(plan_epoch(np.arange(1, 200), BatchSpec(), lanes=2, seed=0, epoch=0), ranks=2)
    assert wire.decode(Explained, wire.encode(found)) == found


def test_the_default_plan_holds_what_it_promises():
    """100,000 rows of a long tail on 8 ranks, the reference of tests/bench/batching.py."""
    rng = np.random.default_rng(0)
    lengths_N = np.clip(np.exp(rng.normal(4.1, 0.98, 100_000)), 1, 2000).astype(np.int64)
    for epoch in range(5):
        plan = plan_epoch(lengths_N, BatchSpec(max_slots="6272"), lanes=8, seed=0, epoch=epoch)
        found = explain(plan, ranks=8)
        assert found.pad <= 0.055
        assert found.worst_over_budget <= 1
        assert found.time_balance >= 0.98
        assert found.cells_balance >= 0.99

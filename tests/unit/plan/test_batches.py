"""Batch plans: cover, budget, any world size, long rows in pieces, and stability of the bits."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.errors import ConfigError, DataError
from treadle.plan import plan_epoch
from treadle.spec import BatchSpec, Budget, LongRows

WORLDS = (1, 2, 3, 4, 6, 8, 12, 24)


def _giant(lengths: list[int]) -> list[int]:
    return [*lengths, 300]


lists = st.lists(st.integers(1, 300), min_size=1, max_size=200)
lengths = st.one_of(
    lists,
    st.tuples(st.integers(1, 300), st.integers(1, 200)).map(lambda v: [v[0]] * v[1]),  # all equal
    st.lists(st.integers(1, 5), min_size=1, max_size=200).map(_giant),
    st.lists(st.integers(1, 300), min_size=1, max_size=4),  # fewer rows than lanes
).map(lambda v: np.array(v, np.int64))
batches = st.builds(
    BatchSpec,
    max_slots=st.integers(304, 2000).map(str),
    budget=st.sampled_from(Budget),
    max_rows=st.sampled_from([1, 7, 4096]),
    rounds_per_update=st.integers(1, 5),
    noise=st.sampled_from([0.0, 0.05, 0.3, 0.99]),
    multiple_of=st.sampled_from([1, 8]),
)
long_batches = st.builds(
    BatchSpec,
    max_slots=st.integers(8, 299).map(str),
    budget=st.sampled_from(Budget),
    noise=st.sampled_from([0.0, 0.05, 0.9]),
    multiple_of=st.sampled_from([1, 8]),
    rounds_per_update=st.integers(1, 3),
    long_rows=st.just(LongRows.chunk),
)


def plan_of(lengths_N, batch, *, lanes=3, seed=1, epoch=0, repeats_N=None):
    return plan_epoch(lengths_N, batch, lanes=lanes, seed=seed, epoch=epoch, repeats_N=repeats_N)


def cost(found, batch):
    """What one microbatch of rows with such lengths counts, said once more."""
    if batch.budget is Budget.frames:
        return int(found.sum())
    return len(found) * -(-int(found.max()) // batch.multiple_of) * batch.multiple_of


@settings(max_examples=200, deadline=None)
@given(lengths, batches, st.integers(1, 9), st.integers(0, 3))
def test_every_row_once_and_no_microbatch_above_the_budget(lengths_N, batch, lanes, epoch):
    plan = plan_of(lengths_N, batch, lanes=lanes, epoch=epoch)
    seen: list[int] = []
    costs: list[int] = []
    for update in range(plan.num_updates):
        for number in plan.rounds_of(update):
            assert plan.pieces(number) == 1
            for lane in range(lanes):
                rows = plan.lane_rows(number, lane)
                seen += rows.tolist()
                if len(rows):
                    assert len(rows) <= batch.max_rows
                    costs.append(cost(lengths_N[rows], batch))
                    assert plan.steps(number, lane) == cost(lengths_N[rows].max(keepdims=True), batch)
    assert sorted(seen) == list(range(len(lengths_N)))
    assert max(costs) == plan.worst_slots <= batch.slots
    assert sum(costs) == plan.slots
    assert plan.frames == lengths_N.sum()
    assert plan.fill == plan.frames / plan.slots
    number, lane = plan.largest
    assert cost(lengths_N[plan.lane_rows(number, lane)], batch) == plan.worst_slots


@settings(max_examples=100, deadline=None)
@given(lengths, batches, st.integers(1, 5))
def test_a_round_holds_as_many_rows_as_fit(lengths_N, batch, lanes):
    """One more row a lane would be above the budget, were it as long as the longest row left."""
    plan = plan_of(lengths_N, batch, lanes=lanes)
    for number in range(plan.num_rounds - 1):
        rows = plan.order_E[plan.bounds[number] :].astype(np.int64)
        k, rest = divmod(len(plan.round_rows(number)), lanes)
        assert rest == 0
        if k == batch.max_rows:
            continue
        if batch.budget is Budget.slots:
            longest = lengths_N[rows].max(keepdims=True)
            assert k * cost(longest, batch) <= batch.slots < (k + 1) * cost(longest, batch)
        else:
            more = [lengths_N[rows[lane : (k + 1) * lanes : lanes]].sum() for lane in range(lanes)]
            assert max(more) > batch.slots


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 3))
def test_rows_of_an_update_do_not_depend_on_the_number_of_ranks(lengths_N, rounds):
    plan = plan_of(lengths_N, BatchSpec(max_slots="600", rounds_per_update=rounds), lanes=24)
    for update in range(plan.num_updates):
        whole = sorted(row for number in plan.rounds_of(update) for row in plan.round_rows(number).tolist())
        assert len(whole) == plan.update_rows(update)
        assert lengths_N[whole].sum() == plan.update_frames(update)
        for world in WORLDS:
            dealt = [
                row
                for rank in range(world)
                for number in plan.rounds_of(update)
                for lane in range(rank, 24, world)
                for row in plan.lane_rows(number, lane).tolist()
            ]
            assert sorted(dealt) == whole


@settings(max_examples=150, deadline=None)
@given(lengths, long_batches, st.integers(1, 5))
def test_long_rows_are_read_in_pieces_that_fit(lengths_N, batch, lanes):
    plan = plan_of(lengths_N, batch, lanes=lanes)
    longest_whole = batch.slots // batch.multiple_of * batch.multiple_of
    longest_whole = batch.slots if batch.budget is Budget.frames else longest_whole
    covered, counted, largest = Counter(), 0, 0
    for number in range(plan.num_rounds):
        pieces = plan.pieces(number)
        is_long = lengths_N[plan.round_rows(number)].max() > longest_whole
        assert (pieces > 1) == is_long
        for lane in range(lanes):
            rows = plan.lane_rows(number, lane)
            if pieces == 1:
                covered.update(rows.tolist())
                counted += cost(lengths_N[rows], batch) if len(rows) else 0
                largest = max(largest, cost(lengths_N[rows], batch) if len(rows) else 0)
                continue
            assert len(rows) <= 1
            spans = [plan.piece_span(number, lane, piece) for piece in range(pieces)]
            sizes = [stop - start for start, stop in spans]
            assert max(sizes) - min(sizes) <= 1
            assert [span[0] for span in spans[1:]] == [span[1] for span in spans[:-1]]
            costs = [cost(np.array([size]), batch) for size in sizes if size]
            assert all(c <= batch.slots for c in costs)
            counted, largest = counted + sum(costs), max(largest, *costs, 0)
            assert plan.steps(number, lane) == max(costs, default=0)
            if len(rows):
                assert (spans[0][0], spans[-1][1]) == (0, lengths_N[rows[0]])
                covered.update(rows.tolist())
    assert covered == Counter(range(len(lengths_N)))
    assert (plan.slots, plan.worst_slots) == (counted, largest)
    assert plan.worst_slots <= batch.slots


def test_long_rows_have_no_more_pieces_than_they_need_and_leave_the_others_alone():
    lengths_N = np.array([1000, 950, *[10] * 200])
    plan = plan_of(lengths_N, BatchSpec(max_slots="100", long_rows=LongRows.chunk, noise=0.99), lanes=2)
    assert [plan.pieces(number) for number in range(plan.num_rounds)] == [10, *[1] * 10]
    assert [plan.piece_span(0, 0, piece) for piece in (0, 9)] == [
        (0, lengths_N[plan.lane_rows(0, 0)[0]] // 10),
        (lengths_N[plan.lane_rows(0, 0)[0]] // 10 * 9, lengths_N[plan.lane_rows(0, 0)[0]]),
    ]


@pytest.mark.parametrize("budget", Budget)
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_a_budget_that_is_exactly_met_is_met(budget, multiple_of):
    batch = BatchSpec(max_slots="256", budget=budget, multiple_of=multiple_of)
    plan = plan_of(np.full(24, 64), batch, lanes=2)
    assert (plan.num_rounds, plan.worst_slots, plan.fill) == (3, 256, 1.0)


@settings(max_examples=60, deadline=None)
@given(lengths, batches, st.lists(st.sampled_from([0.0, 0.25, 1.0, 1.5, 3.0]), min_size=200, max_size=201))
def test_rows_stand_as_often_as_asked(lengths_N, batch, repeats):
    repeats_N = np.array(repeats[: len(lengths_N)])
    lengths_N = lengths_N[: len(repeats_N)]
    if not repeats_N.max() >= 1:
        repeats_N[0] = 1.0
    plan = plan_of(lengths_N, batch, repeats_N=repeats_N)
    found = np.bincount(
        np.concatenate([plan.round_rows(number) for number in range(plan.num_rounds)]), minlength=len(lengths_N)
    )
    assert (found >= np.floor(repeats_N)).all()
    assert (found <= np.ceil(repeats_N)).all()
    assert plan.num_entries == found.sum()
    assert plan.frames == (found * lengths_N).sum()
    assert plan.worst_slots <= batch.slots


@settings(max_examples=60, deadline=None)
@given(lengths, batches)
def test_a_plan_made_again_goes_on_at_any_update(lengths_N, batch):
    whole, again = (plan_of(lengths_N, batch, epoch=2) for _ in range(2))
    assert whole.digest == again.digest
    for update in reversed(range(whole.num_updates)):
        assert again.rounds_of(update) == whole.rounds_of(update)
        for number in again.rounds_of(update):
            for lane in range(3):
                assert (again.lane_rows(number, lane) == whole.lane_rows(number, lane)).all()
    with pytest.raises(IndexError):
        whole.rounds_of(whole.num_updates)


def test_epochs_seeds_and_limits_make_other_plans():
    lengths_N = np.arange(1, 500)

    def digest(*, slots="2000", seed=7, epoch=0, lanes=4, **more):
        return plan_of(lengths_N, BatchSpec(max_slots=slots, **more), lanes=lanes, seed=seed, epoch=epoch).digest

    assert digest() == digest()
    others = [
        digest(epoch=1),
        digest(seed=8),
        digest(seed=2**31 - 1),
        digest(lanes=5),
        digest(slots="2001"),
        digest(noise=0.1),
        digest(rounds_per_update=2),
        digest(multiple_of=2),
        digest(budget=Budget.frames),
    ]
    assert len({digest(), *others}) == 1 + len(others)


GOLDEN = {
    "slots": "ec2ca0ca405f4f3d",
    "frames": "8a899aa775ed5aa3",
    "zones": "78dec9f8a56fcf93",
    "pieces": "df58ff87b4ae9fe9",
    "repeats": "0f694570d4141924",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_bits_are_these_on_every_machine(name):
    lengths_N = (np.arange(1000) * 7919) % 97 + 1
    batch = {
        "slots": BatchSpec(max_slots="1000"),
        "frames": BatchSpec(max_slots="1000", budget=Budget.frames),
        "zones": BatchSpec(max_slots="500", rounds_per_update=4, multiple_of=8),
        "pieces": BatchSpec(max_slots="50", long_rows=LongRows.chunk),
        "repeats": BatchSpec(max_slots="1000"),
    }[name]
    repeats_N = 1 + lengths_N % 3 / 4 if name == "repeats" else None
    plan = plan_of(lengths_N, batch, lanes=4, seed=3, epoch=2, repeats_N=repeats_N)
    assert plan.digest[:16] == GOLDEN[name]


@pytest.mark.parametrize(("num_rounds", "rounds_per_update"), [(32, 4), (30, 4), (9, 2), (10, 8), (3, 5)])
def test_the_rounds_of_an_update_are_of_different_zones(num_rounds, rounds_per_update):
    """Rounds are sorted by length: no two of an update are neighbours of one zone, and updates differ by one round."""
    batch = BatchSpec(max_slots="100", noise=0.0, rounds_per_update=rounds_per_update)
    for epoch in range(20):
        plan = plan_of(np.full(num_rounds, 100), batch, lanes=1, epoch=epoch)
        assert plan.num_rounds == num_rounds
        updates = [plan.rounds_of(update) for update in range(plan.num_updates)]
        assert sorted(number for rounds in updates for number in rounds) == list(range(num_rounds))
        sizes = {len(rounds) for rounds in updates}
        assert max(sizes) <= rounds_per_update
        assert max(sizes) - min(sizes) <= 1
        if num_rounds % rounds_per_update == 0:
            zones = [{number // plan.num_updates for number in rounds} for rounds in updates]
            assert all(len(zone) == rounds_per_update for zone in zones)


def reference_lengths(num_rows):
    rng = np.random.default_rng(0)
    return np.clip(np.exp(rng.normal(4.1, 0.98, num_rows)), 1, 2000).astype(np.int64)


def test_zones_make_updates_alike():
    lengths_N = reference_lengths(20_000)
    plan = plan_of(lengths_N, BatchSpec(max_slots="2048", rounds_per_update=4), lanes=4)
    means = [plan.update_frames(u) / plan.update_rows(u) for u in range(plan.num_updates)]
    assert np.std(means) / np.mean(means) < 0.4  # 0.6 where all rounds are shuffled together


def test_padding_is_small_on_long_tailed_lengths():
    plan = plan_of(reference_lengths(20_000), BatchSpec(max_slots="2048"), lanes=4)
    assert plan.fill > 0.94


def test_lanes_of_a_round_differ_by_one_row_at_most():
    lengths_N = np.random.default_rng(0).integers(1, 90, 1000)
    plan = plan_of(lengths_N, BatchSpec(max_slots="700"), lanes=7)
    sizes = [[len(plan.lane_rows(number, lane)) for lane in range(7)] for number in range(plan.num_rounds)]
    assert all(max(row) - min(row) <= 1 for row in sizes)
    assert plan.rows_GL.tolist() == sizes


def test_what_is_left_over_is_short():
    lengths_N = np.random.default_rng(0).integers(1, 90, 1003)
    plan = plan_of(lengths_N, BatchSpec(max_slots="700", noise=0.0), lanes=7)
    assert lengths_N[plan.round_rows(plan.num_rounds - 1)].max() < 9


def test_values_of_rows_are_added_up_over_an_update():
    weights_N = np.linspace(0, 1, 100, dtype=np.float32)
    plan = plan_of(np.arange(1, 101), BatchSpec(max_slots="300", rounds_per_update=3))
    total = sum(plan.update_sum(update, weights_N) for update in range(plan.num_updates))
    assert total == pytest.approx(weights_N.sum(dtype=np.float64))


def test_lengths_are_shared_and_the_plan_is_small():
    lengths_N = reference_lengths(50_000).astype(np.uint32)
    plan = plan_of(lengths_N, BatchSpec(max_slots="4096"), lanes=8)
    assert plan.lengths_N is lengths_N
    assert plan.order_E.nbytes + plan.bounds.nbytes + plan.turn_G.nbytes < 4.2 * len(lengths_N)


@pytest.mark.parametrize(
    ("lengths_N", "batch", "error", "words"),
    [
        (
            [3, 9, 65],
            BatchSpec(max_slots="64"),
            ConfigError,
            r"batch\.max_slots: got 64, expected at least 65, the length of row 2",
        ),
        ([3, 61], BatchSpec(max_slots="62", multiple_of=8), ConfigError, r"at least 64, .* row 1, padded to 64"),
        ([3, 61], BatchSpec(max_slots="60", budget=Budget.frames), ConfigError, r"got 60, expected at least 61"),
        ([3], BatchSpec(max_slots="4", multiple_of=8), ConfigError, r"multiple_of: got 8, expected at most .* = 4"),
        ([], BatchSpec(), ConfigError, "no training rows"),
        ([4, 0], BatchSpec(), DataError, "row 1: got 0 frames"),
        (
            [4, (1 << 32) + 5],  # 5 in 32 bits
            BatchSpec(long_rows=LongRows.chunk),
            DataError,
            "row 1: got 4,294,967,301 frames, expected fewer than 4,294,967,296",
        ),
        ([4], BatchSpec(max_slots="9999999999G"), ConfigError, r"max_slots: got 9,999,.*, expected at most 1,099,"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(lengths_N, batch, error, words):
    with pytest.raises(error, match=words):
        plan_of(np.array(lengths_N, np.int64), batch)


@pytest.mark.parametrize("budget", list(Budget))
def test_any_number_of_rows_may_be_the_most(budget):
    batch = BatchSpec(max_slots="64", budget=budget, max_rows=1 << 70)
    assert plan_of(np.array([3, 9]), batch, lanes=1).num_rounds == 1


def test_the_hint_of_a_long_row_helps():
    lengths_N = np.array([3, 9, 65])
    with pytest.raises(ConfigError) as refused:
        plan_of(lengths_N, BatchSpec(max_slots="64"))
    assert "batch.max_slots=65" in refused.value.hint
    plan_of(lengths_N, BatchSpec(max_slots="65"))
    assert "batch.long_rows=chunk" in refused.value.hint
    plan_of(lengths_N, BatchSpec(max_slots="64", long_rows=LongRows.chunk))

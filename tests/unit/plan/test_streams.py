"""Streams: every frame once, in order, whatever the number of ranks; the state starts anew where it must."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.errors import ConfigError, DataError
from treadle.plan import plan_streams

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=60).map(lambda v: np.array(v, np.int64))
shapes = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 20))


def plan_of(lengths_N, shape=(2, 2, 8), *, seed=1, epoch=0):
    lanes, rows, chunk = shape
    return plan_streams(lengths_N, lanes=lanes, rows_per_lane=rows, chunk=chunk, seed=seed, epoch=epoch)


def frames_of(pieces, stream):
    """The (sequence, frame) that a stream reads in an update, and whether the state starts anew before it."""
    return [
        (row, t, bool(begins) and t == start)
        for at, row, start, stop, begins in zip(
            pieces.streams_P, pieces.rows_P, pieces.starts_P, pieces.stops_P, pieces.begins_P, strict=True
        )
        if at == stream
        for t in range(start, stop)
    ]


@settings(max_examples=150, deadline=None)
@given(lengths, shapes)
def test_every_frame_once_in_order_and_the_state_starts_anew_where_a_sequence_does(lengths_N, shape):
    lanes, rows, chunk = shape
    if lengths_N.sum() < lanes * rows:
        return
    plan = plan_of(lengths_N, shape)
    seen = []
    for lane in range(lanes):
        for stream in range(rows):
            read, sizes = [], set()
            for update in range(plan.num_updates):
                pieces = plan.pieces(update, lane)
                assert (pieces.stops_P > pieces.starts_P).all()
                part = frames_of(pieces, stream)
                assert len(part) <= chunk
                sizes.add(len(part))
                read += part
            start, stop = plan.stream_span(lane * rows + stream)
            assert max(sizes) - min(sizes) <= 2
            assert len(read) == stop - start
            assert [begins for *_, begins in read] == [t == 0 or i == 0 for i, (_, t, _) in enumerate(read)]
            for (row, t, _), (after, s, _) in itertools.pairwise(read):
                assert (after, s) == (row, t + 1) or (s == 0 and t + 1 == lengths_N[row])
            seen += [(row, t) for row, t, _ in read]
    assert sorted(seen) == [(row, t) for row, length in enumerate(lengths_N) for t in range(length)]


@settings(max_examples=80, deadline=None)
@given(lengths, shapes)
def test_counts_of_an_update_are_those_of_its_lanes(lengths_N, shape):
    if lengths_N.sum() < shape[0] * shape[1]:
        return
    plan = plan_of(lengths_N, shape)
    counts = [sum(plan.pieces(update, lane).frames for lane in range(plan.lanes)) for update in range(plan.num_updates)]
    assert counts == [plan.update_frames(update) for update in range(plan.num_updates)]
    assert sum(counts) == plan.frames == lengths_N.sum()
    each = [[plan.pieces(update, lane).frames for lane in range(plan.lanes)] for update in range(plan.num_updates)]
    assert max(map(max, each)) <= plan.worst_frames <= shape[1] * shape[2]
    ends = [
        sum(_ends(plan.pieces(update, lane), lengths_N) for lane in range(plan.lanes)) for update in range(len(each))
    ]
    assert ends == [plan.update_ends(update) for update in range(plan.num_updates)]
    assert sum(ends) == len(lengths_N)
    assert min(counts) > 0
    sizes = [stop - start for start, stop in map(plan.stream_span, range(plan.num_streams))]
    assert max(sizes) - min(sizes) <= 1


def _ends(pieces, lengths_N):
    return int((pieces.stops_P == lengths_N[pieces.rows_P]).sum())


def test_no_update_is_a_rest():
    plan = plan_of(np.array([1001]), (1, 1, 100))
    sizes = [plan.update_frames(update) for update in range(plan.num_updates)]
    assert (len(sizes), min(sizes), max(sizes)) == (11, 91, 91)


def test_a_lane_reads_the_same_whatever_was_read_before():
    lengths_N = np.random.default_rng(0).integers(1, 100, 300)
    plan, again = plan_of(lengths_N), plan_of(lengths_N)
    for update in (plan.num_updates - 1, 3, 0):
        for lane in range(2):
            assert frames_of(plan.pieces(update, lane), 1) == frames_of(again.pieces(update, lane), 1)
    with pytest.raises(IndexError):
        plan.pieces(plan.num_updates, 0)


def test_epochs_differ_and_the_bits_are_these_on_every_machine():
    lengths_N = (np.arange(1000) * 7919) % 97 + 1
    digests = {plan_of(lengths_N, epoch=epoch, seed=3).digest for epoch in range(3)}
    assert len(digests) == 3
    assert plan_of(lengths_N, epoch=2, seed=3).digest[:16] == GOLDEN


GOLDEN = "21f29b73887305ed"


def test_one_long_recording_is_shared():
    plan = plan_of(np.array([1000]), (4, 1, 50))
    pieces = [plan.pieces(0, lane) for lane in range(4)]
    assert [(p.starts_P[0], p.stops_P[0]) for p in pieces] == [(0, 50), (250, 300), (500, 550), (750, 800)]
    assert all(p.begins_P.tolist() == [True] for p in pieces)
    assert plan.pieces(1, 1).begins_P.tolist() == [False]


@pytest.mark.parametrize(
    ("lengths_N", "error", "words"),
    [
        ([], ConfigError, "no training rows"),
        ([3, 0], DataError, "row 1: got 0 frames"),
        ([3], ConfigError, "2 x 2 streams, expected at most 3"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(lengths_N, error, words):
    with pytest.raises(error, match=words):
        plan_of(np.array(lengths_N, np.int64))

"""Streams read from shards: every frame once, its next symbol, and a carried state that equals whole sequences."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.data import Draft, Frames, Labels, Row, RowReader, Tokens, build_dataset, read_streams
from treadle.nn import GRU
from treadle.plan import plan_streams
from treadle.spec import DataSpec, TargetPer
from treadle.testing.memory import MemoryBlobs

SYMBOLS = "abcdefgh"


def texts(count):
    rng = np.random.default_rng(count)
    return ["".join(rng.choice(list(SYMBOLS), rng.integers(1, 30))) + SYMBOLS for _ in range(count)]


@functools.cache
def token_set(count=12):
    blobs = MemoryBlobs()
    rows = [Row(entity=str(i), inputs=list(text)) for i, text in enumerate(texts(count))]
    draft = Draft(rows=rows, inputs=Tokens(), target=None, licence="made up")
    _, manifest = build_dataset(draft, DataSpec(name="text"), blobs, recipe="r")
    return RowReader(blobs, manifest), manifest


def sequence(reader, manifest, row):
    stored = reader.raw(np.array([row])).values
    symbols = manifest.header.content.symbols
    known = manifest.preprocessing.symbols
    return [known.index(symbols[i]) for i in stored]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(0, 3))
def test_every_frame_is_read_once_with_the_symbol_after_it(lanes, rows_per_lane, chunk, epoch):
    reader, manifest = token_set()
    rows = manifest.rows_of("train")
    lengths = manifest.columns["length"][rows]
    plan = plan_streams(lengths, lanes=lanes, rows_per_lane=rows_per_lane, chunk=chunk, seed=1, epoch=epoch)
    pairs = []
    for update in read_streams(reader, manifest, rows, plan, range(lanes)):
        for batch in update:
            if batch is not None:
                assert batch.lengths_B.max() <= chunk
                assert batch.lengths_B.sum() == batch.frames
                pairs += zip(batch.inputs.tolist(), batch.next_N.tolist(), strict=True)
    expected = []
    for row in rows:
        ids = sequence(reader, manifest, row)
        expected += zip(ids, [*ids[1:], -1], strict=True)
    assert sorted(pairs) == sorted(expected)


def test_starting_at_an_update_gives_what_the_unbroken_run_gives_whatever_the_ranks():
    reader, manifest = token_set()
    rows = manifest.rows_of("train")
    plan = plan_streams(manifest.columns["length"][rows], lanes=4, rows_per_lane=2, chunk=5, seed=0, epoch=0)
    whole = list(read_streams(reader, manifest, rows, plan, range(4)))
    for start in (0, 1, plan.num_updates - 1):
        ranks = [read_streams(reader, manifest, rows, plan, range(rank, 4, 2), start=start) for rank in range(2)]
        for update, parts in enumerate(zip(*ranks, strict=True), start=start):
            for lane in range(4):
                got, want = parts[lane % 2][lane // 2], whole[update][lane]
                assert (got is None) == (want is None)
                if got is not None:
                    assert (got.inputs == want.inputs).all()
                    assert (got.starts_N == want.starts_N).all()


@functools.cache
def frame_set():
    rng = np.random.default_rng(0)
    blobs = MemoryBlobs()
    rows = []
    for i in range(6):
        frames = rng.normal(size=(int(rng.integers(3, 40)), 2)).astype(np.float32)
        labels = ["up" if v > 0 else None for v in frames[:, 0]]
        times = np.cumsum(rng.random(len(frames)))
        rows.append(Row(entity=str(i), inputs=frames, target=labels, times=times))
    labels = Labels(names=("down", "up"), per=TargetPer.frame)
    draft = Draft(rows=rows, inputs=Frames(channels=("x", "y")), target=labels, licence="made up")
    _, manifest = build_dataset(draft, DataSpec(name="waves"), blobs, recipe="r")
    return RowReader(blobs, manifest), manifest


def test_a_state_carried_through_streams_gives_the_outputs_of_whole_sequences():
    reader, manifest = frame_set()
    rows = manifest.rows_of("train")
    plan = plan_streams(manifest.columns["length"][rows], lanes=1, rows_per_lane=2, chunk=7, seed=3, epoch=0)
    torch.manual_seed(0)
    layer = GRU(2, 5, batch_first=True)
    state = layer.initial_state(2)
    got = {}
    with torch.no_grad():
        for update in range(plan.num_updates):
            (batch,) = next(read_streams(reader, manifest, rows, plan, range(1), start=update))
            pieces = plan.pieces(update, 0)
            before = {name: part[:, batch.streams_B] for name, part in state.items()}
            offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(batch.lengths_B)]))
            starts = torch.from_numpy(batch.starts_N)
            out_NH, after = layer(torch.from_numpy(batch.inputs), before, offsets=offsets, starts=starts)
            for name, part in after.items():
                state[name][:, batch.streams_B] = part
            at = 0
            for row, start, stop in zip(pieces.rows_P, pieces.starts_P, pieces.stops_P, strict=True):
                for frame in range(start, stop):
                    got[int(row), frame] = out_NH[at + frame - start]
                at += stop - start
    # A stream that begins within a sequence restarts there: those sequences are no whole ones.
    cut = {int(plan.pieces(0, 0).rows_P[plan.pieces(0, 0).streams_P == 1][0])}
    compared = 0
    for place, row in enumerate(rows):
        if place in cut:
            continue
        whole = reader.batch(np.array([row]))
        with torch.no_grad():
            expected, _ = layer(torch.from_numpy(whole.inputs))
        for frame in range(expected.shape[1]):
            assert torch.allclose(got[place, frame], expected[0, frame], atol=1e-6)
            compared += 1
    assert compared > 50


def test_labels_and_gaps_follow_their_frames():
    reader, manifest = frame_set()
    rows = manifest.rows_of("train")
    plan = plan_streams(manifest.columns["length"][rows], lanes=1, rows_per_lane=1, chunk=11, seed=3, epoch=0)
    for update in range(plan.num_updates):
        (batch,) = next(read_streams(reader, manifest, rows, plan, range(1), start=update))
        x_N = batch.inputs[:, 0] * manifest.preprocessing.deviation[0] + manifest.preprocessing.mean[0]
        clear = np.abs(x_N) > 1e-5
        assert ((batch.labels_N == 1) == (x_N > 0))[clear].all()
        assert ((batch.labels_N == -1) == (x_N <= 0))[clear].all()
        assert batch.gaps_N[batch.starts_N] == pytest.approx(0.0)
        assert batch.next_N is None

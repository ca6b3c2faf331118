"""Chunks of streams as the loop gets them: every frame once an epoch, from any position, in reused memory."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from streams_rig import StreamToy, stream_spec

from treadle.data import RowReader, StreamBatch
from treadle.data.load.reader import RowReader as Reader
from treadle.spec import TagSpec
from treadle.train import World
from treadle.train.frame_tasks import LanguageTask

FIELDS = ("inputs", "streams_B", "lengths_B", "starts_N", "next_N", "labels_N")


def copied(batch):
    return {name: None if (part := getattr(batch, name)) is None else part.copy() for name in FIELDS}


def read(feed, epoch=0, index=0):
    """Copies of everything from a position on, while the memory of each update is spoilt after it."""
    return [
        ((update.epoch, update.index, micro.lane, micro.at), copied(micro.batch))
        for update in feed.starting_at(epoch, index)
        for micro in update.micros
    ]


def same(first, second):
    assert [place for place, _ in first] == [place for place, _ in second]
    for (_, a), (_, b) in zip(first, second, strict=True):
        for name in FIELDS:
            assert np.array_equal(a[name], b[name]) if a[name] is not None else b[name] is None


@pytest.mark.parametrize("task", [None, TagSpec()])
def test_any_position_goes_on_with_what_the_unbroken_feed_gives(task):
    toy = StreamToy(stream_spec() if task is None else stream_spec(task=task))
    feed = toy.stream_feed(World())
    whole, per_epoch = read(feed), feed.plan(0).num_updates
    for epoch, index in ((0, 1), (0, per_epoch - 1), (1, 0), (1, 2)):
        rest = [item for item in whole if item[0][:2] >= (epoch, index)]
        same(read(toy.stream_feed(World()), epoch, index), rest)
    assert not [t for t in threading.enumerate() if t.name == "treadle-loader"]


def test_ranks_share_the_lanes_of_every_update():
    toy = StreamToy()
    whole = read(toy.stream_feed(World()))
    for size in (2, 3):
        parts = [item for rank in range(size) for item in read(toy.stream_feed(World(rank=rank, size=size)))]
        same(sorted(parts, key=lambda item: item[0]), whole)


def test_every_frame_once_an_epoch_and_counts_are_the_plans():
    toy = StreamToy()
    feed, task = toy.stream_feed(World()), toy.task()
    assert isinstance(task, LanguageTask)
    rows = toy.manifest.rows_of("train")
    lengths = toy.manifest.columns["length"][rows]
    frames, ends, counts = [0, 0], [0, 0], 0.0
    for update in feed.starting_at(0, 0):
        frames[update.epoch] += update.frames
        ends[update.epoch] += update.rows
        assert update.frames == sum(micro.batch.frames for micro in update.micros)
        count = sum(task.count(micro.batch) for micro in update.micros)
        assert count == update.frames - update.rows
        assert task.normaliser(frames=update.weighted_frames, rows=update.weighted_rows) == max(1.0, count)
        counts += count
    assert frames == [lengths.sum()] * 2
    assert ends == [len(rows)] * 2
    assert counts == 2 * (lengths - 1).sum()


def test_memory_is_used_again():
    feed = StreamToy().stream_feed(World())
    feed._buffers._poison = False
    seen = {micro.batch.inputs.ctypes.data for update in feed.starting_at(0, 0) for micro in update.micros}
    assert feed._buffers.num_allocated < 60
    assert len(seen) < feed.plan(0).num_updates * 3


def test_rows_of_an_update_are_named():
    toy = StreamToy()
    feed = toy.stream_feed(World())
    plan = feed.plan(0)
    wanted = {int(feed._rows[row]) for lane in range(3) for row in plan.pieces(1, lane).rows_P}
    assert feed.rows_of(0, 1) == sorted(wanted)
    assert feed.rows_before(0, 2) == feed.rows_of(0, 1)
    assert feed.rows_before(1, 0) == feed.rows_of(0, plan.num_updates - 1)
    assert feed.mean_rows == 6.0


def test_a_probe_is_as_large_as_a_microbatch():
    toy = StreamToy()
    batch = toy.stream_feed(World()).largest()
    assert batch.lengths_B.tolist() == [7, 7]
    assert toy.task().count(batch) == 12


def test_parts_of_a_batch_are_those_of_its_streams():
    toy = StreamToy()
    for update in toy.stream_feed(World()).starting_at(0, 3):
        batch = update.micros[0].batch
        assert isinstance(batch, StreamBatch)
        parts = [copied(batch.part(n, n + 1)) for n in range(2)]
        for name in FIELDS:
            if getattr(batch, name) is not None:
                assert np.array_equal(np.concatenate([part[name] for part in parts]), getattr(batch, name))
        break


def test_blocks_of_a_far_store_are_asked_for_before_they_are_needed(monkeypatch):
    toy, asked = StreamToy(), []
    feed = toy.stream_feed(World())
    monkeypatch.setattr(Reader, "is_far", property(lambda self: True))
    monkeypatch.setattr(RowReader, "expect", lambda self, rows: bool(asked.append(rows.tolist()) or True))
    updates = feed.starting_at(0, 0)
    next(updates)
    updates.close()
    assert set(asked[0]) <= set(feed.rows_of(0, 0))
    assert len(asked) >= 8

"""Blocks: written with their places, read back as views, and every damage noticed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.data.blocks import BlockRows, decode_block, encode_shard, shard_room
from treadle.data.manifest import Content
from treadle.errors import IntegrityError
from treadle.spec import TargetKind, TargetPer

TOKENS = Content(
    symbols=("a", "b"),
    channels=(),
    target=TargetKind.labels,
    target_per=TargetPer.sequence,
    labels=("x", "y"),
    value_names=(),
    missing=False,
    timed=False,
)
FRAMES = dataclasses.replace(
    TOKENS,
    symbols=(),
    channels=("u", "v", "w"),
    target=TargetKind.values,
    target_per=TargetPer.row,
    labels=(),
    value_names=("p",),
    timed=True,
)


def rows_of(content: Content, lengths: list[int], counts: list[int]) -> BlockRows:
    rng = np.random.default_rng(len(lengths))
    width, wide = len(content.channels) or 1, len(content.value_names) or 1
    frames, targets = sum(lengths), sum(counts)
    values = rng.normal(size=frames * width).astype(np.float32) if content.channels else rng.integers(0, 2, frames)
    given_targets = rng.normal(size=targets * wide) if content.value_names else rng.integers(0, 2, targets)
    return BlockRows(
        values=values.astype(np.float32 if content.channels else np.int32),
        value_offsets=np.cumsum([0, *lengths]) * width,
        targets=given_targets.astype(np.float32 if content.value_names else np.int32),
        target_offsets=np.cumsum([0, *counts]) * wide,
        gaps_N=rng.normal(size=frames).astype(np.float32) if content.timed else None,
        entities=pa.array([f"e{i}" for i in range(len(lengths))]),
    )


def same(a: BlockRows, b: BlockRows) -> bool:
    names = ("values", "value_offsets", "targets", "target_offsets")
    gaps = (a.gaps_N is None and b.gaps_N is None) or np.array_equal(a.gaps_N, b.gaps_N)
    return gaps and a.entities.equals(b.entities) and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)


@given(
    st.sampled_from([TOKENS, FRAMES]),
    st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_each_block_is_one_range_of_the_shard(content, shape):
    blocks = [rows_of(content, [n for n, _ in rows], [u for _, u in rows]) for rows in shape]
    data, found = encode_shard(blocks, content)
    assert isinstance(data, bytes)
    for rows, block in zip(blocks, found, strict=True):
        read = decode_block(data[block.offset : block.offset + block.size], block, content)
        assert same(read, rows)
        assert block.rows == rows.num_rows
        assert block.longest == max(np.diff(rows.value_offsets)) // (len(content.channels) or 1)
    with pa.ipc.open_file(pa.py_buffer(data)) as stock:  # and a file like any other
        assert [stock.get_batch(i).num_rows for i in range(stock.num_record_batches)] == [b.rows for b in found]


@pytest.mark.parametrize("content", [TOKENS, FRAMES])
def test_a_shard_fits_into_the_room_that_is_foretold(content):
    for shape in ([1], [3, 3], [1] * 50):
        blocks = [rows_of(content, [2] * rows, [1] * rows) for rows in shape]
        sizes = sum(
            b.values.nbytes
            + b.targets.nbytes
            + (0 if b.gaps_N is None else b.gaps_N.nbytes)
            + b.entities.buffers()[2].size
            for b in blocks
        )
        expected, found = encode_shard(blocks, content)
        room = np.zeros(shard_room(sum(shape), sizes, len(shape)), np.uint8)
        data, again = encode_shard(blocks, content, room)
        assert bytes(data) == expected
        assert again == found
        assert np.shares_memory(np.frombuffer(data, np.uint8), room)
        with pytest.raises(ValueError, match="larger than its room"):
            encode_shard(blocks, content, room[: len(expected) // 2])


def test_what_is_read_is_a_view():
    data, found = encode_shard([rows_of(FRAMES, [3, 4], [1, 1])], FRAMES)
    raw = np.frombuffer(data, np.uint8)[found[0].offset :][: found[0].size]
    read = decode_block(raw, found[0], FRAMES)
    assert np.shares_memory(read.values, raw)


def test_every_flipped_bit_is_noticed_and_named():
    data, found = encode_shard([rows_of(TOKENS, [3, 4], [1, 2])], TOKENS)
    block = dataclasses.replace(found[0], key="data/x/shards/s.arrow")
    raw = data[block.offset : block.offset + block.size]
    for place in range(0, len(raw), 7):
        changed = bytearray(raw)
        changed[place] ^= 1 << place % 8
        with pytest.raises(IntegrityError, match=rf"data/x/shards/s\.arrow, bytes {block.offset} to"):
            decode_block(changed, block, TOKENS)
    for short in (b"", raw[:-1], raw + b"\0"):
        with pytest.raises(IntegrityError, match="not what was written"):
            decode_block(short, block, TOKENS)


def test_sound_bytes_of_another_kind_are_noticed():
    from treadle.data.blocks import checksum

    data, found = encode_shard([rows_of(TOKENS, [3, 4], [1, 2])], TOKENS)
    raw = data[found[0].offset : found[0].offset + found[0].size]
    with pytest.raises(IntegrityError, match="got 2 rows, expected 3"):
        decode_block(raw, dataclasses.replace(found[0], rows=3), TOKENS)
    junk = b"\xff" * 100
    with pytest.raises(IntegrityError, match="not a block"):
        decode_block(junk, dataclasses.replace(found[0], size=100, checksum=checksum(junk)), TOKENS)

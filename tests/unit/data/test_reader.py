"""Rows by number, from any kind of store: what is read, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from reader_rig import Toy, assert_same, expected, toy

from treadle.data.load.batch import Form
from treadle.data.load.collate import collate_inputs
from treadle.data.load.fetch_blocks import Reading
from treadle.data.load.reader import RowReader
from treadle.errors import DataError, IntegrityError, NotFoundError
from treadle.spec import Missing, TargetPer
from treadle.store.local import LocalBlobs
from treadle.testing import MemoryBlobs

PATIENT = Reading(waits_s=(0.0, 0.0))


class Counting(MemoryBlobs):
    """Counts what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges: list[tuple[str, int, int | None]] = []
        self._counting = threading.Lock()

    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes:
        with self._counting:
            self.ranges.append((key, offset, size))
        return super().get(key, offset=offset, size=size)


@pytest.fixture(params=["near", "far"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> LocalBlobs | MemoryBlobs:
    return LocalBlobs(tmp_path / "store") if request.param == "near" else MemoryBlobs()


def read_all(blobs: LocalBlobs | MemoryBlobs, data: Toy) -> None:
    """Every row is what it should be."""
    rows = list(range(len(data.inputs)))
    with RowReader(blobs, data.manifest, reading=PATIENT) as reader:
        assert_same(reader.batch(np.array(rows)), expected(data, rows, Form.padded))


def test_every_store_gives_the_same_rows(blobs: LocalBlobs | MemoryBlobs) -> None:
    for options in ({}, {"channels": 0, "per": TargetPer.sequence}, {"missing": Missing.mean, "timed": True}):
        data = toy(**options)
        data.write(blobs)
        read_all(blobs, data)


def test_a_far_store_is_read_by_range_and_each_block_once() -> None:
    data, far = toy(), Counting()
    data.write(far)
    with RowReader(far, data.manifest) as reader:
        rng = np.random.default_rng(0)
        for _ in range(30):
            rows = rng.integers(0, 200, 15)
            assert_same(reader.batch(rows), expected(data, rows.tolist(), Form.padded))
    spans = sorted((key, offset, offset + (size or 0)) for key, offset, size in far.ranges)
    assert len({key for key, *_ in spans}) > 1
    covered = sum(stop - start for _, start, stop in spans)
    assert covered <= sum(block.size for block in data.manifest.header.blocks)  # so nothing was read twice
    assert all(size for _, _, size in far.ranges)


def test_blocks_come_in_order_and_rows_have_their_names(blobs: LocalBlobs | MemoryBlobs) -> None:
    data = toy(per=TargetPer.frame, timed=True)
    data.write(blobs)
    with RowReader(blobs, data.manifest) as reader:
        found = list(reader.blocks())
        assert [first for first, _ in found] == data.manifest.block_starts[:-1].tolist()
        for name in ("values", "targets", "gaps_N"):
            parts = {"values": data.inputs, "targets": data.targets, "gaps_N": data.gaps}[name]
            whole = np.concatenate([getattr(block, name) for _, block in found])
            np.testing.assert_array_equal(whole, np.concatenate([part.reshape(-1) for part in parts]))
        assert [reader.entity(row) for row in (0, 8, 9, 199)] == ["e0", "e8", "e9", "e199"]
        labels_BU, lengths_B = reader.labels(np.array([150, 3]))
        batch = reader.batch(np.array([150, 3]))
        np.testing.assert_array_equal(labels_BU, batch.labels_BU)
        np.testing.assert_array_equal(lengths_B, batch.label_lengths_B)


def test_rows_that_are_not_split_yet_can_be_read_as_stored(blobs: LocalBlobs | MemoryBlobs) -> None:
    data = toy(channels=0)
    data.write(blobs)
    header = dataclasses.replace(data.manifest.header, preprocessing=None)
    with RowReader(blobs, dataclasses.replace(data.manifest, header=header)) as reader:
        np.testing.assert_array_equal(reader.raw(np.array([7])).values, data.inputs[7][:, 0])
        assert sum(block.num_rows for _, block in reader.blocks()) == 200


# ---- damage ----


def put(blobs: LocalBlobs | MemoryBlobs, key: str, data: bytes) -> None:
    """Change an object as a disk would."""
    path = blobs.local_path(key)
    if path is None:
        blobs.put(key, data)
    else:
        path.write_bytes(data)


def test_no_flipped_byte_reaches_a_model(blobs: LocalBlobs | MemoryBlobs) -> None:
    """200 places, the first and last bytes of blocks among them.

    What lies outside of the blocks (schema and footer of the Arrow file) is read by nobody: rows are the same.
    """
    data = toy(60, per=TargetPer.sequence, timed=True)
    data.write(blobs)
    blocks, rng = data.manifest.header.blocks, np.random.default_rng(0)
    ends = [(b.key, place) for b in blocks for place in (b.offset, b.offset + b.size - 1)]
    keys = list(data.shards)
    others = [(key, int(rng.integers(len(data.shards[key])))) for key in rng.choice(keys, 200 - len(ends)).tolist()]
    num_outside = 0
    for key, place in [*ends, *others]:
        bad = bytearray(data.shards[key])
        bad[place] ^= 1 << int(rng.integers(8))
        put(blobs, key, bytes(bad))
        inside = any(b.key == key and b.offset <= place < b.offset + b.size for b in blocks)
        if inside:
            with pytest.raises(IntegrityError, match=rf"{key}, bytes \d+ to \d+: not what was written"):
                read_all(blobs, data)
        elif place < 8 and isinstance(blobs, LocalBlobs):
            with pytest.raises(IntegrityError, match=f"{key}: got another kind of file"):
                read_all(blobs, data)
        else:
            num_outside += 1
            read_all(blobs, data)
        put(blobs, key, data.shards[key])
    assert num_outside
    read_all(blobs, data)


def test_a_shard_that_was_cut_off_is_named(blobs: LocalBlobs | MemoryBlobs) -> None:
    data = toy(60)
    data.write(blobs)
    key = data.manifest.header.blocks[0].key
    end = max(block.offset + block.size for block in data.manifest.header.blocks if block.key == key)
    for size in (end - 1, end // 2, 8, 3, 0):
        put(blobs, key, data.shards[key][:size])
        with pytest.raises(IntegrityError, match=f"{key}: got "):
            read_all(blobs, data)
    put(blobs, key, data.shards[key][:end])  # without its footer, which nobody reads
    read_all(blobs, data)


def test_a_shard_that_is_gone_is_named(blobs: LocalBlobs | MemoryBlobs) -> None:
    data = toy()
    data.write(blobs)
    key = data.manifest.header.blocks[0].key
    blobs.delete(key)
    with pytest.raises((IntegrityError, NotFoundError), match=key):
        read_all(blobs, data)


def test_a_shard_that_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    data, near = toy(), LocalBlobs(tmp_path / "store")
    data.write(near)
    key = data.manifest.header.blocks[0].key
    path = near.local_path(key)
    with RowReader(near, data.manifest) as reader:
        path.rename(tmp_path / "moved")
        path.symlink_to(tmp_path / "moved")
        with pytest.raises(IntegrityError, match=f"{key}: .*symbolic links.*, expected a plain file"):
            reader.batch(np.array([0]))
        path.unlink()
        path.mkdir()
        with pytest.raises(IntegrityError, match=f"{key}: .*no plain file"):
            reader.batch(np.array([0]))
        path.rmdir()
        os.mkfifo(path)
        with pytest.raises(IntegrityError, match=f"{key}: .*no plain file"):
            reader.batch(np.array([0]))
        path.unlink()
        (tmp_path / "moved").rename(path)
        assert_same(reader.batch(np.array([0])), expected(data, [0], Form.padded))


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    data, near = toy(), LocalBlobs(tmp_path / "store")
    data.write(near)
    key = data.manifest.header.blocks[0].key
    for place in range(8):
        bad = bytearray(data.shards[key])
        bad[place] ^= 4
        put(near, key, bytes(bad))
        with pytest.raises(IntegrityError, match=f"{key}: got another kind of file"):
            read_all(near, data)


def test_another_file_of_the_same_size_is_refused(tmp_path: Path) -> None:
    data, near = toy(), LocalBlobs(tmp_path / "store")
    data.write(near)
    keys = list(data.shards)
    put(near, keys[0], (data.shards[keys[1]] * 2)[: len(data.shards[keys[0]])])
    with pytest.raises(IntegrityError, match=keys[0]):
        read_all(near, data)


# ---- resources ----


def test_shards_are_mapped_without_staying_open(tmp_path: Path) -> None:
    data, near = toy(blocks_per_shard=1), LocalBlobs(tmp_path / "store")
    data.write(near)
    assert len(data.shards) > 20
    before = len(list(Path("/proc/self/fd").iterdir()))
    with RowReader(near, data.manifest) as reader:
        reader.batch(np.arange(200))
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_no_more_is_held_than_allowed_and_rows_stay_right() -> None:
    data = toy(channels=0)
    far = data.write(MemoryBlobs())
    most = 3 * max(block.size for block in data.manifest.header.blocks)
    with RowReader(far, data.manifest, reading=Reading(held_bytes=most)) as reader:
        rng = np.random.default_rng(1)
        for _ in range(60):
            rows = rng.integers(0, 200, 3)
            assert_same(reader.batch(rows), expected(data, rows.tolist(), Form.padded))
            assert sum(data.manifest.header.blocks[n].size for n in reader._open.rows) <= most
        whole = list(range(200))  # more than may be held is held as long as one batch needs it
        assert_same(reader.batch(np.array(whole)), expected(data, whole, Form.padded))


@pytest.mark.parametrize("held", [1, 1 << 30])
def test_threads_may_share_a_reader(held: int) -> None:
    data = toy(channels=5, per=TargetPer.sequence)
    far = data.write(MemoryBlobs())
    with RowReader(far, data.manifest, reading=Reading(held_bytes=held)) as reader:

        def work(seed: int) -> bool:
            rng = np.random.default_rng(seed)
            for _ in range(40):
                rows = rng.integers(0, 200, 6)
                assert_same(reader.batch(rows), expected(data, rows.tolist(), Form.padded))
                row = int(rows[0])
                assert reader.entity(row) == f"e{row}"
                assert reader.raw(rows).entities.to_pylist() == [f"e{row}" for row in rows]
            return True

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))


# ---- rows of requests ----


@pytest.mark.parametrize("options", [{}, {"missing": Missing.indicator, "timed": True, "gap": True}])
def test_requests_are_collated_bit_for_bit_as_rows_are_read(options: dict) -> None:
    data = toy(channels=5, **options)
    rows = np.array([3, 150, 40])
    with RowReader(data.write(MemoryBlobs()), data.manifest) as reader:
        wanted = reader.batch(rows)
    inputs, lengths_B = collate_inputs(
        [data.inputs[row].reshape(-1) for row in rows], data.manifest.preprocessing, [data.gaps[row] for row in rows]
    )
    assert inputs.tobytes() == wanted.inputs.tobytes()
    np.testing.assert_array_equal(lengths_B, wanted.lengths_B)


def test_ids_of_requests_are_padded_with_zeros() -> None:
    rows = [[1, 2, 3], [2], [1, 1]]
    inputs, lengths_B = collate_inputs([np.array(row) for row in rows], toy(channels=0).manifest.preprocessing)
    assert inputs.dtype == np.int64
    assert inputs.tolist() == [[1, 2, 3], [2, 0, 0], [1, 1, 0]]
    assert lengths_B.tolist() == [3, 1, 2]


def test_a_model_that_reads_gaps_is_given_them() -> None:
    data = toy(timed=True, gap=True)
    with pytest.raises(DataError, match="gaps: got none"):
        collate_inputs([data.inputs[0].reshape(-1)], data.manifest.preprocessing)

"""Batches from any kind of store, with any cache, by any number of threads."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.data import Draft, Frames, Manifest, Preprocessing, Row, RowReader, Tokens, ahead, build_dataset
from treadle.data.loader import collate_inputs
from treadle.errors import IntegrityError, NotFoundError
from treadle.spec import DataSpec
from treadle.store.local import LocalBlobs
from treadle.testing import MemoryBlobs

WORDS = ["".join(letters) for letters in itertools.product("abcd", repeat=4)]


def words_draft():
    rows = [
        Row(entity=w, inputs=list(w * (1 + i % 4)), target=list(w.upper()[: 1 + i % 3])) for i, w in enumerate(WORDS)
    ]
    return Draft(rows=rows, inputs=Tokens(), labels=tuple("ABCD"), licence="none")


def frames_draft():
    rng = np.random.default_rng(0)
    rows = [
        Row(entity=str(i), inputs=rng.normal(5, 3, (1 + i % 9, 3)), target=["p" if i % 2 else "q"]) for i in range(120)
    ]
    return Draft(rows=rows, inputs=Frames(channels=("a", "b", "c")), labels=("p", "q"), licence="none")


class Counting(MemoryBlobs):
    """Counts what is read."""

    def __init__(self):
        super().__init__()
        self.ranges = []

    def get(self, key, *, offset=0, size=None):
        self.ranges.append((key, offset, size))
        return super().get(key, offset=offset, size=size)


@pytest.fixture
def small_blocks(monkeypatch):
    """Data sets of many blocks and shards."""
    monkeypatch.setattr("treadle.data.build.BLOCK_BYTES", 400)
    monkeypatch.setattr("treadle.data.build.SHARD_BYTES", 3000)


class Hesitant(OrderedDict):
    """A cache that lets others run between finding and using."""

    def get(self, key, default=None):
        found = super().get(key, default)
        time.sleep(0.0002)
        return found


def same(first, second):
    return all(
        np.array_equal(getattr(first, field.name), getattr(second, field.name)) for field in dataclasses.fields(first)
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("draft", [words_draft, frames_draft])
def test_a_store_without_a_folder_gives_the_same_batches(tmp_path, draft):
    local, far = LocalBlobs(tmp_path / "store"), Counting()
    digests = {build_dataset(draft(), DataSpec(name="toy"), blobs, recipe="r")[0] for blobs in (local, far)}
    (digest,) = digests
    manifest = Manifest.from_bytes(local.get(f"data/toy/manifests/{digest}.arrow"), where="m", digest=digest)
    num_rows, num_blocks = len(manifest.columns["length"]), len(manifest.header.blocks)
    assert num_blocks > 5
    assert len({block.key for block in manifest.header.blocks}) > 1
    near, away = RowReader(local, manifest), RowReader(far, manifest)
    far.ranges.clear()
    rng = np.random.default_rng(2)
    for _ in range(20):
        rows = rng.choice(num_rows, size=rng.integers(1, 20), replace=False)
        assert same(near.batch(rows), away.batch(rows))
    shards = {block.key for block in manifest.header.blocks}
    assert len(far.ranges) == len(set(far.ranges)) <= num_blocks + len(shards)  # each block once, each schema once
    assert all(size is not None for _, _, size in far.ranges)  # by range, never whole


@pytest.mark.usefixtures("small_blocks")
def test_a_small_cache_forgets_the_oldest_and_gives_the_same(tmp_path):
    far = Counting()
    _, manifest = build_dataset(words_draft(), DataSpec(name="toy"), far, recipe="r")
    whole, small = RowReader(far, manifest), RowReader(far, manifest, cache_blocks=2)
    block = manifest.columns["block"]
    of_block = {number: np.flatnonzero(block == number) for number in range(4)}

    def reads(number):
        before = len(far.ranges)
        batch = small.batch(of_block[number])
        count = len(far.ranges) - before
        assert same(batch, whole.batch(of_block[number]))
        return count

    whole.batch(np.arange(len(block)))
    reads(0)
    assert [reads(n) for n in (0, 1, 0, 2, 0, 1, 0, 3)] == [0, 1, 0, 1, 0, 1, 0, 1]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.usefixtures("small_blocks")
def test_threads_may_share_a_reader():
    far = MemoryBlobs()
    _, manifest = build_dataset(words_draft(), DataSpec(name="toy"), far, recipe="r")
    whole, shared = RowReader(far, manifest), RowReader(far, manifest, cache_blocks=2)
    shared._blocks = Hesitant()
    names = [whole.entity(row) for row in range(len(manifest.columns["length"]))]
    firsts = [int(np.flatnonzero(manifest.columns["block"] == number)[0]) for number in range(3)]

    def work(seed):
        for row in np.random.default_rng(seed).choice(firsts, 100).tolist():
            assert shared.entity(row) == names[row]
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.usefixtures("small_blocks")
def test_any_flipped_byte_of_a_block_is_found_on_a_far_store():
    far = MemoryBlobs()
    _, manifest = build_dataset(words_draft(), DataSpec(name="toy"), far, recipe="r")
    rng = np.random.default_rng(0)
    for number in rng.choice(len(manifest.header.blocks), 4, replace=False):
        block = manifest.header.blocks[number]
        good = far.get(block.key)
        rows = np.flatnonzero(manifest.columns["block"] == number)
        for place in rng.integers(block.offset, block.offset + block.size, 10):
            bad = bytearray(good)
            bad[place] ^= 1 << int(rng.integers(8))
            far.put(block.key, bytes(bad))
            with pytest.raises(IntegrityError, match=rf"{block.key}: block {number} is not what was written"):
                RowReader(far, manifest).batch(rows)
        far.put(block.key, good[: block.offset + block.size - 1])
        with pytest.raises(IntegrityError):
            RowReader(far, manifest).batch(rows)
        far.put(block.key, good)
        RowReader(far, manifest).batch(rows)


def test_a_shard_that_is_gone_is_named():
    far = MemoryBlobs()
    _, manifest = build_dataset(words_draft(), DataSpec(name="toy"), far, recipe="r")
    key = manifest.header.blocks[0].key
    far.delete(key)
    with pytest.raises(NotFoundError, match=key):
        RowReader(far, manifest).batch(np.arange(3))


def test_a_local_shard_that_is_gone_is_named(tmp_path):
    local = LocalBlobs(tmp_path)
    _, manifest = build_dataset(words_draft(), DataSpec(name="toy"), local, recipe="r")
    key = manifest.header.blocks[0].key
    local.delete(key)
    with pytest.raises(IntegrityError, match=f"{key}: .*No such file"):
        RowReader(local, manifest).batch(np.arange(3))


FRAMES = Preprocessing(symbols=(), channels=("a", "b"), mean=(1.0, -2.0), deviation=(2.0, 0.5), labels=("x",))
TOKENS = Preprocessing(symbols=("?", "a", "b"), channels=(), mean=(), deviation=(), labels=("x",))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_frames_are_scaled_and_padding_is_zero(lengths):
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(n, 2)).astype(np.float32) for n in lengths]
    inputs, found = collate_inputs([row.reshape(-1) for row in rows], FRAMES)
    assert found.tolist() == lengths
    assert inputs.shape == (len(rows), max(lengths), 2)
    assert inputs.dtype == np.float32
    for i, row in enumerate(rows):
        assert np.allclose(inputs[i, : len(row)], (row - [1.0, -2.0]) / [2.0, 0.5], atol=1e-6)
        assert not inputs[i, len(row) :].any()


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=8))
def test_tokens_are_whole_and_padding_is_zero(rows):
    inputs, lengths = collate_inputs([np.array(row, np.int32) for row in rows], TOKENS)
    assert inputs.dtype == np.int64
    assert [inputs[i, :n].tolist() for i, n in enumerate(lengths)] == rows
    assert all(not inputs[i, n:].any() for i, n in enumerate(lengths))


def loaders():
    return [t for t in threading.enumerate() if t.name == "treadle-loader"]


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_no_thread_stays_however_many_items_are_taken(taken):
    items = ahead(lambda: iter(range(5)))
    assert list(itertools.islice(items, taken)) == list(range(taken))
    items.close()
    assert not loaders()


def test_it_is_at_most_so_many_items_ahead():
    made = []

    def counted():
        for i in range(100):
            made.append(i)
            yield i

    items = ahead(counted, depth=2)
    assert [next(items) for _ in range(10)] == list(range(10))
    deadline = threading.Event()
    deadline.wait(0.05)
    assert len(made) <= 10 + 2 + 1
    assert list(items) == list(range(10, 100))
    assert not loaders()

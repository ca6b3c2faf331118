"""Reading a store that is far away: many requests at a time, tries, and a cache that is not trusted."""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from reader_rig import Toy, assert_same, expected, toy

from treadle.data.blocks import checksum
from treadle.data.load.batch import Form
from treadle.data.load.block_cache import BlockCache
from treadle.data.load.fetch_blocks import FarBlocks, Reading
from treadle.data.load.reader import RowReader
from treadle.errors import IntegrityError, TransientError
from treadle.testing import MemoryBlobs

ROOM = 1 << 30
QUICK = Reading(waits_s=(0.0, 0.0, 0.0))


class Slow:
    """Any store, with a delay for each request, that counts how many are under way."""

    def __init__(self, inner: MemoryBlobs, delay_s: float = 0.0, failures: int = 0) -> None:
        self.inner, self.delay_s, self.failures = inner, delay_s, failures
        self.num_requests = self.under_way = self.most = 0
        self.sizes: list[int] = []
        self._lock = threading.Lock()

    def local_path(self, key: str) -> Path | None:
        return None

    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes:
        with self._lock:
            self.num_requests += 1
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            failed = self.num_requests <= self.failures
            self.sizes.append(size or 0)
        try:
            time.sleep(self.delay_s)
            if failed:
                raise TransientError(f"{key}: got no answer")
            return self.inner.get(key, offset=offset, size=size)
        finally:
            with self._lock:
                self.under_way -= 1


@pytest.fixture
def data() -> Toy:
    return toy()


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    return BlockCache(tmp_path / "cache" / "blocks", ROOM)


def read_all(store: object, data: Toy, cache: BlockCache | None, reading: Reading = QUICK) -> None:
    rows = np.random.default_rng(3).permutation(len(data.inputs))
    with RowReader(store, data.manifest, cache=cache, reading=reading) as reader:
        for part in np.array_split(rows, 10):
            assert_same(reader.batch(part), expected(data, part.tolist(), Form.padded))


def files(cache: BlockCache) -> set[str]:
    return {path.name for path in cache._folder.iterdir()}


def test_the_second_epoch_makes_no_request(data: Toy, cache: BlockCache) -> None:
    far = Slow(data.write(MemoryBlobs()))
    read_all(far, data, cache)
    assert far.num_requests
    assert files(cache) == {block.checksum for block in data.manifest.header.blocks}
    assert cache._folder.stat().st_mode & 0o777 == 0o700
    first, far.num_requests = far.num_requests, 0
    read_all(far, data, cache)
    read_all(far, data, BlockCache(cache._folder, ROOM))  # of another process
    assert far.num_requests == 0
    read_all(far, data, None)
    assert far.num_requests > 0 < first


def test_sixteen_requests_are_under_way(data: Toy, cache: BlockCache) -> None:
    far = Slow(data.write(MemoryBlobs()), delay_s=0.1)
    reading = Reading(max_request_bytes=1)
    with RowReader(far, data.manifest, cache=cache, reading=reading) as reader:
        started = time.monotonic()
        assert reader.expect(np.arange(0, 120)) is True  # 14 blocks: room for more
        assert reader.expect(np.arange(0, 200)) is True  # 23
        reader.batch(np.arange(200))
        took = time.monotonic() - started
        assert reader.expect(np.arange(200)) is True
    assert far.most == 16
    assert far.num_requests == len(data.manifest.header.blocks) == 23
    assert took < 0.1 * 23 / 2  # not one after the other


def fetching() -> set[threading.Thread]:
    """Threads that read ahead, those of readers that other tests have left open included."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("treadle-fetch")}


def test_enough_is_enough(data: Toy) -> None:
    others = fetching()
    far = Slow(data.write(MemoryBlobs()), delay_s=0.2)
    source = FarBlocks(far, data.manifest.header.blocks, None, Reading(max_request_bytes=1, window=10))
    assert source.expect(range(9)) is True
    assert source.expect(range(10)) is False
    assert source.expect(range(10)) is False
    source.close()
    assert far.num_requests == 10
    assert fetching() <= others


def settled(source: FarBlocks) -> None:
    while not all(coming.future.done() for coming in source._coming.values()):
        time.sleep(0.001)


def test_what_nobody_takes_is_not_kept_for_ever(data: Toy) -> None:
    far = Slow(data.write(MemoryBlobs()))
    source = FarBlocks(far, data.manifest.header.blocks, None, Reading(max_request_bytes=1, window=1))
    for n in range(23):
        source.expect([n])
        settled(source)
        assert len(source._coming) <= 8
    assert source.expect([22]) is False
    assert checksum(source.raw([0])[0]) == data.manifest.header.blocks[0].checksum
    for n in range(8, 20):  # blocks 1 to 7 are passed over
        source.raw([n])
    source.expect([20])
    source.expect([21])
    assert set(source._coming) <= {20, 21}
    source.close()


@pytest.mark.parametrize("num_asked", [3, 23])
def test_more_may_come_than_is_kept(data: Toy, num_asked: int) -> None:
    far = Slow(data.write(MemoryBlobs()))
    blocks = data.manifest.header.blocks
    source = FarBlocks(far, blocks, None, Reading(max_request_bytes=1, window=1))
    source.expect(range(23))
    settled(source)
    found = source.raw(range(num_asked))
    assert [checksum(raw) for raw in found] == [block.checksum for block in blocks[:num_asked]]
    assert far.num_requests == 23
    source.close()


def test_a_full_disk_costs_no_second_request(data: Toy, cache: BlockCache, monkeypatch: pytest.MonkeyPatch) -> None:
    far = Slow(data.write(MemoryBlobs()))
    monkeypatch.setattr(cache, "_folder", Path("/dev/full"))  # no file can be made there
    source = FarBlocks(far, data.manifest.header.blocks, cache, Reading(max_request_bytes=1))
    source.expect(range(10))
    settled(source)
    source.raw(range(10))
    assert far.num_requests == 10
    source.close()


def test_a_file_damaged_again_and_again_is_fetched_each_time(data: Toy, cache: BlockCache) -> None:
    far = Slow(data.write(MemoryBlobs()))
    block = data.manifest.header.blocks[0]
    path = cache._folder / block.checksum
    with RowReader(far, data.manifest, cache=cache, reading=Reading(held_bytes=1)) as reader:
        for _ in range(3):
            assert_same(reader.batch(np.arange(3)), expected(data, [0, 1, 2], Form.padded))
            reader.batch(np.arange(90, 100))  # the first block is let go
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 2] ^= 1
            path.unlink()  # another file: the one that is mapped stays as it is
            path.write_bytes(raw)


def test_a_cache_that_holds_everything_keeps_its_room(tmp_path: Path) -> None:
    empty = BlockCache.of_share(tmp_path, 0.5)
    for n in range(20):
        assert empty.put(f"{n:032x}", bytes(1 << 20))
    again = BlockCache.of_share(tmp_path, 0.5)
    free = shutil.disk_usage(tmp_path).free
    assert abs(again._max_bytes - 0.5 * (free + (20 << 20))) < 4 << 20


def test_neighbours_share_a_request(data: Toy) -> None:
    far = Slow(data.write(MemoryBlobs()))
    blocks = data.manifest.header.blocks
    source = FarBlocks(far, blocks, None, Reading(max_request_bytes=blocks[4].size + blocks[5].size))
    # Blocks 0 to 3 are one shard, 4 to 7 the next.
    found = source.raw([5, 4, 0, 2, 3])
    assert [checksum(raw) for raw in found] == [blocks[n].checksum for n in (5, 4, 0, 2, 3)]
    assert sorted(far.sizes) == sorted(
        [blocks[0].size, blocks[2].size + blocks[3].size, blocks[4].size + blocks[5].size]
    )
    source.close()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "link", "gone"])
def test_a_damaged_cache_file_is_fetched_anew(data: Toy, cache: BlockCache, damage: str, tmp_path: Path) -> None:
    far = Slow(data.write(MemoryBlobs()))
    read_all(far, data, cache)
    rng = np.random.default_rng(0)
    for number in rng.choice(len(data.manifest.header.blocks), 5, replace=False):
        block = data.manifest.header.blocks[number]
        path = cache._folder / block.checksum
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        path.unlink()  # readers of before keep what they have
        if damage == "link":
            (tmp_path / "elsewhere").write_bytes(good)
            path.symlink_to(tmp_path / "elsewhere")
        elif damage != "gone":
            path.write_bytes({"flip": bytes(bad), "cut": good[:-1], "empty": b""}[damage])
        far.num_requests = 0
        read_all(far, data, cache)
        assert far.num_requests == 1
        assert path.read_bytes() == good
        assert not path.is_symlink()


def test_what_the_store_holds_damaged_is_asked_for_twice_and_never_kept(data: Toy, cache: BlockCache) -> None:
    inner = data.write(MemoryBlobs())
    block = data.manifest.header.blocks[6]
    bad = bytearray(data.shards[block.key])
    bad[block.offset + 100] ^= 1
    inner.put(block.key, bytes(bad))
    far = Slow(inner)
    with RowReader(far, data.manifest, cache=cache, reading=QUICK) as reader:
        for _ in range(2):
            with pytest.raises(IntegrityError, match=f"{block.key}, bytes {block.offset}"):
                reader.batch(np.array([6 * 9]))
        inner.put(block.key, data.shards[block.key])
        assert_same(reader.batch(np.array([6 * 9])), expected(data, [6 * 9], Form.padded))
    assert far.num_requests == 2 + 2 + 1
    assert files(cache) == {block.checksum}


def test_a_request_is_tried_again_while_that_may_help(data: Toy, cache: BlockCache) -> None:
    far = Slow(data.write(MemoryBlobs()), failures=3)
    with RowReader(far, data.manifest, cache=cache, reading=QUICK) as reader:
        assert_same(reader.batch(np.array([5])), expected(data, [5], Form.padded))
    assert far.num_requests == 4
    far = Slow(data.write(MemoryBlobs()), failures=4)
    with RowReader(far, data.manifest, reading=QUICK) as reader:
        with pytest.raises(TransientError, match="got no answer"):
            reader.batch(np.array([5]))
        assert_same(reader.batch(np.array([5])), expected(data, [5], Form.padded))  # asked anew, not remembered


def test_what_fails_ahead_of_time_is_asked_for_again_when_it_is_needed(data: Toy, cache: BlockCache) -> None:
    far = Slow(data.write(MemoryBlobs()), failures=4)
    with RowReader(far, data.manifest, cache=cache, reading=QUICK) as reader:
        reader.expect(np.array([5]))
        while far.num_requests < 4 or reader._open.source._coming:
            time.sleep(0.001)
        assert_same(reader.batch(np.array([5])), expected(data, [5], Form.padded))


def test_closing_does_not_wait_for_tries(data: Toy) -> None:
    others = fetching()
    far = Slow(data.write(MemoryBlobs()), failures=100)
    reader = RowReader(far, data.manifest, reading=Reading(waits_s=(60.0,)))
    reader.expect(np.arange(200))
    time.sleep(0.05)
    started = time.monotonic()
    reader.close()
    assert time.monotonic() - started < 10
    assert fetching() <= others


# ---- room ----


def some(number: int, size: int = 1000) -> tuple[str, bytes]:
    data = number.to_bytes(4, "big") * (size // 4)
    return checksum(data), data


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "c", 20_000)
    for i in range(15):
        cache.put(*some(i))
        os.utime(tmp_path / "c" / some(i)[0], ns=(i, i))
    assert len(files(cache)) == 15
    assert bytes(memoryview(cache.get(some(3)[0]))) == some(3)[1]  # used now
    for i in range(15, 23):
        cache.put(*some(i))
        assert sum(path.stat().st_size for path in (tmp_path / "c").iterdir()) <= 20_000
    left = files(cache)
    assert {some(i)[0] for i in (3, 14, 21, 22)} <= left
    assert not {some(i)[0] for i in (0, 1, 2, 4)} & left


def test_a_block_in_use_outlives_its_file(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "c", 5_000)
    cache.put(*some(1))
    held = cache.get(some(1)[0])
    for i in range(2, 30):
        cache.put(*some(i))
    assert cache.get(some(1)[0]) is None
    assert bytes(memoryview(held)) == some(1)[1]


def test_data_larger_than_the_cache_is_still_read(data: Toy, tmp_path: Path) -> None:
    far = Slow(data.write(MemoryBlobs()))
    size = sum(block.size for block in data.manifest.header.blocks)
    cache = BlockCache(tmp_path / "c", size // 3)
    for _ in range(2):
        read_all(far, data, cache, Reading(held_bytes=size // 4))
    assert sum(path.stat().st_size for path in (tmp_path / "c").iterdir()) <= size // 3


def test_what_a_dead_writer_left_goes_too(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "c", 3_000)
    (tmp_path / "c" / ".writing-dead").write_bytes(b"x" * 2000)
    os.utime(tmp_path / "c" / ".writing-dead", ns=(1, 1))
    for i in range(5):
        cache.put(*some(i))
    assert not (tmp_path / "c" / ".writing-dead").exists()


def test_a_folder_that_takes_nothing_is_done_without(data: Toy, cache: BlockCache) -> None:
    far = Slow(data.write(MemoryBlobs()))
    cache._folder.rmdir()
    read_all(far, data, cache)
    assert not cache._folder.exists()


def test_processes_may_share_a_folder(tmp_path: Path) -> None:
    caches = [BlockCache(tmp_path / "c", 30_000) for _ in range(4)]

    def work(cache: BlockCache) -> None:
        rng = np.random.default_rng(0)
        for i in rng.integers(0, 60, 150).tolist():
            found = cache.get(some(i)[0])
            if found is None:
                cache.put(*some(i))
            else:
                assert bytes(memoryview(found)) == some(i)[1]

    threads = [threading.Thread(target=work, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not [name for name in files(caches[0]) if name.startswith(".")]


# ---- a real server ----


@pytest.mark.s3
def test_a_real_server_is_read_many_at_a_time_and_once(s3_server, data: Toy, cache: BlockCache) -> None:
    from treadle.store.s3 import S3Blobs

    blobs = data.write(S3Blobs(s3_server.bucket, f"test/{uuid.uuid4().hex}", s3_server.options()))
    far = Slow(blobs, delay_s=0.2)
    reading = Reading(max_request_bytes=1)
    with RowReader(far, data.manifest, cache=cache, reading=reading) as reader:
        reader.expect(np.arange(200))
        rows = np.random.default_rng(0).permutation(200)
        for part in np.array_split(rows, 8):
            assert_same(reader.batch(part), expected(data, part.tolist(), Form.padded))
        assert far.most == 16
        assert far.num_requests == len(data.manifest.header.blocks)
        for part in np.array_split(rows, 8):
            reader.batch(part)
    far.num_requests = 0
    read_all(far, data, cache)
    assert far.num_requests == 0

"""Memory that is used again."""

from __future__ import annotations

import numpy as np

from treadle.data.load.buffers import Buffers, aligned


def test_what_came_back_is_lent_again() -> None:
    buffers = Buffers()
    lease = buffers.lease()
    first = lease.array((10, 100), np.float32)
    assert first.shape == (10, 100)
    assert first.flags.writeable
    assert first.flags.c_contiguous
    address = first.ctypes.data
    other = lease.array((1000,), np.float32)
    assert not np.shares_memory(first, other)
    lease.release()
    again = buffers.lease()
    assert again.array((7, 99), np.int64).ctypes.data not in {address, other.ctypes.data}
    assert buffers.num_allocated == 3  # 5,544 bytes need more than the 4 KB that came back
    again.release()
    third = buffers.lease()
    assert third.array((1000,), np.float32).ctypes.data in {address, other.ctypes.data}
    assert buffers.num_allocated == 3


def test_poison_shows_who_still_reads() -> None:
    buffers = Buffers(poison=True)
    lease = buffers.lease()
    array = lease.array((50, 3), np.float32)
    array.fill(1)
    ids = lease.array((20,), np.int64)
    ids.fill(1)
    lease.release()
    assert np.isnan(array).all()
    assert (abs(ids) > 1 << 40).all()


def test_a_device_is_waited_for_before_its_memory_is_lent_again() -> None:
    buffers, waited = Buffers(), []
    first, second = buffers.lease(), buffers.lease()
    early, late = first.array((100,), np.float32), second.array((100,), np.float32)
    first.release(lambda: waited.append("first"))
    second.release(lambda: waited.append("second"))
    assert not waited
    lease = buffers.lease()
    # The one that came back first is the one that is likely read by now.
    assert lease.array((100,), np.float32).ctypes.data == early.ctypes.data
    assert waited == ["first"]
    assert lease.array((100,), np.float32).ctypes.data == late.ctypes.data
    assert waited == ["first", "second"]


def test_fresh_memory_begins_at_a_cache_line() -> None:
    for size in (1, 63, 4096, 5000):
        assert aligned(size).ctypes.data % 64 == 0
        assert len(aligned(size)) == size


def test_the_caller_says_where_memory_comes_from() -> None:
    sizes = []

    def allocate(size: int) -> np.ndarray:
        sizes.append(size)
        return np.zeros(size, np.uint8)

    lease = Buffers(allocate).lease()
    assert not lease.array((3000, 2), np.float32).any()
    assert sizes == [32768]

"""Memory that is used again: fresh pages cost more than the copy into them.

A batch of 1 MB that is allocated anew takes 256 page faults, about twice the time of filling it.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["Buffers", "Lease", "aligned"]

Bytes = NDArray[np.uint8]
_LINE = 64


def aligned(num_bytes: int) -> Bytes:
    """Fresh memory that begins at a cache line: a tenth faster to fill."""
    whole = np.empty(num_bytes + _LINE, np.uint8)
    start = -whole.ctypes.data % _LINE
    return whole[start : start + num_bytes]


class Buffers:
    """Memory by powers of two, lent until its user says that it is done with it. Threads may share it.

    Args:
        allocate: gives so many fresh bytes, such as page-locked ones where batches go to a GPU.
        poison: fill what comes back with NaN, so that a test sees who still reads it.
    """

    def __init__(self, allocate: Callable[[int], Bytes] = aligned, *, poison: bool = False) -> None:
        self._allocate = allocate
        self._poison = poison
        # The operations of a deque are safe between threads, and a lock would cost as much as all else here.
        self._free: dict[int, deque[tuple[Bytes, Callable[[], Any] | None]]] = defaultdict(deque)
        self.num_allocated = 0

    def lease(self) -> Lease:
        """A new, empty loan."""
        return Lease(self)

    def take(self, num_bytes: int) -> Bytes:
        """At least so many bytes."""
        size = 1 << max(12, (num_bytes - 1).bit_length())
        free = self._free[size]
        try:
            # The last that came back are likely still in a cache; but of a device's, the first are done with.
            data, wait = free.pop() if free[-1][1] is None else free.popleft()
        except IndexError:
            self.num_allocated += 1
            return self._allocate(size)
        if wait is not None:
            wait()
        return data

    def give_back(self, data: Sequence[Bytes], wait: Callable[[], Any] | None) -> None:
        """Lend these again; `wait` returns when a device has read them."""
        for each in data:
            if self._poison:
                if wait is not None:
                    wait()
                each.view(np.float32).fill(np.nan)
            self._free[len(each)].append((each, wait))


class Lease:
    """Arrays that are given back together."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._taken: list[Bytes] = []

    def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array with any content, until `release`."""
        data = self._buffers.take(math.prod(shape) * np.dtype(dtype).itemsize)
        self._taken.append(data)
        return np.ndarray(shape, dtype, data)

    def release(self, wait: Callable[[], Any] | None = None) -> None:
        """Nobody reads the arrays any more, or nobody will when `wait` returns."""
        taken, self._taken = self._taken, []
        self._buffers.give_back(taken, wait)

"""Arrays whose memory a thread uses again: fresh pages cost the kernel as much time as copying into them."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["Reused"]

_SLACK = 9 / 8


class Reused(threading.local):
    """Arrays by name, each thread its own; gone with the thread."""

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array of any content; it is this thread's until `name` is asked for again."""
        kind = np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            self._buffers.pop(name, None)  # before the new one is there
            buffer = self._buffers[name] = np.empty(int(size * _SLACK), np.uint8)
        return buffer[:size].view(kind).reshape(shape)

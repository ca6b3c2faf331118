"""Blocks of shards that lie in a folder: mapped into memory, not read."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from treadle.data.manifest import REBUILD, Block
from treadle.errors import IntegrityError

__all__ = ["MAGIC", "BlockSource", "NearBlocks", "map_file"]

MAGIC = b"ARROW1\0\0"


class BlockSource(Protocol):
    """Where the bytes of blocks come from. Threads may share it."""

    @property
    def max_bytes(self) -> int | None:
        """How many bytes may be held open at a time; None: any number."""
        ...

    def raw(self, numbers: Sequence[int]) -> list[Any]:
        """The bytes of these blocks, not checked, in memory that does not move while someone holds them."""
        ...

    def damaged(self, number: int) -> bool:
        """What `raw` gave is not what was written; gives whether another try may help."""
        ...

    def expect(self, numbers: Iterable[int]) -> bool:
        """Begin to read these blocks; False where enough is under way."""
        ...

    def close(self) -> None: ...


class NearBlocks:
    """Blocks of a store in a folder. Each shard is mapped once, and no file stays open.

    Args:
        path_of: where the file of a shard lies.
        blocks: of the manifest.
    """

    max_bytes: int | None = None

    def __init__(self, path_of: dict[str, Path], blocks: Sequence[Block]) -> None:
        self._path_of = path_of
        self._blocks = blocks
        self._maps: dict[str, pa.Buffer] = {}
        self._sizes: dict[str, int] = {}
        for block in blocks:
            self._sizes[block.key] = max(self._sizes.get(block.key, 0), block.offset + block.size)
        self._lock = threading.Lock()

    def raw(self, numbers: Sequence[int]) -> list[Any]:
        """The bytes of these blocks.

        Raises:
            IntegrityError: the shard is gone, is no plain file, is cut off, or is something else than a shard.
        """
        with self._lock:
            return [self._raw(self._blocks[number]) for number in numbers]

    def damaged(self, number: int) -> bool:
        del number
        return False

    def expect(self, numbers: Iterable[int]) -> bool:
        del numbers
        return False

    def close(self) -> None:
        self._maps.clear()

    def _raw(self, block: Block) -> Any:
        if block.key not in self._maps:
            self._maps[block.key] = self._mapped(block.key)
        return self._maps[block.key].slice(block.offset, block.size)

    def _mapped(self, key: str) -> pa.Buffer:
        try:
            whole = map_file(self._path_of[key])
        except OSError as error:
            raise IntegrityError(f"{key}: {error}, expected a plain file", hint=REBUILD) from None
        if whole.size < self._sizes[key]:
            raise IntegrityError(f"{key}: got {whole.size} bytes, expected {self._sizes[key]} or more", hint=REBUILD)
        if whole.slice(0, len(MAGIC)).to_pybytes() != MAGIC:
            raise IntegrityError(f"{key}: got another kind of file, expected a shard", hint=REBUILD)
        return whole


def map_file(path: Path) -> pa.Buffer:
    """A file in memory. It is not kept open: a process may have fewer open files than a data set has shards.

    Raises:
        OSError: it is not there, not readable, a symbolic link, or no plain file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{path} is no plain file")
        if os.fstat(handle).st_size == 0:
            return pa.py_buffer(b"")
        # By its handle, not by its name: that may be another file by now.
        with pa.memory_map(f"/dev/fd/{handle}") as mapped:
            return mapped.read_buffer()
    finally:
        os.close(handle)

"""Blocks kept in a folder of this machine, under the checksum of their bytes. Several processes may share it.

What lies there is taken for nothing but bytes: a block is checked when it is first used, whoever wrote it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treadle.data.load.near import map_file

__all__ = ["BlockCache"]

_PART = 16  # a folder is looked through again after so much of its room was written
_KEPT = 0.9  # of the room, when something has to go: not at every block


class BlockCache:
    """At most `max_bytes` of blocks, the least recently used ones go first.

    Args:
        folder: made if need be, for this user alone.
        max_bytes: of all processes that use the folder, give or take a sixteenth for each.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._written = max_bytes  # look through the folder at the first write
        self._lock = threading.Lock()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @classmethod
    def of_share(cls, folder: Path, share: float) -> BlockCache:
        """A cache in a folder that may take `share` of what would be free without it.

        Of what is free with it, a cache that holds all of a data set would give up half of it at the next run.

        Raises:
            OSError: the folder cannot be made or looked at.
        """
        cache = cls(folder, 0)
        held = sum(size for _, _, size in cache._files())
        return cls(folder, int(share * (shutil.disk_usage(folder).free + held)))

    def has(self, checksum: str) -> bool:
        return (self._folder / checksum).is_file()

    def get(self, checksum: str) -> Any | None:
        """The block in memory, not checked; None where it is not kept."""
        path = self._folder / checksum
        try:
            found = map_file(path)
            os.utime(path)  # used now
        except OSError:
            return None
        return found

    def put(self, checksum: str, data: bytes) -> bool:
        """Keep a block whose bytes have this checksum. A full disk is no reason to stop: gives False then."""
        try:
            with self._new_file() as path:
                path.write_bytes(data)
                path.replace(self._folder / checksum)
            self._make_room(len(data))
        except OSError:
            return False
        return True

    def drop(self, checksum: str) -> None:
        """It is damaged."""
        (self._folder / checksum).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _new_file(self) -> Iterator[Path]:
        handle, name = tempfile.mkstemp(dir=self._folder, prefix=".writing-")
        os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        with self._lock:
            self._written += num_bytes
            if self._written * _PART < self._max_bytes:
                return
            self._written = 0
            files = sorted(self._files(), key=lambda file: file[1])
            total = sum(size for _, _, size in files)
            if total <= self._max_bytes * (1 - 1 / _PART):
                return
            for path, _, size in files:
                if total <= self._max_bytes * _KEPT * (1 - 1 / _PART):
                    return
                path.unlink(missing_ok=True)
                total -= size

    def _files(self) -> Iterator[tuple[Path, int, int]]:
        """(path, time of last use, size) of what is kept, and of what a process that died was writing."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process made room
                    status = entry.stat(follow_symlinks=False)
                    yield Path(entry.path), status.st_mtime_ns, status.st_size

"""Functions for children that are traced, killed and lied to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_twice(say: Callable[[Any], None], folder: str) -> None:
    for name in ("one", "two"):
        handle = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(handle, name.encode())
        os.fsync(handle)
        os.close(handle)
        say(name)


def keep_carelessly(say: Callable[[Any], None], root: str, *flushes: str) -> None:
    """A value replaced by rename; `flushes` says what is flushed before it is called safe."""
    folder = Path(root)
    folder.mkdir()
    if "above" in flushes:
        _flush(folder.parent)
    for value in ("old" * 10, "new" * 10):
        with (folder / "tmp").open("w") as file:
            file.write(value)
            file.flush()
            if "bytes" in flushes:
                os.fsync(file.fileno())
        (folder / "tmp").rename(folder / "value")
        if "name" in flushes:
            _flush(folder)
        say(value)


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(handle)
    os.close(handle)


def change_names(say: Callable[[Any], None], root: str) -> None:
    """Calls that the model of a disk knows."""
    a, b = Path(root, "a"), Path(root, "b")
    a.mkdir()
    (b / "c").mkdir(parents=True)
    (b / "c" / "file").write_bytes(b"x" * 10)
    (a / "same").hardlink_to(b / "c" / "file")
    (b / "c" / "file").rename(b / "moved")
    gone = Path(root, "gone")
    gone.mkdir()
    gone.rmdir()
    with (a / "grown").open("wb") as file:
        file.write(b"0123456789")
        file.flush()
        file.truncate(4)
    journal = os.open(f"{root}/journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(journal, b"one\n")
    os.write(journal, b"two\n")
    os.close(journal)
    holes = os.open(f"{root}/holes", os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(holes, b"abcdef")
    os.pwrite(holes, b"XY", 2)
    os.close(holes)
    inside = os.open(a, os.O_RDONLY | os.O_DIRECTORY)
    os.unlink("same", dir_fd=inside)
    os.close(inside)


def refuse(say: Callable[[Any], None]) -> None:
    raise ValueError("no")

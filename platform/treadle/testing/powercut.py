"""What a disk may hold after the power went, worked out from the system calls of a process.

SIGKILL does not find a missing fsync: the page cache outlives the process. Here the calls that a process made are
applied one by one to a model in which only fsync makes bytes and names durable; at any point the model can be written
out as a folder, with all, some or none of what was not yet flushed.
"""

from __future__ import annotations

import enum
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treadle.errors import InternalError
from treadle.testing.syscalls import Call

__all__ = ["Disk", "Lost", "said_in"]

_IGNORED = frozenset({"flock", "utimensat", "chmod", "fchmod", "fchmodat"})
_SAID = b'{"said": '


class Lost(enum.Enum):
    """What is lost of all that was not flushed; POSIX allows every one of these.

    everything: names and bytes.
    bytes: names stay, and lead to what was flushed of their files: nothing, of new ones.
    names: bytes stay, where a flushed name leads to them.
    some: by chance, in each folder all changes after one of them, of each file what follows some byte.
    """

    everything = "everything"
    bytes = "bytes"
    names = "names"
    some = "some"


@dataclass(eq=False)
class _File:
    data: bytearray = field(default_factory=bytearray)
    flushed: bytes = b""


@dataclass(eq=False)
class _Folder:
    entries: dict[str, _File | _Folder] = field(default_factory=dict)
    flushed: dict[str, _File | _Folder] = field(default_factory=dict)
    pending: list[tuple[str, _File | _Folder | None]] = field(default_factory=list)

    def set(self, name: str, node: _File | _Folder | None) -> None:
        if node is None:
            self.entries.pop(name, None)
        else:
            self.entries[name] = node
        self.pending.append((name, node))

    def flush(self) -> None:
        self.flushed = dict(self.entries)
        self.pending.clear()

    def first(self, count: int) -> dict[str, _File | _Folder]:
        """The entries, had only `count` of the pending changes reached the disk."""
        found = dict(self.flushed)
        for name, node in self.pending[:count]:
            if node is None:
                found.pop(name, None)
            else:
                found[name] = node
        return found


@dataclass(eq=False)
class _Handle:
    node: _File | _Folder
    at: int = 0
    appends: bool = False


class Disk:
    """A folder on a disk, as the calls of one thread change it.

    Args:
        root: absolute path of the folder in those calls. What it holds now counts as flushed; it may be missing, and
            then so is its name until the folder above it is flushed.
    """

    def __init__(self, root: Path) -> None:
        self._above = root.parent.parts
        self._name = root.name
        self._top = _Folder()
        if root.is_dir():
            self._top.entries[root.name] = _read(root)
            self._top.flush()
        self._handles: dict[int, _Handle] = {}

    def apply(self, call: Call) -> None:
        """Do what `call` did.

        Raises:
            InternalError: it changed the folder in a way that is not understood here.
        """
        if call.result < 0 or call.name in _IGNORED:
            return
        handler = getattr(self, f"_do_{call.name}", None)
        if handler is None:
            raise InternalError(f"{call}: got a call that the model of a disk does not know, expected another")
        handler(call)

    def write(self, folder: Path, lost: Lost, *, seed: int = 0) -> Path:
        """Write into `folder` what is there after a power cut now; the path of the root in it, which may be missing."""
        folder.mkdir(parents=True)
        _Cut(lost, random.Random(seed)).write(self._top, folder)  # noqa: S311
        return folder / self._name

    # Paths

    def _place(self, path: bytes, base: str = "AT_FDCWD") -> tuple[_Folder, str] | None:
        """The folder and the name in it, or None outside the root."""
        text = path.decode()
        if not text.startswith("/"):
            handle = self._handles.get(int(base)) if base.isdecimal() else None
            if handle is None or not isinstance(handle.node, _Folder):
                return None
            start, parts = handle.node, Path(text).parts
        else:
            parts = Path(text).parts
            if parts[: len(self._above)] != self._above or parts[len(self._above) :][:1] != (self._name,):
                return None
            start, parts = self._top, parts[len(self._above) :]
        for part in parts[:-1]:
            found = start.entries.get(part)
            if not isinstance(found, _Folder):
                return None
            start = found
        return start, parts[-1]

    def _places(self, call: Call, *bases: int) -> list[tuple[_Folder, str] | None]:
        plain = call.plain()
        strings = call.strings()
        names = [plain[i] for i in bases] if bases else ["AT_FDCWD"] * len(strings)
        return [self._place(text, name) for text, name in zip(strings, names, strict=True)]

    # Calls

    def _do_openat(self, call: Call) -> None:
        base, _, flags, *_ = call.plain()
        path = call.strings()[0]
        if Path(path.decode()).parts == self._above:
            self._handles[call.result] = _Handle(node=self._top)
            return
        place = self._place(path, base)
        if place is None:
            self._handles.pop(call.result, None)
            return
        folder, name = place
        node = folder.entries.get(name)
        words = set(flags.split("|"))
        if node is None:
            node = _File()
            folder.set(name, node)
        if isinstance(node, _File) and "O_TRUNC" in words:
            node.data.clear()
        self._handles[call.result] = _Handle(node=node, appends="O_APPEND" in words)

    def _do_close(self, call: Call) -> None:
        self._handles.pop(int(call.plain()[0]), None)

    def _file(self, call: Call) -> tuple[_Handle, _File] | None:
        handle = self._handles.get(int(call.plain()[0]))
        return None if handle is None or not isinstance(handle.node, _File) else (handle, handle.node)

    def _do_write(self, call: Call) -> None:
        if found := self._file(call):
            handle, node = found
            at = len(node.data) if handle.appends else handle.at
            data = call.strings()[0][: call.result]
            node.data[at : at + len(data)] = data
            handle.at = at + len(data)

    def _do_pwrite64(self, call: Call) -> None:
        if found := self._file(call):
            data, at = call.strings()[0][: call.result], int(call.plain()[-1])
            found[1].data[at : at + len(data)] = data

    def _do_ftruncate(self, call: Call) -> None:
        if found := self._file(call):
            size = int(call.plain()[1])
            found[1].data[:] = found[1].data[:size].ljust(size, b"\0")

    def _do_fsync(self, call: Call) -> None:
        handle = self._handles.get(int(call.plain()[0]))
        if handle is None:
            return
        if isinstance(handle.node, _File):
            handle.node.flushed = bytes(handle.node.data)
        else:
            handle.node.flush()

    _do_fdatasync = _do_fsync

    def _do_mkdir(self, call: Call) -> None:
        for place in self._places(call):
            if place:
                place[0].set(place[1], _Folder())

    def _do_unlink(self, call: Call) -> None:
        for place in self._places(call):
            if place:
                place[0].set(place[1], None)

    _do_rmdir = _do_unlink

    def _do_unlinkat(self, call: Call) -> None:
        for place in self._places(call, 0):
            if place:
                place[0].set(place[1], None)

    def _do_rename(self, call: Call) -> None:
        self._move(*self._places(call), keeps=False)

    def _do_renameat(self, call: Call) -> None:
        self._move(*self._places(call, 0, 2), keeps=False)

    _do_renameat2 = _do_renameat

    def _do_link(self, call: Call) -> None:
        self._move(*self._places(call), keeps=True)

    def _do_linkat(self, call: Call) -> None:
        self._move(*self._places(call, 0, 2), keeps=True)

    def _move(self, old: tuple[_Folder, str] | None, new: tuple[_Folder, str] | None, *, keeps: bool) -> None:
        if old is None and new is None:
            return
        if old is None or new is None:
            raise InternalError("a name moved into or out of the folder, expected both names in it")
        node = old[0].entries[old[1]]
        new[0].set(new[1], node)
        if not keeps:
            old[0].set(old[1], None)


class _Cut:
    """One power cut."""

    def __init__(self, lost: Lost, rng: random.Random) -> None:
        self._lost = lost
        self._rng = rng

    def write(self, folder: _Folder, target: Path) -> None:
        for name, node in self._entries(folder).items():
            if isinstance(node, _Folder):
                (target / name).mkdir()
                self.write(node, target / name)
            else:
                (target / name).write_bytes(self._bytes(node))

    def _entries(self, folder: _Folder) -> dict[str, _File | _Folder]:
        if self._lost is Lost.bytes:
            return folder.entries
        return folder.first(self._rng.randint(0, len(folder.pending)) if self._lost is Lost.some else 0)

    def _bytes(self, file: _File) -> bytes:
        if self._lost is Lost.names:
            return bytes(file.data)
        if self._lost is not Lost.some or file.flushed == file.data:
            return file.flushed
        kept = len(file.flushed) if file.data.startswith(file.flushed) else 0  # what is appended does not undo a flush
        cut = bytes(file.data[: self._rng.randint(kept, len(file.data))])
        return self._rng.choice([file.flushed, bytes(file.data), cut])


def said_in(calls: Iterable[Call]) -> list[Any]:
    """What a child of `Victims` had said by the end of these calls."""
    written = [call.strings()[0] for call in calls if call.name == "write" and call.result > 0]
    return [json.loads(data)["said"] for data in written if data.startswith(_SAID)]


def _read(path: Path) -> _Folder:
    folder = _Folder()
    for child in path.iterdir():
        data = b"" if child.is_dir() else child.read_bytes()
        folder.entries[child.name] = _read(child) if child.is_dir() else _File(bytearray(data), data)
    folder.flush()
    return folder

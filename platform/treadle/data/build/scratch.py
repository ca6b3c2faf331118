"""Where a build keeps what it has sorted so far: `data/<name>/building/<build>/` in the store, gone when it is done.

In a local folder such files are written straight into place, without waiting for the disk: a build that lost its
machine finds out by checksums what is whole. Elsewhere they are objects like any others. Nothing below `building/` is
ever read as a data set.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import io
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from treadle import wire
from treadle.errors import ConfigError, ConflictError, DataError, IntegrityError, NotFoundError, TransientError

__all__ = ["Scratch", "Shelf", "claim"]

KEPT = dt.timedelta(days=1)
"""What a build that died left is kept so long, for its rerun."""
_REQUESTS = 16
"""To a far store at a time: with a delay of 25 ms, one after the other brings an eighth of the rate."""
_NUM_TRIES = 20
"""To lock a folder that others delete meanwhile."""
_ONCE = "once-"
_CLAIM = "build.json"

Place = tuple[int, memoryview]
"""Where in a file, and the buffer for what is there."""


class Shelf(Protocol):
    """The part of a blob store that building needs."""

    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes: ...
    def put(self, key: str, data: bytes) -> Any: ...
    def create(self, key: str, data: bytes) -> Any: ...
    def head(self, key: str) -> Any: ...
    def delete(self, key: str) -> None: ...
    def list(self, prefix: str) -> Iterator[Any]: ...
    def children(self, prefix: str) -> list[str]: ...
    def local_path(self, key: str) -> Path | None: ...


class Scratch:
    """Files of one build, by name.

    Args:
        shelf: the store. folder: key of the build's folder.
    """

    def __init__(self, shelf: Shelf, folder: str) -> None:
        self._shelf, self._folder = shelf, folder
        self._local = shelf.local_path(folder)

    def write(self, name: str, pieces: Iterable[Any]) -> None:
        """Write a file of consecutive buffers, each read before the next is asked for; named when it is whole."""
        if self._local is None:
            whole = io.BytesIO()
            for piece in pieces:
                whole.write(piece)
            self._shelf.put(self._key(name), whole.getvalue())
            return
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")  # a name that no key can have
        try:
            with _told(path), temporary.open("xb", buffering=0) as file:
                for piece in pieces:
                    _write_whole(file.fileno(), memoryview(piece).cast("B"))
                temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            NotFoundError: there is none.
        """
        return self._shelf.get(self._key(name))

    def read_into(self, name: str, places: Iterable[Place]) -> None:
        """Fill buffers from places of a file.

        Raises:
            IntegrityError: it is gone, or shorter.
        """
        self.read_many([(name, places)])

    def read_many(self, files: Iterable[tuple[str, Iterable[Place]]]) -> None:
        """The same of several files; from a far store, many places at a time.

        Raises:
            IntegrityError: one is gone, or shorter.
        """
        if self._local is not None:
            for name, places in files:
                self._read_near(name, places)
            return
        with ThreadPoolExecutor(_REQUESTS) as pool:
            asked = [(name, place) for name, places in files for place in places if len(place[1])]
            list(pool.map(lambda each: self._read_far(*each), asked))

    def _read_near(self, name: str, places: Iterable[Place]) -> None:
        try:
            handle = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _gone(self._key(name), error.strerror) from None
        try:
            for offset, buffer in places:
                done = 0
                while done < len(buffer) and (count := os.preadv(handle, [buffer[done:]], offset + done)):
                    done += count
                self._check(name, done, len(buffer))
        finally:
            os.close(handle)

    def _read_far(self, name: str, place: Place) -> None:
        offset, buffer = place
        try:
            data = self._shelf.get(self._key(name), offset=offset, size=len(buffer))
        except NotFoundError:
            raise _gone(self._key(name), "no such file") from None
        self._check(name, len(data), len(buffer))
        buffer[:] = data

    def _check(self, name: str, seen: int, expected: int) -> None:
        if seen != expected:
            raise _gone(self._key(name), f"got {seen} bytes of {expected}")

    def _key(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _path(self, name: str) -> Path:
        assert self._local is not None
        return self._local / name


@contextlib.contextmanager
def claim(shelf: Shelf, name: str, build: str, *, once: bool) -> Iterator[str]:
    """The folder of a build, which is deleted when the block ends well.

    What dead builds of this data set left is deleted too: at once where nobody could go on with it (`once`), else after
    a day. In a local folder a lock tells the dead; elsewhere only the day does.

    Args:
        build: digest of all that decides what is built.
        once: the source can be read but once, so that a rerun starts anew.

    Raises:
        ConflictError: another process is building the same in this local folder.
    """
    parent = f"data/{name}/building"
    own = f"{_ONCE}{build[:16]}-{uuid.uuid4().hex[:8]}" if once else build[:32]
    folder = f"{parent}/{own}"
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(_locked(shelf, folder)):
            raise ConflictError(
                f"{folder}: another process is building the same rows", hint="wait for it, and prepare again"
            )
        _sweep(shelf, parent, own)
        shelf.put(f"{folder}/{_CLAIM}", wire.canonical({"started": dt.datetime.now(dt.UTC).isoformat()}))
        try:
            yield folder
        except (DataError, ConfigError, IntegrityError):  # a rerun fails alike, or reads something else
            _remove(shelf, folder)
            raise
        except BaseException:
            if once:
                _remove(shelf, folder)
            raise
        _remove(shelf, folder)


def _sweep(shelf: Shelf, parent: str, own: str) -> None:
    for other in shelf.children(parent):
        folder = f"{parent}/{other}"
        if other == own:
            continue
        with _locked(shelf, folder) as is_dead:
            is_local = shelf.local_path(folder) is not None
            if is_dead and ((is_local and other.startswith(_ONCE)) or _age(shelf, folder) > KEPT):
                _remove(shelf, folder)


def _age(shelf: Shelf, folder: str) -> dt.timedelta:
    try:
        claimed = wire.parse_json(shelf.get(f"{folder}/{_CLAIM}"), where=folder)
        return dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(claimed["started"])
    except (NotFoundError, IntegrityError, KeyError, TypeError, ValueError):  # what a live build has written first
        return KEPT * 2


def _remove(shelf: Shelf, folder: str) -> None:
    path = shelf.local_path(folder)
    if path is not None:
        # Another build may begin in this folder as soon as its lock is gone, and must not lose files to us.
        gone = path.with_name(f"{_ONCE}gone-{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):
            path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(OSError):  # others are building beside
            path.parent.rmdir()
        return
    for entry in list(shelf.list(f"{folder}/")):
        shelf.delete(entry.key)


@contextlib.contextmanager
def _locked(shelf: Shelf, folder: str) -> Iterator[bool]:
    """Whether nobody else holds a folder, which is ours in the block; beyond a local folder nobody can tell."""
    path = shelf.local_path(folder)
    if path is None:
        yield True
        return
    with contextlib.ExitStack() as held:
        try:
            is_ours = _lock(path, held)
        except OSError as error:
            raise ConfigError(f"{path}: got {error.strerror}, expected a folder to keep sorted rows in") from error
        yield is_ours


def _lock(path: Path, held: contextlib.ExitStack) -> bool:
    """Whether a folder could be locked; `held` gives it back."""
    lock = path / ".lock"
    for _ in range(_NUM_TRIES):
        # Its owner may delete it meanwhile: a lock on what has no name any more keeps nobody out.
        with contextlib.ExitStack() as opened, contextlib.suppress(FileNotFoundError):
            with contextlib.suppress(FileExistsError):  # raised too where what exists is deleted while it is looked at
                path.mkdir(parents=True)
            file = opened.enter_context(lock.open("ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                held.enter_context(opened.pop_all())
                return True
    return False


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TransientError(
            f"{path}: {error.strerror}, expected room for sorted rows", hint="free some space"
        ) from error


def _write_whole(handle: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(handle, data) :]


def _gone(key: str, why: str | None) -> IntegrityError:
    return IntegrityError(f"{key}: {why}, expected what this build wrote", hint="prepare again")

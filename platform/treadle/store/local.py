"""A folder as a place of storage: atomic, durable writes that several processes may race for.

Every write goes to a temporary file, is flushed, and then gets its name in one step; the folder
is flushed too, so that the name survives a power cut. Temporary files and locks live in the
hidden folder `.treadle` of the root, whose name no key can have: a writer that dies leaves nothing
that a listing shows, and what it left is swept by the next process that writes.

A version is inode, modification time and size. Hashing would read every shard for every listing,
and would also call A, after B, the same as the first A. The times are set by this module, under the
lock of the key and always later than the file replaced, because the kernel's own clock stands
still for milliseconds and inodes are used again at once. It needs a file system that keeps
nanoseconds (ext4, xfs, btrfs, tmpfs, overlayfs, APFS).

Large values go past the page cache where the system can (O_DIRECT). They are not read again soon, and the cache would
have to find memory for them: on a virtual machine, 600 MB of checkpoints took 1.7 s of processor time by way of the
cache and 0.15 s past it, beside a training that wants both processors (tests/bench/checkpoints.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import stat
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from treadle.errors import ConfigError, ConflictError, NotFoundError, TransientError
from treadle.store.blobs import Data, Entry, check_key, check_prefix, check_range, is_key

__all__ = ["LocalBlobs"]

_HIDDEN = ".treadle"
_NUM_LOCKS = 64  # keys share lock files, so that their number does not grow with the keys
_NUM_TRIES = 20
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux
_LARGE_BYTES = 1 << 20
_PIECE_BYTES = 1 << 20  # copied with the interpreter held: 0.1 ms
_PAGE = mmap.PAGESIZE
_REFUSED = {
    errno.EACCES: "check the owner and the mode of the folder",
    errno.EPERM: "use a file system with hard links and locks",
    errno.EROFS: "the file system is mounted read-only",
    errno.ENOTSUP: "use a file system with hard links and locks",
    errno.ENOLCK: "use a file system with hard links and locks",
    errno.EXDEV: "the whole store must lie on one file system",
    errno.ENOTDIR: "a file lies where a folder is needed; no key can be the folder of another key",
    errno.EISDIR: "a folder lies where a file is needed; no key can be the folder of another key",
    errno.ENAMETOOLONG: "take a shorter path for the store",
    errno.ELOOP: "a store holds no symbolic links",
}


@contextlib.contextmanager
def _translated(operation: str, place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        seen = f"{place}: {operation}: got {error.strerror or error}"
        if error.errno in _REFUSED:
            raise ConfigError(f"{seen}, expected a folder to keep files in", hint=_REFUSED[error.errno]) from error
        hint = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise TransientError(f"{seen}, expected the file system to answer", hint=hint) from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fill(file: BinaryIO, data: Data) -> None:
    """Write `data` to a file that was just opened."""
    if len(data) < _LARGE_BYTES or not _DIRECT:
        file.write(data)
        return
    view, handle = memoryview(data), file.fileno()
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    done = 0
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags | _DIRECT)
        done = _fill_directly(handle, view)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that knows no other way than the cache
            raise
        done = os.lseek(handle, 0, os.SEEK_CUR)
    finally:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags)
    file.seek(done)
    file.write(view[done:])


def _fill_directly(handle: int, view: memoryview) -> int:
    """Write whole pages from a page-aligned buffer; give how many bytes were taken."""
    done, aligned = 0, memoryview(mmap.mmap(-1, _PIECE_BYTES))
    while size := min(_PIECE_BYTES, (len(view) - done) // _PAGE * _PAGE):
        aligned[:size] = view[done : done + size]
        taken = os.write(handle, aligned[:size])
        done += taken
        if taken < size:  # what is left may no longer begin at a page
            break
    return done


def _version(status: os.stat_result) -> str:
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


def _status(path: Path) -> os.stat_result | None:
    """The status of a regular file, or None."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


class LocalBlobs:
    """The protocol `Blobs` in a folder; threads and processes may share it.

    Args:
        root: the folder; made by the first write.

    Raises:
        ConfigError: `root` exists and is no folder.
    """

    def __init__(self, root: Path) -> None:
        with _translated("open", str(root)):
            self._root = Path(os.path.realpath(root.expanduser()))
            if self._root.exists() and not self._root.is_dir():
                raise ConfigError(f"{self._root}: got a file, expected a folder or nothing there yet")
        self.uri = str(self._root)
        self._temporary = self._root / _HIDDEN / "tmp"
        self._locks = self._root / _HIDDEN / "locks"
        self._is_swept = False
        self._flushed: set[Path] = set()

    def __repr__(self) -> str:
        return f"LocalBlobs({self.uri!r})"

    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes:
        path = self._path(key)
        check_range(key, offset, size)
        with _translated("get", f"{self.uri}/{key}"):
            if _status(path) is None:
                raise NotFoundError(f"{self.uri}/{key}: got no such key, expected one that was written")
            try:
                with path.open("rb") as file:
                    file.seek(offset)
                    return file.read(-1 if size is None else size)
            except FileNotFoundError:
                raise NotFoundError(f"{self.uri}/{key}: got no such key, expected one that was written") from None

    def head(self, key: str) -> Entry | None:
        path = self._path(key)
        with _translated("head", f"{self.uri}/{key}"):
            status = _status(path)
        return None if status is None else Entry(key=key, size_bytes=status.st_size, version=_version(status))

    def put(self, key: str, data: Data) -> Entry:
        return self._write("put", key, lambda file: _fill(file, data))

    def holds(self, key: str, data: Data) -> bool:
        # The bytes were flushed, and an error of the disk was told then. Reading them back would compare this memory
        # with the page cache that it was copied to; every restore reads and checks all of them.
        entry = self.head(key)
        return entry is not None and entry.size_bytes == len(data)

    def create(self, key: str, data: bytes) -> Entry:
        return self._write("create", key, lambda file: file.write(data), create=True)

    def replace(self, key: str, data: bytes, *, version: str) -> Entry:
        return self._write("replace", key, lambda file: file.write(data), expected=version)

    def upload(self, key: str, path: Path) -> Entry:
        try:
            source = path.open("rb")
        except FileNotFoundError:
            raise NotFoundError(f"upload to {key}: got no file {path}, expected one") from None

        def copy(file: BinaryIO) -> None:
            source.seek(0)
            shutil.copyfileobj(source, file, 1 << 20)

        with source:
            return self._write("upload", key, copy)

    def list(self, prefix: str) -> Iterator[Entry]:
        check_prefix(prefix)
        folder = prefix.rpartition("/")[0]
        with _translated("list", f"{self.uri}/{prefix}"):
            found = [entry for entry in self._walk(folder) if entry.key.startswith(prefix)]
        yield from sorted(found, key=lambda entry: entry.key)

    def children(self, prefix: str) -> list[str]:
        check_prefix(prefix)
        with _translated("children", f"{self.uri}/{prefix}"):
            folder = prefix.removesuffix("/")
            return sorted(
                name
                for name, is_folder in self._scan(folder)
                # S3 has no empty folders, so here they do not count either.
                if not is_folder or any(True for _ in self._walk(_join(folder, name)))
            )

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _translated("delete", f"{self.uri}/{key}"):
            if _status(path) is None:
                return
            with self._locked(key):
                path.unlink(missing_ok=True)
                with contextlib.suppress(FileNotFoundError):  # a neighbour's delete took the empty folder along
                    _sync_folder(path.parent)
            folder = path.parent
            with contextlib.suppress(OSError):  # ends at the first folder that is not empty
                while folder != self._root:
                    folder.rmdir()
                    folder = folder.parent

    def local_path(self, key: str) -> Path:
        return self._path(key)

    def _path(self, key: str) -> Path:
        path = self._root / check_key(key)
        with _translated("open", f"{self.uri}/{key}"):
            real = Path(os.path.realpath(path))
        if real != path:
            raise ConfigError(
                f"{self.uri}/{key}: got a symbolic link to {real}, expected a plain file",
                hint="a store holds no symbolic links; to keep it on another disk, move the whole store there",
            )
        return path

    def _scan(self, folder: str) -> Iterator[tuple[str, bool]]:
        """(name, is it a folder) of what lies directly in `folder` and could be a key."""
        try:
            with os.scandir(self._root / folder) as found:
                for item in found:
                    is_folder = item.is_dir(follow_symlinks=False)
                    if is_key(_join(folder, item.name)) and (is_folder or item.is_file(follow_symlinks=False)):
                        yield item.name, is_folder
        except (FileNotFoundError, NotADirectoryError):
            return

    def _walk(self, folder: str) -> Iterator[Entry]:
        for name, is_folder in self._scan(folder):
            key = _join(folder, name)
            if is_folder:
                yield from self._walk(key)
            elif (status := _status(self._root / key)) is not None:
                yield Entry(key=key, size_bytes=status.st_size, version=_version(status))

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        self._make_folder(self._locks)
        name = f"{zlib.crc32(key.encode()) % _NUM_LOCKS:02d}"
        handle = os.open(self._locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            # flock belongs to the open file, so it also keeps threads of one process apart.
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder whose name outlives a power cut; one that is there may be of a process that died first."""
        if folder.is_dir() and (folder in self._flushed or not folder.is_relative_to(self._root)):
            return
        self._make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        try:
            _sync_folder(folder.parent)
        except PermissionError:
            if folder != self._root:  # what lies above the store may be others'
                raise
        self._flushed.add(folder)

    def _sweep(self) -> None:
        """Remove the temporary files of dead writers: a live one holds a lock on its own."""
        for left in self._temporary.iterdir():
            with contextlib.suppress(FileNotFoundError, BlockingIOError), left.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
        self._is_swept = True

    def _write(
        self,
        operation: str,
        key: str,
        fill: Callable[[BinaryIO], object],
        *,
        create: bool = False,
        expected: str | None = None,
    ) -> Entry:
        path = self._path(key)
        with _translated(operation, f"{self.uri}/{key}"):
            for trial in range(_NUM_TRIES):
                try:
                    return self._write_once(key, path, fill, create=create, expected=expected)
                except FileNotFoundError:
                    # Between mkdir and rename a delete may take the empty folder, or a sweep the file.
                    if trial == _NUM_TRIES - 1:
                        raise
            raise AssertionError("unreachable")

    def _write_once(
        self, key: str, path: Path, fill: Callable[[BinaryIO], object], *, create: bool, expected: str | None
    ) -> Entry:
        # Seen too early to decide, early enough to spare most losers the writing.
        self._check_conflict(key, _status(path), create=create, expected=expected)
        self._make_folder(self._temporary)
        if not self._is_swept:
            self._sweep()
        temporary = self._temporary / uuid.uuid4().hex
        try:
            with temporary.open("xb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                fill(file)
                file.flush()
                os.fsync(file.fileno())
                self._make_folder(path.parent)
                with self._locked(key):
                    before = _status(path)
                    self._check_conflict(key, before, create=create, expected=expected)
                    stamp_ns = max(time.time_ns(), 0 if before is None else before.st_mtime_ns + 1)
                    os.utime(file.fileno(), ns=(stamp_ns, stamp_ns))
                    if create:
                        os.link(temporary, path)  # fails if the name is taken, so exactly one writer wins
                    else:
                        temporary.rename(path)
                    status = os.fstat(file.fileno())
            _sync_folder(path.parent)
        except FileExistsError:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)) from None
            raise self._exists(key) from None
        finally:
            temporary.unlink(missing_ok=True)
        return Entry(key=key, size_bytes=status.st_size, version=_version(status))

    def _check_conflict(self, key: str, before: os.stat_result | None, *, create: bool, expected: str | None) -> None:
        if create and before is not None:
            raise self._exists(key)
        if expected is not None and (before is None or _version(before) != expected):
            seen = "no such key" if before is None else f"version {_version(before)}"
            raise ConflictError(f"{self.uri}/{key}: got {seen}, expected version {expected}")

    def _exists(self, key: str) -> ConflictError:
        return ConflictError(f"{self.uri}/{key}: got a key that exists, expected to create it")


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name

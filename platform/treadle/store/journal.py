"""Rows that are there when the process is not.

In a local folder a journal is one file; each row is one write to a descriptor opened for
appending, so a killed process loses none that `append` took. Object stores cannot append: there
a background thread writes immutable shards `<key>/<writer>-<seq>`, about one a second.

A row with NaN or an infinity in it has them spelled as strings and `"nonfinite": true` added.
Rows are kept in the order of their writer; a time in them is the caller's, and orders nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from treadle import wire
from treadle.errors import NotFoundError
from treadle.store.blobs import Blobs, check_key
from treadle.store.claims import create_once
from treadle.store.sealed import spell_nonfinite

__all__ = ["Journal", "JournalReader", "follow", "read_journal"]

_INTERVAL_S = 1.0
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 5.0
_CLOSE_TIMEOUT_S = 30.0


class Journal:
    """Appends rows under one key; safe to share between threads; a context manager.

    Args:
        blobs: the store.
        key: the file, or the folder of the shards.
        writer: names the shards; two writers of one key at a time have two names.
        interval_s: longest time that a row waits for its shard.
    """

    def __init__(self, blobs: Blobs, key: str, *, writer: str, interval_s: float = _INTERVAL_S) -> None:
        wire.check_name("journal writer", writer)
        path = blobs.local_path(check_key(key))
        self._sink = (
            _ShardSink(blobs, f"{key}/{writer}", interval_s) if path is None else _FileSink(path, key.count("/") + 2)
        )
        atexit.register(self.close)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; returns without waiting for a network, and never raises because of one.

        Raises:
            TypeError: something in the row is not JSON.
        """
        self._sink.append(_line(row))

    def flush(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> bool:
        """Whether every row appended so far is in the store, within `timeout_s`."""
        return self._sink.flush(timeout_s)

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> bool:
        """`flush`, and end; what is appended afterwards is an error."""
        atexit.unregister(self.close)
        return self._sink.close(timeout_s)

    @property
    def num_unsaved(self) -> int:
        """Rows appended that the store does not hold yet."""
        return self._sink.num_unsaved

    @property
    def last_error(self) -> str:
        """Why rows wait, or ""."""
        return self._sink.last_error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _FileSink:
    """Rows in a file; its name and those of the `depth` folders that lead to it are flushed with the first rows."""

    def __init__(self, path: Path, depth: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._unflushed = list(path.parents)[:depth]
        self._file: int | None = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []
        self.last_error = ""
        size = os.fstat(self._file).st_size
        # A line that a dead writer left unfinished must not swallow our first row.
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            self._waiting.append(b"\n")

    def append(self, line: bytes) -> None:
        with self._lock:
            if self._file is None:
                raise ValueError("append to a closed journal")
            self._waiting.append(line)
            self._write(self._file)

    def flush(self, timeout_s: float) -> bool:
        with self._lock:
            if self._file is None:
                return not self._waiting
            self._write(self._file)
            try:
                os.fsync(self._file)
                while self._unflushed:
                    _flush_names(self._unflushed[-1])
                    self._unflushed.pop()
            except OSError as error:
                self.last_error = str(error)
                return False
            return not self._waiting

    def close(self, timeout_s: float) -> bool:
        saved = self.flush(timeout_s)
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None
        return saved

    @property
    def num_unsaved(self) -> int:
        return len(self._waiting)

    def _write(self, file: int) -> None:
        """Write what waits: one row, unless the disk was full. A later row tries again."""
        while self._waiting:
            line = self._waiting[0]
            try:
                written = os.write(file, line)
            except OSError as error:
                self.last_error = str(error)
                return
            if written < len(line):
                self._waiting[0] = line[written:]
                continue
            self._waiting.pop(0)
        self.last_error = ""


def _flush_names(folder: Path) -> None:
    """Make the names in a folder outlive a power cut."""
    with contextlib.suppress(PermissionError):  # what lies above the store may be others'
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class _ShardSink:
    def __init__(self, blobs: Blobs, prefix: str, interval_s: float) -> None:
        self._blobs = blobs
        self._prefix = prefix
        self._interval_s = interval_s
        self._waiting: list[bytes] = []
        self._num_appended = 0
        self._num_saved = 0
        self._is_hurried = False
        self._is_closing = False
        self._changed = threading.Condition()
        self.last_error = ""
        self._thread = threading.Thread(target=self._upload_all, name=f"journal {prefix}", daemon=True)
        self._thread.start()

    def append(self, line: bytes) -> None:
        with self._changed:
            if self._is_closing:
                raise ValueError("append to a closed journal")
            self._waiting.append(line)
            self._num_appended += 1
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        with self._changed:
            wanted = self._num_appended
            self._is_hurried = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._num_saved >= wanted, timeout_s)

    def close(self, timeout_s: float) -> bool:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._num_saved >= self._num_appended, timeout_s)

    @property
    def num_unsaved(self) -> int:
        return self._num_appended - self._num_saved

    def _upload_all(self) -> None:
        seq = 0
        while lines := self._next_lines():
            data, wait_s = b"".join(lines), _FIRST_WAIT_S
            while True:
                try:
                    seq = self._upload(seq or self._last_seq() + 1, data)
                    break
                except Exception as error:  # the run must outlive any failure of the store
                    self.last_error = str(error)
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            with self._changed:
                self._num_saved += len(lines)
                self.last_error = ""
                self._changed.notify_all()

    def _next_lines(self) -> list[bytes]:
        """The rows of the next shard; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            self._changed.wait_for(lambda: self._is_hurried or self._is_closing, self._interval_s)
            self._is_hurried = False
            lines, self._waiting = self._waiting, []
            return lines

    def _upload(self, seq: int, data: bytes) -> int:
        """Write the shard under the first free number; the number after it."""
        while not create_once(self._blobs, f"{self._prefix}-{seq:06d}", data):
            seq += 1
        return seq + 1

    def _last_seq(self) -> int:
        folder, _, writer = self._prefix.rpartition("/")
        return max((seq for name, seq, _ in _shards(self._blobs, folder) if name == writer), default=0)


class JournalReader:
    """Reads a journal piece by piece."""

    def __init__(self, blobs: Blobs, key: str) -> None:
        self._blobs = blobs
        self._key = check_key(key)
        self._offset = 0
        self._seen: set[str] = set()

    def poll(self) -> list[dict[str, Any]]:
        """The rows that are new since the last call; a line still without its end is not yet a row."""
        found = _rows(self._new_bytes())
        for _, _, shard in _shards(self._blobs, self._key):
            if shard not in self._seen:
                found += _rows(self._blobs.get(shard))
                self._seen.add(shard)
        return found

    def _new_bytes(self) -> bytes:
        try:
            data = self._blobs.get(self._key, offset=self._offset)
        except NotFoundError:
            return b""
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole


def follow(blobs: Blobs, key: str) -> JournalReader:
    """A reader that starts at the first row and gives new ones at every `poll`."""
    return JournalReader(blobs, key)


def read_journal(blobs: Blobs, key: str) -> list[dict[str, Any]]:
    """Every row of a journal, file and shards alike; a torn line is left out."""
    try:
        found = _rows(blobs.get(check_key(key)))
    except NotFoundError:
        found = []
    for _, _, shard in _shards(blobs, key):
        found += _rows(blobs.get(shard))
    return found


def _shards(blobs: Blobs, key: str) -> list[tuple[str, int, str]]:
    """(writer, seq, key) of every shard, sorted."""
    parts = ((name.rpartition("-"), name) for name in blobs.children(key))
    return sorted((writer, int(seq), f"{key}/{name}") for (writer, _, seq), name in parts if seq.isdecimal())


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(dict(row), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except ValueError:
        spelled = spell_nonfinite(dict(row)) | {"nonfinite": True}
        text = json.dumps(spelled, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    # Half a surrogate pair (undecodable output of a program) becomes its JSON escape.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _rows(data: bytes) -> list[dict[str, Any]]:
    return list(_parsed(data))


def _parsed(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.split(b"\n"):
        try:
            row = json.loads(line) if line else None
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row

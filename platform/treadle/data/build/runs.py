"""Rows gathered in memory until there are enough of them for one sorted file on the scratch shelf.

The file holds all values, then all targets, all gaps and the text of all entities, each of all rows end to end in the
order of the data set: a zone of the data set then is one range of each.

Shape letters: R rows, N frames of all rows laid end to end, D channels, U targets of all rows so, K values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from treadle.data.build.reuse import Reused
from treadle.data.build.scratch import Scratch
from treadle.data.order import copy_rows, cut, row_order, starts_of

__all__ = ["OpenRun", "Run"]

_PIECE_BYTES = 4 << 20
_ROW_BYTES = 128
"""Of the facts of a row, about."""
_REUSED = Reused()


@dataclass(frozen=True, kw_only=True)
class Run:
    """A file of sorted rows.

    Args:
        name: on the scratch shelf. rows: how many.
        targets_at, gaps_at, text_at: where these begin; values begin at 0.
        size, checksum: of the file; xxh3_128, hexadecimal.
    """

    name: str
    rows: int
    targets_at: int
    gaps_at: int
    text_at: int
    size: int
    checksum: str

    def is_whole(self, scratch: Scratch) -> bool:
        """Whether the file is what was written."""
        hasher, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(self.size, _PIECE_BYTES)))
        for start in range(0, self.size, _PIECE_BYTES):
            piece = buffer[: min(_PIECE_BYTES, self.size - start)]
            scratch.read_into(self.name, [(start, piece)])
            hasher.update(piece)
        return hasher.hexdigest() == self.checksum


class OpenRun:
    """Rows that are not written yet; one at a time in a thread, which uses their memory again.

    Args:
        size: bytes of values that it will mostly hold.
    """

    def __init__(self, size: int) -> None:
        self._values, self._targets = _Gathered("values", size), _Gathered("targets", 0)
        self._gaps = _Gathered("gaps", 0)
        self._texts: list[pa.StringArray] = []
        self._columns: list[dict[str, NDArray[Any]]] = []
        self.rows = self._text_bytes = 0

    @property
    def size(self) -> int:
        """Bytes in memory, about."""
        fixed = self.rows * _ROW_BYTES
        return self._values.size + self._targets.size + self._gaps.size + self._text_bytes + fixed

    def add(
        self,
        arrays: tuple[NDArray[Any], NDArray[Any], NDArray[np.float32] | None],
        texts: pa.StringArray,
        columns: dict[str, NDArray[Any]],
    ) -> None:
        """Take rows: values [N, D], targets [U, K], gaps [N]; entities; and the columns of their facts."""
        values, targets, gaps = arrays
        self._values.append(values)
        self._targets.append(targets)
        if gaps is not None:
            self._gaps.append(gaps[:, None])
        self._texts.append(texts)
        self._text_bytes += texts.nbytes
        self._columns.append(columns)
        self.rows += len(texts)

    def write(self, scratch: Scratch, name: str) -> tuple[Run, dict[str, NDArray[Any]]]:
        """Write the rows, sorted, and forget them; also gives the columns of their facts in that order."""
        columns = {key: np.concatenate([part[key] for part in self._columns]) for key in self._columns[0]}
        order = row_order(columns)
        texts = pa.concat_arrays(self._texts).take(pa.array(order))
        offsets = np.frombuffer(texts.buffers()[1], np.int32)[: len(texts) + 1]
        sorted_columns = {key: column[order] for key, column in columns.items()}
        sorted_columns["text"] = np.diff(offsets).astype(np.uint32)
        starts, target_starts = starts_of(columns["length"]), starts_of(columns["targets"])
        sections = [
            self._values.sorted(starts, order),
            self._targets.sorted(target_starts, order),
            self._gaps.sorted(starts, order),
            iter([memoryview(texts.buffers()[2] or b"")[offsets[0] : offsets[-1]]]),
        ]
        starts_at = np.cumsum([0, self._values.size, self._targets.size, self._gaps.size]).tolist()
        hasher = xxhash.xxh3_128()
        scratch.write(name, _hashed(sections, hasher))
        run = Run(
            name=name,
            rows=len(order),
            targets_at=starts_at[1],
            gaps_at=starts_at[2],
            text_at=starts_at[3],
            size=starts_at[3] + int(offsets[-1] - offsets[0]),
            checksum=hasher.hexdigest(),
        )
        for gathered in (self._values, self._targets, self._gaps):
            gathered.clear()
        self._texts, self._columns, self.rows, self._text_bytes = [], [], 0, 0
        return run, sorted_columns


def _hashed(sections: list[Iterator[Any]], hasher: Any) -> Iterator[Any]:
    for section in sections:
        for piece in section:
            if len(piece):
                hasher.update(piece)
                yield piece


class _Gathered:
    """An array that grows at its end, [N, D]; cleared, it keeps its memory.

    Args:
        name: of its memory. size: bytes that it will mostly hold.
    """

    def __init__(self, name: str, size: int) -> None:
        self._name, self._least = name, size
        self._buffer = np.zeros((0, 0), np.float32)
        self._rows = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return self._rows * self._buffer.shape[1] * self._buffer.itemsize

    def append(self, more: NDArray[Any]) -> None:
        stop = self._rows + len(more)
        if stop > len(self._buffer) or self._buffer.dtype != more.dtype:
            self._grow(stop, more)
        self._buffer[self._rows : stop] = more
        self._rows = stop

    def clear(self) -> None:
        self._rows = 0

    def sorted(self, starts: NDArray[np.int64], order: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        """The bytes of the rows that begin at `starts`, in another order, in pieces; each is gone with the next."""
        if not self._rows:
            return
        filled = self._buffer[: self._rows]
        width = filled.shape[1] * filled.itemsize
        first_R, length_R = starts[:-1][order], np.diff(starts)[order]
        bounds = cut(length_R * width, _PIECE_BYTES)
        for start, stop in pairwise(bounds):
            shape = (int(length_R[start:stop].sum()), filled.shape[1])
            piece = _REUSED.array("piece", shape, filled.dtype)
            copy_rows(filled, first_R[start:stop], length_R[start:stop], piece)
            yield piece.reshape(-1).view(np.uint8)

    def _grow(self, rows: int, like: NDArray[Any]) -> None:
        width = like.shape[1] * like.itemsize
        filled = self._buffer[: self._rows]
        room = max(rows, self._least // width + 1, 2 * self._rows)
        kept = filled.copy() if self._rows else filled  # the same memory may be given again
        self._buffer = _REUSED.array(self._name, (room, like.shape[1]), like.dtype)
        if len(kept):
            self._buffer[: len(kept)] = kept

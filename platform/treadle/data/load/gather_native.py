"""From rows in many blocks to one buffer: gather.c, compiled on this machine when it is first needed.

Shape letters as in `gather`. Calls release the interpreter lock.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle import native
from treadle.data.load.gather import Column, Gather, Ints, Located, NumpyGather, Scaling, edges_of

__all__ = ["NativeGather", "best_gather", "gather_status"]

SOURCE = Path(__file__).with_name("gather.c")
_logger = logging.getLogger(__name__)


class NativeGather:
    """The protocol `Gather` in C; bit for bit what `NumpyGather` gives.

    Args:
        library: the loaded object.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._locate: Any = library.treadle_locate
        self._ids: Any = library.treadle_ids
        self._frames: Any = library.treadle_frames
        self._copy: Any = library.treadle_copy
        self._locate.restype = self._ids.restype = ctypes.c_int64
        self._frames.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64)
        self._frames.restype = self._copy.restype = None

    def locate(
        self,
        column: Column,
        rows_B: Ints,
        starts_B: Ints | None = None,
        stops_B: Ints | None = None,
        *,
        sizes: Sequence[int] = (),
    ) -> Located | None:
        sizes = sizes or (len(rows_B),)
        num_rows, num_parts = len(rows_B), len(sizes)
        notes = _notes_of(column, num_rows, num_parts)
        counts_B, labels_B = np.empty((2, num_rows), np.int64)
        weights_B = np.empty(num_rows, np.float32)
        words = _LOCATE.pack(
            _address(rows_B),
            num_rows,
            *notes.table,
            _address(starts_B),
            _address(stops_B),
            notes.address,
            _address(counts_B),
            _address(labels_B),
            _address(weights_B),
            notes.address_of_sums,
            num_parts,
        )
        place = self._locate(words, struct.pack(f"{num_parts}q", *sizes))
        if place >= num_rows:
            row = int(rows_B[place - num_rows])
            raise IndexError(f"rows: got row {row} of {column.num_rows}, or items that it does not have")
        if place >= 0:
            return None
        sums, edges = notes.sums[: 2 * num_parts].tolist(), edges_of(sizes)
        return Located(rows_B, counts_B, starts_B, edges, sums[::2], sums[1::2], labels_B, weights_B, notes.address)

    def frames(
        self,
        column: Column,
        found: Located,
        out: NDArray[np.float32],
        places: Sequence[int],
        steps: Sequence[int],
        scaling: Scaling,
    ) -> None:
        tiled, notes = _address(scaling.tiled), column.notes
        words = _FRAMES.pack(
            _address(found.rows_B),
            found.address,
            _address(found.counts_B),
            len(found.rows_B),
            *notes.scratch,
            column.width,
            scaling.width,
            tiled,
            tiled + scaling.tiled.strides[0],
            scaling.missing,
        )
        num_batches, begin = len(places), _address(out)
        batches = struct.pack(f"{3 * num_batches}q", *found.edges[1:], *[begin + 4 * place for place in places], *steps)
        self._frames(words, batches, num_batches)

    def ids(
        self, column: Column, found: Located, out: Ints, steps: int, lookup: Ints | None = None, fill: int = 0
    ) -> None:
        del column
        num_ids = 0 if lookup is None else len(lookup)
        place = self._ids(_IDS.pack(*_words(found, out, steps), fill, _address(lookup), num_ids))
        if place >= 0:
            raise IndexError(f"row {found.rows_B[place]} has an id beyond the {num_ids} that there are")

    def copy(self, column: Column, found: Located, out: NDArray[Any], steps: int, fill: float = 0.0) -> None:
        bits = int(np.array(fill, out.dtype).view(np.uint32))
        self._copy(_COPY.pack(*_words(found, out, steps), column.width, bits))


# The words of the structures in gather.c. Packing them takes an eighth of the time of an array of ctypes.
_LOCATE, _FRAMES, _IDS, _COPY = (struct.Struct(f"{num}q") for num in (13, 13, 8, 7))


class _Notes:
    """What C needs to know of a column, found out once.

    Attributes:
        table: words of `Locate`.
        room, parts: rows that `found_B` and `scratch_4B` can hold, and batches that `sums` can.
        address, scratch, address_of_sums: where they begin.
        sums: of each batch, the largest and the total of the counts last found.
    """

    def __init__(self, column: Column) -> None:
        self.table = (_address(column.entries_R), column.num_rows, 4 * column.width)
        self.room = self.parts = 0

    def resize(self, room: int, parts: int) -> None:
        """At least so many rows and batches."""
        self.room, self.parts = max(self.room, room), max(self.parts, parts)
        self.found_B = np.empty(self.room, np.int64)
        self.address = _address(self.found_B)
        self.scratch_4B = np.empty((4, self.room), np.int64)
        self.scratch = tuple(_address(part) for part in self.scratch_4B)
        self.sums = np.zeros(2 * self.parts, np.int64)
        self.address_of_sums = _address(self.sums)


def _notes_of(column: Column, num_rows: int, num_parts: int) -> _Notes:
    notes = column.notes
    if notes is None:
        notes = column.notes = _Notes(column)
    if notes.room < num_rows or notes.parts < num_parts:
        notes.resize(2 * num_rows, 2 * num_parts)
    return notes


def _words(found: Located, out: NDArray[Any], steps: int) -> tuple[int, ...]:
    """The arguments that all copies begin with."""
    assert out.flags.c_contiguous
    return found.address, _address(found.counts_B), len(found.rows_B), _address(out), steps


def _address(array: NDArray[Any] | None) -> int:
    """Where an array's numbers begin, 0 for None."""
    if array is None:
        return 0
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # pyright: ignore[reportArgumentType]  a quarter of the time that `.ctypes.data` takes
    except (TypeError, ValueError):  # it is read-only, or empty
        return array.ctypes.data


def best_gather() -> Gather:
    """The compiled one where it can be had, else NumPy's."""
    library = _found()[0]
    return NumpyGather() if library is None else NativeGather(library)


def gather_status() -> native.NativeStatus:
    """Whether gather.c is used, and why."""
    library, detail = _found()
    return native.NativeStatus(available=library is not None, detail=detail)


@functools.cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    kernel, detail = native.find(native.folders(), native.COMPILERS, SOURCE, SELF_CHECK, native.SERIAL)
    if kernel is None:
        _logger.info("rows are gathered by NumPy, three times slower: %s", detail)
        return None, detail
    return kernel.library, detail


# Every function, on rows that end anywhere in a group of frames, and whose last one reaches the end of the buffer.
SELF_CHECK = """
import ctypes, math, sys
gather = ctypes.CDLL(sys.argv[1])
gather.treadle_locate.restype = gather.treadle_ids.restype = ctypes.c_int64
nan, R, most = math.nan, 4, 19
lengths, begins = [1, 8, 11, most], [0, 1, 9, 20]
class Entry(ctypes.Structure):
    _fields_ = [("address", ctypes.c_int64), ("count", ctypes.c_uint32), ("weight", ctypes.c_float)]
    _fields_ += [("label", ctypes.c_int64)]
sums = (ctypes.c_int64 * 4)()
def words(*values):
    here = [v if isinstance(v, int) else ctypes.addressof(v) for v in values]
    return (ctypes.c_int64 * len(here))(*here)
def asked(width, rows, base):
    address, B = ctypes.addressof(base), len(rows)
    table = (Entry * R)(*((address + 4 * width * begins[r], lengths[r], r + 0.5, 7 - r) for r in range(R)))
    rows_B, found = (ctypes.c_int64 * B)(*rows), (ctypes.c_int64 * (3 * B))()
    counts, weights_B = ctypes.addressof(found) + 8 * B, (ctypes.c_float * B)()
    w = words(rows_B, B, table, R, 4 * width, 0, 0, found, counts, counts + 8 * B, weights_B, sums, 2)
    ends, here = [1, B], [lengths[r] for r in rows]
    assert gather.treadle_locate(w, words(1, B - 1)) == -1, "a row is missing"
    assert [*sums] == [here[0], here[0], max(here[1:], default=0), sum(here[1:])], "wrong places"
    assert found[2 * B:] == [7 - r for r in rows] and [*weights_B] == [r + 0.5 for r in rows], "wrong facts"
    return found, w
same = lambda a, b: a == b or (a != a and b != b)
for width in (1, 3, 8, 16, 32):
    flat = [nan if i % 7 == 3 else (i * 37 % 101) / 8 for i in range(width * sum(lengths))]
    data = (ctypes.c_float * len(flat))(*flat)
    mean, inverse = ((ctypes.c_float * (8 * width))(*[v] * 8 * width) for v in (0.5, 2.0))
    for rows in ([2, 0, 3], [1], [3, 3, 2]):
        found, w = asked(width, rows, data)
        here = (found, ctypes.addressof(found) + 8 * len(rows), len(rows))
        rows_B = (ctypes.c_int64 * len(rows))(*(r * 300 for r in rows))
        scratch = [(ctypes.c_int64 * len(rows))() for _ in range(4)]
        for steps in (0, most):
            for kind, reads in ((0, width), (1, width), (2, 2 * width), (2, 2 * width + 1)):
                size = (steps * len(rows) if steps else sums[1] + sums[3]) * reads
                out = (ctypes.c_float * (size + 1))(*[9.0] * (size + 1))
                second = ctypes.addressof(out) + 4 * reads * (steps or lengths[rows[0]])
                targets = words(1, len(rows), out, second, steps, steps)
                more = (*scratch, width, reads, mean, inverse, kind)
                gather.treadle_frames(words(rows_B, *here, *more), targets, ctypes.c_int64(2))
                assert out[size] == 9.0, "wrote too far"
                at = 0
                for r in rows:
                    for t in range(steps or lengths[r]):
                        for c in range(2 * width if kind == 2 else width):
                            x = flat[(begins[r] + t) * width + c % width] if t < lengths[r] else None
                            want = 0.0 if x is None else float(x == x) if c >= width else (x - 0.5) * 2
                            want = 0.0 if kind and want != want else want
                            assert same(out[at + c], want), "wrong frames"
                        at += reads
            size = (steps * len(rows) if steps else sums[1] + sums[3]) * width
            out = (ctypes.c_float * (size + 1))(*[9.0] * (size + 1))
            gather.treadle_copy(words(*here, out, steps, width, 0))
            want = [v for r in rows for v in flat[begins[r] * width:(begins[r] + lengths[r]) * width]
                    + [0.0] * width * (steps - lengths[r] if steps else 0)] + [9.0]
            assert all(map(same, out, want)), "wrong copy"
ids = (ctypes.c_int32 * sum(lengths))(*(i % 5 - 1 for i in range(sum(lengths))))
table = (ctypes.c_int64 * 4)(7, 5, 3, 1)
found, w = asked(1, [1, 2], ids)
out = (ctypes.c_int64 * 25)(*[9] * 25)
here = (found, ctypes.addressof(found) + 16, 2)
assert gather.treadle_ids(words(*here, out, 12, -4, table, 4)) == -1
want = [table[ids[b + t]] if ids[b + t] >= 0 else -1 for b, n in ((1, 8), (9, 11)) for t in range(n)]
assert list(out) == want[:8] + [-4] * 4 + want[8:] + [-4, 9], "wrong ids"
assert gather.treadle_ids(words(*here, out, 12, -4, table, 3)) == 0, "an unknown id"
assert gather.treadle_ids(words(*here, out, 0, 0, 0, 0)) == -1 and list(out[:19]) == list(ids[1:20]), "wrong plain ids"
"""

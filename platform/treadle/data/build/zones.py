"""From sorted runs to the shards of a data set: one zone of its order after the other, each read, merged and written.

A zone is a range of the order of all rows, about 64 MB of them, and becomes one shard. As runs are sorted alike, it
takes one range of each run. What a shard holds follows from the rows alone, not from how they were cut into parts.

Shape letters: R rows, N frames of all rows laid end to end, D channels, U targets of all rows so, K values.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from treadle.data.blocks import BlockRows, checksum, encode_shard, shard_room
from treadle.data.build.reuse import Reused
from treadle.data.build.runs import Run
from treadle.data.build.scratch import Scratch, Shelf
from treadle.data.manifest import Block, Content
from treadle.data.order import copy_rows, cut, starts_of
from treadle.errors import ConflictError, NotFoundError
from treadle.spec import TargetKind

__all__ = ["Zone", "ZoneJob", "create_once", "plan_zones", "used_ids", "write_zone"]

_logger = logging.getLogger(__name__)

_ROW_BYTES = 20
"""What a row costs in a block beside its values, targets, gaps and entity: two offsets of 8 bytes and one of 4."""

Ints = NDArray[np.int64]
_REUSED = Reused()


@dataclass(frozen=True, kw_only=True)
class ZoneJob:
    """What all zones of a build have in common.

    Args:
        open_shelf: gives the store, in whatever process. folder: of the build.
        name: of the data set. content: of its shards.
        symbol_ids, label_ids: of each part, what its ids become (the last is what -1 becomes).
        block_bytes: of one block, about.
    """

    open_shelf: Callable[[], Shelf]
    folder: str
    name: str
    content: Content
    symbol_ids: tuple[NDArray[np.int32], ...]
    label_ids: tuple[NDArray[np.int32], ...]
    block_bytes: int

    @property
    def value_width(self) -> int:
        """Numbers of a frame."""
        return len(self.content.channels) or 1

    @property
    def target_width(self) -> int:
        """Numbers of a target."""
        return len(self.content.value_names) or 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Neighbouring rows of one run.

    Args:
        part: the run's. run: its file.
        rows, frames, targets, text: first and end in the run, of each.
    """

    part: int
    run: Run
    rows: tuple[int, int]
    frames: tuple[int, int]
    targets: tuple[int, int]
    text: tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Zone:
    """The rows of one shard.

    Args:
        pieces: where they lie, in the order in which they are read.
        lengths_R, targets_R, text_R: frames, targets and bytes of the entity of each row, as read.
        order_R: of the rows as read, for the shard.
    """

    pieces: tuple[Piece, ...]
    lengths_R: NDArray[np.uint32]
    targets_R: NDArray[np.uint32]
    text_R: NDArray[np.uint32]
    order_R: NDArray[np.int32]


def row_bytes(content: Content, columns: Mapping[str, NDArray[Any]]) -> Ints:
    """The size of rows in a shard."""
    frame = 4 * ((len(content.channels) or 1) + content.timed)
    target = 4 * (len(content.value_names) or 1)
    return (
        columns["length"].astype(np.int64) * frame
        + columns["targets"].astype(np.int64) * target
        + columns["text"]
        + _ROW_BYTES
    )


def plan_zones(
    content: Content,
    columns: Mapping[str, NDArray[Any]],
    order: Ints,
    runs: Sequence[tuple[int, Run]],
    *,
    shard_bytes: int,
) -> Iterator[Zone]:
    """The zones in their order.

    Args:
        columns: length, targets and text of all rows, run by run.
        order: of the rows that the data set holds.
        runs: of all parts, with the number of the part.
    """
    cursors = [_Cursor(part, run) for part, run in runs]
    run_starts = starts_of(np.array([run.rows for _, run in runs], np.int64))
    sizes = row_bytes(content, columns)[order]
    bounds = cut(sizes, shard_bytes)
    for start, stop in pairwise(bounds):
        chosen = order[start:stop]
        rows = np.sort(chosen)
        breaks = np.flatnonzero((np.diff(rows) != 1) | np.isin(rows[1:], run_starts)) + 1
        edges = [0, *breaks.tolist(), len(rows)]
        pieces: list[Piece] = []
        for first, end in pairwise(edges):
            at, to = int(rows[first]), int(rows[end - 1]) + 1
            number = int(np.searchsorted(run_starts, at, side="right")) - 1
            pieces.append(cursors[number].take(columns, int(run_starts[number]), at, to))
        yield Zone(
            pieces=tuple(pieces),
            lengths_R=columns["length"][rows],
            targets_R=columns["targets"][rows],
            text_R=columns["text"][rows],
            order_R=np.searchsorted(rows, chosen).astype(np.int32),
        )


class _Cursor:
    """How far a run is read: zones take its rows in their order."""

    def __init__(self, part: int, run: Run) -> None:
        self._part, self._run = part, run
        self._row = 0
        self._sums = dict.fromkeys(("length", "targets", "text"), 0)

    def take(self, columns: Mapping[str, NDArray[Any]], base: int, start: int, stop: int) -> Piece:
        """Rows start to stop of all, which lie in this run that begins at row `base`."""
        self._skip(columns, base, start)
        before, first = dict(self._sums), self._row
        self._skip(columns, base, stop)
        sums = self._sums
        return Piece(
            part=self._part,
            run=self._run,
            rows=(first, self._row),
            frames=(before["length"], sums["length"]),
            targets=(before["targets"], sums["targets"]),
            text=(before["text"], sums["text"]),
        )

    def _skip(self, columns: Mapping[str, NDArray[Any]], base: int, stop: int) -> None:
        for name in self._sums:
            self._sums[name] += int(columns[name][base + self._row : stop].sum(dtype=np.int64))
        self._row = stop - base


def write_zone(job: ZoneJob, zone: Zone) -> list[Block]:
    """Write the shard of a zone, or find it written; gives its blocks.

    Raises:
        IntegrityError: a file of the build is gone.

    Cost: memory of the shard's rows, and of the shard.
    """
    shelf = job.open_shelf()
    rows = _read(job, zone, Scratch(shelf, job.folder))
    _renumber(job, zone, rows)
    columns = {"length": zone.lengths_R, "targets": zone.targets_R, "text": zone.text_R}
    sizes_R = row_bytes(job.content, columns)[zone.order_R]
    bounds = cut(sizes_R, job.block_bytes)
    room = _REUSED.array("shard", (shard_room(len(sizes_R), int(sizes_R.sum()), len(bounds) - 1),), np.uint8)
    data, blocks = encode_shard(_blocks(job, zone, rows, bounds), job.content, room)
    key = f"data/{job.name}/shards/{checksum(data)}.arrow"
    create_once(shelf, key, data)
    return [dataclasses.replace(block, key=key) for block in blocks]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """The rows of a zone as they were read."""

    values_ND: NDArray[Any]
    targets_UK: NDArray[Any]
    gaps_N: NDArray[np.float32] | None
    entities: pa.StringArray


def _read(job: ZoneJob, zone: Zone, scratch: Scratch) -> _Rows:
    content = job.content
    frames, targets = int(zone.lengths_R.sum(dtype=np.int64)), int(zone.targets_R.sum(dtype=np.int64))
    value_type = np.float32 if content.channels else np.int32
    target_type = np.float32 if content.target is TargetKind.values else np.int32
    values_ND = _REUSED.array("values", (frames, job.value_width), value_type)
    targets_UK = _REUSED.array("targets", (targets, job.target_width), target_type)
    gaps_N = _REUSED.array("gaps", (frames,), np.float32) if content.timed else None
    text_starts = starts_of(zone.text_R)
    text = np.empty(int(text_starts[-1]), np.uint8)
    asked: list[tuple[str, list[tuple[int, memoryview]]]] = []
    frame = target = byte = 0
    for piece in zone.pieces:
        values = values_ND[frame : (frame := frame + piece.frames[1] - piece.frames[0])]
        some_targets = targets_UK[target : (target := target + piece.targets[1] - piece.targets[0])]
        some_text = text[byte : (byte := byte + piece.text[1] - piece.text[0])]
        run = piece.run
        places = [
            (piece.frames[0] * job.value_width * 4, _bytes(values)),
            (run.targets_at + piece.targets[0] * job.target_width * 4, _bytes(some_targets)),
            (run.text_at + piece.text[0], _bytes(some_text)),
        ]
        if gaps_N is not None:
            places.append((run.gaps_at + piece.frames[0] * 4, _bytes(gaps_N[frame - len(values) : frame])))
        asked.append((run.name, places))
    scratch.read_many(asked)
    entities = pa.StringArray.from_buffers(
        len(zone.text_R), pa.py_buffer(text_starts.astype(np.int32)), pa.py_buffer(text)
    )
    return _Rows(values_ND=values_ND, targets_UK=targets_UK, gaps_N=gaps_N, entities=entities)


def _by_piece(job: ZoneJob, zone: Zone, rows: _Rows) -> Iterator[tuple[int, NDArray[Any], NDArray[Any]]]:
    """The part of each piece, and its ids of symbols and of labels, none where there are no such things."""
    frame = target = 0
    no_symbols, no_labels = bool(job.content.channels), job.content.target is not TargetKind.labels
    for piece in zone.pieces:
        symbols = rows.values_ND[frame : (frame := frame + piece.frames[1] - piece.frames[0])]
        labels = rows.targets_UK[target : (target := target + piece.targets[1] - piece.targets[0])]
        yield piece.part, symbols[:0] if no_symbols else symbols, labels[:0] if no_labels else labels


def _renumber(job: ZoneJob, zone: Zone, rows: _Rows) -> None:
    """From the ids of parts to those of the data set."""
    for part, symbols, labels in _by_piece(job, zone, rows):
        if len(symbols):
            symbols[:] = job.symbol_ids[part][symbols]
        if len(labels):
            labels[:] = job.label_ids[part][labels]


def used_ids(job: ZoneJob, zone: Zone) -> dict[int, tuple[set[int], set[int]]]:
    """The ids of symbols and labels, by part, that occur in a zone."""
    rows = _read(job, zone, Scratch(job.open_shelf(), job.folder))
    found: dict[int, tuple[set[int], set[int]]] = {}
    for part, symbols, labels in _by_piece(job, zone, rows):
        of_part = found.setdefault(part, (set(), set()))
        of_part[0].update(np.unique(symbols).tolist())
        of_part[1].update(np.unique(labels).tolist())
    return found


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _blocks(job: ZoneJob, zone: Zone, rows: _Rows, bounds: Sequence[int]) -> Iterator[BlockRows]:
    starts, target_starts = starts_of(zone.lengths_R), starts_of(zone.targets_R)
    for start, stop in pairwise(bounds):
        chosen = zone.order_R[start:stop]
        values, offsets = _chosen("values", rows.values_ND, starts, chosen)
        targets, target_offsets = _chosen("targets", rows.targets_UK, target_starts, chosen)
        yield BlockRows(
            values=values,
            value_offsets=offsets * job.value_width,
            targets=targets,
            target_offsets=target_offsets * job.target_width,
            gaps_N=None if rows.gaps_N is None else _chosen("gaps", rows.gaps_N[:, None], starts, chosen)[0],
            entities=rows.entities.take(pa.array(chosen)),
        )


def _chosen(name: str, source: NDArray[Any], starts: Ints, chosen: NDArray[np.int32]) -> tuple[NDArray[Any], Ints]:
    """The rows of a block, flat, and where each of them starts, in frames or targets; gone with the next block's."""
    first_R, length_R = starts[chosen], starts[chosen + 1] - starts[chosen]
    offsets = starts_of(length_R)
    out = _REUSED.array(f"block {name}", (int(offsets[-1]), source.shape[1]), source.dtype)
    copy_rows(source, first_R, length_R, out)
    return out.reshape(-1), offsets


def create_once(shelf: Shelf, key: str, data: Any) -> None:
    """Write what is named by a checksum of its content, unless it is there already.

    Other bytes of this name can only be damage: they are replaced at once, and a warning names the key. A rebuild so
    mends a data set whose files were cut or changed, and writes no others.
    """
    is_near = shelf.local_path(key) is not None  # elsewhere a copy is needed, and not held while the key is read
    try:
        shelf.create(key, data if is_near else bytes(data))
    except ConflictError:
        if not _is_sound(shelf, key, data):
            _logger.warning("%s: got other bytes than its name says, so it was damaged; written again", key)
            shelf.put(key, data if is_near else bytes(data))


def _is_sound(shelf: Shelf, key: str, data: Any) -> bool:
    """Whether `data` lies there."""
    entry = shelf.head(key)
    if entry is None or entry.size_bytes != len(data):
        return False
    try:
        return checksum(shelf.get(key)) == checksum(data)
    except NotFoundError:  # deleted between the two
        return False

"""Rows in columns: the form in which every source hands over, whatever it was read from.

Shape letters: R rows, N frames of all rows laid end to end, D channels, U targets of all rows so, K values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from treadle.data.draft import Frames, Labels, Tokens, Values

__all__ = ["CHUNK_BYTES", "Chunk", "Part", "Problem", "Schema", "Source", "keep_rows", "used_names", "without_rows"]

CHUNK_BYTES = 4 << 20
"""About so many bytes of values make one chunk; a single row may be more."""


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What the rows of a data set are, before anything is known of them.

    Args:
        inputs, target: as a draft says.
        timed: whether rows say when their frames were.
    """

    inputs: Tokens | Frames
    target: Labels | Values | None
    timed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Why a row cannot be used; a row may have several.

    Args:
        file, number: of the row; number from 1.
        column: the column, or the field of a row.
        message: `got <seen>, expected <rule>`.
        entity: of the row, "" where it has none.
        where: place of the row for people, where the source says it better than file and number.
    """

    file: str
    number: int
    column: str
    message: str
    entity: str = ""
    where: str = ""

    @property
    def place(self) -> str:
        """The row, for people."""
        place = self.where or (f"{self.file}:{self.number}" if self.file else f"row {self.number}")
        return f"{place} ({self.entity!r})" if self.entity else place

    def __str__(self) -> str:
        return f"{self.place}: {self.column}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a source that can be read apart from the others, in any process.

    Args:
        file: for messages. path: where the source finds it.
        first: rows of the file before this part.
        start, stop: row groups or record batches of the file; stop -1 is the last.
        size: about how many bytes, for progress and for sharing out; exactly those of the file where `stop` is -1.
        split: place in `SPLITS` of all its rows where the folder says it, else -1.
    """

    file: str
    path: str = ""
    first: int = 0
    start: int = 0
    stop: int = -1
    size: int = 0
    split: int = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Some rows of one source file, in its order.

    Args:
        file: for messages; "" where rows come from a generator.
        number_R: of each row in the file, from 1. Of a CSV file with its header line as 1; of events, of their first.
        lengths_R: frames of each row; 0 is a row to complain of.
        inputs: float32 [N, D] of frames, NaN where a value is missing; int32 [N] of places in `symbols` for tokens
            (-1: null, to complain of).
        symbols: the distinct symbols of this chunk; () for frames.
        target_lengths_R: targets of each row: 1 of rows, its length of frames, any number of sequences; 0 without.
        targets: int32 [U] of places in `labels`, -1 for none; or float32 [U, K] of values; int32 [0] without.
        labels: the distinct labels of this chunk; () for values.
        times_N: when each frame was, float64: days since 1970 where the source says dates or timestamps, which keeps
            0.3 us of today's; None where the schema is not timed.
        entity_R: text; nulls are complained of.
        group_R: text without nulls (the entity where there is none), or None where the source has no such column.
        id_R: text, nulls are complained of; or None where the source has no such column.
        time_R: float64 as `times_N`, NaN where a row has none.
        weight_R: float32.
        split_R: int8 places in `SPLITS`, -1 where the source does not say.
        where_R: place of each row for people, "" where file and number say it; None for all so.
        gaps_N: time since the frame before, 0 at the first of each row, where the source counts times more exactly than
            `times_N` holds them; None where it follows from these.
        problems: rows of the source, not in this chunk, that have not even the form of one.
    """

    file: str
    number_R: NDArray[np.int64]
    lengths_R: NDArray[np.int64]
    inputs: NDArray[Any]
    symbols: tuple[str, ...]
    target_lengths_R: NDArray[np.int64]
    targets: NDArray[Any]
    labels: tuple[str, ...]
    times_N: NDArray[np.float64] | None
    entity_R: pa.StringArray
    group_R: pa.StringArray | None
    id_R: pa.StringArray | None
    time_R: NDArray[np.float64]
    weight_R: NDArray[np.float32]
    split_R: NDArray[np.int8]
    where_R: pa.StringArray | None = None
    gaps_N: NDArray[np.float32] | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def num_rows(self) -> int:
        return len(self.lengths_R)

    def problem(self, row: int, column: str, message: str) -> Problem:
        """A problem of the row at a place in this chunk."""
        return Problem(
            file=self.file,
            number=int(self.number_R[row]),
            column=column,
            message=message,
            entity=self.entity_R[row].as_py() or "",
            where=self.where_R[row].as_py() if self.where_R is not None else "",
        )


class Source(Protocol):
    """Rows to be read: files, events grouped by entity, or a generator."""

    @property
    def schema(self) -> Schema: ...

    @property
    def parts(self) -> Sequence[Part]: ...

    def read(self, part: Part) -> Iterator[Chunk]:
        """The rows of a part, unchecked, in bounded memory.

        Raises:
            DataError: the file is damaged, or its columns are of other types than those of the first file.
        """
        ...


def without_rows(schema: Schema, problems: tuple[Problem, ...]) -> Chunk:
    """A chunk that says problems of a source, and has no row."""
    inputs, target = schema.inputs, schema.target
    nothing, no_text = np.zeros(0, np.int64), pa.array([], pa.string())
    return Chunk(
        file="",
        number_R=nothing,
        lengths_R=nothing,
        inputs=np.zeros((0, len(inputs.channels)), np.float32) if isinstance(inputs, Frames) else nothing.astype("i4"),
        symbols=(),
        target_lengths_R=nothing,
        targets=np.zeros((0, len(target.names)), np.float32) if isinstance(target, Values) else nothing.astype("i4"),
        labels=(),
        times_N=np.zeros(0) if schema.timed else None,
        entity_R=no_text,
        group_R=None,
        id_R=None,
        time_R=np.zeros(0),
        weight_R=np.zeros(0, np.float32),
        split_R=np.zeros(0, np.int8),
        problems=problems,
    )


def keep_rows(chunk: Chunk, good_R: NDArray[np.bool_]) -> Chunk:
    """The chunk without some rows, and without symbols and labels that only these had; itself where all are kept."""
    if good_R.all():
        return chunk
    rows = pa.array(good_R)
    frames_N = np.repeat(good_R, chunk.lengths_R)
    targets_U = np.repeat(good_R, chunk.target_lengths_R)
    inputs, symbols = chunk.inputs[frames_N], chunk.symbols
    targets, labels = chunk.targets[targets_U], chunk.labels
    if symbols:
        inputs, symbols = used_names(inputs, symbols)
    if labels:
        targets, labels = used_names(targets, labels)
    return dataclasses.replace(
        chunk,
        number_R=chunk.number_R[good_R],
        lengths_R=chunk.lengths_R[good_R],
        inputs=inputs,
        symbols=symbols,
        target_lengths_R=chunk.target_lengths_R[good_R],
        targets=targets,
        labels=labels,
        times_N=None if chunk.times_N is None else chunk.times_N[frames_N],
        entity_R=chunk.entity_R.filter(rows),
        group_R=None if chunk.group_R is None else chunk.group_R.filter(rows),
        id_R=None if chunk.id_R is None else chunk.id_R.filter(rows),
        time_R=chunk.time_R[good_R],
        weight_R=chunk.weight_R[good_R],
        split_R=chunk.split_R[good_R],
        where_R=None if chunk.where_R is None else chunk.where_R.filter(rows),
        gaps_N=None if chunk.gaps_N is None else chunk.gaps_N[frames_N],
    )


def used_names(ids: NDArray[np.int32], names: tuple[str, ...]) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Ids (-1 for none) into the names that occur, and these names in the order they had."""
    used = np.bincount(ids[ids >= 0] if (ids < 0).any() else ids, minlength=len(names)) > 0
    if used.all():
        return ids, names
    places = np.append(np.cumsum(used) - 1, -1).astype(np.int32)  # the last is what -1 finds
    return places[ids], tuple(name for name, is_used in zip(names, used, strict=True) if is_used)

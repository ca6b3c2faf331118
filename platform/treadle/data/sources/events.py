"""Tables whose lines are frames, in any order, larger than memory: dealt by entity to files that each fit, then sorted.

Every line goes to the file that the hash of its entity says, in the order of reading; a part is one such file, and
what it holds becomes one sequence an entity (sequences.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from treadle.data.chunk import CHUNK_BYTES, Chunk, Part, Problem, Schema
from treadle.data.draft import SPLITS, Labels, Tokens, Values
from treadle.data.sources.arrays import (
    element_type,
    is_list,
    is_number,
    is_time,
    names_things,
    side_by_side,
    texts,
    times,
    vectors,
)
from treadle.data.sources.infer import infer_events
from treadle.data.sources.lines import Lines
from treadle.data.sources.sequences import LINE_BITS, chunks_of_events
from treadle.data.sources.tables import Piece
from treadle.errors import ConfigError, DataError
from treadle.spec import ColumnsSpec, DataSpec

__all__ = ["EventsSource", "open_events"]

PARTITION_BYTES = 64 << 20
_MOST_PARTITIONS = 256
_GATHERED_BYTES = 8 * CHUNK_BYTES


@dataclass(frozen=True, kw_only=True, eq=False)
class EventsSource:
    """Events that are dealt to files of a scratch folder. Picklable, as its parts are.

    Args:
        lines: the files they were read from.
        problems: lines that belong to no entity; the first part says them.
    """

    lines: Lines
    schema: Schema
    parts: tuple[Part, ...]
    problems: tuple[Problem, ...]

    def read(self, part: Part) -> Iterator[Chunk]:
        """The sequences of a part, by where their first event stood, each in the order of its times.

        Cost: memory of about three times the part.
        """
        files = tuple(file.name for file in self.lines.place.files)
        problems = self.problems if part == self.parts[0] else ()
        return chunks_of_events(Path(part.path), files, self.schema, problems=problems)

    def digests(self) -> dict[str, str]:
        """The sha256 of each file that was read. Cost: reads them all."""
        return self.lines.digests()


def open_events(
    data: DataSpec,
    spec: ColumnsSpec,
    lines: Lines,
    *,
    scratch: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    partition_bytes: int = PARTITION_BYTES,
) -> EventsSource:
    """Events dealt to files of about `partition_bytes` in `scratch`, an entity's in one of them.

    Raises:
        ConfigError: columns of types that cannot be what the spec says. DataError: a damaged file.

    Cost: reads and writes everything once.
    """
    for key in ("entity", "times"):
        if getattr(spec, key) is None:
            raise ConfigError(
                f"columns.{key}: got null, expected a column, for events", hint=f"columns.{key}=<column> of each line"
            )
    first, sample = lines.sample()
    schema = infer_events(data, spec, sample, first)
    total = sum(part.size for part in lines.parts)
    deal = _Deal(scratch / "events", min(_MOST_PARTITIONS, -(-total // partition_bytes) or 1))
    problems: list[Problem] = []
    places = {file.name: place for place, file in enumerate(lines.place.files)}
    done = 0
    with deal:
        for part in lines.parts:
            for piece in lines.read(part):
                problems += piece.problems
                deal.add(_normal(piece, part, places[part.file], spec, schema, first, problems))
            done += part.size
            progress(done, total)
    return EventsSource(lines=lines, schema=schema, parts=deal.parts(), problems=tuple(problems))


# --- lines of one form


def _normal(
    piece: Piece, part: Part, file: int, spec: ColumnsSpec, schema: Schema, first: str, problems: list[Problem]
) -> pa.RecordBatch:
    """The lines of a piece in the columns that all files are dealt in."""
    batch = piece.batch
    line = _Line(batch, part.file, first)
    entity_R = line.text("entity", spec.entity or "")
    there_R = np.ones(batch.num_rows, bool)
    if entity_R.null_count:
        there_R = entity_R.is_valid().to_numpy(zero_copy_only=False)
        problems += [
            Problem(file=part.file, number=int(number), column=spec.entity or "", message="got null, expected text")
            for number in piece.number_R[~there_R]
        ]
    found: dict[str, pa.Array] = {
        "entity": entity_R,
        "line": pa.array((file << LINE_BITS) + piece.number_R),
        "times": pa.array(line.time("times", spec.times or "")),
    }
    if isinstance(schema.inputs, Tokens):
        found["inputs"] = line.text("inputs", spec.inputs[0])
    else:
        found["inputs"] = line.numbers("inputs", spec.inputs, len(schema.inputs.channels))
    if isinstance(schema.target, Labels):
        found["target"] = line.text("target", spec.target[0])
    elif isinstance(schema.target, Values):
        found["target"] = line.numbers("target", spec.target, len(schema.target.names))
    if spec.time:
        found["time"] = pa.array(line.time("time", spec.time))
    if spec.weight:
        found["weight"] = pa.array(line.numbers("weight", [spec.weight], 1).flatten())
    for key in ("group", "id", "split"):
        if name := getattr(spec, key):
            found[key] = line.text(key, name)
    if not spec.split and part.split >= 0:
        found["split"] = pa.array([SPLITS[part.split]] * batch.num_rows, pa.string())
    normal = pa.RecordBatch.from_pydict(found)
    return normal if there_R.all() else normal.filter(pa.array(there_R))


class _Line:
    """The columns of one batch, read as the first file says."""

    def __init__(self, batch: pa.RecordBatch, file: str, first: str) -> None:
        self.batch, self.file, self.first = batch, file, first

    def text(self, key: str, name: str) -> pa.StringArray:
        return texts(self.column(key, name, names_things, "text or whole numbers"))

    def time(self, key: str, name: str) -> NDArray[np.float64]:
        return times(self.column(key, name, is_time, "numbers, dates or timestamps"))[0]

    def numbers(self, key: str, names: Sequence[str], width: int) -> pa.FixedSizeListArray:
        column = self.batch.column(names[0])
        if len(names) == 1 and is_list(column.type) and is_number(element_type(column.type)):
            values_RD, wrong_R = vectors(column, width)
            if wrong_R is not None:
                raise DataError(f"{self.file}: {names[0]!r}: got a list of another length, expected {width} numbers")
        else:
            values_RD = side_by_side([self.column(key, name, is_number, "numbers") for name in names])
        return pa.FixedSizeListArray.from_arrays(pa.array(values_RD.reshape(-1)), width)

    def column(self, key: str, name: str, fits: Callable[[pa.DataType], bool], rule: str) -> Any:
        column = self.batch.column(name)
        if not fits(column.type):
            raise DataError(
                f"{self.file}: columns.{key}: {name!r}: got {column.type}, expected {rule}, as in {self.first}",
                hint="write all files with one schema",
            )
        return column


# --- files by entity


class _Deal:
    """Files that lines are dealt to by the hash of their entity; gathered first, so that few batches are written."""

    def __init__(self, folder: Path, num: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.paths = [folder / f"{i:04}.arrows" for i in range(num)]
        self._writers: list[pa.RecordBatchStreamWriter] = []
        self._gathered: list[pa.RecordBatch] = []
        self._open = contextlib.ExitStack()

    def __enter__(self) -> _Deal:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._flush()
        self._open.close()

    def add(self, batch: pa.RecordBatch) -> None:
        self._gathered.append(batch)
        if sum(b.nbytes for b in self._gathered) >= _GATHERED_BYTES:
            self._flush()

    def parts(self) -> tuple[Part, ...]:
        return tuple(
            Part(file=path.name, path=str(path), size=path.stat().st_size) for path in self.paths if path.exists()
        )

    def _flush(self) -> None:
        if not self._gathered:
            return
        table = pa.Table.from_batches(self._gathered).combine_chunks()
        self._gathered = []
        if not self._writers:
            files = [self._open.enter_context(pa.OSFile(str(path), "wb")) for path in self.paths]
            self._writers = [self._open.enter_context(pa.ipc.new_stream(file, table.schema)) for file in files]
        for batch in table.to_batches():
            place_R = _places(batch.column("entity"), len(self.paths))
            order = np.argsort(place_R, kind="stable")  # in the order of reading within each file
            bounds = np.searchsorted(place_R[order], np.arange(len(self.paths) + 1)).tolist()
            dealt = batch.take(pa.array(order))
            for writer, start, stop in zip(self._writers, bounds[:-1], bounds[1:], strict=True):
                if stop > start:
                    writer.write_batch(dealt.slice(start, stop - start))


def _places(entity_R: pa.StringArray, num: int) -> NDArray[np.uint16]:
    encoded = entity_R.dictionary_encode()
    of_entity = [xxhash.xxh3_64_intdigest(text.encode()) % num for text in encoded.dictionary.to_pylist()]
    return np.array(of_entity, np.uint16)[encoded.indices.to_numpy()]

"""Tables whose lines are frames, in any order, larger than memory: dealt by entity to files that each fit, then sorted.

Every line goes to the file that the hash of its entity says, in the order of reading; a part is one such file, and
what it holds becomes one sequence an entity (sequences.py). Lines that belong to no entity are a part of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from treadle.data.chunk import Chunk, Part, Problem, Schema
from treadle.data.draft import SPLITS, Labels, Tokens, Values
from treadle.data.sources.arrays import (
    element_type,
    is_list,
    is_number,
    is_time,
    names_things,
    side_by_side,
    texts,
    vectors,
)
from treadle.data.sources.clock import Clock, clocks_of
from treadle.data.sources.complaints import Complaints, read_complaints
from treadle.data.sources.deal import Deal
from treadle.data.sources.infer import infer_events
from treadle.data.sources.lines import Lines
from treadle.data.sources.sequences import FAULTS, LINE_BITS, chunks_of_events
from treadle.data.sources.tables import Piece
from treadle.errors import ConfigError, DataError
from treadle.spec import ColumnsSpec, DataSpec

__all__ = ["EventsSource", "open_events"]

PARTITION_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class EventsSource:
    """Events that are dealt to files of a scratch folder. Picklable, as its parts are.

    Args:
        lines: the files they were read from. clock: that `times` are counted by.
        parts: the first may be of lines that belong to no entity, which it says.
    """

    lines: Lines
    schema: Schema
    clock: Clock
    parts: tuple[Part, ...]

    def read(self, part: Part) -> Iterator[Chunk]:
        """The sequences of a part, by where their first event stood, each in the order of its times.

        Cost: memory of about three times the part.
        """
        if part.file == _COMPLAINTS:
            return read_complaints(Path(part.path), self.schema)
        files = tuple(file.name for file in self.lines.place.files)
        return chunks_of_events(Path(part.path), files, self.schema, self.clock)


_COMPLAINTS = "complaints.arrows"


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
        ConfigError: columns of types that cannot be what the spec says. DataError: a damaged file, or columns of
            other types than those of the first. TransientError: no room.

    Cost: reads and writes everything once; again what of it was packed to less than half.
    """
    for key in ("entity", "times"):
        if getattr(spec, key) is None:
            raise ConfigError(
                f"columns.{key}: got null, expected a column, for events", hint=f"columns.{key}=<column> of each line"
            )
    first, sample = lines.sample()
    schema = infer_events(data, spec, sample, first)
    form = _Form(spec=spec, schema=schema, first=first, clocks=clocks_of(spec, sample.schema))
    folder, total = scratch / "events", sum(part.size for part in lines.parts)
    places = {file.name: place for place, file in enumerate(lines.place.files)}
    done = 0
    with Deal(folder, size=total, file_bytes=partition_bytes) as deal, Complaints(folder / _COMPLAINTS) as complaints:
        for part in lines.parts:
            for piece in lines.read(part):
                batch, problems = form.normal(piece, part, places[part.file])
                complaints.add((*piece.problems, *problems))
                deal.add(batch)
            done += part.size
            progress(done, total)
    paths = [path for path in (complaints.path,) if path.exists()]
    paths += deal.files()
    parts = [Part(file=str(path.relative_to(folder)), path=str(path), size=path.stat().st_size) for path in paths]
    return EventsSource(lines=lines, schema=schema, clock=form.clocks["times"], parts=tuple(parts))


# --- lines of one form


@dataclass(frozen=True, kw_only=True)
class _Form:
    """The columns that the lines of all files are dealt in, as the first file says."""

    spec: ColumnsSpec
    schema: Schema
    first: str
    clocks: Mapping[str, Clock]

    def normal(self, piece: Piece, part: Part, file: int) -> tuple[pa.RecordBatch, list[Problem]]:
        """The lines of a piece; those without an entity are problems."""
        spec, schema = self.spec, self.schema
        line = _Line(piece.batch, part.file, self)
        entity_R = line.text("entity", spec.entity or "")
        found: dict[str, pa.Array] = {
            "entity": entity_R,
            "line": pa.array((file << LINE_BITS) + piece.number_R),
            "times": line.counted("times", spec.times or "")[0],
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
            found["time"] = line.time(spec.time)
        if spec.weight:
            found["weight"] = pa.array(line.numbers("weight", [spec.weight], 1).flatten())
        for key in ("group", "id", "split"):
            if name := getattr(spec, key):
                found[key] = line.text(key, name)
        if not spec.split and part.split >= 0:
            found["split"] = pa.array([SPLITS[part.split]] * len(entity_R), pa.string())
        normal = pa.RecordBatch.from_pydict(found | {"faults": pa.array(line.fault_R)})
        if not entity_R.null_count:
            return normal, []
        there_R = entity_R.is_valid().to_numpy(zero_copy_only=False)
        problems = [
            Problem(file=part.file, number=number, column=spec.entity or "", message="got null, expected text")
            for number in piece.number_R[~there_R].tolist()
        ]
        return normal.filter(pa.array(there_R)), problems


class _Line:
    """The columns of one batch, read as the first file says; and what is wrong with each line, as bits of FAULTS."""

    def __init__(self, batch: pa.RecordBatch, file: str, form: _Form) -> None:
        self.batch, self.file, self.form = batch, file, form
        self.fault_R = np.zeros(batch.num_rows, np.uint8)

    def text(self, key: str, name: str) -> pa.StringArray:
        return texts(self.column(key, name, names_things, "text or whole numbers"))

    def counted(self, key: str, name: str) -> tuple[Any, NDArray[np.bool_] | None]:
        column = self.column(key, name, is_time, "numbers, dates or timestamps")
        return self.form.clocks[key].count(column, f"{self.file}: columns.{key}: {name!r}", self.form.first)

    def time(self, name: str) -> pa.Array:
        counts, wrong_R = self.counted("time", name)
        self.fault("time", wrong_R)
        return pa.array(self.form.clocks["time"].times(counts))

    def numbers(self, key: str, names: Sequence[str], width: int) -> pa.FixedSizeListArray:
        column = self.batch.column(names[0])
        if len(names) == 1 and is_list(column.type) and is_number(element_type(column.type)):
            values_RD, wrong_R = vectors(column, width)
            self.fault(key, wrong_R)
        else:
            values_RD = side_by_side([self.column(key, name, is_number, "numbers") for name in names])
        return pa.FixedSizeListArray.from_arrays(pa.array(values_RD.reshape(-1)), width)

    def fault(self, key: str, wrong_R: NDArray[np.bool_] | None) -> None:
        if wrong_R is not None:
            self.fault_R |= wrong_R.astype(np.uint8) << FAULTS.index(key)

    def column(self, key: str, name: str, fits: Callable[[pa.DataType], bool], rule: str) -> Any:
        column = self.batch.column(name)
        if not fits(column.type):
            raise DataError(
                f"{self.file}: columns.{key}: {name!r}: got {column.type}, expected {rule}, as in {self.form.first}",
                hint="write all files with one schema",
            )
        return column

"""From the chunks of one part of a source to sorted runs of rows on the scratch shelf, and facts of all of them.

The facts of a part are written last: where they are, the part is finished, and a rerun of a killed build goes on with
the next one.

Shape letters: R rows, N frames of all rows laid end to end, D channels, U targets of all rows so, K values.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from treadle import wire
from treadle.data.build.check import check_chunk
from treadle.data.build.facts import FACTS, Hashes, chunk_facts, gaps_of, hash_texts
from treadle.data.build.inline import leave_if_stopped
from treadle.data.build.runs import OpenRun, Run
from treadle.data.build.scratch import Scratch, Shelf
from treadle.data.chunk import CHUNK_BYTES, Chunk, Part, Problem, Source, keep_rows
from treadle.data.draft import Labels
from treadle.data.order import starts_of
from treadle.errors import IntegrityError, NotFoundError

__all__ = ["PartFacts", "PartJob", "read_facts", "write_part"]

_SCHEMA = 1
_DIGEST_BYTES = 16
"""Facts end with the xxh3_128 of all before: nothing waits for the disk to have them."""
_AGAIN = "treadle data build once more: it makes the parts that are damaged again"


@dataclass(frozen=True, kw_only=True)
class PartJob:
    """What all parts of a build have in common.

    Args:
        open_shelf: gives the store, in whatever process. folder: of the build.
        source: of the rows.
        max_length: longest row accepted. limit: entities kept, of all parts together; None keeps all.
        most_bad: bad rows after which a part is not read on, as the build fails anyway.
        run_bytes: that one run takes in memory, about.
    """

    open_shelf: Callable[[], Shelf]
    folder: str
    source: Source
    max_length: int
    limit: int | None
    most_bad: int
    run_bytes: int


@dataclass(frozen=True, kw_only=True)
class PartMeta:
    """What is known of a finished part beside the columns.

    Args:
        files: by their number in the column `file`. symbols, labels: by their id in the runs.
        keyed: whether rows have ids.
        runs: the files of rows.
        num_good, num_bad: rows that keep the rules, and rows that do not. problems: of these, as they came.
    """

    files: tuple[str, ...]
    symbols: tuple[str, ...]
    labels: tuple[str, ...]
    keyed: bool
    runs: tuple[Run, ...]
    num_good: int
    num_bad: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class PartFacts:
    """A finished part: columns of `FACTS`, run by run, each in the order of its run."""

    meta: PartMeta
    columns: dict[str, NDArray[Any]]

    @property
    def num_rows(self) -> int:
        return len(self.columns["length"])


def write_part(job: PartJob, numbered: tuple[int, Part]) -> int:
    """Sort a part into runs, unless that is done already; gives the number of rows kept.

    Raises:
        DataError: the source cannot be read.

    Cost: memory of one run, a chunk, and about 90 bytes a row.
    """
    number, part = numbered
    scratch = Scratch(job.open_shelf(), job.folder)
    if (done := _finished(scratch, number)) is not None:
        return done
    writer = _PartWriter(job, scratch, number)
    for chunk in job.source.read(part):
        leave_if_stopped()
        if not writer.add(chunk):
            break
    return writer.close()


def read_facts(scratch: Scratch, number: int) -> PartFacts:
    """The facts of a finished part.

    Raises:
        NotFoundError: it is not finished. IntegrityError: its facts are damaged.
    """
    name = _facts_name(number)
    data = memoryview(scratch.read(name))
    data, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if xxhash.xxh3_128_digest(data) != digest:
        raise IntegrityError(f"{name}: got other bytes than were written, expected the facts of a part", hint=_AGAIN)
    try:
        table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
        meta = table.schema.metadata[b"treadle"]
        columns = {column: table.column(column).to_numpy() for column in FACTS.names}
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{name}: not the facts of a part ({error})", hint=_AGAIN) from None
    return PartFacts(columns=columns, meta=wire.unrecord(PartMeta, meta, kind="part", schema=_SCHEMA, where=name))


def _finished(scratch: Scratch, number: int) -> int | None:
    """The rows of a part that an earlier build has finished, if all of it is there and whole."""
    try:
        facts = read_facts(scratch, number)
        return facts.num_rows if all(run.is_whole(scratch) for run in facts.meta.runs) else None
    except (NotFoundError, IntegrityError):
        return None


def _facts_name(number: int) -> str:
    return f"part-{number:06d}/facts.arrow"


class _PartWriter:
    """Collects checked rows, and writes a run whenever there are enough."""

    def __init__(self, job: PartJob, scratch: Scratch, number: int) -> None:
        self._job, self._scratch, self._number = job, scratch, number
        target = job.source.schema.target
        self._per = target.per if isinstance(target, Labels) else None
        self._symbols, self._labels = _Names(), _Names()
        self._files: dict[str, int] = {}
        self._problems: list[Problem] = []
        self._num_good = self._num_bad = self._num_placed = 0
        self._keyed = False
        self._smallest: Hashes = np.zeros(0, np.uint64)
        self._open = OpenRun(job.run_bytes + CHUNK_BYTES)
        self._runs: list[Run] = []
        self._columns: list[dict[str, NDArray[Any]]] = []

    def add(self, chunk: Chunk) -> bool:
        """Take the good rows of a chunk; False when there are too many bad ones to read on."""
        good, problems = check_chunk(chunk, self._job.source.schema, max_length=self._job.max_length)
        self._num_bad += len({problem.number for problem in problems})
        self._num_good += good.num_rows
        self._problems += problems
        if self._job.limit is not None and good.num_rows:
            # Entities beyond the limit are left out before they are written: a trial run of few rows is fast.
            good = keep_rows(good, self._within_limit(hash_texts(good.entity_R), self._job.limit))
        if good.num_rows:
            self._keep(good)
        return self._num_bad <= self._job.most_bad

    def close(self) -> int:
        """Write what is left, and the facts; gives the number of rows kept."""
        self._flush()
        meta = PartMeta(
            files=tuple(self._files),
            symbols=tuple(self._symbols.names),
            labels=tuple(self._labels.names),
            keyed=self._keyed,
            runs=tuple(self._runs),
            num_good=self._num_good,
            num_bad=self._num_bad,
            problems=tuple(self._problems),
        )
        schema = FACTS.with_metadata({b"treadle": wire.record("part", _SCHEMA, meta)})
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, schema) as writer:
            for columns in self._columns:
                arrays = [pa.array(columns[field.name], field.type) for field in FACTS]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
        facts = sink.getbuffer()
        self._scratch.write(_facts_name(self._number), [facts, xxhash.xxh3_128_digest(facts)])
        return sum(run.rows for run in self._runs)

    def _within_limit(self, entity_R: Hashes, limit: int) -> NDArray[np.bool_]:
        """The rows whose entity may be among the `limit` smallest hashes, as far as this part has seen them."""
        self._smallest = np.unique(np.concatenate([self._smallest, entity_R]))[:limit]
        return np.ones(len(entity_R), bool) if len(self._smallest) < limit else entity_R <= self._smallest[-1]

    def _keep(self, chunk: Chunk) -> None:
        symbol_ids, symbol_hashes = self._symbols.number(chunk.symbols)
        label_ids, label_hashes = self._labels.number(chunk.labels)
        gaps_N = chunk.gaps_N
        if gaps_N is None and chunk.times_N is not None:
            gaps_N = gaps_of(chunk.times_N, starts_of(chunk.lengths_R))
        columns = chunk_facts(chunk, gaps_N, per=self._per, tables=(symbol_hashes, label_hashes))
        places = np.arange(self._num_placed, self._num_placed + chunk.num_rows)
        file = self._files.setdefault(chunk.file, len(self._files))
        columns |= {"place": places, "file": np.full(chunk.num_rows, file, np.int32)}
        self._num_placed += chunk.num_rows
        self._keyed |= chunk.id_R is not None
        values = chunk.inputs if chunk.inputs.ndim == 2 else symbol_ids[chunk.inputs][:, None]
        targets = chunk.targets if chunk.targets.ndim == 2 else label_ids[chunk.targets][:, None]
        columns["label"] = label_ids[columns["label"]]
        self._open.add((values, targets, gaps_N), chunk.entity_R, columns)
        if self._open.size >= self._job.run_bytes:
            self._flush()

    def _flush(self) -> None:
        if self._open.rows:
            name = f"part-{self._number:06d}/run-{len(self._runs):06d}"
            run, columns = self._open.write(self._scratch, name)
            self._runs.append(run)
            self._columns.append(columns)


class _Names:
    """The distinct symbols or labels of a part, numbered as they come."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self._hashes: Hashes = np.zeros(0, np.uint64)

    def number(self, names: Sequence[str]) -> tuple[NDArray[np.int32], Hashes]:
        """The part's number of each of a chunk's names, the last of them -1, and the hash of each name."""
        before = len(self.names)
        ids = np.fromiter((self.names.setdefault(name, len(self.names)) for name in names), np.int32, len(names))
        if len(self.names) > before:
            new = [name for name in names if self.names[name] >= before]
            self._hashes = np.concatenate([self._hashes, hash_texts(pa.array(new, pa.string()))])
        return np.append(ids, np.int32(-1)), self._hashes[ids]

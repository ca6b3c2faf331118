"""Problems of lines that belong to no row, kept in a file: there may be as many as lines."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from treadle.data.chunk import Chunk, Problem, Schema, without_rows
from treadle.data.sources.deal import room
from treadle.data.sources.tables import damaged

__all__ = ["Complaints", "read_complaints"]

_MOST = 4096
_SCHEMA = pa.schema(
    [pa.field(f.name, pa.int64() if f.name == "number" else pa.string()) for f in dataclasses.fields(Problem)]
)


class Complaints:
    """Problems written to a file of which there is none without them.

    Args:
        path: in a folder that is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gathered: list[Problem] = []
        self._writer: pa.RecordBatchStreamWriter | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Complaints:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with room(self.path) if kind is None else contextlib.suppress(OSError), self._open:
            if kind is None:
                self._flush()

    def add(self, problems: Iterable[Problem]) -> None:
        """Keep problems.

        Raises:
            TransientError: there is no room for them.
        """
        self._gathered += problems
        if len(self._gathered) >= _MOST:
            with room(self.path):
                self._flush()

    def _flush(self) -> None:
        if not self._gathered:
            return
        if self._writer is None:
            file = self._open.enter_context(pa.OSFile(str(self.path), "wb"))
            self._writer = self._open.enter_context(pa.ipc.new_stream(file, _SCHEMA))
        columns = [[getattr(problem, name) for problem in self._gathered] for name in _SCHEMA.names]
        self._gathered = []
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
        for batch in pa.Table.from_arrays(arrays, schema=_SCHEMA).to_batches(_MOST):
            self._writer.write_batch(batch)


def read_complaints(path: Path, schema: Schema) -> Iterator[Chunk]:
    """Chunks without rows that say the problems of a file, a few thousand at a time."""
    with damaged(path.name), pa.memory_map(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            yield without_rows(schema, tuple(Problem(**line) for line in batch.to_pylist()))

"""Rows as a source that can be cut anywhere, and what a built data set holds of them, read by plain loops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from treadle.data.blocks import decode_block
from treadle.data.chunk import Chunk, Part, Schema
from treadle.data.draft import Draft, Row
from treadle.data.manifest import Manifest
from treadle.data.sources.rows import chunks_of_rows
from treadle.spec import TargetKind


class CutSource:
    """The rows of a draft in parts [cuts[i], cuts[i + 1]), each handed over in chunks of `per_chunk` rows."""

    def __init__(self, draft: Draft, cuts: Sequence[int] = (), per_chunk: int = 7) -> None:
        self.rows: list[Row] = list(draft.rows)
        self.per_chunk = per_chunk
        first = self.rows[0]
        self.schema = Schema(inputs=draft.inputs, target=draft.target, timed=first.times is not None)
        edges = sorted({0, len(self.rows), *cuts})
        self.parts = tuple(Part(file="rows", start=a, stop=b) for a, b in pairwise(edges))
        self.reads: list[int] = []

    def read(self, part: Part) -> Iterator[Chunk]:
        self.reads.append(part.start)
        for start in range(part.start, part.stop, self.per_chunk):
            rows = self.rows[start : min(start + self.per_chunk, part.stop)]
            for chunk in chunks_of_rows(rows, self.schema, keyed=rows[0].id is not None):
                yield dataclasses.replace(
                    chunk,
                    file=part.file,
                    number_R=chunk.number_R + start,
                    problems=tuple(
                        dataclasses.replace(p, file=part.file, number=p.number + start) for p in chunk.problems
                    ),
                )


def stored_rows(blobs: Any, manifest: Manifest) -> list[tuple[Any, ...]]:
    """(entity, inputs, gaps, targets) of each row in order: lists of symbols or frames, of labels or vectors."""
    content = manifest.header.content
    found: list[tuple[Any, ...]] = []
    for block in manifest.header.blocks:
        rows = decode_block(blobs.get(block.key, offset=block.offset, size=block.size), block, content)
        for i in range(rows.num_rows):
            values = rows.values[rows.value_offsets[i] : rows.value_offsets[i + 1]]
            targets = rows.targets[rows.target_offsets[i] : rows.target_offsets[i + 1]]
            width = len(content.channels) or 1
            start, stop = rows.value_offsets[i] // width, rows.value_offsets[i + 1] // width
            gaps = None if rows.gaps_N is None else rows.gaps_N[start:stop].tolist()
            found.append(
                (
                    rows.entities[i].as_py(),
                    values.reshape(-1, width).tolist() if content.channels else [content.symbols[v] for v in values],
                    gaps,
                    _targets(content, targets),
                )
            )
    return found


def _targets(content: Any, targets: np.ndarray) -> Any:
    if content.target is TargetKind.labels:
        return [content.labels[t] if t >= 0 else None for t in targets]
    if content.target is TargetKind.none:
        assert not len(targets)
        return []
    return targets.reshape(-1, len(content.value_names)).tolist()


def expected_rows(rows: Sequence[Row], *, per_row: bool) -> list[tuple[Any, ...]]:
    """The same of the rows that went in, in their order there."""
    found: list[tuple[Any, ...]] = []
    for row in rows:
        tokens = isinstance(row.inputs[0], str)
        inputs = list(row.inputs) if tokens else np.asarray(row.inputs, np.float32).tolist()
        gaps = None if row.times is None else [0.0, *np.diff(row.times).astype(np.float32).tolist()]
        if row.target is None:
            target: Any = []
        elif isinstance(row.target, np.ndarray):
            target = np.atleast_2d(row.target.astype(np.float32)).tolist()
        else:
            target = [row.target] if per_row else list(row.target)
        found.append((row.entity, inputs, gaps, target))
    return found


def plain(value: Any) -> Any:
    """NaN is equal to itself here."""
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    return "nan" if isinstance(value, float) and math.isnan(value) else value

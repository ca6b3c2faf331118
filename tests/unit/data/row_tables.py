"""Rows in memory as a build leaves them: a manifest without a split, and the blocks it speaks of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from treadle.data.blocks import BlockRows
from treadle.data.manifest import NO_SPLIT, Block, Content, Header, Manifest
from treadle.spec import TargetKind, TargetPer

__all__ = ["MemoryRows", "frames_table", "table", "tokens_table"]


class MemoryRows:
    """Rows by number, as a reader gives them; counts what is read."""

    def __init__(self, values, targets, gaps, entities, *, per_block: int) -> None:
        self.values, self.targets, self.gaps, self.entities = values, targets, gaps, entities
        self.per_block = per_block
        self.rows_read = 0
        self.frames_read = 0

    def raw(self, rows_R) -> BlockRows:
        rows = [int(row) for row in rows_R]
        self.rows_read += len(rows)
        self.frames_read += sum(len(self.values[row]) for row in rows)

        def flat(arrays, dtype):
            flats = [np.asarray(a, dtype).reshape(-1) for a in arrays]
            return np.concatenate(flats or [np.zeros(0, dtype)]), np.cumsum([0, *map(len, flats)], dtype=np.int64)

        values, value_offsets = flat([self.values[row] for row in rows], self.values[0].dtype)
        targets, target_offsets = flat([self.targets[row] for row in rows], self.targets[0].dtype)
        return BlockRows(
            values=values,
            value_offsets=value_offsets,
            targets=targets,
            target_offsets=target_offsets,
            gaps_N=None if self.gaps is None else flat([self.gaps[row] for row in rows], np.float32)[0],
            entities=pa.array([self.entities[row] for row in rows], pa.string()),
        )

    def blocks(self) -> Iterator[tuple[int, BlockRows]]:
        for first in range(0, len(self.values), self.per_block):
            yield first, self.raw(range(first, min(first + self.per_block, len(self.values))))


def _hash(*parts: Any) -> int:
    return xxhash.xxh3_64_intdigest(b"\0".join(p if isinstance(p, bytes) else str(p).encode() for p in parts))


def table(
    values: Sequence[np.ndarray],
    *,
    symbols: Sequence[str] = (),
    channels: Sequence[str] = (),
    labels: Sequence[str] = (),
    label: Sequence[int] | None = None,
    targets: Sequence[np.ndarray] | None = None,
    value_names: Sequence[str] = (),
    per: TargetPer = TargetPer.row,
    entity: Sequence[str] | None = None,
    group: Sequence[str] | None = None,
    time: Sequence[float] | None = None,
    last: Sequence[float] | None = None,
    split: Sequence[int] | None = None,
    gaps: Sequence[np.ndarray] | None = None,
    missing: bool = False,
    per_block: int = 16,
) -> tuple[Manifest, MemoryRows]:
    """A manifest of rows, and a reader of them, in the order given."""
    n = len(values)
    entity = [f"e{i}" for i in range(n)] if entity is None else list(entity)
    label = [-1] * n if label is None else list(label)
    if targets is None:
        targets = [np.array([i] if i >= 0 else [], np.int32) for i in label]
    reader = MemoryRows(list(values), list(targets), gaps, entity, per_block=per_block)
    content = Content(
        symbols=tuple(symbols),
        channels=tuple(channels),
        target=TargetKind.values if value_names else TargetKind.labels if labels else TargetKind.none,
        target_per=per,
        labels=tuple(labels),
        value_names=tuple(value_names),
        missing=missing,
        timed=gaps is not None,
    )
    counts = [min(per_block, n - first) for first in range(0, n, per_block)]
    blocks = tuple(Block(key="", offset=0, size=0, rows=count, longest=1, checksum="") for count in counts)
    columns = {
        "split": np.array([NO_SPLIT] * n if split is None else split, np.uint8),
        "length": np.array([len(v) for v in values], np.uint32),
        "targets": np.array([len(t) for t in targets], np.uint32),
        "label_frames": np.zeros(n, np.uint32),
        "label": np.array(label, np.int32),
        "weight": np.ones(n, np.float32),
        "time": np.array([np.nan] * n if time is None else time, np.float64),
        "last": np.array([np.nan] * n if last is None else last, np.float64),
        "entity": np.array([_hash(e) for e in entity], np.uint64),
        "group": np.array([_hash(g) for g in (entity if group is None else group)], np.uint64),
        "inputs": np.array([_hash(v.tobytes()) for v in values], np.uint64),
        "content": np.array([_hash(v.tobytes(), t.tobytes()) for v, t in zip(values, targets, strict=True)], np.uint64),
    }
    header = Header(name="toy", recipe="", licence="", source={}, max_length=1000, content=content, blocks=blocks)
    return Manifest(header=header, columns=columns), reader


def frames_table(n: int = 200, width: int = 3, *, seed: int = 0, **options: Any) -> tuple[Manifest, MemoryRows]:
    """Rows of noise, with a label of two by chance unless `options` say otherwise."""
    rng = np.random.default_rng(seed)
    values = [rng.normal(size=(int(rng.integers(2, 9)), width)).astype(np.float32) for _ in range(n)]
    options = {"label": rng.integers(0, 2, n).tolist(), "labels": ("no", "yes")} | options
    return table(values, channels=[f"c{i}" for i in range(width)], **options)


def tokens_table(n: int = 200, *, seed: int = 0, num_symbols: int = 30, **options: Any) -> tuple[Manifest, MemoryRows]:
    """Rows of symbols by chance, with a label of two by chance unless `options` say otherwise."""
    rng = np.random.default_rng(seed)
    values = [rng.integers(0, num_symbols, int(rng.integers(4, 12))).astype(np.int32) for _ in range(n)]
    options = {"label": rng.integers(0, 2, n).tolist(), "labels": ("no", "yes")} | options
    return table(values, symbols=[f"s{i:03d}" for i in range(num_symbols)], **options)

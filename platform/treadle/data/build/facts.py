"""What is known of each row without its values: numbers and hashes, about 80 bytes a row, the only thing kept of all.

Hashes are xxh3_64 and do not depend on ids or on how a source is cut: of an entity or group its UTF-8; of inputs the
bytes of frames, or of the hashes of a row's symbols, and with that as the seed of its gaps where there are any; of
content the hash of inputs with that of the targets.

Shape letters: R rows, N frames of all rows laid end to end, D channels, U targets of all rows so, K values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from treadle.data.chunk import Chunk
from treadle.data.manifest import ROW_SCHEMA
from treadle.data.mixing import splitmix64
from treadle.data.order import starts_of
from treadle.spec import TargetPer

__all__ = ["FACTS", "Hashes", "chunk_facts", "gaps_of", "hash_texts"]

FACTS = pa.schema(
    [
        *ROW_SCHEMA,
        pa.field("id", pa.uint64()),
        pa.field("text", pa.uint32()),
        pa.field("place", pa.uint32()),
        pa.field("number", pa.int64()),
        pa.field("file", pa.int32()),
    ]
)
"""Columns of a part's facts: those of a manifest; and hash of the id (0: none), bytes of the entity, place in the part
in the order of the source, number in its file, and which file."""

Hashes = NDArray[np.uint64]


def hash_texts(texts: pa.StringArray) -> Hashes:
    """xxh3_64 of each text's UTF-8. Cost: 0.1 us per text."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, texts.cast(pa.binary()).to_pylist()), np.uint64, len(texts))


def gaps_of(times_N: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Time since the frame before, 0 for the first of each row."""
    gaps_N = np.diff(times_N, prepend=times_N[:1])
    gaps_N[starts[:-1]] = 0
    return gaps_N.astype(np.float32)


def chunk_facts(
    chunk: Chunk, gaps_N: NDArray[np.float32] | None, *, per: TargetPer | None, tables: tuple[Hashes, Hashes]
) -> dict[str, NDArray[Any]]:
    """The columns of `FACTS` of a chunk of checked rows, but no `label_frames`, `text`, `place` and `file`.

    Args:
        gaps_N: of a timed chunk.
        per: of labels; None where targets are no labels.
        tables: hashes of the chunk's symbols and of its labels, by id. The column `label` holds such ids.

    Cost: 0.5 us per row beside the bytes (13 GB/s).
    """
    starts, target_starts = starts_of(chunk.lengths_R), starts_of(chunk.target_lengths_R)
    rows, entity = chunk.num_rows, hash_texts(chunk.entity_R)
    inputs = _hash_inputs(chunk, gaps_N, starts, tables[0])
    targets = _hash_targets(chunk, target_starts, per, tables[1])
    return {
        "length": chunk.lengths_R.astype(np.uint32),
        "targets": chunk.target_lengths_R.astype(np.uint32),
        "label_frames": _label_frames(chunk.targets, target_starts, per),
        "label": chunk.targets.astype(np.int32) if per is TargetPer.row else np.full(rows, -1, np.int32),
        "weight": chunk.weight_R,
        "time": chunk.time_R,
        "last": np.full(rows, np.nan) if chunk.times_N is None else chunk.times_N[starts[1:] - 1],
        "entity": entity,
        "group": entity if chunk.group_R is None else hash_texts(chunk.group_R),
        "inputs": inputs,
        "content": splitmix64(inputs ^ splitmix64(targets)),
        "split": chunk.split_R.astype(np.uint8),  # -1 becomes NO_SPLIT
        "id": np.zeros(rows, np.uint64) if chunk.id_R is None else hash_texts(chunk.id_R),
        "number": chunk.number_R,
    }


def _hash_inputs(chunk: Chunk, gaps_N: NDArray[np.float32] | None, starts: NDArray[np.int64], table: Hashes) -> Hashes:
    values = chunk.inputs if chunk.inputs.ndim == 2 else table[chunk.inputs]
    hashes = _hash_rows(values, starts)
    return hashes if gaps_N is None else _hash_rows(gaps_N, starts, seeds=hashes)


def _hash_targets(chunk: Chunk, starts: NDArray[np.int64], per: TargetPer | None, table: Hashes) -> Hashes:
    if per is None:
        is_none = not len(chunk.targets)
        return np.zeros(chunk.num_rows, np.uint64) if is_none else _hash_rows(chunk.targets, starts)
    hashes = np.append(table, np.uint64(0))[chunk.targets]  # -1, no label, takes the last
    return hashes if per is TargetPer.row else _hash_rows(hashes, starts)


def _hash_rows(values: NDArray[Any], starts: NDArray[np.int64], *, seeds: Hashes | None = None) -> Hashes:
    """xxh3_64 of each row's bytes. Cost: 0.2 us per row; a loop of `map` alone, which runs no Python code."""
    values = np.ascontiguousarray(values)
    width = values.itemsize * (values.shape[1] if values.ndim == 2 else 1)
    raw = values.reshape(-1).view(np.uint8).data
    bounds = (starts * width).tolist()
    rows = map(raw.__getitem__, map(slice, bounds, bounds[1:]))
    more = () if seeds is None else (seeds.tolist(),)
    return np.fromiter(map(xxhash.xxh3_64_intdigest, rows, *more), np.uint64, len(starts) - 1)


def _label_frames(targets: NDArray[Any], starts: NDArray[np.int64], per: TargetPer | None) -> NDArray[np.uint32]:
    """Frames that a CTC alignment needs: one for each label, and a blank between equal neighbours."""
    if per is not TargetPer.sequence:
        return np.zeros(len(starts) - 1, np.uint32)
    again = np.zeros(len(targets) + 1, np.int64)
    np.cumsum(np.diff(targets, prepend=-1) == 0, out=again[1:])
    first = np.minimum(starts[:-1] + 1, starts[1:])  # the first of a row has no neighbour in it
    return (np.diff(starts) + again[starts[1:]] - again[first]).astype(np.uint32)

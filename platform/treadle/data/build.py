"""From a draft to shards and a manifest.

A shard is an Arrow IPC file; each record batch in it is one block of rows of like length, so that
a microbatch reads few blocks and copies near-equal rows. Shards are named by their content and
never overwritten, the manifest comes last: a killed build leaves nothing that reads as a data set.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from treadle.data.draft import SPLITS, Draft, Frames, Row, Tokens, assign_splits
from treadle.data.manifest import Block, Header, Manifest, Preprocessing
from treadle.errors import ConflictError, DataError
from treadle.spec import DataSpec

__all__ = ["Shelf", "build_dataset"]

UNKNOWN = "<unknown>"
BLOCK_BYTES = 1 << 20
SHARD_BYTES = 64 << 20
_MAX_PROBLEMS = 20


class Shelf(Protocol):
    """The part of a blob store that building needs."""

    def create(self, key: str, data: bytes) -> Any: ...
    def head(self, key: str) -> Any: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class _Encoded:
    row: Row
    split: str
    values: NDArray[Any]
    labels: NDArray[np.int32]
    length: int


def build_dataset(
    draft: Draft,
    spec: DataSpec,
    shelf: Shelf,
    *,
    recipe: str,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> tuple[str, Manifest]:
    """Write `draft` below `data/<name>/` and return the digest and manifest of the data set.

    Args:
        recipe: digest of what the data set was made by, kept in the manifest.
        progress: called with (stage, rows done, rows in all).

    Raises:
        DataError: rows that cannot be used, all of them listed (up to 20), or a leak between splits.
    """
    rows = list(draft.rows)
    if not rows:
        raise DataError(f"data.{spec.name}: the preparation script gave no rows")
    placed = _place(rows, spec)
    train = [row for row, split in placed if split == "train"]
    preprocessing = _fit(draft, train)
    encoded = _encode(placed, draft, preprocessing, spec, progress)
    _audit(encoded)
    encoded.sort(key=lambda e: (SPLITS.index(e.split), e.length, e.row.entity))
    blocks, spots = _write_shards(encoded, spec, shelf, preprocessing, progress)
    header = Header(
        name=spec.name,
        recipe=recipe,
        licence=draft.licence,
        source=dict(draft.source),
        max_length=spec.max_length,
        preprocessing=preprocessing,
        blocks=tuple(blocks),
    )
    manifest = Manifest(header=header, columns=_columns(encoded, spots))
    data = manifest.to_bytes()
    digest = hashlib.sha256(data).hexdigest()
    _create_once(shelf, f"data/{spec.name}/manifests/{digest}.arrow", data)
    return digest, manifest


def _place(rows: Sequence[Row], spec: DataSpec) -> list[tuple[Row, str]]:
    """Each kept row with its split: the source's where it says one, else by hash of the entity."""
    if wrong := sorted({row.split for row in rows if row.split is not None} - set(SPLITS)):
        raise DataError(f"split: got {', '.join(map(repr, wrong))}, expected one of {', '.join(SPLITS)}, or none")
    given = {row.entity: row.split for row in rows if row.split is not None and row.split != "train"}
    free = {row.entity for row in rows} - given.keys()
    try:
        test = 0 if given else spec.test
        splits = assign_splits(free, valid=spec.valid, test=test, limit=spec.limit, seed=spec.seed)
    except ValueError as error:
        raise DataError(f"data: {error}", hint="smaller data.valid, data.test, or a larger data.limit") from None
    placed: list[tuple[Row, str]] = []
    for row in rows:
        split = row.split or given[row.entity] if row.entity in given else splits.get(row.entity)
        if split is not None:
            placed.append((row, split))
    return placed


def _fit(draft: Draft, train: Sequence[Row]) -> Preprocessing:
    if len(set(draft.labels)) != len(draft.labels) or not draft.labels:
        raise DataError("labels: expected at least one, each of them once")
    if isinstance(draft.inputs, Tokens):
        symbols = sorted({symbol for row in train for symbol in row.inputs})
        return Preprocessing(symbols=(UNKNOWN, *symbols), channels=(), mean=(), deviation=(), labels=draft.labels)
    # Rows that _encode will refuse do not matter here: nothing is written then.
    fine = [values for row in train if (values := _finite_frames(row, draft.inputs)) is not None]
    values = np.concatenate(fine or [np.zeros((1, len(draft.inputs.channels)))]).astype(np.float64)
    deviation = values.std(axis=0)
    return Preprocessing(
        symbols=(),
        channels=draft.inputs.channels,
        mean=tuple(float(v) for v in values.mean(axis=0)),
        deviation=tuple(float(v) if v > 0 else 1.0 for v in deviation),
        labels=draft.labels,
    )


def _encode(
    placed: Sequence[tuple[Row, str]],
    draft: Draft,
    preprocessing: Preprocessing,
    spec: DataSpec,
    progress: Callable[[str, int, int], None],
) -> list[_Encoded]:
    symbol_ids = {symbol: i for i, symbol in enumerate(preprocessing.symbols)}
    label_ids = {label: i for i, label in enumerate(preprocessing.labels)}
    encoded: list[_Encoded] = []
    problems: list[str] = []
    for number, (row, split) in enumerate(placed):
        try:
            if isinstance(draft.inputs, Tokens):
                values = np.array([symbol_ids.get(symbol, 0) for symbol in row.inputs], np.int32)
                length = len(values)
            else:
                values, length = _frames(row, draft.inputs)
            if not 1 <= length <= spec.max_length:
                raise ValueError(f"length: got {length}, expected 1 to data.max_length = {spec.max_length}")
            if isinstance(row.target, str):  # a problem of the row, listed with the others
                raise ValueError(f"target: got the text {row.target!r}, expected a list of labels, as [{row.target!r}]")  # noqa: TRY004
            labels = np.array([label_ids[label] for label in row.target], np.int32)
            if not len(labels):
                raise ValueError("target: got no label, expected at least one")
            encoded.append(_Encoded(row=row, split=split, values=values, labels=labels, length=length))
        except KeyError as error:
            problems.append(f"{row.where or repr(row.entity)}: label {error} is not among the {len(label_ids)} labels")
        except ValueError as error:
            problems.append(f"{row.where or repr(row.entity)}: {error}")
        if number % 20_000 == 0:
            progress("encode", number, len(placed))
    if problems:
        shown = "\n".join(problems[:_MAX_PROBLEMS])
        more = f"\n... and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        raise DataError(f"data.{spec.name}: {len(problems)} rows cannot be used\n{shown}{more}")
    return encoded


def _finite_frames(row: Row, inputs: Frames) -> NDArray[np.float32] | None:
    try:
        values, _ = _frames(row, inputs)
    except ValueError:
        return None
    return values.reshape(-1, len(inputs.channels))


def _frames(row: Row, inputs: Frames) -> tuple[NDArray[np.float32], int]:
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and said below
        values = np.asarray(row.inputs).astype(np.float32)
    if values.ndim != 2 or values.shape[1] != len(inputs.channels):
        raise ValueError(f"inputs: got shape {values.shape}, expected [T, {len(inputs.channels)}]")
    if not np.isfinite(values).all():
        step, channel = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"inputs: got {values[step, channel]} at time step {step}, channel {channel}")
    return values.reshape(-1), len(values)


def _audit(encoded: Sequence[_Encoded]) -> None:
    """No entity and no content in two splits."""
    for what, key in (
        ("entity", lambda e: e.row.entity),
        ("equal content", lambda e: (e.values.tobytes(), e.labels.tobytes())),
    ):
        seen: dict[Any, _Encoded] = {}
        for item in encoded:
            first = seen.setdefault(key(item), item)
            if first.split != item.split:
                raise DataError(
                    f"leak: {what} in two splits: {first.row.entity!r} in {first.split}, "
                    f"{item.row.entity!r} in {item.split}",
                    hint="give both rows one `entity`, or drop one of them",
                )


def _write_shards(
    encoded: Sequence[_Encoded],
    spec: DataSpec,
    shelf: Shelf,
    preprocessing: Preprocessing,
    progress: Callable[[str, int, int], None],
) -> tuple[list[Block], list[tuple[int, int]]]:
    """Blocks in order, and (block, row within it) of each encoded row."""
    value_type = pa.int32() if preprocessing.symbols else pa.float32()
    schema = pa.schema(
        [("values", pa.large_list(value_type)), ("labels", pa.list_(pa.int32())), ("entity", pa.string())]
    )
    blocks: list[Block] = []
    spots: list[tuple[int, int]] = []
    shard: list[pa.RecordBatch] = []
    shard_bytes = 0

    def flush() -> None:
        nonlocal shard, shard_bytes
        if shard:
            blocks.extend(_write_shard(shard, schema, spec, shelf))
            shard, shard_bytes = [], 0

    for number, group in enumerate(_groups(encoded)):
        batch = _record_batch(group, schema)
        spots += [(number, i) for i in range(len(group))]
        shard.append(batch)
        shard_bytes += batch.nbytes
        if shard_bytes >= SHARD_BYTES:
            flush()
        progress("write", len(spots), len(encoded))
    flush()
    return blocks, spots


def _groups(encoded: Sequence[_Encoded]) -> list[list[_Encoded]]:
    """Runs of one split of about BLOCK_BYTES each, in order."""
    groups: list[list[_Encoded]] = []
    size = 0
    for item in encoded:
        if not groups or size >= BLOCK_BYTES or groups[-1][0].split != item.split:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.values.nbytes + item.labels.nbytes
    return groups


def _record_batch(group: Sequence[_Encoded], schema: pa.Schema) -> pa.RecordBatch:
    def lists(arrays: list[NDArray[Any]], kind: type[Any], offset_type: pa.DataType) -> Any:
        offsets = np.cumsum([0, *(len(a) for a in arrays)])
        return kind.from_arrays(pa.array(offsets, offset_type), pa.array(np.concatenate(arrays)))

    values = lists([e.values for e in group], pa.LargeListArray, pa.int64())
    labels = lists([e.labels for e in group], pa.ListArray, pa.int32())
    return pa.record_batch([values, labels, pa.array([e.row.entity for e in group])], schema=schema)


def _write_shard(batches: Sequence[pa.RecordBatch], schema: pa.Schema, spec: DataSpec, shelf: Shelf) -> list[Block]:
    # The file is "ARROW1\0\0", the schema message, then the batches: their ranges are known while
    # writing, so that a reader needs one ranged read and no footer.
    sink = io.BytesIO()
    position = 8 + schema.serialize().size
    ranges: list[tuple[int, int]] = []
    with pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            ranges.append((position, sink.tell() - position))
            position = sink.tell()
    data = sink.getvalue()
    key = f"data/{spec.name}/shards/{xxhash.xxh3_128_hexdigest(data)}.arrow"
    _create_once(shelf, key, data)
    return [
        Block(
            key=key,
            offset=offset,
            size=size,
            rows=batch.num_rows,
            checksum=xxhash.xxh3_128_hexdigest(memoryview(data)[offset : offset + size]),
        )
        for batch, (offset, size) in zip(batches, ranges, strict=True)
    ]


def _columns(encoded: Sequence[_Encoded], spots: Sequence[tuple[int, int]]) -> dict[str, NDArray[Any]]:
    def entity(item: _Encoded) -> int:
        return xxhash.xxh3_64_intdigest(item.row.entity.encode())

    return {
        "split": np.array([SPLITS.index(e.split) for e in encoded], np.uint8),
        "length": np.array([e.length for e in encoded], np.uint32),
        "labels": np.array([len(e.labels) for e in encoded], np.uint32),
        # CTC needs one frame per label and a blank between equal neighbours.
        "label_frames": np.array(
            [len(e.labels) + int((e.labels[1:] == e.labels[:-1]).sum()) for e in encoded], np.uint32
        ),
        "block": np.array([block for block, _ in spots], np.uint32),
        "row": np.array([row for _, row in spots], np.uint32),
        "entity": np.array([entity(e) for e in encoded], np.uint64),
        # Equal inputs of one entity are one question with several accepted answers (train/evaluate.py).
        "inputs": np.array([xxhash.xxh3_64_intdigest(e.values.tobytes()) for e in encoded], np.uint64),
    }


def _create_once(shelf: Shelf, key: str, data: bytes) -> None:
    try:
        shelf.create(key, data)
    except ConflictError:
        found = shelf.head(key)  # the name is the content's: an equal object is there already
        if found is None or found.size_bytes != len(data):
            raise DataError(f"{key}: exists with other content", hint="delete it and prepare again") from None

"""Rows as they lie in a block: one Arrow record batch, written and read whole, nothing copied on the way in.

A shard is an Arrow IPC file: "ARROW1" and two zeros, the schema message, the record batches, a footer. Where each batch
lies is known while writing and kept in the manifest, so that reading takes one ranged read and no footer.

Shape letters: R rows, N frames, D channels, U targets, K values of a target.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from treadle.data.manifest import REBUILD, Block, Content
from treadle.errors import IntegrityError
from treadle.spec import TargetKind

__all__ = ["BlockRows", "checksum", "decode_block", "encode_shard", "schema_of", "shard_room"]

_BLOCK_ROOM = 8 << 10
"""Of messages, footer and padding, for each block, at most."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockRows:
    """Rows laid end to end.

    Args:
        values: int32 [N] of stored symbol ids, or float32 [N * D].
        value_offsets: int64 [R + 1] into `values`.
        targets: int32 [U] of stored label ids (-1: none), or float32 [U * K]; empty where there are no targets.
        target_offsets: int64 [R + 1] into `targets`.
        gaps_N: float32, time since the frame before (0 for the first of a row); None where rows have no times.
        entities: of each row.
    """

    values: NDArray[Any]
    value_offsets: NDArray[np.int64]
    targets: NDArray[Any]
    target_offsets: NDArray[np.int64]
    gaps_N: NDArray[np.float32] | None
    entities: pa.StringArray

    @property
    def num_rows(self) -> int:
        return len(self.value_offsets) - 1


def schema_of(content: Content) -> pa.Schema:
    """The columns of a shard that holds such rows."""
    fields = [
        ("values", pa.large_list(pa.float32() if content.channels else pa.int32())),
        ("targets", pa.large_list(pa.float32() if content.target is TargetKind.values else pa.int32())),
        ("entity", pa.string()),
    ]
    if content.timed:
        fields.append(("gaps", pa.large_list(pa.float32())))
    return pa.schema(fields)


def checksum(raw: Any) -> str:
    """xxh3_128 of some bytes: Arrow itself accepts a flipped byte."""
    return xxhash.xxh3_128_hexdigest(raw)


def encode_shard(blocks: Iterable[BlockRows], content: Content, room: Any = None) -> tuple[Any, list[Block]]:
    """The bytes of a shard, and its blocks with an empty key.

    Args:
        blocks: each is read before the next is asked for.
        room: memory for the shard, writable; None: it is made.

    Returns:
        Bytes; or a view of `room`, where that was given.

    Raises:
        ValueError: more than `room` holds.

    Cost: one copy of what the blocks hold.
    """
    schema = schema_of(content)
    width = len(content.channels) or 1
    sink = pa.BufferOutputStream() if room is None else pa.FixedSizeBufferWriter(pa.py_buffer(room))
    position = 8 + schema.serialize().size
    found: list[tuple[int, int, int, int]] = []
    try:
        with pa.ipc.new_file(sink, schema) as writer:
            for rows in blocks:
                writer.write_batch(_record_batch(rows, schema, width))
                longest = int(np.diff(rows.value_offsets).max()) // width
                found.append((position, sink.tell() - position, rows.num_rows, longest))
                position = sink.tell()
        end = sink.tell()
    except OSError as error:
        raise ValueError(f"a shard larger than its room ({error})") from None
    data = sink.getvalue().to_pybytes() if room is None else memoryview(room)[:end]
    view = memoryview(data)
    return data, [
        Block(key="", offset=at, size=size, rows=rows, longest=longest, checksum=checksum(view[at : at + size]))
        for at, size, rows, longest in found
    ]


def shard_room(num_rows: int, num_bytes: int, num_blocks: int) -> int:
    """Bytes that a shard takes at most.

    Args:
        num_rows: of all blocks. num_bytes: of their values, targets, gaps and entities.
    """
    return num_bytes + num_rows * 32 + (num_blocks + 1) * _BLOCK_ROOM


def _record_batch(rows: BlockRows, schema: pa.Schema, width: int) -> pa.RecordBatch:
    def lists(offsets: NDArray[np.int64], values: NDArray[Any]) -> pa.LargeListArray:
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))

    columns: list[Any] = [
        lists(rows.value_offsets, rows.values),
        lists(rows.target_offsets, rows.targets),
        rows.entities,
    ]
    if rows.gaps_N is not None:
        columns.append(lists(rows.value_offsets // width, rows.gaps_N))
    return pa.record_batch(columns, schema=schema)


def decode_block(raw: Any, block: Block, content: Content) -> BlockRows:
    """The rows of a block, as views of its bytes.

    Args:
        raw: exactly the block's bytes, an object with the buffer protocol.

    Raises:
        IntegrityError: other bytes than were written, or no block of such rows; the message names shard and place.
    """
    where = f"{block.key}, bytes {block.offset} to {block.offset + block.size}"
    if len(memoryview(raw)) != block.size or checksum(raw) != block.checksum:
        raise IntegrityError(f"{where}: not what was written (checksum)", hint=REBUILD)
    try:
        batch = pa.ipc.read_record_batch(pa.py_buffer(raw), schema_of(content))
        rows = BlockRows(
            values=batch.column("values").values.to_numpy(),
            value_offsets=batch.column("values").offsets.to_numpy(),
            targets=batch.column("targets").values.to_numpy(),
            target_offsets=batch.column("targets").offsets.to_numpy(),
            gaps_N=batch.column("gaps").values.to_numpy() if content.timed else None,
            entities=batch.column("entity"),
        )
    except (pa.ArrowException, OSError, ValueError) as error:
        raise IntegrityError(f"{where}: not a block ({error})", hint=REBUILD) from None
    if rows.num_rows != block.rows:
        raise IntegrityError(f"{where}: got {rows.num_rows} rows, expected {block.rows}", hint=REBUILD)
    return rows

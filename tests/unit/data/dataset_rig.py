"""A small data set as a build leaves it in a store, written without one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from treadle import wire
from treadle.data.blocks import BlockRows, checksum, encode_shard
from treadle.data.manifest import NO_SPLIT, Block, Content, Header, Manifest, Preprocessing
from treadle.spec import TargetKind, TargetPer
from treadle.testing.memory import MemoryBlobs

CONTENT = Content(
    symbols=(),
    channels=("hr", "spo2"),
    target=TargetKind.labels,
    target_per=TargetPer.row,
    labels=("died", "lived"),
    value_names=(),
    missing=False,
    timed=False,
)
LENGTHS = [1, 2, 2, 3, 5, 8, 13, 40]
SPLITS = [0, 0, 0, 1, 0, 2, 2, NO_SPLIT]
LABELS = [0, 1, 1, 1, 1, 0, 1, 1]


def block_rows(lengths: list[int], labels: list[int]) -> BlockRows:
    width, rows = len(CONTENT.channels), len(lengths)
    return BlockRows(
        values=np.arange(sum(lengths) * width, dtype=np.float32),
        value_offsets=np.cumsum([0, *lengths], dtype=np.int64) * width,
        targets=np.array(labels, np.int32),
        target_offsets=np.arange(rows + 1, dtype=np.int64),
        gaps_N=None,
        entities=pa.array([f"e{length}" for length in lengths], pa.string()),
    )


def write_dataset(blobs: MemoryBlobs, *, name: str = "icu", made_at: str = "", **changes: Any) -> tuple[Manifest, str]:
    """Two shards of two blocks each, and their manifest."""
    blocks: list[Block] = []
    for start in (0, 4):
        cuts = [(start, start + 2), (start + 2, start + 4)]
        data, found = encode_shard((block_rows(LENGTHS[a:b], LABELS[a:b]) for a, b in cuts), CONTENT)
        key = f"data/{name}/shards/{checksum(data)}.arrow"
        blobs.put(key, data)
        blocks += [Block(**{**vars(block), "key": key}) for block in found]
    header = Header(
        **{
            "name": name,
            "recipe": "r" * 64,
            "licence": "made up",
            "source": {"a.parquet": "0" * 64},
            "max_length": 100,
            "content": CONTENT,
            "blocks": tuple(blocks),
            "preprocessing": Preprocessing(
                symbols=(), channels=("hr", "spo2"), mean=(80.0, 97.0), deviation=(10.0, 2.0), labels=CONTENT.labels,
                fitted_rows=4,
            ),
            "split": {"by": "entity"},
            "dropped": {"purged": 1},
            **changes,
        }
    )  # fmt: skip
    rows = len(LENGTHS)
    columns: dict[str, Any] = {
        "split": np.array(SPLITS, np.uint8),
        "length": np.array(LENGTHS, np.uint32),
        "targets": np.ones(rows, np.uint32),
        "label_frames": np.zeros(rows, np.uint32),
        "label": np.array(LABELS, np.int32),
        "weight": np.ones(rows, np.float32),
        "time": np.full(rows, np.nan),
        "last": np.full(rows, np.nan),
        **{column: np.arange(rows, dtype=np.uint64) for column in ("entity", "group", "inputs", "content")},
    }
    manifest = Manifest(header=header, columns=columns)
    data = manifest.to_bytes()
    digest = wire.digest(data)
    blobs.put(f"data/{name}/manifests/{digest}.arrow", data)
    note = {"digest": digest} | ({"made_at": made_at} if made_at else {})
    blobs.put(f"data/{name}/recipes/{wire.digest(note)}.json", wire.canonical(note))
    return manifest, digest

"""Small data sets in blocks, made without a build, and what should be read of them by plain loops."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pyarrow as pa

from treadle.data.blocks import BlockRows, encode_shard
from treadle.data.load.batch import Batch, Form
from treadle.data.manifest import Content, Header, Manifest, Preprocessing
from treadle.spec import Missing, TargetKind, TargetPer

SYMBOLS, KNOWN = tuple("abcdef"), ("<unknown>", "b", "d", "f")
LABELS, MODEL_LABELS = ("x", "y", "z"), ("z", "x", "y")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Toy:
    """A data set and the rows that went into it, by row number."""

    manifest: Manifest
    inputs: list[np.ndarray]
    gaps: list[np.ndarray]
    targets: list[np.ndarray]
    shards: dict[str, bytes]

    def write(self, blobs: Any) -> Any:
        for key, data in self.shards.items():
            blobs.put(key, data)
        return blobs


def toy(
    num_rows: int = 200,
    *,
    channels: int = 3,
    missing: Missing = Missing.refuse,
    timed: bool = False,
    gap: bool = False,
    target: TargetKind = TargetKind.labels,
    per: TargetPer = TargetPer.row,
    num_values: int = 2,
    rows_per_block: int = 9,
    blocks_per_shard: int = 4,
    longest: int = 30,
    seed: int = 0,
) -> Toy:
    """Random rows, sorted by length; `channels` 0 makes symbols."""
    rng = np.random.default_rng(seed)
    lengths_R = np.sort(rng.integers(1, longest + 1, num_rows))
    content = Content(
        symbols=() if channels else SYMBOLS,
        channels=tuple(f"c{i}" for i in range(channels)),
        target=target,
        target_per=per,
        labels=LABELS if target is TargetKind.labels else (),
        value_names=tuple(f"v{i}" for i in range(num_values)) if target is TargetKind.values else (),
        missing=missing is not Missing.refuse,
        timed=timed,
    )
    inputs, gaps, targets = [], [], []
    for length in lengths_R.tolist():
        if channels:
            frames = rng.normal(3, 2, (length, channels)).astype(np.float32)
            frames[rng.random(frames.shape) < (0.3 if content.missing else 0.0)] = np.nan
            inputs.append(frames)
        else:
            inputs.append(rng.integers(0, len(SYMBOLS), (length, 1)).astype(np.int32))
        gap_T = rng.exponential(2, length).astype(np.float32)
        gap_T[0] = 0
        gaps.append(gap_T)
        count = {TargetPer.row: 1, TargetPer.frame: length, TargetPer.sequence: int(rng.integers(1, 6))}[per]
        if target is TargetKind.values:
            targets.append(rng.normal(size=(count, num_values)).astype(np.float32))
        elif target is TargetKind.labels:
            low = -1 if per is TargetPer.frame else 0
            targets.append(rng.integers(low, len(LABELS), (count, 1)).astype(np.int32))
        else:
            targets.append(np.zeros((0, 1), np.int32))

    def offsets(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([[0], np.cumsum([part.size for part in parts])]).astype(np.int64)

    shards, blocks = {}, []
    edges = [*range(0, num_rows, rows_per_block), num_rows]
    ranges = list(itertools.pairwise(edges))
    for shard in range(0, len(ranges), blocks_per_shard):
        key = f"data/toy/shards/s{shard}.arrow"
        parts = [
            BlockRows(
                values=np.concatenate(inputs[a:b]).reshape(-1),
                value_offsets=offsets(inputs[a:b]),
                targets=np.concatenate(targets[a:b]).reshape(-1),
                target_offsets=offsets(targets[a:b]),
                gaps_N=np.concatenate(gaps[a:b]) if timed else None,
                entities=pa.array([f"e{row}" for row in range(a, b)], pa.string()),
            )
            for a, b in ranges[shard : shard + blocks_per_shard]
        ]
        shards[key], found = encode_shard(parts, content)
        blocks += [dataclasses.replace(block, key=key) for block in found]
    preprocessing = Preprocessing(
        symbols=() if channels else KNOWN,
        channels=content.channels,
        mean=tuple(rng.normal(3, 1, channels).tolist()),
        deviation=tuple(rng.uniform(0.5, 2, channels).tolist()),
        labels=MODEL_LABELS if target is TargetKind.labels else (),
        missing=missing,
        gap=(0.7, 0.4) if gap else (),
    )
    header = Header(
        name="toy",
        recipe="",
        licence="none",
        source={},
        max_length=longest,
        content=content,
        blocks=tuple(blocks),
        preprocessing=preprocessing,
    )
    label_R = [int(t[0, 0]) if target is TargetKind.labels and per is TargetPer.row else -1 for t in targets]
    columns = {
        "split": np.zeros(num_rows, np.uint8),
        "length": lengths_R.astype(np.uint32),
        "targets": np.array([len(t) for t in targets], np.uint32),
        "label": np.array(label_R, np.int32),
        "weight": rng.uniform(0.5, 2, num_rows).astype(np.float32),
    }
    return Toy(
        manifest=Manifest(header=header, columns=columns), inputs=inputs, gaps=gaps, targets=targets, shards=shards
    )


def expected_frames(data: Toy, row: int) -> np.ndarray:
    """What a model reads of a row, a frame at a time."""
    p = data.manifest.preprocessing
    if p.symbols:
        known = {name: i for i, name in enumerate(p.symbols)}
        return np.array([known.get(SYMBOLS[i], 0) for i in data.inputs[row][:, 0]], np.int64)
    mean, inverse = np.array(p.mean, np.float32), (1 / np.array(p.deviation)).astype(np.float32)
    found = []
    for t, frame in enumerate(data.inputs[row]):
        scaled = (frame - mean) * inverse
        parts = [np.where(np.isnan(frame), np.float32(0), scaled) if p.missing is not Missing.refuse else scaled]
        if p.missing is Missing.indicator:
            parts.append((~np.isnan(frame)).astype(np.float32))
        if p.gap:
            gap = (np.log1p(data.gaps[row][t]) - np.float32(p.gap[0])) / np.float32(p.gap[1])
            parts.append(np.array([gap], np.float32))
        found.append(np.concatenate(parts))
    return np.array(found, np.float32)


def expected(
    data: Toy,
    rows: list[int],
    form: Form,
    spans: list[tuple[int, int]] | None = None,
    steps: int = 0,
) -> Batch:
    """The batch by plain loops."""
    content = data.manifest.header.content
    spans = spans or [(0, len(data.inputs[row])) for row in rows]
    lengths = [stop - start for start, stop in spans]
    width = max(steps, *lengths)

    def laid(parts: list[np.ndarray], fill: float, *, padded: bool) -> np.ndarray:
        if not padded:
            return np.concatenate(parts)
        out = np.full((len(parts), width, *parts[0].shape[1:]), fill, parts[0].dtype)
        for i, part in enumerate(parts):
            out[i, : len(part)] = part
        return out

    def cut(parts: list[np.ndarray]) -> list[np.ndarray]:
        return [part[start:stop] for part, (start, stop) in zip(parts, spans, strict=True)]

    ids = np.array([*(MODEL_LABELS.index(name) for name in LABELS), -1])
    labels_BU, label_lengths_B, values = np.zeros((len(rows), 0), np.int64), np.zeros(len(rows), np.int64), None
    targets = [data.targets[row] for row in rows]
    if content.target_per is TargetPer.frame:
        targets = cut(targets)
    if content.target is TargetKind.values:
        values = (
            laid(targets, np.nan, padded=True) if content.target_per is TargetPer.frame else np.concatenate(targets)
        )
    elif content.target is TargetKind.labels:
        label_lengths_B = np.array([len(t) for t in targets], np.int64)
        most = width if content.target_per is TargetPer.frame else int(label_lengths_B.max())
        labels_BU = np.full((len(rows), most), -1 if content.target_per is TargetPer.frame else 0, np.int64)
        for i, t in enumerate(targets):
            labels_BU[i, : len(t)] = ids[t[:, 0]]
    padded = form is Form.padded
    return Batch(
        inputs=laid(cut([expected_frames(data, row) for row in rows]), 0, padded=padded),
        lengths_B=np.array(lengths, np.int64),
        labels_BU=labels_BU,
        label_lengths_B=label_lengths_B,
        rows_B=np.array(rows, np.int64),
        weights_B=data.manifest.columns["weight"][rows],
        values=values,
        gaps=laid(cut([data.gaps[row] for row in rows]), 0, padded=padded) if content.timed else None,
        form=form,
    )


def assert_same(got: Batch, wanted: Batch) -> None:
    """Bit for bit, and writable."""
    for name, mine, theirs in zip(Batch._fields, got, wanted, strict=True):
        if isinstance(theirs, np.ndarray):
            assert mine.dtype == theirs.dtype, name
            np.testing.assert_array_equal(mine, theirs, err_msg=name)
            assert mine.flags.writeable, name
        else:
            assert mine is theirs, name

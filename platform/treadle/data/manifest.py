"""The manifest of a data set: what is where, with lengths, checksums, splits and fitted statistics.

One Arrow file. Its sha256 is the data set's identity; it is written last, so that a data set either is whole or does
not exist. Rows are numbered as they lie in the blocks, so that no column says where a row is. Shards hold all rows as
they are read from the source; which of them is trained on, and how values are scaled, is said here, so that another
split of the same rows writes no shard.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from treadle import wire
from treadle.data.draft import SPLITS
from treadle.errors import IntegrityError
from treadle.plan import DataCard, SplitCard
from treadle.spec import InputKind, Leak, Missing, Signature, TargetKind, TargetPer

__all__ = [
    "COLUMNS",
    "NO_SPLIT",
    "REBUILD",
    "ROW_SCHEMA",
    "Block",
    "Content",
    "Finding",
    "Header",
    "Manifest",
    "Preprocessing",
]

SCHEMA = 2
NO_SPLIT = 255
"""In the column `split`: a row that is in no split, such as one that was purged."""

ROW_SCHEMA = pa.schema(
    [
        ("split", pa.uint8()),
        ("length", pa.uint32()),
        ("targets", pa.uint32()),
        ("label_frames", pa.uint32()),
        ("label", pa.int32()),
        ("weight", pa.float32()),
        ("time", pa.float64()),
        ("last", pa.float64()),
        ("entity", pa.uint64()),
        ("group", pa.uint64()),
        ("inputs", pa.uint64()),
        ("content", pa.uint64()),
    ]
)
COLUMNS = tuple(ROW_SCHEMA.names)
"""Names of what is kept of each row."""
REBUILD = "build the data set again: treadle data build JOB --again"
"""The hint where stored bytes are not what was written: it writes anew what is damaged or gone, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One record batch in a shard: the unit of reading and of checking. Its rows are sorted by length.

    Args:
        key: of the shard. offset, size: bytes of the batch in it.
        rows: how many. longest: frames of its last row.
        checksum: xxh3_128 of the bytes, hexadecimal.
    """

    key: str
    offset: int
    size: int
    rows: int
    longest: int
    checksum: str


@dataclass(frozen=True, kw_only=True)
class Content:
    """What the values in the shards mean, whatever the split.

    Args:
        symbols: by stored id, sorted, for tokens; else ().
        channels: of a frame; else ().
        target, target_per: what a target is made of, and whether of the row, of each frame, or a sequence.
        labels: by stored id; () for values. value_names: of values; else ().
        missing: whether frames may hold NaN. timed: whether rows hold gaps.
    """

    symbols: tuple[str, ...]
    channels: tuple[str, ...]
    target: TargetKind
    target_per: TargetPer
    labels: tuple[str, ...]
    value_names: tuple[str, ...]
    missing: bool
    timed: bool


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How stored values become what a model reads; fitted on training rows only.

    Travels in the manifest and in the model version, so that serving does what training did.

    Args:
        symbols: vocabulary of the model in id order for tokens (id 0 is what training never saw), else ().
        channels, mean, deviation: per channel for frames, over observed values, else ().
        labels: in id order; CTC adds its blank in front. () where targets are no labels.
        missing: what becomes of NaN.
        gap: (mean, deviation) of log(1 + gap) where the model reads the gaps; else ().
        values: (mean, deviation) of each target value, by name; else ().
        fitted_rows: how many rows it was fitted on.
    """

    symbols: tuple[str, ...]
    channels: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    labels: tuple[str, ...]
    missing: Missing = Missing.refuse
    gap: tuple[float, ...] = ()
    values: tuple[tuple[float, float], ...] = ()
    fitted_rows: int = 0

    @property
    def input_size(self) -> int:
        """Symbols, or channels that the model reads."""
        if self.symbols:
            return len(self.symbols)
        return len(self.channels) * (2 if self.missing is Missing.indicator else 1) + bool(self.gap)

    def signature(self, max_length: int) -> Signature:
        return Signature(
            input_kind=InputKind.tokens if self.symbols else InputKind.frames,
            input_size=self.input_size,
            num_labels=len(self.labels),
            max_length=max_length,
        )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the leakage audit found of one kind.

    Args:
        leak: the kind. accepted: whether the job allows it.
        detail: one line for people: how many, and the first of them.
    """

    leak: Leak
    accepted: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Header:
    """Everything of a manifest that is not a column.

    Args:
        name: of the data set. recipe: digest of what it was made by.
        licence, source: of the data: a line for people, sha256 by file name.
        max_length: longest row accepted.
        content: what the shards hold. blocks: where, in the order of the rows.
        preprocessing: fitted on training rows; None in a table of rows that is not split yet.
        split: the split spec as JSON, for people; {} before.
        dropped: rows in no split, by reason.
        findings: of the audit; all accepted, or there would be no manifest.
        set_aside: rows in quarantine. quarantine: key of their file, or "".
    """

    name: str
    recipe: str
    licence: str
    source: dict[str, str]
    max_length: int
    content: Content
    blocks: tuple[Block, ...]
    preprocessing: Preprocessing | None = None
    split: dict[str, Any] | None = None
    dropped: dict[str, int] | None = None
    findings: tuple[Finding, ...] = ()
    set_aside: int = 0
    quarantine: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """Rows by number, in the order of the blocks.

    Columns: split (place in SPLITS, or NO_SPLIT), length (frames), targets (how many), label_frames (frames that a CTC
    alignment needs), label (id of a label per row, else -1), weight, time (of asking, NaN without), last (time of the
    last frame, NaN without), and hashes of entity, group, inputs, and content (inputs and targets).
    """

    header: Header
    columns: dict[str, NDArray[Any]]

    @property
    def num_rows(self) -> int:
        return len(self.columns["length"])

    @property
    def preprocessing(self) -> Preprocessing:
        """Of a data set that is split."""
        assert self.header.preprocessing is not None
        return self.header.preprocessing

    @cached_property
    def block_starts(self) -> NDArray[np.int64]:
        """The first row of each block, and the number of rows: [blocks + 1]."""
        return np.cumsum([0, *(block.rows for block in self.header.blocks)], dtype=np.int64)

    def to_bytes(self) -> bytes:
        meta = {b"treadle": wire.record("dataset", SCHEMA, self.header)}
        arrays = [pa.array(self.columns[field.name], type=field.type) for field in ROW_SCHEMA]
        batch = pa.record_batch(arrays, schema=ROW_SCHEMA.with_metadata(meta))
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str, digest: str) -> Manifest:
        """The manifest in `data`.

        Raises:
            IntegrityError: other bytes than `digest` says, or not a manifest of a known schema.
        """
        if wire.digest(data) != digest:
            raise IntegrityError(f"{where}: got sha256 {wire.digest(data)[:12]}, expected {digest[:12]}", hint=REBUILD)
        try:
            table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
            meta = table.schema.metadata[b"treadle"]
            table.validate(full=True)
            if not table.schema.equals(ROW_SCHEMA) or any(column.null_count for column in table.columns):
                raise ValueError("other columns than a manifest has, or nulls in them")
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{where}: not a manifest ({error})", hint=REBUILD) from None
        header = wire.unrecord(Header, meta, kind="dataset", schema=SCHEMA, where=where)
        manifest = cls(header=header, columns={name: table.column(name).to_numpy() for name in table.column_names})
        if wrong := [*_wrong_blocks(header), *_wrong_rows(manifest)]:
            raise IntegrityError("\n".join(f"{where}: {what}" for what in wrong[:20]), hint=REBUILD)
        return manifest

    def rows_of(self, split: str) -> NDArray[np.int64]:
        """The row numbers of a split."""
        return np.flatnonzero(self.columns["split"] == SPLITS.index(split))

    def card(self, digest: str) -> DataCard:
        """What planning needs to know of this data set."""
        splits = {}
        for name in SPLITS:
            rows = self.rows_of(name)
            splits[name] = SplitCard(
                lengths_N=self.columns["length"][rows].astype(np.int64),
                targets_N=self.columns["targets"][rows].astype(np.int64),
                label_frames_N=self.columns["label_frames"][rows].astype(np.int64),
                labels_N=self.columns["label"][rows].astype(np.int64),
                weights_N=self.columns["weight"][rows],
                num_entities=len(np.unique(self.columns["entity"][rows])),
            )
        header = self.header
        signature = self.preprocessing.signature(header.max_length)
        return DataCard(
            name=header.name,
            digest=digest,
            signature=signature,
            target=header.content.target,
            target_per=header.content.target_per,
            splits=splits,
        )


def _wrong_blocks(header: Header) -> list[str]:
    """What no build would have written about blocks: places outside of the data set's own shards, or twice used."""
    wrong: list[str] = []
    own = re.compile(rf"data/{re.escape(header.name)}/shards/[0-9a-f]{{32}}\.arrow")
    spans: defaultdict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for number, block in enumerate(header.blocks):
        if not own.fullmatch(block.key):
            wrong.append(
                f"block {number}: got the shard {block.key!r}, expected data/{header.name}/shards/<checksum>.arrow"
            )
        least = (("offset", 0), ("size", 1), ("rows", 1), ("longest", 1))
        wrong += [
            f"block {number}: got {name} {getattr(block, name)}, expected {lowest} or more"
            for name, lowest in least
            if getattr(block, name) < lowest
        ]
        spans[block.key].append((block.offset, block.offset + block.size, number))
    for key, found in spans.items():
        found.sort()
        for (_, stop, first), (start, _, second) in pairwise(found):
            if start < stop:
                wrong.append(f"blocks {first} and {second} overlap in {key}, expected each in a place of its own")
    return wrong


def _wrong_rows(manifest: Manifest) -> list[str]:
    """Where columns and blocks do not speak of the same rows."""
    lengths, starts = manifest.columns["length"].astype(np.int64), manifest.block_starts
    if starts[-1] != len(lengths) or (np.diff(starts) < 1).any():
        return [f"got {len(lengths)} rows, expected {starts[-1]} as the blocks say"]
    wrong = []
    if len(lengths) and lengths.min() < 1:
        wrong.append(f"row {int(lengths.argmin())}: got length {lengths.min()}, expected 1 or more")
    falls = np.flatnonzero(np.diff(lengths) < 0) + 1
    if len(falls := np.setdiff1d(falls, starts)):
        wrong.append(f"row {falls[0]}: got a row shorter than the one before, expected blocks sorted by length")
    longest = np.array([block.longest for block in manifest.header.blocks], object)
    if len(other := np.flatnonzero(longest != lengths[starts[1:] - 1])):
        number = int(other[0])
        seen = int(lengths[starts[number + 1] - 1])
        wrong.append(f"block {number}: got longest {longest[number]}, expected {seen}, the length of its last row")
    split = manifest.columns["split"]
    if len(odd := np.flatnonzero((split >= len(SPLITS)) & (split != NO_SPLIT))):
        wrong.append(f"row {odd[0]}: got split {split[odd[0]]}, expected below {len(SPLITS)}, or {NO_SPLIT}")
    label, most = manifest.columns["label"], len(manifest.header.content.labels)
    if len(odd := np.flatnonzero((label < -1) | (label >= most))):
        wrong.append(f"row {odd[0]}: got label {label[odd[0]]}, expected below {most}, or -1")
    return wrong

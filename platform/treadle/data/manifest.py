"""The manifest of a data set: what is where, with lengths, checksums and fitted statistics.

One Arrow file. Its sha256 is the data set's identity; it is written last, so that a data set
either is whole or does not exist.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from treadle import wire
from treadle.data.draft import SPLITS
from treadle.errors import IntegrityError
from treadle.plan import DataCard, SplitCard
from treadle.spec import InputKind, Signature

__all__ = ["Block", "Manifest", "Preprocessing"]

SCHEMA = 1
_COLUMNS = pa.schema(
    [
        ("split", pa.uint8()),
        ("length", pa.uint32()),
        ("labels", pa.uint32()),
        ("label_frames", pa.uint32()),
        ("block", pa.uint32()),
        ("row", pa.uint32()),
        ("entity", pa.uint64()),
        ("inputs", pa.uint64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One record batch in a shard: the unit of reading and of checking."""

    key: str
    offset: int
    size: int
    rows: int
    checksum: str


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How raw inputs become numbers and label ids become words; fitted on training rows only.

    Travels in the manifest and in the model version, so that serving does what training did.

    Args:
        symbols: vocabulary in id order for tokens (id 0 is never seen: unknown), else empty.
        channels, mean, deviation: per channel for frames, else empty.
        labels: in id order; CTC adds its blank in front.
    """

    symbols: tuple[str, ...]
    channels: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    labels: tuple[str, ...]

    def signature(self, max_length: int) -> Signature:
        tokens = bool(self.symbols)
        return Signature(
            input_kind=InputKind.tokens if tokens else InputKind.frames,
            input_size=len(self.symbols) if tokens else len(self.channels),
            num_labels=len(self.labels),
            max_length=max_length,
        )


@dataclass(frozen=True, kw_only=True)
class Header:
    """Everything of a manifest that is not a column."""

    name: str
    recipe: str
    licence: str
    source: dict[str, str]
    max_length: int
    preprocessing: Preprocessing
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """Rows by number: split, length, labels, label_frames, block, row within it, hashes of entity and inputs."""

    header: Header
    columns: dict[str, NDArray[Any]]

    def to_bytes(self) -> bytes:
        meta = {b"treadle": wire.record("dataset", SCHEMA, self.header)}
        arrays = [pa.array(self.columns[field.name], type=field.type) for field in _COLUMNS]
        batch = pa.record_batch(arrays, schema=_COLUMNS.with_metadata(meta))
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
            raise IntegrityError(f"{where}: got sha256 {wire.digest(data)[:12]}, expected {digest[:12]}")
        try:
            table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
            meta = table.schema.metadata[b"treadle"]
            table = table.cast(_COLUMNS)
        except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{where}: not a manifest ({error})", hint="prepare the data set again") from None
        header = wire.unrecord(Header, meta, kind="dataset", schema=SCHEMA, where=where)
        return cls(header=header, columns={name: table.column(name).to_numpy() for name in table.column_names})

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
                label_frames_N=self.columns["label_frames"][rows].astype(np.int64),
                num_entities=len(np.unique(self.columns["entity"][rows])),
            )
        header = self.header
        signature = header.preprocessing.signature(header.max_length)
        return DataCard(name=header.name, digest=digest, signature=signature, splits=splits)

"""What a data set holds, in numbers for people and for JSON.

Shape letters: R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.data.draft import SPLITS
from treadle.data.manifest import NO_SPLIT, Finding, Manifest
from treadle.spec import TargetKind, TargetPer

__all__ = ["ChannelFacts", "DatasetFacts", "SplitFacts", "describe"]


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """The rows of one split, or of none ("dropped").

    Args:
        labels: rows by label, most frequent first, where a row has one label.
    """

    split: str
    rows: int
    entities: int
    frames: int
    targets: int
    length_min: int
    length_median: float
    length_p99: float
    length_max: int
    labels: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class ChannelFacts:
    """A number of each frame, or of each target, as it was fitted on training rows."""

    name: str
    mean: float
    deviation: float


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """A data set.

    Args:
        recipe: digest of what it was made by.
        num_bytes: of its blocks. num_shards: objects that hold them.
        lengths: (first, past the last, rows) of ranges of lengths, over all rows.
        symbols: all of the data set, known_symbols: those of training rows, which a model knows.
        channels, values, gap: fitted on training rows; empty or None where there are none.
        split: how it was split, as the job said. dropped: rows in no split, by reason.
        set_aside: rows in quarantine, in the object `quarantine`.
    """

    name: str
    digest: str
    recipe: str
    licence: str
    source: dict[str, str]
    rows: int
    frames: int
    num_bytes: int
    num_blocks: int
    num_shards: int
    max_length: int
    splits: tuple[SplitFacts, ...]
    lengths: tuple[tuple[int, int, int], ...]
    inputs: str
    num_symbols: int
    known_symbols: int
    symbols: tuple[str, ...]
    channels: tuple[ChannelFacts, ...]
    missing: str
    timed: bool
    gap: ChannelFacts | None
    target: str
    target_per: str
    labels: tuple[str, ...]
    values: tuple[ChannelFacts, ...]
    fitted_rows: int
    split: dict[str, Any]
    dropped: dict[str, int]
    findings: tuple[Finding, ...]
    set_aside: int
    quarantine: str


def describe(manifest: Manifest, digest: str, *, num_ranges: int = 16) -> DatasetFacts:
    """What a manifest says of its data set; no block is read.

    Args:
        num_ranges: most ranges of lengths.
    """
    header, content, fitted = manifest.header, manifest.header.content, manifest.header.preprocessing
    lengths_R = manifest.columns["length"]
    channels: tuple[ChannelFacts, ...] = ()
    values: tuple[ChannelFacts, ...] = ()
    gap = None
    if fitted is not None:
        triples = zip(fitted.channels, fitted.mean, fitted.deviation, strict=True)
        channels = tuple(ChannelFacts(name=n, mean=m, deviation=d) for n, m, d in triples)
        pairs = zip(content.value_names, fitted.values, strict=False)
        values = tuple(ChannelFacts(name=n, mean=m, deviation=d) for n, (m, d) in pairs)
        gap = ChannelFacts(name="log(1 + gap)", mean=fitted.gap[0], deviation=fitted.gap[1]) if fitted.gap else None
    return DatasetFacts(
        name=header.name,
        digest=digest,
        recipe=header.recipe,
        licence=header.licence,
        source=header.source,
        rows=manifest.num_rows,
        frames=int(lengths_R.sum(dtype=np.int64)),
        num_bytes=sum(block.size for block in header.blocks),
        num_blocks=len(header.blocks),
        num_shards=len({block.key for block in header.blocks}),
        max_length=header.max_length,
        splits=tuple(_splits(manifest)),
        lengths=length_ranges(lengths_R, num_ranges),
        inputs="frames" if content.channels else "tokens",
        num_symbols=len(content.symbols),
        known_symbols=max(0, len(fitted.symbols) - 1) if fitted is not None and not content.channels else 0,
        symbols=content.symbols,
        channels=channels or tuple(ChannelFacts(name=n, mean=0.0, deviation=1.0) for n in content.channels),
        missing=fitted.missing.value if fitted is not None else "",
        timed=content.timed,
        gap=gap,
        target=content.target.value,
        target_per=content.target_per.value,
        labels=content.labels,
        values=values,
        fitted_rows=fitted.fitted_rows if fitted is not None else 0,
        split=header.split or {},
        dropped=header.dropped or {},
        findings=header.findings,
        set_aside=header.set_aside,
        quarantine=header.quarantine,
    )


def length_ranges(lengths_R: NDArray[Any], num: int) -> tuple[tuple[int, int, int], ...]:
    """(first, past the last, rows) of at most `num` ranges, evenly wide on a log scale where lengths span a decade."""
    if not len(lengths_R):
        return ()
    low, high = int(lengths_R.min()), int(lengths_R.max()) + 1
    spaced = np.geomspace(low, high, num + 1) if high > 10 * low else np.linspace(low, high, num + 1)
    edges = np.unique(spaced.round().astype(np.int64))
    counts, _ = np.histogram(lengths_R, bins=edges)
    return tuple((int(a), int(b), int(c)) for a, b, c in zip(edges[:-1], edges[1:], counts, strict=True))


def _splits(manifest: Manifest) -> list[SplitFacts]:
    places = manifest.columns["split"]
    named = [*((name, place) for place, name in enumerate(SPLITS)), ("dropped", NO_SPLIT)]
    found = [_split(manifest, name, np.flatnonzero(places == place)) for name, place in named]
    return [facts for facts in found if facts.rows]


def _split(manifest: Manifest, name: str, rows: NDArray[np.int64]) -> SplitFacts:
    columns, content = manifest.columns, manifest.header.content
    lengths = columns["length"][rows]
    quantiles = np.percentile(lengths, [50, 99]) if len(rows) else (0.0, 0.0)
    labels: dict[str, int] = {}
    if content.target is TargetKind.labels and content.target_per is TargetPer.row:
        ids = columns["label"][rows]
        counts = np.bincount(ids[ids >= 0], minlength=len(content.labels))
        labels = {content.labels[i]: int(counts[i]) for i in np.argsort(-counts, kind="stable")}
    return SplitFacts(
        split=name,
        rows=len(rows),
        entities=len(np.unique(columns["entity"][rows])),
        frames=int(lengths.sum(dtype=np.int64)),
        targets=int(columns["targets"][rows].sum(dtype=np.int64)),
        length_min=int(lengths.min()) if len(rows) else 0,
        length_median=float(quantiles[0]),
        length_p99=float(quantiles[1]),
        length_max=int(lengths.max(initial=0)),
        labels=labels,
    )

"""How well one feature alone tells one label from all others: a feature that does it perfectly is often the answer.

Shape letters: R rows of a sample, N frames of all its rows laid end to end, D channels, K labels, S symbols.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.data.blocks import BlockRows
from treadle.data.draft import SPLITS
from treadle.data.manifest import Manifest, Preprocessing
from treadle.data.splits.auc import Sorted, aucs_by_bin, aucs_by_rank, either_way, parted, spreads
from treadle.data.splits.fit import RowSource
from treadle.spec import TargetKind, TargetPer

__all__ = ["Telling", "telling_features"]

MOST_ROWS = 20_000
MOST_FRAMES = 200_000
MOST_LABELS = 50
MOST_SYMBOLS = 1000
FEWEST = 20
"""Rows that a label needs, and as many of other labels: chance then gives an AUC of .99 twice in 1e10."""
FEWEST_APART = 40
"""The same, where values lie apart and that alone counts: a flag that is wrong in 1 of 20 rows is right in 40 and 40
rows twice in a hundred."""
_SURELY = 1.645
"""Deviations below which 95 % of a bell lie."""
_CELLS = 20_000_000
"""Most features times rows that are ranked, about four seconds; and most labels times symbols that are counted."""
_VALUES = 1 << 26
"""Most values that are read, as far as a hundred rows allow."""
_PORTION = 1 << 22
"""Values read at a time,"""
_OPEN = 8
"""of so many blocks: a reader opens all blocks of what it is asked for at once."""
MOST_BLOCKS = 256
"""Most blocks that are read, evenly over the data set, which is sorted by length: 1 GB or less."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Telling:
    """One feature and the label that it tells from the others best.

    Args:
        feature, label: for people; no label where it tells them all, one as well as another.
        auc: chance that a row of the label ranks above (or below) one of the others; the mean over labels for all.
        surely: what its true value is above, with 95 % certainty. sample: rows, or frames where labels are per frame.
    """

    feature: str
    label: str | None
    auc: float
    surely: float
    sample: int


def telling_features(
    rows: Manifest, split_R: NDArray[np.uint8], preprocessing: Preprocessing, reader: RowSource, *, above: float
) -> list[Telling]:
    """The features whose AUC for some label, or on average for all, is above `above` with 95 % certainty, best first.

    Without that allowance honest data fails when it is small: of 100 choices of 27 validation recordings of Japanese
    Vowels, 39 leave some cepstral mean with an AUC above .99 for one of nine speakers (27 recordings each), up to .995.
    So an AUC counts as sure on about 135 rows of a label and as many others, or 70 and many others; where values lie
    apart, a gap between them as wide as they spread, on 40 and 40; and the mean over nine labels on 20 of each.

    Measured: of 200 honest sets of 40 to 400 rows in two labels, half each or 15 in 100, with 4 or 20 features each of
    an AUC up to .985, none was taken to leak where values are normal, and at most 3 in 200 where their tails are those
    of Student's t with four degrees of freedom (before errors near an AUC of 1 were held up: up to 200 of 200); of 50
    sets of nine speakers, 30 rows each, on 12 channels, none (before: up to 50). Flags are another matter, since they
    lie apart: of 100 sets of 50 and 50 rows with four flags of an AUC of .95, .97 and .985, 4, 10 and 64 had one
    without an exception. Always found: the label as a number, with noise of up to 0.4 of the distance between two,
    of 2 labels of 40 rows or more, 5 or 9 of 30, 60 of 24 to 32, and of 5 whose ends are rare; a label that stands at
    both ends of another, from 150 rows each.

    Rows with one label each: of every channel the mean, last, least and largest value and the share missing; of tokens
    the presence of each of the most frequent symbols; of both the length, and the time between the first and last frame
    where models read gaps. Frames with a label each: every channel at that frame, and whether it is missing.
    Sequences of labels, and values, are not looked at.

    Args:
        split_R: place in SPLITS of each row; training rows are sampled, evenly over the order of rows.
        preprocessing: its means stand for what is missing.

    Cost: 1 s for 20,000 rows of 100 frames of 16 channels, beside reading them, of which ranks and bins are 0.3 s with
    50 labels; about five seconds at most.
    """
    content = rows.header.content
    train = np.flatnonzero(split_R == SPLITS.index("train"))
    if content.target_per is TargetPer.row:
        train = train[rows.columns["label"][train] >= 0]
    if content.target is not TargetKind.labels or not len(train):
        return []
    sample = _Sample(rows, preprocessing, reader)
    if content.target_per is TargetPer.row:
        found = _of_tokens(sample, train) if content.symbols else []
        found += _of_rows(sample, train)
    elif content.target_per is TargetPer.frame and content.channels:
        found = _of_frames(sample, train)
    else:
        found = []
    return sorted((one for one in found if one.surely > above), key=lambda one: -one.surely)


def _evenly(total: int, count: int) -> Ints:
    """`count` places among `total`, or all of them, evenly spread."""
    return np.linspace(0, total - 1, min(count, total)).astype(np.int64)


class _Sample:
    """Training rows spread evenly over all of them, read in portions."""

    def __init__(self, rows: Manifest, preprocessing: Preprocessing, reader: RowSource) -> None:
        self.content = rows.header.content
        self.block_starts = rows.block_starts
        self.length_R = rows.columns["length"].astype(np.int64)
        self.label_R = rows.columns["label"]
        self.reads_gaps = bool(preprocessing.gap) and self.content.timed
        self.width = len(self.content.channels) or 1
        self.mean_D = np.array(preprocessing.mean)
        self._reader = reader

    def spread(self, train: Ints, count: int) -> Ints:
        """At most `count` of the rows, fewer where they are long."""
        blocks = np.unique(self._blocks_of(train))
        if len(blocks) > MOST_BLOCKS:
            chosen = blocks[_evenly(len(blocks), MOST_BLOCKS)]
            train = train[np.isin(self._blocks_of(train), chosen)]
        mean_values = max(float(self.length_R[train].mean()) * self.width, 1)
        return train[_evenly(len(train), min(count, max(int(_VALUES / mean_values), 100)))]

    def read(self, rows_R: Ints) -> Iterator[tuple[Ints, BlockRows]]:
        """Portions of the rows, each with its row numbers."""
        values_R = np.cumsum(self.length_R[rows_R] * self.width) // _PORTION
        opened_R = np.unique(self._blocks_of(rows_R), return_inverse=True)[1] // _OPEN
        ends = np.flatnonzero((np.diff(values_R) > 0) | (np.diff(opened_R) > 0)) + 1
        for part in np.split(rows_R, ends):
            yield part, self._reader.raw(part)

    def _blocks_of(self, rows_R: Ints) -> Ints:
        return np.searchsorted(self.block_starts, rows_R, side="right") - 1

    def best(self, features: list[tuple[str, NDArray[Any]]], label_R: NDArray[Any]) -> list[Telling]:
        """What each feature tells best; [] where no label has enough rows."""
        asked_K, count_K, kind_R = _asked(label_R)
        if not len(asked_K):
            return []
        found = []
        for name, values_R in features:
            feature = Sorted.of(values_R)
            rank_K, bin_K = (of(feature, kind_R, count_K) for of in (aucs_by_rank, aucs_by_bin))
            apart_K = parted(feature, kind_R, count_K)
            tellings = [
                self.telling(name, asked_K, rank_K, _surely(rank_K, count_K, len(label_R), apart_K), len(label_R)),
                self.telling(name, asked_K, bin_K, _surely(bin_K, count_K, len(label_R)), len(label_R)),
            ]
            if len(asked_K) > 2:
                tellings.append(_telling_all(name, bin_K, count_K, len(label_R)))
            found.append(max(tellings, key=lambda one: one.surely))
        return found

    def telling(self, feature: str, asked_K: Ints, auc_K: Floats, surely_K: Floats, sample: int) -> Telling:
        """The label that a feature tells most surely."""
        best = int(surely_K.argmax())
        label = self.content.labels[asked_K[best]]
        return Telling(
            feature=feature, label=label, auc=float(auc_K[best]), surely=float(surely_K[best]), sample=sample
        )


def _surely(auc_K: Floats, count_K: Ints, total: int, apart_K: NDArray[np.bool_] | None = None) -> Floats:
    """Lower end of a one-sided 95 % interval; 1 for labels of enough rows whose values lie apart."""
    surely_K = auc_K - _SURELY * spreads(auc_K, count_K, total)
    if apart_K is not None:
        surely_K[apart_K & (np.minimum(count_K, total - count_K) >= FEWEST_APART)] = 1
    return surely_K


def _telling_all(feature: str, auc_K: Floats, count_K: Ints, sample: int) -> Telling:
    """The mean over labels, which is sure of labels that have few rows each: of K labels, K - 1 err by themselves."""
    spread = float(np.sqrt((spreads(auc_K, count_K, sample) ** 2).mean() / (len(auc_K) - 1)))
    auc = float(auc_K.mean())
    return Telling(feature=feature, label=None, auc=auc, surely=auc - _SURELY * spread, sample=sample)


def _asked(label_R: NDArray[Any], most: int = MOST_LABELS) -> tuple[Ints, Ints, Ints]:
    """The labels to ask about, most frequent first; how many rows each has; and its place among them by row, else K."""
    values, place_R, counts = np.unique(label_R, return_inverse=True, return_counts=True)
    fit = (counts >= FEWEST) & (len(label_R) - counts >= FEWEST)
    chosen = np.flatnonzero(fit)[np.argsort(-counts[fit], kind="stable")][:most]
    kinds = np.full(len(values), len(chosen))
    kinds[chosen] = np.arange(len(chosen))
    return values[chosen].astype(np.int64), counts[chosen].astype(np.int64), kinds[place_R]


def _of_rows(sample: _Sample, train: Ints) -> list[Telling]:
    content = sample.content
    names = [f"{what} of {channel!r}" for what in _measures(sample) for channel in content.channels]
    rows_R = sample.spread(train, min(MOST_ROWS, _CELLS // (len(names) + 1)))
    features = [("the length", sample.length_R[rows_R])]
    spans, parts = [], []
    for _, block in sample.read(rows_R) if names or sample.reads_gaps else ():
        offsets = block.value_offsets // sample.width
        if sample.reads_gaps and block.gaps_N is not None:
            spans.append(np.add.reduceat(block.gaps_N.astype(np.float64), offsets[:-1]))
        if names:
            parts.append(_summary(block.values.reshape(-1, sample.width), offsets, sample))
    if spans:
        features.append(("the time from first to last frame", np.concatenate(spans)))
    if parts:
        features += zip(names, np.concatenate(parts).T, strict=True)
    return sample.best(features, sample.label_R[rows_R])


def _measures(sample: _Sample) -> list[str]:
    return ["mean", "last", "least", "largest"] + ["share missing"] * sample.content.missing


def _summary(x_ND: NDArray[np.float32], offsets: Ints, sample: _Sample) -> NDArray[np.float32]:
    """The measures of each channel, by row: [R, measures * D]."""
    starts = offsets[:-1]
    length_R1 = np.diff(offsets)[:, None]
    hidden, seen_RD = np.zeros((1, 1), bool), length_R1
    if sample.content.missing:
        hidden = np.isnan(x_ND)
        seen_RD = length_R1 - np.add.reduceat(hidden, starts, axis=0, dtype=np.int64)
    total_RD = np.add.reduceat(np.where(hidden, 0, x_ND), starts, axis=0, dtype=np.float64)
    last_RD = x_ND[offsets[1:] - 1]
    measures = [
        total_RD / np.maximum(seen_RD, 1),
        np.where(np.isnan(last_RD), sample.mean_D, last_RD),
        np.minimum.reduceat(np.where(hidden, np.inf, x_ND), starts, axis=0),
        np.maximum.reduceat(np.where(hidden, -np.inf, x_ND), starts, axis=0),
    ]
    measures = [np.where(seen_RD > 0, measure_RD, sample.mean_D) for measure_RD in measures]
    if sample.content.missing:
        measures.append(1 - seen_RD / length_R1)
    return np.concatenate(measures, axis=1).astype(np.float32)


def _of_tokens(sample: _Sample, train: Ints) -> list[Telling]:
    """Whether a row holds a symbol: a feature of two values, whose AUC needs no ranks."""
    rows_R = sample.spread(train, MOST_ROWS)
    num_symbols = len(sample.content.symbols)
    asked_K, count_K, kind_R = _asked(sample.label_R[rows_R], min(MOST_LABELS, _CELLS // num_symbols))
    if not len(asked_K):
        return []
    held_KS = np.zeros((len(asked_K) + 1, num_symbols), np.int64)
    done = 0
    for part, block in sample.read(rows_R):
        row_N = np.repeat(np.arange(len(part)), np.diff(block.value_offsets))
        row_P, symbol_P = np.divmod(np.unique(row_N * num_symbols + block.values), num_symbols)
        np.add.at(held_KS, (kind_R[done + row_P], symbol_P), 1)
        done += len(part)
    held_S = held_KS.sum(axis=0)
    frequent = np.sort(np.argsort(-held_S, kind="stable")[:MOST_SYMBOLS])
    inside_KS = held_KS[:-1, frequent] / count_K[:, None]
    outside_KS = (held_S[frequent] - held_KS[:-1, frequent]) / (len(rows_R) - count_K)[:, None]
    auc_KS = either_way((1 + inside_KS - outside_KS) / 2)
    total = len(rows_R)
    return [
        sample.telling(
            f"presence of {sample.content.symbols[symbol]!r}",
            asked_K,
            auc_KS[:, i],
            _surely(auc_KS[:, i], count_K, total, auc_KS[:, i] == 1),
            total,
        )
        for i, symbol in enumerate(frequent)
    ]


def _of_frames(sample: _Sample, train: Ints) -> list[Telling]:
    """Each channel at a frame against the label of that frame."""
    most = min(MOST_FRAMES, _CELLS // sample.width)
    rows_R = sample.spread(train, max(int(most / sample.length_R[train].mean()), 1))
    blocks = [block for _, block in sample.read(rows_R)]
    x_ND = np.concatenate([block.values.reshape(-1, sample.width) for block in blocks])
    label_N = np.concatenate([block.targets for block in blocks])
    labelled = np.flatnonzero(label_N >= 0)
    labelled = labelled[_evenly(len(labelled), most)]
    x_ND, label_N = x_ND[labelled], label_N[labelled]
    hidden_ND = np.isnan(x_ND)
    features: list[tuple[str, NDArray[Any]]] = []
    for i, channel in enumerate(sample.content.channels):
        features.append((f"{channel!r} at the frame", np.where(hidden_ND[:, i], sample.mean_D[i], x_ND[:, i])))
        if hidden_ND[:, i].any():
            features.append((f"a missing {channel!r} at the frame", hidden_ND[:, i]))
    return sample.best(features, label_N)

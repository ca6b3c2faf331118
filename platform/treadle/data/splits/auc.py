"""How well the values of one feature tell each label from all others.

Shape letters: R rows, V distinct values in order, B bins, K labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Sorted", "aucs_by_bin", "aucs_by_rank", "either_way", "parted", "spreads"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_MOST_BINS = 256
_BIN_ROWS = 8
"""Rows of a bin, where values are many: fewer say little of its label, more mix neighbouring labels."""
_LEVELS = 1000
"""Shares are told apart to a thousandth: closer ones count as equal."""
_SUREST = 0.99
"""Areas above it have the error of this one. Their own comes to nothing as they come near 1, so that a sample of 20
and 20 rows without an exception would be as sure as one of thousands."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sorted:
    """One feature, sorted once for all labels.

    Args:
        order_R: rows in order of their values. value_V: distinct values.
        start_V, size_V: where each starts in that order, and how many rows have it.
    """

    order_R: Ints
    value_V: NDArray[Any]
    start_V: Ints
    size_V: Ints

    @classmethod
    def of(cls, values_R: NDArray[Any]) -> Sorted:
        order_R = np.argsort(values_R, kind="stable")
        ordered = values_R[order_R]
        start_V = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        size_V = np.diff(np.append(start_V, len(ordered)))
        return cls(order_R=order_R, value_V=ordered[start_V], start_V=start_V, size_V=size_V)

    def bin_V(self) -> Ints:
        """The bin of each value: its own where values are few, else one of about equally many rows.

        Bins are cut at the widest gap near their ends, so that clusters of values share none.
        """
        most = min(_MOST_BINS, max(len(self.order_R) // _BIN_ROWS, 1))
        if len(self.start_V) <= most:
            return np.arange(len(self.start_V))
        part_V = np.unique(self.start_V * most // len(self.order_R), return_inverse=True)[1]
        gap_V = np.diff(self.value_V.astype(np.float64), prepend=self.value_V[:1])
        widest_V = np.maximum.reduceat(gap_V, np.flatnonzero(np.diff(part_V, prepend=-1)))[part_V]
        cuts = np.flatnonzero(gap_V == widest_V)
        cuts = cuts[np.diff(part_V[cuts], prepend=0) > 0]  # one in each part but the first
        return np.searchsorted(cuts, np.arange(len(part_V)), side="right")


def aucs_by_rank(feature: Sorted, kind_R: Ints, count_K: Ints) -> Floats:
    """The area under the curve of the values themselves, 0.5 to 1 whatever their sign: finds labels at either end.

    Source: Mann and Whitney 1947: the sum of ranks, equal values sharing their mean rank.

    Args:
        kind_R: 0 to K - 1, or K for a label that is not asked about. count_K: rows by label.
    """
    rank_R = np.repeat(feature.start_V + (feature.size_V + 1) / 2, feature.size_V)
    sum_K = np.bincount(kind_R[feature.order_R], weights=rank_R, minlength=len(count_K) + 1)[: len(count_K)]
    return either_way((sum_K - count_K * (count_K + 1) / 2) / (count_K * (len(kind_R) - count_K)))


def aucs_by_bin(feature: Sorted, kind_R: Ints, count_K: Ints) -> Floats:
    """The area under the curve of a label's share in the bin of a value: finds labels at any values.

    A row does not count for itself, so that a feature that says nothing has 0.5 or less. Shares are drawn towards the
    label's share of all rows, by one row.

    Args:
        kind_R, count_K: as for `aucs_by_rank`.
    """
    bin_V, total, num_labels = feature.bin_V(), len(kind_R), len(count_K)
    place_R = np.repeat(bin_V, feature.size_V) * (num_labels + 1) + kind_R[feature.order_R]
    rows_BK = np.bincount(place_R, minlength=(bin_V[-1] + 1) * (num_labels + 1)).reshape(-1, num_labels + 1)
    size_B1, rows_BK = rows_BK.sum(axis=1, keepdims=True), rows_BK[:, :num_labels]
    inside = _by_level((rows_BK - 1 + count_K / total) / size_B1, rows_BK)
    outside = _by_level((rows_BK + count_K / total) / size_B1, size_B1 - rows_BK)
    won_K = (inside * (np.cumsum(outside, axis=0) - outside / 2)).sum(axis=0)
    return won_K / (count_K * (total - count_K))


def _by_level(share_BK: Floats, rows_BK: Ints) -> NDArray[Any]:
    """How many rows have a share of each level: [levels, K]."""
    num_labels = share_BK.shape[1]
    level_BK = np.clip((share_BK * _LEVELS).astype(np.int64), 0, _LEVELS - 1)
    place_BK = level_BK * num_labels + np.arange(num_labels)
    rows = np.bincount(place_BK.ravel(), weights=rows_BK.ravel(), minlength=_LEVELS * num_labels)
    return rows.reshape(_LEVELS, num_labels)


def parted(feature: Sorted, kind_R: Ints, count_K: Ints) -> NDArray[np.bool_]:
    """Whether a label's values lie apart from all others: no exception, and a gap as wide as the values on each side.

    Args:
        kind_R, count_K: as for `aucs_by_rank`.
    """
    value_V, kind = feature.value_V.astype(np.float64), kind_R[feature.order_R]
    found_K = np.zeros(len(count_K), bool)
    for place, label in ((0, kind[0]), (-1, kind[-1])):
        if label == len(count_K):
            continue
        cut = count_K[label] if place == 0 else len(kind) - count_K[label]
        own = kind[:cut] if place == 0 else kind[cut:]
        at = int(np.searchsorted(feature.start_V, cut))
        if (own == label).all() and at < len(value_V) and feature.start_V[at] == cut:
            sides = value_V[at - 1] - value_V[0], value_V[-1] - value_V[at]
            found_K[label] = value_V[at] - value_V[at - 1] >= max(sides)
    return found_K


def either_way(auc: Floats) -> Floats:
    """The area of a feature or of its opposite, whichever is larger."""
    return np.maximum(auc, 1 - auc)


def spreads(auc_K: Floats, count_K: Ints, total: int) -> Floats:
    """The standard error of the area of a label against all others, the same whichever of the two has few rows.

    Source: Hanley and McNeil 1982, "The meaning and use of the area under a ROC curve", equation 2, with the mean of
    its two middle terms for each: which of them belongs to the label depends on the sign of the feature.
    """
    auc_K = np.minimum(auc_K, _SUREST)
    middle_K = auc_K / (2 - auc_K) + 2 * auc_K**2 / (1 + auc_K) - 2 * auc_K**2
    return np.sqrt((auc_K * (1 - auc_K) + (total / 2 - 1) * middle_K) / (count_K * (total - count_K)))

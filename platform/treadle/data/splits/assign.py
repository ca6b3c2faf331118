"""Which rows are trained on, watched and tested: a pure function of the manifest's columns and the split spec.

What the source says comes first: rows that it puts into valid or test stay there, and a split that it gives is not
taken a second time. All other rows, those it calls `train` among them, are split as the spec says.

Shape letters: R rows, G groups, S strata.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.data.draft import SPLITS
from treadle.data.manifest import NO_SPLIT
from treadle.data.mixing import splitmix64
from treadle.errors import ConfigError, DataError
from treadle.spec import SplitBy, SplitSpec, Window

__all__ = ["Assigned", "assign", "is_timed", "window_reaches"]

Ints = NDArray[np.int64]
Places = NDArray[np.uint8]
Times = NDArray[np.float64]

TRAIN, VALID, TEST = range(3)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Assigned:
    """The split of each row.

    Args:
        split_R: place in SPLITS, or NO_SPLIT for a dropped row.
        dropped: number of rows by reason.
    """

    split_R: Places
    dropped: dict[str, int]


def assign(columns: Mapping[str, NDArray[Any]], spec: SplitSpec) -> Assigned:
    """The split of each row; the same for a row wherever it stands, and on every machine.

    By entity and stratified, the rows of a group stay together, also with rows that the source puts into valid or
    test; groups are ordered by a hash of (group, seed). Stratified, each label keeps a group to train on, and is rarer
    in valid and test for it, unless these ask for more than all other groups: then a warning says how many do not.

    By time, rows of one time stay together, so that a split may hold a few rows more than asked. A row is dropped, as
    "purged", if it is within the horizon of a later split: its label window (time, time + horizon] reaches the split's
    first time, or windows of the split, where the source puts it before the row, reach the row. It is dropped as
    "embargo" if it is within horizon and embargo. Valid is taken from what the purge around the test leaves.

    Source: walking forward follows scikit-learn's TimeSeriesSplit(n_splits, max_train_size, test_size), whose training
    rows are ours of train and valid together (tests/unit/data/test_splits.py).

    Args:
        columns: split (what the source says: place in SPLITS, or NO_SPLIT), group, label, time of a manifest.

    Raises:
        ConfigError: stratified without a label per row, walking forward where the source says what the test is, or a
            horizon where neither time nor the source parts the rows.
        DataError: rows without a time where it is needed, nothing left to train on, or a split without rows.

    Cost: a sort; about 0.3 s per million rows.
    """
    result = _by_time(columns, spec) if is_timed(spec) else _by_group(columns, spec)
    _check(result.places, spec, result.dropped)
    return Assigned(split_R=result.places, dropped=dict(result.dropped))


def is_timed(spec: SplitSpec) -> bool:
    """Whether splits follow one another in time."""
    return spec.by in (SplitBy.time, SplitBy.walk_forward)


def window_reaches(time_R: Times, horizon: float, later_R: Times) -> NDArray[np.bool_]:
    """Whether a row is nearer than `horizon`, or exactly as near, to the span of time of a later split; NaN: no.

    Before the span the row's own label window (time, time + horizon] reaches into it, after it the windows of the
    later split reach the row. A few units in the last place count as none: 5 hours are 5 / 24 of a day, and hourly
    times that are kept as days since 1970 would be 5 hours apart or a little more.
    """
    if not len(later_R) or np.isnan(later_R).all():
        return np.zeros(len(time_R), bool)
    first, last = float(np.nanmin(later_R)), float(np.nanmax(later_R))
    slack = 4 * np.finfo(np.float64).eps * max(abs(first), abs(last), horizon)
    return (time_R >= first - horizon - slack) & (time_R <= last + horizon + slack)


def _check(split_R: Places, spec: SplitSpec, dropped: Mapping[str, int]) -> None:
    lost = ", ".join(f"{count} rows {reason}" for reason, count in dropped.items())
    lost = f" ({lost})" if lost else ""
    if not (split_R == TRAIN).any():
        raise DataError(
            f"split.valid, split.test: got {spec.valid:g} and {spec.test:g} of {len(split_R)} rows{lost}, "
            "which leave nothing to train on",
            hint="smaller split.valid, split.test, split.horizon or split.embargo",
        )
    for place, share in ((VALID, spec.valid), (TEST, spec.test)):
        if share and not (split_R == place).any():
            raise DataError(
                f"split.{SPLITS[place]}: got no rows for {share:g} of {len(split_R)}{lost}, expected at least one",
                hint=f"a larger split.{SPLITS[place]}, or 0",
            )


def _count(name: str, share: float, total: int) -> int:
    """How many `share` is of `total`."""
    count = int(share * total + 0.5) if share < 1 else int(share)
    if share and not count:
        raise DataError(
            f"split.{name}: got {share:g} of {total}, which is none; expected at least one",
            hint=f"a larger split.{name}, or 0",
        )
    return count


class _Places:
    """Splits while they are being decided, with what was dropped and why."""

    def __init__(self, given_R: Places) -> None:
        self.places = np.where(given_R == NO_SPLIT, TRAIN, given_R).astype(np.uint8)
        self.held_R = (given_R == VALID) | (given_R == TEST)  # the source is not overruled
        self.given = {place: bool((given_R == place).any()) for place in (VALID, TEST)}
        self.dropped: Counter[str] = Counter()

    def drop(self, rows: NDArray[Any], reason: str) -> None:
        """Rows by mask or number."""
        if count := len(self.places[rows]):
            self.places[rows] = NO_SPLIT
            self.dropped[reason] += count


def _by_group(columns: Mapping[str, NDArray[Any]], spec: SplitSpec) -> _Places:
    result = _Places(columns["split"])
    if spec.horizon and not result.held_R.any():
        raise ConfigError(
            f"split.horizon: got {spec.horizon:g}, expected 0 where rows go by {spec.by.value} and not by time",
            hint="split.by=time drops rows whose target reaches into a later split",
        )
    groups_G, group_R = np.unique(columns["group"].astype(np.uint64, copy=False), return_inverse=True)
    split_G = np.zeros(len(groups_G), np.uint8)
    np.maximum.at(split_G, group_R[result.held_R], result.places[result.held_R])
    free = np.flatnonzero(split_G == TRAIN)
    key_G = splitmix64(groups_G[free] ^ splitmix64(np.array([spec.seed], np.uint64)))
    free = free[np.argsort(key_G)]  # a bijection: no two groups have one key
    strata_G = _strata(columns["label"], group_R, len(groups_G))[free] if spec.by is SplitBy.stratified else None
    _take(split_G, free, strata_G, result.given, spec)
    # A row that the source calls train, of a group that it also puts elsewhere, stays: the audit has to see it.
    said_train_R = columns["split"] == TRAIN
    moved_R = ~result.held_R & ~(said_train_R & _in_given(group_R, result.held_R, len(groups_G)))
    result.places[moved_R] = split_G[group_R[moved_R]]
    return result


def _in_given(group_R: Ints, held_R: NDArray[np.bool_], num_groups: int) -> NDArray[np.bool_]:
    """Whether a row's group has rows that the source puts into valid or test."""
    given_G = np.zeros(num_groups, bool)
    given_G[group_R[held_R]] = True
    return given_G[group_R]


def _take(split_G: Places, free: Ints, strata_G: Ints | None, given: Mapping[int, bool], spec: SplitSpec) -> None:
    """Groups for test, then for valid, in the order of `free`; shares of each stratum where there are strata."""
    counts = {
        place: 0 if given[place] else _count(SPLITS[place], share, len(free))
        for place, share in ((TEST, spec.test), (VALID, spec.valid))
    }
    if sum(counts.values()) >= len(free):
        raise DataError(
            f"split.valid, split.test: got {counts[VALID]} and {counts[TEST]} of {len(free)} entities, which leave "
            "nothing to train on",
            hint="smaller split.valid or split.test",
        )
    _, stratum_G = np.unique(np.zeros(len(free)) if strata_G is None else strata_G, return_inverse=True)
    for place, count in counts.items():
        left = np.flatnonzero(split_G[free] == TRAIN)
        quota_S = _quotas(np.bincount(stratum_G[left]), count)
        split_G[free[left[_rank_within(stratum_G[left]) < quota_S[stratum_G[left]]]]] = place
    untrained = np.setdiff1d(stratum_G, stratum_G[split_G[free] == TRAIN])
    if len(untrained):
        _logger.warning(
            "split.valid, split.test: got %d and %d of %d entities, which leave %d of %d labels nothing to train on",
            *(counts[VALID], counts[TEST], len(free), len(untrained), stratum_G.max() + 1),
        )


def _quotas(size_S: Ints, count: int) -> Ints:
    """`count` shared out by size; one of each stratum is left to train on as long as others have more than one."""
    spare_S = np.maximum(size_S - 1, 0)
    quota_S = np.minimum(_shared(size_S, count), spare_S)
    for room_S in (spare_S - quota_S, size_S - spare_S):
        quota_S = quota_S + _shared(room_S, min(count - int(quota_S.sum()), int(room_S.sum())))
    return quota_S


def _shared(size_S: Ints, count: int) -> Ints:
    """`count` shared out by size, largest remainders first (then the larger stratum); none above its size."""
    quota_S, rest_S = np.divmod(size_S.astype(np.int64) * count, max(int(size_S.sum()), 1))
    order = np.lexsort((np.arange(len(size_S)), -size_S, -rest_S))
    quota_S[order[: count - int(quota_S.sum())]] += 1
    return quota_S


def _rank_within(stratum_G: Ints) -> Ints:
    """The place of each group among those of its stratum."""
    order = np.argsort(stratum_G, kind="stable")
    starts_S = np.cumsum(np.bincount(stratum_G)) - np.bincount(stratum_G)
    rank_G = np.empty(len(stratum_G), np.int64)
    rank_G[order] = np.arange(len(stratum_G)) - starts_S[stratum_G[order]]
    return rank_G


def _strata(label_R: NDArray[Any], group_R: Ints, num_groups: int) -> Ints:
    """The most frequent label of each group, the smallest of equals; -1, no label, is one of them."""
    if not (label_R >= 0).any():
        raise ConfigError(
            "split.by: got stratified, expected a label per row to keep the shares of", hint="split.by=entity"
        )
    labels, label_R = np.unique(label_R, return_inverse=True)
    pairs, counts = np.unique(group_R.astype(np.int64) * len(labels) + label_R, return_counts=True)
    group_P, label_P = np.divmod(pairs, len(labels))
    order = np.lexsort((label_P, -counts, group_P))
    first = order[np.searchsorted(group_P[order], np.arange(num_groups))]
    return label_P[first]


def _by_time(columns: Mapping[str, NDArray[Any]], spec: SplitSpec) -> _Places:
    time_R = np.asarray(columns["time"], np.float64)
    if missing := int(np.isnan(time_R).sum()):
        raise DataError(
            f"split.by: got {spec.by.value}, and {missing} of {len(time_R)} rows without a time, expected one in each",
            hint="columns.time=<column>, Row(time=...), or split.by=entity",
        )
    result = _Places(columns["split"])
    if spec.by is SplitBy.walk_forward:
        _walk(result, time_R, spec)
    else:
        _take_last(result, time_R, TEST, spec)
    _purge(result, time_R, spec)
    _take_last(result, time_R, VALID, spec)
    _purge(result, time_R, spec)
    if spec.disjoint:
        _part_groups(result, columns["group"])
    return result


def _take_last(result: _Places, time_R: Times, place: int, spec: SplitSpec) -> None:
    """The latest of the rows that are still trained on, as many as the spec says."""
    share = spec.test if place == TEST else spec.valid
    rows = np.flatnonzero(result.places == TRAIN)
    if result.given[place] or not share or not len(rows):
        return
    total = len(rows) if spec.by is SplitBy.walk_forward else int((~result.held_R).sum())
    order = rows[np.argsort(time_R[rows], kind="stable")]
    result.places[order[_edge(time_R[order], len(rows) - _count(SPLITS[place], share, total)) :]] = place


def _edge(sorted_R: Times, place: int) -> int:
    """The nearest place at or before `place` that parts no rows of one time."""
    place = min(max(place, 0), len(sorted_R))
    return place if place == len(sorted_R) else int(np.searchsorted(sorted_R, sorted_R[place], side="left"))


def _walk(result: _Places, time_R: Times, spec: SplitSpec) -> None:
    """The test block of the fold; rows after it are dropped, and those before a rolling window."""
    if result.held_R.any():
        raise ConfigError(
            "split.by: got walk_forward, and a source that says which rows are valid or test",
            hint="split.by=time, or a source without a split",
        )
    total = len(time_R)
    size = _count("test", spec.test, total) if spec.test else total // (spec.folds + 1)
    start = total - (spec.folds - spec.fold) * size
    if size < 1 or total - spec.folds * size < 1:
        raise DataError(
            f"split.folds: got {spec.folds} folds of {size} rows among {total} rows, which leave nothing to train on",
            hint="fewer split.folds or a smaller split.test",
        )
    order = np.argsort(time_R, kind="stable")
    low, high = (_edge(time_R[order], place) for place in (start, start + size))
    if low == high:
        raise DataError(
            f"split.fold: got no rows in fold {spec.fold} of {spec.folds}, since rows of one time stay together",
            hint="fewer split.folds or a larger split.test",
        )
    result.places[order[low:high]] = TEST
    result.drop(order[high:], "after the fold")
    if spec.window is Window.rolling and spec.train_rows is not None:
        _purge(result, time_R, spec)  # the window holds its number of rows after the purge
        order = order[result.places[order] == TRAIN]
        result.drop(order[: _edge(time_R[order], len(order) - spec.train_rows)], "before the window")


def _purge(result: _Places, time_R: Times, spec: SplitSpec) -> None:
    """Drop rows within horizon and embargo of a later split, before they are trained on or become valid."""
    for later in (TEST, VALID):
        later_R = time_R[result.places == later]
        rows = np.flatnonzero(result.places == TRAIN)
        if spec.horizon:
            reaches = window_reaches(time_R[rows], spec.horizon, later_R)
            result.drop(rows[reaches], "purged")
            rows = rows[~reaches]
        if spec.embargo:
            reaches = window_reaches(time_R[rows], spec.horizon + spec.embargo, later_R)
            result.drop(rows[reaches], "embargo")


def _part_groups(result: _Places, group_R: NDArray[Any]) -> None:
    """Drop rows of train and valid whose group has rows in a later split."""
    for earlier in (VALID, TRAIN):
        later_R = (result.places > earlier) & (result.places != NO_SPLIT)
        rows = np.flatnonzero((result.places == earlier) & ~result.held_R)
        result.drop(rows[np.isin(group_R[rows], group_R[later_R])], "entity in a later split")

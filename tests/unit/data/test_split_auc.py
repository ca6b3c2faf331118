"""Areas under the curve: equal to counts of pairs, whatever the places of a label."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.data.splits.auc import Sorted, aucs_by_bin, aucs_by_rank, parted, spreads


def kinds_of(kinds, num_labels=3):
    """Place of each row's label among those that are asked about, and their counts."""
    asked = [k for k in range(num_labels) if 0 < (kinds == k).sum() < len(kinds)]
    kind_R = np.array([asked.index(k) if k in asked else len(asked) for k in kinds])
    return asked, kind_R, np.array([(kinds == k).sum() for k in asked], np.int64)


def pairs(inside, outside):
    inside, outside = np.asarray(inside)[:, None], np.asarray(outside)[None, :]
    return ((inside > outside) + 0.5 * (inside == outside)).mean()


tables = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 3)), min_size=4, max_size=40)


@given(tables)
def test_areas_by_rank_are_counts_of_ordered_pairs(items):
    values, kinds = (np.array(column) for column in zip(*items, strict=True))
    asked, kind_R, count_K = kinds_of(kinds)
    for k, auc in zip(asked, aucs_by_rank(Sorted.of(values), kind_R, count_K), strict=True):
        expected = pairs(values[kinds == k], values[kinds != k])
        assert auc == pytest.approx(max(expected, 1 - expected), abs=1e-12)


@given(tables)
def test_areas_by_bin_are_counts_of_pairs_of_the_other_rows_shares(items):
    values, kinds = (np.array(column) for column in zip(*items, strict=True))
    asked, kind_R, count_K = kinds_of(kinds)
    feature = Sorted.of(values)
    bin_R = np.repeat(feature.bin_V(), feature.size_V)[np.argsort(feature.order_R)]
    for k, auc in zip(asked, aucs_by_bin(feature, kind_R, count_K), strict=True):
        shares = []
        for row in range(len(values)):
            others = (bin_R == bin_R[row]) & (np.arange(len(values)) != row)
            held = (kinds[others] == k).sum() + (kinds == k).mean()
            shares.append(int(1000 * min(held / (others.sum() + 1), 0.9999)))
        expected = pairs(np.array(shares)[kinds == k], np.array(shares)[kinds != k])
        assert auc == pytest.approx(expected, abs=0.02)  # a share at the edge of a level may fall to either side


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=200))
def test_bins_follow_the_values_and_are_of_some_rows(values):
    feature = Sorted.of(np.array(values, np.float32))
    bin_V = feature.bin_V()
    assert bin_V[0] == 0
    assert set(np.diff(bin_V).tolist()) <= {0, 1}
    assert (feature.value_V == np.unique(np.array(values, np.float32))).all()
    if len(bin_V) > max(len(values) // 8, 1):
        rows = np.bincount(bin_V, weights=feature.size_V)
        most = feature.size_V.max()
        assert rows.max() <= 2 * (len(values) / max(len(values) // 8, 1) + 1) + most


def test_bins_are_cut_where_values_leave_a_gap():
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(9), 27)
    feature = Sorted.of(cluster + rng.uniform(0, 0.5, len(cluster)))
    bin_R = np.repeat(feature.bin_V(), feature.size_V)[np.argsort(feature.order_R)]
    for i in range(9):
        assert not set(bin_R[cluster == i]) & set(bin_R[cluster != i])


def test_what_says_nothing_has_an_area_of_a_half_or_less_by_bin():
    rng = np.random.default_rng(0)
    for rows in (60, 300, 3000):
        kind_R = rng.integers(0, 3, rows)
        count_K = np.bincount(kind_R)
        found = [aucs_by_bin(Sorted.of(rng.normal(size=rows)), kind_R, count_K).max() for _ in range(100)]
        assert np.mean(found) < 0.53
        assert max(found) < 0.8


@pytest.mark.parametrize(
    ("values", "kinds", "expected"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], [True, True]),
        ([1, 1, 0, 0], [0, 0, 1, 1], [True, True]),
        ([0, 0, 1, 1], [0, 0, 0, 1], [False, False]),  # an exception, of the same value
        ([0, 1, 2, 3], [0, 0, 1, 1], [True, True]),
        ([0, 1.1, 2, 3], [0, 0, 1, 1], [False, False]),  # values spread wider than the gap
        ([0, 5, 9, 1], [0, 1, 2, 0], [True, False, False]),
        ([0, 3, 9, 10], [3, 0, 1, 1], [False, True, False]),  # 3: not asked about
        ([7, 7, 7, 7], [0, 0, 1, 1], [False, False]),
    ],
)
def test_labels_whose_values_lie_apart(values, kinds, expected):
    kind_R = np.array(kinds)
    count_K = np.bincount(kind_R, minlength=len(expected))[: len(expected)]
    kind_R = np.minimum(kind_R, len(expected))
    assert parted(Sorted.of(np.array(values, float)), kind_R, count_K).tolist() == expected


def test_spreads_are_those_of_bells():
    # Against the deviation of areas of drawn samples; the formula is of exponentials, and so somewhat wider.
    rng = np.random.default_rng(0)
    for apart, rows, others in ((1.0, 40, 40), (2.0, 40, 40), (1.0, 20, 200)):
        drawn = []
        kind_R = np.repeat([0, 1], [rows, others])
        for _ in range(400):
            feature = Sorted.of(rng.normal(size=rows + others) + apart * (kind_R == 0))
            drawn.append(aucs_by_rank(feature, kind_R, np.array([rows, others]))[0])
        spread = spreads(np.array([np.mean(drawn)]), np.array([rows]), rows + others)[0]
        assert 0.9 < spread / np.std(drawn) < 1.5
    at_one, at_limit = spreads(np.array([1.0, 0.99]), np.array([20, 20]), 40)
    assert at_one == at_limit > 0

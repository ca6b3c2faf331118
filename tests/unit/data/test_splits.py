"""Splits: the source first, groups whole, time in order, and the same split for a row wherever it stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from treadle.data.manifest import NO_SPLIT
from treadle.data.mixing import splitmix64
from treadle.data.splits.assign import assign, window_reaches
from treadle.errors import ConfigError, DataError
from treadle.spec import SplitBy, SplitSpec, Window

TRAIN, VALID, TEST = range(3)


def columns(n, *, group=None, time=None, label=None, split=None):
    return {
        "split": np.full(n, NO_SPLIT, np.uint8) if split is None else np.array(split, np.uint8),
        "group": np.arange(n, dtype=np.uint64) if group is None else np.array(group, np.uint64),
        "time": np.full(n, np.nan) if time is None else np.array(time, np.float64),
        "label": np.full(n, -1, np.int32) if label is None else np.array(label, np.int32),
    }


@st.composite
def tables(draw, *, given_splits=True):
    n = draw(st.integers(4, 60))

    def ints(low, high):
        return draw(st.lists(st.integers(low, high), min_size=n, max_size=n))

    return columns(
        n,
        group=ints(0, 12),
        time=ints(0, 40),
        label=ints(-1, 3),
        split=draw(st.lists(st.sampled_from([NO_SPLIT, 0, 1, 2]), min_size=n, max_size=n)) if given_splits else None,
    )


shares = st.sampled_from([0.0, 0.1, 0.3, 1, 3])


def specs_of(*by):
    timed = {SplitBy.time, SplitBy.walk_forward} >= {*by}
    return st.builds(
        SplitSpec,
        by=st.sampled_from(by),
        valid=shares,
        test=shares,
        seed=st.integers(0, 3),
        horizon=st.sampled_from([0.0, 3.0] if timed else [0.0]),
        embargo=st.sampled_from([0.0, 2.0] if timed else [0.0]),
        folds=st.just(3),
        fold=st.integers(0, 2),
        window=st.sampled_from(Window),
        train_rows=st.integers(1, 20),
        disjoint=st.booleans(),
    )


grouped = specs_of(SplitBy.entity, SplitBy.stratified)
timed = specs_of(SplitBy.time, SplitBy.walk_forward)
specs = grouped | timed


def try_assign(table, spec):
    try:
        return assign(table, spec)
    except (ConfigError, DataError):
        return None


def test_splitmix64_is_the_published_sequence():
    # The first outputs of the published generator from seed 0: its state goes up by the golden gamma.
    state = (np.arange(3, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(v) for v in splitmix64(state)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


@given(tables(), specs, st.randoms(use_true_random=False))
def test_a_row_has_the_same_split_wherever_it_stands(table, spec, random):
    order = list(range(len(table["split"])))
    random.shuffle(order)
    here, there = try_assign(table, spec), try_assign({k: v[order] for k, v in table.items()}, spec)
    assert (here is None) == (there is None)
    if here is not None and there is not None:
        assert (here.split_R[order] == there.split_R).all()
        assert here.dropped == there.dropped
        assert sum(here.dropped.values()) == (here.split_R == NO_SPLIT).sum()


@given(tables(given_splits=False), grouped | timed.map(lambda spec: replace(spec, disjoint=True)))
def test_no_group_stands_in_two_splits(table, spec):
    result = try_assign(table, spec)
    if result is not None:
        kept = result.split_R != NO_SPLIT
        pairs = {(int(g), int(s)) for g, s in zip(table["group"][kept], result.split_R[kept], strict=True)}
        assert len(pairs) == len({g for g, _ in pairs})


@given(tables(), specs)
def test_what_the_source_puts_into_valid_or_test_stays(table, spec):
    result = try_assign(table, spec)
    if result is None:
        return
    held = (table["split"] == VALID) | (table["split"] == TEST)
    assert (result.split_R[held] == table["split"][held]).all()
    for place in (VALID, TEST):
        followers = np.isin(table["group"], table["group"][held]) & (spec.by in (SplitBy.entity, SplitBy.stratified))
        if (table["split"] == place).any():  # not taken a second time
            assert ((result.split_R == place) <= held | followers).all()


@given(tables(given_splits=False), timed)
def test_splits_follow_one_another_in_time_with_horizon_and_embargo_between(table, spec):
    result = try_assign(table, spec)
    last = -np.inf
    for place in (TRAIN, VALID, TEST) if result is not None else ():
        times = table["time"][result.split_R == place]
        if len(times):
            assert times.min() > last
            last = times.max() + spec.horizon + spec.embargo


@given(tables(), specs_of(SplitBy.time), st.sampled_from([1.0, 5.0]))
def test_horizon_and_embargo_are_kept_on_both_sides_of_a_split_that_the_source_gives(table, spec, horizon):
    result = try_assign(table, replace(spec, horizon=horizon))
    apart = horizon + spec.embargo
    for later in (VALID, TEST) if result is not None else ():
        times = table["time"][result.split_R == TRAIN]
        span = table["time"][result.split_R == later]
        if len(span):
            assert ((times + apart < span.min()) | (times > span.max() + apart)).all()


def test_the_bits_are_these_on_every_machine():
    result = assign(columns(20, group=[i // 2 for i in range(20)]), SplitSpec(valid=2, test=0.3, seed=5))
    assert "".join(map(str, result.split_R)) == GOLDEN


GOLDEN = "00002222000000112211"


def test_shares_and_counts_are_of_groups():
    table = columns(300, group=np.repeat(np.arange(100), 3))
    for spec in (SplitSpec(valid=0.1, test=0.2), SplitSpec(valid=10, test=20)):
        assert np.bincount(assign(table, spec).split_R).tolist() == [210, 30, 60]


def test_another_seed_is_another_split():
    splits = [assign(columns(200), SplitSpec(test=0.5, seed=seed)).split_R for seed in (0, 1, 0)]
    assert (splits[0] == splits[2]).all()
    assert 60 < (splits[0] == splits[1]).sum() < 140  # two draws of a half agree on about half


def test_open_rows_follow_their_group_and_valid_is_taken_from_what_the_source_calls_train():
    table = columns(12, group=[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], split=[TEST, 255] + [TRAIN] * 10)
    result = assign(table, SplitSpec(valid=1, test=3))
    assert result.split_R[:2].tolist() == [TEST, TEST]
    assert np.bincount(result.split_R).tolist() == [8, 2, 2]  # the source gave a test: no other one is taken


def test_rows_that_the_source_itself_puts_into_two_splits_are_left_to_the_audit():
    result = assign(columns(4, group=[0, 0, 1, 2], split=[TEST, TRAIN, 255, 255]), SplitSpec())
    assert result.split_R.tolist() == [TEST, TRAIN, TRAIN, TRAIN]


def test_a_valid_split_of_the_source_is_not_taken_again():
    result = assign(columns(10, split=[VALID] + [255] * 9), SplitSpec(valid=3, test=2))
    assert np.bincount(result.split_R).tolist() == [7, 1, 2]


def test_strata_keep_their_shares():
    rng = np.random.default_rng(0)
    label = rng.choice(4, size=1000, p=[0.7, 0.2, 0.07, 0.03]) - 1
    result = assign(columns(1000, label=label), SplitSpec(by=SplitBy.stratified, valid=0.1, test=100, seed=3))
    assert np.bincount(result.split_R).tolist() == [800, 100, 100]
    for place in (VALID, TEST):
        for value in range(-1, 3):
            assert abs((label[result.split_R == place] == value).sum() - 0.1 * (label == value).sum()) < 1


@given(st.lists(st.integers(-1, 4), min_size=5, max_size=80), st.integers(0, 30), st.integers(0, 30))
def test_stratified_counts_are_largest_remainders_that_leave_one_to_train_on(label, valid, test):
    assume(valid + test < len(label) and max(label) >= 0)
    result = assign(columns(len(label), label=label), SplitSpec(by=SplitBy.stratified, valid=valid, test=test))
    counts = np.bincount(result.split_R, minlength=3)
    assert counts[VALID] == valid
    assert counts[TEST] == test
    label = np.array(label)
    trained = set(label[result.split_R == TRAIN].tolist())
    assert len(trained) == min(len(set(label.tolist())), len(label) - valid - test)
    if trained == set(label.tolist()) and np.unique(label, return_counts=True)[1].min() * (1 - test / len(label)) >= 2:
        for value in trained:  # none was held back
            assert abs(((result.split_R == TEST) & (label == value)).sum() - test * (label == value).mean()) < 1


@pytest.mark.parametrize(
    ("sizes", "share", "train"),
    [
        ([98, 2], 0.2, [58, 2]),
        ([40] + [1] * 30, 0.2, [12] + [1] * 30),
        ([95, 3, 2], 0.3, [38, 1, 1]),
        ([3] * 9, 0.3, 1),
    ],
)
def test_a_rare_label_is_left_to_train_on(sizes, share, train, caplog):
    label = np.repeat(np.arange(len(sizes)), sizes)
    spec = SplitSpec(by=SplitBy.stratified, valid=share, test=share)
    split_R = assign(columns(len(label), label=label), spec).split_R
    left = np.bincount(label[split_R == TRAIN], minlength=len(sizes))
    assert (left == train).all() if isinstance(train, list) else (left >= train).all(), left
    assert (split_R != TRAIN).sum() == 2 * int(share * len(label) + 0.5)
    assert not caplog.records


def test_labels_without_a_row_to_train_on_are_told_of(caplog):
    label = np.repeat(np.arange(10), 2)
    split_R = assign(columns(20, label=label), SplitSpec(by=SplitBy.stratified, valid=6, test=6)).split_R
    assert len(set(label[split_R == TRAIN])) == 8
    assert "got 6 and 6 of 20 entities, which leave 2 of 10 labels nothing to train on" in caplog.text
    caplog.clear()
    assign(columns(20), SplitSpec(valid=6, test=6))
    assert not caplog.records


def test_a_group_is_of_its_most_frequent_label():
    # Groups of three: two rows of label 0 and one of another, so that all are of one stratum but the last two.
    group = np.repeat(np.arange(10), 3)
    label = np.tile([0, 0, 1], 10)
    label[-6:] = [2, 2, 0, 2, 2, 0]
    result = assign(columns(30, group=group, label=label), SplitSpec(by=SplitBy.stratified, test=5))
    assert (result.split_R[-6:] == TEST).sum() == 3
    assert (result.split_R[:-6] == TEST).sum() == 12


def test_stratified_without_labels_is_refused():
    with pytest.raises(ConfigError, match="label per row"):
        assign(columns(9), SplitSpec(by=SplitBy.stratified, test=2))


def test_time_keeps_ties_together_and_purges():
    table = columns(10, time=[0, 1, 2, 3, 4, 5, 6, 7, 7, 8])
    plain = assign(table, SplitSpec(by=SplitBy.time, test=2, valid=2))
    assert plain.split_R.tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2, 2]
    window = assign(table, SplitSpec(by=SplitBy.time, test=2, valid=2, horizon=1))
    assert window.split_R.tolist() == [0, 0, 0, 255, 1, 1, 255, 2, 2, 2]
    assert window.dropped == {"purged": 2}
    both = assign(table, SplitSpec(by=SplitBy.time, test=2, valid=1, horizon=1, embargo=1))
    assert both.split_R.tolist() == [0, 0, 255, 255, 1, 255, 255, 2, 2, 2]
    assert both.dropped == {"purged": 2, "embargo": 2}


def test_disjoint_drops_earlier_rows_of_later_groups():
    table = columns(8, time=np.arange(8), group=[0, 1, 2, 3, 2, 4, 3, 5])
    spec = SplitSpec(by=SplitBy.time, test=2, valid=2, disjoint=True)
    result = assign(table, spec)
    assert result.split_R.tolist() == [0, 0, 255, 255, 1, 1, 2, 2]
    assert result.dropped == {"entity in a later split": 2}


def test_by_time_purges_before_a_test_of_the_source_and_leaves_the_sources_rows():
    table = columns(6, time=np.arange(6), split=[255, TRAIN, 255, VALID, TEST, TEST])
    result = assign(table, SplitSpec(by=SplitBy.time, valid=1, test=1, horizon=1))
    assert result.split_R.tolist() == [0, 0, 255, 1, 2, 2]  # the window of row 3 is the audit's to find


def test_horizon_and_embargo_hold_after_a_test_of_the_source_too():
    # The label windows of the test reach the rows after it: what these hold is known when the test is decided.
    table = columns(9, time=np.arange(9), split=[TEST, TEST] + [NO_SPLIT] * 7)
    result = assign(table, SplitSpec(by=SplitBy.time, valid=1, horizon=1, embargo=1))
    assert result.split_R.tolist() == [2, 2, 255, 255, 0, 0, 255, 255, 1]
    assert result.dropped == {"purged": 2, "embargo": 2}


def test_no_hour_is_kept_by_rounding():
    hours = np.arange(5000)
    time = (1_704_067_200_000_000 + 3_600_000_000 * hours) / 86_400e6  # as days since 1970, from microseconds
    test = np.arange(300, 4700, 11)
    for horizon in (1, 2, 3, 5, 6, 7, 8, 24, 36):
        for row in test:
            near = time[[row - horizon - 1, row - horizon, row + horizon, row + horizon + 1]]
            found = window_reaches(near, horizon / 24, time[row : row + 1])
            assert found.tolist() == [False, True, True, False]
    table = columns(1000, time=time[:1000])
    for start in range(100):
        table["time"] = time[start : start + 1000]
        split_R = assign(table, SplitSpec(by=SplitBy.time, test=0.2, horizon=2 / 24, embargo=3 / 24)).split_R
        assert np.flatnonzero(split_R == TRAIN).max() == 794


def test_no_horizon_is_endless_or_lost():
    time = np.array([0.0, 1.0, np.nan])
    assert window_reaches(time, np.inf, np.array([5.0])).tolist() == [True, True, False]
    assert window_reaches(time, 9.0, np.array([np.nan])).tolist() == [False] * 3


def time_series_split(
    n_samples: int, n_splits: int, *, max_train_size: int | None = None, test_size: int | None = None, gap: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What scikit-learn 1.9 documents of TimeSeriesSplit, written from its description."""
    size = test_size if test_size is not None else n_samples // (n_splits + 1)
    if n_splits + 1 > n_samples or n_samples - gap - size * n_splits <= 0:
        raise ValueError("too many splits")
    for start in range(n_samples - n_splits * size, n_samples, size):
        train = np.arange(start - gap)
        yield train[-max_train_size:] if max_train_size else train, np.arange(start, start + size)


@given(
    st.integers(3, 80),
    st.integers(2, 6),
    st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 30),
    st.integers(0, 4),
    st.sampled_from([0, 1, 0.2]),
    st.randoms(use_true_random=False),
)
def test_walking_forward_is_time_series_split(n, folds, size, train_rows, gap, valid, random):
    try:
        expected = list(time_series_split(n, folds, max_train_size=train_rows, test_size=size, gap=gap))
    except ValueError:
        assume(False)
    time = list(range(n))
    random.shuffle(time)
    for fold, (train, test) in enumerate(expected):
        spec = SplitSpec(
            by=SplitBy.walk_forward,
            test=size or 0,
            folds=folds,
            fold=fold,
            embargo=gap,  # between times that are a unit apart, time is a number of rows
            window=Window.rolling if train_rows else Window.expanding,
            train_rows=train_rows,
        )
        split_T = assign(columns(n, time=time), spec).split_R[np.argsort(time)]
        assert np.flatnonzero(split_T == TRAIN).tolist() == train.tolist()
        assert np.flatnonzero(split_T == TEST).tolist() == test.tolist()
        count = int(valid * len(train) + 0.5) if valid < 1 else 1
        if valid and not gap and 0 < count < len(train):  # valid is the end of the training window
            split_T = assign(columns(n, time=time), replace(spec, valid=valid)).split_R[np.argsort(time)]
            assert np.flatnonzero(split_T == TRAIN).tolist() == train[:-count].tolist()
            assert np.flatnonzero(split_T == VALID).tolist() == train[-count:].tolist()


def test_walking_forward_says_what_it_left_out():
    spec = SplitSpec(
        by=SplitBy.walk_forward, folds=3, fold=1, test=2, window=Window.rolling, train_rows=3, horizon=1, valid=1
    )
    result = assign(columns(12, time=np.arange(12)), spec)
    assert result.split_R.tolist() == [255] * 4 + [0, 255, 1, 255, 2, 2, 255, 255]
    assert result.dropped == {"after the fold": 2, "purged": 2, "before the window": 4}


def test_walking_forward_keeps_ties_together():
    spec = SplitSpec(by=SplitBy.walk_forward, folds=2, fold=0, test=2)
    assert assign(columns(7, time=[0, 1, 2, 2, 3, 3, 4]), spec).split_R.tolist() == [0, 0, 2, 2, 255, 255, 255]
    with pytest.raises(DataError, match="no rows in fold 0"):
        assign(columns(7, time=[0, 1, 3, 3, 3, 3, 3]), spec)


@pytest.mark.parametrize(
    ("table", "spec", "words"),
    [
        (columns(4), SplitSpec(valid=2, test=2), ["split.valid", "split.test", "of 4 entities", "nothing to train on"]),
        (
            columns(6, time=range(6), group=[0, 1, 2, 3, 3, 4]),
            SplitSpec(by=SplitBy.time, valid=1, test=2, disjoint=True),
            ["split.valid: got no rows", "1 rows entity in a later split"],
        ),
        (columns(10), SplitSpec(valid=0.01), ["split.valid: got 0.01 of 10", "none"]),
        (columns(4, split=[2] * 4), SplitSpec(), ["nothing to train on"]),
        (columns(4, time=[1, 1, 1, 1]), SplitSpec(by=SplitBy.time, test=1), ["nothing to train on"]),
        (columns(9, time=range(9)), SplitSpec(by=SplitBy.time, test=1, horizon=9), ["8 rows purged"]),
        (
            columns(9, time=range(9), split=[255] * 7 + [2, 2]),
            SplitSpec(by=SplitBy.time, valid=1, embargo=5),
            ["split.valid"],
        ),
        (columns(3, time=[1, np.nan, np.nan]), SplitSpec(by=SplitBy.time), ["2 of 3 rows without a time", "hint"]),
        (columns(9, time=range(9)), SplitSpec(by=SplitBy.walk_forward, test=3, folds=3), ["3 folds of 3 rows"]),
        (columns(3, time=range(3)), SplitSpec(by=SplitBy.walk_forward), ["folds"]),
    ],
)
def test_what_cannot_be_split_is_said(table, spec, words):
    with pytest.raises(DataError) as error:
        assign(table, spec)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_walking_forward_is_refused_beside_a_test_of_the_source():
    with pytest.raises(ConfigError, match="walk_forward"):
        assign(columns(9, time=range(9), split=[255] * 8 + [2]), SplitSpec(by=SplitBy.walk_forward, folds=2))


@pytest.mark.parametrize("by", [SplitBy.entity, SplitBy.stratified])
def test_a_horizon_without_anything_to_keep_it_from_is_refused(by):
    label, spec = np.arange(9) % 2, SplitSpec(by=by, test=2, horizon=3)
    with pytest.raises(ConfigError, match=rf"split.horizon: got 3, expected 0 where rows go by {by.value}") as error:
        assign(columns(9, time=range(9), label=label), spec)
    assert "split.by=time" in error.value.hint
    assign(columns(9, time=range(9), label=label, split=[255] * 8 + [TEST]), spec)  # the audit compares the source's
    with pytest.raises(ConfigError, match=rf"split.embargo: got 2, expected 0 beside split.by={by.value}"):
        SplitSpec(by=by, embargo=2)

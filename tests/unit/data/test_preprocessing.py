"""Fitting: the numbers of numpy in float64, of training rows only, one block at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from row_tables import frames_table, table, tokens_table

from treadle.data.manifest import NO_SPLIT
from treadle.data.splits.fit import UNKNOWN, Moments, fit_preprocessing
from treadle.errors import ConfigError, DataError
from treadle.spec import DataSpec, Missing, TargetPer

DATA = DataSpec(name="toy")
TRAIN, TEST = 0, 2


def every_third(n):
    split_R = np.zeros(n, np.uint8)
    split_R[::3] = TEST
    split_R[1::7] = NO_SPLIT
    return split_R


def training_frames(reader, split_R):
    return np.concatenate([reader.values[i] for i in np.flatnonzero(split_R == TRAIN)]).astype(np.float64)


@pytest.mark.parametrize("per_block", [1, 7, 1000])
def test_scales_are_numpys_of_the_training_frames(per_block):
    rows, reader = frames_table(300, 5, per_block=per_block)
    split_R = every_third(300)
    fitted = fit_preprocessing(rows, split_R, reader, DATA)
    frames = training_frames(reader, split_R)
    np.testing.assert_allclose(fitted.mean, frames.mean(axis=0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(fitted.deviation, frames.std(axis=0), rtol=1e-12)
    assert fitted.fitted_rows == (split_R == TRAIN).sum()
    assert fitted.channels == ("c0", "c1", "c2", "c3", "c4")
    assert fitted.labels == ("no", "yes")
    assert (fitted.symbols, fitted.gap, fitted.values) == ((), (), ())


@pytest.mark.parametrize("frames", [1, 50])  # rows are copied frame by frame, or by runs of rows
@pytest.mark.parametrize("last", [TRAIN, TEST])
def test_training_rows_are_the_ones_measured_whatever_their_length(frames, last):
    rng = np.random.default_rng(0)
    rows, reader = table([rng.normal(size=(frames, 3)).astype(np.float32) for _ in range(60)], channels=["a", "b", "c"])
    split_R = every_third(60)
    split_R[[15, 59]] = last  # at the end of a block and of the data set
    fitted = fit_preprocessing(rows, split_R, reader, DATA)
    np.testing.assert_allclose(fitted.mean, training_frames(reader, split_R).mean(axis=0), rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "mean", "deviation"),
    [
        ("far", 1e6, 1e-2),
        ("farther", 1e7, 1.0),
        ("drifting", 0.0, 1.0),
        ("first outlies", 5.0, 1.0),
        ("tiny", 1e-20, 1e-22),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_large_cancels(name, mean, deviation, dtype):
    rng = np.random.default_rng(1)
    x_ND = (mean + deviation * rng.normal(size=(300_000, 2))).astype(dtype)
    if name == "drifting":
        x_ND += np.linspace(-1e6, 1e6, len(x_ND))[:, None].astype(dtype)
    if name == "first outlies":
        x_ND[0] = 1e8
    moments = Moments(2)
    for part in np.array_split(x_ND, 17):
        moments.add(part.reshape(-1))
    exact = x_ND.astype(np.longdouble)
    mean_D, deviation_D = exact.mean(axis=0).astype(float), exact.std(axis=0).astype(float)
    assert (abs(moments.mean_D - mean_D) <= 4 * np.spacing(abs(mean_D)) + 1e-9 * deviation_D).all()
    np.testing.assert_allclose(moments.deviation_D, deviation_D, rtol=1e-9)


@given(
    st.integers(1, 40),
    st.integers(1, 1500),
    st.lists(st.integers(1, 3000), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.3, 0.95]),
    st.integers(0, 99),
)
def test_moments_are_of_observed_values_however_they_are_cut(width, rows, cuts, hidden, seed):
    rng = np.random.default_rng(seed)
    x_ND = rng.normal(rng.normal(size=width) * 10, 1, size=(rows, width))
    x_ND[rng.random(x_ND.shape) < hidden] = np.nan
    moments = Moments(width)
    for part in np.split(x_ND, sorted(cut % rows for cut in cuts)):
        moments.add(part.reshape(-1), missing=True)
    observed = ~np.isnan(x_ND)
    assert (moments.count_D == observed.sum(axis=0)).all()
    for channel in np.flatnonzero(observed.any(axis=0)):
        x_N = x_ND[observed[:, channel], channel]
        assert moments.mean_D[channel] == pytest.approx(x_N.mean(), abs=1e-12, rel=1e-12)
        expected = x_N.std() if np.unique(x_N).size > 1 else 1.0
        assert moments.deviation_D[channel] == pytest.approx(expected, rel=1e-9)


def test_a_channel_of_one_value_has_deviation_one():
    values = [np.full((3, 1), 0.1, np.float32) for _ in range(20)]
    fitted = fit_preprocessing(*_with(table(values, channels=["c"])), DATA)
    assert fitted.deviation == (1.0,)
    assert fitted.mean == (float(np.float32(0.1)),)


def _with(pair, split_R=None):
    rows, reader = pair
    return rows, np.zeros(rows.num_rows, np.uint8) if split_R is None else split_R, reader


def test_missing_values_are_left_out():
    values = [np.array([[1, np.nan], [3, 5]], np.float32), np.array([[np.nan, 7]], np.float32)]
    pair = table(values, channels=["a", "b"], missing=True, per_block=1)
    for missing in (Missing.mean, Missing.indicator):
        fitted = fit_preprocessing(*_with(pair), DataSpec(name="toy", missing=missing))
        assert (fitted.mean, fitted.deviation) == ((2.0, 6.0), (1.0, 1.0))
        assert fitted.missing is missing
        assert fitted.input_size == (2 if missing is Missing.mean else 4)


def test_missing_values_are_counted_and_refused_also_outside_training():
    values = [np.array([[1, np.nan], [3, np.nan]], np.float32), np.array([[2, 7]], np.float32)]
    pair = table(values, channels=["a", "b"], missing=True)
    with pytest.raises(DataError, match=r"2 values that are missing, in b \(2\)") as error:
        fit_preprocessing(*_with(pair, np.array([TEST, TRAIN], np.uint8)), DATA)
    assert "data.missing=mean" in error.value.hint
    dropped = np.array([NO_SPLIT, TRAIN], np.uint8)
    assert fit_preprocessing(*_with(pair, dropped), DATA).mean == (2.0, 7.0)


def test_a_channel_without_a_training_value_is_named():
    values = [np.array([[1, 2]], np.float32), np.array([[2, np.nan]], np.float32)]
    pair = table(values, channels=["a", "b"], missing=True)
    with pytest.raises(DataError, match="channels: got 'b' without a value"):
        fit_preprocessing(*_with(pair, np.array([TEST, TRAIN], np.uint8)), DataSpec(name="toy", missing=Missing.mean))


def test_the_vocabulary_is_of_training_rows():
    values = [np.array(v, np.int32) for v in ([3, 1, 1], [0], [2, 3], [4, 0])]
    pair = table(values, symbols=["a", "b", "c", "d", UNKNOWN], labels=["x"], label=[0] * 4, per_block=2)
    fitted = fit_preprocessing(*_with(pair, np.array([TRAIN, TEST, NO_SPLIT, TRAIN], np.uint8)), DATA)
    assert fitted.symbols == (UNKNOWN, "a", "b", "d")
    assert (fitted.mean, fitted.deviation, fitted.channels, fitted.labels) == ((), (), (), ("x",))


def test_gaps_are_measured_on_their_logarithm():
    rng = np.random.default_rng(0)
    for make in (frames_table, tokens_table):
        lengths = [len(v) for v in make(50)[1].values]
        gaps = [np.concatenate([[0], rng.exponential(30, n - 1)]).astype(np.float32) for n in lengths]
        rows, reader = make(50, gaps=gaps)
        split_R = every_third(50)
        fitted = fit_preprocessing(rows, split_R, reader, DataSpec(name="toy", gaps=True))
        logs = np.log1p(np.concatenate([gaps[i] for i in np.flatnonzero(split_R == TRAIN)]).astype(np.float64))
        np.testing.assert_allclose(fitted.gap, (logs.mean(), logs.std()), rtol=1e-12)
        assert fit_preprocessing(rows, split_R, reader, DATA).gap == ()
    with pytest.raises(ConfigError, match="rows without times"):
        fit_preprocessing(*_with(frames_table()), DataSpec(name="toy", gaps=True))


@pytest.mark.parametrize("per", [TargetPer.row, TargetPer.frame])
def test_target_values_are_measured_where_there_are_any(per):
    rng = np.random.default_rng(0)
    inputs = frames_table(60)[1].values
    targets = [rng.normal(3, 9, size=(1 if per is TargetPer.row else len(v), 2)).astype(np.float32) for v in inputs]
    if per is TargetPer.frame:
        for target in targets:
            target[rng.random(target.shape) < 0.3] = np.nan
    pair = frames_table(60, targets=targets, value_names=["u", "v"], labels=(), per=per)
    split_R = every_third(60)
    fitted = fit_preprocessing(*_with(pair, split_R), DATA)
    kept = np.concatenate([targets[i] for i in np.flatnonzero(split_R == TRAIN)]).astype(np.float64)
    np.testing.assert_allclose(fitted.values, np.transpose([np.nanmean(kept, 0), np.nanstd(kept, 0)]), rtol=1e-12)


def test_one_block_is_held_at_a_time():
    rows, reader = frames_table(100, per_block=10)
    fit_preprocessing(rows, np.zeros(100, np.uint8), reader, DATA)
    assert reader.rows_read == 100  # each row once

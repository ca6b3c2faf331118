"""Changed rows: the same whatever they stand beside, what each change does, and what it leaves alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.data import Batch, Form, Preprocessing
from treadle.data.load.augment import augment_batch
from treadle.data.load.draws import Draws, Purpose
from treadle.spec import AugmentSpec, Missing

EVERYTHING = AugmentSpec(
    jitter=0.3, scale=0.2, time_masks=2, time_mask_share=0.3, channel_masks=1, channel_mask_share=0.7, warp=0.4
)
SHORTER = dataclasses.replace(EVERYTHING, crop=0.4, drop=0.3)
CHANNELS = 3
GAP = (0.5, 2.0)


def preprocessing(*, tokens: bool = False, missing: Missing = Missing.refuse, timed: bool = False) -> Preprocessing:
    names = () if tokens else tuple("abc")
    return Preprocessing(
        symbols=tuple("?xyz") if tokens else (),
        channels=names,
        mean=(0.0,) * len(names),
        deviation=(1.0,) * len(names),
        labels=("l",),
        missing=missing,
        gap=GAP if timed else (),
    )


def gap_channel(gaps):
    return (np.log1p(gaps) - np.float32(GAP[0])) / np.float32(GAP[1])


def row_of(number: int, length: int, known: Preprocessing) -> dict[str, Any]:
    """What a data set holds of a row: the same for the same number."""
    rng = np.random.default_rng([number, length])
    gaps = np.concatenate(([0], rng.exponential(3, length - 1))).astype(np.float32)
    if known.symbols:
        inputs = rng.integers(1, 4, length)
    else:
        inputs = rng.normal(0, 1, (length, CHANNELS)).astype(np.float32)
        if known.missing is Missing.indicator:
            observed = (rng.random((length, CHANNELS)) < 0.6).astype(np.float32)
            inputs = np.concatenate((inputs * observed, observed), axis=1)
        if known.gap:
            inputs = np.concatenate((inputs, gap_channel(gaps)[:, None]), axis=1)
    values = rng.normal(0, 1, (length, 2)).astype(np.float32)
    return {"inputs": inputs, "gaps": gaps, "labels": rng.integers(0, 5, length), "values": values}


def batch_of(lengths, known, *, form=Form.padded, rows=None, per_frame=False, steps=0) -> Batch:
    rows = list(range(len(lengths))) if rows is None else rows
    found = [row_of(row, length, known) for row, length in zip(rows, lengths, strict=True)]
    width = max(*lengths, steps) if len(lengths) > 1 else max(lengths[0], steps)

    def laid(name, empty=0, packed=form is Form.packed):
        if packed:
            return np.concatenate([row[name] for row in found])
        whole = np.full((len(rows), width, *found[0][name].shape[1:]), empty, dtype=found[0][name].dtype)
        for i, row in enumerate(found):
            whole[i, : lengths[i]] = row[name]
        return whole

    return Batch(
        inputs=laid("inputs"),
        lengths_B=np.array(lengths),
        labels_BU=laid("labels", -1, packed=False) if per_frame else np.zeros((len(rows), 1), np.int64),
        label_lengths_B=np.array(lengths) if per_frame else np.ones(len(rows), np.int64),
        rows_B=np.array(rows),
        weights_B=np.ones(len(rows), np.float32),
        values=laid("values", np.nan, packed=False) if per_frame else None,
        gaps=laid("gaps") if known.gap else None,
        form=form,
    )


def rows_in(batch: Batch, name: str = "inputs") -> list[np.ndarray]:
    """Each row's part of an array, without padding."""
    array = getattr(batch, name)
    if batch.form is Form.packed and name in ("inputs", "gaps"):
        return np.split(array, np.cumsum(batch.lengths_B)[:-1])
    return [array[i, :length] for i, length in enumerate(batch.lengths_B)]


def changed(batch, spec, known, *, seed=0, epoch=0, **options):
    return augment_batch(batch, spec, known, seed=seed, epoch=epoch, **options)


KINDS = st.builds(
    preprocessing, tokens=st.just(False), missing=st.sampled_from(list(Missing)), timed=st.booleans()
) | st.just(preprocessing(tokens=True))


def fitting(known: Preprocessing, spec: AugmentSpec) -> AugmentSpec:
    """What tokens can take of a spec."""
    return dataclasses.replace(spec, jitter=0, scale=0, channel_masks=0, warp=0) if known.symbols else spec


@settings(max_examples=150, deadline=None)
@given(
    known=KINDS,
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    spec=st.sampled_from([EVERYTHING, SHORTER]),
    order=st.randoms(use_true_random=False),
    steps=st.integers(0, 50),
)
def test_a_row_is_changed_alike_in_any_batch_form_and_company(known, lengths, spec, order, steps):
    spec = fitting(known, spec)
    options = {"per_frame": True, "seed": 3, "epoch": 2}
    padded = changed(batch_of(lengths, known, per_frame=True, steps=steps), spec, known, **options)
    packed = changed(batch_of(lengths, known, per_frame=True, form=Form.packed), spec, known, **options)
    rows = list(range(len(lengths)))
    order.shuffle(rows)
    some = rows[: max(1, len(rows) // 2)]
    other = batch_of([lengths[row] for row in some], known, rows=some, per_frame=True)
    shuffled = changed(other, spec, known, **options)
    for name in ("inputs", "labels_BU", "values", *(("gaps",) if known.gap else ())):
        whole = rows_in(padded, name)
        for row, (one, two) in enumerate(zip(whole, rows_in(packed, name), strict=True)):
            np.testing.assert_array_equal(one, two, err_msg=f"{name} of row {row}, packed")
        for row, one in zip(some, rows_in(shuffled, name), strict=True):
            np.testing.assert_array_equal(whole[row], one, err_msg=f"{name} of row {row}, in another batch")


@settings(max_examples=100, deadline=None)
@given(known=KINDS, lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9), epoch=st.integers(0, 99))
def test_what_comes_out_is_a_batch(known, lengths, epoch):
    spec = fitting(known, SHORTER)
    batch = changed(batch_of(lengths, known, per_frame=True), spec, known, epoch=epoch, per_frame=True)
    assert (batch.lengths_B >= 1).all()
    assert (batch.lengths_B <= lengths).all()
    assert batch.inputs.shape[:2] == (len(lengths), batch.lengths_B.max())
    np.testing.assert_array_equal(batch.label_lengths_B, batch.lengths_B)
    padding = np.arange(batch.inputs.shape[1]) >= batch.lengths_B[:, None]
    assert not batch.inputs[padding].any()
    assert (batch.labels_BU[padding] == -1).all()
    assert np.isnan(batch.values[padding]).all()
    assert not np.isnan(batch.values[~padding]).any()
    assert np.isfinite(batch.inputs).all()
    if known.gap:
        assert not batch.gaps[padding].any()
        np.testing.assert_allclose(batch.inputs[~padding][:, -1], gap_channel(batch.gaps[~padding]), rtol=1e-6)
        assert not batch.gaps[:, 0].any()
    if known.missing is Missing.indicator:
        observed = batch.inputs[..., CHANNELS : 2 * CHANNELS]
        assert set(np.unique(observed)) <= {0.0, 1.0}
        assert not batch.inputs[..., :CHANNELS][observed == 0].any()


def test_epochs_seeds_and_rows_differ_and_repeat():
    known = preprocessing()
    lengths = [30, 30]

    def inputs(seed, epoch, rows=(0, 1)):
        return changed(batch_of(lengths, known, rows=list(rows)), EVERYTHING, known, seed=seed, epoch=epoch).inputs

    np.testing.assert_array_equal(inputs(1, 4), inputs(1, 4))
    assert (inputs(1, 4) != inputs(1, 5)).any()
    assert (inputs(1, 4) != inputs(2, 4)).any()
    noise = changed(batch_of(lengths, known), AugmentSpec(jitter=1), known).inputs - batch_of(lengths, known).inputs
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.3


def test_nothing_asked_is_nothing_done():
    known = preprocessing()
    batch = batch_of([4, 2], known)
    assert changed(batch, AugmentSpec(), known) is batch


# ---- each change ----


def test_noise_is_normal_and_of_the_size_asked():
    draws = Draws(np.arange(200), seed=5, epoch=1)
    noise = np.zeros((200 * 50, 7), np.float32)
    row_M, position_M = np.divmod(np.arange(200 * 50), 50)
    draws.add_noise(noise, 2.0, row_M=row_M, position_M=position_M, open_MV=None)
    flat = np.sort(noise.ravel() / 2)
    assert abs(flat.mean()) < 0.01
    assert abs(flat.std() - 1) < 0.01
    shares = [np.searchsorted(flat, z) / len(flat) for z in (-2, -1, 0, 1, 2)]
    np.testing.assert_allclose(shares, [0.02275, 0.15866, 0.5, 0.84134, 0.97725], atol=0.006)
    for shift in (1, 7, 350):  # neighbours in channel, frame and row
        assert abs(np.corrcoef(noise.ravel()[:-shift], noise.ravel()[shift:])[0, 1]) < 0.02


@pytest.mark.parametrize("purpose", list(Purpose))
def test_uniform_numbers_are_uniform_and_independent(purpose):
    draws = Draws(np.arange(20_000), seed=5, epoch=1)
    found = np.stack([draws.uniform(purpose, number) for number in range(3)])
    counts = np.stack([np.histogram(u, bins=20, range=(0, 1))[0] for u in found])
    chi = ((counts - 1000) ** 2 / 1000).sum(1)
    assert (chi < 50).all()  # 19 degrees of freedom: above once in 10,000
    assert np.abs(np.corrcoef(found)[np.triu_indices(3, 1)]).max() < 0.03
    other = Draws(np.arange(20_000), seed=5, epoch=2).uniform(purpose, 0)
    assert abs(np.corrcoef(found[0], other)[0, 1]) < 0.03


def test_draws_stay_as_they_are():
    """A run resumed by a later version draws what the earlier one drew."""
    draws = Draws(np.array([0, 1, 2**40]), seed=7, epoch=3)
    assert [f"{u:.12f}" for u in draws.uniform(Purpose.crop, 1)] == GOLDEN_UNIFORM
    noise = np.zeros((2, 5), np.float32)
    draws.add_noise(noise, 1.0, row_M=np.array([0, 2]), position_M=np.array([0, 9]), open_MV=None)
    assert [f"{v:.4f}" for v in noise.ravel()] == GOLDEN_NOISE


GOLDEN_UNIFORM = ["0.973313557552", "0.651032602776", "0.060483482971"]
GOLDEN_NOISE = ["1.7950", "-1.0001", "0.4021", "0.7842", "0.6038", "0.2503", "1.3827", "0.2944", "0.6711", "0.2427"]


def test_jitter_and_scale_leave_gaps_indicators_and_missing_values_alone():
    known = preprocessing(missing=Missing.indicator, timed=True)
    before = batch_of([20, 9], known).inputs
    after = changed(batch_of([20, 9], known), AugmentSpec(jitter=0.5, scale=0.3), known).inputs
    observed = before[..., CHANNELS : 2 * CHANNELS] > 0
    np.testing.assert_array_equal(after[..., CHANNELS:], before[..., CHANNELS:])
    np.testing.assert_array_equal(after[..., :CHANNELS][~observed], 0)
    assert (after[..., :CHANNELS] != before[..., :CHANNELS])[observed].mean() > 0.99


def test_scale_is_one_factor_a_row_within_its_bounds():
    known = preprocessing()
    lengths = [5] * 200
    factors = changed(batch_of(lengths, known), AugmentSpec(scale=0.2), known).inputs / batch_of(lengths, known).inputs
    np.testing.assert_allclose(factors, np.broadcast_to(factors[:, :1, :1], factors.shape), rtol=1e-5)
    assert 0.8 <= factors.min() < 0.81
    assert 1.19 < factors.max() <= 1.2


@pytest.mark.parametrize("form", list(Form))
def test_time_masks_blank_spans_no_longer_than_asked(form):
    known = preprocessing(missing=Missing.indicator, timed=True)
    lengths = [40] * 100
    spec = AugmentSpec(time_masks=1, time_mask_share=0.25)
    before, after = batch_of(lengths, known, form=form), changed(batch_of(lengths, known, form=form), spec, known)
    widths = []
    for old, new in zip(rows_in(before), rows_in(after), strict=True):
        blank = ~new[:, : 2 * CHANNELS].any(1) & old[:, : 2 * CHANNELS].any(1)
        np.testing.assert_array_equal(new[:, -1], old[:, -1])  # time passes under a mask, too
        np.testing.assert_array_equal(new[~blank], old[~blank])
        at = np.flatnonzero(blank)
        widths.append(len(at))
        assert len(at) == 0 or at[-1] - at[0] < 10
    assert max(widths) == 10
    assert min(widths) == 0


def test_time_masks_make_symbols_unknown():
    known = preprocessing(tokens=True)
    before, spec = batch_of([40] * 50, known).inputs, AugmentSpec(time_masks=3, time_mask_share=0.2)
    after = changed(batch_of([40] * 50, known), spec, known).inputs
    assert set(np.unique(after)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(after[after > 0], before[after > 0])
    assert 0.1 < (after == 0).mean() < 0.4


def test_channel_masks_blank_whole_channels():
    known = preprocessing(missing=Missing.indicator, timed=True)
    spec = AugmentSpec(channel_masks=1, channel_mask_share=0.7)  # 2 of 3
    after = changed(batch_of([12] * 200, known), spec, known).inputs
    before = batch_of([12] * 200, known).inputs
    gone = ~after[..., CHANNELS : 2 * CHANNELS].any(1)
    assert set(gone.sum(1)) == {0, 1, 2}
    np.testing.assert_array_equal(after[..., :CHANNELS].any(1), ~gone)
    np.testing.assert_array_equal(after[..., -1], before[..., -1])
    kept = np.repeat(~gone[:, None], 12, axis=1)
    np.testing.assert_array_equal(after[..., :CHANNELS][kept], before[..., :CHANNELS][kept])


def ramp_batch(length: int, num: int, *, timed: bool = False) -> tuple[Batch, Preprocessing]:
    """Rows whose values, labels and targets say which frame they are."""
    known = preprocessing(timed=timed)
    batch = batch_of([length] * num, known, per_frame=True)
    batch.inputs[..., :CHANNELS] = np.arange(length)[:, None]
    batch.labels_BU[:] = np.arange(length)
    batch.values[:] = np.arange(length)[:, None]
    if timed:
        batch.gaps[:, 1:] = 2.0
    return batch, known


def test_a_warp_keeps_length_ends_and_order_and_moves_labels_along():
    batch, known = ramp_batch(41, 200, timed=True)
    after = changed(batch, AugmentSpec(warp=0.3), known, per_frame=True)
    source = after.inputs[..., 0]
    np.testing.assert_allclose(source[:, 0], 0)
    np.testing.assert_allclose(source[:, -1], 40)
    assert (np.diff(source, axis=1) > 0).all()
    moved = source[:, 20] - 20
    assert 0.1 * 41 < moved.max() <= 0.4 * 41
    assert -0.4 * 41 <= moved.min() < -0.1 * 41
    assert np.abs(after.labels_BU - source).max() <= 0.5 + 1e-5
    np.testing.assert_array_equal(after.values[..., 0], after.labels_BU)
    np.testing.assert_allclose(after.gaps.sum(1), 80, rtol=1e-5)  # the row lasts as long as before
    np.testing.assert_allclose(after.gaps[:, 1:], 2 * np.diff(source, axis=1), rtol=1e-4, atol=1e-5)


def test_crop_takes_the_ends_and_no_more_than_asked():
    batch, known = ramp_batch(40, 300)
    after = changed(batch, AugmentSpec(crop=0.25), known, per_frame=True)
    assert after.lengths_B.min() == 30
    assert after.lengths_B.max() == 40
    firsts, lasts = set(), set()
    for row in rows_in(after):
        np.testing.assert_array_equal(np.diff(row[:, 0]), 1)
        firsts.add(row[0, 0])
        lasts.add(row[-1, 0])
    assert firsts == set(range(11))
    assert lasts == set(range(29, 40))
    for row, labels in zip(rows_in(after), rows_in(after, "labels_BU"), strict=True):
        np.testing.assert_array_equal(labels, row[:, 0])


def test_dropped_frames_leave_their_gaps_to_the_next():
    batch, known = ramp_batch(50, 200, timed=True)
    times = np.cumsum(batch.gaps[0].astype(np.float64))
    after = changed(batch, AugmentSpec(drop=0.4), known, per_frame=True)
    assert abs(after.lengths_B.mean() / 50 - 0.6) < 0.02
    for row, gaps in zip(rows_in(after), rows_in(after, "gaps"), strict=True):
        expected = np.diff(times[row[:, 0].astype(int)], prepend=times[int(row[0, 0])])
        np.testing.assert_allclose(gaps, expected, rtol=1e-6)


def test_one_frame_at_least_stays():
    known = preprocessing(tokens=True)
    after = changed(batch_of([1, 2, 3] * 50, known), AugmentSpec(drop=0.99, crop=0.99), known)
    assert after.lengths_B.min() == 1
    assert (rows_in(after)[0] > 0).all()


def test_shortened_batches_are_padded_as_asked():
    known = preprocessing()
    batch = batch_of([40] * 5, known)
    after = changed(batch, AugmentSpec(crop=0.5), known, multiple_of=16)
    assert after.lengths_B.max() < 40
    assert after.inputs.shape[1] == -(-after.lengths_B.max() // 16) * 16


def test_noise_goes_on_from_piece_to_piece_of_a_row():
    known = preprocessing()
    whole = changed(batch_of([20], known, rows=[4]), AugmentSpec(jitter=1), known).inputs[0]
    both = np.stack((row_of(4, 20, known)["inputs"][:12], np.zeros((12, 3), np.float32)))
    both[1, :8] = row_of(4, 20, known)["inputs"][12:]
    pieces = batch_of([12, 8], known)._replace(inputs=both, rows_B=np.array([4, 4]))
    after = changed(pieces, AugmentSpec(jitter=1), known, starts_B=np.array([0, 12])).inputs
    np.testing.assert_array_equal(np.concatenate((after[0], after[1, :8])), whole)


def test_arrays_that_cannot_be_written_are_copied():
    known = preprocessing()
    batch = batch_of([6, 3], known)
    batch.inputs.flags.writeable = False
    before = batch.inputs.copy()
    after = changed(batch, EVERYTHING, known)
    np.testing.assert_array_equal(batch.inputs, before)
    assert (after.inputs != before).any()

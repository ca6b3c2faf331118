"""Repeats: rare labels up to the cap, by powers, and as often as asked."""

from __future__ import annotations

import numpy as np
import pytest

from treadle.errors import ConfigError, DataError
from treadle.plan import class_repeats, plan_epoch
from treadle.plan.repeats import draw_entries
from treadle.spec import BatchSpec

LABELS = np.repeat([0, 1, 2, -1], [900, 90, 9, 5])


def shares(balance, cap=1000):
    repeats_N = class_repeats(LABELS, BatchSpec(class_balance=balance, max_repeats=cap))
    return repeats_N, [repeats_N[label == LABELS].sum() for label in (0, 1, 2, -1)]


def test_full_balance_makes_all_labels_occur_alike():
    repeats_N, sums = shares(1.0)
    assert sums == pytest.approx([900, 900, 900, 5])
    assert repeats_N[LABELS == -1].tolist() == [1.0] * 5


def test_powers_are_between():
    assert shares(0.5)[1] == pytest.approx([900, 90 * 10**0.5, 9 * 10, 5], rel=1e-4)


def test_no_row_stands_more_often_than_the_cap():
    repeats_N, _ = shares(1.0, cap=20)
    assert repeats_N.max() == 20
    assert sorted(set(repeats_N.tolist())) == [1.0, 10.0, 20.0]


def test_without_balance_or_labels_every_row_stands_once():
    assert class_repeats(LABELS, BatchSpec()) is None
    assert class_repeats(np.full(4, -1), BatchSpec(class_balance=1.0)) is None


def test_repeats_do_not_hang_on_the_last_bit_of_a_power():
    repeats_N, _ = shares(0.3)
    assert (repeats_N * 65536 == np.round(repeats_N * 65536)).all()


def test_the_share_of_epochs_is_what_is_left_of_the_repeats():
    repeats_N = np.array([0.0, 0.25, 1.0, 1.5, 2.75])
    found = np.array([np.bincount(draw_entries(repeats_N, seed=0, epoch=e), minlength=5) for e in range(4000)])
    assert found.mean(axis=0) == pytest.approx(repeats_N, abs=0.03)
    assert (found >= np.floor(repeats_N)).all()
    assert (found <= np.ceil(repeats_N)).all()
    apart = np.corrcoef(found[:, 1], found[:, 3])[0, 1]
    assert abs(apart) < 0.06


def test_a_balanced_epoch_has_labels_alike():
    lengths_N = np.random.default_rng(0).integers(1, 60, len(LABELS))
    repeats_N, _ = shares(0.5)
    found = np.zeros(4)
    for epoch in range(30):
        plan = plan_epoch(lengths_N, BatchSpec(max_slots="500"), lanes=2, seed=0, epoch=epoch, repeats_N=repeats_N)
        found += np.bincount(LABELS[plan.order_E] % 4, minlength=4) / 30  # -1 comes last
    assert found == pytest.approx([900, 90 * 10**0.5, 90, 5], rel=0.02)


def test_entries_are_these_on_every_machine():
    assert draw_entries(np.linspace(0, 2, 9), seed=3, epoch=2).tolist() == GOLDEN


GOLDEN = [4, 5, 6, 7, 7, 8, 8]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.5, 2.0**32])
def test_repeats_that_are_no_numbers_are_refused(bad):
    with pytest.raises(DataError, match="repeats of row 1"):
        draw_entries(np.array([1.0, bad]), seed=0, epoch=0)


def test_an_epoch_without_rows_is_refused():
    with pytest.raises(ConfigError, match="no row that stands in the epoch"):
        draw_entries(np.zeros(3), seed=0, epoch=0)

"""What evaluations say: the best, standing still, the end; and what they need."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from train_rig import toy_spec

from treadle import wire
from treadle.errors import ConfigError
from treadle.spec import AdamWSpec, ClassifySpec, Keep, Schedule, TrainSpec
from treadle.train.watch import Watch, check_watched, headline

values = st.lists(st.floats(width=32) | st.integers(0, 4).map(float), max_size=30)


def job(*, task=None, patience=None, min_delta=0.0, schedule=Schedule.plateau, plateau_patience=1):
    return toy_spec(
        **({"task": task} if task else {}),
        train=TrainSpec(patience=patience, min_delta=min_delta),
        optim=AdamWSpec(schedule=schedule, plateau_patience=plateau_patience),
    )


def watched(seen, spec):
    watch = Watch()
    for update, value in enumerate(seen, start=1):
        watch = watch.after(value, update, spec=spec)
    return watch


@given(values, st.booleans())
def test_the_best_is_the_best_of_what_is_finite(seen, up):
    watch = watched(seen, job(task=ClassifySpec() if up else None))  # accuracy goes up, error rates go down
    finite = [value for value in seen if math.isfinite(value)]
    if not finite:
        assert (watch.best, watch.best_update, watch.stale) == (None, 0, len(seen))
        return
    best = max(finite) if up else min(finite)
    assert watch.best == best
    assert watch.best_update == seen.index(best) + 1  # the first of equals
    assert watch.stale == len(seen) - watch.best_update
    assert [update for update in range(len(seen) + 2) if watch.is_best_at(update)] == [watch.best_update]


@given(values, st.integers(0, 3))
def test_every_so_many_evaluations_without_improvement_the_rate_is_cut(seen, patience):
    spec = job(plateau_patience=patience)
    watch = watched(seen, spec)
    cuts, best, flat = 0, math.inf, 0  # torch's ReduceLROnPlateau
    for value in seen:
        better = value < best and math.isfinite(value)
        best, flat = (value, 0) if better else (best, flat + 1)
        if flat > patience:
            cuts, flat = cuts + 1, 0
    assert (watch.cuts, watch.flat) == (cuts, flat)
    other = watched(seen, dataclasses.replace(spec, optim=AdamWSpec(schedule=Schedule.cosine)))
    assert other.cuts == 0
    assert other.best == watch.best


@given(values)
def test_it_survives_json(seen):
    watch = watched(seen, job())
    assert wire.decode(Watch, json.loads(json.dumps(wire.encode(watch), allow_nan=False))) == watch


def test_the_end_comes_after_so_many_without_improvement():
    spec = job(patience=2)
    seen = [0.5, 0.6, 0.4, math.nan]
    assert [watched(seen[:n], spec).is_over(spec.train) for n in range(5)] == [False] * 5
    assert watched([*seen, 0.4], spec).is_over(spec.train)  # an equal one is no improvement
    assert not watched([*seen, 0.4], job()).is_over(job().train)


@pytest.mark.parametrize(
    ("task", "seen", "best"), [(None, [0.5, 0.45, 0.39], 0.39), (ClassifySpec(), [0.5, 0.55], 0.5)]
)
def test_a_small_gain_is_none_until_it_adds_up(task, seen, best):
    watch = watched(seen, job(task=task, min_delta=0.1))
    assert watch.best == best


def test_the_headline_is_the_tasks():
    assert headline({"loss": 1.0, "accuracy": 0.5, "macro_f1": 0.2}, job(task=ClassifySpec())) == 0.5
    assert headline({"loss": 1.0, "letter_error_rate": 0.1, "word_error_rate": 0.2}, job()) == 0.1


def test_without_validation_rows_what_goes_by_them_is_refused():
    wishes = {"train": TrainSpec(patience=3, keep=Keep.best), "optim": AdamWSpec(schedule=Schedule.plateau)}
    with pytest.raises(ConfigError, match=r"train.patience: got 3; train.keep: got best; optim.schedule: got plateau"):
        check_watched(**wishes, num_valid=0)
    check_watched(**wishes, num_valid=1)
    check_watched(TrainSpec(), AdamWSpec(), num_valid=0)

"""Which updates are refused: one rule for device and host, a mean that outliers do not move."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treadle import wire
from treadle.spec import GuardSpec
from treadle.train.guard import LARGEST, GuardState, judged, norm_limit

norms = st.floats(2.0**-100, 2.0**100, width=32)
anything = norms | st.sampled_from([0.0, math.nan, math.inf])


def run(spec, seen, *, may_overflow=False):
    state, verdicts = GuardState(), []
    for norm in seen:
        state, verdict = judged(spec, state, norm, may_overflow=may_overflow)
        verdicts.append(verdict)
    return state, verdicts


@given(st.lists(anything, max_size=60), st.floats(1.01, 1e6) | st.none(), st.integers(1, 20))
def test_host_and_device_say_the_same(seen, spike, warmup):
    spec = GuardSpec(spike=spike, warmup_updates=warmup)
    state = GuardState()
    for norm in seen:
        taken = bool(torch.tensor(norm, dtype=torch.float32) <= norm_limit(spec, state))
        state, verdict = judged(spec, state, norm, may_overflow=False)
        assert taken is (verdict.reason == "")
        assert verdict.is_fault is not taken


@given(st.lists(anything, max_size=60), st.booleans())
def test_what_is_remembered_survives_json_and_adds_up(seen, may_overflow):
    state, verdicts = run(GuardSpec(warmup_updates=5), seen, may_overflow=may_overflow)
    assert wire.decode(GuardState, json.loads(json.dumps(wire.encode(state), allow_nan=False))) == state
    assert state.skipped == sum(v.is_fault for v in verdicts)
    assert state.overflows == sum(v.reason == "overflow" for v in verdicts)
    streak = 0
    for verdict in verdicts:
        streak = streak + 1 if verdict.is_fault else streak if verdict.reason else 0
    assert state.streak == streak
    assert state.accepted == sum(v.reason == "" and v.norm > 0 for v in verdicts)


@given(st.lists(norms, min_size=1, max_size=40))
def test_the_mean_is_the_geometric_one_of_what_was_accepted(seen):
    state, _ = run(GuardSpec(warmup_updates=1000), seen)
    assert state.log_mean == pytest.approx(np.mean(np.log(seen)), rel=1e-9, abs=1e-9)


def test_nothing_is_a_spike_before_there_is_a_mean():
    spec = GuardSpec(spike=2.0, warmup_updates=3)
    _, verdicts = run(spec, [1.0, 2.0, 1.0, 1e6])
    assert [v.reason for v in verdicts] == ["", "", "", "spike"]
    assert verdicts[2].limit == LARGEST
    assert verdicts[3].limit == pytest.approx(2 * 2 ** (1 / 3), rel=1e-6)  # the geometric mean of 1, 2 and 1
    state, verdicts = run(spec, [1.0, math.nan, math.inf, 1.0, 1e9])
    assert [v.reason for v in verdicts] == ["", "not finite", "not finite", "", ""]  # two accepted are not three
    assert state.accepted == 3


def test_a_spike_is_measured_against_the_mean_and_does_not_enter_it():
    spec = GuardSpec(spike=50.0, warmup_updates=10)
    state, verdicts = run(spec, [2.0] * 20 + [101.0, 1e9, 2.0])
    assert [v.reason for v in verdicts[20:]] == ["spike", "spike", ""]
    assert (state.skipped, state.streak, state.accepted) == (2, 0, 21)
    assert {v.limit for v in verdicts[20:]} == {100.0}
    assert run(spec, [2.0] * 20 + [100.0])[1][-1].reason == ""


def test_wide_apart_by_habit_is_no_spike():
    rng = np.random.default_rng(0)
    wide = np.exp(rng.normal(-9.0, 3.0, 2000))  # of a model that has nearly learned its rows: 1 of 10 is above 50 times
    assert np.mean(wide > 50 * np.exp(-9.0)) > 0.08
    _, verdicts = run(GuardSpec(), wide)
    assert sum(v.is_fault for v in verdicts[400:]) <= 2
    narrow = np.exp(rng.normal(-1.0, 0.4, 2000))
    narrow[[500, 900, 901, 1500]] *= 200.0
    _, verdicts = run(GuardSpec(), narrow)
    assert [n for n, v in enumerate(verdicts) if v.is_fault] == [500, 900, 901, 1500]


def test_without_spike_only_what_is_not_finite_is_refused():
    _, verdicts = run(GuardSpec(spike=None, warmup_updates=1), [1.0, 1e30, LARGEST, math.inf, math.nan])
    assert [v.reason for v in verdicts] == ["", "", "", "not finite", "not finite"]


def test_an_overflow_of_fp16_is_no_fault_and_leaves_the_streak():
    spec = GuardSpec(warmup_updates=1, spike=10.0)
    state, _ = run(spec, [1.0, math.nan])
    assert state.streak == 1
    state, verdict = judged(spec, state, math.inf, may_overflow=True)
    assert (verdict.reason, verdict.is_fault, state.streak, state.skipped, state.overflows) == (
        "overflow",
        False,
        1,
        1,
        1,
    )
    state, verdict = judged(spec, state, 100.0, may_overflow=True)
    assert (verdict.reason, state.streak) == ("spike", 2)


def test_the_mean_follows_a_level_that_changes_slowly_and_ignores_empty_updates():
    spec = GuardSpec(spike=50.0, warmup_updates=50)
    falling = [100.0 * 0.99**n for n in range(1000)]
    state, verdicts = run(spec, [norm for norm in falling for norm in (norm, 0.0)])
    assert state.skipped == 0
    assert math.exp(state.log_mean) < 2 * falling[-1]
    assert verdicts[-1].norm == 0.0

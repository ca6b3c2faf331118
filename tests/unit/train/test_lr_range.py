from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from train_rig import Toy, toy_spec

from treadle.errors import ConfigError, DivergenceError
from treadle.spec import SgdSpec
from treadle.train.lr_range import DIVERGED, Course, range_test, rates_between, smooth, suggest

torch.set_num_threads(1)


def course(losses: list[float], *, low: float = 1e-6, high: float = 1.0) -> Course:
    rates = rates_between(low, high, len(losses))
    return Course(rates=tuple(rates), losses=tuple(losses), smoothed=tuple(losses), why="made up")


@given(st.floats(1e-9, 1), st.floats(1.1, 1e9), st.integers(10, 200))
def test_rates_rise_by_one_factor(low: float, factor: float, num: int) -> None:
    rates = rates_between(low, low * factor, num)
    assert len(rates) == num
    assert rates[0] == low
    assert rates[-1] == pytest.approx(low * factor)
    steps = [math.log(b / a) for a, b in itertools.pairwise(rates)]
    assert max(steps) - min(steps) < 1e-6


@pytest.mark.parametrize(("low", "high", "num"), [(0, 1, 20), (1, 1, 20), (2, 1, 20), (1e-3, math.inf, 20), (1, 2, 9)])
def test_refuses_what_is_no_range(low: float, high: float, num: int) -> None:
    with pytest.raises(ConfigError):
        rates_between(low, high, num)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=50))
def test_smoothing_stays_within_and_has_no_bias_towards_zero(losses: list[float]) -> None:
    found = smooth(losses)
    assert found[0] == pytest.approx(losses[0])
    assert all(min(losses) - 1e-9 <= value <= max(losses) + 1e-9 for value in found)


def test_suggests_the_steepest_rate_where_that_is_the_smaller() -> None:
    # A fall from 2 to 1 around 1e-4 in four decades, lowest at 0.1, then a rise.
    rates = rates_between(1e-6, 1.0, 121)
    losses = [2 - 1 / (1 + math.exp(-6 * (math.log10(r) + 4))) + max(0.0, math.log10(r) + 1) for r in rates]
    found = suggest(course(losses))
    assert found is not None
    assert found.steepest == pytest.approx(1e-4, rel=0.2)
    assert found.tenth == pytest.approx(1e-2, rel=0.2)
    assert found.lr == pytest.approx(found.steepest, rel=0.05)


def test_suggests_a_tenth_of_the_lowest_where_the_fall_is_late() -> None:
    rates = rates_between(1e-6, 1.0, 121)
    losses = [2 - 1 / (1 + math.exp(-20 * (math.log10(r) + 2))) + 3 * max(0.0, math.log10(r) + 1.5) for r in rates]
    found = suggest(course(losses))
    assert found is not None
    assert found.lr == pytest.approx(found.tenth, rel=0.05)
    assert found.tenth < found.steepest


@pytest.mark.parametrize("losses", [[1.0 + i for i in range(20)], [1.0] * 20, [1.0] + [math.inf] * 19])
def test_suggests_nothing_where_the_loss_never_falls(losses: list[float]) -> None:
    assert suggest(course(losses)) is None


# ---- on a real network


def measured(optim: SgdSpec | None = None, *, high: float = 10.0, num_updates: int = 40) -> tuple[Course, Toy]:
    spec = toy_spec(optim=optim or SgdSpec(lr=0.1, momentum=0.0, clip_norm=None))
    spec = dataclasses.replace(
        spec,
        train=dataclasses.replace(spec.train, epochs=num_updates),
        guard=dataclasses.replace(spec.guard, spike=None),
    )
    toy = Toy(spec)
    run = toy.run()
    return range_test(run, low=1e-6, high=high, num_updates=num_updates), toy


def test_the_first_loss_is_that_of_training() -> None:
    found, toy = measured()
    run = toy.run()
    again = range_test(run, low=1e-6, high=10, num_updates=40)
    assert again == found
    assert found.losses[0] > 0
    assert len(found.rates) == len(found.losses) == len(found.smoothed)


def test_ends_where_the_loss_runs_away() -> None:
    found, _ = measured(high=1e6, num_updates=60)
    assert found.why == "diverged"
    assert len(found.losses) < 60
    assert not math.isfinite(found.losses[-1]) or found.smoothed[-1] > DIVERGED * min(found.smoothed)


def test_goes_to_the_end_of_rates_that_do_no_harm() -> None:
    found, _ = measured(high=1e-4, num_updates=20)
    assert found.why == "end of the range"
    assert len(found.losses) == 20


def test_says_where_no_loss_is_finite() -> None:
    spec = toy_spec()
    toy = Toy(dataclasses.replace(spec, train=dataclasses.replace(spec.train, epochs=20)))
    run = toy.run()
    with torch.no_grad():
        for p in run.network.parameters():
            p.fill_(math.nan)
    with pytest.raises(DivergenceError, match="update 1"):
        range_test(run, low=1e-6, high=1, num_updates=20)

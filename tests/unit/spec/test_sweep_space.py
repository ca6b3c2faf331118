from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle import wire
from treadle.errors import ConfigError, IntegrityError
from treadle.spec import AdamWSpec
from treadle.spec.compose import compose_job, parse_sweep
from treadle.spec.sweeps import (
    ChoiceAxis,
    IntervalAxis,
    Space,
    changed,
    draw,
    explore,
    grid,
    grid_size,
    select,
)

JOB = "g2p"
words = st.sampled_from(["a", "b_c", "1", "-2", "1e-3", "0.5", "true", "null", "[1,2]", "'x y'", "{k: 1}"])
numbers = st.integers(-5, 5)
choices = st.lists(words, min_size=2, max_size=4).map(",".join)
sweeps = st.one_of(
    choices,
    choices.filter(lambda text: "null" not in text).map(lambda text: f"choice({text})"),
    st.tuples(numbers, numbers, st.sampled_from([1, 2, -1])).map(lambda r: f"range({r[0]},{r[1]},{r[2]})"),
    st.tuples(numbers, numbers).map(lambda r: f"range({r[0]}.5,{r[1]},0.75)"),
    st.lists(numbers, min_size=2, max_size=4).map(lambda ns: f"sort({','.join(map(str, ns))},reverse=true)"),
    st.just("tag(some,choice(p,q))"),
    st.just("str([1,2],[3])"),
)
KEYS = ["optim.lr", "model.dropout", "train.epochs", "model.hidden_size"]


def by_hydra(overrides: list[str]) -> list[list[str]]:
    """The jobs of Hydra's own sweeper."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for job in batch]


@settings(max_examples=150, deadline=None)
@given(st.lists(sweeps, min_size=1, max_size=3))
def test_expands_as_hydras_own_sweeper_does(texts: list[str]) -> None:
    overrides = [f"{key}={text}" for key, text in zip(KEYS, texts, strict=False)]
    wanted = by_hydra(overrides)
    try:
        space = parse_sweep(JOB, overrides)
    except ConfigError as error:
        assert not wanted, error  # noqa: PT017  a range of nothing
        return
    got = [space.overrides(values) for values in grid(space.choices)]
    assert len(got) == grid_size(space.choices)
    assert got == [job for i, job in enumerate(wanted) if job not in wanted[:i]]


def test_a_glob_goes_over_the_options_that_can_be_chosen() -> None:
    space = parse_sweep(JOB, ["model=glob(*,exclude=[rnn,*lstm])"])
    assert space.choices == (ChoiceAxis(key="model", index=0, texts=("gru", "mingru")),)


def test_single_values_stay_where_they_were_typed() -> None:
    space = parse_sweep(JOB, ["train.epochs=3", "optim.lr=1e-3,1e-2", "model=gru"])
    assert space.overrides({"optim.lr": "0.01"}) == ["train.epochs=3", "optim.lr=0.01", "model=gru"]


def test_quotes_make_one_value_of_a_comma() -> None:
    assert parse_sweep(JOB, ["summary='a,b'"]).axes == ()


def test_intervals_take_the_form_of_their_key() -> None:
    rate, layers = parse_sweep(JOB, ["optim.lr=tag(log,interval(1e-4,1e-2))", "model.num_layers=interval(1,3)"]).axes
    assert rate == IntervalAxis(key="optim.lr", index=0, low=1e-4, high=1e-2, is_log=True)
    assert layers == IntervalAxis(key="model.num_layers", index=1, low=1, high=3, is_whole=True)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.lr=interval(1,0)", "below the upper one"),
        ("optim.lr=tag(log,interval(0,1))", "above 0"),
        ("optim.lr=interval(0,inf)", "finite"),
        ("optim.schedule=interval(0,1)", "only numbers have intervals"),
        ("model=glob(z*)", "gru, lstm"),
        ("optim.lr=glob(*)", "a group"),
        ("train.epochs=range(5,1)", "at least one value"),
        ("train.epochs=range(1,5,0)", "can be counted"),
        ("train.epochs=range(1,5000)", "at most 1,000 values"),
        ("name=a,b", "one job in one store"),
        ("store.uri=a,b", "one job in one store"),
        ("optim.lr=[1", "KEY=VALUE"),
        ("optim.clip_norm=choice(1.0,null)", "a list with commas"),
    ],
)
def test_says_what_a_sweep_takes(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sweep(JOB, [override])
    assert told in caught.value.message


def test_tells_all_mistakes_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sweep(JOB, ["optim.lr=interval(1,0)", "x=[1", "model=gru,lstm", "model=rnn,gru"])
    assert len(caught.value.context["problems"]) == 3
    assert "arguments 3 and 4" in caught.value.message


def test_a_submission_names_the_verb_for_several_values(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="treadle sweep"):
        compose_job(JOB, ["optim.lr=1e-3,1e-2"], default_store=str(tmp_path))


# ---- points

AXES = (
    ChoiceAxis(key="a", index=0, texts=("p", "q", "r")),
    IntervalAxis(key="b", index=1, low=1e-4, high=1e-1, is_log=True),
    IntervalAxis(key="c", index=2, low=1, high=4, is_whole=True),
)


def within(values: dict[str, str]) -> bool:
    return values["a"] in "pqr" and 1e-4 <= float(values["b"]) <= 1e-1 and 1 <= int(values["c"]) <= 4


@given(st.integers(0, 1000), st.integers(1, 40))
def test_draws_are_different_within_bounds_and_the_same_again(seed: int, num: int) -> None:
    found = draw(AXES, num, seed=seed)
    assert len(found) == num
    assert len({tuple(values.items()) for values in found}) == num
    assert all(map(within, found))
    assert found == draw(AXES, num, seed=seed)
    assert found[: num // 2] == draw(AXES, num // 2, seed=seed)  # more trials add to fewer


def test_draws_end_where_there_are_no_more_points() -> None:
    assert len(draw(AXES[:1], 10, seed=0)) == 3


def test_a_logarithmic_interval_is_drawn_evenly_in_its_logarithm() -> None:
    below = sum(float(values["b"]) < math.sqrt(1e-4 * 1e-1) for values in draw(AXES[1:2], 400, seed=1))
    assert 150 < below < 250


@given(st.floats(0, 1), st.floats(1e-6, 1e3), st.floats(1.01, 1e3), st.booleans(), st.booleans())
def test_what_is_written_is_within_the_interval(
    share: float, low: float, factor: float, is_log: bool, is_whole: bool
) -> None:
    axis = IntervalAxis(key="k", index=0, low=low, high=low * factor, is_log=is_log, is_whole=is_whole)
    if is_whole and math.floor(axis.high) < math.ceil(axis.low):
        return
    assert axis.low <= float(axis.at(share)) <= axis.high


def test_the_space_survives_the_store() -> None:
    space = Space(arguments=("a=p,q", "b=1"), axes=AXES)
    assert wire.decode(Space, wire.encode(space)) == space


# ---- values that change


def test_changed_values_are_checked_by_their_class() -> None:
    spec = AdamWSpec()
    assert changed(spec, {"lr": 0.5, "clip_norm": None}) == AdamWSpec(lr=0.5, clip_norm=None)
    with pytest.raises(IntegrityError):
        changed(spec, {"lrr": 0.5})


@given(st.lists(st.floats(-1, 1) | st.just(-math.inf), min_size=2, max_size=12), st.integers(0, 99))
def test_the_worst_go_on_from_the_best(scores: list[float], seed: int) -> None:
    population: list[Any] = draw(AXES, len(scores), seed=seed)
    found = select(scores, population, AXES, seed=seed)
    assert found == select(scores, population, AXES, seed=seed)
    losers = {exploit.slot for exploit in found}
    for exploit in found:
        assert scores[exploit.donor] > scores[exploit.slot]
        assert exploit.donor not in losers
        assert within(exploit.values)
    if max(scores) > -math.inf:
        assert losers >= {slot for slot, value in enumerate(scores) if value == -math.inf}


def test_numbers_are_explored_by_a_fifth_and_choices_by_a_place() -> None:
    values = {"a": "q", "b": "0.01", "c": "2"}
    found = [explore(AXES, values, random.Random(seed)) for seed in range(400)]
    assert all(map(within, found))
    steps = [one["b"] for one in found]
    assert steps.count("0.008") + steps.count("0.012") > 0.6 * len(found)
    assert 0.1 < sum(one["b"] not in ("0.008", "0.012") for one in found) / len(found) < 0.4
    assert {one["a"] for one in found} == {"p", "q", "r"}
    assert sum(one["a"] != "q" for one in found) > 0.8 * len(found)

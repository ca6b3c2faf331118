"""What a sweep decides, from numbers alone: which points, who stops, whose state is gone on from."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from treadle.errors import ConfigError, InfeasibleError
from treadle.launch.sweeps.ask import MOST_BASES, Request, choose_points
from treadle.launch.sweeps.courses import next_round
from treadle.launch.sweeps.halving import Halving, build_halving
from treadle.launch.sweeps.records import Asked, plain
from treadle.launch.sweeps.results import Trial, best_trial, rank
from treadle.spec.sweeps import ChoiceAxis, IntervalAxis, Scheduler, Search, Space

LR = IntervalAxis(key="optim.lr", index=0, low=1e-4, high=1e-1, is_log=True)
CELL = ChoiceAxis(key="model", index=1, texts=("gru", "lstm", "rnn"))
SIZE = ChoiceAxis(key="model.hidden_size", index=2, texts=("8", "16"))


def asked(**changes: Any) -> Asked:
    base = Asked(
        job="toy",
        arguments=("optim.lr=interval(1e-4,1e-1)",),
        axes=(LR,),
        search=Search.random,
        scheduler=Scheduler.none,
        metric="val/loss",
        larger_is_better=False,
        trials=4,
        parallel=2,
        seed=0,
        grace=1,
        reduction=2,
        interval=2,
        evaluations=6,
    )
    return dataclasses.replace(base, **changes)


def trial(number: int, course: list[float], **changes: Any) -> Trial:
    base = Trial(
        number=number,
        run=f"run-{number}",
        values={"optim.lr": f"0.0{number}"},
        state="stopped",
        reason="",
        evaluations=tuple((5 * i, value) for i, value in enumerate(course, start=1)),
        best=min(course, default=None),
        last=course[-1] if course else None,
        value=course[-1] if course else None,
        updates=5 * len(course),
        seconds=1.0,
        model_version=None,
        slot=number,
        generation=0,
        parent=None,
        parent_update=0,
        evaluations_before=0,
    )
    return dataclasses.replace(base, **changes)


# ---- points


def space(*axes: Any) -> Space:
    return Space(arguments=("",) * 3, axes=axes)


def test_choices_are_a_grid_and_intervals_are_drawn() -> None:
    search, points = choose_points(Request(job="toy"), space(CELL, SIZE))
    assert search is Search.grid
    assert len(points) == 6
    search, points = choose_points(Request(job="toy", trials=5), space(LR, CELL))
    assert search is Search.random
    assert len(points) == 5


def test_a_search_composes_one_point_for_every_choice() -> None:
    _, points = choose_points(Request(job="toy", search=Search.optuna, trials=50), space(LR, CELL, SIZE))
    assert [(p["model"], p["model.hidden_size"]) for p in points] == [(c, s) for c in CELL.texts for s in SIZE.texts]
    assert {p["optim.lr"] for p in points} == {"0.0001"}


@pytest.mark.parametrize(
    ("request_", "axes", "told"),
    [
        (Request(job="toy"), (), "no key with several values"),
        (Request(job="toy", trials=5), (CELL, SIZE), "got 6 combinations (3 x 2), expected at most 5"),
        (Request(job="toy", search=Search.grid), (LR,), "optim.lr: got an interval"),
        (Request(job="toy", search=Search.pbt), (CELL,), "expected keys that may change within a run"),
        (Request(job="toy", search=Search.pbt, scheduler=Scheduler.asha), (LR,), "--scheduler"),
        (Request(job="toy", search=Search.pbt, trials=1), (LR,), "population of 1"),
        (
            Request(job="toy", search=Search.optuna),
            (ChoiceAxis(key="train.seed", index=0, texts=tuple(map(str, range(MOST_BASES + 1)))),),
            "65 combinations of choices",
        ),
    ],
)
def test_says_what_a_search_cannot_go_through(request_: Request, axes: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_points(request_, space(*axes))
    assert told in caught.value.message
    assert not isinstance(caught.value, InfeasibleError)
    assert caught.value.hint or told in ("--scheduler", "population of 1")


@pytest.mark.parametrize(
    ("text", "value"), [("0.01", 0.01), ("1e-05", 1e-5), ("3", 3), ("null", None), ("true", True), ("cosine", "cosine")]
)
def test_texts_have_a_plain_value(text: str, value: Any) -> None:
    assert plain(text) == value
    assert type(plain(text)) is type(value)


# ---- halving


def test_without_a_scheduler_only_what_is_no_number_stops() -> None:
    rule = build_halving(asked(), [])
    assert not rule.is_behind(1, 1, 1e9)
    assert rule.is_behind(1, 2, math.nan)


def test_a_trial_stops_that_is_behind_at_a_rung() -> None:
    rule = Halving(asked(scheduler=Scheduler.asha, evaluations=8), [])
    assert not rule.is_behind(1, 1, 0.5)  # the first at a rung has no one to be behind
    assert not rule.is_behind(2, 1, 0.4)
    assert rule.is_behind(3, 1, 0.6)
    assert not rule.is_behind(2, 2, 0.3)
    assert not rule.is_behind(2, 3, 99.0)  # no rung: 1, 2, 4, 8
    assert rule.is_behind(1, 2, 0.35)
    assert rule.is_behind(2, 4, math.inf)


def test_larger_may_be_better() -> None:
    rule = Halving(asked(scheduler=Scheduler.asha, larger_is_better=True), [])
    assert not rule.is_behind(1, 1, 0.5)
    assert rule.is_behind(2, 1, 0.4)


def test_no_trial_stops_at_its_last_evaluation() -> None:
    rule = Halving(asked(scheduler=Scheduler.asha, evaluations=2), [trial(1, [0.1, 0.1])])
    assert not rule.is_behind(2, 2, 9.0)


def test_a_sweep_that_is_taken_up_again_knows_the_rungs() -> None:
    past = [trial(1, [0.5, 0.3]), trial(2, [0.4])]
    rule = Halving(asked(scheduler=Scheduler.asha, evaluations=8), past)
    assert rule.is_behind(3, 1, 0.6)
    assert not rule.is_behind(2, 2, 0.2)  # goes on where it was: its place at rung 1 is taken by itself
    assert rule.is_behind(3, 2, 0.4)


# ---- results


def test_the_best_is_the_best_that_finished_by_its_last_value() -> None:
    trials = [
        trial(1, [0.1, 0.3], state="finished", model_version=1),
        trial(2, [0.2], state="finished", model_version=2),
        trial(3, [0.05], state="pruned"),
        trial(4, [math.nan], state="failed"),
        trial(5, []),
    ]
    assert [t.number for t in rank(trials, asked())] == [3, 2, 1, 4, 5]
    best = best_trial(trials, asked())
    assert best is not None
    assert best.number == 2
    assert best_trial(trials[2:], asked()) is None


# ---- population


def pbt(**changes: Any) -> Asked:
    return asked(search=Search.pbt, **changes)


def test_a_round_waits_until_all_have_come_so_far() -> None:
    found = next_round([trial(1, [0.5, 0.4]), trial(2, [0.5]), trial(3, [])], pbt())
    assert found is not None
    assert (found.number, found.until) == (1, 2)
    assert [t.number for t in found.waiting] == [2, 3]
    assert not found.exploits


def test_the_worst_goes_on_from_the_best_and_that_is_decided_alike_again() -> None:
    trials = [trial(n, [1.0, value]) for n, value in enumerate([0.4, 0.1, 0.9, 0.5], start=1)]
    found = next_round(trials, pbt())
    assert found is not None
    (exploit,) = found.exploits
    assert (found.holders[exploit.slot].number, found.holders[exploit.donor].number) == (3, 2)
    assert next_round(trials, pbt()) == found
    child = trial(5, [], slot=3, generation=1, parent="run-2", evaluations_before=2, values=exploit.values)
    after = next_round([*trials, child], pbt())
    assert after is not None
    assert (after.number, after.until, after.exploits) == (2, 4, ())
    assert [t.number for t in after.waiting] == [1, 2, 5, 4]


def test_a_child_counts_its_parents_evaluations() -> None:
    child = trial(5, [0.2, 0.1], slot=1, generation=1, evaluations_before=2)
    assert [child.value_at(n) for n in (1, 2, 3, 4, 5)] == [None, None, 0.2, 0.1, None]


def test_a_failed_trial_gives_its_place_up() -> None:
    trials = [trial(n, [1.0, 0.1 * n]) for n in (1, 2, 3)] + [trial(4, [], state="failed")]
    found = next_round(trials, pbt())
    assert found is not None
    assert not found.waiting
    assert [found.holders[e.slot].number for e in found.exploits] == [4]


def test_the_last_round_goes_to_the_end() -> None:
    trials = [trial(n, [0.5] * 4) for n in (1, 2)]  # equal: nobody is replaced
    found = next_round(trials, pbt())
    assert found is not None
    assert (found.number, found.until) == (3, None)
    done = [dataclasses.replace(t, state="finished", evaluations=t.evaluations * 2) for t in trials]
    assert next_round(done, pbt()) is None

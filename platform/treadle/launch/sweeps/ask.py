"""From a command line to a frozen sweep: choose points, compose and plan all of them, refuse all mistakes at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from treadle.errors import ConfigError, DataError, InfeasibleError, TreadleError, did_you_mean
from treadle.launch.sweeps.records import Asked, Candidate, FrozenSweep
from treadle.plan import Capacity, Plan
from treadle.spec import JobSpec, Keep
from treadle.spec.sweeps import IntervalAxis, Scheduler, Search, Space, draw, grid, grid_size, words
from treadle.track import Direction, catalogue, headline_name

__all__ = ["EXPLORED", "Request", "choose_points", "make_sweep"]

TRIALS = 16
MOST_BASES = 64
ROUNDS = 4
# What may change while a run goes on without another network, other batches or another optimizer state.
EXPLORED = (
    "optim.lr",
    "optim.weight_decay",
    "optim.clip_norm",
    "optim.beta1",
    "optim.beta2",
    "optim.momentum",
    "optim.eps",
    "model.dropout",
    "task.label_smoothing",
)

Values = dict[str, str]
Compose = Callable[[Sequence[str]], JobSpec]
MakePlan = Callable[[JobSpec, Sequence[str], Capacity], Plan]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A command line; None where it leaves the choice open."""

    job: str
    search: Search | None = None
    scheduler: Scheduler = Scheduler.none
    trials: int | None = None
    parallel: int | None = None
    metric: str | None = None
    larger_is_better: bool | None = None
    seed: int = 0
    grace: int = 1
    reduction: int = 3
    interval: int | None = None


def make_sweep(
    request: Request, space: Space, compose: Compose, plan: MakePlan, capacity_for: Callable[[JobSpec], Capacity]
) -> FrozenSweep:
    """The sweep that is asked for, every point of it composed and planned.

    Args:
        space: from `parse_sweep`. compose: from overrides to a job. plan: of a job with its overrides at a place.
        capacity_for: of the whole place, which the trials share.

    Raises:
        ConfigError: all mistakes of all points. DataError: data not prepared. InfeasibleError: plans that do not fit.
    """
    search, points = choose_points(request, space)
    specs = _composed(space, points, compose)
    metric, larger_is_better = _metric(request, specs[0])
    capacity = capacity_for(specs[0])
    trials = (request.trials or TRIALS) if search is Search.optuna else len(points)
    parallel = _parallel(request, specs, capacity, trials)
    share = replace(capacity, memory_bytes=capacity.memory_bytes // parallel)
    plans = _planned(specs, points, lambda spec, values: plan(spec, space.overrides(values), share))
    if empty := [plan for plan in plans if not plan.valid_rows]:
        raise ConfigError(
            f"split.valid: got no validation rows in {len(empty)} of {len(plans)} trials, expected some: trials are "
            "compared on them",
            hint="split.valid=0.1, then treadle prepare",
        )
    evaluations = max(math.ceil(spec.train.epochs / spec.train.evaluate_every) for spec in specs)
    asked = Asked(
        job=request.job,
        arguments=space.arguments,
        axes=space.axes,
        search=search,
        scheduler=request.scheduler,
        metric=metric,
        larger_is_better=larger_is_better,
        trials=trials,
        parallel=parallel,
        seed=request.seed,
        grace=_grace(request, evaluations),
        reduction=request.reduction,
        interval=request.interval or max(1, evaluations // ROUNDS),
        evaluations=evaluations,
        **_kept(search, specs),
    )
    rows = zip(points, specs, plans, strict=True)
    candidates = tuple(Candidate(values=values, spec=spec, plan=plan) for values, spec, plan in rows)
    return FrozenSweep(asked=asked, candidates=candidates, capacity=share)


def choose_points(request: Request, space: Space) -> tuple[Search, list[Values]]:
    """How points are searched, and those that can be known now: all of them, or one for each choice of a search.

    Raises:
        ConfigError: a space that this search cannot go through.
    """
    if not space.axes:
        raise ConfigError(
            "sweep: got no key with several values, expected at least one",
            hint=f"treadle sweep {request.job} optim.lr=1e-3,3e-3 'model.dropout=interval(0,0.5)'",
        )
    search = request.search or (Search.random if space.intervals else Search.grid)
    trials = request.trials or TRIALS
    if search is Search.grid:
        return search, _grid_points(space, request.trials)
    if search is Search.pbt:
        _check_explored(request, space)
    if search is Search.optuna:
        size = grid_size(space.choices)
        if size > MOST_BASES:
            raise ConfigError(
                f"--search optuna: got {size} combinations of choices, expected at most {MOST_BASES}: each is composed "
                "before anything runs",
                hint="interval(low,high) for numbers, or --search random",
            )
        return search, [_lowest(space, values) for values in grid(space.choices)]
    points = draw(space.axes, trials, seed=request.seed)
    if search is Search.pbt and len(points) < 2:
        raise ConfigError(f"--trials: got a population of {len(points)}, expected at least 2 different points")
    return search, points


def _grid_points(space: Space, trials: int | None) -> list[Values]:
    if space.intervals:
        names = ", ".join(axis.key for axis in space.intervals)
        raise ConfigError(
            f"{names}: got an interval, expected values to enumerate for --search grid",
            hint="--search random or optuna, or values such as 1e-4,1e-3",
        )
    size = grid_size(space.choices)
    if size > (trials or TRIALS):
        raise ConfigError(
            f"grid: got {size} combinations ({' x '.join(str(len(axis.texts)) for axis in space.choices)}), "
            f"expected at most {trials or TRIALS}",
            hint=f"--trials {size} for all of them, or --search random",
        )
    return list(grid(space.choices))


def _check_explored(request: Request, space: Space) -> None:
    if request.scheduler is not Scheduler.none:
        raise ConfigError(f"--scheduler: got {request.scheduler.value}, expected none beside --search pbt")
    wrong = [axis.key for axis in space.axes if axis.key not in EXPLORED and not axis.key.startswith("augment.")]
    if wrong:
        raise ConfigError(
            f"--search pbt: got {', '.join(wrong)}, expected keys that may change within a run: "
            f"{', '.join(EXPLORED)} or augment.*",
            hint="--search random --scheduler asha, which starts every trial anew",
        )


def _lowest(space: Space, values: Mapping[str, str]) -> Values:
    return {axis.key: values[axis.key] if axis.key in values else _end(axis, 0.0) for axis in space.axes}


def _end(axis: object, share: float) -> str:
    assert isinstance(axis, IntervalAxis)
    return axis.at(share)


def _composed(space: Space, points: Sequence[Values], compose: Compose) -> list[JobSpec]:
    """The spec of each point; the ends of intervals are composed as well, for what a search may propose there."""
    specs: list[JobSpec] = []
    problems: dict[str, dict[str, object]] = {}
    first: ConfigError | None = None
    ends = [points[0] | {axis.key: axis.at(share)} for axis in space.intervals for share in (0.0, 1.0)]
    for values in [*points, *ends]:
        try:
            specs.append(compose(space.overrides(values)))
        except ConfigError as error:
            first = first or error
            found = error.context.get("problems") or [{}]
            problems |= dict(zip(error.message.splitlines(), found, strict=False))
    if first is not None:
        raise ConfigError("\n".join(sorted(problems)), hint=first.hint, problems=[p for p in problems.values() if p])
    return specs[: len(points)]


def _metric(request: Request, spec: JobSpec) -> tuple[str, bool]:
    known = {name: metric for name, metric in catalogue(spec.task).items() if name.startswith("val/")}
    name = request.metric or f"val/{headline_name(spec.task)}"
    if name not in known:
        raise ConfigError(f"--metric: got {name!r}, expected one of {', '.join(known)}{did_you_mean(name, known)}")
    if request.larger_is_better is not None:
        return name, request.larger_is_better
    return name, known[name].good is Direction.up


def _kept(search: Search, specs: Sequence[JobSpec]) -> dict[str, Any]:
    """By which evaluation the trials keep their model."""
    keeps = {spec.train.keep for spec in specs}
    if Keep.best not in keeps:
        return {}
    if search is Search.pbt:
        raise ConfigError(
            "train.keep: got best, expected last beside --search pbt: the best state may be another run's",
            hint="train.keep=last",
        )
    if len(keeps) > 1:
        raise ConfigError("train.keep: got best and last, expected one of them: trials are compared by their model")
    name = headline_name(specs[0].task)
    good = catalogue(specs[0].task)[f"val/{name}"].good
    return {"kept_by": f"val/{name}", "kept_larger": good is Direction.up}


def _parallel(request: Request, specs: Iterable[JobSpec], capacity: Capacity, trials: int) -> int:
    """How many trials at once: as many as asked, else as have room."""
    room = trials
    for spec in specs:
        workers, cluster = max(1, spec.cluster.workers), spec.cluster
        room = min(room, max(1, capacity.cpus // (workers * cluster.cpus_per_worker)))
        if cluster.gpus_per_worker:
            room = min(room, max(1, capacity.gpus // (workers * cluster.gpus_per_worker)))
    if request.parallel is not None and request.parallel > room:
        raise InfeasibleError(
            f"--parallel: got {request.parallel}, expected at most {room}: {trials} trials on {capacity.cpus} CPUs and "
            f"{capacity.gpus} GPUs of {capacity.where}",
            hint=f"--parallel {room}",
        )
    return request.parallel or room


def _grace(request: Request, evaluations: int) -> int:
    if request.scheduler is Scheduler.asha and request.grace >= evaluations:
        raise ConfigError(
            f"--grace: got {request.grace}, expected below {evaluations}, the evaluations of a trial",
            hint="more train.epochs, or a smaller train.evaluate_every",
        )
    return request.grace


def _planned(specs: Sequence[JobSpec], points: Sequence[Values], plan: Callable[[JobSpec, Values], Plan]) -> list[Plan]:
    plans: list[Plan] = []
    refused: list[tuple[Values, TreadleError]] = []
    for spec, values in zip(specs, points, strict=True):
        try:
            plans.append(plan(spec, values))
        except (ConfigError, DataError) as error:
            refused.append((values, error))
    if refused:
        raise _all_of(refused)
    return plans


def _all_of(refused: Sequence[tuple[Values, TreadleError]]) -> TreadleError:
    """One error of the first's class that tells every one, each message once."""
    told: dict[str, list[str]] = {}
    for values, error in refused:
        told.setdefault(error.message, []).append(words(values))
    lines = list(_lines(told))
    first = refused[0][1]
    return type(first)("\n".join(lines), hint=first.hint, trials=[words(values) for values, _ in refused])


def _lines(told: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for message, where in told.items():
        more = f" and {len(where) - 3} more" if len(where) > 3 else ""
        yield f"{message} (with {'; '.join(where[:3])}{more})"

"""Many runs of one job with different values, compared: `treadle sweep`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from treadle.cli.options import actor, answer, asked, compose, json_option, page, say, store_option, stored
from treadle.errors import ConfigError

__all__ = ["sweep"]

positive = click.IntRange(min=1)


@click.command()
@click.argument("job", required=False)
@click.argument("overrides", nargs=-1)
@click.option(
    "--search",
    type=click.Choice(["grid", "random", "optuna", "pbt"]),
    help="How values are chosen. [default: grid, random where there is an interval]",
)
@click.option("--trials", type=positive, help="Most trials; of pbt the population. [default: 16]")
@click.option(
    "--scheduler", type=click.Choice(["none", "asha"]), default="none", show_default=True, help="Who ends trials early."
)
@click.option("--metric", help="What trials are compared by. [default: the job's headline on validation rows]")
@click.option("--mode", type=click.Choice(["min", "max"]), help="Which way is better. [default: the metric's own]")
@click.option("--parallel", type=positive, help="Trials at once. [default: as many as there is room for]")
@click.option("--grace", type=positive, default=1, show_default=True, help="asha: evaluations before the first end.")
@click.option("--reduction", type=click.IntRange(min=2), default=3, show_default=True, help="asha: 1 of so many stays.")
@click.option("--interval", type=positive, help="pbt: evaluations of a round. [default: a quarter of the run]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn at random.")
@click.option("--on", "place", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="Where.")
@click.option("--follow/--detach", default=True, show_default=True, help="Show progress, or return at once.")
@click.option("--resume", metavar="SWEEP", help="Go on with a sweep that was stopped or killed.")
@click.option("--show", metavar="SWEEP", help="Print the results of a sweep, as they stand.")
@click.option("--ls", "list_all", is_flag=True, help="List the sweeps of the store.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the results as HTML.")
@store_option
@json_option
def sweep(**given: Any) -> int:
    """Train a job with different values and name the best: trials are ordinary runs.

    OVERRIDES are Hydra's: optim.lr=1e-3,3e-3 'model=glob(*gru)' 'train.epochs=range(5,20,5)'
    'model.dropout=interval(0,0.5)' 'optim.lr=tag(log,interval(1e-4,1e-2))'. Every trial is composed and planned before
    the first one starts. Ctrl-C stops all with checkpoints; --resume goes on.
    """
    uses = [name for name in ("list_all", "show", "resume") if given[name]]
    if len(uses) + bool(given["job"]) != 1:
        raise click.UsageError("one of: JOB OVERRIDES..., --resume SWEEP, --show SWEEP, --ls")
    if given["list_all"]:
        return _list(given["store_uri"], as_json=given["as_json"])
    if given["show"]:
        return _show(given["store_uri"], given["show"], given["output"], as_json=given["as_json"])
    if given["resume"]:
        return _resume(given)
    return _begin(given)


def _begin(given: dict[str, Any]) -> int:
    from treadle.cli.submit import capacity_of
    from treadle.launch.submit import plan_job
    from treadle.launch.surroundings import code_facts
    from treadle.launch.sweeps.ask import Request, make_sweep
    from treadle.launch.sweeps.records import freeze_sweep
    from treadle.spec.compose import parse_sweep
    from treadle.spec.places import find_job
    from treadle.spec.sweeps import Scheduler, Search
    from treadle.store import Backend, open_blobs
    from treadle.store.sweeps import Sweeps

    job, store_uri, place = given["job"], given["store_uri"], given["place"]
    if given["search"] == "optuna":
        _check_optuna()
    request = Request(
        job=job,
        search=Search(given["search"]) if given["search"] else None,
        scheduler=Scheduler(given["scheduler"]),
        larger_is_better=None if given["mode"] is None else given["mode"] == "max",
        **{name: given[name] for name in ("trials", "parallel", "metric", "seed", "grace", "reduction", "interval")},
    )
    folder, space = find_job(job), parse_sweep(job, given["overrides"])

    def plan(spec: Any, overrides: Any, share: Any) -> Any:
        return plan_job(spec, folder, open_blobs(spec.store.uri), share, asked=asked(job, overrides))

    frozen = make_sweep(
        request,
        space,
        lambda overrides: compose(job, overrides, store_uri=store_uri)[0],
        plan,
        lambda spec: capacity_of(spec, place),
    )
    blobs = open_blobs(frozen.first.store.uri)
    backend = Backend.ray if place == "ray" else Backend.local
    info = {"code": code_facts()}
    record = Sweeps(blobs).create(freeze_sweep(frozen), job=frozen.first.name, backend=backend, info=info)
    say(_plan_text(frozen))
    say(f"sweep     {record.sweep}")
    return _start(blobs, record, frozen, given)


def _check_optuna() -> None:
    import importlib.util

    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("--search optuna: the package is not installed", hint="pip install 'treadle[sweep]'")


def _plan_text(frozen: Any) -> str:
    """What is about to happen, as aligned lines."""
    from treadle.spec.sweeps import Scheduler, Search, words

    said, first = frozen.asked, frozen.candidates[0]
    early = f", asha from evaluation {said.grace} on, 1 of {said.reduction} stays"
    rounds = f", rounds of {said.interval} evaluations"
    how = said.search.value + (early if said.scheduler is Scheduler.asha else "")
    how += rounds if said.search is Search.pbt else ""
    updates = sum(candidate.plan.num_updates for candidate in frozen.candidates)
    shown = [f"{words(said.ordered(c.values))}: {c.plan.parameters:,} parameters" for c in frozen.candidates[:4]]
    more = [f"and {len(frozen.candidates) - 4} more"] if len(frozen.candidates) > 4 else []
    where = "in Ray Tune, one worker each" if frozen.is_direct else "as submissions of their own"
    lines = {
        "job": f"{first.spec.name}: {first.spec.summary}" if first.spec.summary else first.spec.name,
        "trials": f"{said.trials}, {said.parallel} at once, {where}",
        "search": how,
        "metric": f"{said.metric}, {'larger' if said.larger_is_better else 'smaller'} is better",
        "training": f"{said.evaluations} evaluations each at most"
        + ("" if said.search is Search.optuna else f", about {updates:,} updates in all"),
        "points": "\n          ".join([*shown, *more]),
        "store": first.spec.store.uri,
    }
    return "\n".join(f"{name:<9} {line}" for name, line in lines.items())


def _resume(given: dict[str, Any]) -> int:
    from treadle.errors import ConflictError
    from treadle.launch.sweeps.records import read_sweep
    from treadle.launch.sweeps.start import check_idle
    from treadle.store import RunState
    from treadle.store.sweeps import Sweeps

    blobs = stored(given["store_uri"])
    sweeps = Sweeps(blobs)
    record = sweeps.get(given["resume"])
    if sweeps.status(record.sweep).state is RunState.finished:
        raise ConflictError(
            f"sweep {record.sweep}: is finished, expected one that was stopped, failed or lost",
            hint=f"treadle sweep --show {record.sweep}",
        )
    check_idle(blobs, record.sweep)
    say(f"sweep     {record.sweep}, attempt {sweeps.status(record.sweep).attempt + 1}")
    return _start(blobs, record, read_sweep(blobs, record), given)


def _start(blobs: Any, record: Any, frozen: Any, given: dict[str, Any]) -> int:
    from treadle.cli.sweep_follow import follow_sweep
    from treadle.launch.sweeps.start import start_sweeper
    from treadle.store.sweeps import Sweeps

    before = Sweeps(blobs).status(record.sweep).attempt
    sweeper = start_sweeper(blobs, record, frozen, actor=actor())
    if not given["follow"]:
        text = f"{record.sweep}\nlook at it: treadle sweep --show {record.sweep}"
        answer(given["as_json"], {"sweep": record.sweep, "status": "submitted"}, text)
        return 0
    code = follow_sweep(blobs, record.sweep, frozen.asked, before=before, sweeper=sweeper)
    if code in (0, 1):
        tell(blobs, record, frozen, given["output"], as_json=given["as_json"])
    return code


def _list(store_uri: str | None, *, as_json: bool) -> int:
    from treadle.store.sweeps import Sweeps
    from treadle.track import table

    sweeps = Sweeps(stored(store_uri))
    rows = []
    for record in sweeps.list():
        status = sweeps.status(record.sweep)
        best = f"{record.job}@{status.end.model_version}" if status.end and status.end.model_version else ""
        rows.append((record.sweep, status.state.value, len(sweeps.members(record.sweep)), best, record.created_at))
    names = ["sweep", "status", "trials", "best", "submitted"]
    empty = "no sweeps yet; start one: treadle sweep JOB optim.lr=1e-3,3e-3"
    body = {"sweeps": [dict(zip(names, row, strict=True)) for row in rows]}
    answer(as_json, body, table(rows, names) if rows else empty)
    return 0


def _show(store_uri: str | None, name: str, output: Path | None, *, as_json: bool) -> int:
    from treadle.launch.sweeps.records import read_sweep
    from treadle.store.sweeps import Sweeps

    blobs = stored(store_uri)
    record = Sweeps(blobs).get(name)
    tell(blobs, record, read_sweep(blobs, record), output, as_json=as_json)
    return 0


def tell(blobs: Any, record: Any, frozen: Any, output: Path | None, *, as_json: bool) -> None:
    """Print the results of a sweep as they stand, and write its page."""
    from treadle.launch.sweeps.page import sweep_page, table_rows
    from treadle.launch.sweeps.results import best_trial, rank, read_trials, trial_json
    from treadle.store.sweeps import Sweeps
    from treadle.track import table

    said, trials = frozen.asked, read_trials(blobs, record.sweep, frozen.asked)
    status, best = Sweeps(blobs).status(record.sweep), best_trial(trials, frozen.asked)
    picture = str(blobs.local_path(f"sweeps/{record.sweep}/report.html") or f"{blobs.uri}/sweeps/{record.sweep}/")
    if output is not None:
        output.write_text(sweep_page(record, frozen, trials), encoding="utf-8")
        picture = str(output)
    model = f"{record.job}@{best.model_version}" if best is not None else None
    body = {
        "sweep": record.sweep,
        "status": status.state.value,
        "metric": said.metric,
        "mode": "max" if said.larger_is_better else "min",
        "trials": [trial_json(trial) for trial in rank(trials, said)],
        "best": trial_json(best) if best is not None else None,
        "model": model,
        "page": picture,
    }

    def text() -> str:
        from treadle.spec.sweeps import words

        headers, rows = table_rows(trials, said)
        lines = [
            f"{record.sweep}  {status.state.value}, {said.metric}",
            table(rows, headers, width=page()[0] if sys.stdout.isatty() else None),
        ]
        if best is not None:
            is_named = status.end is not None and status.end.model_version == best.model_version
            lines.append(f"best      {model}: trial {best.number}, {words(best.values)}")
            if is_named:
                lines.append(f"model     {record.job}@candidate is {model}; treadle models promote {model}")
        if status.end is not None or output is not None:
            lines.append(f"page      {picture}")
        return "\n".join(lines)

    answer(as_json, body, text)

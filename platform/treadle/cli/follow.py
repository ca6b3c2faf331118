"""Watching a run from its store until it ends."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from treadle.cli.options import answer, no_color, say
from treadle.errors import ConflictError, TreadleError

if TYPE_CHECKING:
    from treadle.launch.local import LocalDriver
    from treadle.plan import Plan
    from treadle.spec import JobSpec
    from treadle.store import Blobs, Runs, RunStatus

__all__ = ["follow_run"]

POLL_S = 0.3
# What a person wants to read while a run goes on; the log and the events file have the rest.
_TOLD: dict[str, str] = {
    "best_restored": "the model is that of the best evaluation, after update {update}",
    "budget": "budget {slots} slots: {why}",
    "checkpoint_failed": "checkpoint: {message}; training goes on",
    "checkpoint_refused": "checkpoint: {message}; training goes on",
    "ended_early": "no better evaluation since update {best_update}: training ends",
    "notice": "{text}",
    "precision": "precision {format}: {why}",
    "preemption_notice": "a machine goes away in {left_s:.0f} s: committing now, and again before it does",
    "rank_failed": "rank {rank} was lost at update {update}: {message}",
    "rate_cut": "no better evaluation: learning rate times {factor}",
    "registered": "registered {model}@{version}",
    "rejoined": "all ranks together again, at update {update}",
    "restored": "restored the checkpoint of update {update}",
    "rolled_back": "rolled back from update {update} to {to}, learning rate times {rate_factor}",
    "sink_lost": "{sink} is left out from now on: {reason}",
    "skipped": "update {update} was skipped: {reason}",
    "slow_rank": "rank {rank} holds the others up: {busy_ms} ms an update by rank",
    "split": "out of memory: microbatches are cut into {parts} parts from now on",
    "stacks": "the stacks of rank {rank}, which hangs, are in {key}",
}


def follow_run(
    blobs: Blobs,
    run: str,
    spec: JobSpec,
    plan: Plan,
    *,
    attempts_before: int,
    driver: LocalDriver | None,
    as_json: bool,
) -> int:
    """Show progress until the newest attempt ends; returns the run's exit code.

    Ctrl-C asks a local run to stop and waits for its checkpoint (a second one kills it), and detaches
    from a run on a cluster.
    """
    from treadle.store import Runs, follow
    from treadle.track import Progress, headline_name

    runs = Runs(blobs)
    headline = f"val/{headline_name(spec.task)}"
    progress = Progress(
        sys.stderr,
        job=spec.name,
        num_updates=plan.num_updates,
        num_epochs=spec.train.epochs,
        headline=headline,
        no_color=no_color(),
    )
    metrics = follow(blobs, f"runs/{run}/metrics.jsonl")
    events = follow(blobs, f"runs/{run}/events.jsonl")
    progress.notice("starting the workers ...")
    interrupts = 0
    while True:
        try:
            ended = _ended(runs, run, attempts_before)
            if ended is None and driver is not None and not driver.is_alive():
                ended = _died(driver, blobs, runs, run, attempts_before)
            for row in metrics.poll():
                progress.log(int(row["update"]), row["metrics"])
            for row in events.poll():
                if row["event"] in _TOLD and row["attempt"] > attempts_before:
                    progress.notice(_told(row))
            if ended is not None:
                progress.close(ended.state.value)
                return _tell(run, spec, ended, as_json=as_json)
            time.sleep(POLL_S)
        except KeyboardInterrupt:
            interrupts += 1
            if driver is None:
                progress.close("detached")
                say(f"detached, the run continues; treadle logs -f {run}")
                return 130
            _interrupt(progress, runs, run, driver, interrupts)


def _interrupt(progress: object, runs: Runs, run: str, driver: LocalDriver, interrupts: int) -> None:
    from treadle.store import RequestKind

    if interrupts > 1:
        say("killing the run; its last checkpoint stays")
        driver.kill()
        return
    say("\nstopping after a checkpoint ... (Ctrl-C again kills)")
    with suppress(ConflictError):  # it ended in the meantime
        runs.request(run, RequestKind.stop, "Ctrl-C")


def _ended(runs: Runs, run: str, attempts_before: int) -> RunStatus | None:
    status = runs.status(run)
    return status if status.attempt > attempts_before and status.end is not None else None


def _died(driver: LocalDriver, blobs: Blobs, runs: Runs, run: str, attempts_before: int) -> RunStatus | None:
    ended = _ended(runs, run, attempts_before)  # it may have written its end since we looked
    if ended is None:
        driver.record_death(blobs, attempts_before)
        ended = _ended(runs, run, attempts_before)
    return ended


def _told(row: dict[str, object]) -> str:
    try:
        return _TOLD[str(row["event"])].format_map(row)
    except (KeyError, ValueError, TypeError):  # an event of another version
        return str(row["event"])


def _tell(run: str, spec: JobSpec, status: RunStatus, *, as_json: bool) -> int:
    from treadle.errors import error_from_json

    end = status.end
    assert end is not None
    body = {
        "run": run,
        "status": status.state.value,
        "update": end.update,
        "metrics": end.metrics,
        "model_version": end.model_version,
    }
    if end.error is not None:
        error: TreadleError = error_from_json(end.error)
        error.context["run"] = run
        if as_json:
            answer(as_json, body | {"error": end.error}, "")
        say(f"error: {error.message}")
        say(f"hint: {error.hint or f'treadle logs {run}'}")
        return end.exit_code
    words = ", ".join(f"{name} {value:.4f}" for name, value in end.metrics.items())
    kept = f"\nmodel {spec.name}@{end.model_version}" if end.model_version else ""
    tail = f": {words}{kept}" if words else f" at update {end.update}; go on with: treadle resume {run}"
    answer(as_json, body, f"{run} {status.state.value}{tail}")
    return end.exit_code

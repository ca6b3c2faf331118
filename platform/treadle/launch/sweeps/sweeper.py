"""Who carries a sweep out: `python -m treadle.launch.sweeps.sweeper --store URI --sweep SWEEP`.

The same program beside the command line and on a Ray cluster. It claims an attempt, keeps its log, events and
heartbeat in the store, runs the trials, names the best, writes the page, and records how it ended. SIGTERM, SIGINT and
a request in the store ask it to stop: every trial commits a checkpoint and leaves, and a later attempt goes on.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from treadle.errors import InternalError, TreadleError
from treadle.launch.attempt import BEAT_S, beating, failed_with, logging_to
from treadle.launch.sweeps.conductor import Conductor
from treadle.launch.sweeps.desk import Desk
from treadle.launch.sweeps.page import sweep_page
from treadle.launch.sweeps.records import FrozenSweep, read_sweep
from treadle.launch.sweeps.remains import leaving_nothing
from treadle.launch.sweeps.results import best_trial
from treadle.store import AttemptEnd, AttemptStatus, Backend, Blobs, Journal, Registry, open_blobs
from treadle.store.sweeps import SweepRecord, Sweeps

__all__ = ["ALIAS", "carry_out", "main"]

ALIAS = "candidate"
"""Of the best trial's model."""
NONE_FINISHED = 1
"""Exit code of a sweep in which no trial came to its end."""
POLL_S = 0.5


def carry_out(store: str, sweep: str, *, actor: str) -> int:
    """One attempt of a sweep, from claim to end; returns the exit code of the process."""
    blobs = open_blobs(store)
    sweeps = Sweeps(blobs)
    record = sweeps.get(sweep)
    before = sweeps.status(record.sweep).attempt
    attempt = sweeps.claim(
        record.sweep, record.backend, {"pid": os.getpid(), "host": os.uname().nodename}, after=before
    )
    folder, writer = f"sweeps/{record.sweep}", f"sweeper-a{attempt}"
    with logging_to(Journal(blobs, f"{folder}/logs.jsonl", writer=writer)):
        try:
            end = _attempt(blobs, record, attempt, Journal(blobs, f"{folder}/events.jsonl", writer=writer), actor)
        except TreadleError as error:
            print(error, file=sys.stderr, flush=True)
            end = failed_with(error)
        except BaseException as error:  # recorded, then exit 70
            traceback.print_exc()
            end = failed_with(InternalError(f"{type(error).__name__}: {error}", hint=f"treadle sweep --resume {sweep}"))
        sweeps.end_attempt(record.sweep, attempt, end)
    return end.exit_code


def _attempt(blobs: Blobs, record: SweepRecord, attempt: int, events: Journal, actor: str) -> AttemptEnd:
    frozen = read_sweep(blobs, record)
    wished: list[str] = []
    watch = _Watch(Sweeps(blobs), record.sweep, attempt, wished)
    with events, beating(watch.look, every_s=POLL_S), _signals(wished):
        desk = Desk(blobs, record, frozen, backend=Backend.inline if frozen.is_direct else record.backend)
        watch.conductor = conductor = Conductor(desk, events)
        try:
            groups = _run(conductor, record, frozen)
        finally:
            conductor.stop("the sweep ends")
        stopped = next(iter(wished), "")
        trials = desk.trials()
        best = None if stopped else best_trial(trials, frozen.asked)
        if best is not None and best.model_version is not None:
            reason = f"best of {record.sweep}: {frozen.asked.metric} {best.value:.6g}"
            Registry(blobs).promote(record.job, best.model_version, ALIAS, actor=actor, reason=reason)
        blobs.put(f"sweeps/{record.sweep}/report.html", sweep_page(record, frozen, trials).encode())
        return AttemptEnd(
            status=AttemptStatus.stopped if stopped else AttemptStatus.finished,
            exit_code=0 if stopped or best is not None else NONE_FINISHED,
            update=sum(trial.updates for trial in trials),
            metrics={"leaked_groups": float(groups)}
            | ({frozen.asked.metric: best.value} if best and best.value is not None else {}),
            model_version=best.model_version if best else None,
        )


def _run(conductor: Conductor, record: SweepRecord, frozen: FrozenSweep) -> int:
    """Run the trials; how many placement groups are left on a cluster that outlives them."""
    from treadle.launch.sweeps.on_tune import count_groups, run_on_tune
    from treadle.launch.sweeps.submissions import run_submissions

    if not frozen.is_direct:
        run_submissions(conductor, backend=record.backend)
        return 0
    from treadle.cluster import joined_ray, own_ray

    cluster = frozen.first.cluster
    with ExitStack() as stack:
        if record.backend is Backend.ray:
            stack.enter_context(joined_ray(os.environ.get("RAY_ADDRESS"), show_logs=False))
        else:
            stack.enter_context(leaving_nothing())
            stack.enter_context(own_ray(num_cpus=max(1, frozen.asked.parallel * cluster.cpus_per_worker)))
        before = count_groups()
        run_on_tune(conductor, backend=Backend.inline)
        return count_groups() - before


class _Watch:
    """Beats, and hands wishes to stop to the conductor once there is one."""

    def __init__(self, sweeps: Sweeps, sweep: str, attempt: int, wished: list[str]) -> None:
        self._sweeps = sweeps
        self._place = (sweep, attempt)
        self._wished = wished
        self._num_looks = 0
        self.conductor: Conductor | None = None

    def look(self) -> None:
        if self._num_looks % max(1, int(BEAT_S / POLL_S)) == 0:
            self._sweeps.beat(*self._place, {"pid": os.getpid()})
        self._num_looks += 1
        if not self._wished and (reason := self._sweeps.stop_reason(*self._place)):
            self._wished.append(reason)
        if self._wished and self.conductor is not None:
            self.conductor.stop(self._wished[0])


@contextmanager
def _signals(wished: list[str]) -> Iterator[None]:
    """SIGTERM and SIGINT are wishes; Ray puts no handler of its own over them."""

    def ask(number: int, _frame: Any) -> None:
        wished.append(signal.Signals(number).name)

    kept = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m treadle.launch.sweeps.sweeper")
    parser.add_argument("--store", required=True)
    parser.add_argument("--sweep", required=True)
    parser.add_argument("--actor", default="treadle sweep")
    given = parser.parse_args(arguments)
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        return carry_out(given.store, given.sweep, actor=given.actor)
    except TreadleError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())

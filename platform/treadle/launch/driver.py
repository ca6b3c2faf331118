"""One attempt of a run, from claim to end: `python -m treadle.launch.driver --store URI --run RUN`.

The same process whether it was started beside the command line or by the Ray Jobs API: it claims an
attempt, keeps its log and heartbeat in the store, starts the ranks, and records how it ended.
SIGTERM and SIGINT ask the run to stop; it commits a checkpoint and leaves.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
from contextlib import closing
from typing import Any

from treadle.errors import InternalError, TreadleError
from treadle.launch.attempt import beating, end_of, failed_with, logging_to
from treadle.launch.lead import Lead
from treadle.launch.records import Assignment
from treadle.launch.tracking import Events
from treadle.store import Backend, Journal, RequestKind, Runs, open_blobs

__all__ = ["drive", "main"]


def drive(store: str, run: str, backend: Backend, *, after: int | None = None) -> int:
    """Run one attempt; returns the exit code of the process.

    Args:
        after: be the attempt after this one or none: of several who would replace a lost one, one does.

    A stop that was asked for is exit 0: whoever started this must not try again by itself.
    """
    blobs = open_blobs(store)
    runs = Runs(blobs)
    record = runs.get(run)
    facts = {"pid": os.getpid(), "host": os.uname().nodename}
    attempt = runs.claim_attempt(run, backend, facts, after=after)
    events = Events(blobs, run, attempt, writer=f"driver-a{attempt}")
    assignment = Assignment(store=store, run=run, attempt=attempt, code=record.info.get("code", {}))
    lead = Lead(assignment=assignment, blobs=blobs, events=events)
    log = Journal(blobs, f"runs/{run}/logs.jsonl", writer=f"driver-a{attempt}")

    def beat() -> None:
        runs.beat(run, attempt, {"pid": os.getpid(), **lead.beat})

    with logging_to(log), closing(events), beating(beat):
        _stop_on_signals(runs, run, attempt)
        try:
            end = end_of(_train(lead, backend))
        except TreadleError as error:
            print(error, file=sys.stderr, flush=True)
            end = failed_with(error)
        except BaseException as error:  # recorded, then exit 70
            traceback.print_exc()
            end = failed_with(InternalError(f"{type(error).__name__}: {error}", hint=f"treadle logs {run}"))
        finally:
            _ignore_signals()
        runs.end_attempt(run, attempt, end)
    return end.exit_code


def _train(lead: Lead, backend: Backend) -> dict[str, Any]:
    if lead.cluster.workers == 0:
        from treadle.launch.inline import train_inline

        return train_inline(lead)
    from treadle.launch.group import train_on_ray

    return train_on_ray(lead, is_own_cluster=backend is not Backend.ray)


def _stop_on_signals(runs: Runs, run: str, attempt: int) -> None:
    def ask(number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        # A signal handler must not wait for a network.
        wish = threading.Thread(
            target=runs.request, args=(run, RequestKind.stop, f"{name} to the driver"), kwargs={"attempt": attempt}
        )
        wish.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m treadle.launch.driver")
    parser.add_argument("--store", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--backend", choices=[backend.value for backend in Backend], default=Backend.local.value)
    parser.add_argument("--after", type=int)
    given = parser.parse_args(arguments)
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # the only switch of wandb-core's own telemetry
    try:
        return drive(given.store, given.run, Backend(given.backend), after=given.after)
    except TreadleError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())

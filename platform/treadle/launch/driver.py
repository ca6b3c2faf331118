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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from treadle.errors import InternalError, TreadleError
from treadle.launch.records import read_job
from treadle.launch.worker import Assignment, train_rank
from treadle.store import AttemptEnd, AttemptStatus, Backend, Journal, RequestKind, Runs, open_blobs
from treadle.track import now_s

__all__ = ["drive", "main"]

BEAT_S = 5.0
_END_OF_LOG = b"\0end of log\0"


def drive(store: str, run: str, backend: Backend) -> int:
    """Run one attempt; returns the exit code of the process.

    A stop that was asked for is exit 0: whoever started this must not try again by itself.
    """
    blobs = open_blobs(store)
    runs = Runs(blobs)
    record = runs.get(run)
    attempt = runs.claim_attempt(run, backend, {"pid": os.getpid(), "host": os.uname().nodename})
    with _log(Journal(blobs, f"runs/{run}/logs.jsonl", writer=f"driver-a{attempt}")), _heart(runs, run, attempt):
        _stop_on_signals(runs, run, attempt)
        try:
            assignment = Assignment(store=store, run=run, attempt=attempt, code=record.info.get("code", {}))
            end = _end(_train(assignment, runs, backend))
        except TreadleError as error:
            print(error, file=sys.stderr, flush=True)
            end = _failed(error)
        except BaseException as error:  # recorded, then exit 70
            traceback.print_exc()
            end = _failed(InternalError(f"{type(error).__name__}: {error}", hint=f"treadle logs {run}"))
        finally:
            _ignore_signals()
        runs.end_attempt(run, attempt, end)
    return end.exit_code


def _train(assignment: Assignment, runs: Runs, backend: Backend) -> dict[str, Any]:
    spec, _ = read_job(runs, assignment.run)
    if spec.cluster.workers == 0:
        from treadle.train import World

        return train_rank(assignment, World())
    from treadle.launch.group import train_on_ray

    return train_on_ray(assignment, spec.cluster, is_own_cluster=backend is not Backend.ray)


def _end(summary: dict[str, Any]) -> AttemptEnd:
    return AttemptEnd(
        status=AttemptStatus(summary["status"]),
        update=summary["update"],
        metrics=summary["metrics"],
        model_version=summary["model_version"],
    )


def _failed(error: TreadleError) -> AttemptEnd:
    return AttemptEnd(status=AttemptStatus.failed, exit_code=error.exit_code, error=error.to_json())


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


@contextmanager
def _heart(runs: Runs, run: str, attempt: int) -> Iterator[None]:
    """Beats in the store while the block runs."""
    stop = threading.Event()

    def beat() -> None:
        while True:
            try:
                runs.beat(run, attempt, {"pid": os.getpid()})
            except TreadleError as error:
                print(f"heartbeat: {error.message}", file=sys.stderr)
            if stop.wait(BEAT_S):
                return

    thread = threading.Thread(target=beat, name="treadle-heart", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def _log(journal: Journal) -> Iterator[None]:
    """Everything this process and its children print goes into the store as well as to where it went."""
    read_end, write_end = os.pipe()
    kept = os.dup(2)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(write_end, 1)
    os.dup2(write_end, 2)
    os.close(write_end)

    def copy() -> None:
        rest = b""
        while not rest.endswith(_END_OF_LOG):
            data = os.read(read_end, 1 << 16)
            *lines, rest = (rest + data).split(b"\n")
            os.write(kept, data.removesuffix(_END_OF_LOG))
            for line in lines:
                journal.append({"time": now_s(), "text": line.decode("utf-8", "replace")})

    thread = threading.Thread(target=copy, name="treadle-log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.write(1, _END_OF_LOG)  # children may still hold the pipe open, so its end never comes
        thread.join(timeout=10)
        os.dup2(kept, 1)
        os.dup2(kept, 2)
        os.close(read_end)
        journal.close()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m treadle.launch.driver")
    parser.add_argument("--store", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--backend", choices=[backend.value for backend in Backend], default=Backend.local.value)
    given = parser.parse_args(arguments)
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # the only switch of wandb-core's own telemetry
    try:
        return drive(given.store, given.run, Backend(given.backend))
    except TreadleError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())

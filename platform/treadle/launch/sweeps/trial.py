"""One trial in this process: an attempt of its run, watched evaluation by evaluation."""

from __future__ import annotations

import math
import os
import sys
import time
import traceback
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from treadle.errors import ConflictError, InternalError, TreadleError
from treadle.launch.attempt import beating, end_of, failed_with, logging_to
from treadle.launch.mailbox import POLL_S
from treadle.launch.records import Assignment, read_job
from treadle.launch.sweeps.results import evaluations_of
from treadle.launch.worker import train_rank
from treadle.store import Backend, Blobs, Journal, RequestKind, Runs, RunState, open_blobs, read_journal
from treadle.track import read_metrics

__all__ = ["TrialOrder", "run_trial"]

Report = Callable[[int, float], None]


@dataclass(frozen=True, kw_only=True)
class TrialOrder:
    """What the process of a trial must know; JSON-ready.

    Args:
        until: evaluations after which it stops. before: those that its parent had.
    """

    store: str
    run: str
    metric: str
    until: int | None
    before: int


def run_trial(order: TrialOrder, report: Report, *, backend: Backend) -> None:
    """Run an attempt of a trial; its end is in the store, and nothing is raised but what ends the process.

    Args:
        report: called with (evaluation, value) after each, in the loop: when it returns, a decision about it is in the
            store.
    """
    blobs = open_blobs(order.store)
    runs = Runs(blobs)
    if runs.status(order.run).state is RunState.finished:
        return
    attempt = runs.claim_attempt(order.run, backend, {"pid": os.getpid(), "host": os.uname().nodename})
    log = Journal(blobs, f"runs/{order.run}/logs.jsonl", writer=f"trial-a{attempt}")
    with logging_to(log), beating(lambda: runs.beat(order.run, attempt, {"pid": os.getpid()})):
        try:
            assignment = Assignment(
                store=order.store, run=order.run, attempt=attempt, code=runs.get(order.run).info.get("code", {})
            )
            watch = Watch(blobs, runs, order, attempt, report)
            end = end_of(train_rank(assignment, _world(runs, order.run), sinks=[watch]))
        except TreadleError as error:
            print(error, file=sys.stderr, flush=True)
            end = failed_with(error)
        except Exception as error:  # recorded, then the process is free for the next trial
            traceback.print_exc()
            end = failed_with(InternalError(f"{type(error).__name__}: {error}", hint=f"treadle logs {order.run}"))
        with suppress(ConflictError):
            runs.end_attempt(order.run, attempt, end)


def _world(runs: Runs, run: str) -> Any:
    import torch

    from treadle.train import World

    spec, _ = read_job(runs, run)
    return World(device=torch.device("cuda", 0)) if spec.cluster.gpus_per_worker else World()


class Watch:
    """A sink that counts evaluations, reports them, and holds the loop until a wish to stop has reached it."""

    def __init__(self, blobs: Blobs, runs: Runs, order: TrialOrder, attempt: int, report: Report) -> None:
        self._runs = runs
        self._order = order
        self._attempt = attempt
        self._report = report
        history = read_metrics(read_journal(blobs, f"runs/{order.run}/metrics.jsonl"))
        self._updates = [update for update, _ in evaluations_of(history, order.metric)]

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self._order.metric)
        if value is None:
            return
        place = bisect_left(self._updates, update)
        if place == len(self._updates) or self._updates[place] != update:  # else it was lost and is made again
            insort(self._updates, update)
        evaluation = self._order.before + place + 1
        self._report(evaluation, float(value) if math.isfinite(value) else math.nan)
        if self._order.until is not None and evaluation >= self._order.until:
            reason = f"round complete at evaluation {evaluation}"
            self._runs.request(self._order.run, RequestKind.stop, reason, attempt=self._attempt)
        wishes = self._runs.requests(self._order.run, attempt=self._attempt)
        if any(wish.kind is RequestKind.stop for wish in wishes):
            time.sleep(1.2 * POLL_S)  # the loop's own reader of wishes looks that often

    def event(self, name: str, facts: Mapping[str, Any]) -> None: ...

    def close(self, outcome: str) -> None: ...

"""Trials of several workers, or beside a cluster: each an ordinary submission, followed through the store."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from treadle.launch.jobs import RayCluster
from treadle.launch.local import LocalDriver, start_local
from treadle.launch.reconcile import LOST_S, find_lost
from treadle.launch.records import read_job
from treadle.launch.sweeps.conductor import Conductor
from treadle.launch.sweeps.courses import Task
from treadle.store import Backend, JournalReader, RequestKind, follow

__all__ = ["run_submissions"]

POLL_S = 0.3
_GONE = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})


@dataclass
class _Under:
    """A trial under way.

    Args:
        before: attempts of its run that had been when it was taken up.
        driver: where it was started here; submission: where on a cluster; neither where it was found running.
    """

    task: Task
    rows: JournalReader
    before: int
    driver: LocalDriver | None = None
    submission: str = ""
    updates: list[int] = field(default_factory=list)
    beat: str = ""
    beat_s: float = field(default_factory=time.monotonic)
    is_lost: bool = False


def run_submissions(conductor: Conductor, *, backend: Backend) -> None:
    """Carry a sweep out, at most `parallel` submissions at once; returns when nothing is under way."""
    cluster = RayCluster(conductor.desk.frozen.first.cluster.address) if backend is Backend.ray else None
    live: list[_Under] = []
    while True:
        while len(live) < conductor.desk.frozen.asked.parallel and (task := conductor.next_task()) is not None:
            live.append(_start(conductor, task, cluster))
        for under in live:
            _look(conductor, under)
        for under in [under for under in live if _is_over(conductor, under, cluster)]:
            _look(conductor, under)
            live.remove(under)
            if under.driver is not None:
                under.driver.release()
            conductor.ended(under.task, is_lost=under.is_lost)
        if not live and conductor.is_over:
            return
        time.sleep(POLL_S)


def _start(conductor: Conductor, task: Task, cluster: RayCluster | None) -> _Under:
    desk, run = conductor.desk, task.member.run
    status = desk.runs.status(run)
    under = _Under(task=task, rows=follow(desk.blobs, f"runs/{run}/metrics.jsonl"), before=status.attempt)
    if status.attempt and status.end is None and not find_lost(desk.runs, [run]):
        under.before -= 1  # its own session outlived the sweep that began it
        return under
    if cluster is not None:
        under.submission = cluster.submit(desk.blobs.uri, run, status.attempt + 1)
    else:
        spec, _ = read_job(desk.runs, run)
        under.driver = start_local(
            desk.blobs.uri,
            run,
            threads=spec.cluster.cpus_per_worker,
            in_process=spec.cluster.workers == 0,
            after=status.attempt,
        )
    return under


def _look(conductor: Conductor, under: _Under) -> None:
    """Tell the conductor of evaluations that are new."""
    metric, member = conductor.desk.frozen.asked.metric, under.task.member
    for row in under.rows.poll():
        value, update = row["metrics"].get(metric), int(row["update"])
        if value is None or update in under.updates:
            continue
        under.updates.append(update)
        evaluation = member.evaluations_before + len(under.updates)
        if row["attempt"] <= under.before:
            continue  # of an earlier attempt, which was told then
        conductor.evaluated(member.number, evaluation, float(value))
        if under.task.until is not None and evaluation >= under.task.until:
            conductor.desk.runs.request(member.run, RequestKind.stop, f"round complete at evaluation {evaluation}")


def _is_over(conductor: Conductor, under: _Under, cluster: RayCluster | None) -> bool:
    """Whether the attempt has ended, or its process is gone."""
    desk, run = conductor.desk, under.task.member.run
    status = desk.runs.status(run)
    if status.attempt > under.before and status.end is not None:
        return True
    if under.driver is not None:
        if under.driver.is_alive():
            return False
        if (now := desk.runs.status(run)).attempt <= under.before or now.end is None:  # it wrote none meanwhile
            under.driver.record_death(desk.blobs, under.before)
            under.is_lost = True
        return True
    if cluster is not None and under.submission:
        return cluster.job(under.submission).get("status") in _GONE
    token = status.beat.token if status.beat is not None else ""
    if token != under.beat:
        under.beat, under.beat_s = token, time.monotonic()
    return time.monotonic() - under.beat_s > LOST_S

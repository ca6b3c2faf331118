"""Verbs that start and stop work: plan, submit, stop, resume, jobs."""

from __future__ import annotations

import time
from typing import Any

import click

from treadle.cli.options import (
    answer,
    asked,
    compose,
    job_argument,
    json_option,
    overrides_argument,
    say,
    store_option,
    stored,
)
from treadle.errors import ConfigError, ConflictError

__all__ = ["backend_of", "capacity_of", "jobs", "on_option", "plan", "resume", "start_attempt", "stop", "submit"]

on_option = click.option(
    "--on", "place", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="Where to train."
)
follow_option = click.option(
    "--follow/--detach", default=True, show_default=True, help="Show progress until the run ends, or return at once."
)


@click.command()
@job_argument
@overrides_argument
@on_option
@json_option
def plan(job: str, overrides: tuple[str, ...], place: str, as_json: bool) -> None:
    """Show what a job would do, and refuse what cannot fit."""
    from treadle.launch.submit import plan_job
    from treadle.launch.view import plan_text
    from treadle.store import open_blobs

    spec, folder = compose(job, overrides)
    blobs = open_blobs(spec.store.uri)
    made = plan_job(spec, folder, blobs, capacity_of(spec, place), asked=asked(job, overrides))
    answer(as_json, {"plan": made, "spec": spec}, lambda: plan_text(spec, made))


def capacity_of(spec: Any, place: str) -> Any:
    """What the place offers where the job is to run."""
    from treadle.launch.surroundings import local_capacity

    if place == "local":
        return local_capacity(count_gpus=spec.cluster.gpus_per_worker > 0)
    from treadle.launch.jobs import RayCluster

    return RayCluster(spec.cluster.address).capacity()


@click.command()
@job_argument
@overrides_argument
@on_option
@follow_option
@json_option
def submit(job: str, overrides: tuple[str, ...], place: str, follow: bool, as_json: bool) -> int:
    """Train a job, here or on a running Ray cluster.

    OVERRIDES are Hydra's: model=minlstm optim.lr=1e-3. With --follow the exit code is that of the run.
    """
    from treadle.launch.submit import create_run, plan_job
    from treadle.launch.view import plan_text
    from treadle.store import open_blobs

    spec, folder = compose(job, overrides)
    blobs = open_blobs(spec.store.uri)
    made = plan_job(spec, folder, blobs, capacity_of(spec, place), asked=asked(job, overrides))
    say(plan_text(spec, made))
    backend = backend_of(place, spec)
    record = create_run(spec, made, blobs, backend)
    say(f"run       {record.run}")
    return _start(blobs, record, spec, made, follow=follow, as_json=as_json)


@click.command()
@click.argument("run")
@on_option
@follow_option
@store_option
@click.option("--address", help="Dashboard of the Ray cluster, where it moved since.")
@json_option
def resume(run: str, place: str, follow: bool, store_uri: str | None, address: str | None, as_json: bool) -> int:
    """Go on from the last checkpoint of a run that was stopped, failed or lost."""
    from dataclasses import replace

    from treadle.launch.reconcile import find_lost, mark_lost
    from treadle.launch.records import read_job
    from treadle.store import Runs, RunState

    blobs = stored(store_uri)
    runs = Runs(blobs)
    record = runs.get(run)
    status = runs.status(record.run)
    if status.state is RunState.finished:
        raise ConflictError(f"run {record.run}: is finished, expected one that was stopped, failed or lost")
    if status.state is RunState.running:
        if record.run not in find_lost(runs, [record.run]):
            raise ConflictError(f"run {record.run}: is running", hint=f"treadle logs -f {record.run}")
        mark_lost(runs, record.run, status)
    spec, made = read_job(runs, record.run)
    if address:
        spec = replace(spec, cluster=replace(spec.cluster, address=address))
    backend = backend_of(place, spec)
    say(f"run       {record.run}, attempt {status.attempt + 1}")
    return _start(blobs, replace(record, backend=backend), spec, made, follow=follow, as_json=as_json)


def backend_of(place: str, spec: Any) -> Any:
    """Where an attempt runs."""
    from treadle.store import Backend

    if place == "ray":
        return Backend.ray
    return Backend.inline if spec.cluster.workers == 0 else Backend.local


def start_attempt(blobs: Any, run: str, backend: Any, spec: Any, *, after: int) -> tuple[Any, str | None]:
    """The driver of a new attempt beside this process, or its submission on a cluster.

    Args:
        after: the attempt that it follows. Of several who start one after the same, one does.
    """
    from treadle.launch.jobs import RayCluster
    from treadle.launch.local import start_local
    from treadle.store import Backend

    if backend is Backend.ray:
        cluster = RayCluster(spec.cluster.address)
        if "://" not in blobs.uri:
            say(f"note      the store {blobs.uri} is a folder: every node of the cluster must see it")
        submission = cluster.submit(blobs.uri, run, after + 1)
        say(f"submitted {submission} to {cluster.address}")
        return None, submission
    is_inline = spec.cluster.workers == 0
    return start_local(blobs.uri, run, threads=spec.cluster.cpus_per_worker, in_process=is_inline, after=after), None


def _start(blobs: Any, record: Any, spec: Any, made: Any, *, follow: bool, as_json: bool) -> int:
    from treadle.cli.follow import follow_run
    from treadle.store import Runs

    before = Runs(blobs).status(record.run).attempt
    driver, submission = start_attempt(blobs, record.run, record.backend, spec, after=before)
    if follow:
        return follow_run(blobs, record.run, spec, made, attempts_before=before, driver=driver, as_json=as_json)
    body = {"run": record.run, "status": "submitted", "attempt": before + 1, "submission": submission}
    answer(as_json, body, f"{record.run}\nfollow it: treadle logs -f {record.run}")
    return 0


@click.command()
@click.argument("run")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait until the run has left.")
@store_option
@json_option
def stop(run: str, wait: bool, store_uri: str | None, as_json: bool) -> None:
    """Ask a run to commit a checkpoint and leave; it can be resumed."""
    from treadle.cli.options import actor
    from treadle.store import RequestKind, Runs

    runs = Runs(stored(store_uri))
    record = runs.get(run)
    runs.request(record.run, RequestKind.stop, f"treadle stop by {actor()}")
    say(f"asked {record.run} to stop")
    status = runs.status(record.run)
    while wait and status.end is None:
        time.sleep(0.3)
        status = runs.status(record.run)
    body = {"run": record.run, "status": status.state.value, "update": status.update}
    hint = f"; go on with: treadle resume {record.run}" if status.end is not None else ""
    answer(as_json, body, f"{record.run}: {status.state.value} at update {status.update}{hint}")


@click.command()
@json_option
def jobs(as_json: bool) -> None:
    """List the jobs that can be named: ./jobs, then those that came with treadle."""
    from treadle.spec.places import list_jobs
    from treadle.track import table

    found = {name: str(folder) for name, folder in list_jobs().items()}
    if not found and not as_json:
        raise ConfigError("jobs: none found", hint="a job is a folder jobs/<name>/ with job.yaml and prepare.py")
    answer(as_json, {"jobs": found}, lambda: table(list(found.items()), ["job", "folder"]))

"""The verb that looks for runs whose driver or cluster is gone, and goes on with them."""

from __future__ import annotations

import time
from typing import Any

import click

from treadle.cli.options import answer, json_option, say, store_option, stored
from treadle.cli.submit import backend_of, start_attempt

__all__ = ["reconcile"]


@click.command()
@click.argument("names", nargs=-1, metavar="[RUN]...")
@click.option(
    "--on", "place", type=click.Choice(["local", "ray"]), help="Where to go on; where the run was, if not given."
)
@click.option("--restart/--mark", default=True, show_default=True, help="Go on with what was lost, or only say so.")
@click.option("--watch", is_flag=True, help="Look again and again, until Ctrl-C.")
@store_option
@json_option
def reconcile(
    names: tuple[str, ...], place: str | None, restart: bool, watch: bool, store_uri: str | None, as_json: bool
) -> None:
    """Find runs that were lost with their driver, machine or cluster, and go on with each exactly once.

    A run is lost where its attempt shows no sign of life for about ten seconds. However many look at the same time,
    one starts the next attempt; the old one cannot commit any more, should it come back.
    """
    from treadle.store import Runs

    blobs = stored(store_uri)
    runs = Runs(blobs)
    wanted = [runs.get(name).run for name in names] or None
    while True:
        found = _reconciled(blobs, runs, wanted, place, restart=restart)
        words = "\n".join(f"{run['run']}: attempt {run['attempt']} was lost, {run['done']}" for run in found)
        if found or not watch:
            answer(as_json, {"lost": found}, words or "no run is lost")
        if not watch:
            return
        time.sleep(1.0)


def _reconciled(
    blobs: Any, runs: Any, names: list[str] | None, place: str | None, *, restart: bool
) -> list[dict[str, Any]]:
    from treadle.launch.reconcile import find_lost, mark_lost
    from treadle.launch.records import read_job
    from treadle.store import Backend

    found: list[dict[str, Any]] = []
    for run, status in find_lost(runs, names).items():
        mark_lost(runs, run, status)
        done = "marked as lost"
        if restart:
            spec, _ = read_job(runs, run)
            where = place or ("ray" if runs.get(run).backend is Backend.ray else "local")
            start_attempt(blobs, run, backend_of(where, spec), spec, after=status.attempt)
            done = f"attempt {status.attempt + 1} goes on"
        say(f"{run}: {done}")
        found.append({"run": run, "attempt": status.attempt, "update": status.update, "done": done})
    return found

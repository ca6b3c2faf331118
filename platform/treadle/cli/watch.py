"""Verbs that look: ls, status, logs, report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from treadle.cli.options import answer, json_option, say, store_option, stored

__all__ = ["logs", "ls", "report", "status"]

run_argument = click.argument("run")


@click.command()
@click.option("--job", help="Only the runs of this job.")
@click.option("-n", "count", default=20, show_default=True, help="Newest so many.")
@store_option
@json_option
def ls(job: str | None, count: int, store_uri: str | None, as_json: bool) -> None:
    """List the runs of the store, newest first."""
    from treadle.store import Runs
    from treadle.track import table

    found = [run for run in Runs(stored(store_uri)).list() if job in (None, run.job)][:count]
    rows = [
        (
            r.run,
            r.state.value,
            r.attempt,
            r.update,
            f"{r.job}@{r.model_version}" if r.model_version else "",
            r.created_at,
        )
        for r in found
    ]
    empty = "no runs yet; start one: treadle submit JOB"
    text = table(rows, ["run", "status", "attempt", "update", "model", "submitted"]) if rows else empty
    answer(as_json, {"runs": found}, text)


@click.command()
@run_argument
@store_option
@json_option
def status(run: str, store_uri: str | None, as_json: bool) -> None:
    """Show where a run stands. RUN is an id, the start of one, or a job's name for its newest."""
    from treadle.launch.records import read_job
    from treadle.store import Runs, read_journal
    from treadle.track import read_metrics

    blobs = stored(store_uri)
    runs = Runs(blobs)
    record = runs.get(run)
    state = runs.status(record.run)
    spec, plan = read_job(runs, record.run)
    history = read_metrics(read_journal(blobs, f"runs/{record.run}/metrics.jsonl"))
    last = {name: series.last for name, series in history.series.items()}
    update = max(state.update, int(last.get("trainer/update", 0)))
    body = {
        "run": record.run,
        "status": state.state.value,
        "attempt": state.attempt,
        "update": update,
        "num_updates": plan.num_updates,
        "metrics": last | (state.end.metrics if state.end else {}),
        "model_version": state.end.model_version if state.end else None,
        "error": state.end.error if state.end else None,
    }
    answer(as_json, body, lambda: _status_text(body, spec, history))


def _status_text(body: dict[str, Any], spec: Any, history: Any) -> str:
    from treadle.track import chart

    version = f", model {spec.name}@{body['model_version']}" if body["model_version"] else ""
    lines = [
        f"{body['run']}  {body['status']}, attempt {body['attempt']}{version}",
        f"update {body['update']:,} of about {body['num_updates']:,}",
    ]
    shown = {name: value for name, value in body["metrics"].items() if name.startswith(("train/", "val/", "test/"))}
    lines += [f"  {name:<28} {value:.4g}" for name, value in sorted(shown.items())]
    if "train/loss" in history.series and len(history.series["train/loss"].values) > 2:
        lines.append(chart(history.series["train/loss"].values, label="train/loss"))
    if body["error"]:
        lines += [f"error: {body['error']['message']}", f"hint: {body['error']['hint']}"]
    return "\n".join(lines)


@click.command()
@run_argument
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends.")
@store_option
@json_option
def logs(run: str, follow: bool, store_uri: str | None, as_json: bool) -> None:
    """Print what a run did and wrote: its events and evaluations, and the output of driver and workers."""
    from treadle.store import Runs
    from treadle.store import follow as follow_journal

    blobs = stored(store_uri)
    runs = Runs(blobs)
    record = runs.get(run)
    readers = [follow_journal(blobs, f"runs/{record.run}/{name}.jsonl") for name in ("logs", "events", "metrics")]
    while True:
        is_over = not follow or runs.status(record.run).end is not None
        rows = [
            (row.get("time") or 0.0, text) for reader in readers for row in reader.poll() if (text := _log_line(row))
        ]
        for time_s, text in sorted(rows, key=lambda row: row[0]):
            answer(as_json, {"time": time_s, "text": text}, text)
        if is_over:
            return
        time.sleep(0.5)


def _log_line(row: dict[str, Any]) -> str:
    """One row of a journal as a line; "" for what is only of use in a curve."""
    if "text" in row and "event" not in row:
        return str(row["text"])
    if "event" in row:
        fixed = ("schema", "attempt", "time", "event")
        return " ".join([f"[{row['event']}]", *(f"{key}={value}" for key, value in row.items() if key not in fixed)])
    shown = {name: value for name, value in row["metrics"].items() if name.startswith(("val/", "test/"))}
    words = (f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in shown.items())
    return " ".join([f"[update {row['update']}]", *words]) if shown else ""


@click.command()
@run_argument
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("report.html"))
@store_option
@json_option
def report(run: str, output: Path, store_uri: str | None, as_json: bool) -> None:
    """Write a run as one HTML page that needs nothing else."""
    from treadle.launch.report import run_report
    from treadle.store import Runs

    blobs = stored(store_uri)
    record = Runs(blobs).get(run)
    page = run_report(blobs, record.run)
    output.write_text(page, encoding="utf-8")
    say(f"{len(page.encode()):,} bytes")
    answer(as_json, {"run": record.run, "report": str(output.resolve())}, str(output))

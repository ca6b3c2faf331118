"""The whole road on real data: every step is the command a person would type, run for real."""

from __future__ import annotations

import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click

from treadle.cli.options import answer, data_overrides, json_option, say
from treadle.errors import TransientError, error_from_json
from treadle.units import format_duration_s

__all__ = ["demo"]

JOB = "g2p"
WORDS = ("treadle", "kubernetes", "pytorch")  # none of them is in the dictionary
SERVE_TIMEOUT_S = 180.0


@click.command()
@click.argument("overrides", nargs=-1)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("report.html"))
@json_option
def demo(overrides: tuple[str, ...], output: Path, as_json: bool) -> None:
    """Learn to pronounce English: prepare, plan, train, register, promote, serve, ask, report.

    About four minutes on two cores. OVERRIDES are those of `treadle submit`.
    """
    started = time.monotonic()
    _run("prepare", JOB, *data_overrides(overrides))
    _run("plan", JOB, *overrides)
    run = _run("submit", JOB, *overrides)
    version = f"{JOB}@{run['model_version']}"
    store = _store_options(overrides)
    _run("models", "promote", version, "production", *store)
    with _serving(f"{JOB}@production", "--port", "0", *store):
        reply = _run("predict", f"{JOB}@production", *WORDS, *store)
    _run("report", run["run"], "--output", str(output), *store)
    seconds = time.monotonic() - started
    say(f"\nthe whole road took {format_duration_s(seconds)}\n")
    answers = {word: out["labels"] for word, out in zip(WORDS, reply["outputs"], strict=True)}
    body = {
        "run": run["run"],
        "model_version": run["model_version"],
        "metrics": run["metrics"],
        "answers": answers,
        "report": str(output.resolve()),
        "seconds": round(seconds, 1),
    }
    answer(as_json, body, lambda: _text(run, version, answers, output))


def _text(run: dict[str, Any], version: str, answers: dict[str, list[str]], output: Path) -> str:
    metrics = run["metrics"]
    lines = [
        f"{version} is in production; on words it never saw:",
        f"  phone error rate {metrics['test/phone_error_rate']:.1%}",
        f"  word error rate  {metrics['test/word_error_rate']:.1%}",
        *(f"  {word:<12} {' '.join(labels)}" for word, labels in answers.items()),
        f"  report       {output}",
        "next",
        f"  treadle predict {JOB}@production YOURWORD",
        f"  treadle serve {JOB}@production",
        f"  treadle submit {JOB} model=minlstm",
    ]
    return "\n".join(lines)


def _store_options(overrides: Sequence[str]) -> list[str]:
    uris = [o.split("=", 1)[1] for o in overrides if o.startswith("store.uri=")]
    return ["--store", uris[-1]] if uris else []


def _command(arguments: Sequence[str]) -> list[str]:
    say(f"\n$ treadle {shlex.join(arguments)}")
    return [sys.executable, "-P", "-m", "treadle", *arguments, "--json"]


def _run(*arguments: str) -> dict[str, Any]:
    """Run one verb: its story is shown, its answer is returned.

    Raises:
        TreadleError: what the verb ended with.
    """
    # subprocess.run would kill the verb at Ctrl-C, before it has stopped what it started.
    with subprocess.Popen(_command(arguments), stdout=subprocess.PIPE, text=True) as process:
        try:
            out, _ = process.communicate()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.communicate()
            raise
    reply = json.loads(out.strip().splitlines()[-1]) if out.strip() else {}
    if process.returncode:
        inner = reply.get("error")
        raise error_from_json(inner if isinstance(inner, dict) else reply)
    return reply


def _copy(lines: IO[str], to: queue.Queue[str]) -> None:
    for line in lines:
        to.put(line)
    to.put("")  # it ended


@contextmanager
def _serving(*arguments: str) -> Iterator[dict[str, Any]]:
    """The endpoint of `treadle serve`, stopped as Ctrl-C stops it."""
    process = subprocess.Popen(
        _command(["serve", *arguments]), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    lines: queue.Queue[str] = queue.Queue()
    assert process.stdout is not None
    threading.Thread(target=_copy, args=(process.stdout, lines), daemon=True).start()
    try:
        line = lines.get(timeout=SERVE_TIMEOUT_S)
        reply = json.loads(line) if line else {}
        if "url" not in reply:
            raise error_from_json(reply) if reply else TransientError("serve: ended without an answer")
        yield reply
    except queue.Empty:
        raise TransientError(f"serve: no endpoint within {SERVE_TIMEOUT_S:.0f} s") from None
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

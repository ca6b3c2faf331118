"""Options and answers that the verbs share."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from treadle import wire

__all__ = [
    "ANSWER_SCHEMA",
    "actor",
    "answer",
    "asked",
    "compose",
    "data_overrides",
    "job_argument",
    "json_option",
    "no_color",
    "overrides_argument",
    "page",
    "say",
    "store_option",
    "stored",
]

ANSWER_SCHEMA = 1
_DATA_KEYS = ("data", "columns", "split", "store")

job_argument = click.argument("job")
overrides_argument = click.argument("overrides", nargs=-1)
json_option = click.option("--json", "as_json", is_flag=True, help="Answer with one line of JSON.")
store_option = click.option(
    "--store",
    "store_uri",
    metavar="URI",
    help="A folder or s3://bucket/prefix. [default: $TREADLE_STORE, ~/.treadle/store]",
)


def stored(store_uri: str | None) -> Any:
    """The blobs of the store that was asked for."""
    from treadle.launch.surroundings import default_store
    from treadle.store import open_blobs

    return open_blobs(store_uri or default_store())


def compose(job: str, overrides: Iterable[str], *, store_uri: str | None = None) -> tuple[Any, Path]:
    """A job's spec and folder; `store_uri` is its store where neither job nor overrides say one."""
    from treadle.launch.surroundings import default_store
    from treadle.spec.compose import compose_job
    from treadle.spec.places import find_job

    return compose_job(job, [*overrides], default_store=store_uri or default_store()), find_job(job)


def data_overrides(overrides: Iterable[str]) -> list[str]:
    """Those overrides that say where data come from, what they are and where they go."""
    return [text for text in overrides if text.lstrip("+~").partition("=")[0].partition(".")[0] in _DATA_KEYS]


def asked(job: str, overrides: Iterable[str]) -> str:
    """What `treadle prepare` needs of a command line."""
    return shlex.join([job, *data_overrides(overrides)])


def page() -> tuple[int, bool]:
    """Columns of standard output, and whether it takes ASCII alone."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 100
    return width, not (sys.stdout.encoding or "utf-8").lower().startswith("utf")


def answer(as_json: bool, body: dict[str, Any], text: str | Callable[[], str]) -> None:
    """Print the answer: one line of JSON with a schema number, or the text for people."""
    if as_json:
        click.echo(json.dumps({"schema": ANSWER_SCHEMA, **wire.encode(body)}, ensure_ascii=False))
    else:
        shown = text if isinstance(text, str) else text()
        encoding = sys.stdout.encoding or "utf-8"
        click.echo(shown.replace("─", "-").encode(encoding, "replace").decode(encoding) if page()[1] else shown)


def say(line: str) -> None:
    """A line of the story, on standard error."""
    click.echo(line, err=True)


def no_color() -> bool:
    return bool(os.environ.get("NO_COLOR")) or not sys.stderr.isatty()


def actor() -> str:
    """Who acts, for the audit log."""
    return (
        os.environ.get("TREADLE_ACTOR") or os.environ.get("USER") or os.environ.get("LOGNAME") or f"uid-{os.getuid()}"
    )

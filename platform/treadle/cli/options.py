"""Options and answers that the verbs share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from treadle import wire

__all__ = ["ANSWER_SCHEMA", "actor", "answer", "json_option", "no_color", "say", "store_option", "stored"]

ANSWER_SCHEMA = 1

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


def answer(as_json: bool, body: dict[str, Any], text: str | Callable[[], str]) -> None:
    """Print the answer: one line of JSON with a schema number, or the text for people."""
    if as_json:
        click.echo(json.dumps({"schema": ANSWER_SCHEMA, **wire.encode(body)}, ensure_ascii=False))
    else:
        click.echo(text if isinstance(text, str) else text())


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

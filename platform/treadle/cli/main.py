"""The verbs, each imported when it is called."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import click

from treadle import __version__
from treadle.errors import InternalError, TreadleError

__all__ = ["main", "program"]

# verb -> (module:attribute, what it does); the order is that of the help page.
VERBS = {
    "prepare": ("treadle.cli.data:build", "Make a job's data set in the store: `data build`."),
    "data": ("treadle.cli.data:data", "Build, explain, show, audit and verify data sets."),
    "plan": ("treadle.cli.submit:plan", "Show what a job would do, and refuse what cannot fit."),
    "submit": ("treadle.cli.submit:submit", "Train a job here or on a Ray cluster."),
    "sweep": ("treadle.cli.sweep:sweep", "Train a job with different values and name the best."),
    "tune": ("treadle.cli.tune:tune", "Find a setting before training: a learning rate."),
    "ls": ("treadle.cli.watch:ls", "List the runs of the store."),
    "status": ("treadle.cli.watch:status", "Show where a run stands."),
    "logs": ("treadle.cli.watch:logs", "Print what a run wrote; -f follows it."),
    "report": ("treadle.cli.watch:report", "Write a run as one HTML page."),
    "stop": ("treadle.cli.submit:stop", "Ask a run to commit a checkpoint and leave."),
    "resume": ("treadle.cli.submit:resume", "Go on from a run's last checkpoint."),
    "reconcile": ("treadle.cli.reconcile:reconcile", "Go on with runs whose driver or machine is gone."),
    "models": ("treadle.cli.models:models", "List, show, promote and roll back models."),
    "serve": ("treadle.cli.serving:serve", "Answer requests with a model on Ray Serve."),
    "predict": ("treadle.cli.serving:predict", "Ask a model."),
    "jobs": ("treadle.cli.submit:jobs", "List the jobs that can be named."),
    "doctor": ("treadle.cli.doctor:doctor", "Check this machine, its Ray, store and W&B."),
    "store": ("treadle.cli.store:store_group", "Start a local S3 server for trying things out."),
    "demo": ("treadle.cli.demo:demo", "The whole road on real data, in minutes."),
}


class Lazy(click.Group):
    """A group whose help and suggestions need no import of its verbs."""

    def __init__(self, *args: Any, verbs: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._verbs = dict(verbs)
        self.commands = {name: click.Command(name, help=text) for name, (_, text) in verbs.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._verbs)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, stub, rest = super().resolve_command(ctx, args)
        if stub is None or stub.name is None:
            return name, stub, rest
        module, attribute = self._verbs[stub.name][0].split(":")
        return name, getattr(importlib.import_module(module), attribute), rest


@click.group(
    cls=Lazy,
    verbs=VERBS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=True,
)
@click.version_option(__version__, prog_name="treadle")
def program() -> None:
    """Train, keep and serve recurrent sequence models on a Ray cluster.

    \b
    treadle prepare g2p && treadle submit g2p --follow
    treadle models promote g2p@latest && treadle serve g2p@production
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code is 0, that of the error (treadle.errors), or 130 for Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:  # this process is ours: a SIGTERM unwinds as Ctrl-C does, and nothing is left running
        signal.signal(signal.SIGTERM, _interrupt)
    as_json = "--json" in given
    try:
        code = program.main(args=given, prog_name="treadle", standalone_mode=False)
        sys.stdout.flush()
    except TreadleError as error:
        return _tell(error, as_json=as_json)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:
        # The reader (head, less) went away: not an error, and no second complaint at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        traceback.print_exc()
        wrapped = InternalError(f"{type(error).__name__}: {error}", hint="this is a bug in treadle; please report it")
        return _tell(wrapped, as_json=as_json)
    return code if isinstance(code, int) else 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _tell(error: TreadleError, *, as_json: bool) -> int:
    if as_json:
        click.echo(json.dumps(error.to_json()))
    click.echo(f"error: {error.message}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)
    return error.exit_code

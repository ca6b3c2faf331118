"""Verbs about registered models: ls, show, promote, rollback."""

from __future__ import annotations

from typing import Any

import click

from treadle.cli.options import actor, answer, json_option, store_option, stored
from treadle.errors import NotFoundError

__all__ = ["models"]

alias_argument = click.argument("alias", default="production")
reason_option = click.option("--reason", default="", help="Why, for the audit log.")


@click.group()
def models() -> None:
    """List, show, promote and roll back models."""


@models.command("ls")
@click.argument("name", required=False)
@store_option
@json_option
def list_models(name: str | None, store_uri: str | None, as_json: bool) -> None:
    """List the models, or the versions of one."""
    from treadle.store import Registry
    from treadle.track import table

    registry = Registry(stored(store_uri))
    names = [name] if name else registry.models()
    if name and name not in registry.models():
        registry.resolve(name)  # says what is near
    rows, body = [], []
    for model in names:
        aliases = registry.aliases(model)
        for version in reversed(registry.versions(model)):
            held = sorted(alias for alias, number in aliases.items() if number == version.version)
            body.append(_facts(version) | {"aliases": held})
            metrics = ", ".join(f"{key.removeprefix('test/')} {value:.4f}" for key, value in version.metrics.items())
            rows.append((str(version), " ".join(held), metrics, version.run, version.created_at))
    empty = "no models yet; a run that finishes registers one: treadle submit JOB --follow"
    text = table(rows, ["model", "aliases", "metrics", "run", "registered"]) if rows else empty
    answer(as_json, {"models": body}, text)


@models.command()
@click.argument("model")
@store_option
@json_option
def show(model: str, store_uri: str | None, as_json: bool) -> None:
    """Show one version: MODEL is name@alias, name@3, or a name for its newest version."""
    from treadle.store import Registry

    registry = Registry(stored(store_uri))
    version = registry.resolve(model)
    held = sorted(alias for alias, number in registry.aliases(version.name).items() if number == version.version)
    history = registry.history(version.name)
    body = _facts(version) | {
        "aliases": held,
        "files": version.files,
        "signature": version.signature,
        "lineage": {
            "run": version.run,
            "spec": version.spec_digest,
            "data": version.data_digest,
            "code": version.code,
            "environment": version.environment_digest,
        },
        "history": history,
    }
    answer(as_json, body, lambda: _show_text(version, held, history))


def _show_text(version: Any, held: list[str], history: list[Any]) -> str:
    from treadle.units import format_bytes

    size = format_bytes(sum(file.size_bytes for file in version.files.values()))
    dirty = " with changes" if version.code.dirty else ""
    lines = [
        f"{version}  {' '.join(held)}".rstrip(),
        f"  digest       {version.digest[:16]}",
        f"  registered   {version.created_at} by run {version.run}",
        f"  files        {', '.join(sorted(version.files))} ({size})",
        f"  takes        {_takes(version.signature)}",
        f"  spec         {version.spec_digest[:16]}",
        f"  data         {version.data_digest[:16]}",
        f"  code         {version.code.git[:16]}{dirty}",
        *(f"  {name:<28} {value:.4f}" for name, value in version.metrics.items()),
    ]
    moves = [
        f"  {e.time}  {e.action} {e.alias}: {e.before or '-'} -> {e.after} by {e.actor} {e.reason}" for e in history
    ]
    return "\n".join([*lines, *(["history"] if moves else []), *moves])


def _takes(signature: dict[str, Any]) -> str:
    each = f"one of {signature['input_size'] - 1} symbols"  # id 0 stands for unknown ones, which are refused
    if signature["input_kind"] == "frames":
        each = f"{signature['input_size']} numbers"
    answers = f"{signature['num_labels']} labels" if signature["num_labels"] else "a next symbol"
    return f"up to {signature['max_length']:,} time steps of {each}; answers with {answers}"


@models.command()
@click.argument("model")
@alias_argument
@reason_option
@store_option
@json_option
def promote(model: str, alias: str, reason: str, store_uri: str | None, as_json: bool) -> None:
    """Point ALIAS (production) at MODEL: name@3, name@alias, or a name for its newest version."""
    from treadle.store import Registry

    registry = Registry(stored(store_uri))
    version = registry.resolve(model)
    change = registry.promote(version.name, version.version, alias, actor=actor(), reason=reason)
    _tell(change, as_json)


@models.command()
@click.argument("name")
@alias_argument
@reason_option
@store_option
@json_option
def rollback(name: str, alias: str, reason: str, store_uri: str | None, as_json: bool) -> None:
    """Point ALIAS (production) of the model NAME back at the version it held before."""
    from treadle.store import Registry

    if "@" in name:
        name, _, alias = name.partition("@")
    registry = Registry(stored(store_uri))
    if name not in registry.models():
        registry.resolve(name)
        raise NotFoundError(f"model: got {name!r}, expected a registered one")
    _tell(registry.rollback(name, alias, actor=actor(), reason=reason), as_json)


def _tell(change: Any, as_json: bool) -> None:
    before = f"{change.name}@{change.before}" if change.before else "nothing"
    words = "already is" if change.before == change.after else f"was {before}, is"
    answer(as_json, {"change": change}, f"{change.name}@{change.alias} {words} {change.name}@{change.after}")


def _facts(version: Any) -> dict[str, Any]:
    return {
        "model": str(version),
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "run": version.run,
        "metrics": version.metrics,
        "registered": version.created_at,
    }

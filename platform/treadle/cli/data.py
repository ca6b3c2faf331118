"""Verbs about data sets: build, explain, show, audit, verify, ls."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from treadle.cli.options import (
    answer,
    asked,
    compose,
    job_argument,
    json_option,
    overrides_argument,
    page,
    say,
    store_option,
    stored,
)
from treadle.errors import ConfigError, DataError, IntegrityError

__all__ = ["build", "data"]

target_argument = click.argument("target", metavar="JOB|NAME[@DIGEST]")
positive = click.IntRange(min=1)


@click.group()
def data() -> None:
    """Build, explain, show, audit and verify data sets."""


@data.command(short_help="Make a job's data set in the store.")
@job_argument
@overrides_argument
@click.option("--again", is_flag=True, help="Make it anew even where this recipe was built before.")
@click.option(
    "--on",
    "place",
    type=click.Choice(["local", "ray"]),
    help="Sort and write here, or on a Ray cluster. [default: ray where RAY_ADDRESS is set]",
)
@json_option
def build(job: str, overrides: tuple[str, ...], again: bool, place: str | None, as_json: bool) -> None:
    """Make a job's data set in the store, from its columns or its preparation script."""
    from treadle.data import load_manifest
    from treadle.launch.submit import prepare_data
    from treadle.store import open_blobs
    from treadle.track.stages import Stages
    from treadle.units import format_duration_s

    spec, folder = compose(job, overrides)
    blobs = open_blobs(spec.store.uri)
    started_s, progress = time.monotonic(), Stages(sys.stderr)
    try:
        on_ray = None if place is None else place == "ray"
        digest, is_new = prepare_data(spec, folder, blobs, again=again, progress=progress, on_ray=on_ray)
    finally:
        progress.close()
    manifest = load_manifest(blobs, spec.data.name, digest)
    if is_new:
        say(f"built in {format_duration_s(time.monotonic() - started_s)}, licence: {manifest.header.licence}")
    body = _built(manifest, digest) | {"was_there": not is_new, "store": blobs.uri}
    if aside := body["quarantine"]:
        body["quarantine"] = str(blobs.local_path(aside) or f"{blobs.uri}/{aside}")
    answer(as_json, body, lambda: _built_text(body))


def _built(manifest: Any, digest: str) -> dict[str, Any]:
    header = manifest.header
    return {
        "data": header.name,
        "digest": digest,
        "rows": {name: len(manifest.rows_of(name)) for name in ("train", "valid", "test")},
        "dropped": header.dropped or {},
        "set_aside": header.set_aside,
        "quarantine": header.quarantine,
        "findings": header.findings,
    }


def _built_text(body: dict[str, Any]) -> str:
    words = [f"{count:,} {name}" for name, count in body["rows"].items()]
    lines = [f"{body['data']} {body['digest'][:12]}: {', '.join(words)} rows{' (was there)' * body['was_there']}"]
    lines += [f"  {count:,} rows in no split: {reason}" for reason, count in body["dropped"].items()]
    if body["set_aside"]:
        lines.append(f"  {body['set_aside']:,} rows set aside: {body['quarantine']}")
    lines += [f"  accepted: {finding.leak.value}, {finding.detail}" for finding in body["findings"]]
    return "\n".join(lines)


@data.command(short_help="What an epoch's batches would be.")
@click.argument("job", required=False)
@overrides_argument
@click.option("--ranks", type=positive, help="As on so many workers. [default: cluster.workers; 1 for --lengths]")
@click.option("--lengths", type=click.Path(path_type=Path), metavar="FILE.npy", help="Lengths of rows, no job.")
@click.option("--budget", help="With --lengths: slots of a microbatch, such as 8192 or 8k. [default: 4096]")
@click.option("--noise", type=click.FloatRange(0, 1, max_open=True), help="With --lengths. [default: 0.05]")
@click.option("--rounds", type=positive, help="With --lengths: rounds of an update. [default: 1]")
@click.option("--lanes", type=positive, help="With --lengths. [default: one a rank]")
@click.option("--seed", type=click.IntRange(min=0), help="With --lengths. [default: 0]")
@click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.svg", help="Also draw it, as SVG."
)
@json_option
def explain(
    job: str | None,
    overrides: tuple[str, ...],
    ranks: int | None,
    lengths: Path | None,
    picture: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Show what the batches of an epoch would be: padding, balance, shapes. Nothing is trained.

    Of a JOB whose data set is built, or of a bare list of lengths.
    """
    from treadle import wire
    from treadle.launch.explain_view import explain_picture, explain_text

    flags = {name: value for name, value in flags.items() if value is not None}
    if (job is None) == (lengths is None):
        raise click.UsageError("give either a JOB or --lengths FILE.npy")
    if lengths is not None:
        found, head, counts = _explain_lengths(lengths, ranks or 1, flags), lengths.name, "slots"
    else:
        assert job is not None
        found, head, counts = _explain_job(job, overrides, ranks, flags)
    if picture is not None:
        _write(picture, explain_picture(found, head=head, counts=counts))
    width, ascii_only = page()
    body = {"data": head, **wire.encode(found)} | ({"picture": str(picture.resolve())} if picture else {})
    answer(as_json, body, lambda: explain_text(found, head=head, counts=counts, width=width, ascii_only=ascii_only))


def _explain_lengths(path: Path, ranks: int, flags: dict[str, Any]) -> Any:
    from treadle.launch.explain import explain_lengths, read_lengths
    from treadle.spec import BatchSpec

    budget = flags.get("budget", "4096")
    if budget == "auto":
        raise ConfigError("--budget: got 'auto', expected a count such as 8192 or 8k: no job, no device to ask")
    names = {"noise": "noise", "rounds": "rounds_per_update", "lanes": "lanes"}
    given = {field: flags[flag] for flag, field in names.items() if flag in flags}
    try:
        batch = BatchSpec(max_slots=budget, **given)
        return explain_lengths(read_lengths(path), batch, ranks=ranks, seed=flags.get("seed", 0))
    except ConfigError as error:  # speaks of a job's keys
        message = error.message.replace("batch.max_slots", "--budget").replace(", or auto", "")
        first = error.hint.partition(",")[0].replace("batch.max_slots=", "--budget ")
        raise ConfigError(message, hint=first) from None


def _explain_job(
    job: str, overrides: tuple[str, ...], ranks: int | None, flags: dict[str, Any]
) -> tuple[Any, str, str]:
    from treadle.launch.explain import explain_job
    from treadle.launch.surroundings import local_capacity

    keys = {"budget": "max_slots", "rounds": "rounds_per_update"}
    if flags:
        words = " ".join(
            f"{'train' if flag == 'seed' else 'batch'}.{keys.get(flag, flag)}={value}" for flag, value in flags.items()
        )
        raise click.UsageError(f"a job's batches are set by its keys: treadle data explain {job} {words}")
    spec, _, manifest, digest = _of_job(job, overrides)
    plan, found = explain_job(
        spec, manifest.card(digest), local_capacity(count_gpus=spec.cluster.gpus_per_worker > 0), ranks=ranks
    )
    auto = " (auto, estimated)" if spec.batch.is_auto else ""
    head = f"{spec.data.name}@{digest[:12]}, {plan.max_slots:,} {spec.batch.budget.value}{auto}"
    return found, head, spec.batch.budget.value


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--picture: got {str(path)!r}, expected a place to write to ({error.strerror})") from None


def _of_job(job: str, overrides: tuple[str, ...], store_uri: str | None = None) -> tuple[Any, Any, Any, str]:
    """Spec, store, manifest and digest of a job's data set."""
    from treadle.data import load_manifest
    from treadle.launch.datasets import find_data
    from treadle.store import open_blobs

    spec, folder = compose(job, overrides, store_uri=store_uri)
    blobs = open_blobs(spec.store.uri)
    digest = find_data(spec, folder, blobs, asked=asked(job, overrides))
    return spec, blobs, load_manifest(blobs, spec.data.name, digest), digest


def _named(target: str, overrides: tuple[str, ...], store_uri: str | None) -> tuple[Any, Any, Any, str]:
    """Spec (None without a job), store, manifest and digest of what a person named."""
    from treadle.data import load_manifest
    from treadle.data.listing import find_manifest
    from treadle.spec.places import is_job

    if "@" not in target and is_job(target):
        return _of_job(target, overrides, store_uri)
    if overrides:
        raise click.UsageError(f"overrides are of a job, and {target!r} is none")
    blobs = stored(store_uri)
    name, _, start = target.partition("@")
    digest = find_manifest(blobs, name, start)
    return None, blobs, load_manifest(blobs, name, digest), digest


@data.command(short_help="What a data set holds.")
@target_argument
@overrides_argument
@store_option
@json_option
def show(target: str, overrides: tuple[str, ...], store_uri: str | None, as_json: bool) -> None:
    """Show what a data set holds: of a JOB, or by NAME, the one made last or that of a DIGEST."""
    from treadle.data.describe import describe
    from treadle.launch.data_view import dataset_text

    _, blobs, manifest, digest = _named(target, overrides, store_uri)
    facts, (width, ascii_only) = describe(manifest, digest), page()
    answer(
        as_json, {"dataset": facts, "store": blobs.uri}, lambda: dataset_text(facts, width=width, ascii_only=ascii_only)
    )


@data.command(short_help="Look for leaks once more.")
@job_argument
@overrides_argument
@json_option
def audit(job: str, overrides: tuple[str, ...], as_json: bool) -> int:
    """Look for leaks in a job's data set once more; exit 4 where one is found that the job does not accept."""
    from treadle.launch.data_view import findings_text
    from treadle.launch.datasets import audit_again
    from treadle.spec.places import find_job

    spec, blobs, manifest, digest = _of_job(job, overrides)
    findings = audit_again(spec, find_job(job), blobs, manifest)
    refused = [finding.leak.value for finding in findings if not finding.accepted]
    answer(as_json, {"data": spec.data.name, "digest": digest, "findings": findings}, lambda: findings_text(findings))
    if not refused:
        return 0
    say(f"error: data.{spec.data.name}: got {len(refused)} leaks that the job does not accept, expected none")
    say(f"hint: mend the data, or data.allow_leaks=[{','.join(refused)}]")
    return DataError.exit_code


@data.command(short_help="Check every stored byte.")
@target_argument
@overrides_argument
@store_option
@json_option
def verify(target: str, overrides: tuple[str, ...], store_uri: str | None, as_json: bool) -> None:
    """Read every block of a data set and check it against what was written; exit 6 where one is damaged."""
    from treadle.data.manifest import REBUILD
    from treadle.data.verify import verify_blocks
    from treadle.launch.data_view import damage_text
    from treadle.track.stages import Stages

    spec, blobs, manifest, digest = _named(target, overrides, store_uri)
    progress = Stages(sys.stderr, unit="blocks")
    damage = verify_blocks(blobs, manifest, progress=progress)
    progress.close()
    name, blocks = f"{manifest.header.name}@{digest[:12]}", manifest.header.blocks
    if damage:
        rows = sum(d.rows[1] - d.rows[0] + 1 for d in damage)
        in_store = [f"store.uri={spec.store.uri}"] if spec is not None and store_uri else []
        raise IntegrityError(
            f"{name}: {len(damage)} of {len(blocks):,} blocks are damaged, {rows:,} of {manifest.num_rows:,} rows\n"
            f"{damage_text(damage)}",
            hint=REBUILD if spec is None else REBUILD.replace("JOB", asked(target, [*overrides, *in_store])),
            damage=[vars(d) for d in damage],
        )
    size = sum(block.size for block in blocks)
    body = {"data": manifest.header.name, "digest": digest, "blocks": len(blocks), "bytes": size, "damage": []}
    answer(as_json, body, f"{name}: all {len(blocks):,} blocks are as written, {size:,} bytes")


@data.command("ls", short_help="The data sets of the store.")
@click.argument("name", required=False)
@store_option
@json_option
def list_data(name: str | None, store_uri: str | None, as_json: bool) -> None:
    """List the data sets of the store."""
    from treadle.data.listing import list_datasets
    from treadle.launch.data_view import listed_text

    listed = list_datasets(stored(store_uri), name)
    empty = "no data sets yet; build one: treadle data build JOB"
    answer(as_json, {"datasets": listed}, lambda: listed_text(listed) if listed else empty)

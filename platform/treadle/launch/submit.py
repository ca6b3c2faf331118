"""From a composed job to a submitted run: find the data, plan, freeze, start."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from treadle.data import (
    Draft,
    Manifest,
    Means,
    Origin,
    Watch,
    build_rows,
    build_view,
    digests_of,
    find_note,
    find_rows,
    load_manifest,
    note_dataset,
    open_source,
    pinned_files,
    recipe_digest,
    rows_recipe,
    watch_source,
)
from treadle.errors import ConfigError, DataError, TreadleError
from treadle.launch.datasets import find_data, script_of
from treadle.launch.records import freeze
from treadle.launch.same_rows import find_same_rows
from treadle.launch.spread import build_means
from treadle.launch.surroundings import code_facts
from treadle.plan import Capacity, Plan, make_plan
from treadle.spec import JobSpec, Layout
from treadle.store import Backend, Blobs, RunRecord, Runs

__all__ = ["create_run", "plan_job", "prepare_data"]


def prepare_data(
    spec: JobSpec,
    folder: Path,
    blobs: Blobs,
    *,
    again: bool,
    progress: Callable[[str, int, int], None],
    on_ray: bool | None = None,
) -> tuple[str, bool]:
    """The digest of the job's data set, and whether it had to be made.

    Where the same rows were prepared before, they are only split, fitted and audited anew; no shard is written. Rows
    are the same where their files are: by `data.sha256`, else by what the files of the source look like or hold now.

    Args:
        folder: of the job; holds prepare.py with `prepare(spec: DataSpec) -> Draft`, unless `columns` says what the
            columns of the source are.
        again: make it even where the same recipe was prepared before.
        progress: called with (stage, rows done, rows in all; 0 where that is not known yet).
        on_ray: sort and write on the Ray cluster of this process, or that RAY_ADDRESS names; None: if that is set.

    Raises:
        ConfigError: neither a usable prepare.py nor columns. DataError, IntegrityError: bad or missing source.
    """
    script = script_of(spec, folder)
    name = spec.data.name
    watch = watch_source(spec.data, declared=script is None)
    rows_digest = None if again else find_same_rows(spec, script, blobs, watch)
    rows = None
    if rows_digest is not None:
        if note := find_note(blobs, name, recipe_digest(spec.data, spec.split, rows_digest)):
            return note.digest, False
        rows = find_rows(blobs, name, rows_digest)
    if rows_digest is None or rows is None:
        with build_means(blobs.uri, progress, on_ray=on_ray) as means:
            rows_digest, rows = _make_rows(spec, script, blobs, means, watch)
        for recipe in {rows_recipe(spec.data, spec.columns, script), rows.header.recipe}:
            note_dataset(blobs, name, recipe, rows_digest, files=watch.digest if watch else "")
    recipe = recipe_digest(spec.data, spec.split, rows_digest)
    digest, _ = build_view(rows, spec.data, spec.split, blobs, recipe=recipe)
    note_dataset(blobs, name, recipe, digest)
    return digest, True


def _make_rows(
    spec: JobSpec, script: Path | None, blobs: Blobs, means: Means, watch: Watch | None
) -> tuple[str, Manifest]:
    if script is not None:
        return _make_from_script(spec, script, blobs, means)
    with tempfile.TemporaryDirectory(prefix="treadle-source-") as scratch:

        def grouped(done: int, total: int) -> None:
            means.progress("group bytes", done, total)

        source = open_source(spec.data, spec.columns, scratch=Path(scratch), progress=grouped)
        place = source.lines.place
        pins = pinned_files([file.name for file in place.files], spec.data.sha256)  # found right when it was opened
        origin = Origin(
            licence=spec.data.licence,
            source=digests_of(place, pins),
            is_here=spec.columns.layout is Layout.events or watch is None,
            files=watch.digest if watch else "",
            check=lambda: watch.check(place) if watch else None,
        )
        recipe = rows_recipe(spec.data, spec.columns, None, pinned=len(pins) == len(place.files))
        return build_rows(source, spec.data, blobs, recipe=recipe, origin=origin, means=means)


def _make_from_script(spec: JobSpec, script: Path, blobs: Blobs, means: Means) -> tuple[str, Manifest]:
    module = _load(script)
    prepare = getattr(module, "prepare", None)
    if not callable(prepare):
        raise ConfigError(f"{script}: got no function `prepare`, expected prepare(spec: DataSpec) -> Draft")
    try:
        draft: Any = prepare(spec.data)
        if not isinstance(draft, Draft):
            raise ConfigError(f"{script}: prepare() gave {type(draft).__name__}, expected treadle.data.Draft")
        pinned = bool(draft.source) and pinned_files(draft.source, spec.data.sha256) == dict(draft.source)
        recipe = rows_recipe(spec.data, spec.columns, script, pinned=pinned)
        return build_rows(draft, spec.data, blobs, recipe=recipe, means=means)
    except TreadleError:
        raise
    except Exception as error:  # the script is the user's: whatever it raises is about the data
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        raise DataError(f"{script}: {type(error).__name__}: {error} (at {where})") from error


def plan_job(spec: JobSpec, folder: Path, blobs: Blobs, capacity: Capacity, *, asked: str) -> Plan:
    """The plan of a job whose data are prepared.

    Args:
        asked: the job and its overrides as they were typed, for the hint.

    Raises:
        DataError: they are not; the hint is the command. Otherwise what `make_plan` raises.
    """
    digest = find_data(spec, folder, blobs, asked=asked)
    card = load_manifest(blobs, spec.data.name, digest).card(digest)
    return make_plan(spec, card, capacity)


def create_run(spec: JobSpec, plan: Plan, blobs: Blobs, backend: Backend) -> RunRecord:
    """A queued run with its frozen job; whoever starts it needs only its id and the store."""
    spec_bytes, plan_bytes = freeze(spec, plan)
    return Runs(blobs).create(spec_bytes, plan_bytes, job=spec.name, backend=backend, info={"code": code_facts()})


def _load(script: Path) -> ModuleType:
    name = f"treadle_job_{script.parent.name.replace('-', '_')}"
    found = importlib.util.spec_from_file_location(name, script)
    if found is None or found.loader is None:
        raise ConfigError(f"{script}: cannot be loaded")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses of the script look themselves up there
    try:
        found.loader.exec_module(module)
    except TreadleError:
        raise
    except Exception as error:
        raise ConfigError(f"{script}: cannot be loaded: {type(error).__name__}: {error}") from error
    return module

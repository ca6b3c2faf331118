"""From a composed job to a submitted run: find the data, plan, freeze, start."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from treadle.data import Draft, build_dataset, find_dataset, load_manifest, note_dataset, recipe_digest
from treadle.errors import ConfigError, DataError, TreadleError
from treadle.launch.records import freeze
from treadle.launch.surroundings import code_facts
from treadle.plan import Capacity, Plan, make_plan
from treadle.spec import JobSpec
from treadle.store import Backend, Blobs, RunRecord, Runs

__all__ = ["create_run", "plan_job", "prepare_data"]

SCRIPT = "prepare.py"


def prepare_data(
    spec: JobSpec, folder: Path, blobs: Blobs, *, again: bool, progress: Callable[[str, int, int], None]
) -> tuple[str, bool]:
    """The digest of the job's data set, and whether it had to be made.

    Args:
        folder: of the job; holds prepare.py with `prepare(spec: DataSpec) -> Draft`.
        again: make it even where the same recipe was prepared before.

    Raises:
        ConfigError: no usable prepare.py. DataError, IntegrityError: bad or missing source.
    """
    script = folder / SCRIPT
    if not script.is_file():
        raise ConfigError(f"{script}: not found", hint="a job prepares its data with a `prepare(spec) -> Draft` there")
    recipe = recipe_digest(spec.data, script)
    if not again:
        try:
            return find_dataset(blobs, spec.data.name, recipe, job=spec.name), False
        except DataError:
            pass
    module = _load(script)
    prepare = getattr(module, "prepare", None)
    if not callable(prepare):
        raise ConfigError(f"{script}: got no function `prepare`, expected prepare(spec: DataSpec) -> Draft")
    try:
        draft: Any = prepare(spec.data)
        if not isinstance(draft, Draft):
            raise ConfigError(f"{script}: prepare() gave {type(draft).__name__}, expected treadle.data.Draft")
        digest, _ = build_dataset(draft, spec.data, blobs, recipe=recipe, progress=progress)
    except TreadleError:
        raise
    except Exception as error:  # the script is the user's: whatever it raises is about the data
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        raise DataError(f"{script}: {type(error).__name__}: {error} (at {where})") from error
    note_dataset(blobs, spec.data.name, recipe, digest)
    return digest, True


def plan_job(spec: JobSpec, folder: Path, blobs: Blobs, capacity: Capacity, *, asked: str) -> Plan:
    """The plan of a job whose data are prepared.

    Args:
        asked: the job and its overrides as they were typed, for the hint.

    Raises:
        DataError: they are not; the hint is the command. Otherwise what `make_plan` raises.
    """
    digest = find_dataset(blobs, spec.data.name, recipe_digest(spec.data, folder / SCRIPT), job=asked)
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

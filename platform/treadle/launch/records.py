"""The frozen job of a run, as it stands in the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from treadle import wire
from treadle.plan import Plan
from treadle.spec import JobSpec
from treadle.store import Runs

__all__ = ["Assignment", "freeze", "read_job"]

_SPEC = ("job", 1)
_PLAN = ("plan", 2)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a rank must know to find the rest: JSON-ready, no secrets.

    Args:
        store: address of the store. run, attempt: which one.
        code: git commit and dirty flag of the submitter's source.
    """

    store: str
    run: str
    attempt: int
    code: dict[str, Any]


def freeze(spec: JobSpec, plan: Plan) -> tuple[bytes, bytes]:
    """spec.json and plan.json."""
    return wire.record(*_SPEC, spec), wire.record(*_PLAN, plan)


def read_job(runs: Runs, run: str) -> tuple[JobSpec, Plan]:
    """The spec and plan of a run, as submitted.

    Raises:
        NotFoundError: no such run. IntegrityError: they are not what was submitted.
    """
    record = runs.get(run)
    spec = wire.unrecord(JobSpec, runs.spec(record), kind=_SPEC[0], schema=_SPEC[1], where=f"{run}/spec.json")
    plan = wire.unrecord(Plan, runs.plan(record), kind=_PLAN[0], schema=_PLAN[1], where=f"{run}/plan.json")
    return spec, plan

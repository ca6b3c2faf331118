"""The frozen job of a run, as it stands in the store."""

from __future__ import annotations

from treadle import wire
from treadle.plan import Plan
from treadle.spec import JobSpec
from treadle.store import Runs

__all__ = ["freeze", "read_job"]

_SPEC = ("job", 1)
_PLAN = ("plan", 2)


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

"""The sweep's own acts on the store: begin a trial, begin one from another's state, end one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from treadle import wire
from treadle.data import load_manifest
from treadle.errors import NotFoundError
from treadle.launch.assemble import budget_key
from treadle.launch.records import freeze, read_job
from treadle.launch.sweeps.records import Candidate, FrozenSweep, plain
from treadle.launch.sweeps.results import Trial, read_trials
from treadle.plan import Plan, make_plan
from treadle.spec import JobSpec
from treadle.spec.sweeps import IntervalAxis, changed
from treadle.store import Backend, Blobs, Checkpoints, Runs
from treadle.store.runs import new_run_id
from treadle.store.sweeps import Member, MemberEnd, MemberState, SweepRecord, Sweeps

__all__ = ["Desk"]


class Desk:
    """One sweep on the store, for the one process that carries it out.

    Args:
        backend: of runs that begin.
    """

    def __init__(self, blobs: Blobs, record: SweepRecord, frozen: FrozenSweep, *, backend: Backend) -> None:
        self.blobs = blobs
        self.record = record
        self.frozen = frozen
        self.runs = Runs(blobs)
        self._sweeps = Sweeps(blobs)
        self._backend = backend

    def trials(self) -> list[Trial]:
        """Every trial as it stands, by number."""
        return read_trials(self.blobs, self.record.sweep, self.frozen.asked)

    def members(self) -> list[Member]:
        return [member for member, _ in self._sweeps.members(self.record.sweep)]

    def begin(self, candidate: Candidate) -> Member:
        """A new trial with its run, queued."""
        number = self._next_number()
        run = self._create(candidate.spec, candidate.plan, number)
        member = Member(number=number, run=run, values=candidate.values, slot=number)
        self._sweeps.add_member(self.record.sweep, member)
        return member

    def begin_from(self, donor: Trial, slot: int, generation: int, values: Mapping[str, str]) -> Member:
        """A trial that goes on from the newest checkpoint of `donor` with other values.

        Weights, optimizer state and position are the donor's, bit by bit; with the donor's own values it would train
        what the donor trains. A donor without a checkpoint gives its beginning.
        """
        spec, plan = read_job(self.runs, donor.run)
        new = changed(spec, {key: plain(text) for key, text in values.items()})
        number = self._next_number()
        run = self._create(new, replace(plan, spec_digest=new.digest), number)
        update = self._copy_state(donor.run, plan, run, new)
        before = sum(at <= update for at, _ in donor.evaluations) + donor.evaluations_before if update else 0
        member = Member(
            number=number,
            run=run,
            values=dict(values),
            slot=slot,
            generation=generation,
            parent=donor.run if update else None,
            parent_update=update,
            evaluations_before=before,
        )
        self._sweeps.add_member(self.record.sweep, member)
        return member

    def proposed(self, values: Mapping[str, str]) -> Candidate:
        """A point that a search proposes, planned; its choices are composed already.

        Raises:
            ConfigError, InfeasibleError: what the plan of that point raises.
        """
        intervals = [axis.key for axis in self.frozen.asked.axes if isinstance(axis, IntervalAxis)]
        choices = {key: text for key, text in values.items() if key not in intervals}
        base = next(c for c in self.frozen.candidates if choices.items() <= c.values.items())
        spec = changed(base.spec, {key: plain(values[key]) for key in intervals})
        card = load_manifest(self.blobs, spec.data.name, base.plan.data_digest).card(base.plan.data_digest)
        return Candidate(values=dict(values), spec=spec, plan=make_plan(spec, card, self.frozen.capacity))

    def end(self, number: int, state: MemberState, reason: str = "") -> None:
        """Record that a trial is over."""
        self._sweeps.end_member(self.record.sweep, number, MemberEnd(state=state, reason=reason[:500]))

    def _next_number(self) -> int:
        return max((member.number for member in self.members()), default=0) + 1

    def _create(self, spec: JobSpec, plan: Plan, number: int) -> str:
        spec_bytes, plan_bytes = freeze(spec, plan)
        info: dict[str, Any] = self.record.info | {"sweep": self.record.sweep, "trial": number}
        run = new_run_id(spec.name)
        self.runs.create(spec_bytes, plan_bytes, job=spec.name, backend=self._backend, run=run, info=info)
        return run

    def _copy_state(self, donor: str, plan: Plan, run: str, spec: JobSpec) -> int:
        """Copy the donor's newest checkpoint, and what else decides its batches; the update of that state, or 0."""

        def checkpoints(name: str, digest: str) -> Checkpoints:
            return Checkpoints(
                self.blobs, name, attempt=0, keep_last=1, spec_digest=digest, data_digest=plan.data_digest
            )

        found = checkpoints(donor, plan.spec_digest).restore()
        if found is None:
            return 0
        with contextlib.suppress(NotFoundError):  # its budget was given
            self.blobs.put(budget_key(run), self.blobs.get(budget_key(donor)))
        manifest, files = found
        checkpoints(run, wire.digest(wire.encode(spec))).commit(manifest.update, files, manifest.state)
        return manifest.update

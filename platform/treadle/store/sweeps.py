"""What is known about every sweep, on the store alone, beside its runs.

Keys, below `sweeps/<sweep>/`:

    spec.json                     what is swept, as submitted; created once
    sweep.json                    created last: from here on the sweep exists
    members/<n>.json              trial n and its run; created once, after the run
    members/<n>.end.json          how it ended for good; created once. Without one it is to be gone on with
    attempts/<n>.json, .beat.json, .end.json   who carries the sweep out, as those of a run
    control/<seq>.json            requests to the attempt that runs
    events.jsonl, logs.jsonl      what happened, for people
    report.html                   written when an attempt ends

A trial is a run like any other: what it trained, logged and registered lies below `runs/<run>/`.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from treadle import wire
from treadle.errors import ConflictError, IntegrityError, NotFoundError, did_you_mean
from treadle.store.blobs import Blobs
from treadle.store.claims import claim_next, create_once, numbers
from treadle.store.records import Attempt, AttemptEnd, Backend, Beat, Request, RequestKind, RunState, RunStatus
from treadle.store.runs import new_run_id
from treadle.store.sealed import nonce, seal, stamp, unseal

__all__ = ["Member", "MemberEnd", "MemberState", "SweepRecord", "Sweeps"]

_SWEEP_ID = re.compile(r"sweep-(.+)-[0-9]{8}-[0-9]{6}-[0-9a-f]{4}")


class MemberState(enum.Enum):
    """How a trial ended. pruned: too far behind to go on. replaced: its place goes on from another's state."""

    finished = "finished"
    pruned = "pruned"
    replaced = "replaced"
    failed = "failed"


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """What was submitted.

    Args:
        sweep: its id. job: name of the job. number: place among the sweeps of the store.
        created_at: UTC, for people. spec_digest: sha256 of spec.json. backend: where its trials run.
        info: further facts of the submission, JSON.
    """

    sweep: str
    job: str
    number: int
    created_at: str
    spec_digest: str
    backend: Backend
    store: str
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Member:
    """One trial.

    Args:
        number: from 1. run: its run. values: of the axes, as overrides write them.
        slot: its place in a population. generation: after how many rounds it took it.
        parent: the run whose state it began with. parent_update: of that state.
        evaluations_before: that its parent had had.
    """

    number: int
    run: str
    values: dict[str, str]
    slot: int = 0
    generation: int = 0
    parent: str | None = None
    parent_update: int = 0
    evaluations_before: int = 0


@dataclass(frozen=True, kw_only=True)
class MemberEnd:
    """How a trial ended for good; `reason` is for people."""

    state: MemberState
    reason: str = ""
    ended_at: str = field(default_factory=stamp)


class Sweeps:
    """The sweeps of one store."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    def create(self, spec: bytes, *, job: str, backend: Backend, info: Mapping[str, Any] | None = None) -> SweepRecord:
        """A new sweep; its spec never changes again."""
        sweep, claim = f"sweep-{new_run_id(job)}", nonce()
        number = claim_next(
            self._blobs, "order/sweeps", lambda _: seal("order", {"sweep": sweep, "nonce": claim}), width=8
        )
        record = SweepRecord(
            sweep=sweep,
            job=job,
            number=number,
            created_at=stamp(),
            spec_digest=wire.digest(spec),
            backend=backend,
            store=self._blobs.uri,
            info=dict(info or {}),
        )
        for name, data in {"spec.json": spec, "sweep.json": seal("sweep", record)}.items():
            if not create_once(self._blobs, f"sweeps/{sweep}/{name}", data):
                raise ConflictError(f"sweep: got {sweep!r}, which exists, expected a new id")
        return record

    def get(self, sweep: str) -> SweepRecord:
        """The sweep of that id; or the newest of the job of that name; or the one whose id starts so.

        Raises:
            NotFoundError: none, or several ids that start so.
        """
        found = self._blobs.children("sweeps")
        if sweep in found:
            return self._record(sweep)
        if of_job := [name for name in found if (match := _SWEEP_ID.fullmatch(name)) and match[1] == sweep]:
            return max((self._record(name) for name in of_job), key=lambda record: record.number)
        starting = [name for name in found if sweep and name.startswith(sweep)]
        if len(starting) == 1:
            return self._record(starting[0])
        jobs = {match[1] for name in found if (match := _SWEEP_ID.fullmatch(name))}
        near = f", of which there are {len(starting)}" if starting else did_you_mean(sweep, {*found, *jobs})
        raise NotFoundError(
            f"sweep: got {sweep!r}, expected a sweep id, the start of one, or a job name{near}",
            hint="treadle sweep --ls",
        )

    def list(self) -> list[SweepRecord]:
        """Every sweep, the newest first."""
        found = []
        for name in self._blobs.children("sweeps"):
            try:
                found.append(self._record(name))
            except NotFoundError:  # its submission was cut off
                continue
        return sorted(found, key=lambda record: record.number, reverse=True)

    def spec(self, record: SweepRecord) -> bytes:
        """spec.json, as submitted.

        Raises:
            IntegrityError: it is not what was submitted.
        """
        key = f"sweeps/{record.sweep}/spec.json"
        data = self._blobs.get(key)
        if (seen := wire.digest(data)) != record.spec_digest:
            raise IntegrityError(f"{key}: got sha256 {seen}, expected {record.spec_digest}")
        return data

    # Trials

    def add_member(self, sweep: str, member: Member) -> None:
        """Record a trial, whose run exists.

        Raises:
            ConflictError: there is another of that number.
        """
        key = self._member_key(sweep, member.number)
        if not create_once(self._blobs, key, seal("member", member)) and self._member(key) != member:
            raise ConflictError(f"{key}: exists, expected one process to carry a sweep out")

    def members(self, sweep: str) -> list[tuple[Member, MemberEnd | None]]:
        """Every trial with its end if it has one, by number."""
        known = numbers(self._blobs, f"sweeps/{sweep}/members")
        return [(self._member(self._member_key(sweep, n)), self._member_end(sweep, n)) for n in known]

    def end_member(self, sweep: str, number: int, end: MemberEnd) -> None:
        """Record how a trial ended; the first record holds."""
        create_once(self._blobs, self._member_key(sweep, number, ".end"), seal("member-end", end))

    # Attempts to carry it out

    def claim(self, sweep: str, backend: Backend, info: Mapping[str, Any], *, after: int) -> int:
        """The number after `after`, ours alone.

        Raises:
            ConflictError: it is taken.
        """
        attempt = Attempt(attempt=after + 1, backend=backend, started_at=stamp(), info=dict(info), nonce=nonce())
        if not create_once(self._blobs, self._attempt_key(sweep, after + 1), seal("attempt", attempt)):
            raise ConflictError(f"sweep {sweep}: attempt {after + 1} was started by someone else")
        return after + 1

    def beat(self, sweep: str, attempt: int, payload: Mapping[str, Any]) -> None:
        """Say that an attempt lives."""
        self._blobs.put(
            self._attempt_key(sweep, attempt, ".beat"), seal("beat", Beat(token=nonce(), payload=dict(payload)))
        )

    def end_attempt(self, sweep: str, attempt: int, end: AttemptEnd) -> None:
        """Record how an attempt ended; the first record holds."""
        create_once(self._blobs, self._attempt_key(sweep, attempt, ".end"), seal("attempt-end", end))

    def status(self, sweep: str) -> RunStatus:
        """Where a sweep stands, in the words for runs."""
        number = max(numbers(self._blobs, f"sweeps/{sweep}/attempts"), default=0)
        if number == 0:
            return RunStatus(state=RunState.queued)
        end = self._read(AttemptEnd, self._attempt_key(sweep, number, ".end"), "attempt-end")
        beat = self._read(Beat, self._attempt_key(sweep, number, ".beat"), "beat")
        state = RunState.running if end is None else RunState(end.status.value)
        return RunStatus(state=state, attempt=number, end=end, beat=beat)

    def request_stop(self, sweep: str, attempt: int, reason: str) -> None:
        """Ask an attempt to stop its trials with checkpoints and leave."""

        def body(seq: int) -> bytes:
            made_at, wanted = stamp(), nonce()
            wish = Request(
                seq=seq, kind=RequestKind.stop, reason=reason, attempt=attempt, created_at=made_at, nonce=wanted
            )
            return seal("request", wish)

        claim_next(self._blobs, f"sweeps/{sweep}/control", body, width=6)

    def stop_reason(self, sweep: str, attempt: int) -> str | None:
        """Why an attempt is to stop, or None."""
        folder = f"sweeps/{sweep}/control"
        for number in numbers(self._blobs, folder):
            key = f"{folder}/{number:06d}.json"
            wish = unseal(Request, self._blobs.get(key), kind="request", where=key)
            if wish.attempt == attempt:
                return wish.reason
        return None

    # Inside

    def _record(self, sweep: str) -> SweepRecord:
        key = f"sweeps/{sweep}/sweep.json"
        try:
            return unseal(SweepRecord, self._blobs.get(key), kind="sweep", where=key)
        except NotFoundError:
            raise NotFoundError(f"sweep: got {sweep!r}, whose submission was cut off", hint="start it again") from None

    def _member(self, key: str) -> Member:
        return unseal(Member, self._blobs.get(key), kind="member", where=key)

    def _member_end(self, sweep: str, number: int) -> MemberEnd | None:
        return self._read(MemberEnd, self._member_key(sweep, number, ".end"), "member-end")

    def _read(self, cls: type[Any], key: str, kind: str) -> Any:
        try:
            return unseal(cls, self._blobs.get(key), kind=kind, where=key)
        except NotFoundError:
            return None

    def _member_key(self, sweep: str, number: int, part: str = "") -> str:
        return f"sweeps/{wire.check_name('sweep', sweep)}/members/{number:04d}{part}.json"

    def _attempt_key(self, sweep: str, attempt: int, part: str = "") -> str:
        return f"sweeps/{wire.check_name('sweep', sweep)}/attempts/{attempt:04d}{part}.json"

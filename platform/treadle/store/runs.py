"""What is known about every run, on the store alone: no cluster has to be alive to read it.

Keys, below `runs/<run>/`:

    spec.json, plan.json          as submitted; created once
    run.json                      created last: from here on the run exists
    attempts/<n>.json             created once by whoever starts attempt n
    attempts/<n>.beat.json        overwritten while attempt n lives
    attempts/<n>.end.json         created once: how attempt n ended
    control/<seq>.json            requests to the running attempt, created once each

`order/runs/<number>.json` numbers the runs of a store: clocks of machines differ, numbers do not.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import secrets
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from treadle import wire
from treadle.errors import ConfigError, ConflictError, IntegrityError, NotFoundError, did_you_mean
from treadle.store.blobs import Blobs
from treadle.store.claims import claim_next, create_once, numbers
from treadle.store.records import (
    Attempt,
    AttemptEnd,
    AttemptStatus,
    Backend,
    Beat,
    Request,
    RequestKind,
    RunRecord,
    RunState,
    RunStatus,
    RunSummary,
)
from treadle.store.sealed import nonce, seal, stamp, unseal

__all__ = [
    "Attempt",
    "AttemptEnd",
    "AttemptStatus",
    "Backend",
    "Beat",
    "Request",
    "RequestKind",
    "RunRecord",
    "RunState",
    "RunStatus",
    "RunSummary",
    "Runs",
    "new_run_id",
]

_RUN_ID = re.compile(r"(.+)-[0-9]{8}-[0-9]{6}-[0-9a-f]{4}")
_NUM_READERS = 8


def new_run_id(job: str) -> str:
    """`<job>-<yyyymmdd>-<hhmmss>-<4 hex>`, in UTC; a name, not an order."""
    wire.check_name("job", job)
    return f"{job}-{dt.datetime.now(dt.UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


class Runs:
    """The runs of one store."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    def create(
        self,
        spec: bytes,
        plan: bytes,
        *,
        job: str,
        backend: Backend,
        run: str | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> RunRecord:
        """A new run, queued; its spec and plan never change again.

        Raises:
            ConflictError: a run of that id exists.
        """
        run = wire.check_name("run", new_run_id(job) if run is None else run)
        claim = nonce()
        number = claim_next(self._blobs, "order/runs", lambda _: seal("order", {"run": run, "nonce": claim}), width=8)
        record = RunRecord(
            run=run,
            job=wire.check_name("job", job),
            number=number,
            created_at=stamp(),
            spec_digest=wire.digest(spec),
            plan_digest=wire.digest(plan),
            backend=backend,
            store=self._blobs.uri,
            info=dict(info or {}),
        )
        for name, data in {"spec.json": spec, "plan.json": plan, "run.json": seal("run", record)}.items():
            if not create_once(self._blobs, f"runs/{run}/{name}", data):
                raise ConflictError(f"run: got {run!r}, which exists, expected a new id")
        return record

    def get(self, run: str) -> RunRecord:
        """The run of that id; or the newest run of the job of that name; or the run whose id starts so.

        Raises:
            NotFoundError: none, or several ids that start so.
        """
        found = self._blobs.children("runs")
        if run in found:
            return self._record(run)
        of_job = [name for name in found if (match := _RUN_ID.fullmatch(name)) and match[1] == run]
        if of_job and (records := self._readable(of_job)):
            return max(records, key=lambda record: record.number)
        starting = [name for name in found if run and name.startswith(run)]
        if len(starting) == 1:
            return self._record(starting[0])
        if starting:
            raise NotFoundError(f"run: got {run!r}, which starts {', '.join(starting[:5])}, expected one of them")
        jobs = {match[1] for name in found if (match := _RUN_ID.fullmatch(name))}
        raise NotFoundError(
            f"run: got {run!r}, expected a run id, the start of one, or a job name{did_you_mean(run, {*found, *jobs})}",
            hint="treadle ls",
        )

    def spec(self, record: RunRecord) -> bytes:
        """spec.json of a run, as submitted.

        Raises:
            IntegrityError: it is not what was submitted.
        """
        return self._submitted(record.run, "spec.json", record.spec_digest)

    def plan(self, record: RunRecord) -> bytes:
        """plan.json of a run, as submitted.

        Raises:
            IntegrityError: it is not what was submitted.
        """
        return self._submitted(record.run, "plan.json", record.plan_digest)

    # Attempts

    def claim_attempt(
        self, run: str, backend: Backend, info: Mapping[str, Any] | None = None, *, after: int | None = None
    ) -> int:
        """The number of a new attempt, ours alone.

        Args:
            run: run id.
            backend: where it runs.
            info: facts about its processes, JSON.
            after: take the number after this one or none: of several who want to replace the same
                lost attempt, one succeeds.

        Raises:
            ConflictError: the attempt after `after` is taken.
        """
        started_at, claim = stamp(), nonce()

        def body(number: int) -> bytes:
            return seal(
                "attempt",
                Attempt(attempt=number, backend=backend, started_at=started_at, info=dict(info or {}), nonce=claim),
            )

        self._require(run)
        if after is None:
            return claim_next(self._blobs, f"runs/{run}/attempts", body, width=4)
        if not create_once(self._blobs, self._attempt_key(run, after + 1), body(after + 1)):
            raise ConflictError(f"run {run}: attempt {after + 1} was started by someone else")
        return after + 1

    def beat(self, run: str, attempt: int, payload: Mapping[str, Any]) -> None:
        """Say that an attempt lives; `payload` is JSON, `update` in it shows in the status."""
        data = seal("beat", Beat(token=nonce(), payload=dict(payload)))
        self._blobs.put(self._attempt_key(run, attempt, ".beat"), data)

    def end_attempt(self, run: str, attempt: int, outcome: AttemptEnd) -> None:
        """Record how an attempt ended, once.

        Raises:
            ConflictError: another end is recorded.
            NotFoundError: no such attempt.
        """
        if self._blobs.head(self._attempt_key(run, attempt)) is None:
            raise NotFoundError(f"run {run}: got attempt {attempt}, expected one that was started")
        if not create_once(self._blobs, self._attempt_key(run, attempt, ".end"), seal("attempt-end", outcome)):
            end = self._end(run, attempt)
            status = end.status.value if end else "ended"
            raise ConflictError(f"run {run}: attempt {attempt} is already {status}, expected one without an end")

    def attempts(self, run: str) -> list[Attempt]:
        """Every attempt, in order, with its end if it has one."""
        found = []
        for number in self._attempt_numbers(run):
            key = self._attempt_key(run, number)
            claim = unseal(Attempt, self._blobs.get(key), kind="attempt", where=key)
            found.append(replace(claim, end=self._end(run, number)))
        return found

    def status(self, run: str) -> RunStatus:
        """Where a run stands. Whether a running one is alive shows in two looks at its beat."""
        number = max(self._attempt_numbers(run), default=0)
        if number == 0:
            return RunStatus(state=RunState.queued)
        end = self._end(run, number)
        state = RunState.running if end is None else RunState(end.status.value)
        return RunStatus(state=state, attempt=number, end=end, beat=self._last_beat(run, number))

    # Requests

    def request(
        self, run: str, kind: RequestKind, reason: str, *, attempt: int | None = None, within_s: float | None = None
    ) -> int:
        """Leave a wish for an attempt; its number.

        Args:
            run: run id.
            kind: what is wished.
            reason: for people.
            attempt: whose it is: the running one, or the first of a queued run, when not given.
            within_s: how long there is, from when it is seen; for `drain`.

        Raises:
            ConflictError: no attempt is running, so nobody would answer.
        """
        self._require(run)
        if attempt is None:
            status = self.status(run)
            if status.end is not None:
                raise ConflictError(
                    f"run {run}: got {kind.value} for an attempt that is {status.state.value}, expected a running one"
                )
            attempt = max(status.attempt, 1)
        mine, made_at, wanted = attempt, stamp(), nonce()

        def body(seq: int) -> bytes:
            wish = Request(
                seq=seq,
                kind=kind,
                reason=reason,
                attempt=mine,
                created_at=made_at,
                nonce=wanted,
                within_s=within_s,
            )
            return seal("request", wish)

        return claim_next(self._blobs, f"runs/{run}/control", body, width=6)

    def requests(self, run: str, *, after: int = 0, attempt: int | None = None) -> list[Request]:
        """The requests with a number above `after`, in order; only those to `attempt` if given."""
        folder = f"runs/{run}/control"
        keys = [f"{folder}/{seq:06d}.json" for seq in numbers(self._blobs, folder) if seq > after]
        found: list[Request] = []
        for key in keys:
            with contextlib.suppress(IntegrityError):  # a damaged wish must not hide those after it
                found.append(unseal(Request, self._blobs.get(key), kind="request", where=key))
        return [request for request in found if attempt is None or request.attempt == attempt]

    # Inside

    def _record(self, run: str) -> RunRecord:
        key = f"runs/{run}/run.json"
        try:
            record = unseal(RunRecord, self._blobs.get(key), kind="run", where=key)
        except NotFoundError:
            raise NotFoundError(f"run: got {run!r}, whose submission was cut off", hint="submit it again") from None
        if record.run != run:
            raise IntegrityError(f"{key}: got the record of {record.run!r}, expected that of {run!r}")
        return record

    def _readable(self, runs: Iterable[str]) -> list[RunRecord]:
        def read(run: str) -> RunRecord | None:
            try:
                return self._record(run)
            except (NotFoundError, IntegrityError):
                return None

        with ThreadPoolExecutor(_NUM_READERS) as pool:
            return [record for record in pool.map(read, runs) if record is not None]

    def _require(self, run: str) -> None:
        if self._blobs.head(f"runs/{wire.check_name('run', run)}/run.json") is None:
            self.get(run)  # says what is near
            raise NotFoundError(f"run: got {run!r}, expected a whole run id", hint="treadle ls")

    def _submitted(self, run: str, name: str, digest: str) -> bytes:
        key = f"runs/{run}/{name}"
        data = self._blobs.get(key)
        if (seen := wire.digest(data)) != digest:
            raise IntegrityError(f"{key}: got sha256 {seen}, expected {digest}")
        return data

    def _attempt_key(self, run: str, attempt: int, part: str = "") -> str:
        if attempt < 1:
            raise ConfigError(f"attempt: got {attempt}, expected at least 1")
        return f"runs/{run}/attempts/{attempt:04d}{part}.json"

    def _attempt_numbers(self, run: str) -> list[int]:
        return numbers(self._blobs, f"runs/{wire.check_name('run', run)}/attempts")

    def _end(self, run: str, attempt: int) -> AttemptEnd | None:
        key = self._attempt_key(run, attempt, ".end")
        try:
            return unseal(AttemptEnd, self._blobs.get(key), kind="attempt-end", where=key)
        except NotFoundError:
            return None

    def _last_beat(self, run: str, attempt: int) -> Beat | None:
        key = self._attempt_key(run, attempt, ".beat")
        try:
            return unseal(Beat, self._blobs.get(key), kind="beat", where=key)
        except (NotFoundError, IntegrityError):
            return None  # the next beat mends it

    def _summary(self, run: str) -> RunSummary | None:
        try:
            record, status = self._record(run), self.status(run)
        except NotFoundError:
            return None
        except IntegrityError:
            match = _RUN_ID.fullmatch(run)
            return RunSummary(run=run, job=match[1] if match else run)
        return RunSummary(
            run=run,
            job=record.job,
            number=record.number,
            created_at=record.created_at,
            backend=record.backend,
            state=status.state,
            attempt=status.attempt,
            update=status.update,
            model_version=status.end.model_version if status.end else None,
        )

    def list(self) -> list[RunSummary]:
        """Every run, the newest first; one whose record is damaged comes last, as unreadable."""
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            found = pool.map(self._summary, self._blobs.children("runs"))
        return sorted((s for s in found if s is not None), key=lambda s: (s.number, s.run), reverse=True)

"""What a run store promises: one claim per number, one end per attempt, an order without clocks."""

from __future__ import annotations

import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle.errors import ConfigError, ConflictError, DivergenceError, IntegrityError, NotFoundError, TreadleError
from treadle.store.blobs import Blobs
from treadle.store.local import LocalBlobs
from treadle.store.runs import (
    AttemptEnd,
    AttemptStatus,
    Backend,
    Request,
    RequestKind,
    RunRecord,
    Runs,
    RunState,
    new_run_id,
)
from treadle.store.sealed import seal, unseal
from treadle.testing import Died, FaultBlobs, MemoryBlobs

UNTIMED = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(params=["memory", "local"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return MemoryBlobs() if request.param == "memory" else LocalBlobs(tmp_path / "store")


def submit(runs: Runs, job: str = "toy", run: str | None = None) -> RunRecord:
    return runs.create(b'{"name":"toy"}', b'{"rounds":3}', job=job, backend=Backend.inline, run=run)


def ended(status: str = "finished", **more: Any) -> AttemptEnd:
    return AttemptEnd(status=AttemptStatus(status), **more)


def last_end(runs: Runs, run: str) -> AttemptEnd:
    end = runs.attempts(run)[-1].end
    assert end is not None
    assert runs.status(run).end == end or math.isnan(end.metrics["loss"])
    return end


def test_run_ids_are_short_names() -> None:
    assert re.fullmatch(r"a{24}-\d{8}-\d{6}-[0-9a-f]{4}", new_run_id("a" * 24))
    assert len({new_run_id("toy") for _ in range(50)}) > 40
    with pytest.raises(ConfigError):
        new_run_id("../toy")


def test_a_run_keeps_what_was_submitted(blobs: Blobs) -> None:
    runs = Runs(blobs)
    made = runs.create(b"spec", b"plan", job="toy", backend=Backend.ray, info={"address": "http://head:8265"})
    found = Runs(blobs).get(made.run)
    assert found == made
    assert (found.job, found.backend, found.store) == ("toy", Backend.ray, blobs.uri)
    assert (runs.spec(found), runs.plan(found)) == (b"spec", b"plan")
    blobs.put(f"runs/{made.run}/spec.json", b"Spec")
    with pytest.raises(IntegrityError, match=r"spec\.json: got sha256"):
        runs.spec(found)


def test_an_id_is_taken_once(blobs: Blobs) -> None:
    runs = Runs(blobs)
    made = submit(runs, run="toy-1")
    with pytest.raises(ConflictError, match="toy-1"):
        submit(runs, run="toy-1")
    assert runs.get("toy-1") == made


def test_racing_submissions_of_one_id_make_one_run(blobs: Blobs) -> None:
    start = threading.Barrier(8)

    def race(_: int) -> bool:
        start.wait()
        try:
            submit(Runs(blobs), run="toy-1")
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(race, range(8))) == 1


def test_a_submission_that_was_cut_off_is_no_run_and_can_be_repeated() -> None:
    counting = FaultBlobs(MemoryBlobs())
    submit(Runs(counting), run="toy-1")
    assert counting.writes == 4
    for number in range(1, 5):
        store = MemoryBlobs()
        with pytest.raises(Died):
            submit(Runs(FaultBlobs(store, die_before=number)), run="toy-1")
        assert Runs(store).list() == []
        with pytest.raises(NotFoundError):
            Runs(store).get("toy-1")
        made = submit(Runs(store), run="toy-1")
        assert [summary.run for summary in Runs(store).list()] == [made.run]


def test_lost_replies_are_not_lost_races() -> None:
    for number in range(1, 9):
        runs = Runs(FaultBlobs(MemoryBlobs(), lose_reply=number))
        made = submit(runs, run="toy-1")
        assert runs.claim_attempt(made.run, Backend.local) == 1
        assert runs.request(made.run, RequestKind.stop, "enough") == 1
        runs.end_attempt(made.run, 1, ended())
        assert runs.claim_attempt(made.run, Backend.local) == 2
        assert [request.seq for request in runs.requests(made.run)] == [1]


def test_the_list_is_ordered_by_submission_not_by_clock(blobs: Blobs) -> None:
    runs = Runs(blobs)
    names = ["toy-20300101-000000-aaaa", "toy-20200101-000000-bbbb", "abc-20250101-000000-cccc"]
    for name in names:
        submit(runs, job=name[:3], run=name)
    assert [summary.run for summary in runs.list()] == names[::-1]
    assert runs.get("toy").run == names[1]  # the newest of the job, though its clock said 2020


def test_a_run_is_found_by_the_start_of_its_id_or_its_job(blobs: Blobs) -> None:
    runs = Runs(blobs)
    first, second = "toy-20260101-000000-aaaa", "toy-20260102-000000-bbbb"
    submit(runs, run=first)
    submit(runs, run=second)
    assert runs.get("toy-20260101").run == first
    assert runs.get("toy").run == second
    with pytest.raises(NotFoundError, match="expected one of them"):
        runs.get("toy-2026")
    with pytest.raises(NotFoundError, match=re.escape(f"did you mean '{first}'")):
        runs.get("toy-20260101-000000-aaab")
    with pytest.raises(NotFoundError, match="did you mean 'toy'"):
        runs.get("tyo")
    for name in ("", "../toy", "/", "toy/attempts"):
        with pytest.raises(NotFoundError):
            runs.get(name)
    with pytest.raises(NotFoundError, match="whole run id"):
        runs.claim_attempt("toy", Backend.local)


def test_the_life_of_a_run(blobs: Blobs) -> None:
    runs = Runs(blobs)
    run = submit(runs).run
    assert (runs.status(run).state, runs.status(run).attempt) == (RunState.queued, 0)

    assert runs.claim_attempt(run, Backend.local, {"pid": 17}) == 1
    status = runs.status(run)
    assert (status.state, status.attempt, status.beat, status.update) == (RunState.running, 1, None, 0)
    runs.beat(run, 1, {"update": 40})
    assert runs.status(run).update == 40
    error = DivergenceError("loss: got NaN", update=41).to_json()
    runs.end_attempt(run, 1, ended("failed", exit_code=5, error=error, update=40, metrics={"loss": math.nan}))
    end = last_end(runs, run)
    assert (runs.status(run).state, end.exit_code, end.error, end.update) == (RunState.failed, 5, error, 40)
    assert math.isnan(end.metrics["loss"])

    assert runs.claim_attempt(run, Backend.ray) == 2
    assert runs.status(run).state is RunState.running
    runs.end_attempt(run, 2, ended(update=90, metrics={"acc": 0.5}, model_version=3))
    (summary,) = runs.list()
    assert (summary.state, summary.attempt, summary.update, summary.model_version) == (RunState.finished, 2, 90, 3)
    first, second = runs.attempts(run)
    assert (first.attempt, first.backend, first.info) == (1, Backend.local, {"pid": 17})
    assert (second.attempt, last_end(runs, run).status) == (2, AttemptStatus.finished)


def test_an_attempt_ends_once(blobs: Blobs) -> None:
    runs = Runs(blobs)
    run = submit(runs).run
    with pytest.raises(NotFoundError, match="attempt 1"):
        runs.end_attempt(run, 1, ended())
    runs.claim_attempt(run, Backend.local)
    outcome = ended("stopped", exit_code=76)
    runs.end_attempt(run, 1, outcome)
    runs.end_attempt(run, 1, outcome)  # the same word again, after a lost reply
    with pytest.raises(ConflictError, match="already stopped"):
        runs.end_attempt(run, 1, ended("failed", exit_code=70))
    assert runs.status(run).state is RunState.stopped


def test_racing_starters_get_numbers_without_holes(blobs: Blobs) -> None:
    runs = Runs(blobs)
    run = submit(runs).run
    start = threading.Barrier(12)

    def claim(_: int) -> int:
        start.wait()
        return Runs(blobs).claim_attempt(run, Backend.local)

    with ThreadPoolExecutor(12) as pool:
        assert sorted(pool.map(claim, range(12))) == list(range(1, 13))


def test_one_of_many_replaces_a_lost_attempt(blobs: Blobs) -> None:
    runs = Runs(blobs)
    run = submit(runs).run
    runs.claim_attempt(run, Backend.local)
    start = threading.Barrier(8)

    def replace(_: int) -> int | None:
        start.wait()
        try:
            return Runs(blobs).claim_attempt(run, Backend.local, after=1)
        except ConflictError:
            return None

    with ThreadPoolExecutor(8) as pool:
        won = [number for number in pool.map(replace, range(8)) if number]
    assert won == [2]
    assert len(runs.attempts(run)) == 2


def test_a_beat_is_told_from_the_one_before_without_a_clock(blobs: Blobs) -> None:
    runs = Runs(blobs)
    run = submit(runs).run
    runs.claim_attempt(run, Backend.local)
    looks = []
    for _ in range(3):
        runs.beat(run, 1, {"update": 7})
        looks.append(runs.status(run).beat)
    assert looks[0].payload == looks[1].payload == {"update": 7}
    assert len({look.token for look in looks}) == 3
    assert runs.status(run).beat == looks[-1]
    blobs.put(f"runs/{run}/attempts/0001.beat.json", b"torn")
    assert runs.status(run).beat is None


def test_requests_are_for_the_attempt_that_was_running(blobs: Blobs) -> None:
    runs = Runs(blobs)
    run = submit(runs).run
    assert runs.request(run, RequestKind.stop, "before it began") == 1
    runs.claim_attempt(run, Backend.local)
    assert runs.request(run, RequestKind.checkpoint, "look") == 2
    assert runs.request(run, RequestKind.stop, "enough") == 3
    assert [r.reason for r in runs.requests(run, attempt=1)] == ["before it began", "look", "enough"]
    assert [r.kind for r in runs.requests(run, after=1)] == [RequestKind.checkpoint, RequestKind.stop]
    runs.end_attempt(run, 1, ended("stopped"))
    with pytest.raises(ConflictError, match="stopped, expected a running one"):
        runs.request(run, RequestKind.stop, "too late")
    runs.claim_attempt(run, Backend.local)
    assert runs.requests(run, attempt=2) == []
    assert runs.request(run, RequestKind.stop, "again") == 4
    assert [r.attempt for r in runs.requests(run)] == [1, 1, 1, 2]
    with pytest.raises(NotFoundError):
        runs.request("nothing-here", RequestKind.stop, "")


def test_racing_requests_are_all_kept(blobs: Blobs) -> None:
    runs = Runs(blobs)
    run = submit(runs).run
    runs.claim_attempt(run, Backend.local)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda n: Runs(blobs).request(run, RequestKind.checkpoint, str(n)), range(16)))
    assert sorted(got) == list(range(1, 17))
    assert {r.reason for r in runs.requests(run)} == {str(n) for n in range(16)}


def test_one_damaged_record_does_not_hide_the_others(blobs: Blobs) -> None:
    runs = Runs(blobs)
    submit(runs, run="toy-20260101-000000-aaaa")
    submit(runs, run="toy-20260101-000000-bbbb")
    key = "runs/toy-20260101-000000-aaaa/run.json"
    blobs.put(key, blobs.get(key).replace(b"inline", b"online"))
    assert [(s.job, s.state) for s in runs.list()] == [("toy", RunState.queued), ("toy", RunState.unreadable)]
    with pytest.raises(IntegrityError, match=r"run\.json"):
        runs.get("toy-20260101-000000-aaaa")
    assert runs.get("toy").run == "toy-20260101-000000-bbbb"


@pytest.mark.parametrize("attempt", [0, -1])
def test_attempts_count_from_one(attempt: int) -> None:
    runs = Runs(MemoryBlobs())
    run = submit(runs).run
    with pytest.raises(ConfigError):
        runs.beat(run, attempt, {})


@UNTIMED
@given(
    st.builds(
        AttemptEnd,
        status=st.sampled_from(AttemptStatus),
        exit_code=st.integers(0, 255),
        error=st.none() | st.just(TreadleError("x", hint="y", n=1).to_json()),
        update=st.integers(0),
        metrics=st.dictionaries(st.text(max_size=9), st.floats(allow_nan=False), max_size=4),
        model_version=st.none() | st.integers(1),
        ended_at=st.text(max_size=9),
    )
)
def test_an_end_reads_back_as_written(end: AttemptEnd) -> None:
    assert unseal(AttemptEnd, seal("attempt-end", end), kind="attempt-end", where="here") == end


@UNTIMED
@given(kind=st.sampled_from(RequestKind), reason=st.text(), seq=st.integers(1), attempt=st.integers(1))
def test_a_request_reads_back_as_written(kind: RequestKind, reason: str, seq: int, attempt: int) -> None:
    wish = Request(seq=seq, kind=kind, reason=reason, attempt=attempt, created_at="", nonce="n")
    assert unseal(Request, seal("request", wish), kind="request", where="here") == wish


@UNTIMED
@given(data=st.binary(max_size=80) | st.text().map(lambda text: f'{{"sha256":{text!r}}}'.encode()))
def test_any_other_bytes_are_an_integrity_error(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="here"):
        unseal(Request, data, kind="request", where="here")


@pytest.mark.parametrize(
    "body", [b"1e999", b"[1]", b"null", b'"x"', b'{"n":1e999}', b'{"a":1,"a":2}', b'{"n":NaN}', b"[" * 5000, b"\xff"]
)
def test_hostile_json_is_an_integrity_error(body: bytes) -> None:
    with pytest.raises(IntegrityError):
        unseal(Request, body, kind="request", where="here")

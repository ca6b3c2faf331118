from __future__ import annotations

import pytest

from treadle import wire
from treadle.errors import ConflictError, IntegrityError, NotFoundError
from treadle.store import AttemptEnd, AttemptStatus, Backend, RunState
from treadle.store.sweeps import Member, MemberEnd, MemberState, SweepRecord, Sweeps
from treadle.testing.memory import MemoryBlobs


@pytest.fixture
def blobs() -> MemoryBlobs:
    return MemoryBlobs()


def made(blobs: MemoryBlobs, job: str = "toy") -> SweepRecord:
    return Sweeps(blobs).create(wire.canonical({"job": job}), job=job, backend=Backend.local, info={"by": "a test"})


def test_a_sweep_is_found_by_id_by_its_start_and_by_its_job(blobs: MemoryBlobs) -> None:
    sweeps = Sweeps(blobs)
    first, other, second = made(blobs), made(blobs, "another"), made(blobs)
    assert sweeps.get(first.sweep) == first
    assert sweeps.get("toy") == second
    assert sweeps.get(other.sweep[:12]) == other
    assert sweeps.list() == [second, other, first]
    with pytest.raises(NotFoundError, match="of which there are 3"):
        sweeps.get("sweep-")
    with pytest.raises(NotFoundError, match="did you mean"):
        sweeps.get("anothr")


def test_what_is_swept_is_read_as_submitted(blobs: MemoryBlobs) -> None:
    record = made(blobs)
    assert Sweeps(blobs).spec(record) == b'{"job":"toy"}'
    blobs.put(f"sweeps/{record.sweep}/spec.json", b'{"job":"two"}')
    with pytest.raises(IntegrityError, match=r"spec\.json"):
        Sweeps(blobs).spec(record)


def test_a_submission_that_was_cut_off_is_no_sweep(blobs: MemoryBlobs) -> None:
    record = made(blobs)
    blobs.delete(f"sweeps/{record.sweep}/sweep.json")
    assert Sweeps(blobs).list() == []
    with pytest.raises(NotFoundError, match="cut off"):
        Sweeps(blobs).get(record.sweep)


def test_trials_are_recorded_once(blobs: MemoryBlobs) -> None:
    sweeps, sweep = Sweeps(blobs), made(blobs).sweep
    one = Member(number=1, run="toy-1", values={"optim.lr": "0.1"}, slot=1)
    child = Member(number=12, run="toy-2", values={}, slot=1, generation=2, parent="toy-1", parent_update=7)
    sweeps.add_member(sweep, child)
    sweeps.add_member(sweep, one)
    sweeps.add_member(sweep, one)  # the reply was lost, and it is written again
    with pytest.raises(ConflictError, match="one process"):
        sweeps.add_member(sweep, Member(number=1, run="toy-3", values={}))
    end = MemberEnd(state=MemberState.pruned, reason="behind")
    sweeps.end_member(sweep, 1, end)
    sweeps.end_member(sweep, 1, MemberEnd(state=MemberState.finished))
    assert sweeps.members(sweep) == [(one, end), (child, None)]


def test_one_process_at_a_time_carries_a_sweep_out(blobs: MemoryBlobs) -> None:
    sweeps, sweep = Sweeps(blobs), made(blobs).sweep
    assert sweeps.status(sweep).state is RunState.queued
    assert sweeps.claim(sweep, Backend.local, {}, after=0) == 1
    with pytest.raises(ConflictError, match="someone else"):
        sweeps.claim(sweep, Backend.local, {}, after=0)
    sweeps.beat(sweep, 1, {})
    before = sweeps.status(sweep)
    sweeps.beat(sweep, 1, {})
    assert before.state is RunState.running
    assert sweeps.status(sweep).beat != before.beat
    sweeps.end_attempt(sweep, 1, AttemptEnd(status=AttemptStatus.stopped))
    sweeps.end_attempt(sweep, 1, AttemptEnd(status=AttemptStatus.failed))  # too late
    assert sweeps.status(sweep).state is RunState.stopped


def test_a_wish_to_stop_is_one_attempts(blobs: MemoryBlobs) -> None:
    sweeps, sweep = Sweeps(blobs), made(blobs).sweep
    sweeps.request_stop(sweep, 1, "Ctrl-C")
    assert sweeps.stop_reason(sweep, 1) == "Ctrl-C"
    assert sweeps.stop_reason(sweep, 2) is None

"""Ranks that stand still, are slow, go wrong or run out of memory, beside others that do not.

Real agents and ranks over gloo, without Ray; faults at exact updates.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import pytest
from agents_rig import Attempt

from treadle.errors import InfeasibleError, IntegrityError, NotFoundError
from treadle.spec import BatchSpec, CheckpointSpec, ClusterSpec, GuardSpec, TrainSpec
from treadle.track import read_metrics

pytestmark = pytest.mark.full
TRAIN = TrainSpec(epochs=12, seed=1, log_every="0s")
STOP = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"

# Python that agents run before any rank is forked: it changes one call of one rank.
_CALLS = """
import faulty, treadle.train.updater as updater
scaled, calls = updater.Updater.scaled, iter(range(1, 10**9))
def changed(self, loss):
    number = next(calls)
    if faulty.Here.rank == {rank} and number in {calls}:
        {what}
    return scaled(self, loss)
updater.Updater.scaled = changed
"""
# Of one weight of one rank, after an update; once.
_FLIP = """
import faulty, torch, treadle.train.updater as updater
move, moves = updater.Updater.move, iter(range(1, 10**9))
def moved(self, rate):
    done = move(self, rate)
    if faulty.Here.rank == 1 and next(moves) == 17:
        self._parameters[-1].data.view(-1).view(torch.int32)[0] ^= 1 << 20
        faulty.reach("flip")
    return done
updater.Updater.move = moved
"""


@pytest.fixture(scope="module")
def whole(nursery, tmp_path_factory):
    """Undisturbed runs, by number of ranks."""
    made: dict[int, Attempt] = {}

    def found(world: int) -> Attempt:
        if world not in made:
            attempt = Attempt(nursery, tmp_path_factory.mktemp("whole"), world, train=TRAIN)
            with attempt.led():
                attempt.finish()
            made[world] = attempt
        return made[world]

    return found


@pytest.fixture
def made(nursery, tmp_path):
    def make(world, name="run", **changes):
        return Attempt(nursery, tmp_path / name, world, **({"train": TRAIN} | changes))

    return make


def series(attempt, name):
    return {row["update"]: row["metrics"][name] for row in attempt.rows() if name in row["metrics"]}


def causes(attempt):
    return [(row["rank"], row["cause"]) for row in attempt.events("rank_failed")]


@pytest.mark.fault(5, "SIGSTOP of one of two ranks for 5 s, then for ever")
def test_a_rank_stands_still(made, whole, matrix) -> None:
    attempt = made(2, cluster=ClusterSpec(max_failures=20, hang_after="8s"))
    attempt.fault("update-10", 1, STOP)
    attempt.fault("update-40", 1, STOP)
    with attempt.led():
        attempt.wait_for(lambda: "update-10.1.done" in attempt.injected(), "the first stop")
        pid = attempt.pid(1)
        time.sleep(5)
        assert not attempt.events("rank_failed")
        os.kill(pid, signal.SIGCONT)
        attempt.wait_for(lambda: "update-40.1.done" in attempt.injected(), "the second stop")
        began = time.monotonic()
        attempt.wait_for(lambda: attempt.events("rank_failed"), "the loss", seconds=60)
        found_s = time.monotonic() - began
        attempt.finish()
    assert causes(attempt) == [(1, "hung")]
    assert found_s < 12
    assert attempt.weights() == whole(2).weights()
    matrix.note(injected=2, seen=f"5 s: no restart; for ever: found after {found_s:.1f} s; bit-equal")


@pytest.mark.fault(6, "one of two ranks stopped two thirds of the time")
def test_a_slow_rank_is_named(made, matrix) -> None:
    attempt = made(2, train=TrainSpec(epochs=4000, seed=1, log_every="1s"))
    over = threading.Event()
    with attempt.led():
        attempt.reach(20)
        time.sleep(15)
        assert attempt.events("slow_rank") == [], "a false alarm"
        clean = attempt.update
        pid = attempt.pid(1)

        def slow() -> None:
            while not over.is_set():
                for number, pause_s in ((signal.SIGSTOP, 0.03), (signal.SIGCONT, 0.01)):
                    os.kill(pid, number)
                    time.sleep(pause_s)

        thread = threading.Thread(target=slow)
        thread.start()
        began = time.monotonic()
        try:
            (row,) = attempt.wait_for(lambda: attempt.events("slow_rank"), "its name", seconds=60)
            took_s = time.monotonic() - began
            assert attempt.lead.beat["slow"] == [1] or row["rank"] == 1
        finally:
            over.set()
            thread.join()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert row["rank"] == 1
    assert not attempt.events("rank_failed")
    matrix.note(injected=1, seen=f"named after {took_s:.0f} s; none named in {clean} updates before")


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("loss = loss * float('nan')", "not finite"),
        ("loss = loss * float('inf')", "not finite"),
        ("loss = loss * 1e5", "spike"),
    ],
    ids=["NaN", "Inf", "spike"],
)
@pytest.mark.fault(15, "the loss of one rank of two is NaN, Inf, a hundred thousand times too large")
def test_both_ranks_skip_what_one_spoils(made, what, reason, matrix) -> None:
    guard = GuardSpec(warmup_updates=5, spike=20.0)
    attempt = made(2, guard=guard)
    attempt.before += _CALLS.format(rank=1, calls="(40, 70)", what=what)
    with attempt.led():
        attempt.finish()
    skipped = attempt.events("skipped")
    assert [row["reason"] for row in skipped] == [reason] * 2
    assert all(row["rows"] for row in skipped)
    assert not attempt.events("rank_failed")
    matrix.note(injected=2, seen=f"{reason}: skipped by both, rows recorded")


@pytest.mark.fault(17, "no memory left for one microbatch of one rank; for all of a process; twice")
def test_memory_runs_out(made, whole, matrix) -> None:
    short = made(2, "short", batch=BatchSpec(max_slots="48", lanes=6))
    short.before += _CALLS.format(
        rank=1, calls="(20,)", what="raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried')"
    )
    with short.led():
        short.finish()
    assert len(short.events("split")) <= 1  # rank 0 tells only what it did itself
    assert not short.events("rank_failed")

    limited = made(2, "limited")
    hog = "import numpy; kept = [numpy.ones(1 << 17) for _ in range(10**6)]"
    limited.fault("update-20", 1, f"import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 20, -1)); {hog}")
    with limited.led():
        limited.finish()
    assert causes(limited) == [(1, "memory")]
    assert limited.weights() == whole(2).weights()

    twice = made(2, "twice", checkpoint=CheckpointSpec(every="1h", every_updates=5, keep_last=2))
    for update in (11, 23):
        twice.fault(f"update-{update}", 1, "raise MemoryError()")
    with twice.led(), pytest.raises(InfeasibleError, match="killed for memory a second time"):
        twice.finish()
    matrix.note(
        injected=4, seen="a split microbatch; a replaced rank, bit-equal; the second time: exit 3 and its update"
    )


@pytest.mark.fault(20, "two, one, three, two ranks in the middle of epochs")
def test_other_ranks_go_on(made, whole, matrix) -> None:
    attempt = made(2, checkpoint=CheckpointSpec(every="1h", every_updates=5, keep_last=3))
    sizes = (1, 3, 2)
    with attempt.led() as controller:
        for i, size in enumerate(sizes):
            attempt.reach(10 + 12 * i)
            attempt.world = size
            generation = controller.beat["generation"]
            os.kill(attempt.agents[-1].pid, signal.SIGKILL)
            attempt.wait_for(lambda g=generation: controller.beat["generation"] > g, f"{size} ranks")
        summary = attempt.finish()
    worlds = [row["world"] for row in attempt.events("regrouped")]
    assert worlds[-len(sizes) :] == list(sizes)
    updates = read_metrics(attempt.rows()).series["trainer/update"].updates
    assert list(updates) == sorted(set(updates)), "an update twice in the history"
    ours, theirs = (series(one, "trainer/frames_seen") for one in (attempt, whole(2)))
    assert ours == {update: theirs[update] for update in ours}, "other rows than the undisturbed run's"
    ours, theirs = (series(one, "val/loss") for one in (attempt, whole(2)))
    assert ours == pytest.approx({update: theirs[update] for update in ours}, rel=1e-4)
    matrix.note(
        injected=len(sizes), seen=f"2, 1, 3, 2 ranks: {summary['update']} updates of the very rows, loss within 1e-4"
    )


@pytest.mark.fault(24, "one flipped bit in a weight of one of three ranks")
def test_a_replica_that_differs(made, matrix) -> None:
    attempt = made(3, train=TrainSpec(epochs=12, seed=1, log_every="0s", check_replicas_every=5))
    attempt.before += _FLIP
    attempt.fault("flip", 1, "pass")
    with attempt.led(), pytest.raises(IntegrityError, match="rank 1") as failed:
        attempt.finish()
    assert attempt.injected() == ["flip.1.done"]
    with pytest.raises(NotFoundError):
        attempt.versions()
    matrix.note(injected=1, seen=failed.value.message[:90])

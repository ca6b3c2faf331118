"""Processes killed at random updates: the run ends in the bits of an undisturbed one (F1, F3, F25)."""

from __future__ import annotations

import random
import signal
import time

import psutil
import pytest
from process_rig import CELLS, SIZES, Trial, check_exact, gone, kill, toy, trial

from treadle.spec import ClusterSpec, Recovery


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Undisturbed runs, each made once: by cell and number of workers."""
    made: dict[tuple[str, int], Trial] = {}

    def found(cell: str, workers: int = 0) -> Trial:
        if (cell, workers) not in made:
            store = tmp_path_factory.mktemp(f"whole-{cell}-{workers}")
            run = Trial.made(store, spec_of(cell, workers)).start()
            assert run.end().state.value == "finished", run.log()
            run.close()
            made[cell, workers] = run
        return made[cell, workers]

    return found


def spec_of(cell: str, workers: int = 0, recovery: Recovery = Recovery.replace):
    cluster = ClusterSpec(workers=workers, max_failures=20, recovery=recovery)
    return toy(model=CELLS[cell](**SIZES), cluster=cluster)


def cells():
    """All of them in a full run."""
    return [pytest.param(cell, id=cell, marks=[] if cell == "gru" else pytest.mark.full) for cell in CELLS]


@pytest.mark.parametrize("cell", cells())
@pytest.mark.fault(1, "kill -9 of the rank at random updates, without Ray")
def test_a_rank_killed_at_random_updates(cell, whole, tmp_path, matrix, choose) -> None:
    rng = random.Random(cell)
    with trial(tmp_path, spec_of(cell)) as run:
        at = sorted(rng.sample(range(1, run.num_updates - 5), choose(3, 12)))
        run.start()
        for update in at:
            run.reach(update)
            run.lose(run.pid())
        run.end()
        check_exact(run, whole(cell))
        lost = [row for row in run.events("rank_failed") if row["cause"] == "killed"]
        assert len(lost) == len(at)
        back = [row["update"] for row in run.events("restored")]
        # Not one that was committed is lost: each goes on from the newest.
        committed = [row["committed"] for row in lost if row["committed"] > 0]
        assert all(update >= least for update, least in zip(back, committed, strict=False))
        assert run.status.attempt == 1
    matrix.note(injected=len(at), seen=f"{cell}: bit-equal, 0 committed updates lost, one attempt")


@pytest.mark.full
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.fault(3, "kill -9 of agent and driver at random updates, then resume")
def test_agent_and_driver_killed(cell, whole, tmp_path, matrix) -> None:
    rng = random.Random(cell)
    with trial(tmp_path, spec_of(cell)) as run:
        run.start()
        run.reach(rng.randint(1, 40))
        run.lose(run.pid(of="agent"))
        run.reach(rng.randint(60, 100))
        assert not gone(run.die()), "processes outlive their driver"
        run.resume()
        run.end()
        check_exact(run, whole(cell))
        assert run.status.attempt == 2
    matrix.note(injected=2, seen=f"{cell}: bit-equal after resume, nothing outlives the driver, no point twice")


@pytest.mark.ray
@pytest.mark.full
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.fault(2, "kill -9 of ranks of two Ray Train workers; the others keep their state")
def test_ranks_of_ray_train_killed(cell, whole, tmp_path, matrix, choose) -> None:
    rng = random.Random(cell)
    with trial(tmp_path, spec_of(cell, workers=2)) as run:
        run.start()
        num = choose(2, 10)
        at = sorted(rng.sample(range(2, run.num_updates - 10), num))
        for i, update in enumerate(at):
            run.reach(update)
            run.lose(run.pid(i % 2), rank=i % 2)
        run.end()
        check_exact(run, whole(cell, 2))
        lost = run.events("rank_failed")
        together = [row["update"] for row in run.events("rejoined")]
        # The others are where they were, and who is new comes there.
        assert all(after >= row["update"] for row, after in zip(lost, together[1:], strict=False))
        gaps = _gaps(run)
        assert run.status.attempt == 1
    matrix.note(injected=num, seen=f"{cell}: bit-equal, 0 updates lost, together again after {max(gaps):.1f} s at most")


@pytest.mark.ray
@pytest.mark.full
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.fault(1, "kill -9 of ranks of two Ray Train workers, all restored from the last checkpoint")
def test_ranks_of_ray_train_restarted(cell, whole, tmp_path, matrix) -> None:
    rng = random.Random(cell)
    with trial(tmp_path, spec_of(cell, workers=2, recovery=Recovery.restart)) as run:
        run.start()
        at = sorted(rng.sample(range(2, run.num_updates - 10), 5))
        for i, update in enumerate(at):
            run.reach(update)
            run.lose(run.pid(i % 2), rank=i % 2)
        run.end()
        check_exact(run, whole(cell, 2))
        assert all(row["is_fresh"] for row in run.events("regrouped"))
    matrix.note(injected=len(at), seen=f"{cell}: bit-equal, replayed from the last checkpoint")


@pytest.mark.ray
@pytest.mark.full
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.fault(3, "kill -9 of a Ray worker, of all ranks at once, of Ray Train's controller, of the driver")
def test_the_processes_of_ray_killed(cell, whole, tmp_path, matrix) -> None:
    with trial(tmp_path, spec_of(cell, workers=2)) as run:
        run.start()
        run.reach(10)
        run.lose(psutil.Process(run.pid(1, of="agent")).ppid())  # the actor of Ray Train
        run.reach(run.update + 10)
        run.lose(*(run.pid(rank) for rank in (0, 1)))
        run.reach(run.update + 10)
        controller = [p for p in run.family() if "TrainController" in " ".join(p.cmdline())]
        assert controller
        controller[0].kill()
        run.reach(run.update + 10)
        assert run.events("ray_controller_lost")
        assert not gone(run.die(), seconds=90), "processes outlive their driver"  # Ray's own wait for its dead head
        run.resume()
        run.end()
        check_exact(run, whole(cell, 2))
        assert run.status.attempt == 2
    matrix.note(injected=5, seen=f"{cell}: bit-equal, a new attempt only for the driver, no point twice")


@pytest.mark.full
@pytest.mark.fault(20, "resumed twice at the same moment, after a stop at any update and at the end of an epoch")
def test_resumed_twice(whole, tmp_path, matrix) -> None:
    with trial(tmp_path, spec_of("gru")) as run:
        run.start()
        per_epoch = run.num_updates // run.spec.train.epochs
        for update in (7, 3 * per_epoch):
            run.reach(update)
            assert run.driver is not None
            kill(run.driver.process.pid, signal.SIGTERM)
            assert run.end().state.value == "stopped"
            attempt = run.status.attempt
            drivers = [run.start().driver for _ in range(2)]  # both would be the attempt after this one
            run.wait_for(lambda both=drivers: not all(driver.is_alive() for driver in both), "the end of one")
            first, second = drivers
            run.driver = second if second.is_alive() else first
            other = first if run.driver is second else second
            other.release()
            run.reach(update + 1)
            assert run.status.attempt == attempt + 1
        run.end()
        check_exact(run, whole("gru"))
    matrix.note(injected=4, seen="one of two goes on, the other leaves; bit-equal")


@pytest.mark.fault(25, "a stopped run, a killed run: what is left of them")
def test_nothing_is_left_running(tmp_path, matrix) -> None:
    with trial(tmp_path, toy()) as run:
        run.start()
        run.reach(5)
        family = run.family()
        assert len(family) >= 2
        kill(run.driver.process.pid, signal.SIGTERM)
        assert run.end().state.value == "stopped"
        assert not gone(family, seconds=0.5)
        run.start()
        run.reach(run.update + 5)
        kill(run.pid(), signal.SIGSTOP)  # one that cannot end by itself
        started = time.monotonic()
        assert not gone(run.die())
        took_s = time.monotonic() - started
    matrix.note(injected=2, seen=f"0 processes {took_s:.1f} s after the driver's death, a stopped one among them")


def _gaps(run: Trial) -> list[float]:
    """Seconds from each loss to all ranks being together again."""
    lost = [row["time"] for row in run.events("rank_failed")]
    together = [row["time"] for row in run.events("rejoined")]
    return [min(t - at for t in together if t >= at) for at in lost]

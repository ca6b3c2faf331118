"""The parts of a sweep on a real store and real training, one trial after the other, without Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from conftest import Here
from treadle.launch.records import read_job
from treadle.launch.submit import plan_job
from treadle.launch.surroundings import local_capacity
from treadle.launch.sweeps.ask import Request, make_sweep
from treadle.launch.sweeps.conductor import Conductor
from treadle.launch.sweeps.courses import Proposals
from treadle.launch.sweeps.desk import Desk
from treadle.launch.sweeps.records import freeze_sweep, read_sweep
from treadle.launch.sweeps.submissions import run_submissions
from treadle.launch.sweeps.trial import TrialOrder, run_trial
from treadle.spec.compose import compose_job, parse_sweep
from treadle.spec.sweeps import Scheduler, Search
from treadle.store import AttemptStatus, Backend, Blobs, Checkpoints, Journal, open_blobs
from treadle.store.sweeps import Sweeps

QUICK = ["precision=fp32", "model.hidden_size=8"]


def desk_of(here: Here, *overrides: str, epochs: int = 4, **request: Any) -> Desk:
    """A new sweep of the toy job."""
    store = here.environment["TREADLE_STORE"]
    blobs, folder = open_blobs(store), here.folder / "toy"
    frozen = make_sweep(
        Request(job=str(folder), **request),
        parse_sweep(str(folder), [*QUICK, f"train.epochs={epochs}", *overrides]),
        lambda texts: compose_job(str(folder), list(texts), default_store=store),
        lambda spec, texts, share: plan_job(spec, folder, blobs, share, asked="toy"),
        lambda spec: local_capacity(count_gpus=False),
    )
    record = Sweeps(blobs).create(freeze_sweep(frozen), job="toy", backend=Backend.local)
    assert read_sweep(blobs, record) == frozen
    return Desk(blobs, record, frozen, backend=Backend.inline)


def conduct(desk: Desk, name: str) -> Conductor:
    return Conductor(desk, Journal(desk.blobs, f"sweeps/{desk.record.sweep}/events.jsonl", writer=name))


def carry(conductor: Conductor, *, most: int = 99) -> list[int]:
    """Run tasks here, one after the other; their trials' numbers."""
    done: list[int] = []
    while len(done) < most and (task := conductor.next_task()) is not None:
        order = TrialOrder(
            store=conductor.desk.blobs.uri,
            run=task.member.run,
            metric=conductor.desk.frozen.asked.metric,
            until=task.until,
            before=task.member.evaluations_before,
        )
        number = task.member.number
        run_trial(order, lambda k, value, n=number: conductor.evaluated(n, k, value), backend=Backend.inline)
        conductor.ended(task)
        done.append(number)
    return done


def weights(blobs: Blobs, desk: Desk, run: str) -> dict[str, bytes]:
    _, plan = read_job(desk.runs, run)
    found = Checkpoints(
        blobs, run, attempt=0, keep_last=1, spec_digest=plan.spec_digest, data_digest=plan.data_digest
    ).restore()
    assert found is not None
    return found[1]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    kept = torch.get_num_threads()
    yield
    torch.set_num_threads(kept)


def test_a_trial_that_goes_on_from_another_with_its_values_trains_what_that_trains(here: Here, prepared: Path) -> None:
    desk = desk_of(here, "optim.lr=1e-3,1e-2", "model.dropout=0.2", search=Search.pbt, trials=2, interval=2)
    conductor = conduct(desk, "w")
    carry(conductor, most=2)
    donor = next(trial for trial in desk.trials() if trial.evaluations and trial.last is not None)
    child = desk.begin_from(donor, slot=donor.slot, generation=9, values=donor.values)
    assert child.parent == donor.run
    assert child.evaluations_before == 2
    assert weights(desk.blobs, desk, child.run) == weights(desk.blobs, desk, donor.run)
    for run in (donor.run, child.run):
        order = TrialOrder(store=desk.blobs.uri, run=run, metric=desk.frozen.asked.metric, until=None, before=0)
        run_trial(order, lambda k, value: None, backend=Backend.inline)
    assert weights(desk.blobs, desk, child.run) == weights(desk.blobs, desk, donor.run)  # dropout and all


def test_a_population_trains_in_rounds_and_replaces_its_worst(here: Here, prepared: Path) -> None:
    desk = desk_of(here, "optim.lr=1e-5,1e-2,2e-2", search=Search.pbt, trials=3, interval=2)
    assert carry(conduct(desk, "a"), most=4)  # cut off in the second round
    assert carry(conduct(desk, "b"))
    trials = desk.trials()
    replaced = [trial for trial in trials if trial.state == "replaced"]
    assert [trial.values["optim.lr"] for trial in replaced] == ["1e-05"]
    (child,) = [trial for trial in trials if trial.parent is not None]
    assert child.parent_update > 0
    assert child.values["optim.lr"] != "1e-05"
    assert [trial.state for trial in trials if trial not in replaced] == ["finished"] * 3
    spec, _ = read_job(desk.runs, child.run)
    assert repr(spec.optim.lr) == child.values["optim.lr"]
    assert all(len(trial.evaluations) + trial.evaluations_before == 4 for trial in trials if trial not in replaced)


def test_halving_stops_with_a_checkpoint_and_is_kept(here: Here, prepared: Path) -> None:
    desk = desk_of(here, "optim.lr=1e-2,1e-5,1e-6", scheduler=Scheduler.asha, reduction=2)
    assert carry(conduct(desk, "a"), most=2) == [1, 2]
    assert carry(conduct(desk, "b")) == [3]  # knows the rungs of before
    first, second, third = desk.trials()
    assert [first.state, second.state, third.state] == ["finished", "pruned", "pruned"]
    assert "behind at evaluation 1" in third.reason
    assert len(third.evaluations) == 1
    assert weights(desk.blobs, desk, third.run)
    assert carry(conduct(desk, "c")) == []


def test_optuna_goes_on_with_what_it_knows(here: Here, prepared: Path) -> None:
    pytest.importorskip("optuna")
    desk = desk_of(
        here, "optim.lr=tag(log,interval(1e-4,3e-2))", "model=gru,rnn", epochs=1, search=Search.optuna, trials=4
    )
    assert carry(conduct(desk, "a"), most=2) == [1, 2]
    known = Proposals(desk)
    assert len(known._study.trials) == 2
    assert [trial.value for trial in known._study.trials] == [-(trial.last or 0) for trial in desk.trials()]
    assert carry(conduct(desk, "b")) == [3, 4]
    trials = desk.trials()
    assert len({tuple(trial.values.values()) for trial in trials}) == 4
    for trial in trials:
        spec, _ = read_job(desk.runs, trial.run)
        assert (repr(spec.optim.lr), spec.model.kind) == tuple(trial.values.values())


def test_a_trial_that_is_lost_is_started_again_and_one_that_fails_is_not(here: Here, prepared: Path) -> None:
    desk = desk_of(here, "optim.lr=1e-2,2e-2")
    conductor = conduct(desk, "a")
    lost, broken = conductor.next_task(), conductor.next_task()
    assert lost is not None
    assert broken is not None
    desk.runs.claim_attempt(lost.member.run, Backend.inline)  # and its process was killed
    conductor.ended(lost)
    (end,) = [attempt.end for attempt in desk.runs.attempts(lost.member.run)]
    assert end is not None
    assert end.status is AttemptStatus.lost
    assert not conductor.is_over
    desk.blobs.put(f"runs/{broken.member.run}/spec.json", b"{}")
    order = TrialOrder(store=desk.blobs.uri, run=broken.member.run, metric="val/loss", until=None, before=0)
    run_trial(order, lambda k, value: None, backend=Backend.inline)
    conductor.ended(broken)
    assert carry(conductor) == [lost.member.number]
    assert [trial.state for trial in desk.trials()] == ["finished", "failed"]
    assert conductor.is_over


def test_trials_of_several_workers_are_submissions_of_their_own(here: Here, prepared: Path) -> None:
    # Drivers without workers, for speed: what is tried here is starting, following and stopping them.
    halving = {"scheduler": Scheduler.asha, "reduction": 2, "parallel": 1}
    desk = desk_of(here, "optim.lr=1e-2,1e-6", "cluster.workers=0", **halving)
    run_submissions(conduct(desk, "a"), backend=Backend.local)
    first, second = desk.trials()
    assert first.state == "finished"
    assert first.model_version is not None
    end = Sweeps(desk.blobs).members(desk.record.sweep)[1][1]
    assert end is not None
    assert "behind at evaluation 1" in end.reason  # whether the wish came in time is the machine's speed
    for trial in (first, second):
        (attempt,) = desk.runs.attempts(trial.run)
        assert attempt.info["pid"] != os.getpid()
        assert not psutil.pid_exists(attempt.info["pid"])
        assert attempt.end is not None

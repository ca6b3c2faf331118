"""Trials of one worker inside Ray Tune: each is a Tune function that runs the loop itself, with nothing nested in it.

A Ray Train group inside a Tune trial would hold two placement groups and need a dashboard to be torn down. Tune gives
each trial its resources and its process, and carries results to where they are decided about; state and decisions are
the store's, so Tune keeps nothing that a later attempt needs.
"""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import asdict
from typing import Any

from treadle.launch.sweeps.conductor import Conductor
from treadle.launch.sweeps.courses import Task
from treadle.launch.sweeps.trial import TrialOrder, run_trial
from treadle.store import Backend

__all__ = ["count_groups", "run_on_tune"]

# Read by Ray Tune when it is imported or started.
_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


def run_on_tune(conductor: Conductor, *, backend: Backend) -> None:
    """Carry a sweep out on the Ray that this process is connected to; returns when nothing is under way."""
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    desk = conductor.desk
    cluster = desk.frozen.first.cluster
    resources = {"CPU": float(cluster.cpus_per_worker), "GPU": float(cluster.gpus_per_worker)}
    kept = {name: amount for name, amount in resources.items() if amount}
    search, scheduler = _adapters(conductor, backend)
    with tempfile.TemporaryDirectory(prefix="treadle-tune-") as scratch:
        # Not tune.Tuner: it pickles the search and the scheduler, which here hold the sweep itself.
        tune.run(
            tune.with_resources(_trial, kept),
            name=desk.record.sweep,
            search_alg=search,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=desk.frozen.asked.parallel,
            reuse_actors=True,
            storage_path=scratch,
            raise_on_failed_trial=False,
            verbose=0,
        )


def count_groups() -> int:
    """Placement groups of this Ray that hold or wait for resources."""
    from ray.util import placement_group_table

    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


def _trial(config: dict[str, Any]) -> None:
    """The Tune function."""
    from ray import tune

    def report(evaluation: int, value: float) -> None:
        tune.report({"evaluation": evaluation, "value": value})  # returns when the scheduler below has seen it

    run_trial(TrialOrder(**config["order"]), report, backend=Backend(config["backend"]))


def _order(conductor: Conductor, task: Task) -> TrialOrder:
    desk = conductor.desk
    return TrialOrder(
        store=desk.blobs.uri,
        run=task.member.run,
        metric=desk.frozen.asked.metric,
        until=task.until,
        before=task.member.evaluations_before,
    )


def _adapters(conductor: Conductor, backend: Backend) -> tuple[Any, Any]:
    """What Tune asks for trials, and what it asks about results: the conductor, twice."""
    from ray.tune.schedulers import FIFOScheduler
    from ray.tune.search import Searcher

    tasks: dict[str, Task] = {}

    class Tasks(Searcher):
        """Gives out the conductor's tasks."""

        def suggest(self, trial_id: str) -> Any:
            task = conductor.next_task()
            if task is None:
                return Searcher.FINISHED if conductor.is_over and not tasks else None
            tasks[trial_id] = task
            return {"order": asdict(_order(conductor, task)), "backend": backend.value}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            conductor.ended(tasks.pop(trial_id))

        def save(self, checkpoint_path: str) -> None: ...

        def restore(self, checkpoint_path: str) -> None: ...

    class Referee(FIFOScheduler):
        """Hands results to the conductor. It never stops a trial by Tune, which would kill it without a checkpoint."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            task = tasks.get(trial.trial_id)
            if task is not None and "evaluation" in result:
                conductor.evaluated(task.member.number, result["evaluation"], result["value"])
            return FIFOScheduler.CONTINUE

    return Tasks(), Referee()

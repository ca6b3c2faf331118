"""What a sweep costs around its training: four trials with ASHA, `python tests/bench/sweep.py [ROUNDS]`.

The same four runs of one worker in one Ray with a dashboard, each with its data, checkpoints and model in a store:
`direct` as `treadle sweep` carries them out, the loop in a Tune function; `nested` with a TorchTrainer of one worker
inside each Tune function and Ray's own callback between them. Both start from an idle cluster; a nested sweep without
the dashboard does not end.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recording import record

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}

from conftest import write_toy
from treadle.launch.records import Assignment, read_job
from treadle.launch.submit import plan_job, prepare_data
from treadle.launch.surroundings import local_capacity
from treadle.launch.sweeps.ask import Request, make_sweep
from treadle.launch.sweeps.conductor import Conductor
from treadle.launch.sweeps.desk import Desk
from treadle.launch.sweeps.on_tune import count_groups, run_on_tune
from treadle.launch.sweeps.records import freeze_sweep
from treadle.spec.compose import compose_job, parse_sweep
from treadle.spec.sweeps import Scheduler
from treadle.store import Backend, Journal, Runs, open_blobs
from treadle.store.sweeps import Sweeps

ARGUMENTS = ["optim.lr=1e-2,3e-3,1e-3,1e-4", "train.epochs=9", "cluster.workers=1", "precision=fp32"]
PARALLEL = 2
TRIALS = 4
LIMIT_S = 600.0


def new_desk(folder: Path, store: str) -> Desk:
    """A sweep of the toy job, its runs not begun."""
    blobs = open_blobs(store)
    frozen = make_sweep(
        Request(job=str(folder), scheduler=Scheduler.asha, parallel=PARALLEL),
        parse_sweep(str(folder), ARGUMENTS),
        lambda texts: compose_job(str(folder), list(texts), default_store=store),
        lambda spec, texts, share: plan_job(spec, folder, blobs, share, asked="toy"),
        lambda spec: local_capacity(count_gpus=False),
    )
    record = Sweeps(blobs).create(freeze_sweep(frozen), job="toy", backend=Backend.local)
    return Desk(blobs, record, frozen, backend=Backend.inline)


def direct(desk: Desk) -> None:
    """As `treadle sweep` does it."""
    events = Journal(desk.blobs, f"sweeps/{desk.record.sweep}/events.jsonl", writer="bench")
    with events:
        run_on_tune(Conductor(desk, events), backend=Backend.inline)


def nested(desk: Desk) -> None:
    """A TorchTrainer in each Tune function, ASHA as Tune does it by itself."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    members = [desk.begin(candidate) for candidate in desk.frozen.candidates]
    asked = desk.frozen.asked
    scheduler = ASHAScheduler(
        time_attr="evaluation",
        metric="value",
        mode="min",
        max_t=asked.evaluations,
        grace_period=asked.grace,
        reduction_factor=asked.reduction,
    )
    tasks = [{"store": desk.blobs.uri, "run": member.run, "metric": asked.metric} for member in members]
    with tempfile.TemporaryDirectory() as scratch:
        tune.run(
            tune.with_resources(_train_nested, {"CPU": 1}),
            config={"task": tune.grid_search(tasks), "scratch": scratch},
            scheduler=scheduler,
            max_concurrent_trials=PARALLEL,
            storage_path=scratch,
            raise_on_failed_trial=False,
            time_budget_s=LIMIT_S,
            verbose=0,
        )


def _train_nested(config: dict[str, Any]) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    run_config = RunConfig(name=config["task"]["run"], storage_path=config["scratch"], callbacks=[TuneReportCallback()])
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config=config["task"],
        scaling_config=ScalingConfig(num_workers=1),
        run_config=run_config,
    )
    trainer.fit()


def _train_worker(task: dict[str, Any]) -> None:
    import ray.train

    from treadle.launch.worker import train_rank
    from treadle.train import World

    class Report:
        """Hands each evaluation to Ray Train."""

        def __init__(self) -> None:
            self._evaluation = 0

        def log(self, update: int, metrics: Mapping[str, float]) -> None:
            if task["metric"] in metrics:
                self._evaluation += 1
                ray.train.report({"evaluation": self._evaluation, "value": metrics[task["metric"]]})

        def event(self, name: str, facts: Mapping[str, Any]) -> None: ...

        def close(self, outcome: str) -> None: ...

    attempt = Runs(open_blobs(task["store"])).claim_attempt(task["run"], Backend.inline, {})
    assignment = Assignment(store=task["store"], run=task["run"], attempt=attempt, code={"git": "none", "dirty": False})
    train_rank(Assignment(**asdict(assignment)), World(), sinks=[Report()])


def measured(way: Any, folder: Path, store: str) -> tuple[float, int, int]:
    """Seconds, updates of all trials, and placement groups left ten seconds after the end."""
    import ray

    desk, started = new_desk(folder, store), time.monotonic()
    way(desk)
    wall = time.monotonic() - started
    updates = sum(trial.updates for trial in desk.trials())
    for member in desk.members():
        assert read_job(desk.runs, member.run)
    deadline = time.monotonic() + 10
    while count_groups() and time.monotonic() < deadline:
        time.sleep(0.2)
    groups = count_groups()
    assert ray.is_initialized()
    return wall, updates, groups


def main() -> None:
    import ray

    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory(prefix="treadle-bench-") as scratch:
        folder, store = write_toy(Path(scratch)), str(Path(scratch) / "store")
        spec = compose_job(str(folder), [], default_store=store)
        prepare_data(spec, folder, open_blobs(store), again=False, progress=lambda *_: None)
        # A CPU for each Tune function beside its worker, which the other way has no use for.
        ray.init(num_cpus=2 * PARALLEL, include_dashboard=True, log_to_driver=False, logging_level=logging.ERROR)
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address  # else stopping a group asks another Ray
        try:
            found = [{way.__name__: measured(way, folder, store) for way in (direct, nested)} for _ in range(rounds)]
        finally:
            ray.shutdown()
    rows = []
    for name in ("direct", "nested"):
        ratio = statistics.median(one[name][0] / one["nested"][0] for one in found)
        wall = statistics.median(one[name][0] for one in found)
        updates = statistics.median(one[name][1] for one in found)
        left = max(one[name][2] for one in found)
        rows.append((name, f"{ratio:.2f}x", f"{wall:.1f} s", f"{updates:.0f}", left))
    title = f"{TRIALS} trials with ASHA, {PARALLEL} at once, one worker each; medians of {rounds} rounds"
    headers = ["trials", "wall / nested", "wall", "updates", "groups left"]
    record("sweep", title, "python tests/bench/sweep.py", headers, rows)


if __name__ == "__main__":
    main()

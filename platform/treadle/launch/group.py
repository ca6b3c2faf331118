"""Ranks by Ray Train, on a cluster of our own or on the one that this job was submitted to."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from typing import Any

from treadle.errors import InfeasibleError, InternalError, TransientError, TreadleError
from treadle.launch.worker import Assignment, train_rank
from treadle.spec import ClusterSpec

__all__ = ["train_on_ray"]

# Ray's own defaults poll every 2 s, change the folder under the job, and hang 30 s at the end.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line twice beside log_to_driver
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}
# What a cluster of one machine and one job can do without: every actor less is a second less.
_OWN_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
}


def train_on_ray(assignment: Assignment, cluster: ClusterSpec, *, is_own_cluster: bool) -> dict[str, Any]:
    """Train with `cluster.workers` ranks; returns rank 0's summary.

    Raises:
        TreadleError: what the first failing rank raised, or TransientError for a lost one.
    """
    wanted = _ENVIRONMENT | (_OWN_ENVIRONMENT if is_own_cluster else {})
    os.environ.update({name: os.environ.get(name, value) for name, value in wanted.items()})
    from treadle.cluster import joined_ray, own_ray

    address = os.environ.get("RAY_ADDRESS")
    if is_own_cluster:
        place = own_ray(num_cpus=max(1, cluster.workers * cluster.cpus_per_worker), show_logs=True)
    elif address:
        place = joined_ray(address, show_logs=True)
    else:
        raise InfeasibleError("RAY_ADDRESS: not set, expected the cluster that runs this job")
    with place, tempfile.TemporaryDirectory() as scratch:
        return _fit(assignment, cluster, scratch, is_own_cluster=is_own_cluster)


def _fit(assignment: Assignment, cluster: ClusterSpec, scratch: str, *, is_own_cluster: bool) -> dict[str, Any]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

    class OwnClusterTrainer(TorchTrainer):
        """Leaves out the actor that outlives a dead controller: it asks a dashboard we do not start, and complains."""

        def _create_default_callbacks(self) -> list[Any]:
            kept = super()._create_default_callbacks()
            return [part for part in kept if type(part).__name__ != "PlacementGroupCleanerCallback"]

    resources = {"CPU": float(cluster.cpus_per_worker)}
    if cluster.gpus_per_worker:
        resources["GPU"] = float(cluster.gpus_per_worker)
    trainer = (OwnClusterTrainer if is_own_cluster else TorchTrainer)(
        _run_rank,
        train_loop_config={"assignment": asdict(assignment), "use_gpu": bool(cluster.gpus_per_worker)},
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers, use_gpu=bool(cluster.gpus_per_worker), resources_per_worker=resources
        ),
        run_config=RunConfig(
            # A fresh name an attempt: a torn snapshot of Ray's own must not stand in the way.
            name=f"{assignment.run}-a{assignment.attempt}",
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
            worker_runtime_env={"env_vars": _worker_environment(cluster)},
        ),
    )
    try:
        result = trainer.fit()
    except WorkerGroupError as error:
        raise _translated(error.worker_failures) from error
    except (ControllerError, TrainingFailedError) as error:
        raise TransientError(f"Ray Train: {error}", hint=f"treadle resume {assignment.run}") from error
    if not isinstance(result.return_value, dict):
        raise InternalError(f"Ray Train: rank 0 gave {type(result.return_value).__name__}, expected its summary")
    return result.return_value


def _worker_environment(cluster: ClusterSpec) -> dict[str, str]:
    """What each rank's process is started with."""
    found = {"OMP_NUM_THREADS": str(cluster.cpus_per_worker), "WANDB_ERROR_REPORTING": "false"}
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the older name
    if cluster.gpus_per_worker and not any(name in os.environ for name in names):
        # Microbatches of many shapes leave gaps in the memory of a device that no later one fits into.
        found["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return found


def _run_rank(config: dict[str, Any]) -> dict[str, Any]:
    """Runs in each Ray Train worker, whose process group is joined already."""
    import torch

    from treadle.train import World

    device = torch.device("cuda", torch.cuda.current_device()) if config["use_gpu"] else torch.device("cpu")
    return train_rank(Assignment(**config["assignment"]), World.joined(device))


def _translated(failures: dict[int, Exception]) -> TreadleError:
    """The first rank's own error where one is ours; the rest only lost their partner."""
    for rank in sorted(failures):
        error: BaseException | None = failures[rank]
        while error is not None:
            if isinstance(error, TreadleError):
                return error
            error = getattr(error, "cause", None) or error.__cause__
    rank = min(failures)
    lines = [line for line in str(failures[rank]).splitlines() if line.strip()]
    if "Error" in (lines[-1] if lines else ""):
        return InternalError(f"rank {rank}: {lines[-1]}", hint="treadle logs, for the whole trace")
    return TransientError(f"rank {rank} was lost: {lines[-1] if lines else type(failures[rank]).__name__}")

"""Ranks by Ray Train, on a cluster of our own or on the one that this job was submitted to."""

from __future__ import annotations

import os
import tempfile
import threading
from typing import Any

from treadle.cluster import free_places, joined_ray, own_ray, this_node, watched_nodes
from treadle.errors import InfeasibleError, TransientError
from treadle.launch.agent import Orders, start_agent
from treadle.launch.controller import Controller
from treadle.launch.lead import Lead
from treadle.spec import ClusterSpec
from treadle.store import RequestKind, Runs

__all__ = ["train_on_ray"]

LOOK_FOR_ROOM_S = 10.0  # between two looks for machines that an elastic run could have too; Ray's own 60 s waste them
HOLD_AGAIN = 3  # times that a dead controller of Ray's is replaced
# Ray's own defaults poll every 2 s, change the folder under the job, and hang 30 s at the end.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line twice beside log_to_driver
    "RAY_COLOR_PREFIX": "0",
}
# What a cluster of one machine and one job can do without: every actor less is a second less.
_OWN_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
}


def train_on_ray(lead: Lead, *, is_own_cluster: bool) -> dict[str, Any]:
    """Train with `cluster.workers` ranks; returns rank 0's summary.

    Raises:
        TreadleError: what ended the run.
    """
    wanted = _ENVIRONMENT | (_OWN_ENVIRONMENT if is_own_cluster else {})
    os.environ.update({name: os.environ.get(name, value) for name, value in wanted.items()})
    cluster, address = lead.cluster, os.environ.get("RAY_ADDRESS")
    if is_own_cluster:
        place = own_ray(num_cpus=max(1, cluster.workers * cluster.cpus_per_worker), show_logs=True)
    elif address:
        place = joined_ray(address, show_logs=True)
    else:
        raise InfeasibleError("RAY_ADDRESS: not set, expected the cluster that runs this job")
    with place, tempfile.TemporaryDirectory() as scratch:
        controller = lead.controller(this_node())
        leading = threading.Thread(target=controller.run, name="treadle-controller", daemon=True)
        leading.start()
        try:
            with watched_nodes(lambda left_s: _drain(lead, left_s)):
                _hold(lead, controller, scratch, is_own_cluster=is_own_cluster)
        finally:
            controller.give_up(TransientError("Ray Train ended before the run did", hint=_resume(lead)))
            leading.join()
    return controller.outcome()


def _hold(lead: Lead, controller: Controller, scratch: str, *, is_own_cluster: bool) -> None:
    """Hold the ranks' places with Ray Train until the controller has no more use for them.

    Ray's own controller is one actor that nobody restarts: when it dies, its workers go with it, and another
    is begun. The ranks are then new, and continue from the last checkpoint.
    """
    from ray.exceptions import RayActorError, RayError
    from ray.train.v2.api.exceptions import TrainingFailedError

    for begun in range(1 + HOLD_AGAIN):
        trainer = _trainer(lead, controller, scratch, begun, is_own_cluster=is_own_cluster)
        try:
            trainer.fit()
        except RayActorError:
            lead.events.tell("ray_controller_lost")
            if is_own_cluster:  # on another one, Ray's own cleaner does it
                free_places()
            continue
        except (TrainingFailedError, RayError) as error:
            controller.give_up(TransientError(f"Ray Train: {error}", hint=_resume(lead)))
        return
    controller.give_up(TransientError(f"Ray Train: its controller died {1 + HOLD_AGAIN} times", hint=_resume(lead)))


def _trainer(lead: Lead, controller: Controller, scratch: str, begun: int, *, is_own_cluster: bool) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class OwnClusterTrainer(DataParallelTrainer):
        """Leaves out the actor that outlives a dead controller: it asks a dashboard we do not start, and complains."""

        def _create_default_callbacks(self) -> list[Any]:
            kept = super()._create_default_callbacks()
            return [part for part in kept if type(part).__name__ != "PlacementGroupCleanerCallback"]

    cluster = lead.cluster
    resources = {"CPU": float(cluster.cpus_per_worker)}
    if cluster.gpus_per_worker:
        resources["GPU"] = float(cluster.gpus_per_worker)
    workers = cluster.workers if cluster.min_workers is None else (cluster.min_workers, cluster.workers)
    preemptions = -1 if cluster.max_preemptions is None else cluster.max_preemptions
    # Without Ray's torch backend: the ranks are processes of their agents, and find together by themselves.
    return (OwnClusterTrainer if is_own_cluster else DataParallelTrainer)(
        _keep_rank,
        train_loop_config=lead.orders(controller),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=bool(cluster.gpus_per_worker),
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=LOOK_FOR_ROOM_S,
        ),
        run_config=RunConfig(
            # A fresh name each time: a torn snapshot of Ray's own must not stand in the way.
            name=f"{lead.assignment.run}-a{lead.assignment.attempt}-{begun}",
            storage_path=scratch,
            failure_config=FailureConfig(
                # The controller counts losses; Ray must not give up before it does, nor go on for ever.
                max_failures=1000,
                max_preemption_failures=preemptions,
                controller_failure_limit=3,
            ),
            worker_runtime_env={"env_vars": _worker_environment(cluster)},
        ),
    )


def _keep_rank(config: dict[str, Any]) -> None:
    """Runs in each Ray Train worker: an agent, as long as the controller wants it."""
    import ray.train

    context = ray.train.get_context()
    orders = Orders(**config, rank=context.get_world_rank(), world=context.get_world_size(), node=this_node())
    agent = start_agent(orders)
    if code := agent.wait():
        raise RuntimeError(f"the agent of rank {orders.rank} ended with exit code {code}")


def _drain(lead: Lead, left_s: float) -> None:
    """A machine of ours goes away: commit now, and again just before."""
    assert lead.now is not None
    lead.now.drain()
    lead.events.tell("preemption_notice", left_s=round(left_s, 1))
    run, attempt = lead.assignment.run, lead.assignment.attempt
    Runs(lead.blobs).request(run, RequestKind.drain, "the machine goes away", attempt=attempt, within_s=left_s)


def _resume(lead: Lead) -> str:
    return f"treadle resume {lead.assignment.run}"


def _worker_environment(cluster: ClusterSpec) -> dict[str, str]:
    """What each rank's process is started with."""
    found = {"OMP_NUM_THREADS": str(cluster.cpus_per_worker), "WANDB_ERROR_REPORTING": "false"}
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the older name
    if cluster.gpus_per_worker and not any(name in os.environ for name in names):
        # Microbatches of many shapes leave gaps in the memory of a device that no later one fits into.
        found["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return found

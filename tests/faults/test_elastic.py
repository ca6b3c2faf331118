"""A job that says it can do with fewer machines: one of two is lost, and another one comes (F20)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest
from process_rig import Trial, toy, trial

from treadle.launch.local import LocalDriver
from treadle.spec import CheckpointSpec, ClusterSpec, TrainSpec

pytestmark = [pytest.mark.full, pytest.mark.ray]
SPEC = toy(
    cluster=ClusterSpec(workers=2, min_workers=1, max_failures=20),
    train=TrainSpec(epochs=400, seed=3, log_every="0s"),
    checkpoint=CheckpointSpec(every="2s", keep_last=3),
)


@pytest.fixture
def cluster():
    """A head that holds no rank, and machines of one core each, all of them on this one."""
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20},
    )
    try:
        yield made
    finally:
        made.shutdown()


def start_on(run: Trial, address: str) -> None:
    """The driver, as a job on that cluster would be."""
    command = [sys.executable, "-P", "-m", "treadle.launch.driver", "--store", str(run.store), "--run", run.run]
    environment = os.environ | {"RAY_ADDRESS": address, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    output = tempfile.TemporaryFile()  # noqa: SIM115  the driver writes to it until `release`
    process = subprocess.Popen(
        [*command, "--backend", "ray"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    run.driver = LocalDriver(process=process, run=run.run, _output=output)


def worlds(run: Trial) -> list[int]:
    return [row["world"] for row in run.events("regrouped")]


@pytest.mark.fault(20, "one of two machines is lost, another one comes")
def test_goes_on_with_the_machines_that_there_are(cluster, tmp_path, matrix) -> None:
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
    with trial(tmp_path / "whole", SPEC) as whole, trial(tmp_path / "run", SPEC) as run:
        start_on(run, cluster.address)
        run.reach(200)
        assert {row["rank"] for row in run.events("rank_started")} == {0, 1}
        cluster.remove_node(nodes[1], allow_graceful=False)
        run.wait_for(lambda: worlds(run)[-1:] == [1], "one rank")
        run.reach(run.update + 200)
        cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
        run.wait_for(lambda: worlds(run)[-1:] == [2], "two ranks again")
        status = run.end()
        assert (status.state.value, status.attempt) == ("finished", 1)
        whole.start()
        whole.end()
        frames = [one.series["trainer/frames_seen"] for one in (run.history, whole.history)]
        ours, theirs = (dict(zip(one.updates, one.values, strict=True)) for one in frames)
        assert ours == {update: theirs[update] for update in ours}, "other rows than those of an undisturbed run"
        losses = [one.series["val/loss"].last for one in (run.history, whole.history)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
        seen = [2, *worlds(run)]
    matrix.note(injected=2, seen=f"{' -> '.join(map(str, seen))} ranks in one attempt, the very rows of two")

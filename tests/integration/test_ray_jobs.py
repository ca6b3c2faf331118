"""`--on ray`: a real cluster with token authentication, through the Ray Jobs API."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def free_ports(count: int) -> list[int]:
    with closing(socket.socket()) as first, closing(socket.socket()) as second, closing(socket.socket()) as third:
        sockets = [first, second, third][:count]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A head node of its own; yields what a client must know of it."""
    folder = Path(tempfile.mkdtemp(prefix="trc", dir="/tmp"))
    port, dashboard, agent = free_ports(3)
    token = secrets.token_hex(32)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # The entrypoint `python` is the one on the cluster's PATH.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_TMPDIR": str(folder), "HOME": str(folder)}
    command = [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=3"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}", "--disable-usage-stats"]
    command += ["--object-store-memory=200000000"]
    log = folder / "head.log"
    with log.open("wb") as output:
        head = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 120
        while True:
            request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
            try:
                with urllib.request.urlopen(request, timeout=5):
                    break
            except OSError:
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield {"address": address, "token": token}
    finally:
        family: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        for process in family:  # `ray start --block` takes no SIGTERM
            with suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(timeout=30)
        psutil.wait_procs(family, timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def listed(cluster: dict[str, str]) -> str:
    """What the Jobs API tells of every job."""
    request = urllib.request.Request(
        f"{cluster['address']}/api/jobs/", headers={"Authorization": f"Bearer {cluster['token']}"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


@pytest.fixture
def on_cluster(treadle, cluster):
    treadle.environment["RAY_AUTH_TOKEN"] = cluster["token"]
    return treadle


def test_a_job_runs_on_the_cluster_and_is_followed_from_here(on_cluster, prepared, cluster):
    options = ["./toy", "--on", "ray", f"cluster.address={cluster['address']}", "cluster.workers=2", "train.epochs=2"]
    done = on_cluster.ok("submit", *options, "--follow", timeout=200)
    assert done["status"] == "finished"
    assert done["model_version"] == 1
    assert on_cluster.ok("models", "show", "toy")["lineage"]["run"] == done["run"]
    assert re.search(r"RayTrainWorker.* rank 1 of 2: process \d+ on ", on_cluster("logs", done["run"]).out)
    assert json.loads(listed(cluster))
    assert cluster["token"] not in listed(cluster)
    # inside the cluster, without a Ray Train group: detached, stopped by the verb, resumed
    options = [*options[:4], "cluster.workers=0", "train.epochs=4000"]
    run = on_cluster.ok("submit", *options, "--detach")["run"]
    assert on_cluster.wait_for_update(3, after=done["run"]) == run
    follower = on_cluster.start("resume", run, "--on", "ray")
    assert "is running" in follower.communicate(timeout=60)[1]
    assert on_cluster.ok("stop", run)["status"] == "stopped"


def test_ctrl_c_detaches_and_the_job_goes_on(on_cluster, prepared, cluster, interrupt):
    address = f"cluster.address={cluster['address']}"
    process = on_cluster.start("submit", "./toy", "--on", "ray", address, "train.epochs=4000", "--follow")
    deadline = time.monotonic() + 100
    while (newest := on_cluster.newest())[1] != "running":
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    run, _ = newest
    interrupt(process)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"treadle logs -f {run}" in err
    time.sleep(1.0)
    assert on_cluster.ok("status", run)["status"] == "running"
    assert on_cluster.ok("stop", run)["status"] == "stopped"


def test_the_block_of_the_readme_runs(on_cluster, toy, cluster, root):
    text = (root / "README.md").read_text(encoding="utf-8")
    (submit,) = re.findall(r"^treadle (submit .*--on ray.*)$", text, re.MULTILINE)
    stop = text.split(submit, 1)[1].splitlines()[1].removeprefix("treadle ")
    (toy.parent / "jobs").mkdir()
    toy.rename(toy.parent / "jobs" / "g2p")
    job = toy.parent / "jobs" / "g2p" / "job.yaml"
    job.write_text(job.read_text().replace("name: toy\n", "name: g2p\n", 1).replace("epochs: 6", "epochs: 4000"))
    on_cluster.ok("prepare", "g2p")
    run = on_cluster.ok(*shlex.split(submit.replace("http://127.0.0.1:8265", cluster["address"])))["run"]
    assert on_cluster.wait_for_update(3) == run
    assert on_cluster.ok(*shlex.split(stop))["status"] == "stopped"


def test_a_wrong_token_is_named(treadle, prepared, cluster):
    treadle.environment["RAY_AUTH_TOKEN"] = "0" * 64
    done = treadle("submit", "./toy", "--on", "ray", f"cluster.address={cluster['address']}", "--json")
    assert done.code == 3
    assert "refuses the token" in done.json["message"]
    assert cluster["token"] not in done.err + done.out


def test_doctor_sees_the_cluster(on_cluster, cluster):
    found = on_cluster.ok("doctor", "--address", cluster["address"])["findings"]
    line = next(f for f in found if f["what"] == "Ray cluster")
    assert line["status"] == "ok"
    assert "3 CPUs" in line["seen"]

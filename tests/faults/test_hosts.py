"""The machines of a Ray cluster: notices that they go away, a dead raylet, a dead head (F4, F7)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from process_rig import Trial, check_exact, kill, toy, trial

from treadle.errors import PreemptedError
from treadle.launch.reconcile import LOST_S, find_lost
from treadle.spec import ClusterSpec, TrainSpec

pytestmark = [pytest.mark.full, pytest.mark.ray]
SPEC = toy(cluster=ClusterSpec(workers=2, max_failures=0), train=TrainSpec(epochs=400, seed=3, log_every="0s"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with trial(tmp_path_factory.mktemp("whole"), SPEC) as run:
        run.start()
        run.end(seconds=300)
        yield run


def process(run: Trial, words: str) -> psutil.Process:
    """The one of Ray's processes below the driver whose command says so."""
    (found,) = [p for p in run.family() if words in " ".join(p.cmdline()[:1])]
    return found


def drain(run: Trial, seconds: int) -> None:
    """Announce the end of the only machine there is, as a cloud's agent would."""
    raylet = process(run, "raylet/raylet")
    options = dict(word.lstrip("-").split("=", 1) for word in raylet.cmdline() if word.startswith("--") and "=" in word)
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": raylet.environ()["RAY_AUTH_TOKEN"]}
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", f"--address={options['gcs-address']}"]
    command += [f"--node-id={options['node_id']}", f"--deadline-remaining-seconds={seconds}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("notice_s", [30, 5])
@pytest.mark.fault(7, "notice that the machine of both ranks, and of rank 0, goes away")
def test_a_machine_goes_away(notice_s, whole, tmp_path, matrix) -> None:
    with trial(tmp_path, SPEC) as run:
        run.start()
        run.reach(30)
        drain(run, notice_s)
        began = time.monotonic()
        run.wait_for(lambda: run.events("end"), "the end of its ranks")
        took_s = time.monotonic() - began
        status = run.end()
        assert (status.state.value, status.end.exit_code) == ("preempted", PreemptedError.exit_code)
        assert took_s < notice_s
        committed = run.events("checkpoint")[-1]["update"]
        lost = run.update - committed
        assert lost == 0
        assert run.events("preemption_notice")
        assert not run.events("rank_failed")  # so that nothing is charged: max_failures is 0
        run.resume()
        run.end(seconds=300)
        check_exact(run, whole)
    matrix.note(
        injected=1, seen=f"{notice_s} s: left after {took_s:.1f} s with exit 76, {lost} updates lost, bit-equal"
    )


@pytest.mark.parametrize("words", ["raylet/raylet", "gcs/gcs_server"], ids=["raylet", "head"])
@pytest.mark.fault(4, "kill -9 of the raylet, of the head, under a run")
def test_ray_is_lost(words, whole, tmp_path, matrix) -> None:
    with trial(tmp_path, SPEC) as run:
        run.start()
        run.reach(30)
        process(run, words).kill()
        began = time.monotonic()
        run.wait_for(lambda: run.status.end is not None or not run.driver.is_alive(), "its end", seconds=150)
        took_s = time.monotonic() - began
        if run.driver.is_alive():
            run.end(seconds=120)
        else:
            run.driver.release()
        if run.status.end is None:  # Ray ends a process whose cluster is gone, and nobody writes that down
            assert list(find_lost(run.runs, [run.run])) == [run.run]
        run.resume()
        run.end(seconds=300)
        check_exact(run, whole)
        assert run.status.attempt == 2
    matrix.note(
        injected=1, seen=f"{words.split('/')[1]}: the attempt ended after {took_s:.0f} s; resumed once, bit-equal"
    )


@pytest.mark.fault(4, "the machine of the driver is gone: no process writes down its end")
def test_a_lost_driver_is_found(tmp_path, matrix) -> None:
    with trial(tmp_path, replace(SPEC, train=replace(SPEC.train, epochs=60))) as run:
        run.start()
        run.reach(5)
        for one in run.die():
            with contextlib.suppress(ProcessLookupError):  # some end with their driver
                kill(one.pid)
        began = time.monotonic()
        assert list(find_lost(run.runs, [run.run])) == [run.run]
        took_s = time.monotonic() - began
        assert took_s <= 30
        run.resume()
        run.end()
        assert run.status.attempt == 2
    matrix.note(injected=1, seen=f"lost after {took_s:.0f} s (LOST_S = {LOST_S:.0f} s)")

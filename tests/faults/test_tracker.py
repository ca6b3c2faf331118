"""W&B unreachable, hanging, refusing and swallowing what it is sent (F19). The real client, a server of our own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_wandb import FakeWandb

from treadle.spec import CtcSpec, WandbMode
from treadle.testing import Fault, FaultProxy, Rule
from treadle.track import catalogue
from treadle.track.wandb import WandbRun, WandbSink

pytestmark = pytest.mark.timeout(240)
CATALOGUE = catalogue(CtcSpec(label_name="phone", sequence_name="word"))
MOST_OF_A_CALL_S = 500e-6  # measured: 2 us in the middle
INIT_S, FINISH_S = 2.0, 4.0


@pytest.fixture(autouse=True)
def _a_key_and_nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_API_KEY", "local-" + 40 * "a")
    before = set(psutil.Process().children(recursive=True))
    yield
    assert [process.name() for process in set(psutil.Process().children(recursive=True)) - before] == []


def sink_at(url: str, folder: Path, notices: list[str], finish_s: float = FINISH_S) -> WandbSink:
    run = WandbRun(run_id="g2p-1", job="g2p", project="treadle", folder=folder, config={}, base_url=url)
    return WandbSink(
        run,
        mode=WandbMode.auto,
        catalogue=CATALOGUE,
        notice=notices.append,
        api_key_present=True,
        init_timeout_s=INIT_S,
        finish_timeout_s=finish_s,
    )


def log(sink: WandbSink, updates: range, pause_s: float = 0.0) -> list[float]:
    """How long each row held up the loop, in seconds."""
    costs = []
    for update in updates:
        start = time.perf_counter()
        sink.log(update, {"train/loss": 1.0 / (1 + update)})
        costs.append(time.perf_counter() - start)
        time.sleep(pause_s)
    return costs


def rows_kept(folder: Path) -> list[int]:
    """The updates in the client's own files, whatever it has sent."""
    found: list[int] = []
    for run in sorted(folder.glob("attempt-*/wandb/*run-*")):
        if not list(run.glob("*.wandb")):
            continue
        command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(run)]
        for line in subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines():
            record = json.loads(line)
            if record["type"] == "history":
                found.append(record["history"]["item"]["trainer/update"])
    return found


STARTS: dict[str, tuple[Rule, ...]] = {
    "hangs": (Rule(fault=Fault.hang),),
    "resets": (Rule(fault=Fault.reset),),
    "answers 503": (Rule(fault=Fault.refuse),),
}


@pytest.mark.fault(19, "W&B is not there when a run starts")
@pytest.mark.parametrize("how", STARTS)
def test_a_run_that_cannot_reach_it_goes_on_and_keeps_every_row(how: str, tmp_path: Path, matrix, choose) -> None:
    if choose(True, False):
        pytest.skip("in full runs only")
    notices: list[str] = []
    with FakeWandb() as server, FaultProxy(server.url, *STARTS[how]) as proxy:
        start = time.monotonic()
        sink = sink_at(proxy.url, tmp_path, notices)
        costs = log(sink, range(100))
        logged_s = time.monotonic() - start
        sink.close("finished")
        took_s = time.monotonic() - start
        assert proxy.done.total() > 0
    assert statistics.median(costs) < MOST_OF_A_CALL_S
    assert logged_s < INIT_S  # the loop was done before the client had given up
    assert took_s < INIT_S + FINISH_S + 20
    assert rows_kept(tmp_path) == list(range(100))
    assert any("logging offline to" in line and "wandb sync" in line for line in notices), notices
    matrix.note(injected=proxy.done.total(), seen=f"at the start, {how}: offline, 100 of 100 rows kept")


@pytest.mark.fault(19, "nobody listens where W&B should be")
def test_a_dead_address_is_found_dead_at_once(tmp_path: Path, matrix, choose) -> None:
    if choose(True, False):
        pytest.skip("in full runs only")
    notices: list[str] = []
    with FaultProxy("http://127.0.0.1:9") as proxy:
        url = proxy.url
    sink = sink_at(url, tmp_path, notices)
    log(sink, range(10))
    sink.close("finished")
    assert rows_kept(tmp_path) == list(range(10))
    assert "cannot be reached" in notices[0]
    matrix.note(injected=1, seen="dead address: offline, rows kept")


@pytest.mark.fault(19, "W&B hangs, refuses or swallows in the middle of a run")
@pytest.mark.parametrize("fault", [Fault.hang, Fault.refuse, Fault.reset, Fault.lose_reply])
def test_a_run_that_loses_it_goes_on_and_keeps_every_row(fault: Fault, tmp_path: Path, matrix, choose) -> None:
    if choose(True, False):
        pytest.skip("in full runs only")
    notices: list[str] = []
    with FakeWandb() as server, FaultProxy(server.url) as proxy:
        sink = sink_at(proxy.url, tmp_path, notices)
        log(sink, range(20))
        wait_for(lambda: any("logging to" in line for line in notices) and proxy.num_passed > 3)
        proxy.rules = (Rule(fault=fault, path="file_stream" if fault is Fault.lose_reply else ""),)
        costs = log(sink, range(20, 220), pause_s=0.002)
        wait_for(lambda: bool(proxy.done), seconds=20)
        start = time.monotonic()
        sink.close("finished")
        took_s = time.monotonic() - start
        injected = proxy.done.total()
    assert statistics.median(costs) < MOST_OF_A_CALL_S
    assert took_s < FINISH_S + 20
    assert rows_kept(tmp_path) == list(range(220))
    matrix.note(injected=injected, seen=f"in the middle, {fault.value}: 220 of 220 rows kept, end bounded")


@pytest.mark.fault(19, "W&B stumbles and comes back")
def test_rows_arrive_once_it_is_back(tmp_path: Path, matrix, choose) -> None:
    notices: list[str] = []
    with FakeWandb() as server, FaultProxy(server.url, seed=2) as proxy:
        sink = sink_at(proxy.url, tmp_path, notices, finish_s=80)  # the client waits longer after each refusal
        log(sink, range(20))
        wait_for(lambda: any("logging to" in line for line in notices))
        proxy.rules = (Rule(fault=Fault.refuse, path="file_stream", most=choose(1, 3)),)
        log(sink, range(20, 120), pause_s=0.002)
        sink.close("finished")
        assert [row["trainer/update"] for row in server.rows("g2p-1")] == list(range(120))
        assert server.problems == []
        injected = proxy.done.total()
    matrix.note(injected=injected, seen="503 for a while: every row arrives, once")


@pytest.mark.fault(19, "step time with W&B black-holed beside a clean run")
def test_a_black_hole_does_not_slow_the_loop(tmp_path: Path, matrix) -> None:
    """The work is a sleep of 2 ms; medians of interleaved updates, so that a busy machine slows both alike."""
    notices: list[str] = []
    with FakeWandb() as server, FaultProxy(server.url, Rule(fault=Fault.hang)) as proxy:
        sink = sink_at(proxy.url, tmp_path, notices)
        plain, tracked = [], []
        for update in range(150):
            plain.append(timed(lambda: time.sleep(0.002)))
            tracked.append(timed(lambda update=update: (time.sleep(0.002), sink.log(update, {"train/loss": 1.0}))))
        sink.close("finished")
        injected = proxy.done.total()
    assert rows_kept(tmp_path) == list(range(150))
    ratio = statistics.median(tracked) / statistics.median(plain)
    matrix.note(injected=injected, seen=f"black hole: update {ratio:.3f} of a clean one")
    assert ratio < 1.5  # 1.02 is aimed at; a loaded machine is not asked for that


def timed(act: Callable[[], Any]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def wait_for(seen: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.05)

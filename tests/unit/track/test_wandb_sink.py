"""The W&B sink with the real client: whatever W&B does, the run does not notice."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_wandb import FakeWandb

from treadle.spec import CtcSpec, WandbMode
from treadle.track import catalogue
from treadle.track.wandb import WandbRun, WandbSink

CATALOGUE = catalogue(CtcSpec(label_name="phone", sequence_name="word"))
KEY = "local-" + 40 * "a"


@pytest.fixture(autouse=True)
def _nothing_is_left_running(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert [process.name() for process in set(psutil.Process().children(recursive=True)) - before] == []
    assert capfd.readouterr() == ("", "")  # all that wandb has to say goes through `notice`


class Notices(list[str]):
    __call__ = list.append


def build_sink(
    tmp_path: Path,
    notice: Notices,
    *,
    mode: WandbMode = WandbMode.auto,
    base_url: str | None = None,
    attempt: int = 1,
    **timeouts: Any,
) -> WandbSink:
    run = WandbRun(
        run_id="g2p-1",
        job="g2p",
        project="treadle",
        folder=tmp_path / "wandb",
        config={"model": {"kind": "mingru", "hidden_size": 8}},
        tags=["test"],
        attempt=attempt,
        base_url=base_url,
    )
    has_key = base_url is not None
    return WandbSink(run, mode=mode, catalogue=CATALOGUE, notice=notice, api_key_present=has_key, **timeouts)


def offline_folder(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "wandb" / "attempt-1" / "wandb").glob("offline-run-*-g2p-1")
    return folder


def inspect(folder: Path) -> dict[str, list[Any]]:
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(folder)]
    found: dict[str, list[Any]] = {}
    for line in subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines():
        record = json.loads(line)
        found.setdefault(record["type"], []).append(record.get(record["type"]))
    return found


def history(records: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record["item"].items() if not k.startswith("_")} for record in records["history"]]


def test_without_a_key_everything_is_kept_offline(tmp_path: Path) -> None:
    notice, costs = Notices(), []
    sink = build_sink(tmp_path, notice)
    for update in range(200):
        start = time.perf_counter()
        sink.log(update, {"train/loss": 1.0 / (1 + update), "val/phone_error_rate": 0.5})
        costs.append(time.perf_counter() - start)
    sink.event("restart", {"reason": "worker lost"})
    sink.event("skipped", {"update": 6, "level": "warning"})
    sink.event("rolled_back", {"update": 7, "level": "alert"})
    sink.event("checkpoint", {"update": 7})
    sink.close("preempted")
    sink.close("preempted")
    sink.log(1000, {"train/loss": 1.0})  # too late, and no harm
    assert sorted(costs)[100] < 500e-6  # measured: 2 us; a call of the client takes 300 us and more
    folder = offline_folder(tmp_path)
    assert notice == [f"W&B: no API key -> logging offline to {folder}; upload with 'wandb sync {folder}'"]
    records = inspect(folder)
    rows = history(records)
    assert [row["trainer/update"] for row in rows] == [*range(200), 199, 199, 199, 199]
    assert rows[3] == {"trainer/update": 3, "train/loss": 0.25, "val/phone_error_rate": 0.5}
    assert rows[-1] == {"trainer/update": 199, "events/checkpoint": 1}
    assert [alert["title"] for alert in records["alert"]] == ["g2p: restart", "g2p: rolled_back"]
    assert [record["exit_code"] for record in records["exit"]] == [143]
    (run,) = {json.dumps(run, sort_keys=True) for run in records["run"]}
    assert all(word in run for word in ("mingru", "hidden_size", '"g2p-1"', '"test"'))
    defined = json.dumps(records["metric"])
    assert "val/phone_error_rate" in defined
    assert "trainer/update" in defined


def test_a_dead_server_costs_nothing_and_the_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    notice = Notices()
    start = time.monotonic()
    sink = build_sink(tmp_path, notice, base_url="http://127.0.0.1:9")
    sink.log(1, {"train/loss": 1.0})
    sink.close("finished")
    assert time.monotonic() - start < 15  # wandb alone takes the 20 s of init_timeout_s
    (line,) = notice
    assert re.match(r"W&B: 127\.0\.0\.1:9 cannot be reached \(.+\) -> logging offline to .+; upload with", line)
    assert history(inspect(offline_folder(tmp_path))) == [{"trainer/update": 1, "train/loss": 1.0}]


def test_a_server_that_refuses_leads_offline_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    notice = Notices()
    with FakeWandb() as fake:
        fake.is_down = True
        sink = build_sink(tmp_path, notice, base_url=fake.url, init_timeout_s=1.0)
        sink.log(1, {"train/loss": 1.0})
        sink.close("failed")
    (line,) = notice
    assert "logging offline to" in line
    records = inspect(offline_folder(tmp_path))
    assert history(records) == [{"trainer/update": 1, "train/loss": 1.0}]
    assert [record["exit_code"] for record in records["exit"]] == [1]


def test_rows_arrive_online_and_a_restart_goes_on_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    notice = Notices()
    with FakeWandb() as fake:
        for attempt, outcome in ((1, "preempted"), (2, "finished")):
            sink = build_sink(tmp_path, notice, base_url=fake.url, mode=WandbMode.online, attempt=attempt)
            for update in range(attempt * 100, attempt * 100 + 50):
                sink.log(update, {"train/loss": 1.0 / update})
            sink.event("restart", {"reason": "worker lost"})
            sink.close(outcome)
            assert fake.runs["g2p-1"]["exitcode"] == {"preempted": 143, "finished": 0}[outcome]
            assert sink.num_failed == sink.num_dropped == 0
        assert fake.problems == []
        assert fake.unknown == set()
        assert fake.keys == {KEY}
        assert list(fake.runs) == ["g2p-1"]
        rows = fake.rows("g2p-1")
        assert [row["_step"] for row in rows] == list(range(102))
        assert [row["trainer/update"] for row in rows] == [*range(100, 150), 149, *range(200, 250), 249]
        assert len(fake.alerts) == 2
        assert notice == 2 * [f"W&B: logging to {fake.url}/tester/treadle/runs/g2p-1"]
        summary = json.loads(fake.runs["g2p-1"]["summary"])
        assert summary["train/loss"] == {"min": 1.0 / 249, "last": 1.0 / 249}


def test_a_server_that_goes_away_bounds_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    notice = Notices()
    with FakeWandb() as fake:
        sink = build_sink(tmp_path, notice, base_url=fake.url, finish_timeout_s=2.0)
        while not notice and sink.num_failed == 0:
            time.sleep(0.05)
        fake.is_down = True
        sink.log(1, {"train/loss": 1.0})
        start = time.monotonic()
        sink.close("finished")
        assert time.monotonic() - start < 7
        fake.is_down = False
    assert "logging to" in notice[0]
    found = re.search(r"cut after 2 s -> send it again with 'wandb sync --include-online (.+)'", notice[1])
    assert found
    assert history(inspect(Path(found[1]))) == [{"trainer/update": 1, "train/loss": 1.0}]


def test_a_client_that_hangs_is_ended(tmp_path: Path) -> None:
    notice = Notices()
    before = set(psutil.Process().children())
    sink = build_sink(tmp_path, notice, finish_timeout_s=0.5)
    while not notice:
        time.sleep(0.05)
    for process in set(psutil.Process().children()) - before:
        process.suspend()
    for update in range(100):
        sink.log(update, {"train/loss": 1.0})
    start = time.monotonic()
    sink.close("finished")
    assert time.monotonic() - start < 15
    assert "the client hung and was ended" in notice[1]


def test_a_full_queue_drops_the_oldest_and_says_so(tmp_path: Path) -> None:
    notice = Notices()
    sink = build_sink(tmp_path, notice, mode=WandbMode.offline, max_queue=10)
    for update in range(100):
        sink.log(update, {"train/loss": 1.0})
    sink.close("finished")
    assert sink.num_dropped >= 80  # the client takes a second to start
    assert notice == [f"W&B: {sink.num_dropped} rows dropped, 0 calls failed; metrics.jsonl has every row"]
    kept = [row["trainer/update"] for row in history(inspect(offline_folder(tmp_path)))]
    assert kept[-10:] == list(range(90, 100))
    assert len(kept) == 100 - sink.num_dropped


def test_without_wandb_there_is_one_line_and_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    notice = Notices()
    sink = build_sink(tmp_path, notice)
    sink.log(1, {"train/loss": 1.0})
    sink.close("finished")
    (line,) = notice
    assert line.startswith("W&B: wandb cannot be imported (")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("in the way")
    notice = Notices()
    sink = build_sink(tmp_path, notice)
    sink.log(1, {"train/loss": 1.0})
    sink.close("finished")
    (line,) = notice
    assert re.match(r"W&B: (FileExistsError|NotADirectoryError).* -> nothing more is sent", line)


def test_disabled_is_nothing_at_all(tmp_path: Path) -> None:
    notice = Notices()
    sink = build_sink(tmp_path, notice, mode=WandbMode.disabled)
    sink.log(1, {"train/loss": 1.0})
    sink.close("finished")
    assert notice == []
    assert not (tmp_path / "wandb").exists()


def test_a_notice_that_fails_is_no_harm(tmp_path: Path) -> None:
    class Broken(Notices):
        def __call__(self, line: str) -> None:  # type: ignore[override]
            raise OSError("broken pipe")

    sink = build_sink(tmp_path, Broken())
    sink.log(1, {"train/loss": 1.0})
    sink.close("finished")
    assert len(history(inspect(offline_folder(tmp_path)))) == 1

"""The whole road at toy size: from a job to an answer over HTTP, with two Ray Train workers, on S3."""

from __future__ import annotations

import json
import re
import signal
import time
import urllib.request

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.mark.s3
def test_from_a_job_to_an_answer(treadle, toy, s3_server, tmp_path):
    """prepare, plan, submit on two workers, register, promote, serve, ask, report: every byte on S3."""
    started = time.monotonic()
    treadle.environment.update(s3_server.environment())
    treadle.environment["TREADLE_STORE"] += f"/road-{tmp_path.name}"
    rows = treadle.ok("prepare", "./toy")["rows"]
    job = ["./toy", "cluster=laptop", "track.wandb=auto", "model.num_layers=2"]
    plan = treadle.ok("plan", *job)["plan"]
    assert (plan["world"], plan["train_rows"]) == (2, rows["train"])
    told = treadle("submit", *job, "--follow", "--json", timeout=200)
    assert told.code == 0, told.err
    assert told.err.count("W&B: no API key -> logging offline") == 1
    done = told.json
    assert done["status"] == "finished"
    assert done["metrics"]["test/letter_error_rate"] < 0.5
    ref = f"toy@{done['model_version']}"
    treadle.ok("models", "promote", ref)
    process = treadle.start("serve", "toy@production", "--port", "0", "--json")
    try:
        endpoint = json.loads(process.stdout.readline())
        assert endpoint["version"] == done["model_version"]
        reply = treadle.ok("predict", "toy@production", "abc", "deed")
        assert reply["from"] == endpoint["url"]
        here = treadle.ok("predict", "toy@production", "abc", "deed", "--here")
        assert [o["labels"] for o in reply["outputs"]] == [o["labels"] for o in here["outputs"]]
        request = urllib.request.Request(
            f"{endpoint['url']}/predict", data=b'{"inputs": ["abc"]}', headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert json.loads(answer.read())["outputs"][0]["labels"] == reply["outputs"][0]["labels"]
        other = treadle.ok("submit", "./toy", "train.epochs=1", "model.hidden_size=8")["model_version"]
        wrong = treadle("predict", f"toy@{other}", "abc", "--url", endpoint["url"])
        assert wrong.code == 7
        assert f"expected toy@{other}" in wrong.err
        bad = treadle("predict", "toy@production", "a?c")
        assert bad.code == 2
        assert "'?'" in bad.err
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert not psutil.wait_procs(children, timeout=10)[1]
    page = treadle.ok("report", done["run"])["report"]
    assert page.endswith("report.html")
    assert re.search(r"RayTrainWorker.* rank 1 of 2: process \d+ on ", treadle("logs", done["run"]).out)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    print(f"the road took {time.monotonic() - started:.0f} s")

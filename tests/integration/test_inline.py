"""Jobs without Ray: the verbs around a run, stopping and resuming it, and what bad input gets."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from treadle.store import Registry, Runs, open_blobs

pytestmark = pytest.mark.timeout(240)  # many commands in turn, each of seconds


def weights(treadle, ref):
    registry = Registry(open_blobs(treadle.environment["TREADLE_STORE"]))
    return registry.read(registry.resolve(ref), "model.safetensors")


def test_the_verbs_of_a_run(treadle, toy):
    missing = treadle("plan", "./toy")
    assert missing.code == 4
    assert "hint: treadle prepare" in missing.err
    made = treadle.ok("prepare", "./toy")
    assert made["rows"]["valid"] == 40
    assert treadle.ok("prepare", "./toy")["was_there"]
    assert treadle.ok("prepare", "./toy", "--again")["digest"] == made["digest"]
    plan = treadle.ok("plan", "./toy")["plan"]
    assert plan["train_rows"] == made["rows"]["train"]
    done = treadle.ok("submit", "./toy", "--follow")
    assert done["status"] == "finished"
    assert done["model_version"] == 1
    assert done["metrics"]["test/letter_error_rate"] < 0.5
    run = done["run"]
    assert treadle.ok("ls")["runs"][0]["run"] == run
    status = treadle.ok("status", "toy")
    assert (status["status"], status["update"]) == ("finished", done["update"])
    assert "train/loss" in treadle("status", run).out
    assert treadle("logs", run).code == 0
    page = treadle.ok("report", run, "-o", "r.html")["report"]
    assert "letter_error_rate" in Path(page).read_text(encoding="utf-8")
    # a model, promoted and asked in this process
    assert treadle.ok("models", "promote", "toy@1")["change"]["after"] == 1
    assert [m["aliases"] for m in treadle.ok("models", "ls")["models"]] == [["production"]]
    shown = treadle.ok("models", "show", "toy@production")
    assert shown["lineage"]["run"] == run
    answer = treadle.ok("predict", "toy@production", "abc", "ed")
    assert [len(output["labels"]) > 0 for output in answer["outputs"]] == [True, True]
    # a second version with other options, and the way back
    second = treadle.ok("submit", "./toy", "model=mingru", "model.hidden_size=16", "train.epochs=1", "--follow")
    assert second["model_version"] == 2
    treadle.ok("models", "promote", "toy@2", "--reason", "smaller")
    assert treadle.ok("models", "rollback", "toy")["change"]["after"] == 1
    assert treadle("stop", run).code == 7
    assert treadle("resume", run).code == 7


def test_ctrl_c_commits_and_resume_ends_in_the_same_bits(treadle, prepared, interrupt):
    options = ["./toy", "train.epochs=25", "model.dropout=0.3", "precision=fp32"]
    whole = treadle.ok("submit", *options, "--follow")
    process = treadle.start("submit", *options, "--follow", "--json")
    run = treadle.wait_for_update(5, after=whole["run"], beside=process)
    interrupt(process)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    stopped = json.loads(out.strip().splitlines()[-1])
    assert (stopped["status"], stopped["run"]) == ("stopped", run)
    assert 0 < stopped["update"] < whole["update"]
    resumed = treadle.ok("resume", run, "--follow")
    assert (resumed["status"], resumed["update"]) == ("finished", whole["update"])
    assert weights(treadle, f"toy@{resumed['model_version']}") == weights(treadle, f"toy@{whole['model_version']}")


def test_a_detached_run_is_stopped_by_the_verb(treadle, prepared):
    run = treadle.ok("submit", "./toy", "train.epochs=500", "--detach")["run"]
    assert treadle.wait_for_update(3) == run
    assert treadle("resume", run).code == 7  # it runs
    assert treadle.ok("stop", run)["status"] == "stopped"


def test_a_killed_driver_is_a_failed_run_that_can_be_resumed(treadle, prepared):
    process = treadle.start("submit", "./toy", "train.epochs=400", "checkpoint.every_updates=3", "--follow", "--json")
    run = treadle.wait_for_update(12, beside=process)
    blobs = open_blobs(treadle.environment["TREADLE_STORE"])
    os.kill(Runs(blobs).attempts(run)[0].info["pid"], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 70, err
    assert "SIGKILL" in json.loads(out)["error"]["message"]
    resumed = treadle.start("resume", run, "--follow", "--json")
    deadline = time.monotonic() + 60
    while '"event":"restored"' not in blobs.get(f"runs/{run}/events.jsonl").decode():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    treadle.wait_for_update(20, beside=resumed)
    treadle.ok("stop", run)
    _, err = resumed.communicate(timeout=30)
    assert resumed.returncode == 0, err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["plan", "toyy"], 2, ["toyy"]),
        (["submit", "./toy", "model=lst", "optim.lrr=1", "train.epochs=0"], 2, ["lstm", "optim.lr", "train.epochs"]),
        (["submit", "./toy", "cluster.workers=999"], 3, ["999 x 1 CPUs"]),
        (["submit", "./toy", "--on", "ray", "cluster.address=http://127.0.0.1:9"], 3, ["127.0.0.1:9", "tried GET"]),
        (["status", "nothing"], 8, ["nothing"]),
        (["models", "show", "toyy@production"], 8, ["toyy"]),
        (["predict", "toy@1", "a"], 8, ["toy"]),
        (["serve", "toy@production"], 8, ["toy"]),
        (["submti", "toy"], 2, ["submit"]),
        (["plan", "./toy", "--jsn"], 2, ["--json"]),
    ],
)
def test_bad_input_gets_a_clear_error(here, prepared, arguments, code, words):
    done = here(*arguments)
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err


def test_a_refusal_ends_the_process_with_its_code(treadle, toy):
    done = treadle("plan", "toyy", "--json")
    assert (done.code, done.json["exit_code"]) == (2, 2)
    assert "toyy" in done.err
    assert "Traceback" not in done.err


def test_a_broken_script_is_named(here, toy):
    (toy / "prepare.py").write_text("def prepare(spec):\n    return 1 / 0\n")
    done = here("prepare", "./toy")
    assert done.code == 4
    assert "prepare.py" in done.err
    assert "ZeroDivisionError" in done.err
    (toy / "prepare.py").write_text("x = 1\n")
    assert here("prepare", "./toy").code == 2
    (toy / "prepare.py").unlink()
    assert here("prepare", "./toy").code == 2

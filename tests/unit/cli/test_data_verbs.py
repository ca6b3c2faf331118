"""`treadle data`: each verb on a real store in a folder, its refusals and their exit codes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treadle.cli.main import main
from treadle.cli.options import data_overrides
from treadle.store import open_blobs

JOB = """
defaults: [/base, override /task: classify, override /model: gru, override /cluster: inline, _self_]
name: toy
data: {name: toy}
split: {valid: 20, test: 30}
batch: {max_slots: 256, lanes: 2}
"""
SCRIPT = """
import random
from treadle.data import Draft, Labels, Row, Tokens

def prepare(spec):
    rng = random.Random(0)
    words = sorted({"".join(rng.choice("abcde") for _ in range(rng.randint(2, 9))) for _ in range(300)})
    rows = (Row(entity=w, inputs=list(w), target=rng.choice("xy")) for w in words)
    return Draft(rows=rows, inputs=Tokens(), target=Labels(), licence="made up")
"""


class Cli:
    """Runs verbs in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        code = main([*arguments])
        out, err = self._capsys.readouterr()
        return code, out, err

    def ok(self, *arguments: str) -> dict[str, Any]:
        code, out, err = self(*arguments, "--json")
        assert code == 0, err + out
        return json.loads(out)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    folder = tmp_path / "work" / "jobs" / "toy"
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text(JOB)
    (folder / "prepare.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("TREADLE_STORE", str(tmp_path / "store"))
    return Cli(capsys)


def test_a_data_set_from_its_build_to_its_check(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("data", "show", "toy")
    assert (code, "hint: treadle prepare toy" in err) == (4, True)
    assert cli.ok("data", "ls")["datasets"] == []
    made = cli.ok("prepare", "toy")
    assert made["rows"]["valid"] == 20
    assert made["rows"]["test"] == 30
    again = cli.ok("data", "build", "toy")
    assert (again["digest"], again["was_there"]) == (made["digest"], True)
    (listed,) = cli.ok("data", "ls")["datasets"]
    assert (listed["digest"], listed["rows"]) == (made["digest"], sum(made["rows"].values()))
    assert listed["made_at"]
    shown = cli.ok("data", "show", "toy")["dataset"]
    assert cli.ok("data", "show", "./jobs/toy")["dataset"] == shown
    assert cli.ok("data", "show", f"toy@{made['digest'][:8]}")["dataset"] == shown
    assert [s["rows"] for s in shown["splits"]] == list(made["rows"].values())
    assert sum(shown["splits"][0]["labels"].values()) == made["rows"]["train"]
    assert cli.ok("data", "audit", "toy")["findings"] == []
    assert cli.ok("data", "verify", "toy")["damage"] == []
    for verb in ("show", "ls", "audit", "verify", "explain"):
        code, out, err = cli("data", verb, *(["toy"] if verb != "ls" else []))
        assert (code, err) == (0, ""), verb
        assert out.strip()


def test_another_split_is_another_data_set(cli: Cli) -> None:
    first = cli.ok("prepare", "toy")
    second = cli.ok("prepare", "toy", "split.seed=1")
    assert first["digest"] != second["digest"]
    assert len(cli.ok("data", "ls", "toy")["datasets"]) == 2
    shown = cli.ok("data", "show", "toy", "split.seed=1")["dataset"]
    assert shown["digest"] == second["digest"]


def test_overrides_of_data_are_told_from_others() -> None:
    given = [
        "data.limit=3",
        "+columns.lower.x=0",
        "split=time",
        "store.uri=x",
        "model=gru",
        "batch.lanes=2",
        "data=trial",
    ]
    assert data_overrides([*given, "database=1", "splitter.x=1"]) == [
        "data.limit=3",
        "+columns.lower.x=0",
        "split=time",
        "store.uri=x",
        "data=trial",
    ]


def test_damage_is_named_and_is_exit_6(cli: Cli, tmp_path: Path) -> None:
    made = cli.ok("prepare", "toy")
    (shard,) = (tmp_path / "store" / "data" / "toy" / "shards").iterdir()
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 3] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(bytes(raw))
    code, out, err = cli("data", "verify", "toy", "--json")
    assert code == 6
    assert shard.name in err
    (damage,) = json.loads(out)["context"]["damage"]
    assert damage["key"] == f"data/toy/shards/{shard.name}"
    shard.unlink()
    code, _, err = cli("data", "verify", f"toy@{made['digest'][:6]}")
    assert (code, "the shard is gone" in err) == (6, True)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 1
    path.write_bytes(bytes(raw))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
def test_the_hint_mends_a_damaged_data_set(cli: Cli, tmp_path: Path, harm: Callable[[Path], None]) -> None:
    options = ["split.test=40", f"store.uri={tmp_path / 'a store'}"]
    made = cli.ok("prepare", "toy", *options)
    files = {path: path.read_bytes() for path in (tmp_path / "a store" / "data" / "toy").rglob("*.arrow")}
    (shard,) = (path for path in files if path.parent.name == "shards")
    harm(shard)
    code, _, err = cli("data", "verify", "toy", *options)
    assert code == 6
    command = shlex.split(err.splitlines()[-1].partition("treadle ")[2])
    assert command == ["data", "build", "toy", *options, "--again"]
    again = cli.ok(*command)
    assert (again["digest"], again["was_there"]) == (made["digest"], False)
    assert {path: path.read_bytes() for path in files} == files
    assert cli.ok("data", "verify", "toy", *options)["damage"] == []


def test_the_hint_names_the_store_that_was_looked_at(cli: Cli, tmp_path: Path) -> None:
    other = f"store.uri={tmp_path / 'other'}"
    cli.ok("prepare", "toy", other)
    flip(next((tmp_path / "other" / "data" / "toy" / "shards").iterdir()))
    for target, mended_by in (("toy", f"toy {other}"), ("./jobs/toy", f"./jobs/toy {other}")):
        _, _, err = cli("data", "verify", target, "--store", str(tmp_path / "other"))
        assert err.endswith(f"treadle data build {mended_by} --again\n")


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
@pytest.mark.parametrize("kind", ["rows", "manifests"])
def test_a_damaged_manifest_is_mended_alike(cli: Cli, tmp_path: Path, kind: str, harm: Callable[[Path], None]) -> None:
    made = cli.ok("prepare", "toy")
    (path,) = (tmp_path / "store" / "data" / "toy" / kind).iterdir()
    whole = path.read_bytes()
    harm(path)
    if kind == "manifests":
        code, _, err = cli("data", "verify", "toy")
        assert code == (4 if harm is Path.unlink else 6)
        assert "treadle data build JOB --again" in err
    assert cli.ok("data", "build", "toy", "--again")["digest"] == made["digest"]
    assert path.read_bytes() == whole


def test_leaks_that_are_not_accepted_are_exit_4(cli: Cli) -> None:
    script = Path("jobs/toy/prepare.py")
    leaky = SCRIPT.replace('rng.choice("xy")', "'xy'[w[0] in 'ab']").replace("entity=w", "entity=w[:3]")
    leaky = leaky.replace("target='xy'", "split='test' if w[-1] in 'ab' else 'train', target='xy'")
    script.write_text(leaky)
    code, _, err = cli("data", "build", "toy", "split.valid=0", "split.test=0")
    assert code == 4
    assert "data.allow_leaks=[entity" in err
    allow = err.split("data.allow_leaks=[")[1].split("]")[0]
    options = ["split.valid=0", "split.test=0", f"data.allow_leaks=[{allow}]"]
    made = cli.ok("data", "build", "toy", *options)
    found = cli.ok("data", "audit", "toy", *options)["findings"]
    assert found == made["findings"]
    assert {finding["leak"] for finding in found} == set(allow.split(","))


def test_a_job_is_explained_as_it_is_planned(cli: Cli) -> None:
    cli.ok("prepare", "toy")
    plan = cli.ok("plan", "toy")["plan"]
    found = cli.ok("data", "explain", "toy")
    assert found["updates"] == plan["updates_per_epoch"]
    assert found["pad"] == pytest.approx(1 - plan["fill"])
    assert found["worst_over_budget"] == pytest.approx(plan["worst_slots"] / 256)
    assert cli.ok("data", "explain", "toy", "batch.max_slots=1k")["limit"] == 1000
    assert cli.ok("data", "explain", "toy", "--ranks", "2")["ranks"] == 2
    code, _, err = cli("data", "explain", "toy", "--ranks", "8")
    assert (code, "batch.lanes: got 2" in err) == (2, True)
    code, _, err = cli("data", "explain", "toy", "--noise", "0.1", "--seed", "3")
    assert (code, "treadle data explain toy batch.noise=0.1 train.seed=3" in err) == (2, True)


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.npy"
    np.save(path, np.random.default_rng(0).geometric(0.02, 2000))
    return path


def test_bare_lengths_are_explained(cli: Cli, lengths: Path) -> None:
    options = ["--lengths", str(lengths), "--budget", "2k", "--ranks", "4", "--noise", "0.1", "--rounds", "2"]
    found = cli.ok("data", "explain", *options, "--seed", "3")
    keys = ("pad", "worst_over_budget", "cells_balance", "time_balance", "updates", "shapes", "plan_s")
    assert all(isinstance(found[key], int | float) for key in keys)
    assert (found["limit"], found["ranks"], found["lanes"]) == (2000, 4, 4)
    assert found["frames"] == int(np.load(lengths).sum())
    other = cli.ok("data", "explain", *options, "--seed", "4")
    assert (other["frames"], other["slots"] == found["slots"]) == (found["frames"], False)
    code, out, _ = cli("data", "explain", *options)
    assert code == 0
    assert "lengths.npy" in out
    assert "zone ends" in out


def test_a_picture_is_written(cli: Cli, lengths: Path, tmp_path: Path) -> None:
    picture = tmp_path / "batches.svg"
    made = cli.ok("data", "explain", "--lengths", str(lengths), "--picture", str(picture))
    assert made["picture"] == str(picture)
    assert ET.parse(picture).getroot().tag.endswith("svg")
    code, _, err = cli("data", "explain", "--lengths", str(lengths), "--picture", str(tmp_path / "no" / "x.svg"))
    assert (code, err.startswith("error: --picture: got")) == (2, True)


@pytest.mark.parametrize(
    ("array", "options", "code", "words"),
    [
        ([3, -1], [], 4, "got length -1 of row 1"),
        ([0], [], 4, "got length 0 of row 0"),
        ([1.5], [], 4, "got float64"),
        ([], [], 4, "got float64 of shape (0,)"),
        ([[1, 2]], [], 4, "of shape (1, 2)"),
        ([50], ["--budget", "20"], 2, "error: --budget: got 20, expected at least 50"),
        ([50], ["--budget", "lots"], 2, "error: --budget: got 'lots', expected a count such as 8192 or 8k\n"),
        ([50], ["--budget", "auto"], 2, "error: --budget: got 'auto'"),
        ([50], ["--ranks", "4", "--lanes", "2"], 2, "error: --lanes: got 2"),
        ([50], ["--ranks", "0"], 2, "Invalid value for '--ranks'"),
        ([50], ["--noise", "1"], 2, "Invalid value for '--noise'"),
    ],
)
def test_bad_lengths_and_flags(
    cli: Cli, tmp_path: Path, array: list[Any], options: list[str], code: int, words: str
) -> None:
    path = tmp_path / "l.npy"
    np.save(path, np.array(array))
    found, out, err = cli("data", "explain", "--lengths", str(path), *options)
    assert (found, out) == (code, "")
    assert words in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["explain"], 2, "either a JOB or --lengths"),
        (["explain", "toy", "--lengths", "x.npy"], 2, "either a JOB or --lengths"),
        (["explain", "--lengths", "x.npy"], 2, "--lengths: got 'x.npy'"),
        (["show", "nothing"], 8, "hint: treadle data ls"),
        (["show", "toy@abc"], 8, "got 'toy@abc'"),
        (["show", "nothing", "split=time"], 2, "overrides are of a job"),
        (["verify", "toy"], 4, "treadle prepare toy"),
        (["audit", "toy", "split.sede=1"], 2, "split.seed"),
        (["build", "nothing"], 2, "expected one of"),
        (["shwo", "toy"], 2, "show"),
    ],
)
def test_bad_commands(cli: Cli, arguments: list[str], code: int, words: str) -> None:
    found, out, err = cli("data", *arguments)
    assert (found, out) == (code, ""), err
    assert words in err


def test_an_old_digest_is_found_beside_a_new_one(cli: Cli, tmp_path: Path) -> None:
    first = cli.ok("prepare", "toy")["digest"]
    cli.ok("prepare", "toy", "split.seed=1")
    blobs = open_blobs(str(tmp_path / "store"))
    assert len(list(blobs.list("data/toy/manifests/"))) == 2
    assert cli.ok("data", "verify", f"toy@{first[:10]}")["digest"] == first


def test_text_without_unicode(lengths: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "treadle", "data", "explain", "--lengths", str(lengths)],
        env={"PYTHONIOENCODING": "ascii", "HOME": str(lengths.parent), "PATH": ""},
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert b"####" in done.stdout
    done.stdout.decode("ascii")

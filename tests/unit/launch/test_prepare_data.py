"""Preparing a job's data: from a script or from columns, once, and its rows once for all splits."""

from __future__ import annotations

from pathlib import Path

import pytest

from treadle.data import load_manifest
from treadle.errors import ConfigError, DataError
from treadle.launch.submit import plan_job, prepare_data
from treadle.plan import Capacity
from treadle.spec import JobSpec
from treadle.spec.compose import compose_job
from treadle.testing import MemoryBlobs

JOB = """
defaults: [/base, override /task: classify, override /model: gru, override /cluster: inline, _self_]
name: toy
data: {name: toy}
split: {valid: 20, test: 30}
"""
SCRIPT = """
from pathlib import Path
from treadle.data import Draft, Labels, Row, Tokens

def prepare(spec):
    with Path(__file__).with_name("ran").open("a") as log:
        log.write("x")
    rows = (Row(entity=str(i), inputs=list(f"{i:b}"), target="xy"[i % 2]) for i in range(300))
    return Draft(rows=rows, inputs=Tokens(), target=Labels(), licence="made up")
"""
CAPACITY = Capacity(where="here", cpus=2, gpus=0, memory_bytes=0)


class Job:
    """A job in a folder, and a store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs = MemoryBlobs()
        self.seen: list[str] = []
        (folder / "job.yaml").write_text(JOB)

    def script(self, text: str) -> None:
        (self.folder / "prepare.py").write_text(text)

    @property
    def runs(self) -> int:
        log = self.folder / "ran"
        return len(log.read_text()) if log.exists() else 0

    def spec(self, *overrides: str) -> JobSpec:
        return compose_job(str(self.folder), list(overrides), default_store="/nowhere")

    def prepare(self, *overrides: str, again: bool = False) -> tuple[str, bool]:
        self.seen.clear()
        return prepare_data(
            self.spec(*overrides),
            self.folder,
            self.blobs,
            again=again,
            progress=lambda stage, done, total: self.seen.append(stage),
            on_ray=False,
        )

    def shards(self) -> dict[str, str]:
        return {entry.key: entry.version for entry in self.blobs.list("data/toy/shards/")}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    folder = tmp_path / "toy"
    folder.mkdir()
    return Job(folder)


def test_a_script_runs_once_for_all_splits(job):
    job.script(SCRIPT)
    digest, is_new = job.prepare()
    assert is_new
    assert {"read", "write"} <= set(job.seen)
    shards = job.shards()
    assert job.prepare() == (digest, False)
    other, is_new = job.prepare("split.test=40", "data.allow_leaks=[content]")
    assert is_new
    assert other != digest
    assert job.runs == 1
    assert job.shards() == shards
    assert [len(load_manifest(job.blobs, "toy", d).rows_of("test")) for d in (digest, other)] == [30, 40]
    assert job.prepare(again=True) == (digest, True)
    assert job.runs == 2
    assert job.shards() == shards
    plan = plan_job(job.spec(), job.folder, job.blobs, CAPACITY, asked="toy")
    assert (plan.data_digest, plan.test_rows) == (digest, 30)


def test_rows_are_made_again_where_a_shard_is_gone(job):
    job.script(SCRIPT)
    digest, _ = job.prepare()
    (shard,) = job.shards()
    job.blobs.delete(shard)
    other, _ = job.prepare("split.test=40")
    assert other != digest
    assert list(job.shards()) == [shard]
    assert job.runs == 2


def test_columns_need_no_script(job):
    source = job.folder / "rows.csv"
    lines = [f"p{i},{' '.join(f'{i:b}')},{'xy'[i % 2]}" for i in range(200)]
    source.write_text("who,word,label\n" + "\n".join(lines) + "\n")
    asked = ["columns.entity=who", "columns.inputs=[word]", "columns.target=[label]", f"data.source={source}"]
    digest, is_new = job.prepare(*asked)
    assert is_new
    manifest = load_manifest(job.blobs, "toy", digest)
    assert manifest.num_rows == 200
    assert manifest.header.content.symbols == ("0", "1")
    assert list(manifest.header.source) == ["rows.csv"]
    assert len(manifest.header.source["rows.csv"]) == 64
    assert job.prepare(*asked) == (digest, False)
    again, _ = job.prepare(*asked, "split.test=10")
    assert load_manifest(job.blobs, "toy", again).header.blocks == manifest.header.blocks


def test_a_job_says_how_its_data_are_made(job):
    with pytest.raises(ConfigError, match=r"prepare\.py: not found, and no columns\.inputs"):
        job.prepare()
    with pytest.raises(ConfigError, match="not found"):
        plan_job(job.spec(), job.folder, job.blobs, CAPACITY, asked="toy")


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        ("prepare = 1", ConfigError, "got no function `prepare`"),
        ("import nothing_of_this_name", ConfigError, "cannot be loaded: ModuleNotFoundError"),
        ("def prepare(spec): return 1", ConfigError, r"prepare\(\) gave int, expected treadle\.data\.Draft"),
        ("def prepare(spec):\n    return {}['x']", DataError, r"KeyError: 'x' \(at prepare\.py:2\)"),
        (SCRIPT.replace('"xy"[i % 2]', '"xy"[i]'), DataError, r"IndexError: .* \(at prepare\.py:8\)"),
        (SCRIPT.replace("range(300)", "range(0)"), DataError, r"data\.toy: got no rows"),
        (SCRIPT.replace('"xy"[i % 2]', "7"), DataError, "300 of 300 rows cannot be used"),
    ],
)
def test_scripts_that_do_not_work_are_told_so(job, script, error, words):
    job.script(script)
    with pytest.raises(error, match=words):
        job.prepare()
    assert list(job.blobs.list("")) == []

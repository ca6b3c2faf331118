"""A build that is killed leaves nothing that reads as a data set, and its rerun ends in the same one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from treadle.data.shelf import check_shards, load_manifest
from treadle.launch.submit import prepare_data
from treadle.spec import JobSpec
from treadle.spec.compose import compose_job
from treadle.store import open_blobs

JOB = """
defaults: [/base, override /task: classify, override /model: gru, override /cluster: inline, _self_]
name: toy
data: {{name: toy, source: "{source}"}}
columns: {{entity: who, inputs: [frames], target: [label]}}
split: {{valid: 20, test: 30}}
"""
SCRIPT = """
from treadle.data import Draft, Labels, Row, Tokens

def prepare(spec):
    rows = (Row(entity=str(i), inputs=list(f"{i:b}"), target="xy"[i % 2]) for i in range(300))
    return Draft(rows=rows, inputs=Tokens(), target=Labels(), licence="made up")
"""
NUM_KILLS = 10


def declared(folder: Path) -> Path:
    """A job whose source is four files of frames: four parts."""
    rng = np.random.default_rng(0)
    source = folder / "source"
    source.mkdir()
    for number in range(4):
        frames = [rng.normal(size=(1 + i % 9, 3)).astype(np.float32).tolist() for i in range(100)]
        who = [f"p{number}-{i}" for i in range(100)]
        columns = {"who": who, "frames": frames, "label": ["xy"[i % 2] for i in range(100)]}
        schema = pa.schema([("who", pa.string()), ("frames", pa.list_(pa.list_(pa.float32()))), ("label", pa.string())])
        pq.write_table(pa.table(columns, schema=schema), source / f"{number}.parquet")
    return job_in(folder, JOB.format(source=source))


def scripted(folder: Path) -> Path:
    """A job with a generator, which can be read but once."""
    job = job_in(folder, JOB.format(source="").replace("columns:", "#"))
    (job / "prepare.py").write_text(SCRIPT)
    return job


def job_in(folder: Path, text: str) -> Path:
    job = folder / "toy"
    job.mkdir()
    (job / "job.yaml").write_text(text)
    return job


def victims(job: Path, folder: Path) -> tuple[str, list[int]]:
    """The digest of an unbroken build, and the points at which others were killed, their stores in `folder`."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "AWS_"))}
    script = Path(__file__).parent / "build_victim.py"
    command = [sys.executable, "-P", str(script), str(job), str(folder), str(NUM_KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return found["digest"], found["points"]


def prepare(spec: JobSpec, job: Path, store: Path) -> tuple[str, bool]:
    return prepare_data(spec, job, open_blobs(str(store)), again=False, progress=lambda *_: None, on_ray=False)


@pytest.mark.slow
@pytest.mark.parametrize("make", [declared, scripted])
def test_a_killed_build_is_no_data_set_and_its_rerun_the_same(make, tmp_path):
    job = make(tmp_path)
    spec = compose_job(str(job), [], default_store=str(tmp_path))
    digest, points = victims(job, tmp_path)
    assert len(points) == NUM_KILLS
    for point in points:
        store = tmp_path / str(point)
        blobs = open_blobs(str(store))
        kept = [entry.key for entry in blobs.list("data/toy/manifests/")]
        assert kept in ([], [f"data/toy/manifests/{digest}.arrow"])
        if kept:  # killed after all was there, but before it was noted
            check_shards(blobs, load_manifest(blobs, "toy", digest))
        for entry in blobs.list("data/toy/recipes/"):
            assert b"digest" in blobs.get(entry.key)
        assert prepare(spec, job, store)[0] == digest, point
        check_shards(blobs, load_manifest(blobs, "toy", digest))
        assert blobs.children("data/toy") == ["manifests", "recipes", "rows", "shards"]
        assert not [p for p in store.rglob("*") if p.is_file() and "/building/" in str(p)]
        assert prepare(spec, job, store) == (digest, False)

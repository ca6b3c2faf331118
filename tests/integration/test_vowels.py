"""The second job: other data, another task, the same loop; `make jobs` compares all cells on it."""

from __future__ import annotations

import pytest

from treadle.launch.records import read_job
from treadle.launch.submit import create_run, plan_job, prepare_data
from treadle.launch.surroundings import local_capacity
from treadle.launch.worker import Assignment, train_rank
from treadle.spec.compose import compose_job
from treadle.spec.places import find_job
from treadle.store import Backend, Runs, open_blobs
from treadle.train import World

SOURCE = "shared/data/japanese_vowels"


@pytest.mark.timeout(200)
@pytest.mark.parametrize("cell", ["gru", "minlstm"])
def test_a_cell_of_either_kind_tells_the_speakers_apart(cell, root, tmp_path):
    source = root.parent / SOURCE
    if not source.is_dir():
        pytest.skip(f"the source files are not at ../{SOURCE}; treadle prepare vowels fetches them")
    store = str(tmp_path / "store")
    spec = compose_job("vowels", [f"model={cell}", f"data.source={source}", "track=disabled"], default_store=store)
    folder, blobs = find_job("vowels"), open_blobs(store)
    prepare_data(spec, folder, blobs, again=False, progress=lambda stage, done, total: None)
    plan = plan_job(spec, folder, blobs, local_capacity(count_gpus=False), asked="vowels")
    record = create_run(spec, plan, blobs, Backend.inline)
    runs = Runs(blobs)
    assert read_job(runs, record.run) == (spec, plan)
    attempt = runs.claim_attempt(record.run, Backend.inline)
    summary = train_rank(Assignment(store=store, run=record.run, attempt=attempt, code={}), World())
    assert summary["status"] == "finished"
    assert summary["metrics"]["test/accuracy"] >= 0.96

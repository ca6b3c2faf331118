"""Streams on one to three real ranks over gloo: the same weights and numbers, and a run that moves between worlds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from streams_ranks import SIZES

SCRIPT = Path(__file__).with_name("streams_ranks.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory, run_ranks):
    """What each rank of each world saw: seen[size][rank][scene], and the folder with the weights."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(SCRIPT, folder)
    worlds = {
        size: [json.loads((folder / f"seen-{size}-{rank}.json").read_text()) for rank in range(size)] for size in SIZES
    }
    return worlds, folder


def final(folder, name, size, rank=0):
    return np.load(folder / f"{name}-{size}-{rank}.npy")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["language", "tag"])
def test_every_world_ends_in_the_same_weights_and_resumes_to_the_same_bits(seen, size, name):
    worlds, folder = seen
    for rank, told in enumerate(worlds[size]):
        assert told["trajectory"][name]["same"] is True
        assert np.array_equal(final(folder, name, size, rank), final(folder, name, size))
    assert np.abs(final(folder, name, size) - final(folder, name, 1)).max() < 1e-6


@pytest.mark.parametrize("name", ["language", "tag"])
def test_every_world_tells_the_same_numbers(seen, name):
    worlds, _ = seen
    alone = worlds[1][0]["trajectory"][name]
    assert alone["num_rows"] == 3
    for size in SIZES[1:]:
        for rank in worlds[size]:
            found = rank["trajectory"][name]
            assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5, abs=1e-7)
            assert found["test"] == pytest.approx(alone["test"], rel=1e-5)
            assert found["num_rows"] == 3


def test_a_run_goes_on_in_a_world_of_another_size(seen):
    worlds, folder = seen
    assert [worlds[size][0]["relay"]["update"] for size in SIZES][:2] == [2, 5]
    assert np.abs(final(folder, "relay", 3) - final(folder, "language", 1)).max() < 1e-6
    whole = worlds[3][0]["relay"]["frames"]
    assert all(rank["relay"]["frames"] == whole for rank in worlds[3])

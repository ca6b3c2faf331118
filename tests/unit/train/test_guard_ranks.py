"""A fault of one rank among three real ones: all of them decide alike (guard_ranks.py runs them)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from guard_ranks import PAIRS, SIZE, toy

SCRIPT = Path(__file__).with_name("guard_ranks.py")
PARTS = [f"{model}-{optim}" for model, optim in PAIRS]


@pytest.fixture(scope="module")
def seen(tmp_path_factory, run_ranks):
    """What each rank saw, by scene."""
    folder = tmp_path_factory.mktemp("guard")
    run_ranks(SCRIPT, folder)
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(SIZE)]


def alike(ranks, *keys):
    for key in keys:
        assert all(rank[key] == ranks[0][key] for rank in ranks), key
    return ranks[0]


@pytest.mark.parametrize("part", PARTS)
def test_all_ranks_skip_the_update_that_one_of_them_spoils(seen, part):
    first = alike([rank["spoilt_on_one"][part] for rank in seen], "status", "update", "guard", "weights")
    assert first["finite"]
    assert (first["guard"]["guard"]["skipped"], first["guard"]["roll_backs"]) == (2, 0)
    # The rows of all ranks are told, and by rank 0 alone.
    per_epoch = toy().feed(toy().run().world).plan(0).num_updates
    assert [facts["update"] for facts in first["skipped"]] == [3, per_epoch + 2]
    assert [facts["reason"] for facts in first["skipped"]] == ["not finite", "spike"]
    assert first["skipped"][0]["rows"] == toy().feed(toy().run().world).rows_of(0, 2)
    assert all(rank["spoilt_on_one"][part]["skipped"] == [] for rank in seen[1:])


@pytest.mark.parametrize(("scene", "to"), [("saved", 2), ("anew", 0)])
def test_all_ranks_roll_back_to_the_same_state(seen, scene, to):
    ranks = [rank["rolled_back"][scene] for rank in seen]
    first = alike(ranks, "status", "update", "guard", "weights")
    assert first["status"] == "finished"
    assert [(facts["update"], facts["to"]) for facts in first["rolled_back"]] == [(5, to)]
    assert (first["guard"]["roll_backs"], first["guard"]["rate_factor"]) == (1, 0.5)
    assert first["guard"]["guard"]["skipped"] == 2


def test_all_ranks_end_together_where_nothing_helps(seen):
    first = alike([rank["diverged"] for rank in seen], "message", "update", "rows")
    assert "again after 1 roll-backs" in first["message"]


def test_a_flipped_bit_is_found_and_its_rank_named(seen):
    found = [rank["flipped"] for rank in seen]
    for rank in found:
        assert rank["one"]["ranks"] == [2]
        assert (rank["one"]["update"], rank["one"]["last_update"]) == (6, 3)
        assert "got other weights in rank 2 from ranks 0, 1 after update 6" in rank["one"]["message"]
        assert rank["none"] == {"status": "finished"}
        assert rank["all"]["ranks"] == [0, 1, 2]
        assert "without a majority" in rank["all"]["message"]


def test_one_rank_may_run_short_of_memory(seen):
    short, whole = ([rank["short_on_one"][name] for rank in seen] for name in ("short", "whole"))
    alike(short, "weights", "update")
    assert [[facts["parts"] for facts in rank["split"]] for rank in short] == [[], [2, 4], []]
    assert np.abs(np.array(short[0]["values"]) - np.array(whole[0]["values"])).max() < 1e-6
    assert short[0]["update"] == whole[0]["update"] > 2


def test_sharded_ranks_go_the_same_way(seen):
    for rank in seen:
        data, spread = (rank["sharded"][name] for name in ("data", "sharded"))
        assert spread["status"] == data["status"] == "finished"
        assert spread["to"] == data["to"] == [0]
        assert spread["guard"]["guard"]["skipped"] == data["guard"]["guard"]["skipped"] == 3
        assert np.abs(np.array(spread["values"]) - np.array(data["values"])).max() < 1e-6

"""Networks spread over two and three real ranks beside networks that each rank holds (train_ranks.py runs them)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from treadle.train.sharding import gathered, is_sharded, placed, unsharded, whole

SCRIPT = Path(__file__).with_name("train_ranks.py")
MODELS = ("lstm", "gru", "rnn", "mingru", "minlstm", "hybrid", "language", "recomputed")
pytestmark = pytest.mark.timeout(240)


def seen_in(folder: Path, scene: str, sizes: tuple[int, ...]) -> dict[int, list[dict]]:
    return {
        size: [json.loads((folder / f"seen-{size}-{rank}.json").read_text())[scene] for rank in range(size)]
        for size in sizes
    }


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, run_ranks):
    folder = tmp_path_factory.mktemp("sharded")
    run_ranks(SCRIPT, folder, "sharded", timeout_s=220)
    return seen_in(folder, "sharded", (2,))[2]


@pytest.fixture(scope="module")
def resharded(tmp_path_factory, run_ranks):
    folder = tmp_path_factory.mktemp("resharded")
    run_ranks(SCRIPT, folder, "resharded", timeout_s=220)
    return seen_in(folder, "resharded", (2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_sharded_network_learns_what_a_whole_one_does(sharded, name):
    for rank in sharded:
        found = rank[name]
        assert found["names"]
        assert found["difference"] < 1e-6
        assert found["rows"] == pytest.approx(found["told"], rel=1e-5)  # gradient norms, of the whole network
        assert found["test"][1] == pytest.approx(found["test"][0], rel=1e-5)
    assert sharded[0][name]["rows"] == sharded[1][name]["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_a_sharded_run_goes_on_in_the_same_bits(resharded, size, optim):
    assert all(rank[optim]["same"] for rank in resharded[size])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_checkpoints_are_those_of_a_whole_network_and_back(resharded, size, optim):
    for rank in resharded[size]:
        found = rank[optim]
        assert found["files"] == found["others"]
        assert found["alone"] < 1e-5  # one rank alone goes on from it
        assert found["back"] < 1e-5  # and these from one of a whole network


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_holds_its_share(resharded, size):
    ranks = [rank["adamw"] for rank in resharded[size]]
    assert sum(rank["local"] for rank in ranks) == ranks[0]["all"]
    assert sum(rank["moments"] for rank in ranks) == 2 * ranks[0]["all"]
    assert max(rank["local"] for rank in ranks) < 1.1 * ranks[0]["all"] / size


def test_what_is_not_sharded_is_left_alone():
    network = nn.Linear(3, 2)
    assert not is_sharded(network)
    with whole(network):
        pass
    assert unsharded(network, lambda: pytest.fail("not needed")) is network
    full = torch.ones(2, 3)
    assert placed(full, network.weight) is full
    files = {"a": {"w": full}}
    assert gathered(files, keep=True)["a"]["w"] is full
    assert gathered(files, keep=False) == {"a": {}}

"""Two and three real ranks that come together at different updates end as if nothing had been (level_ranks.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SIZES = (2, 3)
SCRIPT = Path(__file__).with_name("level_ranks.py")
pytestmark = pytest.mark.timeout(115)


@pytest.fixture(scope="module")
def seen(tmp_path_factory, run_ranks):
    """What each rank saw: by size, then scene, then rank."""
    folder = tmp_path_factory.mktemp("level")
    run_ranks(SCRIPT, folder)
    found = {}
    for size in SIZES:
        ranks = [json.loads(path.read_text()) for path in sorted(folder.glob(f"seen-{size}-*.json"))]
        found[size] = {name: [rank[name] for rank in ranks] for name in ranks[0]}
    return found


def check_alike(ranks, *, at):
    for rank in ranks:
        assert rank["at"] == at
        assert (rank["weights"], rank["state"], rank["rows"]) == (True, True, True), rank


@pytest.mark.parametrize(
    ("size", "scene", "at"),
    [
        *((size, scene, at) for size in SIZES for scene, at in [("equal", 3), ("one behind", 3), ("a new rank 0", 5)]),
        (2, "one ahead", 3),
        (2, "a new one", 5),
        (3, "from a checkpoint", 5),
        (3, "all different", 3),
    ],
)
def test_all_go_on_from_the_furthest(seen, size, scene, at):
    check_alike(seen[size][scene], at=at)


@pytest.mark.parametrize(("size", "who", "is_known"), [(2, "one", True), (3, "one", True), (2, "none", False)])
def test_an_evaluation_that_one_knows_is_not_made_again(seen, size, who, is_known):
    ranks = seen[size][f"evaluated by {who}"]
    assert all(rank["evaluated"] is is_known for rank in ranks)
    check_alike(ranks, at=seen[size]["per_epoch"][0])


@pytest.mark.parametrize("size", SIZES)
def test_a_roll_back_that_was_cut_short_is_made_by_all(seen, size):
    check_alike(seen[size]["about to roll back"], at=5)


@pytest.mark.parametrize("size", SIZES)
def test_who_has_rolled_back_is_further_than_the_checkpoint_it_went_back_to(seen, size):
    ranks = seen[size]["rolled back"]
    assert all(rank["roll_backs"] == 1 for rank in ranks)
    check_alike(ranks, at=4)


def test_a_loss_while_states_travel_changes_nothing(seen):
    for rank in seen[3]["lost meanwhile"][:2]:
        assert "got no answer from all 3 ranks" in rank["words"]
        assert rank["calls"] >= 4
        assert rank["same"]
        assert rank["again"]

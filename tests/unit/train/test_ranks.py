"""One to four real ranks over gloo: the same rows, gradients, weights and evaluations (train_ranks.py runs them)."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

SIZES = (1, 2, 3, 4)
SCRIPT = Path(__file__).with_name("train_ranks.py")


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


def rows_of_updates(ranks):
    """The rows of each update over all ranks, sorted."""
    updates = zip(*(rank["trajectory"]["rows"] for rank in ranks), strict=True)
    return [sorted(row for micros in update for rows in micros for row in rows) for update in updates]


def place(rank):
    """Where a run ended, without numbers that the order of additions changes in their last digits."""
    state = copy.deepcopy(rank["trajectory"]["state"])
    guard = state["updater"]["guard"]
    del guard["log_mean"], guard["log_variance"], state["watch"]["best"]
    return state


@pytest.mark.parametrize("size", SIZES[1:])
def test_every_world_sees_the_same_rows_in_each_update(seen, size):
    worlds, _ = seen
    assert rows_of_updates(worlds[size]) == rows_of_updates(worlds[1])
    assert place(worlds[size][0]) == place(worlds[1][0])


def test_the_scene_has_unequal_shares_and_ranks_without_rows(seen):
    worlds, _ = seen
    sizes = {len(rows) for rank in worlds[4] for update in rank["trajectory"]["rows"] for rows in update}
    counts = [[len(update) for update in rank["trajectory"]["rows"]] for rank in worlds[4]]
    assert len(sizes) > 1
    assert max(map(max, counts)) > min(map(min, counts))
    assert any(0 in rank["float64"]["micros"] for rank in worlds[4])


@pytest.mark.parametrize("size", SIZES[1:])
def test_every_world_ends_in_the_same_weights(seen, size):
    _, folder = seen
    assert np.abs(final(folder, "ctc", size) - final(folder, "ctc", 1)).max() < 1e-6
    assert np.abs(final(folder, "float64", size) - final(folder, "float64", 1)).max() < 1e-12


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("name", ["ctc", "float64"])
def test_all_ranks_hold_the_same_bits(seen, size, name):
    _, folder = seen
    for rank in range(1, size):
        assert np.array_equal(final(folder, name, size, rank), final(folder, name, size))


def numbers(rank):
    """What was told of training and evaluation; only rank 0 saves."""
    return [row for row in rank["trajectory"]["told"] if "ckpt/update" not in row[1]]


@pytest.mark.parametrize("size", SIZES[1:])
def test_every_world_tells_the_same_numbers(seen, size):
    worlds, _ = seen
    names = ("train/loss", "train/grad_norm", "train/lr", "trainer/frames_seen", "val/loss", "val/letter_error_rate")
    alone = numbers(worlds[1][0])
    for rank in worlds[size]:
        for (update, told), (wanted_update, wanted) in zip(numbers(rank), alone, strict=True):
            assert update == wanted_update
            for name in names:
                if name in wanted:
                    assert told[name] == pytest.approx(wanted[name], rel=1e-5), (update, name)
    clip = [told["train/grad_norm"] for _, told in alone if "train/grad_norm" in told]
    assert max(clip) > 0.1  # some were clipped


@pytest.mark.parametrize("size", SIZES[1:])
def test_evaluations_are_the_same_on_every_rank_of_every_world(seen, size):
    worlds, _ = seen
    alone = worlds[1][0]["trajectory"]
    for rank in worlds[size]:
        found = rank["trajectory"]
        assert found["confusion"] == alone["confusion"]
        assert found["num_rows"] == alone["num_rows"] == 10
        assert found["test"] == pytest.approx(alone["test"], rel=1e-5)
        assert found["test"] == worlds[size][0]["trajectory"]["test"]


def test_a_rank_without_rows_evaluates_alike(seen):
    worlds, _ = seen
    alone = worlds[1][0]["few_rows"]
    assert alone["num_rows"] == 2
    for size in SIZES[1:]:
        found = [rank["few_rows"] for rank in worlds[size]]
        assert [rank["own"] for rank in found] == [1, 1, 0, 0][:size]
        for rank in found:
            assert rank["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)
            assert rank["num_rows"] == 2
            assert rank["mode"] is True


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_all_ranks_stop_together_and_resume_to_the_same_bits(seen, size, optim):
    worlds, _ = seen
    for number, rank in enumerate(worlds[size]):
        found = rank["resumed"][optim]
        assert found["stopped"] == ["stopped", 1]
        assert found["same"] is True
        assert found["kept"] == (4 if number == 0 else 0)


def test_all_ranks_diverge_together_and_save_nothing_after(seen):
    worlds, _ = seen
    alone = worlds[1][0]["diverging"]
    assert alone["update"] is not None
    for number, rank in enumerate(worlds[3]):
        assert rank["diverging"]["update"] == alone["update"]
        assert rank["diverging"]["kept"] == ([] if number else alone["kept"])
    assert max(alone["kept"]) < alone["update"]


def test_ranks_decide_alike(seen):
    worlds, _ = seen
    ranks = [rank["agreeing"] for rank in worlds[3]]
    assert all(rank["choice"] == ranks[0]["choice"] for rank in ranks)
    assert all(rank["same"] is True and rank["other"] is False for rank in ranks)
    assert all(rank["sum"] == pytest.approx([3.0, 3.0, 0.3]) for rank in ranks)
    assert all(rank["shared"] == 0.0 for rank in ranks)
    assert worlds[1][0]["agreeing"]["other"] is True

"""`batch.max_slots=auto` on two real ranks over gloo: one budget, found once (budget_ranks.py runs them)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("budget_ranks.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory, run_ranks):
    folder = tmp_path_factory.mktemp("budget")
    run_ranks(SCRIPT, folder)
    return json.loads((folder / "seen.json").read_text())


def test_both_ranks_take_the_budget_that_one_of_them_found(seen):
    (_, found), _ = seen["records"]
    assert found["slots"] != seen["planned"]
    assert [rank["slots"] for rank in seen["began"]] == [[found["slots"]]] * 2
    assert [rank["probes"] for rank in seen["began"]] == [1, 0]
    assert [rank["status"] for rank in seen["began"]] == ["stopped"] * 2


def test_a_resumed_run_takes_what_was_recorded_and_looks_no_more(seen):
    before, after = seen["records"]
    assert before == after
    assert [rank["slots"] for rank in seen["resumed"]] == [[before[1]["slots"]]] * 2
    assert [rank["probes"] for rank in seen["resumed"]] == [0, 0]
    assert [rank["status"] for rank in seen["resumed"]] == ["finished"] * 2


def test_a_budget_is_kept_with_what_arithmetic_says_of_its_targets(seen):
    (_, found), _ = seen["records"]
    assert found["predicted_bytes"] == seen["arithmetic"]


def test_a_budget_is_told_once_an_attempt(seen):
    (_, found), _ = seen["records"]
    assert [(event["attempt"], event["slots"]) for event in seen["told"]] == [(1, found["slots"]), (2, found["slots"])]


def test_looking_for_a_budget_leaves_no_trace_in_any_rank(seen):
    assert [rank["probes"] for rank in seen["given"]] == [0, 0]
    assert seen["same_model"] is True

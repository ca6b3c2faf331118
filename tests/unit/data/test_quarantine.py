"""Bad rows: what is refused, what is set aside, and which ids came before."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.data.build.quarantine import Quarantine, duplicate_ids
from treadle.data.chunk import Problem
from treadle.errors import DataError
from treadle.spec import DataSpec, OnBadRow


def problem(number, file="a.csv", message="got 1, expected 2", **fields):
    return Problem(file=file, number=number, column="inputs", message=message, **fields)


def quarantine(bad_rows=0.01, **options):
    return Quarantine(DataSpec(name="toy", on_bad_row=OnBadRow.quarantine, bad_rows=bad_rows), **options)


def test_no_problem_is_no_file():
    for collector in (Quarantine(DataSpec(name="toy")), quarantine(0)):
        collector.add([])
        assert collector.close(10) == b""


def test_fail_lists_the_first_twenty_in_order():
    collector = Quarantine(DataSpec(name="toy"))
    numbers = np.random.default_rng(0).permutation(5000)
    for part in np.array_split(numbers, 50):
        collector.add([problem(int(n), file="b.csv") for n in part])
    collector.add([problem(7, file="a.csv"), problem(7, file="a.csv", message="got 3, expected 4")])
    assert collector.num_rows == 5001
    with pytest.raises(DataError) as refused:
        collector.close(99)
    lines = refused.value.message.splitlines()
    assert lines[0] == "data.toy: 5001 of 5100 rows cannot be used, expected none"
    assert lines[1] == "a.csv:7: inputs: got 1, expected 2"
    assert lines[2] == "a.csv:7: inputs: got 3, expected 4"
    assert lines[3:21] == [f"b.csv:{n}: inputs: got 1, expected 2" for n in range(18)]
    assert lines[21] == "... and 4982 more"
    assert len(lines) == 22
    assert "data.on_bad_row=quarantine" in refused.value.hint
    assert refused.value.context["bad_rows"] == 5001


def test_set_aside_with_every_reason():
    collector = quarantine(2)
    collector.add([problem(9, entity="é"), problem(9, message="got 5, expected 6"), problem(3, where="key 3")])
    lines = collector.close(1).splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file": "a.csv", "row": 3, "entity": "", "where": "key 3", "reasons": ["inputs: got 1, expected 2"]},
        {
            "file": "a.csv",
            "row": 9,
            "entity": "é",
            "reasons": ["inputs: got 1, expected 2", "inputs: got 5, expected 6"],
        },
    ]


@pytest.mark.parametrize(
    ("bad_rows", "good", "bad", "allowed"), [(0.01, 990, 10, 10), (0.01, 989, 10, 9), (3, 0, 4, 3), (0, 5, 1, 0)]
)
def test_the_budget(bad_rows, good, bad, allowed):
    collector = quarantine(bad_rows)
    collector.add(problem(n) for n in range(bad))
    assert collector.allowed(good + bad) == allowed
    if bad <= allowed:
        assert collector.close(good).count(b"\n") == bad
    else:
        with pytest.raises(DataError, match=rf"got {bad} bad rows of {good + bad}, expected at most {allowed} "):
            collector.close(good)


def test_no_more_are_kept_than_may_be():
    collector = quarantine(0.9, most=10)
    collector.add(problem(n) for n in range(100))
    assert collector.num_rows == 100
    assert len(collector._rows) <= 20
    with pytest.raises(DataError, match=r"got 100 bad rows of 200, expected at most 10 .*\n(?s:.*)and 80 more"):
        collector.close(100)


def test_duplicate_ids_are_the_later_ones():
    hashes = np.array([5, 7, 5, 9, 7, 5], np.uint64)
    assert duplicate_ids(hashes).tolist() == [2, 4, 5]
    assert duplicate_ids(np.zeros(0, np.uint64)).tolist() == []


@given(st.lists(st.integers(0, 12), max_size=40))
def test_duplicate_ids_are_what_a_set_finds(ids):
    seen: set[int] = set()
    expected = [row for row, key in enumerate(ids) if key in seen or seen.add(key)]
    assert duplicate_ids(np.array(ids, np.uint64)).tolist() == expected

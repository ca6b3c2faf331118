"""The numbers that `treadle data show` prints."""

from __future__ import annotations

import itertools
import json

import numpy as np
from dataset_rig import LENGTHS, write_dataset
from hypothesis import given
from hypothesis import strategies as st

from treadle import wire
from treadle.data.describe import describe, length_ranges
from treadle.testing.memory import MemoryBlobs


def test_what_a_data_set_holds() -> None:
    manifest, digest = write_dataset(MemoryBlobs())
    facts = describe(manifest, digest)
    assert (facts.rows, facts.frames, facts.num_blocks, facts.num_shards) == (8, sum(LENGTHS), 4, 2)
    assert [(s.split, s.rows, s.frames) for s in facts.splits] == [
        ("train", 4, 10),
        ("valid", 1, 3),
        ("test", 2, 21),
        ("dropped", 1, 40),
    ]
    train = facts.splits[0]
    assert (train.length_min, train.length_median, train.length_max, train.entities) == (1, 2.0, 5, 4)
    assert list(train.labels.items()) == [("lived", 3), ("died", 1)]
    assert [(c.name, c.mean, c.deviation) for c in facts.channels] == [("hr", 80.0, 10.0), ("spo2", 97.0, 2.0)]
    assert (facts.inputs, facts.target, facts.target_per, facts.labels) == (
        "frames",
        "labels",
        "row",
        ("died", "lived"),
    )
    assert (facts.dropped, facts.fitted_rows) == ({"purged": 1}, 4)
    assert json.loads(wire.canonical(wire.encode(facts)))["splits"][3]["split"] == "dropped"


def test_rows_that_are_not_split_yet() -> None:
    manifest, digest = write_dataset(MemoryBlobs(), preprocessing=None, split=None, dropped=None)
    facts = describe(manifest, digest)
    assert (facts.fitted_rows, facts.split, facts.dropped) == (0, {}, {})
    assert [c.name for c in facts.channels] == ["hr", "spo2"]


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=60), st.integers(1, 20))
def test_ranges_hold_every_row_once(lengths: list[int], num: int) -> None:
    ranges = length_ranges(np.array(lengths, np.uint32), num)
    assert len(ranges) <= num
    assert sum(count for *_, count in ranges) == len(lengths)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert ranges[0][0] == min(lengths)
    assert ranges[-1][1] == max(lengths) + 1
    for low, high, count in ranges:
        assert count == sum(low <= length < high for length in lengths)

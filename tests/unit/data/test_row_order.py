"""The order of rows, pieces of like size, and rows copied into place."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from treadle.data.build.reuse import Reused
from treadle.data.order import copy_rows, cut, row_order, starts_of

NAMES = ("length", "entity", "content", "group", "last", "time", "weight", "split")


@st.composite
def columns(draw):
    rows = draw(st.integers(0, 30))
    found = {}
    for name in NAMES:
        values = draw(hnp.arrays(np.uint64, rows, elements=st.integers(0, 2)))
        found[name] = values.astype(np.float64) if name in ("last", "time", "weight") else values
    return found


@given(columns(), st.randoms(use_true_random=False))
def test_rows_are_sorted_by_all_that_is_known_of_them(found, random):
    expected = sorted(zip(*(found[name].tolist() for name in NAMES), strict=True))
    order = row_order(found)
    assert [tuple(found[name][i] for name in NAMES) for i in order] == expected
    shuffled = list(range(len(order)))
    random.shuffle(shuffled)
    other = {name: column[shuffled] for name, column in found.items()}
    assert [tuple(other[name][i] for name in NAMES) for i in row_order(other)] == expected


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 500))
def test_pieces_are_alike_in_size(sizes, target):
    bounds = cut(np.array(sizes, np.int64), target)
    assert bounds[0] == 0
    assert bounds[-1] == len(sizes)
    pieces = [sum(sizes[a:b]) for a, b in pairwise(bounds)]
    assert min(pieces) > 0
    largest = max(sizes)
    if sum(sizes) > 1.5 * target:
        assert max(pieces) <= 1.5 * target + largest
        assert target <= 2 * largest or min(pieces) >= 0.75 * target - largest
    else:
        assert len(pieces) == 1


def test_one_row_above_the_target_does_not_make_empty_pieces():
    assert cut(np.array([1, 1000, 1], np.int64), 10) == [0, 2, 3]
    assert cut(np.zeros(0, np.int64), 10) == [0, 0]


@given(
    st.lists(st.integers(0, 9), max_size=40),
    st.integers(1, 20),
    st.sampled_from([np.float32, np.int32]),
    st.randoms(use_true_random=False),
)
def test_copied_rows_are_those_of_a_loop(lengths, width, dtype, random):
    lengths_R = np.array(lengths, np.int64)
    starts = starts_of(lengths_R)
    source = np.arange(int(starts[-1]) * width).reshape(-1, width).astype(dtype)
    order = list(range(len(lengths)))
    random.shuffle(order)
    if random.random() < 0.5:
        order.sort(key=lambda i: lengths[i])
    expected = np.concatenate([np.zeros((0, width), dtype), *(source[starts[i] : starts[i + 1]] for i in order)])
    out = np.full_like(expected, -1)
    copy_rows(source, starts[:-1][order], lengths_R[order], out)
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("width", [1, 16])
def test_rows_may_be_copied_more_than_once_or_not_at_all(width):
    source = np.arange(12 * width, dtype=np.float32).reshape(12, width)
    out = np.zeros((6, width), np.float32)
    copy_rows(source, np.array([9, 9]), np.array([3, 3]), out)
    assert np.array_equal(out[:3], source[9:])
    assert np.array_equal(out[3:], source[9:])


def test_a_thread_uses_its_memory_again_and_no_other_thread_does():
    reused = Reused()
    first = reused.array("a", (10, 4), np.float32)
    again = reused.array("a", (44,), np.int32)
    assert np.shares_memory(first, again)
    assert not np.shares_memory(first, reused.array("b", (10,), np.float32))
    assert reused.array("a", (1000,), np.float64).shape == (1000,)
    others = []
    thread = threading.Thread(target=lambda: others.append(reused.array("a", (4,), np.float32)))
    thread.start()
    thread.join()
    assert not np.shares_memory(others[0], reused.array("a", (4,), np.float32))

"""Alignments: minimal, complete, and what they are preferred to be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.train.align import align

labels = st.lists(st.integers(0, 4), max_size=12)


def distance(a, b):
    """Levenshtein, row by row."""
    line = list(range(len(b) + 1))
    for i, want in enumerate(a, start=1):
        line, above = [i], line
        for j, got in enumerate(b, start=1):
            line.append(min(above[j] + 1, line[j - 1] + 1, above[j - 1] + (want != got)))
    return line[-1]


@given(labels, labels)
def test_the_unequal_pairs_are_the_distance(reference, answer):
    pairs = align(reference, answer)
    assert sum(want != got for want, got in pairs) == distance(reference, answer)


@given(labels, labels)
def test_the_pairs_hold_both_sequences_whole(reference, answer):
    pairs = align(reference, answer)
    assert [want for want, _ in pairs if want is not None] == reference
    assert [got for _, got in pairs if got is not None] == answer
    assert (None, None) not in pairs


@given(labels)
def test_equal_sequences_pair_up(reference):
    assert align(reference, list(reference)) == [(label, label) for label in reference]


@pytest.mark.parametrize(
    ("reference", "answer", "pairs"),
    [
        ([], [], []),
        ([], [1], [(None, 1)]),
        ([1], [], [(1, None)]),
        ([1, 2, 3], [1, 4, 3], [(1, 1), (2, 4), (3, 3)]),
        ([1, 2], [3, 4], [(1, 3), (2, 4)]),
        ([1, 2, 3], [1, 3], [(1, 1), (2, None), (3, 3)]),
        ([1, 3], [1, 2, 3], [(1, 1), (None, 2), (3, 3)]),
    ],
)
def test_by_hand(reference, answer, pairs):
    assert align(reference, answer) == pairs

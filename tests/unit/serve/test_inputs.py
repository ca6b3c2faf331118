"""What a model cannot take is refused with the place and the reason; nothing is converted."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from served_models import MAX_LENGTH, MOTION, SPELLING, SYLLABLES

from treadle.errors import RequestError
from treadle.serve.inputs import Reader
from treadle.spec import ServeSpec

LIMITS = ServeSpec(max_rows=4, batch_slots=1000, max_queue_slots=60)


def reader(preprocessing, serve=LIMITS):
    return Reader(preprocessing.signature(MAX_LENGTH), preprocessing, serve)


def test_a_text_is_its_characters():
    (row,) = reader(SPELLING).read(["caé"])
    assert row.values.tolist() == [3, 1, 27]
    assert row.length == 3
    assert reader(SPELLING).read([["c", "a", "é"]])[0].values.tolist() == [3, 1, 27]


def test_longer_symbols_come_as_a_list_only():
    assert reader(SYLLABLES).read([["ta", "ka"]])[0].values.tolist() == [2, 1]
    with pytest.raises(RequestError, match=r"^inputs\[0\]: got text, expected a list of symbols"):
        reader(SYLLABLES).read(["taka"])


def test_frames_are_kept_in_order():
    (row,) = reader(MOTION).read([[[1, -2.5, 0], [-0.0, 5e-324, 3e38 / 1e38]]])
    assert row.length == 2
    assert row.values.dtype == np.float32
    assert row.values.tolist() == [1.0, -2.5, 0.0, 0.0, 0.0, 3.0]


@pytest.mark.parametrize("preprocessing", [SPELLING, SYLLABLES, MOTION])
def test_the_example_is_accepted(preprocessing):
    found = reader(preprocessing)
    assert len(found.read([found.example])) == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "inputs: got null, expected a list"),
        ("cat", "inputs: got text, expected a list"),
        ({"0": "cat"}, "inputs: got an object, expected a list"),
        (math.inf, "inputs: got a number, expected a list"),
        ([], "inputs: got 0, expected 1 to 4"),
        (["a"] * 5, "inputs: got 5, expected 1 to 4"),
        ([1], "inputs[0]: got a number"),
        ([None], "inputs[0]: got null"),
        (["a", True], "inputs[1]: got true or false"),
        ([""], "inputs[0]: got 0 time steps, expected 1 to 24"),
        ([[]], "inputs[0]: got 0 time steps, expected 1 to 24"),
        (["a" * 25], "inputs[0]: got 25 time steps, expected 1 to 24 (the model's longest)"),
        (["cat", "do9"], "inputs[1][2]: got symbol '9', expected one of the 27"),
        (["Cat"], "inputs[0][0]: got symbol 'C', expected one of the 27 that the model knows - did you mean 'c'?"),
        ([["c", 1]], "inputs[0][1]: got a number, expected a symbol"),
        ([["c", ["a"]]], "inputs[0][1]: got a list, expected a symbol"),
        ([["c", {}]], "inputs[0][1]: got an object, expected a symbol"),
        ([["<unknown>"]], "inputs[0][0]: got symbol '<unknown>'"),
        ([["ca"]], "inputs[0][0]: got symbol 'ca'"),
        (["\ud800"], r"inputs[0][0]: got symbol '\ud800'"),
        (["\u202e"], r"inputs[0][0]: got symbol '\u202e'"),
    ],
)
def test_refused_symbols(inputs, message):
    with pytest.raises(RequestError) as caught:
        reader(SPELLING).read(inputs)
    assert caught.value.message.startswith(message)
    assert caught.value.status == 422


def test_a_long_symbol_is_not_repeated():
    with pytest.raises(RequestError) as caught:
        reader(SPELLING).read([["x" * 5000]])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ("abc", "inputs[0]: got text, expected a list of 1 to 24 time steps, each a list of 3 numbers"),
        ([1, 2, 3], "inputs[0][0]: got a number, expected a list of 3 numbers"),
        ([[1, 2, 3], "abc"], "inputs[0][1]: got text, expected a list of 3 numbers"),
        ([[1, 2, 3], [1, 2]], "inputs[0][1]: got 2 numbers, expected a list of 3 numbers"),
        ([[1, 2, 3, 4]], "inputs[0][0]: got 4 numbers, expected a list of 3 numbers"),
        ([], "inputs[0]: got 0 time steps"),
        ([[0, 0, 0]] * 25, "inputs[0]: got 25 time steps, expected 1 to 24"),
        ([[1, 2, "3"]], "inputs[0][0][2]: got text, expected a number"),
        ([[1, True, 3]], "inputs[0][0][1]: got true or false, expected a number"),
        ([[1, None, 3]], "inputs[0][0][1]: got null, expected a number"),
        ([[1, [2], 3]], "inputs[0][0][1]: got a list, expected a number"),
        ([[1, math.nan, 3]], "inputs[0][0][1]: got a number that is not finite"),
        ([[1, 2, -math.inf]], "inputs[0][0][2]: got a number that is not finite"),
        ([[1, 2, 1e39]], "inputs[0][0][2]: got a number that is not finite in 32 bits"),
        ([[1, 2e38, 3]], "inputs[0][0][1]: got a number that is not finite in 32 bits"),  # once scaled
        ([[1, 2, 10**400]], "inputs[0]: got a number that is not finite"),
    ],
)
def test_refused_frames(frames, message):
    with pytest.raises(RequestError) as caught:
        reader(MOTION).read([frames])
    assert caught.value.message.startswith(message)
    assert caught.value.status == 422


def test_the_lengths_at_both_ends_are_accepted():
    assert [row.length for row in reader(SPELLING).read(["a", "a" * MAX_LENGTH])] == [1, MAX_LENGTH]


def test_the_tightest_limit_of_a_row_is_named():
    narrow = reader(SPELLING, ServeSpec(batch_slots=5))
    with pytest.raises(RequestError, match=r"got 6 time steps, expected 1 to 5 \(serve.batch_slots\)"):
        narrow.read(["aaaaaa"])


def test_more_than_the_queue_can_ever_hold_is_too_large():
    with pytest.raises(RequestError, match="got 72 time steps, expected at most 60") as caught:
        reader(SPELLING).read(["a" * 24] * 3)
    assert caught.value.status == 413


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@given(JSON)
def test_anything_else_is_a_request_error(value):
    for preprocessing in (SPELLING, SYLLABLES, MOTION):
        with contextlib.suppress(RequestError):
            rows = reader(preprocessing).read(value)
            assert all(1 <= row.length <= MAX_LENGTH and np.isfinite(row.values).all() for row in rows)

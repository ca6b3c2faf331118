"""Rows of a generator in chunks: what is kept, what is said of malformed rows, and that few are held at a time."""

from __future__ import annotations

import dataclasses
import weakref

import numpy as np
import pytest

from treadle.data.chunk import keep_rows, used_names
from treadle.data.draft import Draft, Frames, Labels, Row, Tokens, Values
from treadle.data.sources.rows import DraftSource
from treadle.spec import TargetPer

FRAMES = Frames(channels=("a", "b"))
GOOD = Row(entity="x", inputs=["p", "q"], target="yes", where="f:1")


def chunks(rows, inputs=None, target=None):
    source = DraftSource(Draft(rows=rows, inputs=inputs or Tokens(), target=target, licence="none"))
    return list(source.read(source.parts[0]))


def said(rows, inputs=None, target=None):
    """(number, column, message) of all problems."""
    found = chunks(rows, inputs, target)
    return [(p.number, p.column, p.message) for chunk in found for p in chunk.problems]


def test_tokens_come_out_as_they_went_in():
    rows = [
        Row(entity="a", inputs=["x", "y", "x"], target=["L"], group="g", id="1", where="f:1", split="test", time=3.5),
        Row(entity="b", inputs=("y",), target=["M", "L"], id="2", weight=2),
        Row(entity="c", inputs=np.array(["z"]), target=["M"], id="3"),
    ]
    [chunk] = chunks(rows, target=Labels(per=TargetPer.sequence))
    assert [chunk.symbols[i] for i in chunk.inputs] == ["x", "y", "x", "y", "z"]
    assert chunk.inputs.dtype == np.int32
    assert chunk.lengths_R.tolist() == [3, 1, 1]
    assert [chunk.labels[i] for i in chunk.targets] == ["L", "M", "L", "M"]
    assert chunk.target_lengths_R.tolist() == [1, 2, 1]
    assert chunk.entity_R.to_pylist() == ["a", "b", "c"]
    assert chunk.group_R.to_pylist() == ["g", "b", "c"]
    assert chunk.id_R.to_pylist() == ["1", "2", "3"]
    assert chunk.weight_R.tolist() == [1, 2, 1]
    assert chunk.split_R.tolist() == [2, -1, -1]
    assert np.array_equal(chunk.time_R, [3.5, np.nan, np.nan], equal_nan=True)
    assert chunk.number_R.tolist() == [1, 2, 3]
    assert chunk.times_N is None
    assert not chunk.problems


def test_frames_times_and_values_per_frame():
    rows = [
        Row(entity="a", inputs=[[1, None], [3, 4]], target=[[1.0], [None]], times=[0, 1.5]),
        Row(entity="b", inputs=np.ones((1, 2), np.float16), target=np.array([7]), times=[9]),
    ]
    [chunk] = chunks(rows, FRAMES, Values(names=("v",), per=TargetPer.frame))
    assert np.array_equal(chunk.inputs, np.array([[1, np.nan], [3, 4], [1, 1]], np.float32), equal_nan=True)
    assert np.array_equal(chunk.targets, np.array([[1], [np.nan], [7]], np.float32), equal_nan=True)
    assert chunk.times_N.tolist() == [0, 1.5, 9]


def test_labels_per_frame_may_be_none_and_no_target_at_all():
    [chunk] = chunks([dataclasses.replace(GOOD, target=["A", None])], target=Labels(per=TargetPer.frame))
    assert chunk.targets.tolist() == [0, -1]
    [chunk] = chunks([dataclasses.replace(GOOD, target=None)])
    assert len(chunk.targets) == 0
    assert chunk.target_lengths_R.tolist() == [0]


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        (None, "row", "got NoneType, expected a Row"),
        ({"entity": "x"}, "row", "got dict, expected a Row"),
        (dataclasses.replace(GOOD, entity=None), "entity", "got None, expected text"),
        (dataclasses.replace(GOOD, entity="\ud800"), "entity", "got half a surrogate pair"),
        (dataclasses.replace(GOOD, group=3), "group", "got 3, expected text"),
        (dataclasses.replace(GOOD, id="k"), "id", "got the text 'k', expected None as in the first row"),
        (dataclasses.replace(GOOD, inputs="word"), "inputs", "got the text 'word', expected a list of symbols"),
        (dataclasses.replace(GOOD, inputs=["a", 1]), "inputs", "got 1 at 1, expected a list of symbols"),
        (dataclasses.replace(GOOD, inputs=["a", None]), "inputs", "got None at 1"),
        (dataclasses.replace(GOOD, inputs=["a", "\udc00"]), "inputs", "got half a surrogate pair"),
        (dataclasses.replace(GOOD, inputs=None), "inputs", "got None, expected a list of symbols"),
        (dataclasses.replace(GOOD, target=["yes"]), "target", "got a list, expected a label"),
        (dataclasses.replace(GOOD, target=None), "target", "got None, expected a label"),
        (dataclasses.replace(GOOD, times=[1, 2]), "times", "got times, expected None as in the first row"),
        (dataclasses.replace(GOOD, time="now"), "time", "got the text 'now', expected a number"),
        (dataclasses.replace(GOOD, weight=None), "weight", "got None, expected a number"),
        (dataclasses.replace(GOOD, weight=True), "weight", "got True, expected a number"),
        (dataclasses.replace(GOOD, split="dev"), "split", "got the text 'dev', expected train, valid, test or None"),
        (dataclasses.replace(GOOD, where=3), "where", "got 3, expected text"),
    ],
)
def test_a_malformed_row_is_a_problem_and_stops_no_other(row, column, message):
    [chunk] = chunks([GOOD, row, GOOD], target=Labels())
    assert chunk.number_R.tolist() == [1, 3]
    [problem] = chunk.problems
    assert (problem.number, problem.column) == (2, column)
    assert message in problem.message
    assert str(problem).encode()
    if column == "weight":
        assert str(problem) == f"f:1 ('x'): weight: {problem.message}"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((3, 3)), "got shape [3, 3], expected [T, 2]"),
        (np.ones(3), "got shape [3], expected [T, 2]"),
        ([[1, 2], [3]], "got a list, expected numbers of the shape [T, 2]"),
        ([["1", "2"]], "got a list, expected numbers"),
        (np.array([[object(), 1]]), "got an array of object"),
        (np.array([["a", "b"]]), "got an array of <U1"),
        ("ab", "got the text 'ab'"),
        (None, "got None"),
    ],
)
def test_frames_of_a_wrong_form(inputs, message):
    [(number, column, seen)] = said([Row(entity="e", inputs=inputs)], FRAMES)
    assert (number, column) == (1, "inputs")
    assert message in seen


def test_times_and_targets_of_a_wrong_form():
    frames = np.zeros((2, 2))
    per_row, per_frame = Values(names=("u", "v")), Values(names=("u", "v"), per=TargetPer.frame)
    assert said([Row(entity="e", inputs=frames, times=[1])], FRAMES) == [
        (1, "times", "got 1, expected one for each of 2 frames")
    ]
    assert said([Row(entity="e", inputs=frames, times=[[1, 2]])], FRAMES)[0][2] == "got shape [1, 2], expected [T]"
    timed = Row(entity="e", inputs=frames, times=[1, 2])
    assert said([timed, Row(entity="e", inputs=frames)], FRAMES)[0][:2] == (2, "times")
    assert said([Row(entity="e", inputs=frames, target=[1])], FRAMES, per_row)[0][2] == "got shape [1], expected [2]"
    assert said([Row(entity="e", inputs=frames, target=[1])], FRAMES, per_frame)[0][2].startswith("got shape [1]")
    assert said([Row(entity="e", inputs=frames, target="x")], FRAMES)[0][1] == "target"
    sequence = Labels(per=TargetPer.sequence)
    [(_, _, message)] = said([Row(entity="e", inputs=["a"], target="AB")], Tokens(), sequence)
    assert message == "got the text 'AB', expected a list of labels, as ['AB']"
    keyed = Row(entity="e", inputs=["a"], id="1")
    assert said([keyed, dataclasses.replace(keyed, id=None)]) == [
        (2, "id", "got None, expected one as in the first row")
    ]


def test_all_fields_of_a_row_are_complained_of_at_once():
    rows = [Row(entity="e", inputs="text", target=3, times=[1])]
    assert [column for _, column, _ in said([dataclasses.replace(rows[0], times=None), *rows], target=Labels())] == [
        "inputs",
        "target",
        "inputs",
        "target",
        "times",
    ]


def test_chunks_are_bounded_and_rows_are_taken_as_they_are_needed():
    taken = 0

    def rows():
        nonlocal taken
        for i in range(200):
            taken += 1
            yield Row(entity=str(i), inputs=np.zeros((2000, 16), np.float32))

    source = DraftSource(Draft(rows=rows(), inputs=Frames(channels=tuple("abcdefghijklmnop")), target=None, licence=""))
    assert taken == 1
    found = source.read(source.parts[0])
    first = next(found)
    assert first.num_rows == taken == 33  # 4 MiB
    assert first.inputs.shape == (33 * 2000, 16)
    assert 33 + sum(chunk.num_rows for chunk in found) == 200


def test_a_row_of_a_million_frames_is_a_chunk_of_its_own():
    rows = [Row(entity="e", inputs=np.zeros((1_000_000, 2), np.float32))] * 2
    assert [chunk.lengths_R.tolist() for chunk in chunks(rows, FRAMES)] == [[1_000_000], [1_000_000]]


def test_nothing_gives_no_chunk_and_a_generator_that_raises_is_heard():
    assert chunks([]) == []

    def broken():
        yield GOOD
        raise KeyError("of the script")

    with pytest.raises(KeyError):
        chunks(broken(), target=Labels())


def test_rows_that_are_too_much_for_float32_become_infinite():
    [chunk] = chunks([Row(entity="e", inputs=[[1e300, 0]], weight=1e300)], FRAMES)
    assert chunk.inputs[0, 0] == np.inf
    assert chunk.weight_R[0] == np.inf


def test_rows_that_are_dropped_take_their_names_along():
    rows = [Row(entity=e, inputs=list(e), target=list(e.upper()), times=None) for e in ("ab", "cd", "da")]
    [chunk] = chunks(rows, target=Labels(per=TargetPer.sequence))
    kept = keep_rows(chunk, np.array([True, False, True]))
    assert kept.symbols == ("a", "b", "d")
    assert [kept.symbols[i] for i in kept.inputs] == list("abda")
    assert [kept.labels[i] for i in kept.targets] == list("ABDA")
    assert kept.entity_R.to_pylist() == ["ab", "da"]
    assert keep_rows(chunk, np.ones(3, bool)) is chunk
    ids, names = used_names(np.array([2, -1, 0], np.int32), ("x", "y", "z"))
    assert (ids.tolist(), names) == ([1, -1, 0], ("x", "z"))


def test_a_generator_may_fill_one_buffer_for_all_rows():
    def rows():
        inputs, target, times = np.zeros((2, 2), np.float32), np.zeros(1, np.float32), np.zeros(2)
        for i in range(3):
            inputs[:], target[:], times[:] = i, 10 + i, 20 + i
            yield Row(entity=str(i), inputs=inputs, target=target, times=times)

    [chunk] = chunks(rows(), FRAMES, Values(names=("v",)))
    assert chunk.inputs[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert chunk.targets.tolist() == [[10], [11], [12]]
    assert chunk.times_N.tolist() == [20, 20, 21, 21, 22, 22]


def test_large_arrays_are_not_held_for_a_view_of_them():
    held = []

    def rows():
        for _ in range(4):
            large = np.zeros((100_000, 2), np.float32)
            held.append(weakref.ref(large))
            yield Row(entity="e", inputs=large[:2])
            del large

    seen = DraftSource(Draft(rows=rows(), inputs=FRAMES, target=None, licence=""))
    [chunk] = seen.read(seen.parts[0])
    assert chunk.num_rows == 4
    assert sum(ref() is not None for ref in held) <= 1


@pytest.mark.parametrize("dtype", [np.float32, np.int64, object])
def test_what_is_masked_is_missing(dtype):
    masked = np.ma.masked_array(np.array([[1, -9999], [3, 4]], dtype), mask=[[0, 1], [0, 0]])
    for inputs in (masked, list(masked), tuple(masked)):
        [chunk] = chunks([Row(entity="e", inputs=inputs, target=masked[0])], FRAMES, Values(names=("u", "v")))
        assert np.array_equal(chunk.inputs, [[1, np.nan], [3, 4]], equal_nan=True)
        assert np.array_equal(chunk.targets, [[1, np.nan]], equal_nan=True)
    assert said([Row(entity="e", inputs=np.ma.masked_array(["a"], mask=[1]))], FRAMES)[0][1] == "inputs"


def test_no_zero_of_a_row_is_negative():
    rows = [Row(entity="e", inputs=[[0, 0]], times=[-0.0], time=-0.0, weight=-0.0)]
    [chunk] = chunks(rows, FRAMES)
    for array in (chunk.times_N, chunk.time_R, chunk.weight_R):
        assert not np.signbit(array).any()

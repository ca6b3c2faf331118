"""What rows must keep to, rule by rule, and that a sound chunk is handed on as it is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.data.build.check import check_chunk
from treadle.data.build.facts import gaps_of
from treadle.data.chunk import Chunk, Problem, Schema
from treadle.data.draft import Frames, Labels, Tokens, Values
from treadle.spec import TargetPer

NAN, INF = np.nan, np.inf


def frames_chunk(rows, **fields):
    """A chunk of rows, each a list of frames."""
    lengths = np.array([len(row) for row in rows], np.int64)
    flat = np.array([frame for row in rows for frame in row], np.float32).reshape(-1, 2)
    return chunk_of(lengths, flat, (), **fields)


def tokens_chunk(rows, **fields):
    symbols = tuple(dict.fromkeys(s for row in rows for s in row if s is not None))
    ids = [-1 if s is None else symbols.index(s) for row in rows for s in row]
    return chunk_of(np.array([len(row) for row in rows], np.int64), np.array(ids, np.int32), symbols, **fields)


def chunk_of(lengths, inputs, symbols, **fields):
    num = len(lengths)
    plain = Chunk(
        file="f.parquet",
        number_R=np.arange(1, num + 1),
        lengths_R=lengths,
        inputs=inputs,
        symbols=symbols,
        target_lengths_R=np.zeros(num, np.int64),
        targets=np.zeros(0, np.int32),
        labels=(),
        times_N=None,
        entity_R=pa.array([f"e{i}" for i in range(num)], pa.string()),
        group_R=None,
        id_R=None,
        time_R=np.full(num, NAN),
        weight_R=np.ones(num, np.float32),
        split_R=np.full(num, -1, np.int8),
    )
    return dataclasses.replace(plain, **fields)


def check(chunk, *, inputs=None, target=None, timed=False, max_length=1000):
    schema = Schema(inputs=inputs or Frames(channels=("a", "b")), target=target, timed=timed)
    good, problems = check_chunk(chunk, schema, max_length=max_length)
    return good, [(p.number, p.column, p.message) for p in problems]


ONE = [[1.0, 2.0], [3.0, 4.0]]


def test_a_sound_chunk_is_handed_on_as_it_is():
    chunk = frames_chunk([ONE, ONE, ONE[:1]])
    good, problems = check(chunk)
    assert good is chunk
    assert problems == []


@pytest.mark.parametrize("seen", [NAN, INF, -INF])
@pytest.mark.parametrize("rows_before", [0, 3, 4000])
def test_numbers_that_are_not_finite(seen, rows_before):
    rows = [ONE] * rows_before + [[[0, 1], [2, seen], [seen, seen]]] + [ONE]
    good, problems = check(frames_chunk(rows))
    number = rows_before + 1
    assert problems == [
        (number, "inputs", f"got {seen} at frame 2, channel 'a', expected a finite number"),
        (number, "inputs", f"got {seen} at frame 1, channel 'b', expected a finite number (and 1 more of this row)"),
    ]
    assert good.num_rows == rows_before + 1
    assert np.isfinite(good.inputs).all()


def test_missing_values_where_they_are_allowed():
    inputs = Frames(channels=("a", "b"), missing=True, lower={"b": 0}, upper={"b": 5})
    chunk = frames_chunk([[[NAN, 1], [NAN, NAN]], [[NAN, NAN]]])
    assert check(chunk, inputs=inputs) == (chunk, [])
    good, problems = check(frames_chunk([[[NAN, 1], [INF, NAN]], [[NAN, 6], [NAN, NAN]], [[1, 1]]]), inputs=inputs)
    assert problems == [
        (1, "inputs", "got inf at frame 1, channel 'a', expected a finite number or NaN"),
        (2, "inputs", "got 6 at frame 0, channel 'b', expected at most 5"),
    ]
    assert good.entity_R.to_pylist() == ["e2"]


def test_limits_of_a_channel():
    inputs = Frames(channels=("a", "b"), lower={"a": 0.1}, upper={"b": 4})
    rows = [[[0.1, 4]], [[0.0, 9], [0.5, 5], [-1, 0]], ONE]
    good, problems = check(frames_chunk(rows), inputs=inputs)
    assert problems == [
        (2, "inputs", "got 0 at frame 0, channel 'a', expected at least 0.1 (and 1 more of this row)"),
        (2, "inputs", "got 9 at frame 0, channel 'b', expected at most 4 (and 1 more of this row)"),
    ]
    assert good.lengths_R.tolist() == [1, 2]


def test_a_limit_that_float32_cannot_hold_does_not_cut_off_its_own_value():
    chunk = frames_chunk([[[0.1, 0.3]]])
    inputs = Frames(channels=("a", "b"), lower={"a": 0.1, "b": 0.3}, upper={"a": 0.1, "b": 0.3})
    assert check(chunk, inputs=inputs) == (chunk, [])


def test_lengths():
    good, problems = check(frames_chunk([ONE, [], ONE * 3]), max_length=5)
    assert problems == [
        (2, "inputs", "got no frame, expected at least one"),
        (3, "inputs", "got 6 frames, expected at most data.max_length = 5"),
    ]
    assert good.lengths_R.tolist() == [2]
    assert check(frames_chunk([[]]))[0].num_rows == 0


def test_a_row_of_a_million_frames_with_one_bad_value():
    values = np.zeros((1_000_003, 2), np.float32)
    values[-2, 1] = NAN
    good, problems = check(chunk_of(np.array([2, 1_000_000, 1]), values, ()), max_length=10**6)
    assert problems == [(2, "inputs", "got nan at frame 999999, channel 'b', expected a finite number")]
    assert good.lengths_R.tolist() == [2, 1]
    assert check(chunk_of(np.array([2, 1_000_000, 1]), values, ()), max_length=999_999)[1][0][2].startswith(
        "got 1000000 frames"
    )


@pytest.mark.parametrize("num", [1, 2047, 2048, 2049, 4096, 6000])
@pytest.mark.parametrize("missing", [False, True])
def test_no_frame_is_overlooked_wherever_it_stands(num, missing):
    values = np.zeros((num, 2), np.float32)
    inputs = Frames(channels=("a", "b"), missing=missing, lower={"b": -1}, upper={"b": 1})
    for at in {0, num // 2, num - 1, *(k for k in (2047, 2048, 4095, 4096) if k < num)}:
        for seen in (9.0, -9.0, INF):
            values[at, 1] = seen
            [(_, _, message)] = check(chunk_of(np.array([num]), values, ()), inputs=inputs, max_length=num)[1]
            assert message.startswith(f"got {seen:g} at frame {at}, channel 'b', expected")
        values[at, 1] = 0


def test_symbols_outside_a_closed_vocabulary():
    rows = [["cat", "dog"], ["cat", "dgo", "dgo"], [None], []]
    good, problems = check(tokens_chunk(rows), inputs=Tokens(vocabulary=("cat", "dog")))
    assert [(number, column) for number, column, _ in problems] == [(2, "inputs"), (3, "inputs"), (4, "inputs")]
    assert problems[0][2] == (
        "got 'dgo', expected one of the 2 symbols ('cat', 'dog') - did you mean 'dog'? at 1 (and 1 more of this row)"
    )
    assert problems[1][2] == "got null at 0, expected a symbol"
    assert good.symbols == ("cat", "dog")
    assert good.inputs.tolist() == [0, 1]
    assert check(tokens_chunk(rows[:2]), inputs=Tokens())[1] == []


def labelled(rows_of_labels, per_frame=False, **fields):
    labels = tuple(dict.fromkeys(s for row in rows_of_labels for s in row if s is not None))
    ids = np.array([-1 if s is None else labels.index(s) for row in rows_of_labels for s in row], np.int32)
    counts = np.array([len(row) for row in rows_of_labels], np.int64)
    return frames_chunk([ONE] * len(rows_of_labels), targets=ids, target_lengths_R=counts, labels=labels, **fields)


def test_labels():
    closed = Labels(names=("yes", "no"))
    good, problems = check(labelled([["yes"], ["maybe"], [None], ["no"]]), target=closed)
    assert problems == [
        (2, "target", "got label 'maybe', expected one of the 2 labels ('yes', 'no') at 0"),
        (3, "target", "got null at 0, expected a label"),
    ]
    assert good.labels == ("yes", "no")
    sequence = Labels(per=TargetPer.sequence)
    good, problems = check(labelled([["a", "b"], [], ["c"]]), target=sequence)
    assert problems == [(2, "target", "got no label, expected at least one")]
    assert [good.labels[i] for i in good.targets] == ["a", "b", "c"]
    good, problems = check(labelled([["a", None], ["a"], [None, None]]), target=Labels(per=TargetPer.frame))
    assert problems == [(2, "target", "got 1 targets, expected one for each of 2 frames")]
    assert good.targets.tolist() == [0, -1, -1, -1]


def test_values():
    def valued(values, counts):
        values = np.array(values, np.float32).reshape(-1, 1)
        return frames_chunk([ONE] * len(counts), targets=values, target_lengths_R=np.array(counts))

    row = Values(names=("v",), upper={"v": 9})
    _, problems = check(valued([1, NAN, 10, INF], [1] * 4), target=row)
    assert problems == [
        (2, "target", "got nan at frame 0, value 'v', expected a finite number"),
        (3, "target", "got 10 at frame 0, value 'v', expected at most 9"),
        (4, "target", "got inf at frame 0, value 'v', expected a finite number"),
    ]
    frame = dataclasses.replace(row, per=TargetPer.frame)
    good, problems = check(valued([1, NAN, INF, 2, 3], [2, 2, 1]), target=frame)
    assert [number for number, _, _ in problems] == [2, 3]
    assert good.num_rows == 1


def test_times():
    chunk = frames_chunk([ONE, ONE, ONE, ONE], times_N=np.array([5, 5, 1, 2, 4, 3, 1, NAN]))
    good, problems = check(chunk, timed=True)
    assert problems == [
        (3, "times", "got 3.0 at frame 1 after 4.0, expected times that never fall"),
        (4, "times", "got nan at frame 1, expected a finite number"),
    ]
    assert good.times_N.tolist() == [5, 5, 1, 2]
    infinite = dataclasses.replace(chunk, times_N=np.array([1, INF, -INF, 1, INF, INF, 0, 0]))
    assert [number for number, _, _ in check(infinite, timed=True)[1]] == [1, 2, 3]


def test_gaps_that_float32_cannot_hold():
    most = float(np.finfo(np.float32).max)
    times = [0, 1e39, 0, most, -1e308, 1e308, 1, INF, INF, 1, -3e38, 3e38]
    good, problems = check(frames_chunk([ONE] * 6, times_N=np.array(times)), timed=True)
    wide = "expected at most 3.40282e+38 between them"
    assert problems == [
        (1, "times", f"got 1e+39 at frame 1 after 0.0, {wide}"),
        (3, "times", f"got 1e+308 at frame 1 after -1e+308, {wide}"),
        (4, "times", "got inf at frame 1, expected a finite number"),
        (5, "times", "got inf at frame 0, expected a finite number"),
        (5, "times", "got 1.0 at frame 1 after inf, expected times that never fall"),
        (6, "times", f"got 3e+38 at frame 1 after -3e+38, {wide}"),
    ]
    assert np.isfinite(gaps_of(good.times_N, np.array([0, 2]))).all()


def test_times_beside_rows_without_frames():
    chunk = frames_chunk([[], ONE, [], ONE, []], times_N=np.array([5, 6, 1, 2]))
    assert [number for number, _, _ in check(chunk, timed=True)[1]] == [1, 3, 5]


def test_scalars():
    chunk = frames_chunk(
        [ONE] * 6,
        entity_R=pa.array(["a", None, "", "d", "e", "f"]),
        id_R=pa.array(["1", "2", "3", None, "5", "6"]),
        weight_R=np.array([0, 1, 1, 1, -1, NAN], np.float32),
        time_R=np.array([1, NAN, 1, 1, INF, 1]),
    )
    good, problems = check(chunk)
    assert good.entity_R.to_pylist() == ["a"]
    assert problems == [
        (2, "entity", "got None, expected text"),
        (3, "entity", "got '', expected text"),
        (4, "id", "got None, expected text"),
        (5, "weight", "got -1.0, expected a finite number from 0 up"),
        (5, "time", "got inf, expected a finite number"),
        (6, "weight", "got nan, expected a finite number from 0 up"),
    ]
    sliced = dataclasses.replace(frames_chunk([ONE] * 2), entity_R=pa.array(["", "a", "b", ""]).slice(1, 2))
    assert check(sliced) == (sliced, [])


def test_problems_of_reading_are_handed_on_in_order():
    before = Problem(file="f", number=1, column="line", message="got 2 cells, expected 3")
    chunk = frames_chunk([ONE, []], number_R=np.array([0, 2]), problems=(before,))
    good, problems = check_chunk(
        chunk, Schema(inputs=Frames(channels=("a", "b")), target=None, timed=False), max_length=9
    )
    assert good.problems == ()
    assert [p.number for p in problems] == [1, 2]
    assert str(problems[0]) == "f:1: line: got 2 cells, expected 3"
    assert str(problems[1]) == "f.parquet:2 ('e1'): inputs: got no frame, expected at least one"


@settings(max_examples=60)
@given(st.data())
def test_what_is_kept_is_what_a_loop_keeps(data):
    number = st.sampled_from([0.0, 1.0, -2.0, 7.0, NAN, INF])
    rows = data.draw(st.lists(st.lists(st.tuples(number, number), max_size=4), min_size=1, max_size=12))
    missing = data.draw(st.booleans())
    inputs = Frames(channels=("a", "b"), missing=missing, upper={"a": 5})

    def fine(row):
        a, b = np.array(row).T if row else ([NAN], [NAN])
        known = np.array([*a, *b])
        known = known[~np.isnan(known)] if missing else known
        return 0 < len(row) <= 3 and np.isfinite(known).all() and not (np.array(a) > 5).any()

    good, problems = check(frames_chunk(rows), inputs=inputs, max_length=3)
    kept = [i for i, row in enumerate(rows) if fine(row)]
    assert (good.number_R - 1).tolist() == kept
    assert {number for number, _, _ in problems} == {i + 1 for i in range(len(rows))} - {i + 1 for i in kept}
    expected = np.array([f for i in kept for f in rows[i]], np.float32).reshape(-1, 2)
    assert np.array_equal(good.inputs, expected, equal_nan=True)

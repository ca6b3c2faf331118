"""Declared sources: every format gives the same rows, and what is wrong is said with its file and its line."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import http.server
import json
import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.data.chunk import CHUNK_BYTES
from treadle.data.draft import Draft, Frames, Labels, Row, Tokens, Values
from treadle.data.sources import tables
from treadle.data.sources.declared import open_source
from treadle.data.sources.files import digests_of, find_files
from treadle.data.sources.rows import DraftSource
from treadle.errors import ConfigError, DataError, IntegrityError
from treadle.spec import ColumnsSpec, DataSpec, Format, Missing, TargetPer

NAN = np.nan


def opened(path, columns=None, tmp=None, **data):
    spec = DataSpec(name="toy", source=str(path), **data)
    return open_source(spec, columns or COLUMNS, scratch=tmp or path.parent / "scratch")


def chunks_of(source):
    return [chunk for part in source.parts for chunk in source.read(part)]


def rows_of(source):
    """Every row as (entity, number, length, inputs, targets, times, other fields), and all problems."""
    chunks = chunks_of(source)
    return [row for chunk in chunks for row in unpacked(chunk)], [p for chunk in chunks for p in chunk.problems]


def unpacked(chunk):
    ends, target_ends = np.cumsum(chunk.lengths_R), np.cumsum(chunk.target_lengths_R)
    for i in range(chunk.num_rows):
        inputs = chunk.inputs[ends[i] - chunk.lengths_R[i] : ends[i]]
        targets = chunk.targets[target_ends[i] - chunk.target_lengths_R[i] : target_ends[i]]
        times = () if chunk.times_N is None else chunk.times_N[ends[i] - chunk.lengths_R[i] : ends[i]]
        yield {
            "entity": chunk.entity_R[i].as_py(),
            "number": int(chunk.number_R[i]),
            "inputs": [chunk.symbols[k] for k in inputs] if chunk.symbols else inputs.tolist(),
            "targets": [chunk.labels[k] if k >= 0 else None for k in targets] if chunk.labels else targets.tolist(),
            "times": list(times),
            "group": None if chunk.group_R is None else chunk.group_R[i].as_py(),
            "id": None if chunk.id_R is None else chunk.id_R[i].as_py(),
            "time": float(chunk.time_R[i]),
            "weight": float(chunk.weight_R[i]),
            "split": int(chunk.split_R[i]),
        }


def same(a, b):
    """Equal, NaN to NaN."""
    return repr(a) == repr(b)


# --- the same rows in every form

COLUMNS = ColumnsSpec(
    entity="who",
    group="family",
    id="key",
    inputs=["x"],
    target=["y"],
    times="when",
    time="asked",
    weight="w",
    split="s",
)


def written(path, table, form):
    """The table at `path`, in a form."""
    if form == "parquet":
        pq.write_table(table, path / "t.parquet", row_group_size=3)
        return path / "t.parquet"
    if form == "arrow":
        with pa.ipc.new_file(str(path / "t.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
        return path / "t.arrow"
    if form == "stream":
        with pa.ipc.new_stream(str(path / "t.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
        return path / "t.arrow"
    if form == "jsonl":
        (path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        return path / "t.jsonl"
    cells = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in table.to_pylist()]
    lines = [",".join(table.column_names)]
    lines += [
        ",".join('"' + str(v).replace('"', '""') + '"' if v is not None else "" for v in c.values()) for c in cells
    ]
    (path / "t.csv").write_text("\n".join(lines) + "\n")
    return path / "t.csv"


FORMS = ("parquet", "arrow", "stream", "jsonl", "csv")
number = st.floats(-1e6, 1e6, width=32)
name = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1, max_size=5)


@st.composite
def frame_rows(draw):
    rows = []
    for i in range(draw(st.integers(1, 9))):
        length = draw(st.integers(1, 5))
        rows.append(
            {
                "who": draw(name),
                "family": draw(st.none() | name),
                "key": f"k{i}",
                "x": [[draw(number), draw(number)] for _ in range(length)],
                "y": draw(st.sampled_from(["yes", "no", "may be"])),
                "when": sorted(draw(number) for _ in range(length)),
                "asked": draw(st.none() | number),
                "w": draw(st.floats(0, 9, width=16)),
                "s": draw(st.sampled_from(["train", "valid", "test", None])),
            }
        )
    return rows


FRAME_TABLE = pa.schema(
    [
        ("who", pa.string()),
        ("family", pa.string()),
        ("key", pa.string()),
        ("x", pa.list_(pa.list_(pa.float32()))),
        ("y", pa.string()),
        ("when", pa.list_(pa.float64())),
        ("asked", pa.float64()),
        ("w", pa.float64()),
        ("s", pa.string()),
    ]
)


@settings(max_examples=25)
@given(rows=frame_rows())
def test_frames_are_the_same_from_every_form_and_from_a_generator(rows, tmp_path_factory):
    table = pa.Table.from_pylist(rows, FRAME_TABLE)
    draft = Draft(
        rows=(
            Row(
                entity=r["who"],
                group=r["family"],
                id=r["key"],
                inputs=r["x"],
                target=r["y"],
                times=r["when"],
                time=r["asked"],
                weight=r["w"],
                split=r["s"],
            )
            for r in rows
        ),
        inputs=Frames(channels=("x0", "x1")),
        target=Labels(),
        licence="none",
    )
    expected, _ = rows_of(DraftSource(draft))
    if all(row["group"] is None or row["group"] == row["entity"] for row in expected):
        expected = [row | {"group": row["entity"]} for row in expected]
    for form in FORMS:
        source = opened(written(tmp_path_factory.mktemp("t"), table, form))
        assert source.schema.inputs == Frames(channels=("x0", "x1"))
        assert source.schema.target == Labels()
        assert source.schema.timed
        found, problems = rows_of(source)
        assert problems == []
        first = 2 if form == "csv" else 1
        assert [row["number"] for row in found] == list(range(first, first + len(rows)))
        for seen, due in zip(found, expected, strict=True):
            assert same(seen | {"number": 0}, due | {"number": 0}), form


@settings(max_examples=25)
@given(rows=st.lists(st.tuples(name, st.lists(name, min_size=1, max_size=6), st.lists(name, min_size=1)), min_size=1))
def test_tokens_are_the_same_from_every_form_and_from_a_generator(rows, tmp_path_factory):
    columns = ColumnsSpec(entity="who", inputs=["x"], target=["y"], target_per=TargetPer.sequence)
    table = pa.table(
        {"who": [r[0] for r in rows], "x": [r[1] for r in rows], "y": [r[2] for r in rows]},
        schema=pa.schema([("who", pa.string()), ("x", pa.list_(pa.string())), ("y", pa.list_(pa.string()))]),
    )
    draft = Draft(
        rows=[Row(entity=w, inputs=x, target=y) for w, x, y in rows],
        inputs=Tokens(),
        target=Labels(per=TargetPer.sequence),
        licence="none",
    )
    expected, _ = rows_of(DraftSource(draft))
    assert [(r["inputs"], r["targets"]) for r in expected] == [(x, y) for _, x, y in rows]
    for form in FORMS:
        source = opened(written(tmp_path_factory.mktemp("t"), table, form), columns)
        found, problems = rows_of(source)
        assert problems == []
        for seen, due in zip(found, expected, strict=True):
            assert same(seen | {"number": 0}, due | {"number": 0}), form


# --- columns of every type


def table_at(tmp_path, columns, **spec):
    """A source of one Arrow file with such columns."""
    path = written(tmp_path, pa.table(columns), "arrow")
    return opened(path, ColumnsSpec(**spec), **spec.pop("data", {}))


F3 = pa.array([[[1, 2, 3], [4, 5, 6]], [[7, 8, 9]]], pa.list_(pa.list_(pa.float32(), 3)))


@pytest.mark.parametrize(
    "type_",
    [
        pa.list_(pa.list_(pa.float32(), 3)),
        pa.large_list(pa.list_(pa.float64())),
        pa.list_(pa.large_list(pa.float16())),
        pa.list_(pa.list_(pa.int16(), 3)),
        pa.large_list_view(pa.list_(pa.float32())),
        pa.list_(pa.list_(pa.decimal128(5, 1), 3)),
    ],
)
def test_frames_of_every_type(tmp_path, type_):
    array = pa.array([[[1, 2, 3], [4, 5, 6]], [[7, 8, 9]]], type_)
    found, _ = rows_of(table_at(tmp_path, {"x": array}, inputs=["x"]))
    assert [row["inputs"] for row in found] == F3.to_pylist()
    assert [row["entity"] for row in found] == ["1", "2"]


def test_channels_in_columns_of_their_own(tmp_path):
    a, b = [[1, 2], [3]], [[1.5, None], [2.5]]
    source = table_at(
        tmp_path,
        {"a": pa.array(a, pa.list_(pa.int8())), "b": pa.array(b, pa.large_list(pa.float64()))},
        inputs=["a", "b"],
        lower={"a": 0},
        upper={"b": 9},
    )
    assert source.schema.inputs == Frames(channels=("a", "b"), lower={"a": 0}, upper={"b": 9})
    found, _ = rows_of(source)
    assert same([row["inputs"] for row in found], [[[1.0, 1.5], [2.0, NAN]], [[3.0, 2.5]]])


def test_one_channel_ids_and_text(tmp_path):
    floats = pa.array([[1, 2], [3]], pa.list_(pa.float32()))
    source = table_at(tmp_path, {"x": floats}, inputs=["x"])
    assert source.schema.inputs == Frames(channels=("x",))
    assert rows_of(source)[0][0]["inputs"] == [[1.0], [2.0]]
    for type_ in (pa.int64(), pa.uint8()):
        source = table_at(tmp_path, {"x": pa.array([[10, 2], [3, 10]], pa.list_(type_))}, inputs=["x"])
        assert source.schema.inputs == Tokens()
        assert [row["inputs"] for row in rows_of(source)[0]] == [["10", "2"], ["3", "10"]]
    texts = ["  the cat\tsat ", "", "\u00e9 x", None]
    source = table_at(tmp_path, {"x": texts}, inputs=["x"], symbols=["the", "cat"])
    assert source.schema.inputs == Tokens(vocabulary=("the", "cat"))
    found, problems = rows_of(source)
    assert [row["inputs"] for row in found] == [["the", "cat", "sat"], [], ["\u00e9", "x"]]
    assert [(p.number, p.message) for p in problems] == [(4, "got null, expected a list")]


def test_dictionaries_nulls_and_symbols_that_do_not_occur(tmp_path):
    words = pa.array(["a", None, "c", "a", "b"]).dictionary_encode()
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 4], pa.int32()), words)
    source = table_at(
        tmp_path, {"x": lists, "e": pa.array(["p", "q", "p"]).dictionary_encode()}, inputs=["x"], entity="e"
    )
    [chunk] = chunks_of(source)
    assert chunk.symbols == ("a", "c")
    assert chunk.inputs.tolist() == [0, -1, 1, 0]
    assert chunk.entity_R.to_pylist() == ["p", "q", "p"]


@settings(max_examples=40)
@given(
    rows=st.lists(st.none() | st.lists(st.none() | st.tuples(number, number), max_size=4), min_size=1, max_size=12),
    data=st.data(),
    large=st.booleans(),
    fixed=st.booleans(),
)
def test_slices_and_nulls_of_lists(rows, data, large, fixed, tmp_path_factory):
    inner = pa.list_(pa.float32(), 2) if fixed else pa.list_(pa.float32())
    array = pa.array(rows, pa.large_list(inner) if large else pa.list_(inner))
    start = data.draw(st.integers(0, len(rows) - 1))
    batch = pa.record_batch({"x": array}).slice(start, data.draw(st.integers(1, len(rows) - start)))
    due = rows[start : start + batch.num_rows]
    from treadle.data.chunk import Schema
    from treadle.data.sources.columns import Reading, to_chunk

    schema = Schema(inputs=Frames(channels=("x0", "x1")), target=None, timed=False)
    reading = Reading(columns=ColumnsSpec(inputs=["x"]), schema=schema, first="f", several=False)
    chunk = to_chunk(tables.Piece(batch=batch, number_R=np.arange(len(due))), "f", reading)
    kept = [row for row in due if row is not None]
    flat = np.array([f or (NAN, NAN) for row in kept for f in row], np.float32).reshape(-1, 2)
    assert chunk.lengths_R.tolist() == [len(row) for row in kept]
    assert np.array_equal(chunk.inputs, flat, equal_nan=True)
    assert len(chunk.problems) == len(due) - len(kept)


def test_arrow_frames_are_views_of_the_file(tmp_path):
    source = table_at(tmp_path, {"x": F3}, inputs=["x"])
    [chunk] = chunks_of(source)
    assert not chunk.inputs.flags.owndata
    assert not chunk.inputs.flags.writeable


@pytest.mark.parametrize(
    ("per", "column", "due", "target"),
    [
        (TargetPer.row, ["u", "v"], [["u"], ["v"]], Labels()),
        (TargetPer.row, [3, 7], [["3"], ["7"]], Labels()),
        (TargetPer.row, [True, False], [["true"], ["false"]], Labels()),
        (TargetPer.row, [0.5, 1.5], [[[0.5]], [[1.5]]], Values(names=("y",))),
        (TargetPer.row, [[0.5, 1.0], [1.5, 2.0]], [[[0.5, 1.0]], [[1.5, 2.0]]], Values(names=("y0", "y1"))),
        (TargetPer.frame, [["u", None], ["v"]], [["u", None], ["v"]], Labels(per=TargetPer.frame)),
        (
            TargetPer.frame,
            [[0.5, None], [1.0]],
            [[[0.5], [NAN]], [[1.0]]],
            Values(names=("y",), per=TargetPer.frame),
        ),
        (
            TargetPer.frame,
            [[[0.5, 1], [2, 3]], [[4, 5]]],
            [[[0.5, 1.0], [2.0, 3.0]], [[4.0, 5.0]]],
            Values(names=("y0", "y1"), per=TargetPer.frame),
        ),
        (TargetPer.sequence, [["u", "v", "u"], []], [["u", "v", "u"], []], Labels(per=TargetPer.sequence)),
        (TargetPer.sequence, ["u v  u", "v"], [["u", "v", "u"], ["v"]], Labels(per=TargetPer.sequence)),
    ],
)
def test_targets_of_every_kind(tmp_path, per, column, due, target):
    source = table_at(tmp_path, {"x": F3, "y": pa.array(column)}, inputs=["x"], target=["y"], target_per=per)
    assert source.schema.target == target
    assert same([row["targets"] for row in rows_of(source)[0]], due)


def test_values_in_columns_of_their_own(tmp_path):
    source = table_at(
        tmp_path, {"x": F3, "y": [1, 2], "z": [0.5, None]}, inputs=["x"], target=["y", "z"], upper={"z": 1}
    )
    assert source.schema.target == Values(names=("y", "z"), upper={"z": 1})
    assert same([row["targets"] for row in rows_of(source)[0]], [[[1.0, 0.5]], [[2.0, NAN]]])


def test_times_of_every_type(tmp_path):
    days = pa.array([0, 1, 20_000], pa.int32()).cast(pa.date32())
    for flat in (
        days,
        days.cast(pa.date64()),
        days.cast(pa.timestamp("s")),
        days.cast(pa.timestamp("ns")).cast(pa.timestamp("ns", "UTC")),
        pa.array(["1970-01-01", "1970-01-02", "2024-10-04"]),
        pa.array(["1970-01-01T02:00:00+02:00", "1970-01-02T00:00:00Z", "2024-10-04T00:00:00Z"]),
        pa.array([0, 1, 20_000]),
    ):
        lists = pa.ListArray.from_arrays(pa.array([0, 2, 3], pa.int32()), flat)
        source = table_at(tmp_path, {"x": F3, "t": lists, "a": flat.slice(1)}, inputs=["x"], times="t", time="a")
        assert [(row["times"], row["time"]) for row in rows_of(source)[0]] == [([0, 1], 1), ([20_000], 20_000)]
    half = pa.array([[43_200_000, 0], [1]], pa.list_(pa.timestamp("ms")))
    assert rows_of(table_at(tmp_path, {"x": F3, "t": half}, inputs=["x"], times="t"))[0][0]["times"] == [0.5, 0.0]


def test_missing_values_are_allowed_where_the_job_says_so(tmp_path):
    path = written(tmp_path, pa.table({"x": F3}), "arrow")
    for missing in Missing:
        source = opened(path, ColumnsSpec(inputs=["x"]), missing=missing)
        assert source.schema.inputs.missing is (missing is not Missing.refuse)


def test_a_limit_of_a_column_of_vectors_is_that_of_all_its_channels(tmp_path):
    source = table_at(tmp_path, {"x": F3}, inputs=["x"], lower={"x": 0, "x1": 1})
    assert source.schema.inputs.lower == {"x0": 0, "x1": 1, "x2": 0}


# --- rows without the form of one


def test_rows_of_a_wrong_form_are_problems_of_their_lines(tmp_path):
    lists = pa.array([[[1, 2]], [[1, 2], [3]], None, [[5, 6]]], pa.list_(pa.list_(pa.float32())))
    source = table_at(
        tmp_path,
        {
            "x": lists,
            "t": [[1.0], [1.0, 2.0], [], [1.0, 2.0]],
            "s": ["train", "valid", "test", "dev"],
            "e": list("abcd"),
        },
        inputs=["x"],
        times="t",
        split="s",
        entity="e",
    )
    found, problems = rows_of(source)
    assert [row["entity"] for row in found] == ["a"]
    assert sorted(map(str, problems)) == [
        "t.arrow:2 ('b'): x: got a frame of another width, expected 2 numbers in each",
        "t.arrow:3 ('c'): x: got null, expected a list",
        "t.arrow:4 ('d'): s: got 'dev', expected train, valid, test or nothing",
        "t.arrow:4 ('d'): t: got 2 times, expected 1, one a frame",
    ]


def test_channels_of_other_lengths_are_problems(tmp_path):
    source = table_at(tmp_path, {"a": [[1.0, 2.0], [3.0]], "b": [[1.0], [2.0]]}, inputs=["a", "b"])
    found, problems = rows_of(source)
    assert [row["inputs"] for row in found] == [[[3.0, 2.0]]]
    assert [str(p) for p in problems] == ["t.arrow:1 ('1'): b: got 1 frames, expected 2 as in 'a'"]


def test_null_entities_and_labels_are_left_to_the_check(tmp_path):
    source = table_at(tmp_path, {"x": F3, "e": ["a", None], "y": [None, "u"]}, inputs=["x"], entity="e", target=["y"])
    assert [(row["entity"], row["targets"]) for row in rows_of(source)[0]] == [("a", [None]), (None, ["u"])]


def test_csv_lines(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        'who,x,w\n007,"[1.5, 2]",1\nNA,"[3]",NA\nragged,"[1]"\n\n"two\nlines","[4]",2\nbad,"[5",1\nbad2,"[""a""]",1\n'
        "bad3,,x\nlast,[6], 3 \n"
    )
    source = opened(path, ColumnsSpec(entity="who", inputs=["x"], weight="w"))
    found, problems = rows_of(source)
    assert [(row["entity"], row["number"], row["inputs"]) for row in found] == [
        ("007", 2, [[1.5], [2.0]]),
        ("NA", 3, [[3.0]]),
        ("two\nlines", 5, [[4.0]]),
        ("last", 9, [[6.0]]),
    ]
    assert same([row["weight"] for row in found], [1.0, NAN, 2.0, 3.0])
    assert [str(p) for p in problems] == [
        "t.csv:4: line: got 2 cells, expected 3",
        "t.csv:6: x: got '[5', expected a list of numbers, as in the first lines",
        "t.csv:7: x: got '[\"a\"]', expected a list of numbers, as in the first lines",
        "t.csv:8: w: got 'x', expected a number, as in the first lines",
    ]


def test_numbers_of_csv_lines_after_many_blocks(tmp_path):
    path = tmp_path / "t.csv"
    lines = [f'{i},"' + "x\n" * 50 + '"' for i in range(2, 150_002)]
    ragged = {5, 70_000, 149_999, 150_001}
    for n in ragged:
        lines[n - 2] += ",more"
    path.write_text("who,x\n" + "\n".join(lines) + "\n")
    found = chunks_of(opened(path, ColumnsSpec(entity="who", inputs=["x"])))
    assert len(found) > 3
    numbers = np.concatenate([chunk.number_R for chunk in found])
    assert numbers.tolist() == [n for n in range(2, 150_002) if n not in ragged]
    assert [e for chunk in found for e in chunk.entity_R.to_pylist()] == list(map(str, numbers.tolist()))
    assert [p.number for chunk in found for p in chunk.problems] == sorted(ragged)


def test_tab_separated_and_packed_files(tmp_path):
    (tmp_path / "t.tsv.gz").write_bytes(gzip.compress(b"who\tx\na\tp q\n"))
    assert rows_of(opened(tmp_path / "t.tsv.gz", ColumnsSpec(entity="who", inputs=["x"])))[0][0]["inputs"] == ["p", "q"]
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(b'{"x": ["p", "q"]}\n'))
    assert rows_of(opened(tmp_path / "t.jsonl.gz", ColumnsSpec(inputs=["x"])))[0][0]["inputs"] == ["p", "q"]


def test_lines_that_are_no_json(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"e": "2020-01-01", "x": [1, 2.5]}\n\nnot json\n{"e": "b", "x": [1, "q"]}\n[1]\n'
        '{"e": "c", "x": [3], "z": {}}\n'
        '{"e": 5, "x": [1]}\n{"x": [1]} {"x": [2]}\n{"e": "n", "x": [NaN, null]}\n{"e": "last", "x": []}'
    )
    found, problems = rows_of(opened(path, ColumnsSpec(entity="e", inputs=["x"])))
    assert same(
        [(row["number"], row["entity"], row["inputs"]) for row in found],
        [(1, "2020-01-01", [[1.0], [2.5]]), (6, "c", [[3.0]]), (9, "n", [[NAN], [NAN]]), (10, "last", [])],
    )
    assert [(p.number, p.column) for p in problems] == [(3, "line"), (4, "x"), (5, "line"), (7, "e"), (8, "line")]
    assert problems[0].message == "got no JSON object (Expecting value: line 1 column 1 (char 0)), expected one a line"
    assert problems[1].message == 'got [1, "q"], expected a list of numbers, as in the first lines'
    assert problems[2].message == "got no JSON object (a list), expected one a line"


def test_two_values_in_one_json_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"x": ["a"]}\n{"x": ["b"]} {"x": ["c"]}\n{"x": ["d"]}\n')
    found, problems = rows_of(opened(path, ColumnsSpec(inputs=["x"])))
    assert [(row["number"], row["inputs"]) for row in found] == [(1, ["a"]), (3, ["d"])]
    assert [p.number for p in problems] == [2]


def test_json_lines_of_several_blocks(tmp_path):
    path = tmp_path / "t.jsonl"
    row = json.dumps({"x": [0.25] * 2000})
    path.write_text("\n".join(row if i != 700 else "{" for i in range(1, 1001)))
    found = chunks_of(opened(path, ColumnsSpec(inputs=["x"])))
    assert np.concatenate([c.number_R for c in found]).tolist() == [i for i in range(1, 1001) if i != 700]
    assert [p.number for c in found for p in c.problems] == [700]
    assert max(c.inputs.nbytes for c in found) <= 2 * CHUNK_BYTES


def test_json_ids_and_whole_numbers_among_channels(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"x": [1, 2], "a": [1], "b": [2]}\n{"x": [3], "a": [1.5], "b": [1]}\n')
    assert opened(path, ColumnsSpec(inputs=["x"])).schema.inputs == Tokens()
    found, problems = rows_of(opened(path, ColumnsSpec(inputs=["a", "b"])))
    assert [row["inputs"] for row in found] == [[[1.0, 2.0]], [[1.5, 1.0]]]
    assert problems == []


# --- files


def test_damaged_files_are_named(tmp_path):
    table = pa.table({"x": pa.array([[[0.0] * 3] * 50] * 100, F3.type)})
    columns = ColumnsSpec(inputs=["x"])
    for form in ("parquet", "arrow", "stream"):
        folder = tmp_path / form
        folder.mkdir()
        path = written(folder, table, form)
        whole = path.read_bytes()
        for cut in (0, 4, 30, len(whole) // 2, len(whole) - 9, len(whole) - 1):
            path.unlink()
            path.write_bytes(whole[:cut])
            with pytest.raises(DataError, match=rf"{path.name}: cannot be read"):
                rows_of(opened(path, columns))
        path.unlink()
        path.write_bytes(b"PAR1" + bytes(500) + b"PAR1")
        with pytest.raises(DataError, match=rf"{path.name}: cannot be read"):
            rows_of(opened(path, columns))


def test_a_stream_that_was_cut_between_two_batches_is_damaged(tmp_path):
    batch = pa.record_batch({"x": F3})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
        writer.write_batch(batch)
    whole = sink.getvalue().to_pybytes()
    (tmp_path / "t.arrow").write_bytes(whole[:-8])
    assert pa.ipc.open_stream(whole[:-8]).read_all().num_rows == 4  # what the vendor takes for whole
    with pytest.raises(DataError, match="no end"):
        opened(tmp_path / "t.arrow", ColumnsSpec(inputs=["x"]))


def test_folders_patterns_and_their_order(tmp_path):
    for name_ in ("b/2.parquet", "a/1.parquet", "a/deep/3.parquet", "_tmp/0.parquet", ".git/0.parquet", "a/_SUCCESS"):
        path = tmp_path / "d" / name_
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"x": F3, "e": [name_, name_]}), path)

    def files(source):
        return [file.name for file in opened(tmp_path / source, ColumnsSpec(inputs=["x"])).lines.place.files]

    assert files("d") == ["a/1.parquet", "a/deep/3.parquet", "b/2.parquet"]
    assert files("d/*/*.parquet") == ["a/1.parquet", "b/2.parquet"]
    assert files("d/**/*.parquet") == ["a/1.parquet", "a/deep/3.parquet", "b/2.parquet"]
    assert files("d/[!a]/?.parquet") == ["b/2.parquet"]
    assert files("d/a/1.parquet") == ["1.parquet"]
    found, _ = rows_of(opened(tmp_path / "d", ColumnsSpec(inputs=["x"])))
    assert [row["entity"] for row in found][:3] == ["a/1.parquet:1", "a/1.parquet:2", "a/deep/3.parquet:1"]
    assert [row["number"] for row in found] == [1, 2] * 3
    for source, words in (("d/*.csv", "no file fits"), ("none", "no such file"), ("e/*.csv", "no folder")):
        with pytest.raises(DataError, match=words):
            files(source)


def test_formats(tmp_path):
    path = tmp_path / "data.bin"
    pq.write_table(pa.table({"x": F3}), path)
    columns = ColumnsSpec(inputs=["x"])
    with pytest.raises(ConfigError, match=r"data.format: got auto with the file 'data.bin'"):
        opened(path, columns)
    assert len(rows_of(opened(path, columns, format=Format.parquet))[0]) == 2
    with pytest.raises(DataError, match=r"data.bin: cannot be read"):
        opened(path, columns, format=Format.arrow)
    with pytest.raises(ConfigError, match="huggingface"):
        opened(path, columns, format=Format.huggingface)
    with pytest.raises(DataError, match=r"no state.json"):
        opened(tmp_path, columns, format=Format.huggingface)
    with pytest.raises(DataError, match="without a file that can be read"):
        opened(tmp_path, columns)
    (tmp_path / "a.csv").write_text("x\n1\n")
    (tmp_path / "b.parquet").write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match="files of 2 formats"):
        opened(tmp_path, columns)
    for source, words in ((None, "not given"), ("ftp://x/y", "expected a path, or one of s3://")):
        with pytest.raises(ConfigError, match=words):
            open_source(DataSpec(name="toy", source=source), columns, scratch=tmp_path)


def test_checksums_of_files(tmp_path):
    path = written(tmp_path, pa.table({"x": F3}), "parquet")
    columns = ColumnsSpec(inputs=["x"])
    digests = digests_of(opened(path, columns).lines.place, {})
    assert list(digests) == ["t.parquet"]
    assert digests_of(opened(path, columns, sha256=digests).lines.place, {}) == digests
    with pytest.raises(IntegrityError, match=r"t.parquet: got sha256"):
        opened(path, columns, sha256={"t.parquet": "0" * 64})
    with pytest.raises(DataError, match=r"got 't.parqet', expected a file of the source - did you mean 't.parquet'"):
        opened(path, columns, sha256={"t.parqet": digests["t.parquet"]})


def saved(folder, table, parts=2):
    """As the Hugging Face library saves a data set."""
    folder.mkdir(parents=True)
    size = -(-table.num_rows // parts)
    names = [f"data-{i:05}-of-{parts:05}.arrow" for i in range(parts)]
    for i, file in enumerate(names):
        with pa.ipc.new_stream(str(folder / file), table.schema) as writer:
            writer.write_table(table.slice(i * size, size))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file} for file in names]}))


def test_data_sets_that_hugging_face_saved(tmp_path):
    table = pa.table({"x": F3, "e": ["a", "b"]})
    columns = ColumnsSpec(inputs=["x"], entity="e")
    saved(tmp_path / "one", table)
    found, _ = rows_of(opened(tmp_path / "one", columns))
    assert [(row["entity"], row["split"]) for row in found] == [("a", -1), ("b", -1)]
    saved(tmp_path / "all" / "train", table)
    saved(tmp_path / "all" / "validation", table, 1)
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    source = opened(tmp_path / "all", columns)
    assert [(row["entity"], row["split"]) for row in rows_of(source)[0]] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert source.parts[-1].file == "validation/data-00000-of-00001.arrow"
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002.arrow: got no such file"):
        opened(tmp_path / "one", columns)
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["extra"]}')
    with pytest.raises(DataError, match="got the split 'extra'"):
        opened(tmp_path / "all", columns)


def test_large_files_are_read_in_parts_that_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PART_BYTES", 4000)
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(int(n), 3)).astype(np.float32).tolist() for n in rng.integers(1, 9, 300)]
    table = pa.table({"x": pa.array(rows, F3.type), "e": [str(i) for i in range(300)]})
    for form in ("parquet", "arrow"):
        source = opened(written(tmp_path, table, form), ColumnsSpec(inputs=["x"], entity="e"))
        assert len(source.parts) > 3
        found, _ = rows_of(source)
        assert [row["number"] for row in found] == list(range(1, 301))
        assert [row["entity"] for row in found] == [str(i) for i in range(300)]
        assert [row["inputs"] for row in found] == [np.array(r, np.float32).tolist() for r in rows]


def test_chunks_are_bounded_and_a_long_row_is_one(tmp_path):
    lengths = [10, 1_000_000, *[20_000] * 30]
    flat = np.zeros((sum(lengths), 2), np.float32)
    array = pa.LargeListArray.from_arrays(
        pa.array(np.cumsum([0, *lengths])), pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), 2)
    )
    for form in ("arrow", "parquet"):
        path = tmp_path / f"t.{form}"
        table = pa.table({"x": array})
        if form == "arrow":
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)
        else:
            pq.write_table(table, path)
        found = chunks_of(opened(path, ColumnsSpec(inputs=["x"])))
        assert np.concatenate([c.lengths_R for c in found]).tolist() == lengths
        assert max(c.inputs.nbytes for c in found) <= 8_000_000 + 2 * CHUNK_BYTES
        assert len(found) >= 3


def test_a_source_and_its_parts_can_be_sent_to_another_process(tmp_path):
    source = opened(written(tmp_path, pa.table({"x": F3}), "parquet"), ColumnsSpec(inputs=["x"]))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(count_rows, source, source.parts[0]).result() == 2


def count_rows(source, part):
    return sum(chunk.num_rows for chunk in source.read(part))


def test_one_file_over_http(tmp_path):
    written(tmp_path, pa.table({"x": F3}), "parquet")
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        spec = DataSpec(name="toy", source=f"http://127.0.0.1:{server.server_port}/t.parquet?a=1")
        source = open_source(spec, ColumnsSpec(inputs=["x"]), scratch=tmp_path / "new")
        server.shutdown()
        thread.join()
    assert len(rows_of(source)[0]) == 2


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.s3
def test_files_on_s3(s3_server, monkeypatch):
    for key, value in s3_server.environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    filesystem, _ = pyarrow.fs.FileSystem.from_uri(f"s3://{s3_server.bucket}")
    for name_ in ("p/a.parquet", "p/b.parquet"):
        with filesystem.open_output_stream(f"{s3_server.bucket}/sources/{name_}") as sink:
            pq.write_table(pa.table({"x": F3}), sink)
    for source in ("p", "p/*.parquet", "p/a.parquet"):
        spec = DataSpec(name="toy", source=f"s3://{s3_server.bucket}/sources/{source}")
        place = find_files(spec, None)
        assert [f.name for f in place.files] == ["a.parquet", "b.parquet"][: 1 if source == "p/a.parquet" else 2]
        opened_ = open_source(spec, ColumnsSpec(inputs=["x"]), scratch=None)
        assert len(rows_of(opened_)[0]) == 2 * len(place.files)
    with pytest.raises(DataError, match="no such file"):
        find_files(dataclasses.replace(spec, source=f"s3://{s3_server.bucket}/sources/none"), None)


# --- what a job gets wrong


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"inputs": []}, "columns.inputs: got none"),
        ({"inputs": ["xx"]}, r"columns.inputs: got 'xx', expected a column of t.arrow - did you mean 'x'\?"),
        (
            {"inputs": ["q"], "entity": "whom", "weight": "r"},
            r"columns.inputs: got 'q'[^\n]*\ncolumns.entity: got 'whom'[^\n]*'who'\?\ncolumns.weight: got 'r'",
        ),
        ({"inputs": ["n"]}, r"t.arrow: columns.inputs: 'n': got double, expected a list.*columns.layout=events"),
        ({"inputs": ["x", "who"]}, "columns.inputs: 'x': got list.*\ncolumns.inputs: 'who': got string"),
        ({"inputs": ["x"], "entity": "n", "split": "n"}, "columns.split: 'n': got double.*\ncolumns.entity: 'n'"),
        ({"inputs": ["x"], "weight": "who"}, "columns.weight: 'who': got string, expected numbers"),
        ({"inputs": ["x"], "times": "n"}, "columns.times: 'n': got double, expected lists"),
        ({"inputs": ["x"], "target": ["x"]}, "columns.target: 'x': got list"),
        ({"inputs": ["x"], "target": ["who", "n"]}, "columns.target: 'who': got string"),
        ({"inputs": ["x"], "target": ["n"], "target_per": TargetPer.frame}, "expected a list of labels"),
        ({"inputs": ["x"], "target": ["n"], "target_per": TargetPer.sequence}, "labels with white space between"),
        ({"inputs": ["x"], "target": ["n"], "labels": ["a"]}, "columns.labels: got 1 with targets of numbers"),
        ({"inputs": ["x"], "symbols": ["a"]}, "columns.symbols: got 1 with inputs of numbers"),
        ({"inputs": ["x"], "lower": {"x7": 1}}, r"columns.lower: got 'x7', expected a column of numbers.*'x"),
        ({"inputs": ["who"], "upper": {"who": 1}}, "columns.upper: got 'who'"),
    ],
)
def test_columns_that_cannot_be(tmp_path, spec, words):
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        table_at(tmp_path, {"x": F3, "n": [0.5, 1.5], "who": ["a", "b"]}, **spec)


def test_a_later_file_of_another_form_is_named(tmp_path):
    columns = ColumnsSpec(inputs=["x"])
    first = pa.table({"x": F3})
    for second, words in (
        (pa.table({"y": F3}), r"b.parquet|columns.inputs: got 'x', expected a column of b.parquet"),
        (pa.table({"x": ["text"]}), r"b.parquet: columns.inputs: 'x': got string, expected lists .* as in a.parquet"),
    ):
        pq.write_table(first, tmp_path / "a.parquet")
        pq.write_table(second, tmp_path / "b.parquet")
        with pytest.raises(DataError, match=words):
            rows_of(opened(tmp_path, columns))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.csv").write_text("x\np q\n")
    (tmp_path / "c" / "b.csv").write_text("z\np q\n")
    with pytest.raises(DataError, match=r"expected a column of b.csv"):
        opened(tmp_path / "c", columns)


def test_files_without_a_row(tmp_path):
    columns = ColumnsSpec(inputs=["x"])
    for form in ("parquet", "arrow", "stream"):
        path = written(tmp_path, pa.table({"x": F3}).slice(0, 0), form)
        with pytest.raises(DataError, match="got no row that can be read"):
            opened(path, columns)
    (tmp_path / "t.csv").write_text("x\n")
    with pytest.raises(DataError, match="got no row"):
        opened(tmp_path / "t.csv", columns)
    for text in ("", "\n\n"):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises((DataError, ConfigError), match=r"t.csv"):
            opened(tmp_path / "t.csv", columns)
        (tmp_path / "t.jsonl").write_text(text)
        with pytest.raises((DataError, ConfigError), match=r"t.jsonl"):
            opened(tmp_path / "t.jsonl", columns)

"""Events in any order become one sequence an entity, in the order of its times."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.data.chunk import CHUNK_BYTES
from treadle.data.draft import Frames, Labels, Tokens, Values
from treadle.data.sources import deal
from treadle.data.sources.declared import open_source
from treadle.data.sources.events import open_events
from treadle.data.sources.lines import open_lines
from treadle.errors import ConfigError, DataError
from treadle.spec import ColumnsSpec, DataSpec, Layout, Missing, TargetPer

NAN = np.nan


def columns(**spec):
    return ColumnsSpec(layout=Layout.events, **{"entity": "who", "times": "t", "inputs": ["x"], **spec})


def opened(path, spec, *, partition_bytes=None, **data):
    data_spec = DataSpec(name="toy", source=str(path), **data)
    scratch = path.parent / "scratch"
    if partition_bytes is None:
        return open_source(data_spec, spec, scratch=scratch)
    return open_events(
        data_spec, spec, open_lines(data_spec, spec, scratch), scratch=scratch, partition_bytes=partition_bytes
    )


def source_of(tmp_path, table, spec, **options):
    pq.write_table(pa.table(table), tmp_path / "t.parquet", row_group_size=5)
    return opened(tmp_path / "t.parquet", spec, **options)


def chunks_of(source):
    return [chunk for part in source.parts for chunk in source.read(part)]


def sequences(source):
    """entity -> (inputs, times), and all problems."""
    found = {}
    problems = []
    for chunk in chunks_of(source):
        problems += map(str, chunk.problems)
        ends = np.cumsum(chunk.lengths_R)
        for i, entity in enumerate(chunk.entity_R.to_pylist()):
            assert entity not in found
            frames = slice(ends[i] - chunk.lengths_R[i], ends[i])
            inputs = (
                [chunk.symbols[k] for k in chunk.inputs[frames]] if chunk.symbols else chunk.inputs[frames].tolist()
            )
            found[entity] = (inputs, chunk.times_N[frames].tolist())
    return found, problems


TABLE = {
    "who": ["b", "a", "b", "a", "c", "b"],
    "t": [3.0, 2.0, 1.0, 1.0, 9.0, 3.0],
    "x": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
}


@pytest.mark.parametrize("partition_bytes", [None, 1])
def test_frames_of_an_entity_in_the_order_of_their_times(tmp_path, partition_bytes):
    source = source_of(tmp_path, TABLE, columns(), partition_bytes=partition_bytes)
    assert source.schema.inputs == Frames(channels=("x",))
    assert source.schema.timed
    assert sequences(source) == (
        {
            "b": ([[3.0], [1.0], [6.0]], [1.0, 3.0, 3.0]),  # equal times keep their order
            "a": ([[4.0], [2.0]], [1.0, 2.0]),
            "c": ([[5.0]], [9.0]),
        },
        [],
    )
    if partition_bytes is None:
        [chunk] = chunks_of(source)
        assert chunk.entity_R.to_pylist() == ["b", "a", "c"]
        assert chunk.number_R.tolist() == [1, 2, 5]
        assert chunk.file == "t.parquet"
    else:
        assert len(source.parts) == 3


@settings(max_examples=30)
@given(
    rows=st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 9), st.integers(0, 99)), min_size=1),
    partitions=st.sampled_from([1, 3, 200]),
)
def test_the_same_sequences_as_a_loop_whatever_the_partitions(rows, partitions, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("t")
    pq.write_table(
        pa.table({"who": [r[0] for r in rows], "t": [r[1] for r in rows], "x": [float(r[2]) for r in rows]}),
        tmp / "t.parquet",
    )
    spec = columns()
    data = DataSpec(name="toy", source=str(tmp / "t.parquet"))
    lines = open_lines(data, spec, tmp)
    size = sum(part.size for part in lines.parts)
    source = open_events(data, spec, lines, scratch=tmp, partition_bytes=-(-size // partitions))
    expected = {}
    for who, t, x in sorted(rows, key=lambda row: row[1]):
        inputs, times = expected.setdefault(who, ([], []))
        inputs.append([float(x)])
        times.append(float(t))
    assert sequences(source) == (expected, [])


def test_every_column_of_events(tmp_path):
    table = {
        "who": [1, 2, 1, 2, 1],
        "t": pa.array([20_001, 20_000, 20_000, 20_002, 20_003], pa.int32()).cast(pa.date32()),
        "a": [1, 2, 3, 4, None],
        "b": [0.5, 1.5, 2.5, 3.5, 4.5],
        "y": ["u", None, "v", "u", None],
        "fam": ["f", None, None, None, "f"],
        "key": ["k1", "k2", None, "k2", "k1"],
        "asked": [None, 7.0, 5.0, None, None],
        "w": [2.0, None, None, 1.0, 2.0],
        "s": [None, "test", "train", None, "train"],
    }
    spec = columns(
        inputs=["a", "b"],
        target=["y"],
        target_per=TargetPer.frame,
        group="fam",
        id="key",
        time="asked",
        weight="w",
        split="s",
        upper={"b": 9},
    )
    source = source_of(tmp_path, table, spec, missing=Missing.mean)
    assert source.schema.inputs == Frames(channels=("a", "b"), upper={"b": 9}, missing=True)
    assert source.schema.target == Labels(per=TargetPer.frame)
    [chunk] = chunks_of(source)
    assert chunk.problems == ()
    assert chunk.entity_R.to_pylist() == ["1", "2"]
    assert np.array_equal(chunk.inputs, [[3, 2.5], [1, 0.5], [NAN, 4.5], [2, 1.5], [4, 3.5]], equal_nan=True)
    assert chunk.times_N.tolist() == [20_000, 20_001, 20_003, 20_000, 20_002]
    assert [None if k < 0 else chunk.labels[k] for k in chunk.targets] == ["v", "u", None, None, "u"]
    assert chunk.target_lengths_R.tolist() == [3, 2]
    assert chunk.group_R.to_pylist() == ["f", "2"]
    assert chunk.id_R.to_pylist() == ["k1", "k2"]
    assert chunk.time_R.tolist() == [5, 7]
    assert chunk.weight_R.tolist() == [2, 1]
    assert chunk.split_R.tolist() == [0, 2]


def test_one_target_an_entity(tmp_path):
    table = TABLE | {"y": [None, "q", "p", "q", None, None], "v": [1.0, None, None, 2.0, NAN, 1.0]}
    source = source_of(tmp_path, table, columns(target=["y"]))
    [chunk] = chunks_of(source)
    assert source.schema.target == Labels()
    assert [None if k < 0 else chunk.labels[k] for k in chunk.targets] == ["p", "q", None]
    source = source_of(tmp_path, table, columns(target=["v", "x"], inputs=["x"]))
    assert source.schema.target == Values(names=("v", "x"))
    _, problems = sequences(source)
    assert problems == [
        "t.parquet:1 ('b'): target: got 1 and 6, expected one value for the entity",
        "t.parquet:2 ('a'): target: got 2 and 4, expected one value for the entity",
    ]
    source = source_of(tmp_path, table, columns(target=["v"]))
    [chunk] = chunks_of(source)
    assert np.array_equal(chunk.targets, [[1], [2], [NAN]], equal_nan=True)


def test_symbols_and_vectors(tmp_path):
    source = source_of(tmp_path, TABLE | {"x": [1, 2, 3, 4, None, 6]}, columns())
    assert source.schema.inputs == Tokens()
    [chunk] = chunks_of(source)
    assert [chunk.symbols[k] if k >= 0 else None for k in chunk.inputs] == ["3", "1", "6", "4", "2", None]
    vectors = pa.array([[float(i), 0.5] for i in range(6)], pa.list_(pa.float32(), 2))
    source = source_of(tmp_path, TABLE | {"x": vectors}, columns())
    assert source.schema.inputs == Frames(channels=("x0", "x1"))
    assert sequences(source)[0]["a"] == ([[3.0, 0.5], [1.0, 0.5]], [1.0, 2.0])


def test_what_an_entity_may_not_have(tmp_path):
    table = TABLE | {
        "t": [3.0, None, 1.0, NAN, 9.0, 3.0],
        "y": ["p", "q", "q", "q", "r", None],
        "s": ["train", "test", "train", "test", "dev", "train"],
    }
    source = source_of(tmp_path, table, columns(target=["y"], split="s"))
    assert sequences(source) == (
        {},
        [
            "t.parquet:2 ('a'): times: got no time in 2 lines, first t.parquet:2, expected one in each",
            "t.parquet:1 ('b'): target: got 'p' and 'q', expected one for the entity",
            "t.parquet:5 ('c'): split: got 'dev', expected train, valid, test or nothing",
        ],
    )


def test_lines_without_an_entity(tmp_path):
    source = source_of(tmp_path, TABLE | {"who": ["b", None, "b", "a", None, "b"]}, columns(), partition_bytes=1)
    found, problems = sequences(source)
    assert {who: len(times) for who, (_, times) in found.items()} == {"a": 1, "b": 3}
    assert problems == ["t.parquet:2: who: got null, expected text", "t.parquet:5: who: got null, expected text"]
    source = source_of(tmp_path, TABLE | {"who": pa.array([None] * 6, pa.string())}, columns())
    found, problems = sequences(source)
    assert (found, len(problems)) == ({}, 6)


def test_events_in_csv_and_json_lines(tmp_path):
    (tmp_path / "t.csv").write_text(
        "who,t,x,y\n01,2024-01-02T12:00:00,1,u\n02,2024-01-01,5,v\nragged\n01,2024-01-01,NA,\n02,soon,3,v\n"
    )
    source = opened(tmp_path / "t.csv", columns(inputs=["x"], target=["y"], upper={"x": 9}), missing=Missing.mean)
    assert source.schema.inputs == Frames(channels=("x",), upper={"x": 9}, missing=True)
    found, problems = sequences(source)
    assert repr(found) == repr({"01": ([[NAN], [1.0]], [19_723.0, 19_724.5])})
    assert problems == [
        "t.csv:4: line: got 1 cells, expected 4",
        "t.csv:3 ('02'): times: got no time in 1 lines, first t.csv:6, expected one in each",
    ]
    lines = [{"who": w, "t": t, "x": x} for w, t, x in zip(*TABLE.values(), strict=True)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert sequences(opened(tmp_path / "t.jsonl", columns())) == sequences(source_of(tmp_path, TABLE, columns()))


def test_an_entity_over_several_files_is_named_by_its_first_line(tmp_path):
    (tmp_path / "d").mkdir()
    for i, rows in enumerate((["a", "b"], ["c", "a"], ["b", "d"])):
        pq.write_table(
            pa.table({"who": rows, "t": [10.0 - i] * 2, "x": [float(i)] * 2, "y": [f"{i}"] * 2}),
            tmp_path / "d" / f"{i}.parquet",
        )
    found = chunks_of(opened(tmp_path / "d", columns()))
    assert [(c.file, c.entity_R.to_pylist(), c.number_R.tolist()) for c in found] == [
        ("0.parquet", ["a", "b"], [1, 2]),
        ("1.parquet", ["c"], [1]),
        ("2.parquet", ["d"], [2]),
    ]
    assert found[0].inputs.tolist() == [[1], [0], [2], [0]]
    _, problems = sequences(opened(tmp_path / "d", columns(target=["y"])))
    assert problems == [
        "0.parquet:1 ('a'): target: got '0' and '1', expected one for the entity",
        "0.parquet:2 ('b'): target: got '0' and '2', expected one for the entity",
    ]


def test_chunks_are_bounded(tmp_path):
    num = 400_000
    rng = np.random.default_rng(0)
    who = np.sort(rng.integers(0, 4000, num))
    table = {"who": who, "t": rng.random(num), **{f"x{d}": rng.random(num, np.float32) for d in range(8)}}
    shuffled = pa.table(table).take(pa.array(rng.permutation(num)))
    pq.write_table(shuffled, tmp_path / "t.parquet", row_group_size=50_000)
    told = []
    spec = columns(inputs=[f"x{d}" for d in range(8)])
    data = DataSpec(name="toy", source=str(tmp_path / "t.parquet"))
    lines = open_lines(data, spec, tmp_path)
    source = open_events(
        data, spec, lines, scratch=tmp_path, partition_bytes=4 << 20, progress=lambda *at: told.append(at)
    )
    assert len(source.parts) == -(-sum(part.size for part in lines.parts) // (4 << 20)) >= 4
    assert told[-1][0] == told[-1][1]
    found = chunks_of(source)
    assert len(found) >= len(source.parts)
    assert max(c.inputs.nbytes for c in found) <= CHUNK_BYTES
    assert sum(c.num_rows for c in found) == len(np.unique(who))
    for chunk in found:
        falls = np.diff(chunk.times_N) < 0
        falls[np.cumsum(chunk.lengths_R)[:-1] - 1] = False
        assert not falls.any()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"entity": None}, "columns.entity: got null, expected a column, for events"),
        ({"times": None}, "columns.times: got null"),
        ({"target": ["y"], "target_per": TargetPer.sequence}, "target_per: got sequence"),
        ({"times": "y", "inputs": ["x", "y"]}, "columns.inputs: 'y': got string, expected numbers"),
        ({"weight": "y"}, "columns.weight: 'y': got string, expected numbers"),
        ({"entity": "x"}, "columns.entity: 'x': got double, expected text"),
        ({"symbols": ["a"]}, "columns.symbols"),
        ({"target": ["x"], "labels": ["a"]}, "columns.labels"),
        ({"lower": {"z": 1}}, "columns.lower: got 'z'"),
    ],
)
def test_columns_that_cannot_be_of_events(tmp_path, spec, words):
    with pytest.raises(ConfigError, match=words):
        source_of(tmp_path, TABLE | {"y": list("abcdef")}, columns(**spec))


def test_a_later_file_of_another_type_is_named(tmp_path):
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table(TABLE), tmp_path / "d" / "a.parquet")
    pq.write_table(pa.table(TABLE | {"x": list("abcdef")}), tmp_path / "d" / "b.parquet")
    with pytest.raises(
        DataError, match=r"b.parquet: columns.inputs: 'x': got string, expected numbers, as in a.parquet"
    ):
        opened(tmp_path / "d", columns())


def test_the_scratch_folder_holds_no_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(deal, "_MOST_FILES", 3)
    names = [f"e{i}" for i in range(40)]
    source = source_of(tmp_path, {"who": names, "t": range(40), "x": [1.0] * 40}, columns(), partition_bytes=1)
    assert len(source.parts) == len(sequences(source)[0]) == 40
    folders = [path for path in (tmp_path / "scratch" / "events").rglob("*") if path.is_dir()]
    assert max(len(list(folder.iterdir())) for folder in folders) <= 6  # files, and folders of those dealt again

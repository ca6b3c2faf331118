"""Sources with something wrong: each says what, where, and what was expected, and nothing is lost in silence."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from treadle.data.chunk import CHUNK_BYTES, Problem
from treadle.data.sources import csv_lines, tables
from treadle.data.sources.declared import open_source
from treadle.data.sources.files import find_files
from treadle.data.sources.lines import open_lines
from treadle.errors import ConfigError, DataError, IntegrityError
from treadle.spec import ColumnsSpec, DataSpec

COLUMNS = ColumnsSpec(entity="e", inputs=["x"], target=["y"])
TABLE = pa.table({"e": ["a", "b"], "x": ["p q", "p"], "y": ["A", "B"]})
CSV = "e,x,y\na,p q,A\nb,p,B\n"


def opened(path, columns=COLUMNS, **data):
    return open_source(DataSpec(name="toy", source=str(path), **data), columns, scratch=Path(path).parent / "scratch")


def names_of(path, **data):
    return [file.name for file in find_files(DataSpec(name="toy", source=str(path), **data), Path(path)).files]


def entities(source):
    return [name for part in source.parts for chunk in source.read(part) for name in chunk.entity_R.to_pylist()]


def problems(source):
    return [str(p) for part in source.parts for chunk in source.read(part) for p in chunk.problems]


def write_arrow(path, table, *, stream=False, rows=None, compression=None):
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- names of files


def test_a_digest_by_a_name_that_several_files_have_is_refused(tmp_path):
    for folder, text in (("x", CSV.replace("a,", "other,")), ("y", CSV)):
        (tmp_path / "d" / folder).mkdir(parents=True)
        (tmp_path / "d" / folder / "a.csv").write_text(text)
    pin = digest(tmp_path / "d" / "y" / "a.csv")
    with pytest.raises(ConfigError, match=r"data.sha256: got 'a.csv', the name of 2 files \(x/a.csv, y/a.csv\)"):
        opened(tmp_path / "d", sha256={"a.csv": pin})
    assert names_of(tmp_path / "d", sha256={"y/a.csv": pin}) == ["x/a.csv", "y/a.csv"]
    with pytest.raises(IntegrityError, match=r"x/a.csv: got sha256"):
        opened(tmp_path / "d", sha256={"x/a.csv": pin})
    (tmp_path / "d" / "a.csv").write_text(CSV)  # a name that is the whole of one is of that one
    assert len(names_of(tmp_path / "d", sha256={"a.csv": pin})) == 3
    (tmp_path / "d" / "y" / "b.csv").write_text(CSV)
    with pytest.raises(IntegrityError, match=r"y/b.csv: got sha256"):
        opened(tmp_path / "d", sha256={"b.csv": "0" * 64})


@pytest.mark.parametrize("target", [".", "..", "sub"])
def test_a_folder_that_is_there_again_by_a_link_is_refused(tmp_path, target):
    top = tmp_path / "d"
    (top / "sub").mkdir(parents=True)
    for path in (tmp_path, top, top / "sub"):
        (path / "a.csv").write_text(CSV)
    (top / "loop").symlink_to(target)
    with pytest.raises(DataError, match=r"got the folder .* once more, by a link, expected each folder once"):
        opened(top)
    assert names_of(top / "*.csv") == ["a.csv"]
    assert names_of(top / "sub" / "*.csv") == ["a.csv"]
    (top / "loop").unlink()
    (top / "_loop").symlink_to(target)
    (top / ".loop").symlink_to(target)
    assert names_of(top) == ["a.csv", "sub/a.csv"]


def test_many_loops_end_soon_and_links_to_other_places_are_followed(tmp_path):
    (tmp_path / "other" / "deep").mkdir(parents=True)
    (tmp_path / "other" / "deep" / "b.csv").write_text(CSV)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.csv").write_text(CSV)
    (tmp_path / "d" / "c.csv").symlink_to(tmp_path / "other" / "deep" / "b.csv")
    (tmp_path / "d" / "link").symlink_to(tmp_path / "other")
    assert names_of(tmp_path / "d") == ["a.csv", "c.csv", "link/deep/b.csv"]
    for i in range(6):
        (tmp_path / "d" / f"loop{i}").symlink_to(".")
    with pytest.raises(DataError, match="once more"):
        names_of(tmp_path / "d")


def test_links_that_lead_nowhere_and_what_is_no_file(tmp_path):
    top = tmp_path / "d"
    top.mkdir()
    (top / "a.csv").write_text(CSV)
    (top / "notes.txt").symlink_to("/nonexistent/notes.txt")  # would not be read
    (top / ".b.csv").symlink_to("/nonexistent/b.csv")
    assert names_of(top) == ["a.csv"]
    (top / "b.csv").symlink_to("/nonexistent/b.csv")
    with pytest.raises(DataError, match=r"b.csv: got a link that leads nowhere, or no plain file, expected a file"):
        opened(top)
    with pytest.raises(DataError, match=r"b.csv: got a link that leads nowhere"):
        opened(top / "*.csv")
    assert names_of(top / "a*.csv") == ["a.csv"]
    (top / "b.csv").unlink()
    os.mkfifo(top / "b.csv")
    with pytest.raises(DataError, match=r"b.csv: got a link that leads nowhere, or no plain file"):
        opened(top)
    with pytest.raises(DataError, match=r"b.csv: got a pipe or a device, expected a file or a folder"):
        opened(top / "b.csv")


def test_names_that_are_no_utf8(tmp_path):
    top = tmp_path / "d"
    top.mkdir()
    (top / "a.csv").write_text(CSV)
    (top / os.fsdecode(b"\xff.txt")).write_text("")  # would not be read
    assert names_of(top) == ["a.csv"]
    (top / os.fsdecode(b"b\xff.csv")).write_text(CSV)
    with pytest.raises(DataError, match=r"got the file name b'b\\xff.csv', expected UTF-8"):
        opened(top)
    with pytest.raises(ConfigError, match=r"data.source: got b'.*b\\xff.csv', expected a name in UTF-8"):
        opened(top / os.fsdecode(b"b\xff.csv"))


# --- data sets that the Hugging Face library saved


def saved(folder, name="data-00000-of-00001.arrow"):
    folder.mkdir(parents=True)
    write_arrow(folder / name, TABLE, stream=True)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))


def test_a_saved_split_that_lost_its_files_is_not_left_out(tmp_path):
    top = tmp_path / "d"
    saved(top / "train")
    saved(top / "test")
    (top / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(entities(opened(top))) == 4
    for text in ("{}", '{"_data_files": []}', '{"_data_files": [{}]}', '{"_data_files": 3}'):
        (top / "test" / "state.json").write_text(text)
        with pytest.raises(DataError, match=r"test/state.json: got no names of files, expected _data_files"):
            opened(top)
    (top / "test" / "state.json").unlink()
    with pytest.raises(DataError, match=r"test/state.json: got no such file, expected it for a split"):
        opened(top)
    for text in ("{}", '{"splits": []}', '{"splits": "train"}'):
        (top / "dataset_dict.json").write_text(text)
        with pytest.raises(DataError, match=r"dataset_dict.json: got no list of splits"):
            opened(top)


def test_a_folder_with_a_state_of_something_else_is_read_as_any(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.csv").write_text(CSV)
    (tmp_path / "d" / "state.json").write_text('{"step": 3}')
    assert names_of(tmp_path / "d") == ["a.csv"]


# --- files that are cut off while they are read

READ_WHILE_CUT = """
import os, sys
from pathlib import Path
from treadle.data.sources.declared import open_source
from treadle.errors import DataError
from treadle.spec import ColumnsSpec, DataSpec

path, size = Path(sys.argv[1]), int(sys.argv[2])
source = open_source(
    DataSpec(name="toy", source=str(path)), ColumnsSpec(entity="e", inputs=["x"]), scratch=path.parent / "scratch"
)
chunks = source.read(source.parts[0])
next(chunks)
os.truncate(path, size)
try:
    print(sum(chunk.inputs.size for chunk in chunks))
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("form", ["arrow", "stream", "parquet", "csv", "jsonl"])
def test_a_file_that_is_cut_off_while_it_is_read_is_damaged_and_ends_no_process(tmp_path, form):
    table = pa.table({"e": [str(i) for i in range(4000)], "x": [["p", "q"] * 500] * 4000})
    path = tmp_path / f"t.{'arrow' if form == 'stream' else form}"
    if form == "csv":
        path.write_text("e,x\n" + "".join(f"{i},{'p q ' * 500}\n" for i in range(8000)))
    elif form == "jsonl":
        path.write_text("".join(f'{{"e": "{i}", "x": "{"p q " * 500}"}}\n' for i in range(8000)))
    elif form == "parquet":
        pq.write_table(table, path, row_group_size=200, use_dictionary=False, compression="none")
    else:
        write_arrow(path, table, stream=form == "stream", rows=200)
    said = {"arrow": "cannot be read (", "parquet": "cannot be read ("}.get(form, "got 1000 bytes when it was read, ex")
    done = subprocess.run(
        [sys.executable, "-c", READ_WHILE_CUT, str(path), "1000"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path.name}: {said}")


def test_batches_are_read_one_at_a_time_and_very_large_ones_are_mapped(tmp_path, monkeypatch):
    values = np.arange(4_000_000, dtype=np.float32)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values), 1000)
    table = pa.table(
        {"e": [str(i) for i in range(4000)], "junk": pa.array(np.zeros(4000)), "x": lists.cast(pa.list_(pa.float32()))}
    )
    write_arrow(tmp_path / "t.arrow", table, rows=250)  # 16 batches of 1 MB
    source = opened(tmp_path / "t.arrow", ColumnsSpec(inputs=["x"], entity="e"))
    del table, lists

    def read():
        """The most that was in memory, and all values."""
        before, most, found = pa.total_allocated_bytes(), 0, []
        for chunk in source.read(source.parts[0]):
            most = max(most, pa.total_allocated_bytes() - before)
            found.append(chunk.inputs.ravel().copy())
        return most, np.concatenate(found)

    most, found = read()
    assert np.array_equal(found, values)
    assert 1_000_000 <= most <= 3_000_000
    monkeypatch.setattr(tables, "_MOST_READ_BYTES", 500_000)
    most, found = read()
    assert np.array_equal(found, values)
    assert most <= 100_000


def test_texts_of_an_arrow_file_do_not_keep_its_lists_in_memory(tmp_path):
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(8_000_000, np.float32)), 2000)
    table = pa.table({"e": [str(i) for i in range(4000)], "x": lists.cast(pa.list_(pa.float32()))})
    for stream in (False, True):
        write_arrow(tmp_path / "t.arrow", table, stream=stream, rows=250)
        source = opened(tmp_path / "t.arrow", ColumnsSpec(inputs=["x"], entity="e"))
        before = pa.total_allocated_bytes()
        kept = [chunk.entity_R for part in source.parts for chunk in source.read(part)]
        assert sum(map(len, kept)) == 4000
        assert pa.total_allocated_bytes() - before < 1_000_000


def test_columns_that_are_not_asked_for_are_not_read(tmp_path):
    """Those that are lie elsewhere in each batch, and in another order."""
    table = pa.table({"junk": ["j" * 50] * 9, "y": ["A", "B", "C"] * 3, "x": ["p q"] * 9, "e": list("abcdefghi")})
    path = write_arrow(tmp_path / "t.arrow", table, rows=4, compression="lz4")
    whole = path.read_bytes()
    path.unlink()
    lz4 = b"\x04\x22\x4d\x18"
    path.write_bytes(whole.replace(lz4, bytes(4), 1))  # the first that is packed is of the first column
    with pytest.raises(DataError, match=r"t.arrow: cannot be read \(.*LZ4"):
        opened(path, ColumnsSpec(inputs=["junk"]))
    lines = open_lines(DataSpec(name="toy", source=str(path)), COLUMNS, tmp_path)
    pieces = list(lines.read(lines.parts[0]))
    assert [piece.batch.schema.names for piece in pieces] == [["x", "y", "e"]] * 3
    assert [e for piece in pieces for e in piece.batch.column("e").to_pylist()] == list("abcdefghi")
    assert [n for piece in pieces for n in piece.number_R.tolist()] == list(range(1, 10))


def test_a_batch_with_more_text_than_32_bits_can_count(tmp_path):
    """Only ever mapped: the file is a hole of 2 GiB in the middle."""
    size = 2**31
    offsets = np.array([0, size + 10, size + 11, size + 13], np.int64)
    data = np.memmap(tmp_path / "hole", np.uint8, "w+", shape=(size + 13,))  # takes no room
    data[-3:] = list(b"abc")
    texts = pa.LargeStringArray.from_buffers(3, pa.py_buffer(offsets), pa.py_buffer(data))
    batch = pa.record_batch({"e": texts, "x": pa.array([[1.0], [2.0], [3.0]])})
    pieces = [tables._detached(piece) for piece in tables.cut(batch.slice(1))]
    assert [e for piece in pieces for e in piece.column("e").cast(pa.string()).to_pylist()] == ["a", "bc"]


# --- columns and rows


def test_columns_of_one_name_are_refused_in_every_format(tmp_path):
    twice = pa.Table.from_arrays([*TABLE.columns, TABLE.column("y")], names=["e", "x", "y", "y"])
    words = r"columns.target: 'y': got 2 columns of that name in t.{}, expected one"
    pq.write_table(twice, tmp_path / "t.parquet")
    write_arrow(tmp_path / "t.arrow", twice)
    (tmp_path / "t.csv").write_text("e,x,y,y\na,p q,A,Z\n")
    for form in ("parquet", "arrow", "csv"):
        with pytest.raises(DataError, match=words.format(form)):
            opened(tmp_path / f"t.{form}")
    others = ColumnsSpec(entity="e", inputs=["x"])  # y is not asked for
    assert entities(opened(tmp_path / "t.parquet", others)) == ["a", "b"]
    assert entities(opened(tmp_path / "t.arrow", others)) == ["a", "b"]
    assert entities(opened(tmp_path / "t.csv", others)) == ["a"]


def test_parquet_without_a_row_group(tmp_path):
    top = tmp_path / "d"
    top.mkdir()
    pq.ParquetWriter(str(top / "a.parquet"), TABLE.schema).close()
    assert pq.ParquetFile(top / "a.parquet").num_row_groups == 0
    with pytest.raises(DataError, match=r"a.parquet: got no row that can be read, expected at least one"):
        opened(top)
    pq.write_table(TABLE, top / "b.parquet")
    assert entities(opened(top)) == ["a", "b"]


def test_a_column_with_a_dot_in_its_name_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PART_BYTES", 30_000)
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=50).tolist() for _ in range(400)]
    pq.write_table(pa.table({"x.v": rows, "x": rows, "xx": rows}), tmp_path / "t.parquet", row_group_size=50)
    for name in ("x.v", "x"):
        source = opened(tmp_path / "t.parquet", ColumnsSpec(inputs=[name]))
        assert len(source.parts) > 2
        assert all(part.size > 10_000 for part in source.parts)
        found = np.concatenate([c.inputs.ravel() for part in source.parts for c in source.read(part)])
        assert np.array_equal(found, np.array(rows, np.float32).ravel())
    assert tables._group_bytes(pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(0), ["v"]) == 0


# --- JSON lines


def test_whole_numbers_that_floats_round_are_read_the_same_beside_a_broken_line(tmp_path):
    path = tmp_path / "t.jsonl"
    lines = [
        json.dumps({"e": str(i), "q": 1_704_067_200_000_000_001 + i, "x": [[2**60 + 1 + i, 0.5]]}) for i in range(20)
    ]
    lines[3] = '{"e": "3", "q": 1' + "0" * 400 + ', "x": [[1, 2.5]]}'
    columns = ColumnsSpec(entity="e", time="q", inputs=["x"])

    def read():
        source = opened(path, columns)
        chunks = [chunk for part in source.parts for chunk in source.read(part)]
        return [(c.entity_R.to_pylist(), c.time_R.tolist(), c.inputs.tolist()) for c in chunks], problems(source)

    path.write_text("\n".join(lines) + "\n")
    whole, none = read()
    assert none == []
    assert whole[0][1][3] == np.inf
    path.write_text("\n".join([*lines, "{broken"]) + "\n")
    found, told = read()
    assert found == whole
    assert len(told) == 1
    assert told[0].startswith("t.jsonl:21: line: got no JSON object")
    path.write_text("\n".join([*lines, '{"e": "z", "q": "9", "x": [["1", 2]]}']) + "\n")  # text is no number
    found, told = read()
    assert found == whole
    assert [line.partition(": got")[0] for line in told] == ["t.jsonl:21: x", "t.jsonl:21: q"]


@pytest.mark.parametrize("bad", [b'"e": "b\xff\xfe", "x": "q"', b'"e": "b", "x": "q\xff"', b'"e": "b", "z\xff": 1'])
def test_json_lines_that_are_no_utf8(tmp_path, bad):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"e": "a", "x": "p", "y": "A"}\n{' + bad + '}\n{"e": "ü", "x": "p", "y": "B"}\n'.encode())
    source = opened(path)
    assert entities(source) == ["a", "ü"]
    [told] = problems(source)
    assert told.startswith("t.jsonl:2: line: got b'\\xff")
    assert told.endswith(", expected text in UTF-8")


def test_json_keys_that_come_twice(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"e": "a", "x": ["p"], "y": "A", "z": 1, "z": {"x": 1, "x": 2}}\n'
        '{"e": "b", "x": ["p"], "x": ["q"], "y": "A"}\n{"e": "c", "x": ["p"], "y": "A"}\n'
    )
    source = opened(path)
    assert entities(source) == ["a", "c"]
    assert problems(source) == ["t.jsonl:2: x: got the key more than once, expected it once"]


# --- CSV


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_csv_row_of_several_blocks(tmp_path, at):
    words = CHUNK_BYTES * 13 // 4 // 3  # 13 MB of them
    rows = [("1", "p q", "A"), ("2", "p", "B"), ("3", "q", "B")]
    rows.insert(at, ("long", " ".join(["pq"] * words), "A"))
    ragged = "ragged\n" if at else ""
    path = tmp_path / "t.csv"
    path.write_text("e,x,y\n" + ragged + "".join(",".join(row) + "\n" for row in rows))
    source = opened(path)
    chunks = [chunk for part in source.parts for chunk in source.read(part)]
    assert [e for c in chunks for e in c.entity_R.to_pylist()] == [row[0] for row in rows]
    first = 3 if ragged else 2
    assert [n for c in chunks for n in c.number_R.tolist()] == list(range(first, first + 4))
    assert [n for c in chunks for n in c.lengths_R.tolist()] == [len(row[1].split()) for row in rows]
    assert [p.number for c in chunks for p in c.problems] == ([2] if ragged else [])


@pytest.mark.parametrize("before", [0, 500, 1500, 2500, 3500])
def test_a_csv_row_of_several_blocks_after_many_others(tmp_path, monkeypatch, before):
    """Wherever it begins in blocks of any size, no line is lost, and none is there twice."""
    monkeypatch.setattr(csv_lines, "CHUNK_BYTES", 1000)
    sizes = np.random.default_rng(0).integers(0, 40, 700)
    sizes[[0, 300, 301, 500, 699]] = [before // 2, 900, 1300, 2000, 12_000]
    lines = [f"{i},{'p ' * size}p,{'A' if i % 7 else 'A,more'}" for i, size in enumerate(sizes.tolist(), start=2)]
    (tmp_path / "t.csv").write_text("e,x,y\n" + "\n".join(lines) + "\n")
    source = opened(tmp_path / "t.csv")
    chunks = [chunk for part in source.parts for chunk in source.read(part)]
    kept = [i for i in range(2, 702) if i % 7]
    assert [n for c in chunks for n in c.number_R.tolist()] == kept
    assert entities(source) == list(map(str, kept))
    assert [n for c in chunks for n in c.lengths_R.tolist()] == [int(sizes[i - 2]) + 1 for i in kept]
    assert [p.number for c in chunks for p in c.problems] == [i for i in range(2, 702) if i % 7 == 0]


def test_what_was_read_before_is_left_out_of_a_piece():
    """The pieces of smaller blocks end where those of larger ones do, as far as is known; this does not rest on it."""
    batch = pa.record_batch({"e": [b"3", b"5", b"6"]})
    told = tuple(Problem(file="t", number=number, column="line", message="") for number in (4, 7))
    piece = tables.Piece(batch=batch, number_R=np.array([3, 5, 6]), problems=told)
    for done in range(9):
        rest = csv_lines._after(piece, done)
        assert rest.number_R.tolist() == [n for n in (3, 5, 6) if n > done]
        assert rest.batch.column("e").to_pylist() == [str(n).encode() for n in rest.number_R]
        assert [p.number for p in rest.problems] == [n for n in (4, 7) if n > done]


def test_a_quote_that_is_never_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_lines, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(csv_lines, "_MOST_BLOCK_BYTES", 8000)
    path = tmp_path / "t.csv"
    path.write_text(CSV + "c,p,B\n" * 400 + 'd,"p,B\n' + "c,p,B\n" * 9000)
    with pytest.raises(DataError, match=r"t.csv: after line \d+: got a row of more than 7.8 KiB, expected less"):
        entities(opened(path))
    path.write_text('e,x,y\nd,"p,B\n' + "c,p,B\n" * 9000)
    with pytest.raises(DataError, match=r"t.csv: after line 1: got a row of more than"):
        opened(path)


def test_csv_cells_that_are_no_utf8(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("e,x,y\nü,p,A\n".encode() + b"b\xff,p,A\nc,,A\nd,p,\xfe\n\xff,p\xff,A\ne,p,B\n")
    source = opened(path)
    found = [name for name in entities(source) if name != "c"]
    assert found == ["ü", "e"]
    assert sorted(line for line in problems(source) if "UTF" in line) == [
        "t.csv:3: e: got b'b\\xff', expected text in UTF-8",
        "t.csv:5: y: got b'\\xfe', expected text in UTF-8",
        "t.csv:6: e: got b'\\xff', expected text in UTF-8",
        "t.csv:6: x: got b'p\\xff', expected text in UTF-8",
    ]
    path.write_bytes(b"e,x,y\xff\nb,p,A\n")
    with pytest.raises(DataError, match=r"t.csv: cannot be read \('utf-8' codec can't decode"):
        opened(path)
    path.write_bytes(b'e,w,x\na,1,"[1.5]"\nb,2\xff,"[1.5]"\nc,,"[2\xff"\n')
    source = opened(path, ColumnsSpec(entity="e", inputs=["x"], weight="w"))
    assert entities(source) == ["a"]
    assert problems(source) == [
        "t.csv:3: w: got b'2\\xff', expected text in UTF-8",
        "t.csv:4: x: got b'[2\\xff', expected text in UTF-8",
    ]

"""Events dealt to files: each small enough whatever was packed, problems kept beside them, no room said as such."""

from __future__ import annotations

import gzip
import pickle
import resource
import signal
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from treadle.data.build.pipeline import Origin, build_rows
from treadle.data.chunk import Problem, Schema
from treadle.data.draft import Tokens
from treadle.data.sources.complaints import Complaints, read_complaints
from treadle.data.sources.deal import Deal
from treadle.data.sources.declared import open_source
from treadle.data.sources.events import open_events
from treadle.data.sources.lines import open_lines
from treadle.errors import DataError, TransientError
from treadle.spec import ColumnsSpec, DataSpec, Layout
from treadle.testing.memory import MemoryBlobs

SPEC = ColumnsSpec(layout=Layout.events, entity="who", times="t", inputs=["x"])


def dealt(path, tmp_path, file_bytes):
    data = DataSpec(name="toy", source=str(path))
    lines = open_lines(data, SPEC, tmp_path)
    return open_events(data, SPEC, lines, scratch=tmp_path / "scratch", partition_bytes=file_bytes)


def test_files_of_a_packed_source_are_dealt_again_until_they_are_small(tmp_path):
    num, most = 60_000, 200_000
    who = [f"patient-{i % 50 if i % 3 else 0}" for i in range(num)]
    text = "who,t,x\n" + "".join(f"{w},{num - i},{i}.5\n" for i, w in enumerate(who))
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    source = dealt(tmp_path / "t.csv.gz", tmp_path, most)
    found = {}
    for part in source.parts:
        chunks = list(source.read(part))
        assert part.size <= 2 * most or sum(chunk.num_rows for chunk in chunks) == 1
        for chunk in chunks:
            for entity, length in zip(chunk.entity_R.to_pylist(), chunk.lengths_R.tolist(), strict=True):
                assert entity not in found
                found[entity] = length
    assert found == Counter(who)
    assert len({part.file for part in source.parts}) == len(source.parts) > 5
    files = [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    assert sorted(map(str, files)) == sorted(part.path for part in source.parts)


def test_lines_dealt_again_keep_the_order_of_reading(tmp_path):
    batch = pa.record_batch({"entity": [f"{i % 7}" for i in range(7000)], "line": range(7000)})
    with Deal(tmp_path / "d", size=10, file_bytes=10_000) as deal:
        deal.add(batch)
    files = list(deal.files())
    assert len(files) == 7
    for path in files:
        lines = pa.ipc.open_stream(path.read_bytes()).read_all().column("line").to_pylist()
        assert lines == list(range(lines[0], 7000, 7))


def test_lines_without_an_entity_are_not_held(tmp_path):
    num = 50_000
    who = pa.concat_arrays([pa.array(["a"]), pa.nulls(num - 1, pa.string())])
    pq.write_table(pa.table({"who": who, "t": np.arange(num), "x": np.zeros(num, "f4")}), tmp_path / "t.parquet")
    source = open_source(DataSpec(name="toy", source=str(tmp_path / "t.parquet")), SPEC, scratch=tmp_path / "scratch")
    assert len(pickle.dumps(source)) < 5_000
    counts = [len(chunk.problems) for chunk in source.read(source.parts[0])]
    assert sum(counts) == num - 1
    assert max(counts) < 10_000
    first = next(iter(source.read(source.parts[0])))
    assert first.num_rows == 0
    assert str(first.problems[0]) == "t.parquet:2: who: got null, expected text"
    with pytest.raises(DataError, match=r"t.parquet:2: who: got null"):
        build_rows(source, DataSpec(name="toy"), MemoryBlobs(), recipe="r", origin=Origin(licence="", is_here=True))


def test_complaints_are_written_as_they_come(tmp_path):
    said = Problem(file="f", number=1, column="c", message="got é", entity="e", where="w")
    with Complaints(tmp_path / "c") as complaints:
        complaints.add([said])
        assert not complaints.path.exists()
        complaints.add([said] * 9000)
        assert complaints.path.exists()
    schema = Schema(inputs=Tokens(), target=None, timed=True)
    found = [problem for chunk in read_complaints(tmp_path / "c", schema) for problem in chunk.problems]
    assert found == [said] * 9001


@pytest.mark.parametrize("who", [["a", "b"], [None, "b"]])
def test_no_room_is_said_as_such(tmp_path, who):
    num = 100_000
    table = pa.table({"who": who * num, "t": np.zeros(2 * num, "i8"), "x": np.zeros(2 * num, "f4")})
    pq.write_table(table, tmp_path / "t.parquet")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(TransientError, match=r"/events.*: .*File too large.*, expected room") as caught:
            dealt(tmp_path / "t.parquet", tmp_path, 64 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.hint == "free some space"

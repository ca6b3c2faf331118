"""Times of files are exact: sorted and parted as they are counted, of one kind in all files, complained of."""

from __future__ import annotations

import decimal
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from build_rig import stored_rows
from hypothesis import example, given
from hypothesis import strategies as st

from treadle.data.build.pipeline import Origin, build_rows
from treadle.data.chunk import keep_rows
from treadle.data.draft import Draft, Row, Tokens
from treadle.data.sources.arrays import texts
from treadle.data.sources.clock import clock_of
from treadle.data.sources.declared import open_source
from treadle.errors import DataError
from treadle.spec import ColumnsSpec, DataSpec, Layout, OnBadRow, TargetPer
from treadle.testing.memory import MemoryBlobs

NOW = 1_704_067_200_000_000_000
"""2024 in nanoseconds: far beyond 2**53."""
DAY = 86_400 * 10**9
NANOS = [NOW + 150, NOW + 100, NOW + 50, NOW]
STAMP = pa.array([NOW // 1000], pa.timestamp("us"))


def digits(count, scale):
    return decimal.Decimal(count).scaleb(-scale, decimal.Context(prec=38))


def events(**spec):
    return ColumnsSpec(layout=Layout.events, **{"entity": "who", "times": "t", "inputs": ["x"], **spec})


def table(times, **more):
    num = len(times)
    return pa.table({"who": ["a"] * num, "t": times, "x": [float(i) for i in range(num, 0, -1)], **more})


def opened(folder, spec, *tables):
    folder = folder / "files"
    folder.mkdir()
    for i, each in enumerate(tables):
        pq.write_table(each, folder / f"{i}.parquet")
    return open_source(DataSpec(name="toy", source=str(folder)), spec, scratch=folder.parent / "scratch")


def opened_text(path, spec, text):
    path.write_text(text)
    return open_source(DataSpec(name="toy", source=str(path)), spec, scratch=path.parent / "scratch")


def chunks_of(source):
    return [chunk for part in source.parts for chunk in source.read(part)]


def built(source, **data):
    origin = None if isinstance(source, Draft) else Origin(licence="", is_here=True)
    shelf = MemoryBlobs()
    digest, manifest = build_rows(source, DataSpec(name="toy", **data), shelf, recipe="r", origin=origin)
    return digest, manifest, shelf


@pytest.mark.parametrize(
    ("times", "gap"),
    [
        (pa.array(NANOS), 50),
        (pa.array(NANOS, pa.uint64()), 50),
        (pa.array(NANOS, pa.timestamp("ns")), 50 / DAY),
        (pa.array(NANOS, pa.timestamp("ns", "America/New_York")), 50 / DAY),
        (pa.array([digits(t, 9) for t in NANOS], pa.decimal128(38, 9)), 50e-9),
        (pa.array([digits(t, 0) for t in NANOS], pa.decimal256(40, 0)), 50),
        (pa.array([t // 50 for t in NANOS], pa.timestamp("us")), 1000 / DAY),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_events_closer_than_float64_tells_apart_keep_their_order_and_gaps(tmp_path, times, gap):
    source = opened(tmp_path, events(), table(times))
    [chunk] = chunks_of(source)
    assert chunk.inputs[:, 0].tolist() == [1, 2, 3, 4]
    assert chunk.gaps_N.tolist() == np.float32([0, gap, gap, gap]).tolist()
    assert len(keep_rows(chunk, np.array([False])).gaps_N) == 0
    _, manifest, shelf = built(source)
    [row] = stored_rows(shelf, manifest)
    assert np.float32(row[2]).tolist() == chunk.gaps_N.tolist()


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9),
    st.sampled_from([pa.int64(), pa.timestamp("us"), pa.timestamp("ns"), pa.decimal128(38, 9)]),
)
@example(counts=[-(2**63), 2**63 - 1], type_=pa.int64())
def test_gaps_and_times_are_those_of_whole_numbers(counts, type_):
    counts = sorted(counts)
    clock = clock_of(type_)
    is_decimal = pa.types.is_decimal(type_)
    array = pa.array([digits(c, 9) for c in counts], type_) if is_decimal else pa.array(counts).cast(type_)
    padded = pa.concat_arrays([array, array]).slice(len(array))
    found, wrong = clock.count(padded, "f", "f")
    assert (found.to_pylist(), wrong) == (counts, None)
    gaps = [0, *((b - a) / clock.ticks for a, b in itertools.pairwise(counts))]
    np.testing.assert_allclose(clock.gaps(found, np.array([0])), np.float32(gaps), rtol=1e-6)
    np.testing.assert_allclose(clock.times(found), [c / clock.ticks for c in counts], rtol=1e-15)


@pytest.mark.parametrize("second", [1_704_067_201, -1_704_067_201, 253_402_300_799])
def test_one_moment_is_one_time_in_every_unit(second):
    found = set()
    for unit, scale in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
        if abs(second * scale) < 2**63:
            array = pa.array([second * scale], pa.timestamp(unit))
            clock = clock_of(array.type)
            found.add(clock.times(clock.count(array, "f", "f")[0])[0])
    assert found == {second / 86_400}


@pytest.mark.parametrize("type_", [pa.int64(), pa.timestamp("ns")], ids=str)
def test_lists_of_times_have_exact_gaps_and_a_fall_that_float64_hides_is_found(tmp_path, type_):
    times = pa.array([NANOS[::-1], [NOW, NOW + 7], [NOW + 50, NOW], [None, NOW]], pa.list_(type_))
    rows = pa.table({"t": times, "x": [[1.0] * 4, *[[1.0, 2.0]] * 3]})
    source = opened(tmp_path, ColumnsSpec(times="t", inputs=["x"]), rows)
    [chunk] = chunks_of(source)
    unit = clock_of(type_).ticks
    assert chunk.gaps_N.tolist()[:6] == np.float32([0, 50 / unit, 50 / unit, 50 / unit, 0, 7 / unit]).tolist()
    assert [str(p) for p in chunk.problems] == [
        "0.parquet:3 ('3'): t: got times that fall by less than float64 shows, expected times that never fall"
    ]
    _, manifest, _ = built(source, on_bad_row=OnBadRow.quarantine, bad_rows=2)
    assert (manifest.num_rows, manifest.header.set_aside) == (2, 2)


def test_floats_that_hide_the_order_of_events_are_refused(tmp_path):
    times = [("a", NOW), ("a", NOW + 50), ("b", NOW), ("b", NOW + 999), ("c", 5), ("c", 5)]
    lines = [json.dumps({"who": who, "t": t, "x": 1.5}) for who, t in times]
    [chunk] = chunks_of(opened_text(tmp_path / "t.jsonl", events(), "\n".join(lines)))
    assert chunk.entity_R.to_pylist() == ["b", "c"]
    [problem] = chunk.problems
    assert str(problem) == (
        "t.jsonl:1 ('a'): times: got the time of another line in 1 lines, first t.jsonl:2, "
        "expected times below 2**53, as float64 merges larger ones"
    )


def test_files_with_other_units_of_the_calendar_are_one_clock(tmp_path):
    source = opened(
        tmp_path,
        events(time="q"),
        table(pa.array([20_003], pa.date32()), q=pa.array([20_005], pa.date32())),
        table(pa.array([20_002 * DAY], pa.timestamp("ns")), q=pa.array(["2024-10-09"])),
        table(pa.array([20_001 * 86_400], pa.timestamp("s", "UTC")), q=pa.array([None], pa.timestamp("ms"))),
        table(pa.array(["2024-10-05T12:00:00"]), q=pa.array([20_005 * 86_400_000], pa.date64())),
    )
    [chunk] = chunks_of(source)
    assert chunk.times_N.tolist() == [20_001, 20_001.5, 20_002, 20_003]
    assert chunk.gaps_N.tolist() == [0, 0.5, 0.5, 1]
    assert chunk.time_R.tolist() == [20_005]


def test_files_with_other_numbers_are_one_clock(tmp_path):
    for i, times in enumerate(([[3], [2.0, 7.0], pa.array([1], pa.int8())], [[3.0], [2], [1, 7]])):
        (tmp_path / f"{i}").mkdir()
        [chunk] = chunks_of(opened(tmp_path / f"{i}", events(), *map(table, times)))
        assert chunk.times_N.tolist() == [1, 2, 3, 7]
    lost = opened(tmp_path, events(), table([3, None]), table([2.0, np.nan]), table([decimal.Decimal(5)]))
    [chunk] = chunks_of(lost)
    assert [str(p) for p in chunk.problems] == [
        "0.parquet:1 ('a'): times: got no time in 2 lines, first 0.parquet:2, expected one in each"
    ]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (STAMP, pa.array([1_704_067_200]), "got int64, expected dates or timestamps"),
        (pa.array([1_704_067_200.5]), STAMP, r"got timestamp\[us\], expected numbers"),
        (pa.array(["2024-01-01"]), pa.array([19_723.0]), "got double, expected dates or timestamps"),
        (pa.array([1]), pa.array([19_723], pa.date32()), r"got date32\[day\], expected numbers"),
    ],
    ids=str,
)
@pytest.mark.parametrize("column", ["event's times", "event's time", "row's times", "row's time"])
def test_numbers_beside_a_calendar_are_refused(tmp_path, first, second, words, column):
    layout, _, key = column.partition("'s ")
    if layout == "event":
        spec = events(**{"times": "n", key: "t"})
        tables = [table(each, n=pa.array([1])) for each in (first, second)]
    else:
        spec = ColumnsSpec(inputs=["x"], **{key: "t"})
        lists = [pa.array([each.to_pylist()], pa.list_(each.type)) for each in (first, second)]
        tables = [
            pa.table({"t": whole if key == "time" else listed, "x": [[1.0]]})
            for whole, listed in zip((first, second), lists, strict=True)
        ]
    with pytest.raises(DataError, match=f"1.parquet: columns.{key}: 't': {words}, as in 0.parquet\n") as caught:
        chunks_of(opened(tmp_path, spec, *tables))
    assert caught.value.hint == "write all files with one schema"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1], [1.5]),
        ([1], pa.array([2**63], pa.uint64())),
        ([1.5], [2**53 + 1]),
        (STAMP, pa.array([NOW + 1], pa.timestamp("ns"))),
        (pa.array([NOW], pa.timestamp("ns")), pa.array([253_402_300_799], pa.timestamp("s"))),
        ([decimal.Decimal("1.5")], [1.25]),
        ([decimal.Decimal("1.5")], [decimal.Decimal("1.25")]),
        ([decimal.Decimal("1.5")], pa.array([decimal.Decimal(10**30)], pa.decimal128(38, 1))),
        ([decimal.Decimal("1.5")], [True]),
    ],
)
def test_times_that_the_clock_of_the_first_file_cannot_count_are_refused(tmp_path, first, second):
    with pytest.raises(DataError, match=r"1.parquet: columns.times: 't': got .* that .* cannot hold .*as in 0"):
        opened(tmp_path, events(), table(first), table(second))


def test_text_that_is_no_time_is_said_of_the_entity(tmp_path):
    text = "who,t,q,x\na,0,2024-01-01,1.5\nb,0,2024-01-01,1.5\nb,1,31/12/2024,1.5\nb,0,soon,1.5\nc,0,,1.5\n"
    [chunk] = chunks_of(opened_text(tmp_path / "t.csv", events(time="q"), text))
    assert chunk.entity_R.to_pylist() == ["a", "c"]
    assert np.array_equal(chunk.time_R, [19_723, np.nan], equal_nan=True)
    assert [str(p) for p in chunk.problems] == [
        "t.csv:3 ('b'): time: got text that is no time in 2 lines, first t.csv:5, expected as 2026-01-31T12:00:00"
    ]


def test_a_list_of_another_length_stops_no_other_entity(tmp_path):
    lines = [{"who": f"{i % 5}", "t": i, "x": [1.0, i], "y": [i // 9, 2.5]} for i in range(50)]
    lines[30]["x"], lines[35]["x"], lines[41]["y"] = [1.0], [], [7.5]
    spec = events(target=["y"], target_per=TargetPer.frame)
    source = opened_text(tmp_path / "t.jsonl", spec, "\n".join(map(json.dumps, lines)))
    [chunk] = chunks_of(source)
    assert chunk.entity_R.to_pylist() == ["2", "3", "4"]
    assert chunk.inputs.tolist() == [[1, i] for k in (2, 3, 4) for i in range(k, 50, 5)]
    assert chunk.targets.tolist() == [[i // 9, 2.5] for k in (2, 3, 4) for i in range(k, 50, 5)]
    assert [str(p) for p in chunk.problems] == [
        "t.jsonl:1 ('0'): inputs: got a list of another length in 2 lines, first t.jsonl:31, expected 2 numbers",
        "t.jsonl:2 ('1'): target: got a list of another length in 1 lines, first t.jsonl:42, expected 2 numbers",
    ]
    _, manifest, _ = built(source, on_bad_row=OnBadRow.quarantine, bad_rows=2)
    assert (manifest.num_rows, manifest.header.set_aside) == (3, 2)


@pytest.mark.parametrize("layout", ["rows", "draft"])
def test_a_data_set_does_not_depend_on_the_order_of_zeros_of_two_signs(tmp_path, layout):
    digests = set()
    for i, zeros in enumerate(([0.0, -0.0], [-0.0, 0.0])):
        if layout == "draft":
            rows = [Row(entity="e", inputs=["p"], time=zero, times=[zero], weight=zero) for zero in zeros]
            source = Draft(rows=rows, inputs=Tokens(), target=None, licence="")
        else:
            (tmp_path / f"{i}").mkdir()
            columns = {"who": ["e"] * 2, "x": ["p"] * 2, "q": zeros, "t": [[zero] for zero in zeros]}
            spec = ColumnsSpec(entity="who", inputs=["x"], time="q", times="t", weight="q")
            source = opened(tmp_path / f"{i}", spec, pa.table(columns))
        _, manifest, _ = built(source)
        digests.add(tuple(manifest.columns[name].tobytes() for name in ("time", "last", "weight", "inputs")))
    assert len(digests) == 1


def test_no_zero_of_an_event_is_negative(tmp_path):
    zeros = pa.table({"who": ["a"], "t": [-0.0], "x": [1.0], "q": [-0.0]})
    [chunk] = chunks_of(opened(tmp_path, events(time="q", weight="q"), zeros))
    for array in (chunk.times_N, chunk.time_R, chunk.weight_R):
        assert not np.signbit(array).any()


@pytest.mark.slow
def test_text_that_begins_beyond_two_gibibytes_of_a_batch():
    offsets, data = np.array([0, 2**31 + 10, 2**31 + 12], np.int64), np.zeros(2**31 + 12, np.uint8)
    data[-2:] = ord("a")
    array = pa.LargeStringArray.from_buffers(2, pa.py_buffer(offsets), pa.py_buffer(data)).slice(1)
    assert texts(array).to_pylist() == ["aa"]

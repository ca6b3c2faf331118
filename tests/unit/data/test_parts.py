"""Parts of a source: facts of rows, sorted runs, and what is left out before it is written."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from build_rig import CutSource

from treadle.data.build.facts import chunk_facts, hash_texts
from treadle.data.build.parts import PartJob, read_facts, write_part
from treadle.data.build.scratch import Scratch
from treadle.data.chunk import Chunk
from treadle.data.draft import Draft, Labels, Row, Tokens
from treadle.errors import IntegrityError, NotFoundError
from treadle.spec import TargetPer
from treadle.store.local import LocalBlobs
from treadle.testing import MemoryBlobs

FOLDER = "data/toy/building/b"


def words(num: int) -> list[Row]:
    rng = np.random.default_rng(0)
    return [
        Row(
            entity=f"e{i}",
            inputs=["abc"[s] for s in rng.integers(0, 3, 1 + i % 9)],
            target=["xyz"[s] for s in rng.integers(0, 3, 1 + i % 4)],
        )
        for i in range(num)
    ]


def draft(rows: list[Row]) -> Draft:
    return Draft(rows=rows, inputs=Tokens(), target=Labels(per=TargetPer.sequence), licence="none")


def job(blobs, source, **changes) -> PartJob:
    found = PartJob(
        open_shelf=lambda: blobs,
        folder=FOLDER,
        source=source,
        max_length=100,
        limit=None,
        most_bad=1000,
        run_bytes=3000,
    )
    return dataclasses.replace(found, **changes)


@pytest.fixture(params=["memory", "folder"])
def blobs(request, tmp_path):
    return MemoryBlobs() if request.param == "memory" else LocalBlobs(tmp_path / "store")


def test_runs_are_sorted_and_hold_the_rows(blobs):
    rows = words(200)
    assert write_part(job(blobs, CutSource(draft(rows))), (3, CutSource(draft(rows)).parts[0])) == 200
    scratch = Scratch(blobs, FOLDER)
    facts = read_facts(scratch, 3)
    assert len(facts.meta.runs) > 3
    assert set(facts.meta.symbols) == set("abc")
    start, seen = 0, {}
    for run in facts.meta.runs:
        columns = {name: column[start : start + run.rows] for name, column in facts.columns.items()}
        keys = list(zip(columns["length"], columns["entity"], columns["content"], strict=True))
        assert keys == sorted(keys)
        raw = scratch.read(run.name)
        assert len(raw) == run.size
        values = np.frombuffer(raw[: run.targets_at], np.int32)
        targets = np.frombuffer(raw[run.targets_at : run.gaps_at], np.int32)
        assert run.gaps_at == run.text_at  # no row has times
        text = raw[run.text_at :]
        v = t = e = 0
        for length, count, size in zip(columns["length"], columns["targets"], columns["text"], strict=True):
            entity = text[e : e + size].decode()
            inputs = [facts.meta.symbols[i] for i in values[v : v + length]]
            seen[entity] = (inputs, [facts.meta.labels[i] for i in targets[t : t + count]])
            v, t, e = v + length, t + count, e + size
        start += run.rows
    assert seen == {row.entity: (list(row.inputs), list(row.target)) for row in rows}


def test_a_run_is_written_when_the_text_of_entities_fills_it():
    rows = [Row(entity=f"{i:03}" + "u" * 1000, inputs=["a"], target=["x"]) for i in range(200)]
    blobs = MemoryBlobs()
    source = CutSource(draft(rows))
    assert write_part(job(blobs, source, run_bytes=20_000), (0, source.parts[0])) == 200
    runs = read_facts(Scratch(blobs, FOLDER), 0).meta.runs
    assert max(run.size - run.text_at for run in runs) < 30_000
    assert len(runs) >= 7


def test_a_finished_part_is_taken_as_it_is_unless_a_byte_changed(blobs):
    source = CutSource(draft(words(100)))
    part = (0, source.parts[0])
    for _ in range(2):
        assert write_part(job(blobs, source), part) == 100
    assert source.reads == [0]
    run = read_facts(Scratch(blobs, FOLDER), 0).meta.runs[1]
    key = f"{FOLDER}/{run.name}"
    raw = blobs.get(key)
    for changed in (raw[:7] + bytes([raw[7] ^ 1]) + raw[8:], raw[:-1]):
        blobs.put(key, changed)
        source.reads.clear()
        assert write_part(job(blobs, source), part) == 100
        assert source.reads == [0]
        assert blobs.get(key) == raw
    blobs.delete(key)
    source.reads.clear()
    assert write_part(job(blobs, source), part) == 100
    assert source.reads == [0]


def test_no_changed_byte_of_facts_goes_unseen(blobs):
    source = CutSource(draft([dataclasses.replace(row, weight=1.5) for row in words(60)]))
    part = (0, source.parts[0])
    write_part(job(blobs, source), part)
    key = f"{FOLDER}/part-000000/facts.arrow"
    whole = blobs.get(key)
    weights = np.full(5, 1.5, np.float32).tobytes()
    for place in [whole.index(weights) + 2, *range(0, len(whole), 487)]:
        blobs.put(key, whole[:place] + bytes([whole[place] ^ 0x20]) + whole[place + 1 :])
        with pytest.raises(IntegrityError, match="expected the facts of a part"):
            read_facts(Scratch(blobs, FOLDER), 0)
    source.reads.clear()
    assert write_part(job(blobs, source), part) == 60
    assert source.reads == [0]
    assert blobs.get(key) == whole


def test_facts_that_are_damaged_are_no_facts(blobs):
    source = CutSource(draft(words(20)))
    scratch = Scratch(blobs, FOLDER)
    with pytest.raises(NotFoundError):
        read_facts(scratch, 0)
    write_part(job(blobs, source), (0, source.parts[0]))
    key = f"{FOLDER}/part-000000/facts.arrow"
    data = blobs.get(key)
    blobs.put(key, data[:200])
    with pytest.raises(IntegrityError, match="expected the facts of a part"):
        read_facts(scratch, 0)
    assert write_part(job(blobs, source), (0, source.parts[0])) == 20
    assert blobs.get(key) == data


def test_a_piece_that_is_not_there_is_named(blobs):
    scratch = Scratch(blobs, FOLDER)
    scratch.write("x", [b"abc", np.arange(3, dtype=np.uint8)])
    assert scratch.read("x") == b"abc\0\1\2"
    buffer = bytearray(4)
    scratch.read_into("x", [(2, memoryview(buffer)[:3]), (0, memoryview(buffer)[3:])])
    assert bytes(buffer) == b"c\0\1a"
    with pytest.raises(IntegrityError, match="building/b/x: got 1 bytes of 4"):
        scratch.read_into("x", [(5, memoryview(buffer))])


def test_a_limit_leaves_rows_out_before_they_are_written():
    blobs = MemoryBlobs()
    rows = words(3000)
    source = CutSource(draft(rows), per_chunk=50)
    kept = write_part(job(blobs, source, limit=10), (0, source.parts[0]))
    assert 10 <= kept < 150
    smallest = sorted(xxhash.xxh3_64_intdigest(row.entity.encode()) for row in rows)[:10]
    assert set(smallest) <= set(read_facts(Scratch(blobs, FOLDER), 0).columns["entity"].tolist())


def test_a_part_with_too_many_bad_rows_is_not_read_to_its_end():
    rows = [dataclasses.replace(row, target=[]) for row in words(100)]
    source = CutSource(draft(rows), per_chunk=10)
    blobs = MemoryBlobs()
    write_part(job(blobs, source, most_bad=25), (0, source.parts[0]))
    meta = read_facts(Scratch(blobs, FOLDER), 0).meta
    assert (meta.num_bad, meta.num_good, len(meta.problems)) == (30, 0, 30)


def small_chunk(rows: int, **changes) -> Chunk:
    lengths = np.full(rows, 1, np.int64)
    fields = {
        "file": "f",
        "number_R": np.arange(rows),
        "lengths_R": lengths,
        "inputs": np.zeros((rows, 1), np.float32),
        "symbols": (),
        "target_lengths_R": lengths,
        "targets": np.zeros(rows, np.int32),
        "labels": ("x",),
        "times_N": None,
        "entity_R": pa.array([f"entity-{i}" for i in range(rows)]),
        "group_R": None,
        "id_R": None,
        "time_R": np.full(rows, np.nan),
        "weight_R": np.ones(rows, np.float32),
        "split_R": np.full(rows, -1, np.int8),
    }
    return Chunk(**(fields | changes))


def test_labels_between_frames_need_room_for_blanks():
    targets = np.array([0, 0, 1, 1, 1, 2, 2], np.int32)
    lengths = np.array([2, 2, 1, 2], np.int64)
    chunk = small_chunk(4, targets=targets, target_lengths_R=lengths, labels=("x", "y", "z"))
    tables = (np.zeros(0, np.uint64), hash_texts(pa.array(chunk.labels)))
    facts = chunk_facts(chunk, None, per=TargetPer.sequence, tables=tables)
    assert facts["label_frames"].tolist() == [3, 3, 1, 3]
    assert facts["label"].tolist() == [-1] * 4
    assert facts["targets"].tolist() == lengths.tolist()
    assert len(set(facts["content"].tolist())) == 4


def test_hashes_of_a_row_do_not_depend_on_its_neighbours():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 6, 20)
    frames = rng.normal(size=(int(lengths.sum()), 3)).astype(np.float32)
    chunk = small_chunk(20, lengths_R=lengths, inputs=frames, targets=rng.integers(0, 2, 20).astype(np.int32))
    table = hash_texts(pa.array(["x", "y"]))
    facts = chunk_facts(chunk, None, per=TargetPer.row, tables=(np.zeros(0, np.uint64), table))
    ends = np.cumsum(lengths)
    raw = [frames[end - n : end].tobytes() for end, n in zip(ends, lengths, strict=True)]
    assert facts["inputs"].tolist() == [xxhash.xxh3_64_intdigest(r) for r in raw]
    swapped = dataclasses.replace(chunk, targets=1 - chunk.targets)
    other = chunk_facts(swapped, None, per=TargetPer.row, tables=(np.zeros(0, np.uint64), table[::-1].copy()))
    assert other["content"].tolist() == facts["content"].tolist()  # by name, not by id


def test_facts_cost_little():
    chunk = small_chunk(20_000)
    tables = (np.zeros(0, np.uint64), hash_texts(pa.array(["x"])))
    best = min(_timed(chunk, tables) for _ in range(5))
    assert best < 3e-6  # 0.5 us on a quiet machine, six times that here


def _timed(chunk, tables) -> float:
    started = time.thread_time()
    chunk_facts(chunk, None, per=TargetPer.row, tables=tables)
    return (time.thread_time() - started) / chunk.num_rows

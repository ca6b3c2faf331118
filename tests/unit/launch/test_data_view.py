"""A data set, a store and damage, as people read them; and the model card's words about data."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from treadle import wire
from treadle.data import Draft, Frames, Labels, Manifest, Row, Tokens, build_dataset
from treadle.data.describe import describe
from treadle.data.listing import list_datasets
from treadle.data.manifest import Finding
from treadle.data.verify import verify_blocks
from treadle.errors import IntegrityError
from treadle.launch.card import model_card
from treadle.launch.data_view import SHOWN, damage_text, dataset_text, findings_text, listed_text
from treadle.spec import (
    AdamWSpec,
    AugmentSpec,
    ClassifySpec,
    DataSpec,
    GruSpec,
    JobSpec,
    Leak,
    SplitSpec,
    StoreSpec,
    TargetPer,
)
from treadle.testing import MemoryBlobs

SPEC = JobSpec(
    name="icu",
    task=ClassifySpec(),
    model=GruSpec(),
    data=DataSpec(name="icu"),
    split=SplitSpec(valid=3, test=4),
    optim=AdamWSpec(),
    store=StoreSpec(uri="/nowhere"),
)


def frames(channels: int = 3, rows: int = 30) -> Draft:
    rng = np.random.default_rng(0)
    made = [
        Row(
            entity=f"p{i}", inputs=rng.normal(i % 3, 1, (1 + i % 7, channels)), target=["died", "lived", "lived"][i % 3]
        )
        for i in range(rows)
    ]
    names = tuple(f"c{i}" for i in range(channels))
    return Draft(rows=made, inputs=Frames(channels=names), target=Labels(), licence="made up", source={"a": "0" * 64})


def built(draft: Draft) -> tuple[MemoryBlobs, Manifest, str]:
    blobs = MemoryBlobs()
    digest, manifest = build_dataset(draft, SPEC.data, blobs, recipe="r" * 64, split=SPEC.split)
    return blobs, manifest, digest


def test_frames_of_few_channels() -> None:
    _, manifest, digest = built(frames())
    text = dataset_text(describe(manifest, digest))
    assert f"icu@{digest[:12]}" in text
    assert "by entity, 3 to watch, 4 to test" in text
    assert "3 channels" in text
    assert "2 labels per row" in text
    assert "fitted on 23 training rows" in text
    for name in ("c0", "died", "lived", "train", "valid", "test"):
        assert name in text
    assert "set aside" not in text
    wire.canonical(wire.encode(describe(manifest, digest)))


def test_many_channels_are_counted() -> None:
    _, manifest, digest = built(frames(channels=SHOWN + 5))
    text = dataset_text(describe(manifest, digest), ascii_only=True)
    assert f"c{SHOWN - 1} " in text
    assert f"c{SHOWN} " not in text
    assert "... and 5 more (--json)" in text


def test_tokens_and_sequences() -> None:
    rows = [Row(entity=f"w{i}", inputs=list(f"a{i}b"), target=["x"] * (1 + i % 2)) for i in range(30)]
    labels = Labels(per=TargetPer.sequence)
    _, manifest, digest = built(Draft(rows=rows, inputs=Tokens(), target=labels, licence="none"))
    facts = describe(manifest, digest)
    text = dataset_text(facts)
    assert facts.num_symbols == 12
    assert f"12 symbols, {facts.known_symbols} of them in training rows" in text
    assert "1 labels per sequence" in text
    assert "mean" not in text


def test_a_store_is_listed() -> None:
    blobs, manifest, digest = built(frames())
    text = listed_text(list_datasets(blobs))
    assert text.splitlines()[-1].split()[:3] == ["icu", digest[:12], str(manifest.num_rows)]


def test_damage_names_its_rows() -> None:
    blobs, manifest, _ = built(frames())
    block = manifest.header.blocks[0]
    blobs.delete(block.key)
    text = damage_text(verify_blocks(blobs, manifest))
    assert block.key in text
    assert f"0 to {block.rows - 1}" in text
    assert "the shard is gone" in text


def test_findings() -> None:
    assert findings_text([]) == "no leaks found"
    found = [
        Finding(leak=Leak.content, accepted=True, detail="3 rows"),
        Finding(leak=Leak.entity, accepted=False, detail="1 entity"),
    ]
    lines = findings_text(found).splitlines()[2:]
    assert [line.split("  ")[0] for line in lines] == ["content", "entity"]
    assert "NOT accepted" in lines[1]


def test_a_card_says_how_rows_were_split_and_what_was_accepted() -> None:
    _, manifest, _ = built(frames())
    card = model_card(SPEC, manifest.header, {"test/accuracy": 0.5}, "icu-1")
    assert "over 2 labels" in card
    assert "Split by entity, 3 to watch, 4 to test" in card
    assert "rows whose entity was never trained on" in card
    assert "leakage audit found nothing" in card
    assert "at random" not in card
    header = replace(
        manifest.header,
        dropped={"purged": 12},
        set_aside=1234,
        quarantine="data/icu/quarantine/q.jsonl",
        findings=(Finding(leak=Leak.entity, accepted=True, detail="1 entity in two splits: 'p1'"),),
    )
    card = model_card(replace(SPEC, augment=AugmentSpec(jitter=0.1)), header, {}, "icu-1")
    assert "12 rows are in no split: purged." in card
    assert "1,234 rows broke a rule and were set aside (`data/icu/quarantine/q.jsonl`)." in card
    assert "Accepted finding of the leakage audit, entity: 1 entity in two splits: 'p1'" in card
    assert "never trained on" not in card
    assert "changed at random: jitter 0.1." in card


def test_damage_fits_into_an_error() -> None:
    blobs, manifest, _ = built(frames())
    blobs.delete(manifest.header.blocks[0].key)
    error = IntegrityError("x", damage=[vars(d) for d in verify_blocks(blobs, manifest)])
    assert json.loads(json.dumps(error.to_json()))["context"]["damage"][0]["block"] == 0
    with pytest.raises(IntegrityError):
        raise error

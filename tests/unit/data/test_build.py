"""Building and reading data sets: round trips, splits, leaks, damage."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.data import Draft, Frames, Manifest, Row, RowReader, Tokens, ahead, build_dataset
from treadle.data.draft import assign_splits
from treadle.errors import DataError, IntegrityError
from treadle.spec import DataSpec
from treadle.store.local import LocalBlobs

WORDS = ["".join(letters) for letters in itertools.product("abcde", repeat=3)]


def words_draft(words=WORDS) -> Draft:
    rows = [Row(entity=w, inputs=list(w * (1 + i % 3)), target=list(w.upper())) for i, w in enumerate(words)]
    return Draft(rows=rows, inputs=Tokens(), labels=tuple("ABCDE"), licence="none", source={"x": "y"})


def frames_draft(num=30) -> Draft:
    rng = np.random.default_rng(0)
    rows = [
        Row(
            entity=str(i),
            inputs=rng.normal(5, 3, (2 + i % 7, 4)).astype(np.float32),
            target=["p" if i % 2 else "q"],
            split="test" if i % 5 == 0 else "train",
        )
        for i in range(num)
    ]
    return Draft(rows=rows, inputs=Frames(channels=("a", "b", "c", "d")), labels=("p", "q"), licence="none")


@pytest.fixture
def blobs(tmp_path):
    return LocalBlobs(tmp_path / "store")


def build(blobs, draft, **spec):
    return build_dataset(draft, DataSpec(name="toy", **spec), blobs, recipe="r")


def test_every_row_comes_back_as_it_went_in(blobs):
    digest, manifest = build(blobs, words_draft(), valid=10, test=20)
    stored = Manifest.from_bytes(blobs.get(f"data/toy/manifests/{digest}.arrow"), where="m", digest=digest)
    assert stored.header == manifest.header
    reader = RowReader(blobs, stored)
    symbols, labels = stored.header.preprocessing.symbols, stored.header.preprocessing.labels
    found = {}
    for split in ("train", "valid", "test"):
        rows = stored.rows_of(split)
        for part in np.array_split(np.random.default_rng(1).permutation(rows), 3):
            batch = reader.batch(part)
            for i, row in enumerate(part):
                word = "".join(symbols[t] for t in batch.inputs[i, : batch.lengths_B[i]])
                target = "".join(labels[t] for t in batch.labels_BU[i, : batch.label_lengths_B[i]])
                assert not batch.inputs[i, batch.lengths_B[i] :].any()
                found[reader.entity(int(row))] = (word, target, split)
    draft = {r.entity: ("".join(r.inputs), "".join(r.target)) for r in words_draft().rows}
    assert {e: v[:2] for e, v in found.items()} == draft
    assert [sum(v[2] == s for v in found.values()) for s in ("train", "valid", "test")] == [95, 10, 20]


def test_frames_are_scaled_by_training_rows_alone(blobs):
    _, manifest = build(blobs, frames_draft(), valid=3)
    rows = manifest.rows_of("train")
    batch = RowReader(blobs, manifest).batch(rows)
    real = np.concatenate([batch.inputs[i, :n] for i, n in enumerate(batch.lengths_B)])
    assert np.allclose(real.mean(axis=0), 0, atol=1e-5)
    assert np.allclose(real.std(axis=0), 1, atol=1e-5)
    assert len(manifest.rows_of("test")) == 6
    assert len(manifest.rows_of("valid")) == 3


def test_the_same_draft_is_the_same_data_set(blobs, tmp_path):
    first, _ = build(blobs, words_draft(), valid=5, test=5)
    again, _ = build(blobs, words_draft(), valid=5, test=5)
    elsewhere, _ = build(LocalBlobs(tmp_path / "other"), words_draft(list(reversed(WORDS))), valid=5, test=5)
    other, _ = build(blobs, words_draft(), valid=5, test=6)
    assert first == again
    assert first != other
    assert len(elsewhere) == 64


def test_a_flipped_byte_in_a_block_is_found_and_named(blobs):
    _, manifest = build(blobs, words_draft())
    block = manifest.header.blocks[0]
    path = blobs.local_path(block.key)
    data = bytearray(path.read_bytes())
    data[block.offset + block.size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"block 0 is not what was written"):
        RowReader(blobs, manifest).batch(manifest.rows_of("train")[:1])


def test_a_truncated_shard_is_found(blobs):
    _, manifest = build(blobs, words_draft())
    path = blobs.local_path(manifest.header.blocks[0].key)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(IntegrityError, match="cut off"):
        RowReader(blobs, manifest).batch(manifest.rows_of("train")[:1])


def test_a_changed_manifest_is_refused(blobs):
    digest, _ = build(blobs, words_draft())
    data = bytearray(blobs.get(f"data/toy/manifests/{digest}.arrow"))
    data[len(data) // 2] ^= 1
    with pytest.raises(IntegrityError, match="expected"):
        Manifest.from_bytes(bytes(data), where="m", digest=digest)


def test_an_entity_in_two_splits_is_a_leak(blobs):
    rows = [Row(entity="x", inputs=list("ab"), target=["A"], split="test")]
    rows += [Row(entity=w, inputs=list(w), target=["A"]) for w in WORDS[:9]]
    rows += [Row(entity="y", inputs=list("ab"), target=["A"])]  # the test row's content under another name
    draft = dataclasses.replace(words_draft(), rows=rows)
    with pytest.raises(DataError, match=r"leak: equal content in two splits: 'y' in train, 'x' in test|'x' in test"):
        build(blobs, draft)


def test_a_killed_build_leaves_no_data_set(blobs):
    class Dying:
        def create(self, key, data):
            if "manifests" in key:
                raise KeyboardInterrupt
            return blobs.create(key, data)

        head = blobs.head

    with pytest.raises(KeyboardInterrupt):
        build(Dying(), words_draft())
    assert list(blobs.list("data/toy/manifests")) == []
    build(blobs, words_draft())  # and a rerun starts cleanly


def test_all_bad_rows_are_named_at_once(blobs):
    rng = np.random.default_rng(0)
    rows = [Row(entity=str(i), inputs=rng.normal(size=(3, 4)), target=["p"]) for i in range(5)]
    bad = np.ones((2, 4))
    bad[1, 2] = np.nan
    rows += [
        Row(entity="nan", inputs=bad, target=["p"], where="f.csv:7"),
        Row(entity="wide", inputs=np.ones((2, 5)), target=["p"]),
        Row(entity="long", inputs=np.ones((70, 4)), target=["p"]),
        Row(entity="label", inputs=np.ones((2, 4)), target=["z"]),
        Row(entity="none", inputs=np.ones((2, 4)), target=[]),
        Row(entity="empty", inputs=np.ones((0, 4)), target=["p"]),
    ]
    draft = dataclasses.replace(frames_draft(), rows=rows)
    with pytest.raises(DataError, match="6 rows cannot be used") as refused:
        build(blobs, draft, max_length=64)
    for words in ("f.csv:7", "time step 1, channel 2", "expected [T, 4]", "got 70", "label 'z'", "no label", "got 0"):
        assert words in str(refused.value)


def test_a_split_that_leaves_nothing_is_refused(blobs):
    with pytest.raises(DataError, match="fewer than the 125 entities"):
        build(blobs, words_draft(), valid=100, test=25)


@settings(max_examples=50, deadline=None)
@given(st.sets(st.text(min_size=1, max_size=4), min_size=6, max_size=40), st.integers(0, 2), st.integers(0, 3))
def test_splits_are_by_hash_and_exact(entities, valid, test):
    splits = assign_splits(entities, valid=valid, test=test, limit=None, seed=0)
    assert splits == assign_splits(sorted(entities, reverse=True), valid=valid, test=test, limit=None, seed=0)
    counts = [list(splits.values()).count(name) for name in ("valid", "test", "train")]
    assert counts == [valid, test, len(entities) - valid - test]


def test_the_thread_ahead_raises_errors_and_ends_with_its_consumer():
    import threading

    def failing():
        yield 1
        raise DataError("broken")

    items = ahead(failing)
    assert next(items) == 1
    with pytest.raises(DataError, match="broken"):
        next(items)
    endless = ahead(lambda: iter(itertools.count()))
    assert [next(endless) for _ in range(3)] == [0, 1, 2]
    endless.close()
    assert not [t for t in threading.enumerate() if t.name == "treadle-loader"]


def test_a_split_of_another_name_is_refused(blobs):
    rows = [Row(entity=w, inputs=list(w), target=["A"], split="dev" if i == 3 else None) for i, w in enumerate(WORDS)]
    with pytest.raises(DataError, match="split: got 'dev', expected one of train, valid, test"):
        build(blobs, dataclasses.replace(words_draft(), rows=rows))


def test_rows_without_a_split_follow_their_entity(blobs):
    rows = [
        Row(entity="x", inputs=list("ab"), target=["A"], split="test"),
        Row(entity="x", inputs=list("ba"), target=["B"]),
    ]
    rows += [Row(entity=w, inputs=list(w), target=["A"]) for w in WORDS[:9]]
    _, manifest = build(blobs, dataclasses.replace(words_draft(), rows=rows))
    assert (len(manifest.rows_of("test")), len(manifest.rows_of("train"))) == (2, 9)


def test_an_entity_in_two_given_splits_is_a_leak(blobs):
    rows = [Row(entity="x", inputs=list(w), target=["A"], split=s) for w, s in (("ab", "test"), ("ba", "train"))]
    rows += [Row(entity=w, inputs=list(w), target=["A"]) for w in WORDS[:9]]
    with pytest.raises(DataError, match="leak: entity in two splits"):
        build(blobs, dataclasses.replace(words_draft(), rows=rows))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([[1.0, 2.0, 3.0, 4.0], [1.0]], "inhomogeneous"),
        ([["1", "2", "x", "4"]], "could not convert"),
        ([[1.0, float("inf"), 3.0, 4.0]], "got inf at time step 0, channel 1"),
        ([[1.0, 2.0, 1e300, 4.0]], "got inf at time step 0, channel 2"),
        ([1.0, 2.0, 3.0, 4.0], r"got shape \(4,\), expected \[T, 4\]"),
    ],
)
def test_frames_that_are_no_numbers_are_named(blobs, values, words):
    rows = [*frames_draft().rows, Row(entity="bad", inputs=values, target=["p"], where="f.csv:9", split="train")]
    with pytest.raises(DataError, match=f"f.csv:9: .*{words}"):
        build(blobs, dataclasses.replace(frames_draft(), rows=rows))


def test_equal_inputs_have_one_hash(blobs):
    rows = [
        Row(entity=e, inputs=list(w), target=[t]) for e, w, t in (("x", "ab", "A"), ("x", "ab", "B"), ("y", "ba", "A"))
    ]
    _, manifest = build(blobs, dataclasses.replace(words_draft(), rows=rows))
    hashes = dict(zip(manifest.columns["entity"].tolist(), manifest.columns["inputs"].tolist(), strict=True))
    assert len(set(manifest.columns["inputs"].tolist())) == len(hashes) == 2


def test_a_constant_channel_stays_finite(blobs):
    rows = [Row(entity=str(i), inputs=np.array([[7.0, 7.0, 7.0, 7.0 + i]] * 3), target=["p"]) for i in range(9)]
    _, manifest = build(blobs, dataclasses.replace(frames_draft(), rows=rows))
    batch = RowReader(blobs, manifest).batch(np.arange(9))
    assert np.isfinite(batch.inputs).all()
    assert not batch.inputs[..., :3].any()


def test_a_limit_keeps_the_same_entities_whatever_the_order(blobs):
    _, manifest = build(blobs, words_draft(), limit=20, valid=3, test=4)
    _, again = build(blobs, words_draft(list(reversed(WORDS))), limit=20, valid=3, test=4)
    assert [len(manifest.rows_of(split)) for split in ("train", "valid", "test")] == [13, 3, 4]
    assert sorted(manifest.columns["entity"].tolist()) == sorted(again.columns["entity"].tolist())


def test_unknown_symbols_of_other_splits_are_the_unknown_one(blobs):
    rows = [Row(entity=w, inputs=list(w), target=["A"], split="train") for w in ("ab", "ba")]
    rows.append(Row(entity="z", inputs=list("azb"), target=["A"], split="test"))
    _, manifest = build(blobs, dataclasses.replace(words_draft(), rows=rows))
    assert manifest.header.preprocessing.symbols == ("<unknown>", "a", "b")
    assert RowReader(blobs, manifest).batch(manifest.rows_of("test")).inputs.tolist() == [[1, 0, 2]]


def test_a_text_as_target_is_named(blobs):
    rows = [Row(entity=str(i), inputs=list("ab"), target="AB") for i in range(3)]
    with pytest.raises(DataError, match=r"target: got the text 'AB', expected a list of labels"):
        build(blobs, dataclasses.replace(words_draft(), rows=rows))

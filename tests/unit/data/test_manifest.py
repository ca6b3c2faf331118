"""Manifests: what no build would have written is refused by name, however well its digest fits."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pyarrow as pa
import pytest

from treadle import wire
from treadle.data.build.pipeline import Means, build_dataset
from treadle.data.draft import Draft, Labels, Row, Tokens
from treadle.data.manifest import COLUMNS, Header, Manifest
from treadle.errors import IntegrityError
from treadle.spec import DataSpec, SplitSpec
from treadle.testing import MemoryBlobs


@pytest.fixture(scope="module")
def sound() -> Manifest:
    rows = [Row(entity=f"e{i}", inputs=list(f"{i:b}"), target="xy"[i % 2]) for i in range(60)]
    draft = Draft(rows=rows, inputs=Tokens(), target=Labels(), licence="none")
    means = Means(shard_bytes=2000, block_bytes=500)
    return build_dataset(
        draft, DataSpec(name="toy"), MemoryBlobs(), recipe="r", split=SplitSpec(test=10, valid=5), means=means
    )[1]


def read(data: bytes) -> Manifest:
    return Manifest.from_bytes(data, where="here", digest=wire.digest(data))


def refused(manifest: Manifest, *words: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        read(manifest.to_bytes())
    assert caught.value.message.startswith("here: ")
    for word in words:
        assert word in caught.value.message


def with_block(manifest: Manifest, number: int, **changes: object) -> Manifest:
    blocks = list(manifest.header.blocks)
    blocks[number] = dataclasses.replace(blocks[number], **changes)
    return dataclasses.replace(manifest, header=dataclasses.replace(manifest.header, blocks=tuple(blocks)))


def with_column(manifest: Manifest, name: str, change) -> Manifest:
    columns = {key: column.copy() for key, column in manifest.columns.items()}
    change(columns[name])
    return dataclasses.replace(manifest, columns=columns)


def test_a_sound_one_is_read_as_it_was_written(sound):
    again = read(sound.to_bytes())
    assert again.header == sound.header
    assert list(again.columns) == list(COLUMNS)
    for name in COLUMNS:
        assert np.array_equal(again.columns[name], sound.columns[name], equal_nan=name in ("time", "last"))
    assert again.to_bytes() == sound.to_bytes()


@pytest.mark.parametrize(
    "key",
    [
        "/etc/passwd",
        "data/toy/shards/../../other/shards/" + "a" * 32 + ".arrow",
        "data/other/shards/" + "a" * 32 + ".arrow",
        "data/toy/manifests/" + "a" * 32 + ".arrow",
        "data/toy/shards/x.arrow",
        "",
    ],
)
def test_blocks_outside_of_the_own_shards_are_refused(sound, key):
    refused(with_block(sound, 1, key=key), f"block 1: got the shard {key!r}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offset": -8}, "block 1: got offset -8, expected 0 or more"),
        ({"size": 0}, "block 1: got size 0, expected 1 or more"),
        ({"size": -1}, "block 1: got size -1"),
        ({"rows": 0}, "block 1: got rows 0"),
        ({"longest": 99}, "block 1: got longest 99"),
    ],
)
def test_blocks_that_cannot_be_are_refused(sound, changes, words):
    refused(with_block(sound, 1, **changes), words)


def test_blocks_that_overlap_are_refused(sound):
    first = sound.header.blocks[0]
    refused(with_block(sound, 1, offset=first.offset + first.size - 1, key=first.key), "blocks 0 and 1 overlap")


def test_all_that_is_wrong_is_said_at_once(sound):
    refused(with_block(with_block(sound, 0, size=0), 2, key="x"), "block 0: got size 0", "block 2: got the shard 'x'")


def test_rows_that_no_block_holds_are_refused(sound):
    rows = sound.header.blocks[0].rows
    refused(with_block(sound, 0, rows=rows + 1), f"got 60 rows, expected {60 + 1}")
    refused(with_block(sound, 0, rows=1), "got 60 rows")


def test_columns_that_cannot_be_are_refused(sound):
    refused(with_column(sound, "split", lambda c: c.__setitem__(3, 7)), "row 3: got split 7")
    refused(with_column(sound, "label", lambda c: c.__setitem__(4, 2)), "row 4: got label 2")
    refused(with_column(sound, "label", lambda c: c.__setitem__(4, -2)), "row 4: got label -2")
    refused(with_column(sound, "length", lambda c: c.__setitem__(0, 0)), "row 0: got length 0")
    refused(with_column(sound, "length", lambda c: c.__setitem__(0, 9)), "row 1: got a row shorter")


def rewritten(data: bytes, change) -> bytes:
    """The file with other columns or other metadata."""
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    changed = change(table)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, changed.schema) as writer:
        writer.write_table(changed)
    return sink.getvalue()


def test_another_schema_is_refused(sound):
    def older(table):
        meta = json.loads(table.schema.metadata[b"treadle"])
        return table.replace_schema_metadata({b"treadle": json.dumps(meta | {"schema": 1}).encode()})

    def one_column_less(table):
        return table.drop_columns(["weight"])

    def one_column_more(table):
        return table.append_column("more", table.column("split"))

    def other_type(table):
        return table.set_column(0, "split", table.column("split").cast(pa.string()))

    def bare(table):
        return table.replace_schema_metadata({})

    data = sound.to_bytes()
    with pytest.raises(IntegrityError, match="got schema 1, expected 2"):
        read(rewritten(data, older))
    for change in (one_column_less, one_column_more, other_type, bare):
        with pytest.raises(IntegrityError, match="here: not a manifest"):
            read(rewritten(data, change))


def test_columns_of_different_length_are_refused(sound):
    # Arrow's own writer would not write it: the rows of one batch are said to be more than its columns hold.
    data = sound.to_bytes()
    changed = data.replace((60).to_bytes(8, "little"), (61).to_bytes(8, "little"))
    assert changed != data
    with pytest.raises(IntegrityError, match="here: "):
        read(changed)


def test_nulls_are_refused(sound):
    def hole(table):
        column = pa.array([None, *table.column("length").to_pylist()[1:]], pa.uint32())
        return table.set_column(1, "length", column)

    with pytest.raises(IntegrityError, match=r"here: .*null"):
        read(rewritten(sound.to_bytes(), hole))


def test_every_flipped_byte_and_every_cut_is_refused(sound):
    data = sound.to_bytes()
    digest = wire.digest(data)
    for place in range(0, len(data), 101):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        with pytest.raises(IntegrityError, match=f"expected {digest[:12]}"):
            Manifest.from_bytes(bytes(changed), where="here", digest=digest)
    for size in (0, 8, 100, len(data) // 2, len(data) - 1):
        with pytest.raises(IntegrityError):
            Manifest.from_bytes(data[:size], where="here", digest=digest)
        with pytest.raises(IntegrityError, match="not a manifest"):
            read(data[:size])


def test_a_card_counts_entities_and_what_planning_needs(sound):
    card = sound.card("d")
    assert (card.name, card.digest) == ("toy", "d")
    assert [len(card.splits[s].lengths_N) for s in ("train", "valid", "test")] == [45, 5, 10]
    assert card.splits["train"].num_entities == 45
    assert set(card.splits["train"].labels_N.tolist()) == {0, 1}
    assert card.signature.input_size == 3
    assert isinstance(sound.header, Header)

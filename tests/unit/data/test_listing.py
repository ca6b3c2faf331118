"""What a store holds is told from headers alone, and a name leads to one data set or to a clear refusal."""

from __future__ import annotations

import struct

import pytest
from dataset_rig import write_dataset

from treadle.data.listing import find_manifest, list_datasets, read_header
from treadle.errors import ConflictError, IntegrityError, NotFoundError
from treadle.testing.memory import MemoryBlobs


class Counting(MemoryBlobs):
    """Counts the bytes that are read."""

    read = 0

    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes:
        data = super().get(key, offset=offset, size=size)
        self.read += len(data)
        return data


def test_data_sets_are_listed_by_name_and_time() -> None:
    blobs = MemoryBlobs()
    manifest, first = write_dataset(blobs, made_at="2026-11-23T10:00:00Z")
    _, second = write_dataset(blobs, licence="other", made_at="2026-11-22T10:00:00Z")
    _, third = write_dataset(blobs, name="audio", preprocessing=None)
    found = list_datasets(blobs)
    assert [(d.name, d.digest, d.is_split) for d in found] == [
        ("audio", third, False),
        ("icu", second, True),
        ("icu", first, True),
    ]
    assert (found[2].rows, found[2].num_blocks) == (8, 4)
    assert found[2].num_bytes == sum(block.size for block in manifest.header.blocks)
    assert (found[2].licence, found[2].made_at) == ("made up", "2026-11-23T10:00:00Z")
    assert [d.name for d in list_datasets(blobs, "audio")] == ["audio"]
    assert list_datasets(MemoryBlobs()) == []


def test_what_is_damaged_is_listed_as_such_and_hides_nothing() -> None:
    blobs = MemoryBlobs()
    _, sound = write_dataset(blobs, made_at="2026-11-23T10:00:00Z")
    _, harmed = write_dataset(blobs, name="audio", made_at="2026-11-23T10:00:00Z")
    blobs.put(f"data/audio/manifests/{harmed}.arrow", b"not a manifest at all, but long enough to be one")
    (note,) = [entry.key for entry in blobs.list("data/icu/recipes/")]
    blobs.put(note, b"[]")
    first, second = list_datasets(blobs)
    assert (first.digest, first.made_at) == (harmed, "2026-11-23T10:00:00Z")
    assert first.damage == f"data/audio/manifests/{harmed}.arrow: not a manifest (no Arrow file)"
    assert (second.digest, second.damage, second.rows, second.made_at) == (sound, "", 8, "")


@pytest.mark.parametrize("size", [-(2**31), -9, -1, 0, 8, 2**31 - 1])
def test_a_head_that_lies_about_its_size_is_damage(size: int) -> None:
    blobs = MemoryBlobs()
    manifest, digest = write_dataset(blobs)
    raw = bytearray(manifest.to_bytes())
    raw[12:16] = struct.pack("<i", size)
    blobs.put(f"data/icu/manifests/{digest}.arrow", bytes(raw[:2000]))
    with pytest.raises(IntegrityError, match=f"data/icu/manifests/{digest}.arrow: not a manifest"):
        read_header(blobs, "icu", digest)
    (listed,) = list_datasets(blobs)
    assert "not a manifest" in listed.damage


def test_a_header_is_read_without_the_columns() -> None:
    blobs = Counting()
    manifest, digest = write_dataset(blobs)
    whole = len(manifest.to_bytes())
    assert read_header(blobs, "icu", digest) == manifest.header
    assert blobs.read < whole - sum(column.nbytes for column in manifest.columns.values())


def test_a_name_and_the_start_of_a_digest() -> None:
    blobs = MemoryBlobs()
    _, first = write_dataset(blobs, made_at="2026-11-22T10:00:00Z")
    assert find_manifest(blobs, "icu") == first
    _, second = write_dataset(blobs, licence="other", made_at="2026-11-23T10:00:00Z")
    assert find_manifest(blobs, "icu") == second
    assert find_manifest(blobs, "icu", first[:6]) == first
    with pytest.raises(NotFoundError, match=r"^data set: got 'icu@zz', expected one in the store") as refused:
        find_manifest(blobs, "icu", "zz")
    assert refused.value.hint == "treadle data ls"
    with pytest.raises(NotFoundError, match=r"got 'icy'.* did you mean 'icu'\?"):
        find_manifest(blobs, "icy")


def test_several_without_a_time_are_not_guessed() -> None:
    blobs = MemoryBlobs()
    _, first = write_dataset(blobs)
    _, second = write_dataset(blobs, licence="other")
    with pytest.raises(ConflictError, match=rf"2 of them: .*{min(first, second)[:12]}"):
        find_manifest(blobs, "icu")


@pytest.mark.parametrize("data", [b"", b"PAR1" + b"\0" * 40, b"ARROW1\0\0" + b"\xff" * 4 + b"\x10\0\0\0" + b"\0" * 16])
def test_what_is_no_manifest(data: bytes) -> None:
    blobs = MemoryBlobs()
    blobs.put("data/icu/manifests/0.arrow", data)
    with pytest.raises(IntegrityError, match=r"^data/icu/manifests/0\.arrow: not a manifest"):
        read_header(blobs, "icu", "0")

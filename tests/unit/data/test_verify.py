"""Every damaged block is named, none that is sound."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from dataset_rig import write_dataset
from hypothesis import given
from hypothesis import strategies as st

from treadle.data.manifest import Manifest
from treadle.data.verify import Damage, verify_blocks
from treadle.store.local import LocalBlobs
from treadle.testing.memory import MemoryBlobs


def test_a_sound_data_set_has_no_damage() -> None:
    blobs = MemoryBlobs()
    manifest, _ = write_dataset(blobs)
    told: list[tuple[str, int, int]] = []
    assert verify_blocks(blobs, manifest, progress=lambda *a: told.append(a)) == []
    assert told[-1] == ("verify", 4, 4)


@given(block=st.integers(0, 3), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_named_by_its_place(block: int, where: float, bit: int) -> None:
    blobs = MemoryBlobs()
    manifest, _ = write_dataset(blobs)
    place = manifest.header.blocks[block]
    data = bytearray(blobs.get(place.key))
    data[place.offset + int(where * place.size)] ^= 1 << bit
    blobs.put(place.key, bytes(data))
    assert verify_blocks(blobs, manifest) == [
        Damage(
            block=block,
            key=place.key,
            offset=place.offset,
            size=place.size,
            rows=(2 * block, 2 * block + 1),
            what="not what was written (checksum)",
        )
    ]


def test_all_damage_is_found_not_the_first_alone() -> None:
    blobs = MemoryBlobs()
    manifest, _ = write_dataset(blobs)
    blocks = manifest.header.blocks
    blobs.delete(blocks[0].key)
    blobs.put(blocks[2].key, blobs.get(blocks[2].key)[: blocks[3].offset + 5])
    found = verify_blocks(blobs, manifest)
    assert [(d.block, d.what) for d in found] == [
        (0, "the shard is gone"),
        (1, "the shard is gone"),
        (3, "not what was written (checksum)"),
    ]


@pytest.mark.parametrize(
    ("harm", "what"), [("folder", "Is a directory"), ("link", "symbolic link"), ("locked", "Permission denied")]
)
def test_what_cannot_be_opened_is_damage_among_others(tmp_path, harm: str, what: str) -> None:
    blobs = LocalBlobs(tmp_path)
    manifest, _ = write_dataset(blobs)
    blocks = manifest.header.blocks
    path = blobs.local_path(blocks[0].key)
    assert path is not None
    cut = blobs.local_path(blocks[3].key)
    assert cut is not None
    cut.write_bytes(cut.read_bytes()[: blocks[3].offset + 5])
    if harm == "locked":
        if os.geteuid() == 0:
            pytest.skip("root may read everything")
        path.chmod(0)
    else:
        away = path.rename(tmp_path / "away")
        path.mkdir() if harm == "folder" else path.symlink_to(away)
    found = verify_blocks(blobs, manifest)
    assert [d.block for d in found] == [0, 1, 3]
    assert what in found[0].what


def test_a_folder_is_read_too(tmp_path) -> None:
    memory, blobs = MemoryBlobs(), LocalBlobs(tmp_path)
    manifest, _ = write_dataset(memory)
    for block in manifest.header.blocks:
        blobs.put(block.key, memory.get(block.key))
    assert verify_blocks(blobs, manifest) == []
    path = blobs.local_path(manifest.header.blocks[0].key)
    assert path is not None
    path.unlink()
    assert [d.block for d in verify_blocks(blobs, manifest)] == [0, 1]


@pytest.mark.parametrize("place", [0, 7])
def test_columns_that_speak_of_other_rows(place: int) -> None:
    blobs = MemoryBlobs()
    manifest, _ = write_dataset(blobs)
    columns = {name: column.copy() for name, column in manifest.columns.items()}
    columns["length"][place] += 1
    other = Manifest(header=replace(manifest.header), columns=columns)
    assert [(d.block, d.what) for d in verify_blocks(blobs, other)] == [
        (place // 2, "rows of other lengths than the manifest says")
    ]

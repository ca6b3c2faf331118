"""Damage to any part of a checkpoint that lies in the store (F10)."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from fault_victims import RUN, open_run

from treadle.errors import IntegrityError
from treadle.store import CheckpointManifest, Checkpoints
from treadle.testing import MemoryBlobs

BLOCK = 4096


def files_of(update: int, num_bytes: int) -> dict[str, bytes]:
    """Files of several blocks; those of two updates differ in every block, and no two files have one size."""
    rng = random.Random(update)
    return {
        "model.safetensors": rng.randbytes(num_bytes),
        "optim/rank0.safetensors": rng.randbytes(2 * num_bytes + 1),
        "rng.bin": rng.randbytes(100),
    }


class Store:
    """Three committed checkpoints, whose keys can be damaged and mended."""

    def __init__(self, num_bytes: int) -> None:
        self.blobs = MemoryBlobs()
        self.files = {update: files_of(update, num_bytes) for update in (1, 2, 3)}
        self.num_damages = 0
        writer = self.open(attempt=1)
        self.made: dict[int, CheckpointManifest] = {}
        for update, files in self.files.items():
            self.made[update] = writer.commit(update, files, {"update": update})

    def open(self, attempt: int = 0) -> Checkpoints:
        return open_run(self.blobs, attempt, keep_last=3)

    @property
    def keys(self) -> list[str]:
        newest = self.made[3]
        return [*(newest.key(name) for name in newest.files), newest.key("MANIFEST.json")]

    def check_refused(self, damage: dict[str, bytes | None], expected: int = 2) -> None:
        """What is restored with the damage is `expected`, and the newest is set aside; then it is mended."""
        before = {key: self.blobs.get(key) for key in damage}
        for key, data in damage.items():
            assert data != before[key], f"{key}: no damage"
            self.blobs.delete(key) if data is None else self.blobs.put(key, data)
        found = self.open().restore()
        assert found is not None
        assert found[0].update == expected, sorted(damage)
        assert found[1] == self.files[expected]
        for update in range(expected + 1, 4):
            note = f"{self.made[update].prefix}/quarantine.json"
            assert self.blobs.head(note) is not None
            self.blobs.delete(note)
        for key, data in before.items():
            self.blobs.put(key, data)
        self.num_damages += 1


@pytest.fixture
def store(choose) -> Iterator[Store]:
    found = Store(choose(3 * BLOCK, 64 * BLOCK))
    yield found
    restored = found.open().restore()
    assert restored is not None
    assert restored[0].update == 3  # mended, it is believed again: the damage was the only reason


def flips(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """One bit of each 4 KiB in turn."""
    for start in range(0, len(data), BLOCK):
        changed = bytearray(data)
        changed[rng.randrange(start, min(start + BLOCK, len(data)))] ^= 1 << rng.randrange(8)
        yield bytes(changed)


@pytest.mark.fault(10, "a flipped bit in each 4 KiB of each file")
def test_every_flipped_bit_is_found(store: Store, matrix) -> None:
    rng = random.Random(0)
    for key in store.keys:
        for changed in flips(store.blobs.get(key), rng):
            store.check_refused({key: changed})
    matrix.note(injected=store.num_damages, seen=f"flips: {store.num_damages} of {store.num_damages} found")


@pytest.mark.fault(10, "each file truncated at each tenth, lengthened, emptied, gone")
def test_every_wrong_length_is_found(store: Store, matrix) -> None:
    for key in store.keys:
        data = store.blobs.get(key)
        for tenths in range(10):
            store.check_refused({key: data[: len(data) * tenths // 10]})
        store.check_refused({key: data + b"\0"})
        store.check_refused({key: bytes(len(data))})
        store.check_refused({key: None})
    matrix.note(injected=store.num_damages, seen=f"lengths: {store.num_damages} of {store.num_damages} found")


@pytest.mark.fault(10, "files of another place, of another checkpoint, an old manifest")
def test_right_files_in_wrong_places_are_found(store: Store, matrix) -> None:
    newest, older, get = store.made[3], store.made[2], store.blobs.get
    for one in newest.files:
        for other in newest.files:
            if one < other:
                a, b = newest.key(one), newest.key(other)
                store.check_refused({a: get(b), b: get(a)})
        store.check_refused({newest.key(one): get(older.key(one))})
    manifest = newest.key("MANIFEST.json")
    store.check_refused({manifest: get(older.key("MANIFEST.json"))})
    whole_older = {newest.key(name): get(older.key(name)) for name in (*older.files, "MANIFEST.json")}
    store.check_refused(whole_older)
    store.check_refused({manifest: get(f"runs/{RUN}/HEAD.json")})
    both = {manifest: b"{}", older.key("rng.bin"): b""}
    store.check_refused(both, expected=1)
    matrix.note(injected=store.num_damages, seen=f"swapped or stale: {store.num_damages} of {store.num_damages} found")


@pytest.mark.fault(10, "damage to the record of what was committed")
def test_without_the_record_the_newest_is_found_all_the_same(store: Store, matrix) -> None:
    key = f"runs/{RUN}/HEAD.json"
    data = store.blobs.get(key)
    rng = random.Random(0)
    damages = [data[: len(data) * tenths // 10] for tenths in range(10)]
    for at in range(0, len(data), 7):
        changed = bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        damages.append(bytes(changed))
    for damage in damages:
        store.check_refused({key: damage}, expected=3)
    matrix.note(injected=store.num_damages, seen=f"HEAD: newest restored after {store.num_damages} damages")


@pytest.mark.fault(10, "all checkpoints damaged")
def test_with_nothing_sound_left_nothing_is_restored_in_silence(store: Store, matrix) -> None:
    kept = {made.key("rng.bin"): store.blobs.get(made.key("rng.bin")) for made in store.made.values()}
    for key in kept:
        store.blobs.put(key, b"damaged")
    with pytest.raises(IntegrityError, match="all damaged"):
        store.open().restore()
    for update, (key, data) in zip(store.made, kept.items(), strict=True):
        store.blobs.put(key, data)
        store.blobs.delete(f"{store.made[update].prefix}/quarantine.json")
    matrix.note(injected=3, seen="all damaged: IntegrityError that names each")

"""Files arrive as they left, whatever happens to them on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from treadle.errors import IntegrityError, TransientError
from treadle.store import transfers
from treadle.store.blobs import Blobs, Data, Entry
from treadle.store.local import LocalBlobs
from treadle.store.sealed import checksum
from treadle.store.transfers import read_files, write_files
from treadle.testing import FaultBlobs, MemoryBlobs

FILES = {"a/small": b"small", "a/empty": b"", "a/large": bytes(range(251)) * 100, "b": bytes(16)}


@pytest.fixture(params=["memory", "local"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return MemoryBlobs() if request.param == "memory" else LocalBlobs(tmp_path / "store")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "_PART_BYTES", 1000)


def test_what_is_written_is_read(blobs: Blobs) -> None:
    sums = write_files(blobs, {key: memoryview(data) for key, data in FILES.items()})
    assert sums == {key: (len(data), checksum(data)) for key, data in FILES.items()}
    assert list(sums) == list(FILES)
    found = read_files(blobs, sums)
    assert found == FILES
    assert all(type(data) is bytes for data in found.values())
    assert write_files(blobs, {}) == read_files(blobs, {}) == {}


def _flip(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("key", ["a/small", "a/large"])
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_flip, "got xxh3_128"),
        (lambda data: data[:-1], r"got \d+ bytes"),
        (lambda data: data + b"x", r"got \d+ bytes"),
        (lambda data: b"", "got 0 bytes"),
        (None, "missing"),
    ],
)
def test_damage_is_named(blobs: Blobs, key: str, damage: Callable[[bytes], bytes] | None, told: str) -> None:
    sums = write_files(blobs, FILES)
    if damage is None:
        blobs.delete(key)
    else:
        blobs.put(key, damage(blobs.get(key)))
    with pytest.raises(IntegrityError, match=rf"{key}: {told}"):
        read_files(blobs, sums)


def test_a_file_that_was_damaged_on_the_way_up_is_sent_again() -> None:
    store = MemoryBlobs()
    assert read_files(store, write_files(FaultBlobs(store, flip=2), FILES)) == FILES


def test_a_file_that_is_always_damaged_on_the_way_up_is_not_believed() -> None:
    with pytest.raises(IntegrityError, match=r"a/large: got \d+ bytes of other content after writing it 3 times"):
        write_files(FaultBlobs(MemoryBlobs(), flip=3), {"a/large": FILES["a/large"]})


class Eats(MemoryBlobs):
    """A store that loses what it acknowledged."""

    def put(self, key: str, data: Data) -> Entry:
        entry = super().put(key, data)
        self.delete(key)
        return entry


def test_a_file_that_is_not_there_is_not_believed() -> None:
    with pytest.raises(IntegrityError, match="got nothing after writing"):
        write_files(Eats(), FILES)


class Noisy(MemoryBlobs):
    """A store whose first `faults` reads of a range come with a bit flipped."""

    faults = 0

    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes:
        data = super().get(key, offset=offset, size=size)
        if not self.faults or not data:
            return data
        self.faults -= 1
        return _flip(data)


@pytest.mark.parametrize("key", ["a/small", "a/large"])
def test_a_read_that_was_damaged_on_the_way_is_read_again(key: str) -> None:
    store = Noisy()
    sums = write_files(store, {key: FILES[key]})
    store.faults = 2
    assert read_files(store, sums) == {key: FILES[key]}
    store.faults = 99
    with pytest.raises(IntegrityError, match="got xxh3_128"):
        read_files(store, sums)


class Counted(MemoryBlobs):
    """Counts how many calls are under way at once."""

    def __init__(self) -> None:
        super().__init__()
        self.barrier = threading.Barrier(3)

    def put(self, key: str, data: Data) -> Entry:
        self.barrier.wait(10)
        return super().put(key, data)

    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes:
        self.barrier.wait(10)
        return super().get(key, offset=offset, size=size)


def test_files_and_parts_travel_beside_one_another() -> None:
    store = Counted()  # fewer than three at once, and the barrier breaks
    three = dict.fromkeys("abc", FILES["a/small"])
    assert read_files(store, write_files(store, three)) == three
    store = Counted()
    MemoryBlobs.put(store, "large", FILES["a/large"][:2500])  # three parts
    sums = {"large": (2500, checksum(FILES["a/large"][:2500]))}
    assert read_files(store, sums) == {"large": FILES["a/large"][:2500]}


def test_a_store_that_is_away_is_not_damage() -> None:
    class Away(MemoryBlobs):
        def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes:
            raise TransientError("away")

    for size in (10, 2500):
        with pytest.raises(TransientError):
            read_files(Away(), {"k": (size, "")})

from __future__ import annotations

from pathlib import Path

import pytest

from treadle.errors import InternalError, NotFoundError
from treadle.store.aside import Aside
from treadle.testing.memory import MemoryBlobs


@pytest.fixture
def places() -> tuple[MemoryBlobs, MemoryBlobs, Aside]:
    real, side = MemoryBlobs(), MemoryBlobs()
    real.put("data/a", b"1")
    return real, side, Aside(real, side, folder="runs/trial")


def test_reads_the_store_and_writes_beside_it(places: tuple[MemoryBlobs, MemoryBlobs, Aside], tmp_path: Path) -> None:
    real, side, aside = places
    assert aside.get("data/a") == b"1"
    assert aside.holds("data/a", b"1")
    assert aside.children("data") == ["a"]
    entry = aside.create("runs/trial/x", b"2")
    aside.replace("runs/trial/x", b"3", version=entry.version)
    aside.put("runs/trial/y/z", b"4")
    (tmp_path / "f").write_bytes(b"5")
    aside.upload("runs/trial/f", tmp_path / "f")
    assert aside.get("runs/trial/x", size=1) == b"3"
    assert aside.children("runs/trial") == ["f", "x", "y"]
    assert [entry.key for entry in aside.list("runs/trial/")] == ["runs/trial/f", "runs/trial/x", "runs/trial/y/z"]
    aside.delete("runs/trial/f")
    assert aside.head("runs/trial/f") is None
    assert aside.local_path("runs/trial/x") is None
    assert [entry.key for entry in real.list("")] == ["data/a"]
    assert len(list(side.list(""))) == 2


@pytest.mark.parametrize("key", ["data/a", "runs/other/x", "runs/trial2/x"])
def test_writes_nowhere_else(places: tuple[MemoryBlobs, MemoryBlobs, Aside], key: str) -> None:
    real, _, aside = places
    with pytest.raises(InternalError, match="only read"):
        aside.put(key, b"9")
    with pytest.raises(InternalError, match="only read"):
        aside.delete(key)
    assert real.get("data/a") == b"1"
    with pytest.raises(NotFoundError):
        real.get("runs/other/x")

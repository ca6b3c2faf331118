"""The store of the test kit keeps what the real ones keep, and so does one whose faults are off."""

from __future__ import annotations

import pytest
from blob_contract import BlobContract

from treadle.errors import ConfigError
from treadle.testing import FaultBlobs, MemoryBlobs


class TestMemory(BlobContract):
    @pytest.fixture
    def blobs(self) -> MemoryBlobs:
        return MemoryBlobs()


class TestFaultless(BlobContract):
    @pytest.fixture
    def blobs(self) -> FaultBlobs:
        return FaultBlobs(MemoryBlobs())


def test_old_bytes_bring_their_old_version_back() -> None:
    store = MemoryBlobs()
    first = store.put("a", b"A")
    store.put("a", b"B")
    store.put("a", b"A")
    store.replace("a", b"C", version=first.version)  # the trap that revisions and nonces avoid
    assert store.get("a") == b"C"


@pytest.mark.parametrize("key", ["a", "a/b/c"])
def test_no_key_is_the_folder_of_another(key: str) -> None:
    store = MemoryBlobs()
    store.put("a/b", b"")
    with pytest.raises(ConfigError, match="folder"):
        store.put(key, b"")

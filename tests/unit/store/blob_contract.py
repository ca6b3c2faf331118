"""What every place of storage keeps: one suite, run against each of them.

A place subclasses `BlobContract` in its own test module and gives the fixture `blobs`, an empty
place of its own for each test.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from treadle.errors import ConfigError, ConflictError, NotFoundError
from treadle.store import Blobs, Entry
from treadle.store.probe import probe_conditional_writes

BAD_KEYS = [
    "",
    "/",
    "/abs",
    "a/",
    "a//b",
    ".",
    "..",
    "../a",
    "a/..",
    "a/../b",
    "a/./b",
    ".hidden",
    "a/.hidden",
    ".treadle/locks/00",
    "-dash",
    "a/-dash",
    "a\\b",
    "a\0b",
    "a\nb",
    "a\n",
    "a b",
    "a%2e%2e",
    "a?b",
    "a*",
    "~",
    "s3://bucket/key",
    "é",
    "a" * 129,
    "/".join(["a"] * 500),
]


def race(num_threads: int, call: Callable[[int], Any]) -> list[Any]:
    """What `call(i)` gave in each of `num_threads` threads that start together; conflicts are None."""
    start = threading.Barrier(num_threads)

    def enter(i: int) -> Any:
        start.wait(timeout=30)
        try:
            return call(i)
        except ConflictError:
            return None

    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(enter, range(num_threads)))


class BlobContract:
    """The suite. Subclasses are collected, this class is not."""

    num_rounds = 3

    @pytest.mark.parametrize("data", [b"", b"x", b"\0\xff\r\n", bytes(range(256)) * 4096])
    def test_what_is_put_is_got(self, blobs: Blobs, data: bytes) -> None:
        entry = blobs.put("a/b.json", data)
        assert blobs.get("a/b.json") == data
        assert entry == blobs.head("a/b.json") == Entry(key="a/b.json", size_bytes=len(data), version=entry.version)

    def test_put_overwrites_with_another_version(self, blobs: Blobs) -> None:
        versions = [blobs.put("k", data).version for data in (b"one", b"two", b"", b"four")]
        assert len(set(versions)) == 4
        assert blobs.get("k") == b"four"

    def test_reading_does_not_change_the_version(self, blobs: Blobs) -> None:
        version = blobs.put("k", b"one").version
        blobs.get("k")
        assert [entry.version for entry in blobs.list("")] == [version]
        assert [entry.version for entry in blobs.list("k")] == [version]

    @pytest.mark.parametrize(
        ("offset", "size", "expected"),
        [
            (0, None, b"0123456789"),
            (4, None, b"456789"),
            (0, 3, b"012"),
            (4, 3, b"456"),
            (8, 5, b"89"),
            (9, 1, b"9"),
            (10, 1, b""),
            (10, None, b""),
            (99, 5, b""),
            (3, 0, b""),
        ],
    )
    def test_a_range_ends_where_the_bytes_end(
        self, blobs: Blobs, offset: int, size: int | None, expected: bytes
    ) -> None:
        blobs.put("k", b"0123456789")
        assert blobs.get("k", offset=offset, size=size) == expected

    def test_a_range_of_no_bytes_is_empty(self, blobs: Blobs) -> None:
        blobs.put("k", b"")
        assert blobs.get("k", offset=0, size=4) == blobs.get("k", offset=2) == b""

    @pytest.mark.parametrize(("offset", "size"), [(-1, None), (0, -1)])
    def test_a_negative_range_is_refused(self, blobs: Blobs, offset: int, size: int | None) -> None:
        blobs.put("k", b"0123")
        with pytest.raises(ConfigError, match="k: got"):
            blobs.get("k", offset=offset, size=size)

    @pytest.mark.parametrize("size", [None, 0, 4])
    def test_a_missing_key_is_not_found(self, blobs: Blobs, size: int | None) -> None:
        blobs.put("other/key", b"x")
        for missing in ("nothing", "other", "other/key2"):
            assert blobs.head(missing) is None
            with pytest.raises(NotFoundError) as caught:
                blobs.get(missing, size=size)
            assert f"{blobs.uri}/{missing}" in caught.value.message

    def test_create_refuses_what_exists(self, blobs: Blobs) -> None:
        first = blobs.create("k", b"first")
        for data in (b"second", b"first", b""):
            with pytest.raises(ConflictError) as caught:
                blobs.create("k", data)
            assert f"{blobs.uri}/k" in caught.value.message
        assert blobs.get("k") == b"first"
        assert blobs.head("k") == first

    def test_create_after_delete_is_a_new_object(self, blobs: Blobs) -> None:
        blobs.create("k", b"one")
        blobs.delete("k")
        assert blobs.create("k", b"two").size_bytes == 3
        assert blobs.get("k") == b"two"

    def test_one_of_racing_creators_wins(self, blobs: Blobs) -> None:
        for i in range(self.num_rounds):
            key = f"race/{i}"
            # The same bytes from all: only the place itself can tell who was first.
            won = [entry for entry in race(16, lambda _, key=key: blobs.create(key, b"same")) if entry]
            assert won == [blobs.head(key)]

    def test_replace_needs_the_version_it_saw(self, blobs: Blobs) -> None:
        first = blobs.create("k", b"one").version
        second = blobs.replace("k", b"two", version=first)
        assert blobs.head("k") == second
        with pytest.raises(ConflictError) as caught:
            blobs.replace("k", b"three", version=first)
        assert f"{blobs.uri}/k" in caught.value.message
        assert blobs.get("k") == b"two"

    def test_replace_refuses_a_missing_key(self, blobs: Blobs) -> None:
        version = blobs.put("k", b"one").version
        blobs.delete("k")
        with pytest.raises(ConflictError):
            blobs.replace("k", b"two", version=version)
        assert blobs.head("k") is None

    def test_replace_refuses_the_version_of_a_value_with_another_revision(self, blobs: Blobs) -> None:
        stale = blobs.put("k", b"A rev 1").version
        blobs.put("k", b"B rev 2")
        blobs.put("k", b"A rev 3")
        with pytest.raises(ConflictError):
            blobs.replace("k", b"mine", version=stale)

    def test_one_of_racing_replacers_wins(self, blobs: Blobs) -> None:
        version = blobs.create("k", b"start").version
        for i in range(self.num_rounds):
            results = race(8, lambda j, i=i, v=version: blobs.replace("k", f"{i} {j}".encode(), version=v))
            winners = [j for j, entry in enumerate(results) if entry]
            assert len(winners) == 1
            assert blobs.get("k") == f"{i} {winners[0]}".encode()
            version = results[winners[0]].version

    def test_a_counter_raised_by_many_loses_nothing(self, blobs: Blobs) -> None:
        blobs.create("counter", b"0 start")

        def raise_it(i: int) -> None:
            for j in range(self.num_rounds):
                while True:
                    seen = blobs.head("counter")
                    assert seen is not None
                    count = int(blobs.get("counter").split()[0])
                    try:
                        blobs.replace("counter", f"{count + 1} by {i}.{j}".encode(), version=seen.version)
                    except ConflictError:
                        continue
                    break

        race(8, raise_it)
        assert int(blobs.get("counter").split()[0]) == 8 * self.num_rounds

    def test_a_file_is_uploaded(self, blobs: Blobs, tmp_path: Path) -> None:
        for data in (b"", b"some bytes" * 1000):
            (tmp_path / "file").write_bytes(data)
            entry = blobs.upload("up/file", tmp_path / "file")
            assert blobs.get("up/file") == data
            assert entry == blobs.head("up/file")
        with pytest.raises(NotFoundError, match="nowhere"):
            blobs.upload("up/file", tmp_path / "nowhere")

    @pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 4096])
    def test_it_holds_what_was_put(self, blobs: Blobs, data: bytes) -> None:
        assert not blobs.holds("a/k", data)
        blobs.put("a/k", data)
        assert blobs.holds("a/k", data)
        assert not blobs.holds("a/k", data + b"x")
        assert not blobs.holds("a", data)
        blobs.delete("a/k")
        assert not blobs.holds("a/k", data)

    def test_a_view_is_put_as_the_bytes_it_shows(self, blobs: Blobs) -> None:
        data = bytearray(range(256)) * 1000
        for i, view in enumerate((data, memoryview(data), memoryview(data)[300:-7])):
            entry = blobs.put(f"k{i}", view)
            assert blobs.get(f"k{i}") == bytes(view)
            assert entry == blobs.head(f"k{i}")
            assert blobs.holds(f"k{i}", view)

    def test_what_is_put_is_a_copy(self, blobs: Blobs) -> None:
        data = bytearray(b"before")
        blobs.put("k", data)
        data[:] = b"after!"
        assert blobs.get("k") == b"before"

    def test_a_list_is_in_key_order(self, blobs: Blobs) -> None:
        # "-" and "." come before "/", "0" and "=" after it: walking folders gives another order.
        keys = ["A", "a-b", "a.b", "a/b", "a/b2", "a/c/d", "a0", "a=b", "ab", "b/c"]
        for i, key in enumerate(reversed(keys)):
            blobs.put(key, b"x" * i)
        assert [entry.key for entry in blobs.list("")] == keys
        assert [entry.size_bytes for entry in blobs.list("")] == list(reversed(range(len(keys))))
        assert [entry.key for entry in blobs.list("a/")] == ["a/b", "a/b2", "a/c/d"]
        assert [entry.key for entry in blobs.list("a/b")] == ["a/b", "a/b2"]
        assert [entry.key for entry in blobs.list("a")] == keys[1:-1]
        assert list(blobs.list("nothing/here")) == []

    def test_children_are_the_names_directly_below(self, blobs: Blobs) -> None:
        assert blobs.children("") == []
        for key in ("a/b/c", "a/b/d", "a/e", "a-b/c", "f"):
            blobs.put(key, b"x")
        assert blobs.children("") == ["a", "a-b", "f"]
        assert blobs.children("a") == blobs.children("a/") == ["b", "e"]
        assert blobs.children("a/b") == ["c", "d"]
        assert blobs.children("f") == blobs.children("nothing") == []

    def test_a_folder_goes_with_its_last_key(self, blobs: Blobs) -> None:
        blobs.put("a/b/c", b"x")
        blobs.put("d", b"x")
        blobs.delete("a/b/c")
        assert blobs.children("") == ["d"]
        assert [entry.key for entry in blobs.list("")] == ["d"]

    def test_delete_is_idempotent(self, blobs: Blobs) -> None:
        blobs.put("a/b", b"x")
        blobs.put("a/c", b"y")
        for _ in range(2):
            blobs.delete("a/b")
            assert blobs.head("a/b") is None
        assert blobs.get("a/c") == b"y"

    def test_a_bad_key_is_refused_by_every_method(self, blobs: Blobs, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"x")
        methods: dict[str, Callable[[str], object]] = {
            "get": blobs.get,
            "head": blobs.head,
            "put": lambda key: blobs.put(key, b"x"),
            "holds": lambda key: blobs.holds(key, b"x"),
            "create": lambda key: blobs.create(key, b"x"),
            "replace": lambda key: blobs.replace(key, b"x", version="v"),
            "upload": lambda key: blobs.upload(key, tmp_path / "file"),
            "delete": blobs.delete,
            "local_path": blobs.local_path,
            "list": lambda prefix: list(blobs.list(prefix)),
            "children": blobs.children,
        }
        for key in BAD_KEYS:
            for name, call in methods.items():
                if name in ("list", "children") and key in ("", "a/"):
                    continue  # these may start a key
                with pytest.raises(ConfigError, match="expected plain names"):
                    call(key)
        assert list(blobs.list("")) == []

    def test_a_reader_never_sees_half_a_write(self, blobs: Blobs) -> None:
        size = 200_000
        blobs.put("k", b"0" * size)
        stop = threading.Event()

        def read() -> set[bytes]:
            seen: set[bytes] = set()
            while not stop.is_set():
                data = blobs.get("k")
                assert len(data) == size
                seen.add(data[:1])
                assert data == data[:1] * size
            return seen

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read) for _ in range(2)]
            for i in range(20):
                blobs.put("k", b"%d" % (i % 10) * size)
            stop.set()
            assert set().union(*(reader.result() for reader in readers))

    def test_the_probe_finds_nothing_and_leaves_nothing(self, blobs: Blobs) -> None:
        assert probe_conditional_writes(blobs) == []
        assert list(blobs.list("")) == []

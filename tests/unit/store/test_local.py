"""A folder as a place of storage."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest
from blob_contract import BlobContract
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from treadle.errors import ConfigError, ConflictError, TransientError
from treadle.store import Entry
from treadle.store.blobs import check_key, is_key
from treadle.store.local import LocalBlobs
from treadle.store.places import open_blobs
from treadle.store.probe import probe_conditional_writes


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobs:
    return LocalBlobs(tmp_path / "store")


class TestLocal(BlobContract):
    num_rounds = 15


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_the_same_bytes_again_have_another_version(blobs: LocalBlobs) -> None:
    # A, B, A within one tick of the kernel's clock and on the inode that the first A gave back.
    seen = [blobs.put("k", data).version for _ in range(50) for data in (b"A", b"B")]
    assert len(set(seen)) == 100
    with pytest.raises(ConflictError):
        blobs.replace("k", b"C", version=seen[-3])


def test_versions_rise_even_where_the_clock_stands_or_falls(blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([2_000_000_000, 2_000_000_000, 1_000_000_000])
    monkeypatch.setattr("treadle.store.local.time.time_ns", lambda: next(clock))
    versions = [blobs.put("k", b"A").version.split("-")[1] for _ in range(3)]
    assert [int(version, 16) for version in versions] == [2_000_000_000, 2_000_000_001, 2_000_000_002]


def test_one_of_racing_processes_wins(blobs: LocalBlobs) -> None:
    code = """
import sys
from pathlib import Path
from treadle.errors import ConflictError
from treadle.store.local import LocalBlobs
blobs = LocalBlobs(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
won = 0
for i in range(100):
    try:
        blobs.create(f"race/{i}", b"x")
        won += 1
    except ConflictError:
        pass
    while True:
        seen, count = blobs.head("counter"), int(blobs.get("counter"))
        try:
            blobs.replace("counter", str(count + 1).encode(), version=seen.version)
            break
        except ConflictError:
            pass
print(won)
"""
    blobs.create("counter", b"0")
    racers = [run_python(code, blobs.uri) for _ in range(3)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    won = [int(racer.communicate("go\n", timeout=60)[0]) for racer in racers]
    assert sum(won) == 100
    assert blobs.get("counter") == b"300"


def test_a_killed_writer_leaves_nothing_that_shows(blobs: LocalBlobs) -> None:
    code = """
import sys
from pathlib import Path
from treadle.store.local import LocalBlobs
blobs = LocalBlobs(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    for letter in (b"A", b"B"):
        blobs.put("a/k", letter * 30_000_000)
"""
    blobs.put("a/k", b"A" * 30_000_000)
    temporary = Path(blobs.uri) / ".treadle" / "tmp"
    is_left = False
    for _ in range(5):
        writer = run_python(code, blobs.uri)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        while not any(temporary.iterdir()):
            pass
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        writer.communicate()
        assert [entry.key for entry in blobs.list("")] == ["a/k"]
        data = blobs.get("a/k")
        assert data in (b"A" * 30_000_000, b"B" * 30_000_000)
        is_left = is_left or any(temporary.iterdir())
    assert is_left  # else nothing was killed in the middle
    LocalBlobs(Path(blobs.uri)).put("b", b"x")
    assert list(temporary.iterdir()) == []


def test_a_sweep_spares_the_file_of_a_living_writer(blobs: LocalBlobs) -> None:
    temporary = Path(blobs.uri) / ".treadle" / "tmp"
    num_tries = 0

    def write_slowly(file: BinaryIO) -> None:
        nonlocal num_tries
        num_tries += 1
        (temporary / "dead").write_bytes(b"left by a dead writer")
        file.write(b"slow")
        LocalBlobs(Path(blobs.uri)).put("b", b"x")  # sweeps
        assert not (temporary / "dead").exists()
        assert len(list(temporary.iterdir())) == 1

    blobs._write("put", "slow", write_slowly)
    assert num_tries == 1
    assert blobs.get("slow") == b"slow"


def test_bytes_are_flushed_before_the_name_and_the_name_before_the_return(
    blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(blobs.uri)
    blobs.put("made/all/folders", b"x")
    flushed: list[tuple[str, bool]] = []
    fsync = os.fsync

    def spy(handle: int) -> None:
        fsync(handle)
        path = Path(f"/proc/self/fd/{handle}").readlink()
        flushed.append(
            (
                str(path.relative_to(root).parent if path.is_file() else path.relative_to(root)),
                (root / "new/k").exists(),
            )
        )

    monkeypatch.setattr(os, "fsync", spy)
    blobs.create("new/k", b"x")
    assert flushed == [(".treadle/tmp", False), (".", False), ("new", True)]


def test_a_symbolic_link_is_neither_followed_nor_listed(blobs: LocalBlobs, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    blobs.put("a/b", b"x")
    (Path(blobs.uri) / "folder").symlink_to(outside)
    (Path(blobs.uri) / "file").symlink_to(outside / "secret")
    for key in ("folder/secret", "folder/new", "file"):
        for call in (blobs.get, blobs.head, blobs.delete, lambda key: blobs.put(key, b"x")):
            with pytest.raises(ConfigError, match="symbolic link"):
                call(key)
    assert [entry.key for entry in blobs.list("")] == ["a/b"]
    assert blobs.children("") == ["a"]
    assert [path.name for path in outside.iterdir()] == ["secret"]


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    blobs = LocalBlobs(tmp_path / "link")
    blobs.put("a/b", b"x")
    assert blobs.uri == str(tmp_path / "real")
    assert blobs.local_path("a/b").read_bytes() == b"x"


def test_what_other_programs_leave_is_not_listed(blobs: LocalBlobs) -> None:
    blobs.put("a/b", b"x")
    for name in (".DS_Store", "a/.nfs01", "a/with space", "a/~"):
        (Path(blobs.uri) / name).write_bytes(b"")
    (Path(blobs.uri) / "empty" / "folder").mkdir(parents=True)
    assert [entry.key for entry in blobs.list("")] == ["a/b"]
    assert blobs.children("") == ["a"]
    assert blobs.children("a") == ["b"]


@pytest.mark.parametrize("key", ["a", "a/b/c"])
def test_a_key_cannot_be_the_folder_of_another(blobs: LocalBlobs, key: str) -> None:
    blobs.put("a/b", b"x")
    for write in (blobs.put, blobs.create):
        with pytest.raises(ConfigError) as caught:
            write(key, b"y")
        assert "folder of another key" in caught.value.hint
    blobs.delete("a")
    assert [entry.key for entry in blobs.list("")] == ["a/b"]


def test_nothing_is_written_until_something_is(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    assert list(blobs.list("")) == blobs.children("") == []
    blobs.delete("a/b")
    assert blobs.head("a/b") is None
    assert not (tmp_path / "store").exists()


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="got a file"):
        LocalBlobs(tmp_path / "file")


def test_a_write_that_breaks_off_is_transient_and_leaves_the_old_value(blobs: LocalBlobs) -> None:
    blobs.put("k", b"old")
    code = """
import resource, signal, sys
from pathlib import Path
from treadle.errors import TransientError
from treadle.store.local import LocalBlobs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    LocalBlobs(Path(sys.argv[1])).put("k", b"x" * 200_000)
except TransientError as error:
    print(error.message)
"""
    message, _ = run_python(code, blobs.uri).communicate(timeout=60)
    assert f"{blobs.uri}/k: put: got" in message
    assert blobs.get("k") == b"old"
    assert list((Path(blobs.uri) / ".treadle" / "tmp").iterdir()) == []


@given(st.text(max_size=20) | st.from_regex(r"[a./~\\\-\x00 ]{1,8}"))
def test_no_key_leaves_the_root(key: str) -> None:
    if is_key(key):
        path = Path("/store") / check_key(key)
        assert Path(os.path.normpath(path)) == path
        assert str(path) == f"/store/{key}"
        assert not any(part.startswith(".") for part in path.parts)
    else:
        with pytest.raises(ConfigError):
            check_key(key)


class LocalAgainstDict(RuleBasedStateMachine):
    """Any order of calls leaves what a dictionary would hold."""

    keys = st.sampled_from(["a", "b/c", "b/d", "b-e", "f/g/h", "f/g/i"])
    bodies = st.binary(max_size=8)
    root: Path

    def __init__(self) -> None:
        super().__init__()
        self.blobs = LocalBlobs(self.root)
        self.truth: dict[str, bytes] = {}
        self.seen: dict[str, Entry] = {}
        for entry in self.blobs.list(""):
            self.blobs.delete(entry.key)

    @rule(key=keys, data=bodies)
    def put(self, key: str, data: bytes) -> None:
        self.seen[key] = self.blobs.put(key, data)
        self.truth[key] = data

    @rule(key=keys, data=bodies)
    def create(self, key: str, data: bytes) -> None:
        if key in self.truth:
            with pytest.raises(ConflictError):
                self.blobs.create(key, data)
        else:
            self.seen[key] = self.blobs.create(key, data)
            self.truth[key] = data

    @rule(key=keys, data=bodies)
    def replace(self, key: str, data: bytes) -> None:
        version = self.seen[key].version if key in self.seen else "never"
        if key in self.truth:
            self.seen[key] = self.blobs.replace(key, data, version=version)
            self.truth[key] = data
        with pytest.raises(ConflictError):  # stale now, or gone
            self.blobs.replace(key, b"lost", version=version)

    @rule(key=keys)
    def delete(self, key: str) -> None:
        self.blobs.delete(key)
        self.truth.pop(key, None)

    @invariant()
    def holds_the_same(self) -> None:
        found = list(self.blobs.list(""))
        assert [entry.key for entry in found] == sorted(self.truth)
        assert all(self.blobs.get(key) == data for key, data in self.truth.items())
        assert all(entry == self.seen[entry.key] for entry in found)
        assert self.blobs.children("b") == sorted(key[2:] for key in self.truth if key.startswith("b/"))


def test_any_order_of_calls_leaves_what_a_dictionary_would_hold(tmp_path: Path) -> None:
    machine = type("Machine", (LocalAgainstDict,), {"root": tmp_path})
    run_state_machine_as_test(machine, settings=settings(max_examples=15, stateful_step_count=20, deadline=None))


class IgnoresConditions(LocalBlobs):
    """What some S3 servers do: every conditional write succeeds."""

    def create(self, key: str, data: bytes) -> Entry:
        return self.put(key, data)

    def replace(self, key: str, data: bytes, *, version: str) -> Entry:
        del version
        return self.put(key, data)


class KnowsNoConditions(LocalBlobs):
    """What other S3 servers do: 501 to every conditional write."""

    def create(self, key: str, data: bytes) -> Entry:
        raise ConfigError("501")

    def replace(self, key: str, data: bytes, *, version: str) -> Entry:
        raise ConfigError("501")


@pytest.mark.parametrize("place", [IgnoresConditions, KnowsNoConditions])
def test_the_probe_names_what_an_unsound_place_does(place: type[LocalBlobs], tmp_path: Path) -> None:
    blobs = place(tmp_path)
    assert probe_conditional_writes(blobs) == [
        "create once",
        "create once under a race",
        "replace only the version seen",
        "replace only what exists",
    ]
    assert list(blobs.list("")) == []


def test_a_place_that_can_hold_no_folder_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        LocalBlobs(Path("/dev/null/store")).put("k", b"x")
    assert caught.value.message.startswith("/dev/null/store/k: put: got Not a directory")


def test_an_address_opens_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_blobs(str(tmp_path / "a")).uri == str(tmp_path / "a")
    assert open_blobs(f"file://{tmp_path}/with%20space").uri == f"{tmp_path}/with space"
    assert open_blobs("relative/a").uri == f"{tmp_path}/relative/a"
    assert open_blobs("./a:b").uri == f"{tmp_path}/a:b"
    assert open_blobs("~/store").uri == str(tmp_path / "home" / "store")


@pytest.mark.parametrize(
    "uri",
    ["", "  ", "a\0b", "http://host/a", "s3:/bucket", "s3:bucket", "file:a", "file://host/a", "gs://b", "s3a://b/c"],
)
def test_another_address_is_refused_with_the_forms_that_are_taken(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_blobs(uri)
    assert "s3://bucket/prefix" in caught.value.message


def test_a_folder_needs_no_boto3() -> None:
    code = "import sys; from treadle.store import open_blobs; open_blobs('x'); print('boto3' in sys.modules)"
    assert run_python(code).communicate(timeout=60)[0] == "False\n"


# Large values go past the page cache

LARGE = [1 << 20, (1 << 20) + 1, (1 << 20) + 4095, 3 << 20, 5_000_001]


@pytest.mark.parametrize("size", LARGE)
def test_a_large_value_is_written_whole(blobs: LocalBlobs, size: int) -> None:
    data = os.urandom(size + 1)
    for form in (data[1:], memoryview(data)[1:], bytearray(data[1:])):
        entry = blobs.put("k", form)
        assert blobs.get("k") == data[1:]
        assert entry == blobs.head("k")
        assert blobs.holds("k", form)


@pytest.mark.parametrize("last", [0, 1, 2, "halves"])
@pytest.mark.parametrize("size", LARGE)
def test_where_direct_writes_end_the_cache_goes_on(
    blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch, last: int | str, size: int
) -> None:
    really, number = os.write, 0

    def write(handle: int, data: memoryview) -> int:
        nonlocal number
        number += 1
        if last == "halves":
            return really(handle, data[: len(data) // 2])
        if number > int(last):
            raise OSError(errno.EINVAL, "no direct writes here")
        return really(handle, data)

    data = os.urandom(size)
    with monkeypatch.context() as strange:
        strange.setattr("treadle.store.local.os.write", write)
        blobs.put("k", data)
    assert number, "no direct write was tried"
    assert blobs.get("k") == data


def test_a_full_disk_in_the_middle_of_a_large_value_leaves_nothing(
    blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs.put("k", b"before")

    def full(handle: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("treadle.store.local.os.write", full)
        with pytest.raises(TransientError, match="No space left on device"):
            blobs.put("k", os.urandom(2 << 20))
    assert blobs.get("k") == b"before"
    assert [entry.key for entry in blobs.list("")] == ["k"]
    assert not list((Path(blobs.uri) / ".treadle" / "tmp").iterdir())

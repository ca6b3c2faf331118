"""Committed checkpoints survive death at any write, damage to any byte, and other attempts."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle.errors import ConfigError, ConflictError, IntegrityError
from treadle.store.blobs import Blobs, Entry
from treadle.store.checkpoints import CheckpointManifest, Checkpoints, keep
from treadle.store.local import LocalBlobs
from treadle.store.sealed import seal, unseal
from treadle.testing import Died, FaultBlobs, MemoryBlobs

RUN = "toy-20260101-000000-abcd"
CKPT = f"runs/{RUN}/ckpt"

UNTIMED = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(params=["memory", "local"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return MemoryBlobs() if request.param == "memory" else LocalBlobs(tmp_path / "store")


def open_run(
    blobs: Blobs, *, attempt: int = 1, keep_last: int = 2, spec_digest: str = "spec", data_digest: str = "data"
) -> Checkpoints:
    return Checkpoints(
        blobs, RUN, attempt=attempt, keep_last=keep_last, spec_digest=spec_digest, data_digest=data_digest
    )


def files_at(update: int) -> dict[str, bytes]:
    return {"model.safetensors": bytes([update % 256]) * 300, "rng/rank0.bin": b"seed %d" % update}


def commit(checkpoints: Checkpoints, update: int) -> CheckpointManifest:
    return checkpoints.commit(update, files_at(update), {"update": update, "position": [update, 0]})


def newest_update(blobs: Blobs) -> int:
    latest = open_run(blobs, attempt=0).latest()
    return latest.update if latest else 0


def flip(blobs: Blobs, key: str, at: int) -> None:
    data = bytearray(blobs.get(key))
    data[at] ^= 0x01
    blobs.put(key, bytes(data))


def folders(blobs: Blobs) -> list[str]:
    return blobs.children(CKPT)


def test_commit_then_restore_gives_every_byte_and_the_state(blobs: Blobs) -> None:
    assert open_run(blobs).latest() is None
    writer = open_run(blobs)
    first, second = commit(writer, 3), commit(writer, 7)
    assert (first.prev, second.prev) == (None, first.prefix)

    manifest, files = open_run(blobs, attempt=2).restore() or pytest.fail("nothing to restore")
    assert manifest == second
    assert files == files_at(7)
    assert manifest.state == {"update": 7, "position": [7, 0]}
    assert open_run(blobs, attempt=0).read(first) == files_at(3)


def test_latest_follows_commits_not_update_numbers(blobs: Blobs) -> None:
    commit(open_run(blobs, attempt=1), 10)
    rolled_back = open_run(blobs, attempt=2)
    commit(rolled_back, 20)
    again = commit(rolled_back, 5)  # after a roll-back within the attempt
    assert open_run(blobs, attempt=3).latest() == again


def _flip_first(blobs: Blobs, key: str) -> None:
    flip(blobs, key, 0)


def _flip_last(blobs: Blobs, key: str) -> None:
    flip(blobs, key, -1)


def _truncate(blobs: Blobs, key: str) -> None:
    blobs.put(key, blobs.get(key)[:-1])


def _extend(blobs: Blobs, key: str) -> None:
    blobs.put(key, blobs.get(key) + b"\0")


def _empty(blobs: Blobs, key: str) -> None:
    blobs.put(key, b"")


def _remove(blobs: Blobs, key: str) -> None:
    blobs.delete(key)


@pytest.mark.parametrize("name", ["model.safetensors", "rng/rank0.bin", "MANIFEST.json"])
@pytest.mark.parametrize("damage", [_flip_first, _flip_last, _truncate, _extend, _empty, _remove])
def test_damage_is_found_quarantined_and_walked_past(damage: Callable[[Blobs, str], None], name: str) -> None:
    blobs = MemoryBlobs()
    writer = open_run(blobs)
    older, newer = commit(writer, 1), commit(writer, 2)
    intact = {entry.key: blobs.get(entry.key) for entry in blobs.list(newer.prefix)}
    damage(blobs, newer.key(name))

    assert open_run(blobs, attempt=2).latest() == older
    assert blobs.head(newer.key("quarantine.json")) is not None

    for key, data in intact.items():  # mended or not: who once was damaged is not offered again
        blobs.put(key, data)
    assert open_run(blobs, attempt=3).latest() == older


def test_every_single_bit_flip_of_a_manifest_is_found() -> None:
    blobs = MemoryBlobs()
    writer = open_run(blobs)
    older, newer = commit(writer, 1), commit(writer, 2)
    key = newer.key("MANIFEST.json")
    good = blobs.get(key)
    for at, bit in itertools.product(range(len(good)), (0x01, 0x10)):
        blobs.put(key, good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
        found = open_run(blobs, attempt=0).latest()
        assert found == older, f"byte {at} ^ {bit:#x} was believed"
        blobs.delete(newer.key("quarantine.json"))
    blobs.put(key, good)
    assert open_run(blobs).latest() == newer  # the loop did fail for the flips and not for something else


def test_swapped_files_and_a_foreign_manifest_are_found() -> None:
    blobs = MemoryBlobs()
    writer = open_run(blobs, keep_last=4)
    first, second, third, fourth = (commit(writer, n) for n in (1, 2, 3, 4))
    blobs.put(fourth.key("MANIFEST.json"), blobs.get(first.key("MANIFEST.json")))
    blobs.put(third.key("model.safetensors"), blobs.get(first.key("model.safetensors")))
    assert open_run(blobs, attempt=2).latest() == second


def test_read_names_the_damaged_file(blobs: Blobs) -> None:
    manifest = commit(open_run(blobs), 1)
    flip(blobs, manifest.key("rng/rank0.bin"), 2)
    with pytest.raises(IntegrityError, match=r"rng/rank0\.bin: got xxh3_128"):
        open_run(blobs).read(manifest)


def test_nothing_sound_left_is_none(blobs: Blobs) -> None:
    writer = open_run(blobs)
    for manifest in (commit(writer, 1), commit(writer, 2)):
        blobs.delete(manifest.key("model.safetensors"))
    assert open_run(blobs, attempt=2).latest() is None


def test_a_quarantined_one_does_not_count_as_kept(blobs: Blobs) -> None:
    writer = open_run(blobs, keep_last=2)
    sound, damaged = commit(writer, 1), commit(writer, 2)
    flip(blobs, damaged.key("model.safetensors"), 5)
    resumed = open_run(blobs, attempt=2)
    assert resumed.latest() == sound
    newest = commit(resumed, 3)
    flip(blobs, newest.key("model.safetensors"), 5)
    assert open_run(blobs, attempt=3).latest() == sound


def test_retention_keeps_the_last_ones_and_what_is_pointed_at(blobs: Blobs) -> None:
    writer = open_run(blobs, keep_last=2)
    made = [commit(writer, n) for n in range(1, 4)]
    keep(blobs, made[1].key("model.safetensors"), by="toy")
    made += [commit(writer, n) for n in range(4, 7)]
    assert folders(blobs) == [made[n].prefix.rpartition("/")[2] for n in (1, 4, 5)]
    assert open_run(blobs).read(made[1]) == files_at(2)
    keep(blobs, "data/toy/shard-0", by="toy")  # not a checkpoint: nothing to keep, nothing written
    assert blobs.children("data") == []


def test_a_failed_commit_removes_nothing_and_the_next_one_sweeps_it() -> None:
    store = MemoryBlobs()
    one = commit(open_run(store, keep_last=1), 1)
    with pytest.raises(Died):
        commit(open_run(FaultBlobs(store, die_before=4), keep_last=1), 2)
    assert len(folders(store)) == 2
    assert open_run(store, attempt=2).latest() == one
    two = commit(open_run(store, attempt=2, keep_last=1), 2)
    assert folders(store) == [two.prefix.rpartition("/")[2]]


def test_a_newer_attempt_fences_off_the_older(blobs: Blobs) -> None:
    zombie = open_run(blobs, attempt=1)
    seen = commit(zombie, 10)
    resumed = open_run(blobs, attempt=2)
    resumed.acquire()
    with pytest.raises(ConflictError, match="attempt 2, which holds the run"):
        commit(zombie, 20)
    assert resumed.latest() == seen
    with pytest.raises(ConflictError):
        zombie.acquire()
    mine = commit(resumed, 12)
    assert open_run(blobs, attempt=3).latest() == mine


def test_a_later_process_of_the_same_attempt_fences_off_the_earlier(blobs: Blobs) -> None:
    before, after = open_run(blobs), open_run(blobs)
    seen = commit(before, 1)
    after.acquire()
    with pytest.raises(ConflictError, match="a later process of the same attempt"):
        commit(before, 2)
    assert after.latest() == seen


class Interleaved(MemoryBlobs):
    """Runs `act` once, right before the first access to a key that ends with `suffix`."""

    suffix = ""
    act: Callable[[], object] | None = None

    def create(self, key: str, data: bytes) -> Entry:
        self._interrupt(key)
        return super().create(key, data)

    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes:
        self._interrupt(key)
        return super().get(key, offset=offset, size=size)

    def children(self, prefix: str) -> list[str]:
        self._interrupt(prefix)
        return super().children(prefix)

    def _interrupt(self, key: str) -> None:
        if self.act is not None and key.endswith(self.suffix):
            act, self.act = self.act, None
            act()


def test_an_attempt_fenced_off_in_the_middle_of_its_commit_is_not_the_latest() -> None:
    store = Interleaved()
    zombie, resumed = open_run(store, attempt=1), open_run(store, attempt=2)
    seen = commit(zombie, 10)
    store.suffix, store.act = "MANIFEST.json", resumed.acquire
    with pytest.raises(ConflictError):
        commit(zombie, 20)
    assert len(folders(store)) == 2  # whole, with its manifest, and still nobody's latest
    assert resumed.latest() == seen
    commit(resumed, 11)
    assert sorted(name[:13] for name in folders(store)) == ["00000010-0001", "00000011-0002"]


def test_retention_leaves_a_newer_attempt_alone() -> None:
    store = Interleaved()
    zombie, resumed = open_run(store, attempt=1, keep_last=1), open_run(store, attempt=2, keep_last=1)
    commit(zombie, 10)
    store.suffix, store.act = "/ckpt", lambda: commit(resumed, 11)
    commit(zombie, 20)  # acknowledged, and overtaken before it swept
    assert open_run(store, attempt=0).restore() is not None
    assert newest_update(store) == 11


def test_an_attempt_that_was_replaced_uploads_nothing() -> None:
    store = MemoryBlobs()
    zombie = open_run(FaultBlobs(store), attempt=1)
    commit(zombie, 10)
    open_run(store, attempt=2).acquire()
    before = list(store.list(""))
    with pytest.raises(ConflictError):
        commit(zombie, 20)
    assert list(store.list("")) == before


def test_a_reader_overtaken_by_retention_takes_the_newer_and_condemns_nothing() -> None:
    store = Interleaved()
    writer = open_run(store, keep_last=1)
    commit(writer, 1)
    store.suffix, store.act = "model.safetensors", lambda: commit(writer, 2)
    found = open_run(store, attempt=0).restore() or pytest.fail("nothing to restore")
    assert found[1] == files_at(2)
    assert not [entry.key for entry in store.list(CKPT) if entry.key.endswith("quarantine.json")]


def _train(blobs: Blobs, acknowledged: list[int]) -> None:
    writer = open_run(blobs, keep_last=2)
    for update in range(1, 5):
        commit(writer, update)
        acknowledged.append(update)


def test_death_at_any_write_loses_nothing_acknowledged() -> None:
    counting = FaultBlobs(MemoryBlobs())
    _train(counting, [])
    num_deaths = 0
    for number, moment in itertools.product(range(1, counting.writes + 1), ("die_before", "die_after")):
        store, acknowledged = MemoryBlobs(), list[int]()
        with pytest.raises(Died):
            _train(FaultBlobs(store, **{moment: number}), acknowledged)
        num_deaths += 1

        resumed = open_run(store, attempt=2)
        resumed.acquire()
        found = resumed.restore()
        update = found[0].update if found else 0
        assert update in {max(acknowledged, default=0), max(acknowledged, default=0) + 1}, (number, moment)
        assert found is None or found[1] == files_at(update)
        commit(resumed, update + 1)
        assert newest_update(store) == update + 1
        assert len(folders(store)) <= 2, (number, moment)
    assert num_deaths > 30


def test_a_lost_reply_is_not_a_lost_race() -> None:
    counting = FaultBlobs(MemoryBlobs())
    _train(counting, [])
    for number in range(1, counting.writes + 1):
        store, acknowledged = MemoryBlobs(), list[int]()
        _train(FaultBlobs(store, lose_reply=number), acknowledged)
        assert acknowledged == [1, 2, 3, 4]
        assert newest_update(store) == 4


def test_racing_attempts_leave_the_newest_in_charge(blobs: Blobs) -> None:
    start = threading.Barrier(8)

    def attempt(number: int) -> bool:
        checkpoints = open_run(blobs, attempt=number)
        start.wait()
        try:
            for update in range(3):
                commit(checkpoints, 10 * number + update)
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(attempt, range(1, 9)))
    assert done[7]
    latest = open_run(blobs, attempt=9).latest()
    assert latest is not None
    assert (latest.attempt, latest.update) == (8, 82)


@pytest.mark.parametrize("name", ["spec_digest", "data_digest"])
def test_another_spec_or_data_set_is_refused_but_not_condemned(blobs: Blobs, name: str) -> None:
    manifest = commit(open_run(blobs), 1)
    other = open_run(blobs, spec_digest="other") if name == "spec_digest" else open_run(blobs, data_digest="other")
    for act in (lambda c: c.latest(), lambda c: c.restore(), lambda c: c.read(manifest)):
        with pytest.raises(IntegrityError, match=f"got {name} {getattr(manifest, name)}, expected other"):
            act(other)
    assert open_run(blobs).latest() == manifest


def test_without_head_the_folders_tell(blobs: Blobs) -> None:
    commit(open_run(blobs, attempt=1, keep_last=3), 50)
    writer = open_run(blobs, attempt=2, keep_last=3)
    commit(writer, 8)
    newest = commit(writer, 9)
    flip(blobs, f"runs/{RUN}/HEAD.json", 20)
    assert open_run(blobs, attempt=0).latest() == newest
    with pytest.raises(ConflictError):
        open_run(blobs, attempt=1).acquire()
    following = commit(writer, 10)  # the holder mends it
    assert open_run(blobs, attempt=0).latest() == following
    blobs.delete(f"runs/{RUN}/HEAD.json")
    resumed = open_run(blobs, attempt=3, keep_last=3)
    resumed.acquire()
    assert resumed.latest() == following
    commit(resumed, 11)
    assert len(folders(blobs)) == 3


def test_head_never_has_a_content_twice() -> None:
    store, seen = MemoryBlobs(), set[bytes]()
    writers = [open_run(store) for _ in range(2)]
    for writer in writers * 5:
        writer.acquire()
        seen.add(store.get(f"runs/{RUN}/HEAD.json"))
    assert len(seen) == 10


@pytest.mark.parametrize("name", ["MANIFEST.json", "quarantine.json", "KEEP.json", "../x", "", "/abs", "a//b"])
def test_names_that_may_not_be_written(name: str) -> None:
    store = MemoryBlobs()
    with pytest.raises(ConfigError):
        open_run(store).commit(1, {name: b"x"}, {})
    assert folders(store) == []


def test_a_short_write_is_noticed() -> None:
    class Short(MemoryBlobs):
        def put(self, key: str, data: bytes) -> Entry:
            return super().put(key, data[:-1])

    with pytest.raises(IntegrityError, match=r"got 299 bytes after writing, expected 300"):
        commit(open_run(Short()), 1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text('aé"\\\n'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
    max_leaves=8,
)


@UNTIMED
@given(
    update=st.integers(0, 10**10),
    files=st.dictionaries(st.sampled_from(["a", "b.bin", "c/d"]), st.tuples(st.integers(0), st.text("0123abc"))),
    state=st.dictionaries(st.sampled_from("abc"), JSON),
    prev=st.none() | st.just("x"),
)
def test_a_manifest_reads_back_as_written(
    update: int, files: dict[str, tuple[int, str]], state: dict[str, object], prev: str | None
) -> None:
    manifest = CheckpointManifest(
        run=RUN,
        update=update,
        attempt=1,
        prefix="p",
        prev=prev,
        files=files,
        state=state,
        spec_digest="",
        data_digest="",
    )
    assert unseal(CheckpointManifest, seal("checkpoint", manifest), kind="checkpoint", where="here") == manifest

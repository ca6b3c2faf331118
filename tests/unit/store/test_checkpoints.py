"""Committed checkpoints survive death at any write, damage to any byte, and other attempts."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle.errors import ConfigError, ConflictError, IntegrityError
from treadle.store.blobs import Blobs, Data, Entry
from treadle.store.checkpoints import CheckpointManifest, Checkpoints, keep
from treadle.store.lease import Head
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


def commit(checkpoints: Checkpoints, update: int, *, best: bool = False) -> CheckpointManifest:
    return checkpoints.commit(update, files_at(update), {"update": update, "position": [update, 0]}, best=best)


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


def test_all_damaged_is_told_from_none_there(blobs: Blobs) -> None:
    assert open_run(blobs).restore() is None
    writer = open_run(blobs)
    writer.acquire()
    assert writer.restore() is None
    one, two = commit(writer, 1), commit(writer, 2)
    blobs.delete(one.key("model.safetensors"))
    flip(blobs, two.key("rng/rank0.bin"), 0)
    first = r"rng/rank0\.bin: got xxh3_128.*model\.safetensors: missing"
    for reasons in (
        first,
        "quarantined before",
    ):  # whoever looks first condemns them; to the next it must not look empty
        with pytest.raises(IntegrityError, match=f"got 2 checkpoints, all damaged .*{reasons}") as caught:
            open_run(blobs, attempt=2).latest()
        assert caught.value.context["damaged"] == [two.prefix, one.prefix]
        assert "quarantine.json" in caught.value.hint
    # What the hint says helps.
    blobs.put(one.key("model.safetensors"), files_at(1)["model.safetensors"])
    blobs.delete(one.key("quarantine.json"))
    assert open_run(blobs, attempt=2).latest() == one
    assert commit(open_run(blobs, attempt=2), 3) == open_run(blobs, attempt=0).latest()


@pytest.mark.parametrize("is_acquired_first", [False, True])
@pytest.mark.parametrize("damage", [_flip_last, _remove])
def test_damage_to_head_and_to_every_manifest_is_not_taken_for_a_fresh_run(
    blobs: Blobs, damage: Callable[[Blobs, str], None], is_acquired_first: bool
) -> None:
    writer = open_run(blobs)
    made = [commit(writer, 1), commit(writer, 2)]
    damage(blobs, f"runs/{RUN}/HEAD.json")
    for manifest in made:
        blobs.delete(manifest.key("MANIFEST.json"))
    resumed = open_run(blobs, attempt=2)
    if is_acquired_first:
        resumed.acquire()
    with pytest.raises(IntegrityError, match="got 2 checkpoints, all damaged"):
        resumed.restore()


@pytest.mark.parametrize("is_acquired_first", [False, True])
@pytest.mark.parametrize("is_head_damaged", [False, True])
def test_the_newest_three_damaged(blobs: Blobs, is_head_damaged: bool, is_acquired_first: bool) -> None:
    writer = open_run(blobs, keep_last=5)
    made = [commit(writer, n) for n in range(1, 6)]
    _flip_last(blobs, made[2].key("model.safetensors"))
    _empty(blobs, made[3].key("MANIFEST.json"))
    _remove(blobs, made[4].key("rng/rank0.bin"))
    if is_head_damaged:
        _flip_first(blobs, f"runs/{RUN}/HEAD.json")
    resumed = open_run(blobs, attempt=2, keep_last=5)
    if is_acquired_first:
        resumed.acquire()
    found = resumed.restore() or pytest.fail("nothing to restore")
    assert found == (made[1], files_at(2))
    assert [blobs.head(manifest.key("quarantine.json")) is not None for manifest in made] == [0, 0, 1, 1, 1]
    newest = commit(resumed, 6)
    assert newest.prev == (made[4].prefix)
    assert open_run(blobs, attempt=3).latest() == newest


def test_the_manifest_of_another_run_is_walked_past() -> None:
    blobs = MemoryBlobs()
    writer = open_run(blobs)
    older, newer = commit(writer, 1), commit(writer, 2)
    blobs.put(newer.key("MANIFEST.json"), seal("checkpoint", replace(newer, run="other-run")))
    assert open_run(blobs, attempt=2).latest() == older


# The best


def test_the_best_stays_until_there_is_a_better_one(blobs: Blobs) -> None:
    writer = open_run(blobs, keep_last=2)
    assert writer.best() is None
    commit(writer, 1)
    assert writer.best() is None
    best = commit(writer, 2, best=True)
    made = [commit(writer, n) for n in range(3, 7)]
    assert best.best
    assert open_run(blobs, attempt=0).best() == best
    assert open_run(blobs, attempt=0).read(best) == files_at(2)
    assert open_run(blobs, attempt=0).latest() == made[-1]
    assert folders(blobs) == [m.prefix.rpartition("/")[2] for m in (best, *made[-2:])]
    better = commit(open_run(blobs, attempt=2), 7, best=True)
    assert open_run(blobs, attempt=0).best() == better
    assert folders(blobs) == [m.prefix.rpartition("/")[2] for m in (made[-1], better)]


def test_the_best_that_is_newest_counts_once(blobs: Blobs) -> None:
    writer = open_run(blobs, keep_last=2)
    for update in range(1, 5):
        commit(writer, update, best=True)
    assert len(folders(blobs)) == 2
    _flip_last(blobs, f"runs/{RUN}/HEAD.json")
    assert [open_run(blobs, attempt=0).best(), open_run(blobs, attempt=0).latest()] == [
        open_run(blobs, attempt=0).latest()
    ] * 2


def test_the_best_is_found_without_head_and_kept(blobs: Blobs) -> None:
    writer = open_run(blobs, keep_last=1)
    best = commit(writer, 1, best=True)
    newest = commit(writer, 2)
    _flip_last(blobs, f"runs/{RUN}/HEAD.json")
    assert open_run(blobs, attempt=0).best() == best
    resumed = open_run(blobs, attempt=2, keep_last=1)
    resumed.acquire()
    assert resumed.latest() == newest
    commit(resumed, 3)
    assert resumed.best() == best
    assert len(folders(blobs)) == 2


def test_the_best_is_the_last_resort(blobs: Blobs) -> None:
    writer = open_run(blobs, keep_last=2)
    best = commit(writer, 1, best=True)
    for update in (2, 3, 4):
        _flip_first(blobs, commit(writer, update).key("model.safetensors"))
    assert open_run(blobs, attempt=2).restore() == (best, files_at(1))
    _flip_first(blobs, best.key("model.safetensors"))
    with pytest.raises(IntegrityError, match="all damaged"):
        open_run(blobs, attempt=2).restore()
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        open_run(blobs, attempt=2).read(best)
    _remove(blobs, best.key("MANIFEST.json"))
    with pytest.raises(IntegrityError, match=r"MANIFEST\.json: missing"):
        open_run(blobs, attempt=2).best()


def test_a_commit_that_failed_leaves_the_best_alone() -> None:
    store = MemoryBlobs()
    best = commit(open_run(store, keep_last=1), 1, best=True)
    for number in range(1, 6):  # the fifth write is the swap of HEAD
        with pytest.raises(Died):
            commit(open_run(FaultBlobs(store, die_before=number), attempt=2, keep_last=1), 2, best=True)
        assert open_run(store, attempt=0).best() == best
    with pytest.raises(Died):
        commit(open_run(FaultBlobs(store, die_after=5), attempt=2, keep_last=1), 2, best=True)
    assert open_run(store, attempt=0).best() == open_run(store, attempt=0).latest() != best


def test_a_head_from_before_there_was_a_best_is_read(blobs: Blobs) -> None:
    writer = open_run(blobs)
    newest = commit(writer, 1)
    key = f"runs/{RUN}/HEAD.json"
    body = json.loads(blobs.get(key))["body"]
    del body["best"]
    blobs.put(key, seal("head", body))
    assert unseal(Head, blobs.get(key), kind="head", where=key).best is None
    assert open_run(blobs, attempt=0).latest() == newest
    assert open_run(blobs, attempt=0).best() is None
    with pytest.raises(ConflictError):
        open_run(blobs, attempt=0).acquire()  # it was read, not rebuilt: who held it is known


# Damage on the way up


def test_a_bit_flipped_on_the_way_up_is_sent_again() -> None:
    store = MemoryBlobs()
    committed = commit(open_run(FaultBlobs(store, flip=2)), 1)
    assert open_run(store, attempt=0).restore() == (committed, files_at(1))


def test_what_is_always_damaged_on_the_way_up_is_never_committed() -> None:
    store = MemoryBlobs()
    one = commit(open_run(store, keep_last=1), 1)
    with pytest.raises(IntegrityError, match="after writing it 3 times"):
        commit(open_run(FaultBlobs(store, flip=99), attempt=2, keep_last=1), 2)
    assert not [e for e in store.list(CKPT) if e.key.endswith("MANIFEST.json") and not e.key.startswith(one.prefix)]
    assert open_run(store, attempt=0).restore() == (one, files_at(1))


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
    on_delete: Callable[[], object] | None = None
    after_replace: Callable[[], object] | None = None

    def create(self, key: str, data: bytes) -> Entry:
        self._interrupt(key)
        return super().create(key, data)

    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes:
        self._interrupt(key)
        return super().get(key, offset=offset, size=size)

    def children(self, prefix: str) -> list[str]:
        self._interrupt(prefix)
        return super().children(prefix)

    def replace(self, key: str, data: bytes, *, version: str) -> Entry:
        entry = super().replace(key, data, version=version)
        act, self.after_replace = self.after_replace, None
        if act is not None:
            act()
        return entry

    def delete(self, key: str) -> None:
        act, self.on_delete = self.on_delete, None
        if act is not None:
            act()
        super().delete(key)

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
    store.suffix, store.act = "MANIFEST.json", lambda: commit(resumed, 11)
    with pytest.raises(ConflictError):
        commit(zombie, 20)
    store.on_delete = lambda: commit(open_run(store, attempt=3, keep_last=1), 12)
    commit(resumed, 13)  # acknowledged, and overtaken while it swept
    assert open_run(store, attempt=0).restore() is not None
    assert newest_update(store) == 12


def test_retention_leaves_what_a_later_process_of_the_attempt_is_writing() -> None:
    store = Interleaved()
    earlier, later = open_run(store, keep_last=1), open_run(store, keep_last=1)
    commit(earlier, 1)
    written = f"{CKPT}/00000003-0001-{'0' * 16}/model.safetensors"

    def go_on() -> None:
        later.acquire()
        store.put(written, b"on its way")

    store.after_replace = go_on  # HEAD names the new state, and what it replaced is not removed yet
    commit(earlier, 2)
    assert len(folders(store)) == 2  # it did sweep
    assert store.head(written) is not None


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
        def put(self, key: str, data: Data) -> Entry:
            return super().put(key, data[:-1])

    with pytest.raises(IntegrityError, match=r"model.safetensors: got 299 bytes .* expected 300 bytes as sent"):
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
    best=st.booleans(),
)
def test_a_manifest_reads_back_as_written(
    update: int, files: dict[str, tuple[int, str]], state: dict[str, object], prev: str | None, best: bool
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
        best=best,
    )
    assert unseal(CheckpointManifest, seal("checkpoint", manifest), kind="checkpoint", where="here") == manifest


# A process that stands still while it is replaced

ZOMBIE = """
import os, signal, sys
from pathlib import Path
from treadle.errors import ConflictError
from treadle.store.checkpoints import Checkpoints
from treadle.store.local import LocalBlobs

class Stops(LocalBlobs):
    def replace(self, key, data, *, version):
        if armed and sys.argv[2] == "before the swap":
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().replace(key, data, version=version)
    def put(self, key, data):
        if armed and sys.argv[2] == "before the files":
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().put(key, data)
    def create(self, key, data):
        entry = super().create(key, data)
        if armed and sys.argv[2] == "after the manifest":
            os.kill(os.getpid(), signal.SIGSTOP)
        return entry

armed = False
blobs, digests = Stops(Path(sys.argv[1])), dict(spec_digest="spec", data_digest="data")
checkpoints = Checkpoints(blobs, sys.argv[3], attempt=1, keep_last=2, **digests)
checkpoints.commit(1, {"model.safetensors": b"one"}, {"update": 1})
armed = True
try:
    checkpoints.commit(99, {"model.safetensors": b"stale"}, {"update": 99})
except ConflictError as error:
    print(error.message)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("place", ["before the files", "after the manifest", "before the swap"])
@pytest.mark.parametrize("attempt", [1, 2])
def test_a_process_that_stood_still_while_it_was_replaced_commits_nothing(
    tmp_path: Path, place: str, attempt: int
) -> None:
    arguments = [sys.executable, "-c", ZOMBIE, str(tmp_path), place, RUN]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as zombie:
        try:
            _, status = os.waitpid(zombie.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status), "it never got there"
            blobs = LocalBlobs(tmp_path)
            later = open_run(blobs, attempt=attempt)
            later.acquire()
            restored = later.latest()
            assert restored is not None
            assert restored.update == 1
            mine = commit(later, 2)
        finally:
            os.kill(zombie.pid, signal.SIGCONT)
        out, _ = zombie.communicate(timeout=60)
    holder = "a later process of the same attempt" if attempt == 1 else "attempt 2"
    assert (zombie.returncode, out) == (
        7,
        f"run {RUN}: got a commit of attempt 1, expected {holder}, which holds the run\n",
    )
    assert open_run(blobs, attempt=0).latest() == mine
    commit(later, 3)  # sweeps what the zombie left
    assert not [name for name in folders(blobs) if name.startswith("00000099")]

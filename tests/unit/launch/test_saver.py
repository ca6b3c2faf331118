"""When states are committed, what is never committed, and what the loop notices of it."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest
import safetensors.torch
import torch

from treadle.errors import ConflictError, DivergenceError, IntegrityError, TransientError
from treadle.launch import saver as saver_module
from treadle.launch.saver import NoSaver, Saver
from treadle.spec import CheckpointSpec, ClusterSpec, CtcSpec, DataSpec, JobSpec, LstmSpec, SgdSpec, StoreSpec
from treadle.store import Checkpoints
from treadle.testing import FaultBlobs, MemoryBlobs
from treadle.track import NullTracker
from treadle.train import TrainState

MODEL = "model.safetensors"


class Told(NullTracker):
    """Keeps the events."""

    def __init__(self):
        self.events = []

    def event(self, name, /, **facts):
        self.events.append((name, facts))

    def named(self, name):
        return [facts for told, facts in self.events if told == name]


class Rig:
    """A saver on a store, and a weight that moves with every update."""

    def __init__(self, blobs, *, attempt=1, **changes):
        spec = JobSpec(
            name="toy",
            task=CtcSpec(frames_per_step=2, label_name="letter", sequence_name="word"),
            model=LstmSpec(hidden_size=6, embedding_size=5),
            data=DataSpec(name="toy"),
            optim=SgdSpec(lr=1e-2),
            cluster=ClusterSpec(workers=0),
            store=StoreSpec(uri="/nowhere"),
            checkpoint=CheckpointSpec(**{"every": "1h"} | changes),
        )
        self.checkpoints = checkpoints_on(blobs, attempt, keep_last=spec.checkpoint.keep_last)
        self.told = Told()
        self.saver = Saver(self.checkpoints, spec, self.told)
        self.weight = torch.zeros(2)

    def save(self, update, *, weight=None, **options):
        self.weight.fill_(update if weight is None else weight)
        self.saver.save(TrainState(update=update), {MODEL: {"w": self.weight}, "optim.safetensors": {}}, **options)
        self.saver.join()
        self.weight.fill_(-1)

    def saved(self, updates, *, commit=True):
        """Run updates as the loop does; give those after which a state was saved."""
        saved = []
        for update in updates:
            if self.saver.is_due(TrainState(update=update)):
                self.save(update + 1)
                saved.append(update + 1)
                if commit:
                    self.saver.wait()
        return saved

    def until_done(self):
        while not self.saver._pending.done():
            time.sleep(0.001)


def checkpoints_on(blobs, attempt=0, keep_last=2):
    return Checkpoints(blobs, "toy-1", attempt=attempt, keep_last=keep_last, spec_digest="s", data_digest="d")


def latest(blobs):
    """(update, weight) of the newest checkpoint."""
    manifest, files = checkpoints_on(blobs).restore()
    assert manifest.state == TrainState(update=manifest.update).to_json()
    assert set(files) == {MODEL, "optim.safetensors"}
    return manifest.update, safetensors.torch.load(files[MODEL])["w"].tolist()


@pytest.fixture
def on(request):
    """Rigs that are closed at the end of the test."""
    rigs = []

    def make(blobs, **changes):
        rigs.append(Rig(blobs, **changes))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.saver.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("treadle-s")]


def test_states_are_saved_at_multiples_whatever_was_resumed_from(on):
    blobs = MemoryBlobs()
    assert on(blobs, every_updates=5).saved(range(17)) == [5, 10, 15]
    assert latest(blobs) == (15, [15.0, 15.0])
    assert on(MemoryBlobs(), every_updates=5).saved(range(7, 17)) == [10, 15]
    assert on(MemoryBlobs(), every_updates=1).saved(range(3)) == [1, 2, 3]


def test_states_are_saved_by_time(on):
    rig = on(MemoryBlobs(), every="500ms")  # of which a busy machine may take a part for each update
    assert not rig.saver.is_due(TrainState(update=1))
    time.sleep(0.51)
    assert rig.saved([1, 2]) == [2]


def test_one_state_is_saved_once_and_again_where_it_turns_out_the_best(on):
    blobs = MemoryBlobs()
    rig = on(blobs)
    for _ in range(2):
        rig.save(4)
    rig.saver.wait()
    assert len(blobs.children("runs/toy-1/ckpt")) == 1
    for best in (True, True, False):
        rig.save(4, best=best)
    rig.saver.wait()
    assert len(blobs.children("runs/toy-1/ckpt")) == 2
    assert checkpoints_on(blobs).best() == checkpoints_on(blobs).latest()


def test_the_best_is_kept(on):
    blobs = MemoryBlobs()
    rig = on(blobs)
    rig.save(1, best=True)
    for update in range(2, 6):
        rig.save(update)
    rig.saver.wait()
    best = checkpoints_on(blobs).best()
    assert best.update == 1
    assert safetensors.torch.load(checkpoints_on(blobs).read(best)[MODEL])["w"].tolist() == [1.0, 1.0]


def test_a_commit_is_told_with_what_it_took(on):
    rig = on(MemoryBlobs(), every_updates=1)
    assert rig.saver.last_commit_s == 0.0
    rig.save(3)
    rig.saver.wait()
    (told,) = rig.told.named("checkpoint")
    size = len(safetensors.torch.save({"w": torch.zeros(2)})) + len(safetensors.torch.save({}))
    assert told == {
        "update": 3,
        "epoch": 0,
        "bytes": size,
        "commit_s": round(rig.saver.last_commit_s, 4),
        "waited_ms": pytest.approx(0, abs=5000),
        "skipped": 0,
        "best": False,
    }
    assert rig.saver.last_commit_s > 0


class Slow(MemoryBlobs):
    """A store whose writes wait until it is told to go on."""

    def __init__(self):
        super().__init__()
        self.go = threading.Event()

    def put(self, key, data):
        self.go.wait(10)
        return super().put(key, data)


def test_training_goes_on_while_a_commit_is_in_flight(on):
    blobs = Slow()
    rig = on(blobs, every_updates=2)
    assert rig.saved(range(7), commit=False) == [2]  # 4 and 6 came while 2 was on its way
    assert rig.saver.skipped == 2
    blobs.go.set()
    rig.saver.wait()
    assert latest(blobs) == (2, [2.0, 2.0])  # of then, whatever became of the weights since
    assert rig.saved([7, 8]) == [8]
    assert latest(blobs) == (8, [8.0, 8.0])
    assert [told["skipped"] for told in rig.told.named("checkpoint")] == [2, 2]


def test_a_state_that_came_due_meanwhile_is_saved_at_the_next_update(on):
    blobs = Slow()
    rig = on(blobs, every_updates=4)
    assert rig.saved(range(9), commit=False) == [4]
    blobs.go.set()
    rig.until_done()
    assert rig.saved(range(9, 14)) == [10, 12]


def test_a_state_saved_on_purpose_waits_for_the_one_before(on):
    blobs = Slow()
    rig = on(blobs)
    rig.save(1)
    threading.Timer(0.05, blobs.go.set).start()
    rig.save(2)
    rig.saver.wait()
    assert latest(blobs) == (2, [2.0, 2.0])
    assert [told["update"] for told in rig.told.named("checkpoint")] == [1, 2]


def test_a_store_that_is_away_costs_checkpoints_and_not_the_run(on, monkeypatch):
    blobs = MemoryBlobs()
    rig = on(FaultBlobs(blobs, refuse=2), every_updates=1)
    for update in range(3):
        assert rig.saver.is_due(TrainState(update=update))
        rig.save(update + 1)
        rig.until_done()
    rig.saver.wait()
    assert latest(blobs) == (3, [3.0, 3.0])
    assert len(rig.told.named("checkpoint_failed")) == 2
    monkeypatch.setattr(saver_module, "GIVE_UP_S", 0.0)
    away = on(FaultBlobs(MemoryBlobs(), refuse=99), every_updates=1)
    away.save(1)
    with pytest.raises(TransientError):
        away.save(2)


def test_a_way_that_damages_bytes_costs_checkpoints_and_not_the_run(on):
    blobs = MemoryBlobs()
    rig = on(FaultBlobs(blobs, flip=3))
    rig.saver.save(TrainState(update=1), {MODEL: {"w": torch.ones(2)}})
    with pytest.raises(IntegrityError, match="after writing it 3 times"):
        rig.saver.wait()
    rig.save(2)
    rig.saver.wait()
    assert latest(blobs) == (2, [2.0, 2.0])
    assert len(rig.told.named("checkpoint_failed")) == 1


def test_the_end_waits_for_the_last_state_and_says_what_went_wrong(on):
    rig = on(FaultBlobs(MemoryBlobs(), refuse=99))
    rig.save(1)
    with pytest.raises(TransientError):
        rig.saver.wait()


def test_the_end_needs_no_join(on):
    blobs = MemoryBlobs()
    rig = on(blobs)
    rig.saver.save(TrainState(update=1), {MODEL: {"w": torch.ones(2)}, "optim.safetensors": {}})
    rig.saver.wait()
    assert latest(blobs) == (1, [1.0, 1.0])
    rig.saver.save(TrainState(update=2), {MODEL: {"w": torch.ones(2)}, "optim.safetensors": {}})
    rig.saver.close()
    assert latest(blobs) == (2, [1.0, 1.0])


def test_a_state_that_is_not_finite_is_never_committed(on, monkeypatch):
    blobs = MemoryBlobs()
    rig = on(blobs)
    rig.save(1)
    rig.save(2, weight=float("nan"))
    with pytest.raises(DivergenceError, match=r"not finite in model\.safetensors: w, expected"):
        rig.saver.wait()
    assert latest(blobs) == (1, [1.0, 1.0])
    rig.save(2)
    rig.saver.wait()
    assert latest(blobs) == (2, [2.0, 2.0])
    assert len(rig.told.named("checkpoint_refused")) == 1
    assert not rig.told.named("checkpoint_failed")
    monkeypatch.setattr(saver_module, "GIVE_UP_S", 0.0)
    rig.save(3, weight=float("inf"))
    with pytest.raises(DivergenceError):
        rig.save(4)


def test_the_norms_of_refused_updates_may_be_anything(on):
    blobs = MemoryBlobs()
    rig = on(blobs)
    rig.saver.save(TrainState(update=1), {"updater.safetensors": {"latest": torch.tensor([float("nan"), 1.0])}})
    rig.saver.wait()
    assert checkpoints_on(blobs).latest().update == 1


def test_a_newer_attempt_ends_an_older_one_at_its_next_look(on):
    blobs = MemoryBlobs()
    rig = on(blobs)
    rig.save(1)
    rig.saver.wait()
    checkpoints_on(blobs, attempt=2).acquire()
    rig.save(2)
    rig.until_done()
    with pytest.raises(ConflictError, match="attempt 2"):
        rig.saver.is_due(TrainState(update=3))


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_the_writers_give_way_and_the_loop_does_not(on):
    found = []

    class Watched(MemoryBlobs):
        def put(self, key, data):
            found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            return super().put(key, data)

    before = os.getpriority(os.PRIO_PROCESS, 0)
    rig = on(Watched())
    rig.save(1)
    rig.saver.wait()
    assert found == [saver_module._NICE] * 2 or before > saver_module._NICE
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_a_rank_above_0_saves_nothing():
    saver = NoSaver()
    assert not saver.is_due(TrainState())
    saver.save(TrainState(), {})
    saver.join()
    saver.wait()
    assert saver.last_commit_s == 0.0

"""Whole runs in real processes, watched through their store, with a toy job that takes seconds."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from treadle.data import Draft, Labels, Row, Tokens, build_dataset
from treadle.launch.local import LocalDriver, start_local
from treadle.launch.records import freeze
from treadle.plan import Capacity, make_plan
from treadle.spec import (
    AdamWSpec,
    BatchSpec,
    CheckpointSpec,
    ClusterSpec,
    CtcSpec,
    DataSpec,
    GruSpec,
    JobSpec,
    LstmSpec,
    MinGruSpec,
    MinLstmSpec,
    ModelSpec,
    Precision,
    PrecisionSpec,
    RnnSpec,
    SplitSpec,
    StoreSpec,
    TargetPer,
    TrackSpec,
    TrainSpec,
    WandbMode,
)
from treadle.store import Backend, Registry, Runs, RunStatus, open_blobs, read_journal
from treadle.track import History, read_metrics

CELLS: dict[str, type[ModelSpec]] = {
    "rnn": RnnSpec,
    "lstm": LstmSpec,
    "gru": GruSpec,
    "mingru": MinGruSpec,
    "minlstm": MinLstmSpec,
}
SIZES = {"hidden_size": 16, "embedding_size": 8, "num_layers": 2, "dropout": 0.2}


def toy(**changes: Any) -> JobSpec:
    """Doubled letters: some 25 updates an epoch, a few milliseconds each."""
    spec = JobSpec(
        name="toy",
        task=CtcSpec(frames_per_step=4, label_name="letter", sequence_name="word"),
        model=GruSpec(**SIZES),
        data=DataSpec(name="toy"),
        split=SplitSpec(valid=30, test=30),
        batch=BatchSpec(max_slots="96", lanes=2),
        optim=AdamWSpec(lr=1e-2),
        precision=PrecisionSpec(mode=Precision.fp32),  # bits are compared
        train=TrainSpec(epochs=8, seed=3, log_every="0s"),
        checkpoint=CheckpointSpec(every="1h", every_updates=10, keep_last=3),
        cluster=ClusterSpec(workers=0, max_failures=20),
        track=TrackSpec(wandb=WandbMode.disabled),
        store=StoreSpec(uri="set by the rig"),
    )
    return replace(spec, **changes)


def toy_draft(num: int = 500) -> Draft:
    rng = random.Random(0)
    words = sorted({"".join(rng.choice("abcde") for _ in range(rng.randint(2, 9))) for _ in range(num)})
    rows = [Row(entity=w, inputs=list(w), target=[c.upper() for c in w for _ in range(2)]) for w in words]
    return Draft(rows=rows, inputs=Tokens(), target=Labels(names=tuple("ABCDE"), per=TargetPer.sequence), licence="toy")


@dataclass
class Trial:
    """One run in a store of its own.

    Args:
        driver: of the newest attempt.
    """

    store: Path
    spec: JobSpec
    run: str
    num_updates: int
    driver: LocalDriver | None = None

    @classmethod
    def made(cls, store: Path, spec: JobSpec) -> Trial:
        blobs = open_blobs(str(store))
        spec = replace(spec, store=StoreSpec(uri=str(store)))
        digest, manifest = build_dataset(toy_draft(), spec.data, blobs, recipe="r", split=spec.split)
        capacity = Capacity(where="here", cpus=8, gpus=0, memory_bytes=1 << 34)
        plan = make_plan(spec, manifest.card(digest), capacity)
        backend = Backend.inline if spec.cluster.workers == 0 else Backend.local
        run = Runs(blobs).create(*freeze(spec, plan), job="toy", backend=backend).run
        return cls(store=store, spec=spec, run=run, num_updates=plan.num_updates)

    # Going on

    def start(self) -> Trial:
        """A new attempt."""
        after = self.status.attempt
        in_process = self.spec.cluster.workers == 0
        self.driver = start_local(str(self.store), self.run, threads=1, in_process=in_process, after=after)
        return self

    def resume(self) -> Trial:
        """A new attempt after one that left no end."""
        from treadle.launch.reconcile import mark_lost

        if self.status.end is None:
            mark_lost(self.runs, self.run, self.status)
        return self.start()

    def wait_for(self, wanted: Callable[[], Any], what: str, *, seconds: float = 100.0) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := wanted():
                return found
            assert self.driver is not None
            assert self.driver.is_alive() or self.status.end is None or wanted(), f"{what}: ended\n{self.log()}"
            time.sleep(0.01)
        raise AssertionError(f"{what}: not within {seconds} s\n{self.log()}")

    def reach(self, update: int) -> int:
        """Wait until so many updates are logged; how many are."""
        self.wait_for(lambda: self.update >= update, f"update {update}")
        return self.update

    def lose(self, *pids: int, rank: int = 0) -> None:
        """Kill processes; return when a rank has another process than now."""
        before = self.pid(rank)
        for pid in pids:
            kill(pid)
        self.wait_for(lambda: self.pid(rank) != before, f"another process of rank {rank}")

    def end(self, *, seconds: float = 100.0) -> RunStatus:
        """The status once the newest attempt has ended, and its driver has left."""
        assert self.driver is not None
        driver = self.driver
        self.wait_for(lambda: not driver.is_alive(), "the end", seconds=seconds)
        driver.release()
        return self.status

    def close(self) -> None:
        """Leave nothing running, whatever a test came to."""
        if self.driver is None:
            return
        if self.driver.is_alive():
            self.die()
        self.driver.release()

    def die(self) -> list[psutil.Process]:
        """Kill the driver, and what it started only by that; gives what was below it."""
        assert self.driver is not None
        family = self.family()
        kill(self.driver.process.pid)
        self.driver.process.wait()
        self.driver.release()
        return family

    # Looking

    @property
    def runs(self) -> Runs:
        return Runs(open_blobs(str(self.store)))

    @property
    def status(self) -> RunStatus:
        return self.runs.status(self.run)

    def events(self, *names: str) -> list[dict[str, Any]]:
        found = read_journal(open_blobs(str(self.store)), f"runs/{self.run}/events.jsonl")
        return [row for row in found if not names or row["event"] in names]

    @property
    def history(self) -> History:
        return read_metrics(read_journal(open_blobs(str(self.store)), f"runs/{self.run}/metrics.jsonl"))

    @property
    def update(self) -> int:
        rows = read_journal(open_blobs(str(self.store)), f"runs/{self.run}/metrics.jsonl")
        return max((row["update"] for row in rows), default=0)

    def pid(self, rank: int = 0, *, of: str = "pid") -> int:
        """The newest process of a rank, or its `agent`."""
        started = [row for row in self.events("rank_started") if row["rank"] == rank]
        return started[-1][of] if started else 0

    def family(self) -> list[psutil.Process]:
        """Every process below the driver."""
        assert self.driver is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.driver.process.pid).children(recursive=True)
        return []

    def weights(self) -> bytes:
        """Of the registered model."""
        registry = Registry(open_blobs(str(self.store)))
        return registry.read(registry.resolve("toy@latest"), "model.safetensors")

    def versions(self) -> int:
        return len(Registry(open_blobs(str(self.store))).versions("toy"))

    def log(self) -> str:
        rows = read_journal(open_blobs(str(self.store)), f"runs/{self.run}/logs.jsonl")
        events = [str({k: v for k, v in row.items() if k not in ("schema", "time")}) for row in self.events()]
        return "\n".join([str(row["text"]) for row in rows[-25:]] + events[-25:])


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal a process; it must be there."""
    os.kill(pid, number)


def gone(processes: list[psutil.Process], *, seconds: float = 10.0) -> list[psutil.Process]:
    """Those that are still there after so long."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@contextlib.contextmanager
def trial(folder: Path, spec: JobSpec) -> Iterator[Trial]:
    """A run that is over when the block is."""
    made = Trial.made(folder, spec)
    try:
        yield made
    finally:
        made.close()


def check_exact(disturbed: Trial, whole: Trial) -> None:
    """What a run that was disturbed must share with one that was not."""
    assert disturbed.status.state.value == "finished", disturbed.log()
    assert disturbed.weights() == whole.weights()
    seen, wanted = disturbed.history, whole.history
    updates = seen.series["trainer/update"].updates
    assert list(updates) == sorted(set(updates)), "a point twice in the history"
    ends = [one.series["trainer/frames_seen"] for one in (seen, wanted)]
    assert ends[0].last == ends[1].last, [(end.updates[-3:], end.values[-3:]) for end in ends]
    for name in ("trainer/frames_seen", "train/lr", "val/letter_error_rate"):
        theirs = dict(zip(wanted.series[name].updates, wanted.series[name].values, strict=True))
        ours = dict(zip(seen.series[name].updates, seen.series[name].values, strict=True))
        both = ours.keys() & theirs.keys()  # rows that are logged by the clock fall on other updates in each run
        assert both, name
        assert {u: theirs[u] for u in both} == {u: ours[u] for u in both}, name
        if disturbed.spec.train.log_every == "0s":
            assert both == theirs.keys(), name
    assert disturbed.versions() == 1

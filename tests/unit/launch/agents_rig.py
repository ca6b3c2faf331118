"""One attempt with its real parts: a run in a folder, a controller on a thread, agents and ranks as processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from agents_nursery import Agent, Nursery

from treadle.data import Draft, Labels, Row, Tokens, build_dataset
from treadle.errors import TransientError
from treadle.launch.agent import Orders
from treadle.launch.controller import Controller
from treadle.launch.lead import Lead
from treadle.launch.records import Assignment, freeze
from treadle.launch.tracking import Events
from treadle.plan import Capacity, make_plan
from treadle.spec import (
    AdamWSpec,
    BatchSpec,
    CheckpointSpec,
    ClusterSpec,
    CtcSpec,
    DataSpec,
    JobSpec,
    LstmSpec,
    Precision,
    PrecisionSpec,
    SplitSpec,
    StoreSpec,
    TargetPer,
    TrackSpec,
    TrainSpec,
    WandbMode,
)
from treadle.store import Backend, Registry, Runs, read_journal
from treadle.store.local import LocalBlobs

HOST = "127.0.0.1"


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory, kernel_cache: Path) -> Iterator[Nursery]:
    """Where agents are forked."""
    cache = tmp_path_factory.mktemp("home") / ".cache" / "treadle"
    cache.mkdir(parents=True)
    (cache / "kernels").symlink_to(kernel_cache)
    found = Nursery(dict(os.environ) | {"HOME": str(cache.parent.parent)})
    yield found
    found.close()


def tiny(store: Path, **changes: Any) -> JobSpec:
    """Upper-case letters of words, some milliseconds an update."""
    spec = JobSpec(
        name="toy",
        task=CtcSpec(frames_per_step=2, label_name="letter", sequence_name="word"),
        model=LstmSpec(hidden_size=6, embedding_size=5, num_layers=2, dropout=0.2),
        data=DataSpec(name="toy"),
        split=SplitSpec(valid=12, test=12),
        batch=BatchSpec(max_slots="24", lanes=6),
        optim=AdamWSpec(lr=1e-2, ema=0.9),
        precision=PrecisionSpec(mode=Precision.fp32),  # bits are compared
        train=TrainSpec(epochs=20, seed=1, log_every="0s"),
        cluster=ClusterSpec(workers=0, max_failures=20, hang_after="2s"),
        track=TrackSpec(wandb=WandbMode.disabled),
        checkpoint=CheckpointSpec(every="1h", every_updates=20, keep_last=3),
        store=StoreSpec(uri=str(store)),
    )
    return dataclasses.replace(spec, **changes)


def tiny_draft(num: int = 160) -> Draft:
    rng = np.random.default_rng(0)
    words = sorted({"".join(rng.choice(list("abcd"), rng.integers(2, 9))) for _ in range(num)})
    rows = [Row(entity=w, inputs=list(w), target=list(w.upper())) for w in words]
    target = Labels(names=tuple("ABCD"), per=TargetPer.sequence)
    return Draft(rows=rows, inputs=Tokens(), target=target, licence="none")


class Attempt:
    """One attempt of a run of its own, kept by a controller; agents are started where they are wanted.

    Args:
        world: ranks. before: Python that agents run first.
    """

    def __init__(self, nursery: Nursery, folder: Path, world: int = 1, *, before: str = "", **changes: Any) -> None:
        self.nursery, self.world, self.faults = nursery, world, folder / "faults"
        self.faults.mkdir(parents=True)
        here = str(Path(__file__).parent)
        self.before = f"import sys; sys.path.insert(0, {here!r}); import faulty; faulty.install({str(self.faults)!r})"
        self.before += "\n" + before
        self.store = folder / "store"
        self.blobs = LocalBlobs(self.store)
        self.runs = Runs(self.blobs)
        spec = tiny(self.store, **changes)
        workers = world if world > 1 else 0
        self.spec = dataclasses.replace(spec, cluster=dataclasses.replace(spec.cluster, workers=workers))
        digest, manifest = build_dataset(tiny_draft(), spec.data, self.blobs, recipe="r", split=spec.split)
        capacity = Capacity(where="a test", cpus=8, gpus=0, memory_bytes=0)
        self.plan = make_plan(self.spec, manifest.card(digest), capacity)
        self.run = self.runs.create(*freeze(self.spec, self.plan), job="toy", backend=Backend.inline).run
        self.agents: list[Agent] = []

    @contextlib.contextmanager
    def led(self) -> Iterator[Controller]:
        """The controller, at work on a thread of its own; with the block everything has ended."""
        number = self.runs.claim_attempt(self.run, Backend.inline)
        assignment = Assignment(store=str(self.store), run=self.run, attempt=number, code={"git": "a", "dirty": False})
        events = Events(self.blobs, self.run, number, writer=f"driver-a{number}")
        self.lead = Lead(assignment=assignment, blobs=self.blobs, events=events)
        controller = self.lead.controller(HOST, on_agent_lost=lambda _: self.restart())
        self.leading = threading.Thread(target=controller.run, daemon=True)
        self.leading.start()
        try:
            self.restart()
            yield controller
        finally:
            controller.give_up(TransientError("the test is over"))
            self.leading.join()
            for agent in self.agents:
                agent.close()
            events.close()
            self.agents = []

    def restart(self) -> None:
        """New agents for all ranks."""
        assert self.lead.now is not None
        for rank in range(self.world):
            orders = Orders(**self.lead.orders(self.lead.now), rank=rank, world=self.world, node=HOST)
            self.agents.append(self.nursery.start(orders, before=self.before))

    def finish(self, *, seconds: float = 60.0) -> dict[str, Any]:
        """The summary of rank 0 once all is over."""
        assert self.lead.now is not None
        self.leading.join(seconds)
        assert not self.leading.is_alive(), self.told()
        return self.lead.now.outcome()

    def wait_for(self, wanted: Callable[[], Any], what: str, *, seconds: float = 40.0) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := wanted():
                return found
            time.sleep(0.005)
        raise AssertionError(f"{what}: not within {seconds} s; {self.told()}")

    def reach(self, update: int) -> int:
        """Wait until so many updates are logged; gives how many are."""
        self.wait_for(lambda: self.update >= update, f"update {update}")
        return self.update

    # What is to be seen

    @property
    def update(self) -> int:
        """The newest that was logged."""
        path = self.store / "runs" / self.run / "metrics.jsonl"
        with contextlib.suppress(OSError), path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4000))
            lines = file.read().split(b"\n")[1:-1]
            if lines:
                return int(json.loads(lines[-1])["update"])
        return 0

    def events(self, *names: str) -> list[dict[str, Any]]:
        found = read_journal(self.blobs, f"runs/{self.run}/events.jsonl")
        return [row for row in found if not names or row["event"] in names]

    def rows(self) -> list[dict[str, Any]]:
        return read_journal(self.blobs, f"runs/{self.run}/metrics.jsonl")

    def told(self) -> str:
        rows = [{k: v for k, v in row.items() if k not in ("schema", "attempt")} for row in self.events()[-30:]]
        return "\n".join([f"seats: {self.lead.now and self.lead.now.beat}", *map(str, rows)])

    def pid(self, rank: int = 0) -> int:
        """The newest process of a rank."""
        started = [row for row in self.events("rank_started") if row["rank"] == rank]
        return int(started[-1]["pid"]) if started else 0

    def weights(self) -> bytes:
        """Of the newest model."""
        registry = Registry(self.blobs)
        return registry.read(registry.resolve("toy@latest"), "model.safetensors")

    def versions(self) -> int:
        return len(Registry(self.blobs).versions("toy"))

    # Faults

    def fault(self, point: str, rank: int, code: str) -> None:
        """Have a rank run Python at a point (faulty.py)."""
        partial = self.faults / "partial"
        partial.write_text(code)
        partial.rename(self.faults / f"{point}.{rank}")

    def injected(self) -> list[str]:
        return sorted(path.name for path in self.faults.glob("*.done"))

    def kill(self, rank: int = 0, number: int = signal.SIGKILL) -> int:
        """Signal the process of a rank; gives its id."""
        pid = self.wait_for(lambda: self.pid(rank), f"rank {rank}")
        os.kill(pid, number)
        return pid

    def replaced(self, rank: int, pid: int, *, seconds: float = 40.0) -> None:
        self.wait_for(lambda: self.pid(rank) not in (0, pid), f"another process of rank {rank}", seconds=seconds)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True

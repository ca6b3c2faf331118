"""What a checkpoint costs the loop, and what a commit takes, against torch.save and against raw file writes.

    python tests/bench/checkpoints.py [--sizes 0.6 10 50] [--rounds 5] [--threads N] [--folder FOLDER]

Every way to save runs in turn in every round of one process, on all cores, between blocks of updates without a save.
The cost of a save is the time that its updates took above those blocks, until its commit had ended: updates that are
slower beside a writer count. It is given for one checkpoint every 20 updates.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from recording import record
from torch import Tensor, nn

from treadle.launch.saver import Saver
from treadle.spec import CheckpointSpec, CtcSpec, DataSpec, JobSpec, LstmSpec, SgdSpec, StoreSpec
from treadle.store import Checkpoints
from treadle.store.local import LocalBlobs
from treadle.track import NullTracker
from treadle.train import TrainState

EVERY = 20
FORMS = {  # millions of parameters: cell, hidden size, rows, frames
    0.6: (nn.GRU, 240, 32, 40),
    10.0: (nn.LSTM, 900, 16, 40),
    50.0: (nn.LSTM, 2040, 16, 25),
}
NUM_INPUTS = 64


class Loop:
    """A recurrent network in training, as `treadle.train.fit` treats it: joins before the optimizer moves anything."""

    def __init__(self, millions: float) -> None:
        kind, hidden, rows, frames = FORMS[millions]
        self.network = nn.ModuleDict({"cell": kind(NUM_INPUTS, hidden, num_layers=2), "head": nn.Linear(hidden, 40)})
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3, fused=True)
        self.x_TBD = torch.randn(frames, rows, NUM_INPUTS)
        self.y_N = torch.randint(40, (frames * rows,))
        self.join: Callable[[], None] = lambda: None
        self.updates = 0
        self.update()

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters())

    def update(self) -> float:
        """Take one update; give the time it waited for a copy."""
        h_TBH = self.network["cell"](self.x_TBD)[0]
        nn.functional.cross_entropy(self.network["head"](h_TBH).flatten(0, 1), self.y_N).backward()
        started = time.perf_counter()
        self.join()
        waited = time.perf_counter() - started
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return waited

    def block(self, num_updates: int) -> list[float]:
        times = []
        for _ in range(num_updates):
            started = time.perf_counter()
            self.update()
            times.append(time.perf_counter() - started)
        return times

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        names = {id(p): name for name, p in self.network.named_parameters()}
        moments = {f"{names[id(p)]}/{k}": t for p, kept in self.optimizer.state.items() for k, t in kept.items()}
        return {
            "model.safetensors": {name: t.detach() for name, t in self.network.state_dict().items()},
            "optim.safetensors": moments,
        }


class Way:
    """A way to save: `save` returns the time that the loop stood still for it."""

    name = ""

    def __init__(self, loop: Loop, folder: Path) -> None:
        self.loop = loop
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self) -> float:
        started = time.perf_counter()
        self.act()
        return time.perf_counter() - started

    def act(self) -> None:
        raise NotImplementedError

    def is_done(self) -> bool:
        return True

    def close(self) -> None: ...


class TorchSave(Way):
    name = "torch.save"

    def act(self) -> None:
        torch.save(self.loop.tensors(), self.folder / "state.pt")


class Safetensors(Way):
    name = "safetensors, synchronous"

    def act(self) -> None:
        for file, tensors in self.loop.tensors().items():
            safetensors.torch.save_file(tensors, self.folder / file)


class Overlapped(Way):
    name = "treadle"

    def __init__(self, loop: Loop, folder: Path) -> None:
        super().__init__(loop, folder)
        spec = JobSpec(
            name="bench",
            task=CtcSpec(frames_per_step=2, label_name="letter", sequence_name="word"),
            model=LstmSpec(hidden_size=6, embedding_size=5),
            data=DataSpec(name="bench"),
            optim=SgdSpec(lr=1e-2),
            checkpoint=CheckpointSpec(every="1h"),
            store=StoreSpec(uri=str(folder)),
        )
        made = Checkpoints(LocalBlobs(folder), "bench-1", attempt=1, keep_last=2, spec_digest="s", data_digest="d")
        self.saver = Saver(made, spec, NullTracker())

    def act(self) -> None:
        self.loop.join = self.saver.join
        self.saver.save(TrainState(update=self.loop.updates), self.loop.tensors())

    def is_done(self) -> bool:
        pending = self.saver._pending
        return pending is None or pending.done()

    def close(self) -> None:
        self.saver.wait()
        self.saver.close()


class Inline(Overlapped):
    name = "treadle, without overlap"

    def act(self) -> None:
        super().act()
        self.saver.join()


@dataclass
class Seen:
    stall_s: list[float] = field(default_factory=list)
    wait_s: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    commit_s: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def measure(millions: float, rounds: int, folder: Path) -> list[list[object]]:
    torch.manual_seed(0)
    loop = Loop(millions)
    ways = [kind(loop, folder / str(i)) for i, kind in enumerate((TorchSave, Safetensors, Inline, Overlapped))]
    seen = {way.name: Seen() for way in ways}
    size = sum(t.numel() * t.element_size() for part in loop.tensors().values() for t in part.values())
    loop.block(3)
    for way in ways:  # buffers, folders
        way.save()
        while not way.is_done():
            loop.update()
    for _ in range(rounds):
        for way in ways:
            before = loop.block(EVERY // 2)
            one(loop, way, seen[way.name], before)
    for way in ways:
        way.close()
    peer = statistics.median(seen["torch.save"].stall_s)
    rows: list[list[object]] = []
    for way in ways:
        found = seen[way.name]
        stall, wait = statistics.median(found.stall_s), statistics.median(found.wait_s)
        rows.append(
            [
                f"{loop.num_parameters / 1e6:.1f} M, {size / 1e6:.0f} MB",
                way.name,
                f"{1000 * (stall + wait):.1f}",
                f"{1000 * wait:.1f}",
                f"{(stall + wait) / peer:.4f}",
                f"{statistics.median(found.beside):.2f}",
                f"{100 * statistics.median(found.cost):.1f} %",
                f"{100 * statistics.median(found.cpu):.1f} %",
                f"{statistics.median(found.commit_s):.2f}",
            ]
        )
    return rows


def one(loop: Loop, way: Way, seen: Seen, before: list[float]) -> None:
    """One save, and updates until it is done; and half a block without."""
    loop.join = lambda: None
    started, cpu = time.perf_counter(), time.process_time()
    seen.stall_s.append(way.save())
    waited, beside, commit_s, num_updates = 0.0, [], 0.0, 0
    while num_updates < EVERY or not way.is_done():
        was_done, at = way.is_done(), time.perf_counter()
        waited += loop.update()
        num_updates += 1
        if not was_done:
            beside.append(time.perf_counter() - at)
            commit_s = time.perf_counter() - started
    total, cpu = time.perf_counter() - started, time.process_time() - cpu
    if isinstance(way, Overlapped):
        commit_s = way.saver.last_commit_s
    plain_cpu = time.process_time()
    after = loop.block(EVERY // 2)
    plain_cpu = (time.process_time() - plain_cpu) / len(after)
    plain = statistics.median(before + after)
    seen.wait_s.append(waited)
    seen.beside.append(statistics.mean(beside) / plain if beside else 1.0)
    seen.cost.append((total - num_updates * plain) / (EVERY * plain))
    seen.cpu.append((cpu - num_updates * plain_cpu) / (EVERY * plain_cpu))
    seen.commit_s.append(commit_s or seen.stall_s[-1])


def commits(rounds: int, folder: Path, megabytes: int = 600) -> list[list[object]]:
    """A commit by itself against a raw write of the same bytes, flushed; nothing trains beside it."""
    files = {f"{i}.safetensors": os.urandom(1 << 20) * (megabytes // 2) for i in range(2)}
    blobs = LocalBlobs(folder / "commits")
    made = Checkpoints(blobs, "bench-1", attempt=1, keep_last=1, spec_digest="s", data_digest="d")

    def raw() -> None:
        for name, data in files.items():
            with (folder / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    taken: dict[str, list[float]] = {"raw write and fsync": [], "commit": [], "restore": [], "read": []}
    for update in range(rounds):
        acts: dict[str, Callable[[], object]] = {
            "raw write and fsync": raw,
            "commit": lambda update=update: made.commit(update, files, {}),
            "read": lambda: [(folder / name).read_bytes() for name in files],
            "restore": made.restore,
        }
        for name, act in acts.items():
            started = time.perf_counter()
            act()
            taken[name].append(time.perf_counter() - started)
    middle = {name: statistics.median(times) for name, times in taken.items()}
    peers = {"commit": "raw write and fsync", "restore": "read"}
    return [
        [
            f"{megabytes} MB",
            f"{name} against {peer}",
            "",
            "",
            f"{middle[name] / middle[peer]:.2f}",
            "",
            "",
            f"{middle[name]:.2f}",
        ]
        for name, peer in peers.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=float, nargs="+", default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    folder = Path(tempfile.mkdtemp(prefix="treadle-bench-", dir=given.folder))
    try:
        rows = [row for size in given.sizes for row in measure(size, given.rounds, folder / str(size))]
        rows += commits(given.rounds, folder)
    finally:
        shutil.rmtree(folder)
    headers = [
        "state",
        "way",
        "loop stood still, ms a save",
        "of which waiting for the copy",
        "of torch.save",
        "update beside the writer, of one without",
        f"time lost, one every {EVERY} updates",
        "processor time, likewise",
        "until it is safe, s",
    ]
    record("checkpoints", "Checkpoints", "python tests/bench/checkpoints.py", headers, rows)


if __name__ == "__main__":
    main()

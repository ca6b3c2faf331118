"""What treadle's loop takes beside a loop written by hand: same network, optimizer and batches, update by update.

Treadle's side is all of it: the feed that reads, weighs and plans, dropout keyed by place, flags, the guard, meters,
rows of metrics in a store on disk, a checkpoint every 30 s. The other side is the shortest loop in PyTorch that trains
the same: batches that lie in memory, forward, backward, clipping, a cosine rate, a fused optimizer.

Both take turns in one process, some updates each, so that whatever else the machine does slows both alike.
`python tests/bench/overhead.py [SECONDS] [CASE ...]`: per case, 60 s if not said otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from recording import record
from torch import Tensor, nn

from treadle.data import Draft, Form, Labels, Row, RowReader, Tokens, build_dataset
from treadle.launch.saver import Saver
from treadle.nn import build_network, count_parameters
from treadle.spec import (
    AdamWSpec,
    BatchSpec,
    ClassifySpec,
    DataSpec,
    JobSpec,
    LstmSpec,
    MinGruSpec,
    ModelSpec,
    SplitSpec,
    StoreSpec,
    TrainSpec,
)
from treadle.store import Checkpoints, Journal
from treadle.store.local import LocalBlobs
from treadle.testing import MemoryBlobs
from treadle.track import RunTracker, catalogue
from treadle.train import (
    Evaluator,
    Feed,
    PrecisionChoice,
    Reached,
    Run,
    TrainState,
    World,
    build_optimizer,
    build_task,
    fit,
)
from treadle.train.updater import Updater

Batch = tuple[Tensor, Tensor, Tensor]
"""Inputs, lengths, labels."""

ROWS, SYMBOLS, CLASSES, SKIPPED = 4000, 64, 10, 2
SMALL = LstmSpec(hidden_size=32, num_layers=1, embedding_size=16)
MIDDLE = LstmSpec(hidden_size=128, num_layers=2, bidirectional=True, embedding_size=64)
LARGE = MinGruSpec(hidden_size=512, num_layers=4, embedding_size=256, norm=True, residual=True, mlp_factor=4.0)
CASES: dict[str, tuple[ModelSpec, str, int]] = {
    "LSTM 1 x 32": (SMALL, "1024", 20),
    "LSTM 2 x 128, both directions": (MIDDLE, "2048", 5),
    "MinGRU 4 x 512": (LARGE, "1024", 3),
}
"""Model, slots of a batch, and updates that each side makes in its turn."""
FP32 = PrecisionChoice(name="fp32", device="cpu", why="as asked", probe_ms={})


class Done(Exception):  # noqa: N818 - not an error
    """Enough was measured."""


@dataclasses.dataclass
class Turns:
    """Shown every update of treadle's loop (a pulse); after `block` of them the other loop makes as many.

    Args:
        other: the loop written by hand. batches: the same that treadle trains on.
    """

    other: Callable[[list[Batch]], None]
    batches: Iterator[Batch]
    seconds: float
    block: int
    ratios: list[float] = dataclasses.field(default_factory=list)
    cpu_ratios: list[float] = dataclasses.field(default_factory=list)
    ours: list[float] = dataclasses.field(default_factory=list)
    began: float = dataclasses.field(default_factory=time.perf_counter)
    since: tuple[float, float] = (0.0, 0.0)
    blocks: int = 0

    def at(self, update: int) -> None:
        if not update or update % self.block:
            return
        now, now_cpu = time.perf_counter(), time.thread_time()
        since, since_cpu = self.since
        batches = list(itertools.islice(self.batches, self.block))
        begin, begin_cpu = time.perf_counter(), time.thread_time()
        self.other(batches)
        end, end_cpu = time.perf_counter(), time.thread_time()
        self.blocks += 1
        if self.blocks > SKIPPED:
            self.ratios.append((now - since) / (end - begin))
            self.cpu_ratios.append((now_cpu - since_cpu) / (end_cpu - begin_cpu))
            self.ours.append((now - since) / self.block)
        if end - self.began > self.seconds:
            raise Done
        self.since = time.perf_counter(), time.thread_time()

    def enter(self, phase: str) -> None: ...


class NoRestorer:
    def newest(self) -> TrainState:
        raise NotImplementedError

    def best(self) -> TrainState | None:
        return None


def by_hand(network: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[list[Batch]], None]:
    """The shortest loop, over batches that lie in memory."""
    network.train()

    def train(batches: list[Batch]) -> None:
        for share, (inputs, lengths, labels) in enumerate(batches):
            loss = nn.functional.cross_entropy(network(inputs, lengths, packed=inputs.ndim == 1), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * share / len(batches)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return train


def draft() -> Draft:
    chance = np.random.default_rng(0)
    names = [chr(48 + i) for i in range(SYMBOLS)]
    rows = [
        Row(entity=str(i), inputs=list(chance.choice(names, chance.integers(10, 80))), target=str(i % CLASSES))
        for i in range(ROWS)
    ]
    return Draft(rows=rows, inputs=Tokens(), target=Labels(names=tuple(map(str, range(CLASSES)))), licence="none")


def measure(case: tuple[ModelSpec, str, int], seconds: float, folder: Path) -> tuple[int, Turns]:
    model, slots, block = case
    spec = JobSpec(
        name="bench",
        task=ClassifySpec(),
        model=model,
        data=DataSpec(name="bench"),
        split=SplitSpec(valid=0, test=0),
        batch=BatchSpec(max_slots=slots, lanes=1),
        optim=AdamWSpec(),
        train=TrainSpec(epochs=100_000),
        store=StoreSpec(uri=str(folder)),
    )
    memory, blobs, world = MemoryBlobs(), LocalBlobs(folder), World()
    _, manifest = build_dataset(draft(), spec.data, memory, recipe="r", split=spec.split)
    signature = manifest.preprocessing.signature(manifest.header.max_length)
    task = build_task(spec.task, CLASSES)
    torch.manual_seed(0)
    network, other = (build_network(model, spec.task, signature) for _ in range(2))
    other.load_state_dict(network.state_dict())
    optimizer = build_optimizer(spec.optim, network)
    form = Form.packed if network.packed else Form.padded
    reader = RowReader(memory, manifest)
    feed = Feed(spec, manifest, reader, lanes=1, world=world, form=form, task=task)
    same = Feed(spec, manifest, RowReader(memory, manifest), lanes=1, world=world, form=form, task=task)
    turns = Turns(by_hand(other, build_optimizer(spec.optim, other)), copied(same), seconds, block)
    tracker = RunTracker(
        metrics=Journal(blobs, "metrics.jsonl", writer="bench"),
        events=Journal(blobs, "events.jsonl", writer="bench"),
        sinks=[],
        attempt=1,
        catalogue=catalogue(spec.task),
    )
    checkpoints = Checkpoints(blobs, "bench", attempt=1, keep_last=2, spec_digest="s", data_digest="d")
    checkpoints.acquire()
    saver = Saver(checkpoints, spec, tracker)
    run = Run(
        spec=spec,
        world=world,
        task=task,
        network=network,
        optimizer=optimizer,
        precision=FP32,
        feed=feed,
        valid=Evaluator(spec, manifest, reader, split="valid", task=task, world=world, form=form),
        test=Evaluator(spec, manifest, reader, split="test", task=task, world=world, form=form),
        checkpoints=saver,
        restore=NoRestorer(),
        control=NoWishes(),
        track=tracker,
        start=TrainState(precision="fp32"),
        log_every_s=spec.train.log_every_s,
        updater=Updater(spec, network, optimizer, FP32),
        reached=Reached(pulse=turns),
    )
    with contextlib.suppress(Done):
        fit(run)
    turns.batches.close()
    saver.close()
    tracker.close("stopped")
    return count_parameters(network), turns


class NoWishes:
    def wants_stop(self) -> bool:
        return False

    def wants_checkpoint(self) -> bool:
        return False


def copied(feed: Feed) -> Iterator[Batch]:
    """The batches of the feed as tensors of their own."""
    for update in feed.starting_at(0, 0):
        (micro,) = update.micros
        parts = (micro.batch.inputs, micro.batch.lengths_B, micro.batch.labels_BU[:, 0])
        inputs, lengths, labels = (torch.from_numpy(part.copy()) for part in parts)
        yield inputs, lengths, labels


def main(seconds: float, names: list[str]) -> None:
    torch.set_num_threads(1)
    rows = []
    for name, case in CASES.items():
        if names and not any(part in name for part in names):
            continue
        with tempfile.TemporaryDirectory() as folder:
            size, turns = measure(case, seconds, Path(folder))
        if len(turns.ratios) < 4:
            print(f"{name}: {len(turns.ratios)} blocks, expected 4 or more: give it more seconds")
            continue
        low, middle, high = (f"{100 * (part - 1):+.1f} %" for part in statistics.quantiles(turns.ratios, n=4))
        cpu = f"{100 * (statistics.median(turns.cpu_ratios) - 1):+.1f} %"
        update_ms = f"{1000 * statistics.median(turns.ours):.1f} ms"
        rows.append((name, f"{size / 1e6:.2f} M", update_ms, middle, f"{low} to {high}", cpu, len(turns.ratios)))
        print(rows[-1], flush=True)
    if not names:
        headers = ["network", "parameters", "update", "overhead, median", "quartiles", "CPU of its thread", "blocks"]
        record("overhead", "Treadle's loop beside one written by hand", "python tests/bench/overhead.py", headers, rows)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0, sys.argv[2:])

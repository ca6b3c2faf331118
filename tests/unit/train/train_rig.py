"""Small real runs: a toy data set, a small network, and parts that remember what the loop told them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from treadle.data import Batch, Buffers, Draft, Form, Frames, Labels, Manifest, Row, RowReader, Tokens, build_dataset
from treadle.nn import build_network
from treadle.spec import (
    AdamWSpec,
    BatchSpec,
    ClassifySpec,
    CtcSpec,
    DataSpec,
    JobSpec,
    LstmSpec,
    Parallel,
    SgdSpec,
    SplitSpec,
    StoreSpec,
    TargetPer,
    TrainSpec,
)
from treadle.testing import MemoryBlobs
from treadle.train import (
    Evaluator,
    Feed,
    PrecisionChoice,
    Run,
    TrainState,
    World,
    build_optimizer,
    build_task,
    load_weights,
    pack,
    unpack,
)
from treadle.train.feed import Update
from treadle.train.sharding import placed, shard
from treadle.train.state import MODEL_FILE
from treadle.train.task import ClassifyTask, Task, class_weights
from treadle.train.updater import Updater

FP32 = PrecisionChoice(name="fp32", device="cpu", why="as asked", probe_ms={})
LETTERS = "abcdefg"
SGD = SgdSpec(lr=0.5, momentum=0.5, weight_decay=0.01, clip_norm=0.1)
ADAMW = AdamWSpec(lr=3e-2, weight_decay=0.01)


def toy_words(num: int, *, seed: int = 0) -> list[str]:
    """Distinct words of 2 to 12 letters, the same in every process."""
    rng = np.random.default_rng(seed)
    words: dict[str, None] = {}
    while len(words) < num:
        words["".join(rng.choice(list(LETTERS), rng.integers(2, 13)))] = None
    return list(words)


def toy_draft(num: int, *, classes: bool = False) -> Draft:
    """Words to their upper-case letters (the last letter doubled), or to the class of their first letter."""
    rows = [
        Row(entity=w, inputs=list(w), target=w[0].upper() if classes else list((w + w[-1]).upper()))
        for w in toy_words(num)
    ]
    target = Labels(names=tuple(LETTERS.upper()), per=TargetPer.row if classes else TargetPer.sequence)
    return Draft(rows=rows, inputs=Tokens(), target=target, licence="none")


def frames_draft(num: int, *, scale: float = 1.0) -> Draft:
    """Noise around one of three means, to be told apart."""
    rng = np.random.default_rng(1)
    rows = []
    for i in range(num):
        values = rng.normal(i % 3, 0.5, (2 + i % 6, 4)) * scale
        rows.append(Row(entity=str(i), inputs=values, target="xyz"[i % 3]))
    return Draft(rows=rows, inputs=Frames(channels=tuple("abcd")), target=Labels(names=tuple("xyz")), licence="none")


def toy_spec(**changes: Any) -> JobSpec:
    spec = JobSpec(
        name="toy",
        task=CtcSpec(frames_per_step=2, label_name="letter", sequence_name="word"),
        model=LstmSpec(hidden_size=6, num_layers=2, bidirectional=True, embedding_size=5, dropout=0.3),
        data=DataSpec(name="toy"),
        split=SplitSpec(valid=10, test=10),
        batch=BatchSpec(max_slots="48", lanes=2, rounds_per_update=2),
        optim=ADAMW,
        train=TrainSpec(epochs=3, seed=5),
        store=StoreSpec(uri="/nowhere"),
    )
    return dataclasses.replace(spec, **changes)


class Toy:
    """One data set and one spec, from which any number of runs are made."""

    def __init__(self, spec: JobSpec, draft: Draft | None = None) -> None:
        if draft is None:
            draft = toy_draft(90, classes=isinstance(spec.task, ClassifySpec))
        self.spec = spec
        self.blobs = MemoryBlobs()
        _, self.manifest = build_dataset(draft, spec.data, self.blobs, recipe="r", split=spec.split)

    def feed(self, world: World, *, form: Form = Form.padded, poison: bool = True) -> Feed:
        """A feed whose buffers are poisoned as soon as they are given back."""
        reader = RowReader(self.blobs, self.manifest)
        task = self.task()
        feed = Feed(self.spec, self.manifest, reader, lanes=self.lanes(world), world=world, form=form, task=task)
        feed._buffers = Buffers(poison=poison)
        return feed

    def task(self) -> Task:
        num_labels = len(self.manifest.preprocessing.labels)
        train = self.manifest.card("").splits["train"]
        return build_task(self.spec.task, num_labels, class_weights(self.spec.task, train, num_labels))

    def lanes(self, world: World) -> int:
        return self.spec.batch.lanes or world.size

    def network(self) -> nn.Module:
        torch.manual_seed(self.spec.train.seed)
        signature = self.manifest.preprocessing.signature(self.manifest.header.max_length)
        return build_network(self.spec.model, self.spec.task, signature)

    def run(
        self,
        *,
        world: World | None = None,
        saved: tuple[dict[str, bytes], str] | None = None,
        stop_after: int | None = None,
        double: bool = False,
        form: Form = Form.padded,
        precision: PrecisionChoice = FP32,
        spoilt: dict[tuple[int, int], float] | None = None,
    ) -> Run:
        """A run from the start, or from what `Kept` kept.

        Args:
            stop_after: ask for a stop at this many updates of the run.
            double: weights and loss in float64 (classification of tokens only).
            spoilt: what the loss is multiplied by at some positions (epoch, index), each the first time it is read.
        """
        world = world or World()
        network = self.network()
        task: Any = self.task()
        if double:
            network, task = network.double(), DoubleTask(task.spec, task.num_labels, task.class_weights_K)
        if self.spec.cluster.parallel is Parallel.sharded and world.size > 1:
            shard(network, world)
        optimizer = build_optimizer(self.spec.optim, network)
        updater = Updater(self.spec, network, optimizer, precision)
        start = TrainState(precision=precision.name)
        if saved is not None:
            files, state = saved
            unpack(files, network, optimizer)
            start = TrainState.from_json(json.loads(state), where="saved")
            updater.load_tensors(files)
            updater.load(start.updater)
        reader = RowReader(self.blobs, self.manifest)
        valid, test = (
            Evaluator(self.spec, self.manifest, reader, split=split, task=task, world=world, form=form)
            for split in ("valid", "test")
        )
        checkpoints = Kept(saved, start.update)
        return Run(
            spec=self.spec,
            world=world,
            task=task,
            network=network,
            optimizer=optimizer,
            precision=precision,
            feed=Spoilt(self.feed(world, form=form), dict(spoilt or {})),
            valid=valid,
            test=test,
            checkpoints=checkpoints,
            restore=Restored(
                self, checkpoints, network, optimizer, updater, TrainState(precision=precision.name), world
            ),
            control=Wishes(stop_after, start.update),
            track=Told(),
            start=start,
            log_every_s=0.0,
            updater=updater,
        )


class Spoilt:
    """A feed with updates whose rows count in the loss by another factor, NaN among them."""

    def __init__(self, feed: Feed, factors: dict[tuple[int, int], float]) -> None:
        self._feed = feed
        self._factors = factors

    def starting_at(self, epoch: int, index: int) -> Iterator[Update]:
        updates = self._feed.starting_at(epoch, index)
        try:
            for update in updates:
                factor = self._factors.pop((update.epoch, update.index), None)
                yield update if factor is None else self._with(update, factor)
        finally:
            updates.close()

    def _with(self, update: Update, factor: float) -> Update:
        micros = [
            dataclasses.replace(m, batch=m.batch._replace(weights_B=m.batch.weights_B * np.float32(factor)))
            for m in update.micros
        ]
        return dataclasses.replace(update, micros=tuple(micros))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._feed, name)


class DoubleTask(ClassifyTask):
    """Classification whose loss stays in float64, to compare gradients beyond fp32."""

    def loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        targets_B, weights_B = torch.from_numpy(batch.labels_BU[:, 0]), torch.from_numpy(self._weights(batch))
        return functional.cross_entropy(logits, targets_B, reduction="none") @ weights_B


class Kept:
    """Keeps the state of every update as the bytes of a checkpoint.

    Args:
        saved: what was committed before.
    """

    def __init__(self, saved: tuple[dict[str, bytes], str] | None = None, update: int = 0) -> None:
        self.states: dict[int, tuple[dict[str, bytes], str]] = {}
        self.newest = saved
        self.best: tuple[dict[str, bytes], str] | None = None
        self.due: Callable[[TrainState], bool] = lambda _: True

    def is_due(self, state: TrainState) -> bool:
        return self.due(state)

    def save(self, state: TrainState, tensors: Mapping[str, Mapping[str, Tensor]], *, best: bool = False) -> None:
        self.newest = self.states[state.update] = (pack(tensors), json.dumps(state.to_json()))
        if best:
            self.best = self.newest

    def join(self) -> None: ...

    def wait(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Restored:
    """Puts back what `Kept` kept; among several ranks, what rank 0 kept, through files."""

    toy: Toy
    kept: Kept
    network: nn.Module
    optimizer: torch.optim.Optimizer
    updater: Updater
    fresh: TrainState
    world: World = dataclasses.field(default_factory=World)

    def newest(self) -> TrainState:
        saved = self.shared(self.kept.newest)
        if saved is None:
            own = self.network.state_dict()
            self.network.load_state_dict({n: placed(p, own[n]) for n, p in self.toy.network().state_dict().items()})
            self.optimizer.state.clear()
            self.updater.load_tensors({})
            self.updater.load(self.fresh.updater)
            return self.fresh
        files, text = saved
        unpack(files, self.network, self.optimizer)
        state = TrainState.from_json(json.loads(text), where="kept")
        self.updater.load_tensors(files)
        self.updater.load(state.updater)
        return state

    def best(self) -> TrainState | None:
        saved = self.shared(self.kept.best)
        if saved is None:
            return None
        files, text = saved
        load_weights(self.network, files[MODEL_FILE], where="best")
        self.updater.load_tensors(files)
        return TrainState.from_json(json.loads(text), where="best")

    def shared(self, saved: tuple[dict[str, bytes], str] | None) -> tuple[dict[str, bytes], str] | None:
        """What rank 0 has."""
        if self.world.size == 1:
            return saved
        told = [saved]
        dist.broadcast_object_list(told, src=0)
        return told[0]


class Wishes:
    """Asks for a stop at the update that makes `stop_after` of them."""

    def __init__(self, stop_after: int | None, start: int) -> None:
        self._left = None if stop_after is None else stop_after - start

    def wants_stop(self) -> bool:
        if self._left is not None:
            self._left -= 1
        return self._left is not None and self._left <= 0

    def wants_checkpoint(self) -> bool:
        return False


class Told:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.events: list[tuple[str, dict[str, Any]]] = []

    def log(self, update: int, metrics: dict[str, float]) -> None:
        self.rows.append((update, dict(metrics)))

    def event(self, name: str, /, **facts: Any) -> None:
        self.events.append((name, facts))

    def told(self, name: str) -> list[dict[str, Any]]:
        """The facts of all events of a name."""
        return [facts for told, facts in self.events if told == name]

    def close(self, outcome: str) -> None: ...

    def column(self, name: str) -> dict[int, float]:
        return {update: metrics[name] for update, metrics in self.rows if name in metrics}


def weights(run: Run) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in run.network.parameters()])


def manifest_rows(manifest: Manifest) -> int:
    return len(manifest.columns["length"])

"""Small runs over streams: texts with a rule across their chunks, and waves whose frames are labelled."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from train_rig import ADAMW, Toy, toy_spec

from treadle.data import Buffers, Draft, Frames, Labels, Row, RowReader, Tokens
from treadle.nn import Network
from treadle.spec import BatchSpec, GruSpec, JobSpec, LanguageSpec, SplitSpec, TagSpec, TargetPer, TrainSpec
from treadle.train import Run, TrainState, World
from treadle.train.carry import Carried, Carry
from treadle.train.chunked import ChunkedEvaluator
from treadle.train.streams import StreamFeed

SYMBOLS = "abcde"
STREAMS = BatchSpec(max_slots="64", lanes=3, streams=2, chunk=7)


def texts_draft(num: int = 24, *, length: int | None = None) -> Draft:
    """Texts of 2 to 40 symbols in which every third repeats the one before it."""
    rng = np.random.default_rng(num)
    rows = []
    for i in range(num):
        text = rng.choice(list(SYMBOLS), length or rng.integers(2, 41))
        text[2::3] = text[1 : len(text) - 1 : 3]
        rows.append(Row(entity=str(i), inputs=text.tolist()))
    return Draft(rows=rows, inputs=Tokens(), target=None, licence="none")


def waves_draft(num: int = 20) -> Draft:
    """Walks in two channels; a frame's label says whether the first has risen since the beginning; a few have none."""
    rng = np.random.default_rng(5)
    rows = []
    for i in range(num):
        steps = rng.normal(size=(int(rng.integers(4, 40)), 2))
        labels = [None if t % 7 == 3 else "up" if v > 0 else "down" for t, v in enumerate(np.cumsum(steps[:, 0]))]
        rows.append(Row(entity=str(i), inputs=steps.astype(np.float32), target=labels))
    labels = Labels(names=("down", "up"), per=TargetPer.frame)
    return Draft(rows=rows, inputs=Frames(channels=("x", "y")), target=labels, licence="none")


def stream_spec(**changes: Any) -> JobSpec:
    given: dict[str, Any] = dict(
        task=LanguageSpec(),
        model=GruSpec(hidden_size=6, num_layers=2, embedding_size=5, dropout=0.2),
        split=SplitSpec(valid=3, test=3),
        batch=STREAMS,
        optim=ADAMW,
        train=TrainSpec(epochs=2, seed=5),
    )
    return toy_spec(**given | changes)


class StreamToy(Toy):
    """One data set and one spec with streams, from which any number of runs are made."""

    def __init__(self, spec: JobSpec | None = None, draft: Draft | None = None) -> None:
        spec = spec or stream_spec()
        if draft is None:
            draft = waves_draft() if isinstance(spec.task, TagSpec) else texts_draft()
        super().__init__(spec, draft)

    def stream_feed(self, world: World) -> StreamFeed:
        """A feed whose buffers are poisoned as soon as they are given back."""
        reader = RowReader(self.blobs, self.manifest)
        feed = StreamFeed(self.spec, self.manifest, reader, lanes=self.lanes(world), world=world)
        feed._buffers = Buffers(poison=True)
        return feed

    def carry(self, network: Any, world: World) -> Carried:
        assert isinstance(network, Network)
        return Carried(network, world, lanes=self.lanes(world), streams=self.spec.batch.streams or 1)

    def run(self, **options: Any) -> Run:
        run = super().run(**options)
        saved = options.get("saved")
        carry = self.carry(run.network, run.world)
        if saved is not None:
            carry.load(saved[0], at=(run.start.epoch, run.start.index))
        reader = RowReader(self.blobs, self.manifest)
        valid, test = (
            ChunkedEvaluator(self.spec, self.manifest, reader, split=split, task=run.task, world=run.world)
            for split in ("valid", "test")
        )
        restore = Restored(run.restore, run.checkpoints, carry)
        return dataclasses.replace(
            run, feed=self.stream_feed(run.world), valid=valid, test=test, carry=carry, restore=restore
        )


@dataclasses.dataclass(frozen=True)
class Restored:
    """Puts back carried states, too."""

    restore: Any
    kept: Any
    carry: Carry

    def newest(self) -> TrainState:
        state = self.restore.newest()
        files = self.kept.newest[0] if self.kept.newest else {}
        self.carry.load(files, at=(state.epoch, state.index))
        return state

    def best(self) -> TrainState | None:
        return self.restore.best()


def state_of(saved: tuple[dict[str, bytes], str]) -> TrainState:
    return TrainState.from_json(json.loads(saved[1]), where="saved")

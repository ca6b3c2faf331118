"""The gradients of an update: of each microbatch in its turn, in parts where memory is too small for a whole one."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from treadle import wire
from treadle.data import Form
from treadle.nn import Network, PieceReader, train_in_chunks
from treadle.train.feed import Micro, Update
from treadle.train.gradients import GradientSum
from treadle.train.run import Run
from treadle.train.split import Splitter, out_of_memory
from treadle.train.state import TrainState

__all__ = ["by_rows", "counted", "go_back", "seed_dropout", "summed_loss"]


def counted(run: Run, update: Update) -> float:
    """What the summed loss of an update is divided by, over all ranks."""
    if run.task.counts_ahead:
        return run.task.normaliser(frames=update.weighted_frames, rows=update.weighted_rows)
    (count,) = run.world.sum([sum(run.task.count(micro.batch) for micro in update.micros)])
    return max(1.0, count)


def summed_loss(
    run: Run, state: TrainState, update: Update, count: float, *, gradients: GradientSum, splitter: Splitter
) -> Tensor:
    """The loss of this rank's share of an update, whose gradients are added up; on the device, in float64.

    Where memory runs out, all of the share is done again with every microbatch cut into twice as many parts. Their sum
    is the same but for rounding; under dropout, the parts draw other masks.

    Args:
        count: what the loss of all ranks is divided by: a sum over one count of all ranks, so that neither padding nor
            the split into batches can bias it.

    Raises:
        InfeasibleError: not even a single row fits.
    """
    while True:
        try:
            return _loss(run, state, update, count, gradients=gradients, splitter=splitter)
        except (RuntimeError, MemoryError) as error:
            wanted = out_of_memory(error)
            if not wanted:
                raise
        # Outside the handler, whose traceback holds on to the tensors.
        gradients.again()
        gc.collect()
        if run.world.device.type == "cuda":
            torch.cuda.empty_cache()
        splitter.halve(update.micros, wanted)
        run.track.event("split", level="warning", update=state.update + 1, parts=splitter.parts, wanted=wanted)


def _loss(
    run: Run, state: TrainState, update: Update, count: float, *, gradients: GradientSum, splitter: Splitter
) -> Tensor:
    shares = [share for micros in by_rows(update.micros) for share in splitter.shares(micros)]
    total = torch.zeros((), dtype=torch.float64, device=run.world.device)
    for share in shares:
        seed_dropout(run, state, share[0])
        if share is shares[-1] and len(share) == 1:  # pieces go back several times, and are summed after the last
            gradients.expect()
        total += go_back(run, share, count)
    gradients.idle(update.passes - len(shares))
    return total


def by_rows(micros: Sequence[Micro]) -> list[tuple[Micro, ...]]:
    """Microbatches, those that are pieces of the same rows together."""
    groups = itertools.groupby(micros, key=lambda micro: (micro.number, micro.lane))
    return [tuple(group) for _, group in groups]


def go_back(run: Run, micros: Sequence[Micro], count: float) -> Tensor:
    """Add the gradients of a microbatch, or of the row that several are the pieces of; give its summed loss.

    Pieces give the gradients of the whole row in the memory of one (tests/unit/train/test_long_rows.py).
    """
    last = micros[-1].batch
    if len(micros) == 1:
        with run.precision.autocast():
            loss = run.task.loss_sum(run.carry.logits(run.network, micros[0], run.world.device), last)
        run.updater.scaled(loss / count).backward()
        return loss.detach()
    assert isinstance(run.network, Network)
    reader = PieceReader(network=run.network)

    def piece(index: int, before: Any) -> tuple[Tensor | None, Any]:
        batch = micros[index].batch
        x = torch.from_numpy(batch.inputs).to(run.world.device)
        x_1TD = x[None] if batch.form is Form.packed else x  # a row too long to be read at once is alone
        with run.precision.autocast():
            after = reader.read(x_1TD, torch.from_numpy(batch.lengths_B), before)
            loss = None if batch is not last else run.task.loss_sum(reader.logits(after), last) / count
        return None if loss is None else run.updater.scaled(loss), after

    return run.updater.unscaled(train_in_chunks(piece, len(micros)).loss_sum) * count


def seed_dropout(run: Run, state: TrainState, micro: Micro) -> None:
    """Key the dropout of a microbatch by its place in the plan, never by rank: any world draws the same."""
    if not run.draws:
        return
    place = [run.spec.train.seed, state.update, micro.number, micro.lane, *([micro.part] if micro.part else [])]
    key = int(wire.digest(place)[:15], 16)
    if run.world.device.type == "cpu":
        # Not torch.manual_seed: without CUDA it formats a stack trace for a later CUDA, 0.2 ms a call.
        torch.default_generator.manual_seed(key)
    else:
        torch.manual_seed(key)

"""The peers of the data benches: their plans of one epoch, and their ways to make padded batches.

Every planner answers with the same shape, steps x ranks x row numbers, so that one function judges them all, treadle's
own plan too. They get what their own trainers give them: lengths as a list, or cuts that are in memory already.
"""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from treadle.plan import plan_epoch
from treadle.spec import BatchSpec

__all__ = ["RANKS", "ROWS", "SLOTS", "Planner", "Quality", "planners", "quality", "reference_lengths", "steps_of"]

ROWS, RANKS, FIXED = 100_000, 8, 64
SLOTS = 6272
"""The budget: 64 rows of mean length, so that the peers with fixed rows make batches of the same mean size."""
ACCUMULATED = 4
"""Microbatches of one update, for the peer whose plan depends on it."""

Ints = NDArray[np.int64]
Steps = list[list[Ints]]


def reference_lengths() -> Ints:
    """The lengths of all data benches: log-normal with a long tail, median 60, up to 2,000 frames."""
    rng = np.random.default_rng(0)
    return np.clip(np.exp(rng.normal(4.1, 0.98, ROWS)), 1, 2000).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Planner:
    """One way to plan.

    Args:
        name: as printed.
        batches: the batches that one rank takes, in order.
        deals: the batches are one stream, dealt to the ranks in turn; otherwise each rank makes its own.
        repeats: plans timed; slow peers get fewer.
    """

    name: str
    batches: Callable[[Ints, int], Iterable[Sequence[int] | Ints]]
    deals: bool = False
    repeats: int = 5


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What a plan costs.

    Args:
        padded: share of slots that hold no frame.
        worst: slots of the largest batch / the budget.
        cells: mean / max over ranks of slots, summed over steps: what ranks that wait for each other keep.
        time: the same of the padded length, the number of dependent time steps.
        serial: padded length of the slowest rank, summed over steps.
        plan_s: CPU seconds until one rank has all its batches.
    """

    padded: float
    worst: float
    cells: float
    time: float
    serial: int
    plan_s: float


def steps_of(planner: Planner, lengths_N: Ints) -> tuple[Steps, float]:
    """Steps x ranks x rows, and the median CPU seconds of a plan for one rank."""
    runs = 1 if planner.deals else RANKS
    found, times = [], []
    for run in range(max(runs, planner.repeats)):
        started = time.process_time()
        batches = list(planner.batches(lengths_N, run % runs))
        times.append(time.process_time() - started)
        if run < runs:
            found.append([np.asarray(batch, dtype=np.int64) for batch in batches])
    if planner.deals:
        return [found[0][i : i + RANKS] for i in range(0, len(found[0]), RANKS)], statistics.median(times)
    if len({len(batches) for batches in found}) > 1:
        raise AssertionError(f"{planner.name}: ranks take unequal numbers of steps")
    return [list(step) for step in zip(*found, strict=True)], statistics.median(times)


def quality(steps: Steps, lengths_N: Ints, plan_s: float) -> Quality:
    """Source: the measures that decide the speed of synchronous data-parallel training of recurrent nets."""
    longest = np.zeros((len(steps), RANKS), dtype=np.int64)
    rows = np.zeros_like(longest)
    frames = 0
    for number, step in enumerate(steps):
        for rank, batch in enumerate(step):
            if len(batch):
                longest[number, rank], rows[number, rank] = lengths_N[batch].max(), len(batch)
                frames += int(lengths_N[batch].sum())
    taken = np.unique(np.concatenate([batch for step in steps for batch in step]))
    if len(taken) != len(lengths_N):
        raise AssertionError(f"got {len(taken):,} rows in the plan, expected all {len(lengths_N):,}")
    slots = longest * rows
    return Quality(
        padded=1 - frames / slots.sum(),
        worst=slots.max() / SLOTS,
        cells=slots.sum() / RANKS / slots.max(1).sum(),
        time=longest.sum() / RANKS / longest.max(1).sum(),
        serial=int(longest.max(1).sum()),
        plan_s=plan_s,
    )


def planners() -> list[Planner]:
    """Peers first, then treadle's plan at three amounts of noise."""
    few = {"repeats": 3}
    return [
        Planner(name=f"shuffled batches of {FIXED} rows", batches=_shuffled, deals=True),
        Planner(name="transformers 5.23.0 LengthGroupedSampler", batches=_hf_grouped, deals=True),
        Planner(name="transformers 5.23.0 DistributedLengthGroupedSampler", batches=_hf_distributed),
        Planner(name="transformers 5.23.0 BatchRebalanceSampler", batches=_hf_rebalanced),
        Planner(
            name="lhotse 1.33.0 DynamicBucketingSampler, 10 buckets, 10,000 buffered, world 1",
            batches=functools.partial(_lhotse, buckets=10, buffered=10_000, world=1),
            deals=True,
            **few,
        ),
        Planner(
            name="lhotse 1.33.0 DynamicBucketingSampler, 30 buckets, 20,000 buffered, world 8",
            batches=functools.partial(_lhotse, buckets=30, buffered=20_000, world=RANKS),
        ),
        Planner(
            name="the same, with fixed rows per bucket",
            batches=functools.partial(_lhotse, buckets=30, buffered=20_000, world=RANKS, fixed=True),
        ),
        Planner(name="treadle, noise 0.05, batches dealt singly", batches=_ours_singly, deals=True),
        *(
            Planner(
                name=f"treadle, noise {noise:g}{' (default)' if noise == 0.05 else ''}",
                batches=functools.partial(_ours, noise=noise),
                repeats=RANKS,
            )
            for noise in (0.0, 0.05, 0.1)
        ),
    ]


def cut(order: Sequence[int] | Ints, rows: int = FIXED) -> list[Sequence[int] | Ints]:
    return [order[i : i + rows] for i in range(0, len(order), rows)]


def _shuffled(lengths_N: Ints, rank: int) -> list[Sequence[int] | Ints]:
    return cut(np.random.default_rng(1).permutation(len(lengths_N)))


def _hf_grouped(lengths_N: Ints, rank: int) -> list[Sequence[int] | Ints]:
    from transformers.trainer_pt_utils import LengthGroupedSampler

    generator = torch.Generator().manual_seed(1)
    return cut(list(LengthGroupedSampler(FIXED, lengths=lengths_N.tolist(), generator=generator)))


def _hf_distributed(lengths_N: Ints, rank: int) -> list[Sequence[int] | Ints]:
    from transformers.trainer_pt_utils import DistributedLengthGroupedSampler

    lengths = lengths_N.tolist()
    return cut(list(DistributedLengthGroupedSampler(FIXED, num_replicas=RANKS, rank=rank, seed=1, lengths=lengths)))


def _hf_rebalanced(lengths_N: Ints, rank: int) -> list[list[int]]:
    from transformers.trainer_pt_utils import BatchRebalanceSampler

    rows = FIXED * RANKS * ACCUMULATED
    lengths = lengths_N.tolist()
    return list(BatchRebalanceSampler(lengths, rows, RANKS, ACCUMULATED, rank=rank, drop_last=False))


@functools.cache
def _cuts(num_rows: int) -> list[Any]:
    from lhotse import MonoCut

    lengths = reference_lengths()[:num_rows].tolist()
    return [MonoCut(id=str(row), start=0.0, duration=float(n), channel=0) for row, n in enumerate(lengths)]


def _lhotse(
    lengths_N: Ints, rank: int, *, buckets: int, buffered: int, world: int, fixed: bool = False
) -> Iterator[list[int]]:
    """One frame is one second, so that `max_duration` is the budget; what it plans is as with any unit."""
    from lhotse.dataset import DynamicBucketingSampler
    from lhotse.dataset.sampling.dynamic_bucketing import FixedBucketBatchSizeConstraint, estimate_duration_buckets

    limit: dict[str, Any] = {"max_duration": float(SLOTS), "num_buckets": buckets}
    if fixed:  # the hard budget: rows of a bucket follow from its upper edge
        bins = estimate_duration_buckets(_cuts(len(lengths_N))[:10_000], buckets)
        edges = [*(float(edge) for edge in bins), float(lengths_N.max())]
        rows = [SLOTS // int(edge) for edge in edges]  # an edge belongs to the bucket below it
        limit = {"constraint": FixedBucketBatchSizeConstraint(edges, rows), "duration_bins": edges[:-1]}
    common = {"shuffle": True, "seed": 1, "buffer_size": buffered, "world_size": world, "rank": rank}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in DynamicBucketingSampler(_cuts(len(lengths_N)), **limit, **common):
            # The last step copies rows where it cannot fill every rank, and names them 7_dup0.
            yield [int(cut.id.split("_")[0]) for cut in batch]


def _ours(lengths_N: Ints, rank: int, *, noise: float) -> list[Ints]:
    batch = BatchSpec(max_slots=str(SLOTS), noise=noise)
    plan = plan_epoch(lengths_N, batch, lanes=RANKS, seed=1, epoch=0)
    rounds = (number for update in range(plan.num_updates) for number in plan.rounds_of(update))
    return [plan.lane_rows(number, rank) for number in rounds]


def _ours_singly(lengths_N: Ints, rank: int) -> list[Ints]:
    """The same sort and budget, each rank with a batch of its own length: what dealing neighbours is worth."""
    plan = plan_epoch(lengths_N, BatchSpec(max_slots=str(SLOTS)), lanes=1, seed=1, epoch=0)
    return [plan.lane_rows(number, 0) for update in range(plan.num_updates) for number in plan.rounds_of(update)]

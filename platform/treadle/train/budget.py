"""How many slots a microbatch should have, found by training for a moment on this device.

For `batch.max_slots=auto`. Budgets are tried from small to large, each on the shapes that an epoch has at its worst:
as many of the longest rows as fit, of rows longer than 99 % of all, of the shortest, which are the most, and of the
median ones; where frames are counted also the microbatch of an epoch that padding makes the largest. A budget is safe
where the peak of a whole update stays within the limit for all of them. Of the safe ones the smallest is taken that
trains, on median rows, within 3 % as many frames a second as the fastest: more slots than that only make for fewer
updates. On a CPU they may even be slower: two bidirectional layers of an LSTM of 128 units read 15,100 frames a second
in batches of 1,024 slots and 11,000 in batches of 4,066, whose activations no cache holds; a MinGRU 101,000 and
133,000.

Source: the bisection of NVIDIA NeMo's oomptimizer, with speed as a second criterion and all shapes under one budget.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from treadle.data import Batch
from treadle.errors import InfeasibleError
from treadle.nn.footprint import peak_bytes
from treadle.plan import plan_epoch, with_slots
from treadle.spec import BatchSpec, Budget, LongRows
from treadle.train.precision import PrecisionChoice
from treadle.train.task import Task, run_network
from treadle.units import format_bytes

__all__ = ["FoundBudget", "Learner", "Trial", "find_budget", "memory_limit", "peak_of_update", "untouched"]

Ints = NDArray[np.int64]
Predict = Callable[[int, int, int | None], int]
"""Bytes at the peak of an update of (rows, time steps, frames); frames are None where all slots count."""

LEAST_SLOTS, MOST_SLOTS = 256, 1 << 20
FEW_ROUNDS = 80
"""Rounds of an epoch below which padding grows visibly; no budget is taken that leaves fewer."""
CLOSE = 0.97
"""Of the best speed. Two runs of one shape differ by 1 to 2 % on a quiet machine."""
SETTLED = 2
"""Doublings in a row without a better speed after which larger budgets are not tried."""
GPU_SHARE, CPU_SHARE = 0.9, 0.5
"""Of a device's memory; of the memory that is available now on the host, which others use, too."""
REPEATS = 3
PROBE_S = 60.0
"""No further budget is tried after so long."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What an update takes.

    Args:
        read: the batch of rows, by number in the data set, in the form that the network is trained on.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    task: Task
    precision: PrecisionChoice
    device: torch.device
    read: Callable[[Ints], Batch]

    def update(self, batch: Batch) -> None:
        """Forward, backward, clip and step, as in the loop."""
        with self.precision.autocast():
            loss = self.task.loss_sum(run_network(self.network, batch, self.device), batch)
        (loss / max(1.0, self.task.count(batch))).backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One shape of one budget.

    Args:
        slots: the budget. rows, time_steps: of the microbatch that was tried. frames: of all its rows.
        peak_bytes: of all tensors over an update; 0 where the device had too little memory.
        frames_per_s: of the fastest of some updates; 0 where speed was not looked at.
        fits: within the limit.
    """

    slots: int
    rows: int
    time_steps: int
    peak_bytes: int
    frames_per_s: float
    fits: bool
    frames: int = 0


@dataclass(frozen=True, kw_only=True)
class FoundBudget:
    """The budget of a run, and why; kept with the run.

    Args:
        slots: the budget. largest_slots: the largest that was tried and is safe.
        limit_bytes: what a worker may use. measured_bytes: the peak of the budget's largest shape; predicted_bytes: of
            the same by arithmetic.
        why: for people.
    """

    slots: int
    largest_slots: int
    limit_bytes: int
    predicted_bytes: int
    measured_bytes: int
    trials: tuple[Trial, ...]
    why: str


def find_budget(
    learner: Learner,
    batch: BatchSpec,
    rows_N: Ints,
    lengths_N: NDArray[Any],
    targets_N: NDArray[Any],
    *,
    lanes: int,
    limit_bytes: int,
    predict: Predict = lambda _rows, _steps, _frames: 0,
) -> FoundBudget:
    """The smallest safe budget whose speed is within 3 % of the best.

    Weights, optimizer and random streams are as before afterwards.

    Args:
        learner: of the job, on the device of the job.
        batch: of the job; all is read but max_slots.
        rows_N: training rows, by number in the data set. lengths_N: their frames. targets_N: their targets.
        lanes: shares of a round.
        limit_bytes: what this worker may use; see `memory_limit`.
        predict: the peak by arithmetic; what it puts at twice the limit is not tried.

    Raises:
        InfeasibleError: not even the smallest budget fits, or the one that the longest row needs.

    Cost: updates of all budgets up to the one taken and two doublings beyond; `PROBE_S` and one update at most.
    """
    search = _Search(learner, batch, rows_N, np.asarray(lengths_N, np.int64), targets_N, lanes, limit_bytes, predict)
    least = search.least_slots
    most = max(least, min(MOST_SLOTS, int(np.sum(lengths_N, dtype=np.int64)) // (FEW_ROUNDS * lanes)))
    with untouched(learner):
        reason = search.climb(least, most)
    return search.answer(reason)


def memory_limit(device: torch.device, workers: int) -> int:
    """Bytes that one of `workers` on this host may use.

    On CUDA nine tenths of the device: the rest is for what the allocator cannot use of it. On a CPU half of what is
    available, shared by the workers.
    """
    if device.type == "cuda":
        return int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return int(CPU_SHARE * _available_bytes() / max(1, workers))


def peak_of_update(learner: Learner, batch: Batch) -> int:
    """Bytes of all tensors at the peak of one update: weights, moments, gradients, activations, the batch.

    On CUDA as the allocator counts. On a CPU tensors are followed one by one, at three times the time of small
    operations; what kernels use inside and what an allocator makes of it is not seen.

    Raises:
        torch.OutOfMemoryError: on CUDA.
    """
    if learner.device.type == "cuda":
        torch.cuda.synchronize(learner.device)
        torch.cuda.reset_peak_memory_stats(learner.device)
        learner.update(batch)
        torch.cuda.synchronize(learner.device)
        return torch.cuda.max_memory_allocated(learner.device)
    peak = peak_bytes(lambda: learner.update(batch))  # the batch included, from which tensors are made within
    state = [part for values in learner.optimizer.state.values() for part in values.values()]
    held = [*learner.network.parameters(), *(part for part in state if isinstance(part, Tensor))]
    return peak + sum(part.numel() * part.element_size() for part in held)


class _Search:
    """Trials so far, and how the next one is made."""

    def __init__(
        self,
        learner: Learner,
        batch: BatchSpec,
        rows_N: Ints,
        lengths_N: Ints,
        targets_N: NDArray[Any],
        lanes: int,
        limit_bytes: int,
        predict: Predict,
    ) -> None:
        order_N = np.argsort(lengths_N, kind="stable")
        self._learner, self._batch, self._lanes = learner, batch, lanes
        self._rows, self._lengths = rows_N[order_N], lengths_N[order_N]
        self._most_targets = np.maximum.accumulate(targets_N[order_N])
        self._limit, self._predict = limit_bytes, predict
        self._speeds: dict[int, float] = {}
        self._deadline = time.monotonic() + PROBE_S
        self.trials: list[Trial] = []

    @property
    def least_slots(self) -> int:
        longest = self._padded(int(self._lengths[-1]))
        return LEAST_SLOTS if self._batch.long_rows is LongRows.chunk else max(LEAST_SLOTS, longest)

    def climb(self, least: int, most: int) -> str:
        """Try budgets from `least` to `most`; say what ended it."""
        slots, safe, worse = least, 0, 0
        while True:
            best = max(self._speeds.values(), default=0.0)
            if not self._try(slots):
                self._halve(safe, slots)
                return f"{slots} slots are too many for {format_bytes(self._limit)}"
            safe = slots
            worse = 0 if self._speeds[slots] * CLOSE > best else worse + 1
            if worse >= SETTLED:
                return "more slots are no faster"
            if slots >= most:
                return f"more slots leave fewer than {FEW_ROUNDS} rounds an epoch"
            if time.monotonic() > self._deadline:
                return f"{PROBE_S:.0f} s were over"
            slots = min(most, 1 << slots.bit_length())

    def answer(self, reason: str) -> FoundBudget:
        """What the trials say."""
        if not self._speeds:
            asked = self.trials[-1]  # the first that does not fit
            raise InfeasibleError(
                f"batch.max_slots: auto finds none: {asked.rows} x {asked.time_steps} time steps take "
                f"{format_bytes(asked.peak_bytes)}, expected at most {format_bytes(self._limit)}",
                hint="a smaller model.hidden_size, batch.long_rows=chunk, or more memory",
            )
        best = max(self._speeds.values())
        slots = min(slots for slots, speed in self._speeds.items() if speed >= CLOSE * best)
        largest = max((t for t in self.trials if t.slots == slots), key=lambda t: t.peak_bytes)
        share = self._speeds[slots] / best
        return FoundBudget(
            slots=slots,
            largest_slots=max(self._speeds),
            limit_bytes=self._limit,
            predicted_bytes=self._predicted(largest.rows, largest.time_steps, largest.frames),
            measured_bytes=largest.peak_bytes,
            trials=tuple(self.trials),
            why=f"{share:.0%} of the best speed, {format_bytes(largest.peak_bytes)} at most; {reason}",
        )

    def _halve(self, safe: int, unsafe: int) -> None:
        """Where the largest safe budget is the fastest so far, look for a larger one, to a sixteenth."""
        while safe and unsafe - safe > safe // 16 and self._speeds[safe] >= max(self._speeds.values()):
            middle = (safe + unsafe) // 2
            if time.monotonic() > self._deadline or not self._try(middle):
                unsafe = middle
            else:
                safe = middle

    def _try(self, slots: int) -> bool:
        """Whether all shapes of a budget fit; notes the speed of the median one."""
        middle, last = (len(self._rows) - 1) // 2, len(self._rows) - 1
        worst = [self._alike(slots, place) for place in (last, int(0.99 * last), 0)]
        worst += [self._most_padded(slots)] if self._counts_frames else []
        for places in worst:
            if not self._trial(slots, places, timed=False).fits:
                return False
        trial = self._trial(slots, self._alike(slots, middle), timed=True)
        if trial.fits:
            self._speeds[slots] = trial.frames_per_s
        return trial.fits

    def _alike(self, slots: int, place: int) -> Ints:
        """As many rows as fit, each about as long as the one there."""
        # A row above the budget is read in pieces; one that just fits stands for a piece.
        place = max(0, min(place, int(np.searchsorted(self._lengths, slots, side="right")) - 1))
        num_rows = slots // self._padded(int(self._lengths[place]))
        num_rows = max(1, min(num_rows, self._batch.max_rows, len(self._rows)))
        # One row is a little shorter where there is one: rows of one length are padded, and packed, for free.
        places = np.full(num_rows, place)
        places[1:2] = max(0, int(np.searchsorted(self._lengths, self._lengths[place])) - 1)
        if num_rows > 1:  # the most targets of rows up to this length, to which the others are padded
            last = int(np.searchsorted(self._lengths, self._lengths[place], side="right")) - 1
            places[-1] = int(np.searchsorted(self._most_targets, self._most_targets[last]))
        return places

    def _most_padded(self, slots: int) -> Ints:
        """The rows of the microbatch with the most padded slots, of which a budget of frames knows nothing."""
        plan = plan_epoch(self._lengths, with_slots(self._batch, slots), lanes=self._lanes, seed=0, epoch=0)
        cut = len(plan.pieces_G)  # rows above the budget, one a lane
        if cut == plan.num_rounds:
            return self._alike(slots, len(self._rows) - 1)
        number, lane = divmod(int(plan.padded_GL[cut:].argmax()), self._lanes)
        return plan.lane_rows(cut + number, lane)

    def _trial(self, slots: int, places: Ints, *, timed: bool) -> Trial:
        """Of rows by their places in the order of lengths; kept among the trials."""
        lengths_B = self._lengths[places]
        rows, steps, frames = len(places), self._padded(int(lengths_B.max())), int(lengths_B.sum())
        peak, speed = self._predicted(rows, steps, frames), 0.0
        if peak <= 2 * self._limit:
            peak, speed = self._measured(self._learner.read(self._rows[places]), timed=timed)
        trial = Trial(
            slots=slots,
            rows=rows,
            time_steps=steps,
            frames=frames,
            peak_bytes=peak,
            frames_per_s=round(speed, 1),
            fits=0 < peak <= self._limit,
        )
        self.trials.append(trial)
        return trial

    def _predicted(self, rows: int, steps: int, frames: int) -> int:
        return self._predict(rows, steps, frames if self._counts_frames else None)

    def _measured(self, batch: Batch, *, timed: bool) -> tuple[int, float]:
        """(peak, frames a second); zeros where the device has too little memory."""
        learner = self._learner
        try:
            if not learner.optimizer.state:
                learner.update(batch)  # makes the moments
            peak = peak_of_update(learner, batch)
            if not timed or peak > self._limit:
                return peak, 0.0
            return peak, batch.frames / min(self._seconds(batch) for _ in range(REPEATS))
        except torch.OutOfMemoryError:
            learner.optimizer.zero_grad(set_to_none=True)
        # Outside the handler, whose traceback holds on to the tensors.
        torch.cuda.empty_cache()
        return 0, 0.0

    def _seconds(self, batch: Batch) -> float:
        started = time.perf_counter()
        self._learner.update(batch)
        if self._learner.device.type == "cuda":
            torch.cuda.synchronize(self._learner.device)
        return time.perf_counter() - started

    @property
    def _counts_frames(self) -> bool:
        return self._batch.budget is Budget.frames

    def _padded(self, length: int) -> int:
        multiple = 1 if self._counts_frames else self._batch.multiple_of
        return -(-length // multiple) * multiple


@contextlib.contextmanager
def untouched(learner: Learner) -> Iterator[None]:
    """Everything that an update moves is put back at the end; meanwhile it is kept on the host."""
    network, optimizer = learner.network, learner.optimizer
    was_training = network.training
    weights, moments = _on_host(network.state_dict()), _on_host(optimizer.state_dict())
    with torch.random.fork_rng(devices=[learner.device] if learner.device.type == "cuda" else []):
        try:
            network.train()
            yield
        finally:
            optimizer.zero_grad(set_to_none=True)
            network.load_state_dict(weights)
            network.train(was_training)
            optimizer.state.clear()
            if moments["state"]:
                optimizer.load_state_dict(moments)
            if learner.device.type == "cuda":
                torch.cuda.empty_cache()


def _on_host(value: Any) -> Any:
    """A copy with all tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    return [_on_host(item) for item in value] if isinstance(value, list) else value


def _available_bytes() -> int:
    """Memory of this host that can be had now."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

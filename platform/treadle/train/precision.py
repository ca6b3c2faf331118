"""In which number format forward and backward run, found out on the device at hand."""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from treadle.data import Batch
from treadle.errors import ConfigError
from treadle.spec import Precision
from treadle.train.task import Task, run_network
from treadle.train.world import World

__all__ = ["PrecisionChoice", "choose_precision"]

REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class PrecisionChoice:
    """The format taken, and why; written into the run's events and checkpoints.

    Args:
        name: "bf16" or "fp32". why: for people. probe_ms: median time of a short step in each format tried.
    """

    name: str
    device: str
    why: str
    probe_ms: dict[str, float]

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which a forward pass runs."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=torch.bfloat16)


def choose_precision(mode: Precision, network: nn.Module, task: Task, batch: Batch, world: World) -> PrecisionChoice:
    """bf16 or fp32 for this network on this device; all ranks decide alike.

    auto times a forward and backward pass of `batch` in both and takes bf16 where it is finite and
    faster: on CPUs without bf16 units it is several times slower. Weights and gradients are left as
    they were.

    Raises:
        ConfigError: bf16 was asked for and its step fails or is not finite.
    """
    device = world.device.type
    fp32 = PrecisionChoice(name="fp32", device=device, why="as asked", probe_ms={})
    if mode is Precision.fp32:
        return fp32
    bf16 = PrecisionChoice(name="bf16", device=device, why="as asked", probe_ms={})
    wrong = ""
    times: dict[str, float] = {}
    try:
        times["bf16"] = _step_ms(bf16, network, task, batch, world)
    except (RuntimeError, ArithmeticError) as error:
        wrong = str(error).splitlines()[0]
    failures = world.sum([1.0 if wrong else 0.0])[0]
    if failures:
        why = f"bf16 fails here: {wrong or 'on another rank'}"
        if mode is Precision.bf16:
            raise ConfigError(f"precision.mode: got bf16, but {why}", hint="precision=auto or precision=fp32")
        return PrecisionChoice(name="fp32", device=device, why=why, probe_ms={})
    if mode is Precision.bf16:
        return PrecisionChoice(name="bf16", device=device, why="as asked", probe_ms=times)
    times["fp32"] = _step_ms(fp32, network, task, batch, world)
    mean = {name: ms / world.size for name, ms in zip(times, world.sum(list(times.values())), strict=True)}
    name = min(mean, key=lambda n: mean[n])
    ratio = mean["fp32"] / mean["bf16"]
    why = f"a step in bf16 takes {1 / ratio:.2f}x the time of fp32"
    return PrecisionChoice(name=name, device=device, why=why, probe_ms={n: round(ms, 3) for n, ms in mean.items()})


def _step_ms(choice: PrecisionChoice, network: nn.Module, task: Task, batch: Batch, world: World) -> float:
    """Median milliseconds of a forward and backward pass.

    Raises:
        ArithmeticError: loss or gradients are not finite. RuntimeError: torch cannot run it.
    """
    times: list[float] = []
    try:
        for _ in range(REPEATS + 1):  # the first one warms up
            started = time.perf_counter()
            with choice.autocast():
                loss = task.loss_sum(run_network(network, batch, world.device), batch) / task.count(batch)
            loss.backward()
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            if not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
                raise ArithmeticError("gradients are not finite")
            times.append(time.perf_counter() - started)
    finally:
        network.zero_grad(set_to_none=True)
    return sorted(times[1:])[REPEATS // 2] * 1000

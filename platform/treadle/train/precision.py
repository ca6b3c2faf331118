"""In which number format forward and backward run, found out on the device at hand."""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from treadle.data import Batch
from treadle.errors import ConfigError, DivergenceError
from treadle.spec import Precision
from treadle.train.task import Task, run_network
from treadle.train.world import World

__all__ = ["PrecisionChoice", "choose_precision"]

REPEATS = 3
CLEARLY = 0.75
"""bf16 is taken below this share of fp32's time: noise must not decide between equals, which give other bits."""


@dataclass(frozen=True, kw_only=True)
class PrecisionChoice:
    """The format taken, and why; written into the run's events and checkpoints.

    Args:
        name: "bf16" or "fp32". why: for people. probe_ms: time of a short step in each format tried.
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
    clearly faster: on CPUs without bf16 units it is several times slower. It is a measurement: name a
    format where two runs must agree in every bit. Weights, gradients and the random stream are left
    as they were.

    Raises:
        ConfigError: bf16 was asked for and its step fails or is not finite.
        DivergenceError: fp32 is not finite either.

    Cost: at most `3 * (REPEATS + 1)` steps; a format that falls behind is tried twice.
    """
    device = world.device.type

    def choice(name: str, why: str, **probe_ms: float) -> PrecisionChoice:
        return PrecisionChoice(name=name, device=device, why=why, probe_ms=probe_ms)

    def step_ms(name: str, *, give_up_ms: float = float("inf")) -> float:
        return _step_ms(choice(name, ""), network, task, batch, world, give_up_ms=give_up_ms)

    if mode is Precision.fp32:
        return choice("fp32", "as asked")
    wrong, slow_ms, fast_ms = "", 0.0, 0.0
    try:
        slow_ms = step_ms("fp32") if mode is Precision.auto else float("inf")
    except ArithmeticError as error:
        raise DivergenceError(
            f"the first step in fp32: {error}", hint="look at the data's range, or a smaller model.num_layers"
        ) from None
    try:
        fast_ms = step_ms("bf16", give_up_ms=slow_ms)
        if fast_ms < CLEARLY * slow_ms < float("inf"):
            # Once more after it: what ran beside the first passes, as workers that start do, made them look slow.
            slow_ms = min(slow_ms, step_ms("fp32"))
    except (RuntimeError, ArithmeticError) as error:
        wrong = str(error).splitlines()[0]
    failures, slow_ms, fast_ms = world.sum([1.0 if wrong else 0.0, slow_ms / world.size, fast_ms / world.size])
    if failures:
        why = f"bf16 fails here: {wrong or 'on another rank'}"
        if mode is Precision.bf16:
            raise ConfigError(f"precision.mode: got bf16, but {why}", hint="precision=auto or precision=fp32")
        return choice("fp32", why)
    if mode is Precision.bf16:
        return choice("bf16", "as asked", bf16=round(fast_ms, 3))
    name = "bf16" if fast_ms < CLEARLY * slow_ms else "fp32"
    why = f"a step in bf16 takes {fast_ms / slow_ms:.2f}x the time of fp32"
    return choice(name, why, bf16=round(fast_ms, 3), fp32=round(slow_ms, 3))


def _step_ms(
    choice: PrecisionChoice, network: nn.Module, task: Task, batch: Batch, world: World, *, give_up_ms: float
) -> float:
    """Milliseconds of the fastest forward and backward pass; of one pass where it is slower than `give_up_ms`.

    Raises:
        ArithmeticError: loss or gradients are not finite. RuntimeError: torch cannot run it.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    times: list[float] = []
    with torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else []):
        for number in range(REPEATS + 1):
            started = time.perf_counter()
            with choice.autocast():
                loss = task.loss_sum(run_network(network, batch, world.device), batch) / task.count(batch)
            gradients = torch.autograd.grad(loss, parameters)
            if not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
                raise ArithmeticError("gradients are not finite")
            if number:  # the first one warms up
                times.append(1000 * (time.perf_counter() - started))
                if times[-1] > give_up_ms:
                    break
    return min(times)  # whatever else the machine does only adds to it

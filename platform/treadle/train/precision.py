"""In which number format forward and backward run, found out on the device at hand."""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from treadle.data import Batch
from treadle.errors import ConfigError, DivergenceError
from treadle.spec import Precision
from treadle.train.task import Task, run_network
from treadle.train.world import World

__all__ = ["LossScale", "PrecisionChoice", "choose_precision"]

REPEATS = 3
CLEARLY = 0.75
"""bf16 is taken below this share of fp32's time: noise must not decide between equals, which give other bits."""
FIRST_SCALE, LEAST_SCALE, MOST_SCALE = 65536.0, 1.0, 16777216.0
GROWS_AFTER = 2000
"""Updates without an overflow after which the scale of an fp16 loss is doubled."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class PrecisionChoice:
    """The format taken, and why; written into the run's events and checkpoints.

    Args:
        name: "bf16", "fp16" or "fp32". why: for people. probe_ms: time of a short step in each format tried.
    """

    name: str
    device: str
    why: str
    probe_ms: dict[str, float]

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which a forward pass runs."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=_DTYPES[self.name])

    @property
    def is_scaled(self) -> bool:
        """Whether losses are scaled up before the backward pass: fp16 has no room for small gradients."""
        return self.name == "fp16"


class LossScale:
    """What an fp16 loss is multiplied by; lives on the device, where it follows the overflows that it makes.

    Half the scale after an update whose gradient is not finite, twice the scale after `GROWS_AFTER` that are.

    Source: Micikevicius et al. 2018, "Mixed precision training", section 3.2; numbers of torch.amp.GradScaler, whose
    scale has no least value: there, one that stays not finite halves it to zero without an error.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.tensor(FIRST_SCALE, device=device)
        self.sound = torch.tensor(0.0, device=device)
        """Updates since the scale was last changed."""

    def follow(self, finite: Tensor) -> None:
        """After an update.

        Args:
            finite: whether its gradient was; on the device.
        """
        sound = (self.sound + 1) * finite
        grows = sound >= GROWS_AFTER
        factor = torch.where(finite, torch.where(grows, 2.0, 1.0), 0.5)
        self.value.mul_(factor).clamp_(LEAST_SCALE, MOST_SCALE)
        self.sound.copy_(sound * ~grows)

    def restart(self) -> None:
        """As in the beginning."""
        self.value.fill_(FIRST_SCALE)
        self.sound.zero_()


def choose_precision(mode: Precision, network: nn.Module, task: Task, batch: Batch, world: World) -> PrecisionChoice:
    """The format for this network on this device; all ranks decide alike.

    auto times a forward and backward pass of `batch` in fp32 and in bf16 (on a GPU without bf16 arithmetic, or where it
    fails there: fp16) and takes the lower one where it is finite and clearly faster: on CPUs without bf16 units it is
    several times slower. It is a measurement: name a format where two runs must agree in every bit. Weights,
    gradients and the random stream are left as they were.

    Raises:
        ConfigError: bf16 or fp16 was asked for and its step fails or is not finite.
        DivergenceError: fp32 is not finite either.

    Cost: at most `3 * (REPEATS + 1)` steps; a format that falls behind is tried twice. fp16 takes one more for each
    time that its loss must be scaled by less.
    """
    if mode is Precision.fp32:
        return PrecisionChoice(name="fp32", device=world.device.type, why="as asked", probe_ms={})
    probe = _Probe(network, task, batch, world)
    if mode is not Precision.auto:
        probe.time(mode.value)
        if why := probe.failures.get(mode.value):
            others = " or ".join(f"precision={name}" for name in ("auto", "fp32"))
            raise ConfigError(f"precision.mode: got {mode.value}, but {why}", hint=others)
        return probe.choice(mode.value, "as asked")
    probe.time_fp32()
    tried = ["fp16"] if _lacks_bf16(world) else ["bf16"]
    probe.time(tried[0])
    if tried == ["bf16"] and probe.failures and world.device.type == "cuda":
        tried.append("fp16")
        probe.time("fp16")
    name = tried[-1]
    if name in probe.failures:
        return probe.choice("fp32", "; ".join(probe.failures.values()))
    ratio = probe.ms[name] / probe.ms["fp32"]
    why = f"a step in {name} takes {ratio:.2f}x the time of fp32"
    return probe.choice(name if ratio < CLEARLY else "fp32", why)


def _lacks_bf16(world: World) -> bool:
    """Whether some rank's GPU has no bf16 arithmetic; all ranks ask."""
    if world.device.type != "cuda":
        return False
    return world.sum([float(not torch.cuda.is_bf16_supported(including_emulation=False))])[0] > 0


class _Probe:
    """Short steps in several formats; the same on all ranks.

    `ms` is the time of each format tried, meant over the ranks; `failures` say why one cannot be taken.
    """

    def __init__(self, network: nn.Module, task: Task, batch: Batch, world: World) -> None:
        self.ms: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self._network, self._task, self._batch, self._world = network, task, batch, world
        self._fp32_ms = float("inf")

    def choice(self, name: str, why: str) -> PrecisionChoice:
        probe_ms = {} if self.failures else {tried: round(ms, 3) for tried, ms in self.ms.items()}
        return PrecisionChoice(name=name, device=self._world.device.type, why=why, probe_ms=probe_ms)

    def time_fp32(self) -> None:
        """The time of fp32 on this rank, to compare with; `time` makes it that of all ranks.

        Raises:
            DivergenceError: it is not finite.
        """
        try:
            self._fp32_ms = self._step_ms("fp32")
        except ArithmeticError as error:
            raise DivergenceError(
                f"the first step in fp32: {error}", hint="look at the data's range, or a smaller model.num_layers"
            ) from None

    def time(self, name: str) -> None:
        """Time a format, or note why it fails; all ranks call it alike."""
        wrong, ms = "", 0.0
        try:
            ms = self._step_ms(name, give_up_ms=self._fp32_ms)
            if ms < CLEARLY * self._fp32_ms < float("inf"):
                # Once more after it: what ran beside the first passes, as workers that start do, made them look slow.
                self._fp32_ms = min(self._fp32_ms, self._step_ms("fp32"))
        except (RuntimeError, ArithmeticError) as error:
            wrong = str(error).splitlines()[0]
        size = self._world.size
        failures, fp32_ms, mean_ms = self._world.sum([1.0 if wrong else 0.0, self._fp32_ms / size, ms / size])
        if failures:
            self.failures[name] = f"{name} fails here: {wrong or 'on another rank'}"
            return
        self.ms[name] = mean_ms
        if fp32_ms < float("inf"):
            self.ms["fp32"] = fp32_ms

    def _step_ms(self, name: str, *, give_up_ms: float = float("inf")) -> float:
        """Milliseconds of the fastest forward and backward pass; of one pass where it is slower than `give_up_ms`.

        Raises:
            ArithmeticError: loss or gradients are not finite. RuntimeError: torch cannot run it.
        """
        device = self._world.device
        format_ = PrecisionChoice(name=name, device=device.type, why="", probe_ms={})
        scale = FIRST_SCALE if format_.is_scaled else LEAST_SCALE
        times: list[float] = []
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            while len(times) <= REPEATS:  # the first one warms up
                started = time.perf_counter()
                if not self._is_finite(format_, scale):
                    if scale <= LEAST_SCALE:
                        raise ArithmeticError("gradients are not finite")
                    scale /= 2
                    continue
                times.append(1000 * (time.perf_counter() - started))
                if len(times) > 1 and times[-1] > give_up_ms:
                    break
        return min(times[1:])  # whatever else the machine does only adds to it

    def _is_finite(self, format_: PrecisionChoice, scale: float) -> bool:
        """Run forward and backward once; whether all gradients are finite."""
        task, batch = self._task, self._batch
        with format_.autocast():
            loss = task.loss_sum(run_network(self._network, batch, self._world.device), batch) / task.count(batch)
        parameters = [p for p in self._network.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss * scale if scale > 1 else loss, parameters)
        return bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))

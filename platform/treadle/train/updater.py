"""From summed gradients to new weights: judge, clip, step, and everything that remembers past updates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from treadle.spec import JobSpec
from treadle.train.averages import Average
from treadle.train.guard import GuardState, Verdict, judged, norm_limit
from treadle.train.optim import is_fused, learning_rate, prepare_moments
from treadle.train.precision import LEAST_SCALE, LossScale, PrecisionChoice
from treadle.train.tensors import listed, local, read_tensors

__all__ = ["AVERAGE_FILE", "UPDATER_FILE", "Moved", "Updater", "UpdaterState"]

UPDATER_FILE = "updater.safetensors"
AVERAGE_FILE = "ema.safetensors"
NONE = -1.0
"""In the place of a norm: there is no update left to be judged."""


@dataclass(frozen=True, kw_only=True)
class UpdaterState:
    """The small numbers of an updater, as they stand in a checkpoint.

    Args:
        rate_factor: what roll-backs have multiplied the learning rate by. roll_backs: how many there were.
        guard: what it remembers of gradient norms, the latest update's left out: that is among the tensors.
    """

    rate_factor: float = 1.0
    roll_backs: int = 0
    guard: GuardState = field(default_factory=GuardState)


class Moved(NamedTuple):
    """An update as it stands on the device: its gradient norm before clipping, and 1 where it was taken, else 0."""

    norm: Tensor
    taken: Tensor


class Updater:
    """Moves the weights of a network; all ranks call it alike and come to the same bits.

    Nothing waits for the device in `move`, but for optimizers that are not fused: whether an update is taken is
    decided there, and read by `judge` one update later.

    Args:
        spec: of the job: optimizer, guard.
        network: whose parameters hold the summed gradients when `move` is called. optimizer: of these parameters.
        precision: whether losses are scaled.
    """

    def __init__(
        self, spec: JobSpec, network: nn.Module, optimizer: torch.optim.Optimizer, precision: PrecisionChoice
    ) -> None:
        self._spec = spec.optim
        self._guard = spec.guard
        self._optimizer = optimizer
        self._parameters = list(network.parameters())
        self._state = UpdaterState()
        device = self._parameters[0].device
        self._is_fused = is_fused(optimizer) and not any(isinstance(p, DTensor) for p in self._parameters)
        self._scale = LossScale(device) if precision.is_scaled else None
        self.average = None if spec.optim.ema is None else Average(network, spec.optim.ema)
        # (norm, scale) of the latest update.
        self._latest = torch.tensor([NONE, LEAST_SCALE], dtype=torch.float64, device=device)
        self._host = torch.empty_like(self._latest, device="cpu", pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._is_pending = False

    @property
    def state(self) -> UpdaterState:
        """What a checkpoint keeps beside the tensors."""
        return self._state

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss that the backward pass starts from."""
        return loss if self._scale is None else loss * self._scale.value

    def unscaled(self, loss: Tensor) -> Tensor:
        """What `scaled` was given."""
        return loss if self._scale is None else loss / self._scale.value

    def rate(self, progress: float, *, cuts: int) -> float:
        """The learning rate at a share of the run, after so many cuts and what roll-backs have made of it."""
        return self._state.rate_factor * learning_rate(self._spec, progress, cuts)

    def judge(self) -> Verdict | None:
        """What the guard says of the latest update, told once; None where there is nothing new to judge."""
        if not self._is_pending:
            return None
        self._is_pending = False
        if self._copied is not None:
            self._copied.synchronize()
        norm, scale = self._host.tolist()
        guard, verdict = judged(self._guard, self._state.guard, norm, may_overflow=scale > LEAST_SCALE)
        self._state = replace(self._state, guard=guard)
        return verdict

    def settle(self) -> Verdict | None:
        """`judge` at once; a checkpoint of now has nothing left to judge."""
        verdict = self.judge()
        self._latest[0] = NONE
        return verdict

    @torch.no_grad()
    def move(self, rate: float) -> Moved:
        """One update at a learning rate, unless its gradient is refused; `judge` comes first. No gradient is left."""
        gradients = [local(p.grad) for p in self._parameters if p.grad is not None]
        norm = self._norm()
        taken = (norm <= norm_limit(self._guard, self._state.guard)).to(torch.float32)
        self._clip(gradients, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._step(taken)
        self._optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.move(taken)
        self._note(norm)
        return Moved(norm, taken)

    def clip(self) -> Tensor:
        """Scale the gradients to `clip_norm` at most; return the norm they had, on the device."""
        norm = self._norm()
        self._clip([local(p.grad) for p in self._parameters if p.grad is not None], norm)
        return norm

    def is_finite(self) -> bool:
        """Whether all weights are; waits for the device."""
        weights = [part for p in self._parameters if (part := local(p.detach())).numel()]  # of shards, some are empty
        largest = listed._foreach_norm(weights, float("inf"))  # noqa: SLF001
        return bool(torch.isfinite(torch.stack(largest)).all())

    def roll_back(self, before: UpdaterState) -> None:
        """After a checkpoint was put back: go on slower than `before` it.

        Args:
            before: of the updater before the checkpoint was put back.
        """
        self._is_pending = False
        self._latest[0] = NONE
        self._state = UpdaterState(
            rate_factor=before.rate_factor * self._guard.rate_factor,
            roll_backs=before.roll_backs + 1,
            guard=replace(self._state.guard, streak=0, skipped=before.guard.skipped, overflows=before.guard.overflows),
        )

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The network has the weights within that are evaluated and kept as the model."""
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            yield

    def facts(self) -> dict[str, float]:
        """What is shown of it in a row of metrics; waits for the device where losses are scaled."""
        scale = {} if self._scale is None else {"guard/loss_scale": float(self._scale.value)}
        guard = self._state.guard
        overflows = {} if self._scale is None else {"guard/overflows": float(guard.overflows)}
        return {"guard/skipped": guard.skipped, "guard/rate_factor": self._state.rate_factor, **scale, **overflows}

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The live tensors beside the network's and the optimizer's, by file and name; a snapshot copies them."""
        own = {"latest": self._latest}
        if self._scale is not None:
            own |= {"scale": self._scale.value, "scale/sound": self._scale.sound}
        if self.average is None:
            return {UPDATER_FILE: own}
        means, updates = self.average.tensors()
        return {UPDATER_FILE: own | {"average/updates": updates}, AVERAGE_FILE: means}

    def load(self, state: UpdaterState) -> None:
        """Go on from `state`; weights and moments are put in already."""
        self._state = state
        prepare_moments(self._optimizer)
        self._host.copy_(self._latest)
        self._is_pending = self._host[0].item() != NONE

    def load_tensors(self, files: Mapping[str, bytes]) -> None:
        """Take back what `tensors` gave, out of a checkpoint's files; what they lack begins anew.

        Raises:
            IntegrityError: a file is damaged, or of another network.
        """
        own = read_tensors(files[UPDATER_FILE], where=UPDATER_FILE) if UPDATER_FILE in files else {}
        self._latest.copy_(own.get("latest", torch.tensor([NONE, LEAST_SCALE])))
        if self._scale is not None:
            self._scale.restart()
            if "scale" in own:
                self._scale.value.copy_(own["scale"])
                self._scale.sound.copy_(own["scale/sound"])
        if self.average is not None:
            self.average.restart()
            if AVERAGE_FILE in files:
                means = read_tensors(files[AVERAGE_FILE], where=AVERAGE_FILE)
                self.average.load(means, own["average/updates"])
        self.load(self._state)

    def _norm(self) -> Tensor:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return norm if self._scale is None else norm / self._scale.value

    def _clip(self, gradients: list[Tensor], norm: Tensor) -> None:
        """Bring scaled gradients back, to `clip_norm` at most, and their elements to `clip_value`."""
        factors = [] if self._scale is None else [1 / self._scale.value]
        if self._spec.clip_norm is not None:
            factors.append(torch.clamp(self._spec.clip_norm / (norm + 1e-6), max=1.0))
        if factors:
            listed._foreach_mul_(gradients, factors[0] if len(factors) == 1 else factors[0] * factors[1])
        if self._spec.clip_value is not None:
            listed._foreach_clamp_min_(gradients, -self._spec.clip_value)
            listed._foreach_clamp_max_(gradients, self._spec.clip_value)

    def _step(self, taken: Tensor) -> None:
        optimizer: Any = self._optimizer
        if not self._is_fused:
            if bool(taken):
                optimizer.step()
            return
        optimizer.found_inf = 1 - taken
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf

    def _note(self, norm: Tensor) -> None:
        """Keep what `judge` reads, and let the scale follow."""
        latest = [norm, torch.ones_like(norm) if self._scale is None else self._scale.value]
        self._latest.copy_(torch.stack([part.to(torch.float64) for part in latest]))
        self._host.copy_(self._latest, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._is_pending = True
        if self._scale is not None:
            self._scale.follow(torch.isfinite(norm))

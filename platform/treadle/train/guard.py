"""Which updates are taken: not those whose gradient is not finite, nor those far above what they use to be.

An update is judged twice, by one rule. On the device, where the optimizer leaves everything as it is when the norm is
above a limit; nobody waits for that. And on the host, one update later, when the norm has arrived: there it enters the
running mean that the next limit comes from, is counted and told. The norm is that of the gradients summed over all
ranks, so that all of them decide alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from treadle.spec import GuardSpec

__all__ = ["GuardState", "Verdict", "judged", "norm_limit"]

LARGEST = float(np.finfo(np.float32).max)
SPREAD = 4.0
"""Standard deviations of the logarithms that are no spike, however far from the mean they are."""
SPREAD_OVER = 100
"""Updates that the spread is a running mean of: longer than a streak that ends in a roll-back."""


@dataclass(frozen=True, kw_only=True)
class GuardState:
    """What the guard remembers.

    Args:
        log_mean: running mean of the logarithms of accepted norms: one large norm moves it little.
        accepted: updates in it.
        log_variance: running mean of their squared distances to it. A refused norm counts as one at the limit.
        streak: updates refused in a row. skipped: refused in all. overflows: those that fp16 had no room for.
    """

    log_mean: float = 0.0
    accepted: int = 0
    log_variance: float = 0.0
    streak: int = 0
    skipped: int = 0
    overflows: int = 0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of one update.

    Args:
        reason: "" for an update that was taken, else "overflow", "not finite" or "spike".
        norm: of its gradient, before clipping. limit: the largest that would have been taken.
    """

    reason: str
    norm: float
    limit: float

    @property
    def is_fault(self) -> bool:
        """Whether training has left its course: not where fp16 looks for its scale."""
        return self.reason in ("not finite", "spike")


def norm_limit(spec: GuardSpec, state: GuardState) -> float:
    """The largest gradient norm that is taken: `spike` times the mean, once there are enough to have one.

    Norms of a model that has nearly learned its rows lie far apart, and the largest have most to say: where they have
    spread so wide by themselves, the limit is further away. A value that fp32 holds exactly: the device and the host
    compare with the same number.
    """
    if spec.spike is None or state.accepted < spec.warmup_updates:
        return LARGEST
    log_limit = state.log_mean + _reach(spec.spike, state)
    return float(np.float32(min(LARGEST, math.exp(min(log_limit, math.log(LARGEST))))))


def judged(spec: GuardSpec, state: GuardState, norm: float, *, may_overflow: bool) -> tuple[GuardState, Verdict]:
    """What the guard remembers after an update, and what it says of it.

    Args:
        norm: of the summed gradient. may_overflow: the loss was scaled up, and can be scaled by less.
    """
    limit = norm_limit(spec, state)
    if norm <= limit:
        return _accepted(spec, state, norm), Verdict(reason="", norm=norm, limit=limit)
    if may_overflow and not math.isfinite(norm):
        return replace(state, overflows=state.overflows + 1), Verdict(reason="overflow", norm=norm, limit=limit)
    reason = "spike" if math.isfinite(norm) else "not finite"
    spread = state.log_variance
    if reason == "spike" and spec.spike is not None:
        spread += (_reach(spec.spike, state) ** 2 - spread) / SPREAD_OVER
    refused = replace(state, streak=state.streak + 1, skipped=state.skipped + 1, log_variance=spread)
    return refused, Verdict(reason=reason, norm=norm, limit=limit)


def _accepted(spec: GuardSpec, state: GuardState, norm: float) -> GuardState:
    if norm <= 0:  # nothing to be learned from: no logarithm either
        return replace(state, streak=0)
    accepted = state.accepted + 1
    # The mean of all until there are `warmup_updates`, and a running mean of about so many from there on.
    distance = math.log(norm) - state.log_mean if state.accepted else 0.0
    log_mean = state.log_mean + (math.log(norm) - state.log_mean) / min(accepted, spec.warmup_updates)
    spread = state.log_variance + (distance**2 - state.log_variance) / SPREAD_OVER
    return replace(state, log_mean=log_mean, accepted=accepted, log_variance=spread, streak=0)


def _reach(spike: float, state: GuardState) -> float:
    """How far above the mean a logarithm may be."""
    return max(math.log(spike), SPREAD * math.sqrt(state.log_variance))

"""Times to an event, some of them cut short: discrete hazards, Cox's partial likelihood, and how well risks rank.

Shape letters: B rows, J intervals of time (their J + 1 edges rise from 0), E event times.

A row has a time and says whether the event happened then (`events_B` True) or whether the row was last seen without
it (censored). Losses are sums in fp32 (fp64 beside fp64).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from treadle.errors import ConfigError, DataError
from treadle.nn.checks import check_numbers, check_rising, check_same_shape, refuse
from treadle.nn.gates import state_dtype

__all__ = [
    "CoxBaseline",
    "Ties",
    "check_edges",
    "concordance_index",
    "cox_loss_sum",
    "hazard_loss_sum",
    "risk_by",
    "survival_curve",
    "to_intervals",
]

_BLOCK = 1 << 22  # pairs compared at once by concordance_index


class Ties(enum.Enum):
    """How Cox's partial likelihood treats events at one time."""

    efron = "efron"
    """Each of d tied events finds the others gone to the share it would on average (Efron 1977)."""
    breslow = "breslow"
    """Each of d tied events finds all others still at risk (Breslow 1974); cheaper, biased towards 0."""


def to_intervals(times_B: Tensor, events_B: Tensor, edges: Sequence[float]) -> tuple[Tensor, Tensor]:
    """For each row the interval of its event, or how many intervals it is known to have survived.

    Source: Gensheimer and Narasimhan 2019, arXiv 1805.00917, section 2.1. An event at t falls into the interval with
    edges[j] <= t < edges[j + 1]; one from the last edge on counts as survival of all J. A censored row is given
    the intervals of which it lived at least half.

    Args:
        times_B: time of the event or of the last look, from 0, in the unit of the edges.
        events_B: True where the event happened.
        edges: J + 1 rising times, the first 0.

    Returns:
        intervals_B (int64, 0 to J) and events_B as `hazard_loss_sum` takes them.

    Raises:
        ConfigError: shapes that differ, events that are not bool, edges that do not rise from 0.
        DataError: a time that is negative or not finite; the message names the row.
    """
    check_edges(edges)
    _check_times(times_B, events_B)
    edges_J = torch.tensor(list(edges), dtype=torch.float64, device=times_B.device)
    middles_J = (edges_J[:-1] + edges_J[1:]) / 2
    times_B = times_B.double()
    failed_B = torch.searchsorted(edges_J[1:], times_B, right=True)
    survived_B = torch.searchsorted(middles_J, times_B, right=True)
    intervals_B = torch.where(events_B, failed_B, survived_B)
    return intervals_B, events_B & (intervals_B < len(edges) - 1)


def hazard_loss_sum(logits_BJ: Tensor, intervals_B: Tensor, events_B: Tensor) -> Tensor:
    """Negative log-likelihood of discrete hazards with right censoring, summed over rows.

    The hazard h_j = sigmoid(logit_j) is the chance of the event in interval j for a row that reached it. An event
    in interval j has the likelihood h_j (1 - h_0) ... (1 - h_{j-1}); a row that survived j intervals the same
    without h_j.

    Source: Gensheimer and Narasimhan 2019, arXiv 1805.00917, eq. 3.

    Args:
        logits_BJ: scores before the sigmoid.
        intervals_B: int64; 0 to J - 1 where the event happened, 0 to J (intervals survived) where not.
        events_B: True where the event happened.

    Raises:
        ConfigError: shapes that do not fit, or events that are not bool.
        DataError: an interval that does not exist; the message names the row.
    """
    num_intervals = logits_BJ.shape[-1]
    check_same_shape("intervals_B", intervals_B, logits_BJ[..., 0], "an interval of logits_BJ")
    if intervals_B.dtype != torch.int64:
        raise ConfigError(
            f"intervals_B: got {intervals_B.dtype}, expected torch.int64", hint="`to_intervals` gives them"
        )
    _check_events(events_B, intervals_B)
    rule = f"0 to {num_intervals - 1}, or {num_intervals} for a row that survived every interval"
    refuse("intervals_B", intervals_B, lambda x: (x < 0) | (x > num_intervals - events_B.long()), rule)
    logits_BJ = logits_BJ.to(state_dtype(logits_BJ.dtype))
    intervals_J = torch.arange(num_intervals, device=logits_BJ.device)
    # -log(1 - h) = softplus(logit) before the interval, -log h = softplus(-logit) in it.
    survived_BJ = intervals_J < intervals_B[:, None]
    failed_BJ = (intervals_J == intervals_B[:, None]) & events_B[:, None]
    signed_BJ = torch.where(failed_BJ, -logits_BJ, logits_BJ)
    return functional.softplus(signed_BJ).masked_fill(~(survived_BJ | failed_BJ), 0.0).sum()


def survival_curve(logits_BJ: Tensor) -> Tensor:
    """The chance of reaching each edge without the event, [B, J + 1]: 1 at the first, then falling."""
    return torch.exp(_log_survival(logits_BJ))


def risk_by(logits_BJ: Tensor, edges: Sequence[float], horizon: float) -> Tensor:
    """The chance of the event before `horizon`, [B], at a constant rate within each interval.

    Args:
        logits_BJ: scores before the sigmoid of J hazards.
        edges: J + 1 rising times, the first 0.
        horizon: a time from 0 to the last edge.

    Raises:
        ConfigError: edges that do not fit the scores, or a horizon beyond them.
    """
    check_edges(edges)
    if len(edges) != logits_BJ.shape[-1] + 1:
        raise ConfigError(
            f"edges: got {len(edges)}, expected {logits_BJ.shape[-1] + 1} for {logits_BJ.shape[-1]} intervals"
        )
    if not 0 <= horizon <= edges[-1]:
        raise ConfigError(f"horizon: got {horizon}, expected 0 to {edges[-1]}, the last edge")
    after = next(index for index in range(1, len(edges)) if horizon <= edges[index])
    share = (horizon - edges[after - 1]) / (edges[after] - edges[after - 1])
    log_survival = _log_survival(logits_BJ)
    # expm1 keeps small risks: 1 - exp(x) of a risk of 1e-9 is 0 in fp32.
    return -torch.expm1(torch.lerp(log_survival[..., after - 1], log_survival[..., after], share))


def _log_survival(logits_BJ: Tensor) -> Tensor:
    log_kept_BJ = functional.logsigmoid(-logits_BJ.to(state_dtype(logits_BJ.dtype)))
    return functional.pad(log_kept_BJ.cumsum(-1), (1, 0))


def cox_loss_sum(log_risk_B: Tensor, times_B: Tensor, events_B: Tensor, ties: Ties = Ties.efron) -> Tensor:
    """Cox's negative log partial likelihood, summed over events.

    Each event is weighed against the rows of *this batch* that were still at risk. So, unlike the other losses, it is
    not a sum over rows: splitting a batch changes it. Divide by the events; keep batches large, and unlike in time.

    Source: Cox 1972; ties: Efron 1977 or Breslow 1974.

    Args:
        log_risk_B: logarithm of each row's risk relative to the others.
        times_B: time of the event or of the last look, from 0. A row censored at the time of an event was at risk.
        events_B: True where the event happened.
        ties: what to do where events share a time.

    Returns:
        A scalar; 0, with zero gradients, for a batch without events.

    Raises:
        ConfigError: shapes that differ, or events that are not bool.
        DataError: a time that is negative or not finite; the message names the row.

    Cost: one sort; waits for the device to know how many events there are.
    """
    check_same_shape("times_B", times_B, log_risk_B, "log_risk_B")
    _check_times(times_B, events_B)
    order_B = times_B.argsort(descending=True, stable=True)
    # In float64: at log-risks of 1e4 the gradient of logcumsumexp is off by 2e-3 in fp32.
    risk_B = log_risk_B.double()[order_B]
    # The rows of one time share the risk set that ends with the last of them.
    _, group_B, sizes = torch.unique_consecutive(times_B[order_B], return_inverse=True, return_counts=True)
    failed_E = events_B[order_B].nonzero()[:, 0]
    group_E, risk_E = group_B[failed_E], risk_B[failed_E]
    at_risk_E = risk_B.logcumsumexp(0)[sizes.cumsum(0) - 1][group_E]
    if ties is Ties.efron:
        at_risk_E = at_risk_E + _efron(risk_E, group_E, at_risk_E, len(sizes))
    return (at_risk_E - risk_E).sum().to(state_dtype(log_risk_B.dtype))


def _efron(risk_E: Tensor, group_E: Tensor, at_risk_E: Tensor, num_groups: int) -> Tensor:
    """log(1 - l / d * tied / at risk) of the l-th of d tied events, from 0."""
    count_E = torch.bincount(group_E, minlength=num_groups)[group_E]
    first_E = torch.searchsorted(group_E, group_E)  # groups rise in this order
    place_E = torch.arange(len(group_E), device=group_E.device) - first_E
    with torch.no_grad():
        peak_E = risk_E.new_full((num_groups,), -torch.inf).scatter_reduce(0, group_E, risk_E, "amax")[group_E]
    tied = risk_E.new_zeros(num_groups).index_add(0, group_E, torch.exp(risk_E - peak_E))[group_E]
    share_E = torch.exp(tied.log() + peak_E - at_risk_E)
    return torch.log1p(-place_E.to(share_E.dtype) / count_E * share_E)


@dataclass(frozen=True, kw_only=True)
class CoxBaseline:
    """The cumulative hazard of a row of log-risk 0, which turns Cox's relative risks into chances.

    Source: Breslow 1972, in the discussion of Cox 1972; the estimator of that name, for either treatment of ties.

    Args:
        times_E: rising times at which events happened, float64.
        log_hazard_E: logarithm of the cumulative hazard from each of them on, float64.
    """

    times_E: Tensor
    log_hazard_E: Tensor

    @classmethod
    def fit(cls, log_risk_B: Tensor, times_B: Tensor, events_B: Tensor) -> CoxBaseline:
        """The baseline of rows that were not used to choose the model, or of the training rows.

        Raises:
            ConfigError: shapes that differ, or events that are not bool.
            DataError: a bad time or log-risk, or no event at all.
        """
        check_same_shape("times_B", times_B, log_risk_B, "log_risk_B")
        _check_times(times_B, events_B)
        check_numbers("log_risk_B", log_risk_B)
        if not bool(events_B.any()):
            raise DataError("events_B: got no event, expected one or more")
        order_B = times_B.argsort(descending=True, stable=True)
        times_B, failed_B = times_B[order_B].double(), events_B[order_B].double()
        at_risk_B = log_risk_B.detach().double()[order_B].logcumsumexp(0)
        times, group_B, sizes = torch.unique_consecutive(times_B, return_inverse=True, return_counts=True)
        num_failed = torch.zeros_like(times).index_add(0, group_B, failed_B)
        steps = num_failed.log() - at_risk_B[sizes.cumsum(0) - 1]
        kept = num_failed > 0
        return cls(times_E=times[kept].flip(0), log_hazard_E=steps[kept].flip(0).logcumsumexp(0))

    def survival(self, log_risk_B: Tensor, at_times: Sequence[float]) -> Tensor:
        """The chance of no event up to and including each of the given times, [B, times], float64."""
        return torch.exp(-self._hazard(log_risk_B, at_times))

    def risk_by(self, log_risk_B: Tensor, horizon: float) -> Tensor:
        """The chance of the event up to and including `horizon`, [B], float64."""
        return -torch.expm1(-self._hazard(log_risk_B, [horizon]))[:, 0]

    def _hazard(self, log_risk_B: Tensor, at_times: Sequence[float]) -> Tensor:
        at = torch.tensor(list(at_times), dtype=torch.float64, device=self.times_E.device)
        log_hazard = functional.pad(self.log_hazard_E, (1, 0), value=-torch.inf)
        found = log_hazard[torch.searchsorted(self.times_E, at, right=True)]
        return torch.exp(log_risk_B.double()[:, None] + found)


def concordance_index(risk_B: Tensor, times_B: Tensor, events_B: Tensor) -> float:
    """Share of comparable pairs in which the row with the earlier event has the higher risk; ties of risk count half.

    A pair is comparable where the event of one came before the time of the other, or at the time at which the other
    was censored. Two events at one time are not comparable.

    Source: Harrell et al. 1982, 1996.

    Args:
        risk_B: any score that rises with the risk.
        times_B: time of the event or of the last look, from 0.
        events_B: True where the event happened.

    Returns:
        0 to 1; 0.5 is what a constant or random risk gets.

    Raises:
        ConfigError: shapes that differ, or events that are not bool.
        DataError: a time or risk that is bad, or no comparable pair at all.

    Cost: events times rows comparisons.
    """
    check_same_shape("risk_B", risk_B, times_B, "times_B")
    _check_times(times_B, events_B)
    check_numbers("risk_B", risk_B)
    failed_E = events_B.nonzero()[:, 0]
    num_pairs = num_ordered = num_tied = 0
    for block_E in failed_E.split(max(1, _BLOCK // max(1, len(times_B)))):
        time_E1, risk_E1 = times_B[block_E, None], risk_B[block_E, None]
        comparable_EB = (time_E1 < times_B) | ((time_E1 == times_B) & ~events_B)
        num_pairs += int(comparable_EB.sum())
        num_ordered += int((comparable_EB & (risk_E1 > risk_B)).sum())
        num_tied += int((comparable_EB & (risk_E1 == risk_B)).sum())
    if num_pairs == 0:
        raise DataError("times_B: got no comparable pair, expected an event before the time of another row")
    return (num_ordered + num_tied / 2) / num_pairs


def check_edges(edges: Sequence[float]) -> None:
    """Edges of intervals rise from 0.

    Raises:
        ConfigError: not so.
    """
    rule = "two or more rising times, the first 0"
    check_rising("edges", edges, rule, low=0.0)
    if len(edges) < 2 or edges[0] != 0:
        raise ConfigError(f"edges: got {tuple(edges)}, expected {rule}")


def _check_events(events_B: Tensor, like_B: Tensor) -> None:
    if events_B.dtype != torch.bool or events_B.shape != like_B.shape or like_B.ndim != 1:
        raise ConfigError(
            f"events_B: got shape {tuple(events_B.shape)} of {events_B.dtype} beside {tuple(like_B.shape)}, "
            "expected torch.bool, one a row"
        )


def _check_times(times_B: Tensor, events_B: Tensor) -> None:
    _check_events(events_B, times_B)
    check_numbers("times_B", times_B, at_least=0.0)

"""From the outputs of a stack to scores: of a row, of a frame, of label frames, of numbers and of risks.

Shape letters: N frames of all rows laid end to end, S rows, B rows of a padded batch, T time steps, H outputs of the
stack, K classes, R numbers to predict, Q quantile levels, J intervals of time.

Heads of a row (`ClassifyHead`, `RegressionHead`, `HazardHead`, `CoxHead`) take packed frames and their `Rows`.
Heads of a frame (`TagHead`, `CtcHead`) take any leading shape and leave `rows` alone. The head of a language model is
in `language`.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from treadle.nn.checks import check_at_least, check_levels, member
from treadle.nn.gates import state_dtype
from treadle.nn.losses import gaussian_nll_sum, huber_loss_sum, pinball_loss_sum, squared_loss_sum
from treadle.nn.pooling import AttentionPooling, RowPooling
from treadle.nn.rows import Lengths, Rows
from treadle.nn.survival import (
    Ties,
    check_edges,
    cox_loss_sum,
    hazard_loss_sum,
    risk_by,
    survival_curve,
    to_intervals,
)
from treadle.spec import Pooling

__all__ = [
    "ClassifyHead",
    "CoxHead",
    "CtcHead",
    "HazardHead",
    "Regression",
    "RegressionHead",
    "TagHead",
]

_Pooling = Pooling | str | AttentionPooling


class TagHead(nn.Module):
    """Scores of the classes of each frame."""

    frames_per_step = 1

    def __init__(self, input_size: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_size, num_classes)

    def forward(self, h_NH: Tensor, rows: Rows | None = None) -> Tensor:
        """logits_NK, [..., K] from [..., H]."""
        del rows
        return self.linear(h_NH)


class CtcHead(nn.Module):
    """Scores of blank (0) and labels (1 to `num_labels`), `frames_per_step` label frames a time step.

    Raises:
        ConfigError: fewer than one label frame a time step.
    """

    def __init__(self, input_size: int, num_labels: int, frames_per_step: int = 1) -> None:
        super().__init__()
        check_at_least("frames_per_step", frames_per_step, 1)
        self.frames_per_step = frames_per_step
        self.num_classes = num_labels + 1
        self.linear = nn.Linear(input_size, frames_per_step * self.num_classes)

    def forward(self, h_NH: Tensor, rows: Rows | None = None) -> Tensor:
        """Scores of label frames, in order: [N * frames_per_step, K] from [N, H], [B, T * frames_per_step, K] from
        [B, T, H]; they are in the layout that the frames were in.
        """
        del rows
        *leading, num_steps, _ = h_NH.shape
        return self.linear(h_NH).view(*leading, num_steps * self.frames_per_step, self.num_classes)

    def padded(self, h_NH: Tensor, rows: Rows) -> Tensor:
        """logits_BTK of packed frames as `ctc_loss_sum` takes them, zeros at padded label frames."""
        scores_BT = rows.pad(self.linear(h_NH))  # the label frames of a time step side by side
        return scores_BT.view(rows.num_rows, -1, self.num_classes)

    def label_lengths(self, lengths_B: Lengths) -> Tensor:
        """How many label frames rows of so many time steps have; on the CPU."""
        return torch.as_tensor(lengths_B, dtype=torch.int64, device="cpu") * self.frames_per_step


class _RowLinear(nn.Module):
    """A linear layer over one vector a row."""

    def __init__(self, input_size: int, num_outputs: int, pooling: _Pooling, num_directions: int) -> None:
        super().__init__()
        self.pool = RowPooling(pooling, input_size, num_directions)
        self.linear = nn.Linear(self.pool.output_size, num_outputs)

    def outputs(self, h_NH: Tensor, rows: Rows) -> Tensor:
        return self.linear(self.pool(h_NH, rows).to(self.linear.weight.dtype))


class ClassifyHead(_RowLinear):
    """Scores of the classes from one vector a row.

    Args:
        input_size: outputs of the stack, H.
        num_classes: K.
        pooling: last, mean, max or attention, or an `AttentionPooling` of one's own. `pool.attention(h_NH, rows)`
            gives the pooled rows and the weights of the frames.
        num_directions: 1 or 2; only `last` asks.

    Raises:
        ConfigError: an unknown pooling, or sizes that do not fit.
    """

    frames_per_step = 1

    def __init__(
        self, input_size: int, num_classes: int, pooling: _Pooling = Pooling.mean, num_directions: int = 1
    ) -> None:
        super().__init__(input_size, num_classes, pooling, num_directions)

    def forward(self, h_NH: Tensor, rows: Rows) -> Tensor:
        """logits_SK.

        Raises:
            ConfigError: frames that are not the rows'.
        """
        return self.outputs(h_NH, rows)


class Regression(enum.Enum):
    """What a `RegressionHead` predicts of a number."""

    point = "point"
    """The number itself."""
    quantile = "quantile"
    """Its quantiles at given levels, which never cross."""
    gaussian = "gaussian"
    """The mean and the log-variance of a normal distribution."""


class RegressionHead(_RowLinear):
    """Numbers from one vector a row. Targets are expected to be of size 1 or so: normalise them.

    Args:
        input_size: outputs of the stack, H.
        num_targets: numbers to predict, R.
        kind: what to predict of them: point, quantile or gaussian.
        levels: for quantiles, Q rising numbers between 0 and 1.
        huber_delta: for points, where the squared error becomes a line; squared everywhere where None.
        log_variance_floor: for gaussian, the least log-variance; without one, a target that the mean meets exactly
            has an unbounded likelihood. -10 is a standard deviation of 0.0067.
        pooling: last, mean, max or attention, or an `AttentionPooling` of one's own.
        num_directions: 1 or 2; only `last` asks.

    Raises:
        ConfigError: an unknown kind or pooling, levels that do not rise, sizes that do not fit.
    """

    frames_per_step = 1

    def __init__(
        self,
        input_size: int,
        num_targets: int = 1,
        kind: Regression | str = Regression.point,
        *,
        levels: Sequence[float] = (0.1, 0.5, 0.9),
        huber_delta: float | None = None,
        log_variance_floor: float = -10.0,
        pooling: _Pooling = Pooling.mean,
        num_directions: int = 1,
    ) -> None:
        kind = member(Regression, "kind", kind)
        check_levels(levels)
        if huber_delta is not None:
            check_at_least("huber_delta", huber_delta, 0.0, above=True)
        width = {Regression.point: 1, Regression.quantile: len(levels), Regression.gaussian: 2}[kind]
        super().__init__(input_size, num_targets * width, pooling, num_directions)
        self.kind = kind
        self.num_targets = num_targets
        self.levels = tuple(levels)
        self.huber_delta = huber_delta
        self.log_variance_floor = log_variance_floor

    def forward(self, h_NH: Tensor, rows: Rows) -> Tensor:
        """Predictions in fp32 (fp64 beside fp64): [S, R] of points, [S, R, Q] of quantiles in rising order, or
        [S, R, 2] of means and log-variances.

        Raises:
            ConfigError: frames that are not the rows'.
        """
        raw = self.outputs(h_NH, rows)
        raw = raw.to(state_dtype(raw.dtype))
        if self.kind is Regression.point:
            return raw
        first, *more = raw.unflatten(-1, (self.num_targets, -1)).unbind(-1)
        if self.kind is Regression.gaussian:
            # Smooth, so that a log-variance pushed below the floor still has a gradient to come back by.
            floor = self.log_variance_floor
            return torch.stack((first, floor + functional.softplus(more[0] - floor)), dim=-1)
        # One addition after the other, not cumsum: a parallel sum may round a level below the one before.
        return torch.stack([*itertools.accumulate((functional.softplus(step) for step in more), initial=first)], dim=-1)

    def loss_sum(self, predictions: Tensor, targets_SR: Tensor) -> Tensor:
        """The loss of the kind, summed over rows and targets, in fp32: squared or Huber, pinball, or gaussian.

        Args:
            predictions: what `forward` gave.
            targets_SR: the numbers.

        Raises:
            ConfigError: shapes that do not fit.
            DataError: a target that is not finite; the message names its place.
        """
        if self.kind is Regression.quantile:
            return pinball_loss_sum(predictions, targets_SR, self.levels)
        if self.kind is Regression.gaussian:
            return gaussian_nll_sum(predictions[..., 0], predictions[..., 1], targets_SR)
        if self.huber_delta is None:
            return squared_loss_sum(predictions, targets_SR)
        return huber_loss_sum(predictions, targets_SR, self.huber_delta)


class HazardHead(_RowLinear):
    """Chances of an event in each interval of time, for rows that reached it, from one vector a row.

    Source: Gensheimer and Narasimhan 2019, arXiv 1805.00917 (flexible baseline).

    Args:
        input_size: outputs of the stack, H.
        edges: J + 1 rising times, the first 0; equal shares of the events between them serve well.
        pooling: last, mean, max or attention, or an `AttentionPooling` of one's own.
        num_directions: 1 or 2; only `last` asks.

    Raises:
        ConfigError: edges that do not rise from 0, an unknown pooling, sizes that do not fit.
    """

    frames_per_step = 1

    def __init__(
        self, input_size: int, edges: Sequence[float], pooling: _Pooling = Pooling.mean, num_directions: int = 1
    ) -> None:
        check_edges(edges)
        super().__init__(input_size, len(edges) - 1, pooling, num_directions)
        self.edges = tuple(edges)

    def forward(self, h_NH: Tensor, rows: Rows) -> Tensor:
        """logits_SJ, whose sigmoids are the hazards.

        Raises:
            ConfigError: frames that are not the rows'.
        """
        return self.outputs(h_NH, rows)

    def loss_sum(self, logits_SJ: Tensor, times_S: Tensor, events_S: Tensor) -> Tensor:
        """Negative log-likelihood of the times, summed over rows; see `to_intervals` and `hazard_loss_sum`.

        Raises:
            ConfigError: shapes that do not fit, or events that are not bool.
            DataError: a time that is negative or not finite; the message names the row.
        """
        return hazard_loss_sum(logits_SJ, *to_intervals(times_S, events_S, self.edges))

    def survival_curve(self, logits_SJ: Tensor) -> Tensor:
        """The chance of reaching each edge without the event, [S, J + 1]."""
        return survival_curve(logits_SJ)

    def risk_by(self, logits_SJ: Tensor, horizon: float) -> Tensor:
        """The chance of the event before `horizon`, [S].

        Raises:
            ConfigError: a horizon beyond the last edge.
        """
        return risk_by(logits_SJ, self.edges, horizon)


class CoxHead(_RowLinear):
    """The logarithm of each row's risk relative to the others, from one vector a row.

    `survival.CoxBaseline`, fitted on the scores of the training rows, turns it into chances.

    Source: Cox 1972; Katzman et al. 2018, arXiv 1606.00931.

    Args:
        input_size: outputs of the stack, H.
        pooling: last, mean, max or attention, or an `AttentionPooling` of one's own.
        num_directions: 1 or 2; only `last` asks.
        ties: what to do where events share a time.

    Raises:
        ConfigError: an unknown pooling or treatment of ties, sizes that do not fit.
    """

    frames_per_step = 1

    def __init__(
        self,
        input_size: int,
        pooling: _Pooling = Pooling.mean,
        num_directions: int = 1,
        *,
        ties: Ties | str = Ties.efron,
    ) -> None:
        super().__init__(input_size, 1, pooling, num_directions)
        self.ties = member(Ties, "ties", ties)
        self.linear = nn.Linear(self.pool.output_size, 1, bias=False)  # a bias would cancel in the likelihood

    def forward(self, h_NH: Tensor, rows: Rows) -> Tensor:
        """log_risk_S.

        Raises:
            ConfigError: frames that are not the rows'.
        """
        return self.outputs(h_NH, rows)[:, 0]

    def loss_sum(self, log_risk_S: Tensor, times_S: Tensor, events_S: Tensor) -> Tensor:
        """Negative log partial likelihood within this batch, summed over events; see `cox_loss_sum`.

        Raises:
            ConfigError: shapes that differ, or events that are not bool.
            DataError: a time that is negative or not finite; the message names the row.
        """
        return cox_loss_sum(log_risk_S, times_S, events_S, self.ties)

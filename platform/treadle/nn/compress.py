"""What a smaller model costs and saves: bytes, time, and how far its answers move. Measured, never assumed.

Shape letters: B rows, T time steps, K classes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from treadle.errors import ConfigError
from treadle.nn.hybrid import HybridStack
from treadle.nn.network import Network
from treadle.nn.rows import Lengths, Rows
from treadle.nn.stack import RecurrentStack

__all__ = ["Batch", "Limits", "Metric", "Report", "compare", "latencies_s", "outputs_of", "serialised_bytes"]

Metric = Callable[[nn.Module], float]
"""How good a module is on held-out rows; higher is better."""

_CALLS = 9


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Held-out rows.

    Args:
        x: frames_BTD or tokens_BT.
        lengths: frames of each row; None where all rows are full.
    """

    x: Tensor
    lengths: Lengths | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a compressed module may cost before it is refused; None leaves a thing out.

    Args:
        speedup: least latency before / latency after.
        relative_error: most root-mean-square change of the outputs, in root-mean-squares of the outputs.
        agreement: least share of rows (or frames) whose best class stays.
        metric_drop: most that the metric may fall.
    """

    speedup: float | None = 1.0
    relative_error: float | None = 0.1
    agreement: float | None = None
    metric_drop: float | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was measured; None where nothing was asked for.

    Args:
        kept: False where the compressed module was refused.
        reason: why it was, or "".
        bytes_before, bytes_after: parameters and buffers as a state dict holds them.
        latency_before_s, latency_after_s: of one call on the first batch: medians of calls in turn, on the CPU with
            as many threads as torch has.
        num_rows, num_steps: shape of that batch.
        max_error, mean_error: change of an output, largest and mean.
        relative_error: root-mean-square change over root-mean-square output.
        agreement: share of rows (or frames) whose best class stays.
        metric_before, metric_after: of the caller's metric.
    """

    kept: bool
    reason: str = ""
    bytes_before: int
    bytes_after: int
    latency_before_s: float | None = None
    latency_after_s: float | None = None
    num_rows: int = 0
    num_steps: int = 0
    max_error: float | None = None
    mean_error: float | None = None
    relative_error: float | None = None
    agreement: float | None = None
    metric_before: float | None = None
    metric_after: float | None = None

    @property
    def smaller(self) -> float:
        """Bytes before over bytes after."""
        return self.bytes_before / self.bytes_after

    @property
    def faster(self) -> float | None:
        """Latency before over latency after."""
        if self.latency_before_s is None or self.latency_after_s is None:
            return None
        return self.latency_before_s / self.latency_after_s


def serialised_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers as a state dict holds them, shared ones once."""
    seen = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in module.state_dict().values()}
    return sum(seen.values())


def compare(
    original: nn.Module,
    compressed: nn.Module,
    batches: Sequence[Batch] = (),
    metric: Metric | None = None,
    *,
    limits: Limits | None = None,
) -> Report:
    """What the compressed module saves, and how far its answers move on held-out rows.

    Args:
        original: a RecurrentStack or a Network.
        compressed: the same, smaller.
        batches: held-out rows; without any, no time and no error.
        metric: called with either module.
        limits: beyond which the report says kept=False; None keeps everything.

    Cost: 20 calls on the first batch, two on each other one, and two of the metric.
    """
    report = Report(kept=True, bytes_before=serialised_bytes(original), bytes_after=serialised_bytes(compressed))
    modes = [(module, module.training) for module in (original, compressed)]
    with torch.no_grad():
        try:
            for module, _ in modes:
                module.eval()
            if batches:
                report = _with_errors(report, original, compressed, batches)
                report = _with_latency(report, original, compressed, batches[0])
            if metric is not None:
                report = replace(report, metric_before=metric(original), metric_after=metric(compressed))
        finally:
            for module, training in modes:
                module.train(training)
    reason = "" if limits is None else _refusal(report, limits)
    return replace(report, kept=not reason, reason=reason)


def outputs_of(module: nn.Module, batch: Batch) -> Tensor:
    """Outputs of a stack, or scores of a network.

    Raises:
        ConfigError: neither of them.
    """
    if isinstance(module, (RecurrentStack, HybridStack)):
        return module(batch.x, lengths=batch.lengths, final_state=False)[0]
    if isinstance(module, Network):
        return module(batch.x, batch.lengths)
    raise ConfigError(f"module: got {type(module).__name__}, expected a RecurrentStack, a HybridStack or a Network")


def _with_errors(report: Report, original: nn.Module, compressed: nn.Module, batches: Sequence[Batch]) -> Report:
    before_MK = torch.cat([_answers(original, batch) for batch in batches]).double()
    after_MK = torch.cat([_answers(compressed, batch) for batch in batches]).double()
    if before_MK.shape != after_MK.shape:
        return report  # a stack with fewer units has other outputs
    change_MK = (after_MK - before_MK).abs()
    return replace(
        report,
        max_error=float(change_MK.max()),
        mean_error=float(change_MK.mean()),
        relative_error=float(change_MK.square().mean().sqrt() / before_MK.square().mean().sqrt()),
        agreement=float((before_MK.argmax(1) == after_MK.argmax(1)).double().mean()),
    )


def _answers(module: nn.Module, batch: Batch) -> Tensor:
    """The outputs of real rows and frames, one a line."""
    y = outputs_of(module, batch)
    if y.ndim == 2 or batch.lengths is None:
        return y.flatten(0, -2)
    lengths = module.label_lengths(batch.lengths) if isinstance(module, Network) else batch.lengths
    return Rows.of_lengths(lengths, device=y.device, padded=(y.shape[0], y.shape[1])).pack(y)


def _with_latency(report: Report, original: nn.Module, compressed: nn.Module, batch: Batch) -> Report:
    before_s, after_s = latencies_s([lambda: outputs_of(original, batch), lambda: outputs_of(compressed, batch)])
    num_rows, num_steps = batch.x.shape[:2]
    return replace(report, latency_before_s=before_s, latency_after_s=after_s, num_rows=num_rows, num_steps=num_steps)


def latencies_s(calls: Sequence[Callable[[], object]], repeats: int = _CALLS) -> list[float]:
    """The median time of each call, taken in turn so that all meet the same machine."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(repeats):
        for call, taken in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken) for taken in times]


def _refusal(report: Report, limits: Limits) -> str:
    """What is beyond the limits, or ""."""
    drop = None
    if report.metric_before is not None and report.metric_after is not None:
        drop = report.metric_before - report.metric_after
    checks = (
        ("speedup", report.faster, limits.speedup, 1),
        ("relative_error", report.relative_error, limits.relative_error, -1),
        ("agreement", report.agreement, limits.agreement, 1),
        ("metric_drop", drop, limits.metric_drop, -1),
    )
    found = [
        f"{name}: got {got:.3g}, expected {limit:.3g} or {'more' if sign > 0 else 'less'}"
        for name, got, limit, sign in checks
        # A comparison with NaN is false: only what is within its limit passes.
        if got is not None and limit is not None and not got * sign >= limit * sign
    ]
    if report.bytes_after >= report.bytes_before:
        found.append(f"bytes: got {report.bytes_after}, expected fewer than {report.bytes_before}")
    return "; ".join(found)

"""What the gated scan costs on the CPU: the compiled one beside the plain torch loop, the machine's copy rate and the
projection that feeds it.

Everything is taken in turn in one process, one thread, in CPU time, medians; results are allocated anew on every call,
as in training. An element is a channel of a frame.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from recording import record
from torch import Tensor
from torch.nn import functional

from treadle import native as build
from treadle.nn import loop, native
from treadle.nn.gates import Candidate, GateForm

ROUNDS = 9
Case = tuple[int, int, int, torch.dtype, GateForm, Candidate, bool]  # rows, frames a row, channels, ..., all options
FULL, SMALL = (32, 512, 256), (4, 32, 64)
FP32, BF16 = torch.float32, torch.bfloat16


def cases() -> list[Case]:
    full = [(*FULL, dtype, form, Candidate.g, False) for dtype in (FP32, BF16) for form in GateForm]
    options = [
        (*FULL, FP32, GateForm.mingru, Candidate.tanh, False),
        (*FULL, FP32, GateForm.mingru, Candidate.identity, False),
        (*FULL, FP32, GateForm.mingru, Candidate.g, True),
    ]
    small = [
        (*size, dtype, GateForm.mingru, Candidate.g, False) for size in (SMALL, (1, 1, 256)) for dtype in (FP32, BF16)
    ]
    return [*full, *options, *small]


def took_s(run: Callable[[], object], at_least_s: float = 0.002) -> float:
    """CPU time of one call; short ones are repeated."""
    count = 0
    started = time.thread_time()
    while True:
        run()
        count += 1
        if (passed := time.thread_time() - started) > at_least_s:
            return passed / count


def medians(*runs: Callable[[], object]) -> list[float]:
    for run in runs:
        run()
    taken = [[took_s(run) for run in runs] for _ in range(ROUNDS)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def copy_bytes_per_s() -> float:
    """Read and written, between buffers that no cache holds."""
    source, target = torch.ones(2**25), torch.empty(2**25)
    (seconds,) = medians(lambda: target.copy_(source))
    return 2 * source.numel() * 4 / seconds


def projection_s(num_frames: int, num_hidden: int, num_gates: int) -> float:
    """The fp32 projection that gives the pre-activations, with both gradients."""
    x_ND = torch.randn(num_frames, num_hidden, requires_grad=True)
    weight_GD = torch.randn(num_gates * num_hidden, num_hidden, requires_grad=True)
    grad_NG = torch.ones(num_frames, num_gates * num_hidden)

    def step() -> None:
        torch.autograd.grad(functional.linear(x_ND, weight_GD), (x_ND, weight_GD), grad_NG)

    return medians(step)[0]


def measured(case: Case, copy_rate: float) -> tuple[str, ...]:
    num_rows, length, num_hidden, dtype, form, candidate, options = case
    num_frames, num_gates = num_rows * length, form.num_gates
    h0_SH = torch.zeros(num_rows, num_hidden)
    extra: tuple[Tensor | None, ...] = (None, None, None)
    if options:
        extra = (torch.rand(num_frames) < 0.01, torch.zeros(num_hidden), torch.rand(num_frames, num_hidden).to(dtype))
    pre_NG = torch.randn(num_frames, num_gates * num_hidden).to(dtype)
    rest = (h0_SH, torch.arange(num_rows + 1) * length, *extra, form.value, candidate.value, False, length)
    grad_NH, grad_SH = torch.randn(num_frames, num_hidden).to(dtype), torch.zeros_like(h0_SH)
    h_NH, _ = native.forward(pre_NG, *rest)
    ahead, back, loop_ahead, loop_back = medians(
        lambda: native.forward(pre_NG, *rest),
        lambda: native.backward(grad_NH, grad_SH, pre_NG, h_NH, *rest),
        lambda: loop.forward(pre_NG, *rest),
        lambda: loop.backward(grad_NH, grad_SH, pre_NG, h_NH, *rest),
    )
    elements = num_frames * num_hidden
    floor = elements * dtype.itemsize / copy_rate  # of one number an element
    numbers = (num_gates + 1, 2 * num_gates + 2) if not options else (num_gates + 2, 2 * num_gates + 4)
    name = f"{form.name}, {candidate.name}{', starts and decay' if options else ''}"
    return (
        f"B{num_rows} T{length} H{num_hidden} {str(dtype).removeprefix('torch.')}",
        name,
        f"{1e9 * ahead / elements:.2f}",
        f"{1e9 * back / elements:.2f}",
        f"{1e3 * (ahead + back):.3g} ms",
        f"{numbers[0] * floor / ahead:.0%} / {numbers[1] * floor / back:.0%}" if elements > 2**20 else "",
        f"{(ahead + back) / projection_s(num_frames, num_hidden, num_gates):.1%}" if elements > 2**20 else "",
        f"{(loop_ahead + loop_back) / (ahead + back):.1f}",
    )


def compile_s() -> tuple[float, float]:
    """Wall time to have a kernel where there is none, and where there is one."""
    with tempfile.TemporaryDirectory() as name:
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            kernel, detail = build.find([Path(name)], build.COMPILERS, native.SOURCE, native.SELF_CHECK)
            seconds.append(time.perf_counter() - started if kernel else math.nan)
        print(detail)
        return seconds[0], seconds[1]


def main() -> None:
    torch.set_num_threads(1)
    if not native.status().available:
        raise SystemExit(native.status().detail)
    first, again = compile_s()
    rate = copy_bytes_per_s()
    rows = [measured(case, rate) for case in cases()]
    rows.append((f"kernel compiled and checked in {first:.1f} s, found again in {1e3 * again:.1f} ms", *[""] * 7))
    rows.append((f"copy rate, read and written: {rate / 1e9:.1f} GB/s", *[""] * 7))
    headers = [
        "size",
        "form, candidate",
        "forward, ns/element",
        "backward, ns/element",
        "both",
        "of the copy rate",
        "of its fp32 projection",
        "plain torch loop, times as long",
    ]
    record("scan", "The gated scan on one CPU thread", "python tests/bench/scan.py", headers, rows)


if __name__ == "__main__":
    main()

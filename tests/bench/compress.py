"""Smaller and faster models for the CPU: what int8 weights, fewer units and onnxruntime save, and what they cost.

    python tests/bench/compress.py [--quick] [--kinds LSTM GRU]

Task: which of 24 random walks (12 frames of 24 features) hides in a row of 64 frames of noise. For each cell a network
of 2 layers of 256 units is trained, and its forms are judged on 2,000 held-out rows (at 98 % accuracy, 95 times out of
100 right to 0.6 %). "Half the units" are the better half by their scores on training rows, trained on for two thirds
as long. Times are CPU time of one call on one thread, medians, all forms of a cell in turn.

The figure to beat, as it is quoted for recognisers on telephones (the family of He et al. 2018, arXiv 1811.06621): 5.6
times smaller and 4 times faster at the same accuracy.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from recording import record
from torch import Tensor, nn
from torch.nn import functional

from treadle.nn import GRU, LSTM, RNN, MinGRU, MinLSTM
from treadle.nn.compress import serialised_bytes
from treadle.nn.export import export_onnx
from treadle.nn.heads import ClassifyHead
from treadle.nn.network import Network
from treadle.nn.prune import prune_units
from treadle.nn.quantize import quantize

CLASSES, FEATURES, MOTIF, STEPS, HIDDEN = 24, 24, 12, 64, 256
BATCH, HELD_OUT = 32, 2000
KINDS = {"RNN": RNN, "LSTM": LSTM, "GRU": GRU, "MinGRU": MinGRU, "MinLSTM": MinLSTM}
HEADERS = ("cell", "form", "bytes", "smaller", "accuracy", "B=1, CPU ms", "faster", "B=16, CPU ms", "faster")


@dataclass(frozen=True)
class Form:
    """One form of a trained model.

    Args:
        name: as printed.
        num_bytes: its weights, or its file.
        call: logits of a batch.
    """

    name: str
    num_bytes: int
    call: Callable[[Tensor], Tensor]


class Task:
    """Rows of noise, each with one of the trajectories in it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        walks = torch.randn(CLASSES, MOTIF, FEATURES, generator=generator).cumsum(1)
        self.motifs = walks / walks.square().mean((1, 2), keepdim=True).sqrt()

    def rows(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, STEPS, FEATURES, generator=generator)
        labels = torch.randint(CLASSES, (count,), generator=generator)
        places = torch.randint(STEPS - MOTIF, (count,), generator=generator)
        frames = places[:, None] + torch.arange(MOTIF)
        x[torch.arange(count)[:, None], frames] += 0.42 * self.motifs[labels]
        return x, labels


def train(network: Network, task: Task, num_updates: int, *, learning_rate: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_updates)
    network.train()
    for _ in range(num_updates):
        x, labels = task.rows(BATCH, generator)
        optimizer.zero_grad()
        functional.cross_entropy(network(x), labels).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    network.eval()


def forms(network: Network, task: Task, num_updates: int, folder: Path) -> Iterator[Form]:
    yield Form("fp32", serialised_bytes(network), network)
    yield int8_form("int8", network)
    yield onnx_form("onnxruntime fp32", network, folder)
    yield onnx_form("onnxruntime int8", network, folder, int8=True)
    x, labels = task.rows(256, torch.Generator().manual_seed(3))
    pruned, _ = prune_units(network, HIDDEN // 2, lambda module: functional.cross_entropy(module(x), labels))
    train(pruned, task, num_updates * 2 // 3, learning_rate=2e-3, seed=4)
    yield Form("half the units", serialised_bytes(pruned), pruned)
    yield int8_form("half the units, int8", pruned)
    yield onnx_form("half the units, onnxruntime int8", pruned, folder, int8=True)


def int8_form(name: str, network: Network) -> Form:
    quantised, report = quantize(network)
    return Form(name, report.bytes_after, quantised)


def onnx_form(name: str, network: Network, folder: Path, *, int8: bool = False) -> Form:
    report = export_onnx(network, folder / "network.onnx", int8=int8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session: Any = onnxruntime.InferenceSession(str(report.path), options, providers=["CPUExecutionProvider"])

    def call(x: Tensor) -> Tensor:
        lengths = np.full(x.shape[0], x.shape[1])
        return torch.from_numpy(session.run(None, {"x": x.numpy(), "lengths": lengths})[0])

    return Form(name, report.num_bytes, call)


def accuracy(form: Form, x: Tensor, labels: Tensor) -> float:
    hits = [
        form.call(part).argmax(1) == expected for part, expected in zip(x.split(100), labels.split(100), strict=True)
    ]
    return float(torch.cat(hits).double().mean())


def medians_ms(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """CPU milliseconds of each call; they take turns."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):  # the first turn warms up
        for call, taken in zip(calls, times, strict=True):
            begin = time.process_time()
            call()
            if turn:
                taken.append(1e3 * (time.process_time() - begin))
    return [statistics.median(taken) for taken in times]


def table(kind: str, found: list[Form], task: Task, *, repeats: int) -> list[tuple[object, ...]]:
    x, labels = task.rows(HELD_OUT, torch.Generator().manual_seed(5))
    times = [medians_ms([functools.partial(form.call, batch) for form in found], repeats) for batch in (x[:1], x[:16])]
    lines = []
    for index, form in enumerate(found):
        line: list[object] = [kind, form.name, f"{form.num_bytes:,}", f"{found[0].num_bytes / form.num_bytes:.1f}x"]
        line.append(f"{100 * accuracy(form, x, labels):.1f} %")
        for taken in times:
            line += [f"{taken[index]:.2f}", f"{taken[0] / taken[index]:.1f}x"]
        lines.append(tuple(line))
        print(*line, sep=" | ", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the training, and nothing kept")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    task, lines, num_updates = Task(), [], 30 if options.quick else 300
    with tempfile.TemporaryDirectory() as name:
        for kind in options.kinds:
            torch.manual_seed(1)
            layers: dict[str, Any] = {"norm": True, "conv_size": 4} if kind.startswith("Min") else {}
            stack = KINDS[kind](FEATURES, HIDDEN, 2, residual=True, **layers)
            network = Network(embedding=None, dropout=0.0, stack=stack, head=ClassifyHead(HIDDEN, CLASSES, "max"))
            train(network, task, num_updates, learning_rate=1e-3 if kind == "RNN" else 3e-3, seed=2)
            found = list(forms(network, task, num_updates, Path(name)))
            with torch.inference_mode():
                lines += table(kind, found, task, repeats=5 if options.quick else 41)
    if not options.quick:
        command = "python tests/bench/compress.py"
        record("compress", "Smaller and faster models on one CPU core", command, HEADERS, lines)


if __name__ == "__main__":
    main()

"""What the guard, the mean of weights and the comparison of replicas add to an update, on one core.

Peer: clip_grad_norm_ and a fused step, side by side with ours in one process; medians of interleaved rounds.
`python tests/bench/updater.py [--brief]`
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from recording import record
from torch import nn

from treadle.spec import AdamWSpec, ClassifySpec, DataSpec, GruSpec, JobSpec, OptimSpec, StoreSpec
from treadle.train.optim import build_optimizer
from treadle.train.precision import PrecisionChoice
from treadle.train.replicas import weights_hash
from treadle.train.updater import Updater

SIZES = {"0.6 M": (160, 4), "10 M": (640, 4)}


def job(optim: OptimSpec) -> JobSpec:
    return JobSpec(
        name="x",
        task=ClassifySpec(),
        model=GruSpec(),
        data=DataSpec(name="x"),
        optim=optim,
        store=StoreSpec(uri="/nowhere"),
    )


def network(hidden: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.GRU(hidden, hidden, layers)


def give(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)


def bare(hidden: int, layers: int) -> Callable[[], float]:
    model = network(hidden, layers)
    optimizer = build_optimizer(AdamWSpec(), model)

    def move() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _given(model, move)


def ours(hidden: int, layers: int, *, precision: str = "fp32", ema: float | None = None) -> Callable[[], float]:
    model = network(hidden, layers)
    spec = job(AdamWSpec(ema=ema))
    optimizer = build_optimizer(spec.optim, model)
    choice = PrecisionChoice(name=precision, device="cpu", why="", probe_ms={})
    updater = Updater(spec, model, optimizer, choice)

    def move() -> None:
        updater.judge()
        updater.move(1e-3)

    return _given(model, move)


def hashed(hidden: int, layers: int) -> Callable[[], float]:
    model = network(hidden, layers)
    return lambda: _seconds(lambda: weights_hash(model))


def _given(model: nn.Module, move: Callable[[], None]) -> Callable[[], float]:
    def timed() -> float:
        give(model)
        return _seconds(move)

    return timed


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--brief", action="store_true", help="few rounds, nothing is written")
    brief = parser.parse_args().brief
    torch.set_num_threads(1)
    rows = []
    for name, size in SIZES.items():
        cases = {
            "clip and step": bare(*size),
            "guard": ours(*size),
            "guard, fp16 scale": ours(*size, precision="fp16"),
            "guard, mean of weights": ours(*size, ema=0.999),
            "hash of the weights": hashed(*size),
        }
        times: dict[str, list[float]] = {case: [] for case in cases}
        for _ in range(10 if brief else 100):
            for case, call in cases.items():
                times[case].append(call())
        least = statistics.median(times["clip and step"])
        for case, seen in times.items():
            ms = statistics.median(seen)
            rows.append([name, case, f"{1000 * ms:.2f} ms", f"{ms / least:.2f}"])
    headers = ["weights", "update", "median", "of clip and step"]
    if brief:
        print("\n".join(" | ".join(map(str, row)) for row in (headers, *rows)))
        return
    record("updater", "An update beside its guard", "python tests/bench/updater.py", headers, rows)


if __name__ == "__main__":
    main()

"""Trains in a process whose address space is limited; prints parts, distance of the weights, and how too little ends.

Run with `MALLOC_MMAP_THRESHOLD_=65536 MALLOC_ARENA_MAX=1`: what is freed is given back, and counts no more.
"""

from __future__ import annotations

import dataclasses
import resource
from pathlib import Path

import torch
from train_rig import SGD, Toy, frames_draft, toy_spec, weights

from treadle.data import Row
from treadle.errors import InfeasibleError
from treadle.spec import BatchSpec, ClassifySpec, DataSpec, GruSpec, Leak, SplitSpec, TrainSpec
from treadle.train import Run, fit


def address_space(field: str) -> int:
    """Bytes of it that are taken: "VmSize" now, "VmPeak" at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def limit(num_bytes: int) -> None:
    """Let the process take no more than so many bytes beyond what it has."""
    resource.setrlimit(resource.RLIMIT_AS, (address_space("VmSize") + num_bytes, resource.RLIM_INFINITY))


def toy(rows: int, *, longest: int = 0) -> Toy:
    spec = toy_spec(
        task=ClassifySpec(),
        model=GruSpec(hidden_size=128, num_layers=2),
        data=DataSpec(name="toy", allow_leaks=[Leak.feature]),
        split=SplitSpec(),
        batch=BatchSpec(max_slots="64k", lanes=1),
        train=TrainSpec(epochs=1),
        optim=dataclasses.replace(SGD, lr=1e-3),
    )
    draft = frames_draft(rows)
    if longest:
        draft = dataclasses.replace(
            draft, rows=[Row(entity="long", inputs=torch.zeros(longest, 4).numpy(), target="x")]
        )
    return Toy(spec, draft)


def parts_of(run: Run) -> int:
    return max((facts["parts"] for facts in run.track.told("split")), default=1)  # type: ignore[attr-defined]


def main() -> None:
    torch.set_num_threads(1)
    data, long = toy(3000), toy(1, longest=12_000)
    for part in (toy(6), data):
        whole = part.run()
        before = address_space("VmSize")
        fit(whole)  # the first one makes what libraries make once
    peak = address_space("VmPeak") - before
    run, last = data.run(), long.run()
    limit(int(0.6 * peak))
    fit(run)
    print(parts_of(run), float((weights(run) - weights(whole)).abs().max()), f"{peak / 2**20:.0f} MiB")
    limit(48 << 20)
    try:
        fit(last)
    except InfeasibleError as error:
        print(error.message.splitlines()[0])


main()

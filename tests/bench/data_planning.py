"""Plans of one epoch beside those of transformers and lhotse: padding, the hard budget, balance over ranks, and cost.

The reference lengths are log-normal with a long tail (median 60, up to 2,000 frames), 8 ranks, a budget of 6,272
slots, which is 64 rows of mean length. Times are CPU seconds of one thread until one rank has all its batches.
"""

from __future__ import annotations

import torch
from data_peers import RANKS, ROWS, SLOTS, Quality, planners, quality, reference_lengths, steps_of
from recording import record

DEFAULT = "treadle, noise 0.05 (default)"
HEADERS = (
    "plan",
    "padded share of slots",
    "worst batch / budget",
    "slots, mean / max of ranks",
    "length, mean / max of ranks",
    "slowest ranks' lengths, summed",
    "/ treadle",
    "CPU time of a plan",
    "/ treadle",
)


def row(name: str, found: Quality, ours: Quality) -> tuple[object, ...]:
    return (
        name,
        f"{found.padded:.1%}",
        f"{found.worst:.3g}",
        f"{found.cells:.3f}",
        f"{found.time:.3f}",
        f"{found.serial:,}",
        f"{found.serial / ours.serial:.2f}",
        f"{1e3 * found.plan_s:,.0f} ms",
        f"{found.plan_s / ours.plan_s:.3g}",
    )


def main() -> None:
    lengths_N = reference_lengths()
    found: dict[str, Quality] = {}
    for planner in planners():
        steps, plan_s = steps_of(planner, lengths_N)
        found[planner.name] = quality(steps, lengths_N, plan_s)
    ours = found[DEFAULT]
    rows = [row(name, one, ours) for name, one in found.items()]
    title = f"Plans of {ROWS:,} rows on {RANKS} ranks with a budget of {SLOTS:,} slots"
    record("data_planning", title, "python tests/bench/data_planning.py", HEADERS, rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

"""Padding and the worst batch of an epoch: treadle's plan beside shuffled batches of a fixed number of rows.

The reference lengths are log-normal with a long tail (median 60, up to 2,000 time steps), 8 ranks.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
from recording import record

from treadle.plan import plan_epoch
from treadle.spec import BatchSpec

ROWS, SLOTS, RANKS, FIXED = 100_000, 6272, 8, 64


def lengths() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.clip(np.exp(rng.normal(4.1, 0.98, ROWS)), 1, 2000).astype(np.int64)


def shuffled(lengths_N: np.ndarray) -> tuple[float, float]:
    """Padded share and worst batch / budget of what torch's DataLoader(shuffle=True) and pad_sequence give."""
    order = np.random.default_rng(1).permutation(len(lengths_N))
    batches = [lengths_N[order[i : i + FIXED]] for i in range(0, len(order), FIXED)]
    slots = [len(batch) * int(batch.max()) for batch in batches]
    return 1 - lengths_N.sum() / sum(slots), max(slots) / SLOTS


def main() -> None:
    lengths_N = lengths()
    rows = [("shuffled batches of 64 rows, padded", *(f"{v:.3g}" for v in shuffled(lengths_N)), "")]
    for noise in (0.0, 0.05):
        times = []
        for epoch in range(5):
            started = time.perf_counter()
            plan = plan_epoch(lengths_N, BatchSpec(slots=SLOTS, noise=noise), lanes=RANKS, seed=0, epoch=epoch)
            times.append(time.perf_counter() - started)
        name = f"treadle, noise {noise:g}{' (default)' if noise else ''}"
        worst = plan.worst_slots / SLOTS
        rows.append((name, f"{1 - plan.fill:.3g}", f"{worst:.3g}", f"{1000 * statistics.median(times):.0f} ms"))
    headers = ["plan", "padded share of slots", "worst batch / budget", "time to plan an epoch"]
    record("batching", "Batches of 100,000 rows on 8 ranks", "make bench", headers, rows)


if __name__ == "__main__":
    main()

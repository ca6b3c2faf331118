"""Padding, balance and cost of an epoch's plan, beside shuffled batches of a fixed number of rows.

The reference lengths are log-normal with a long tail (median 60, up to 2,000 time steps), 8 ranks.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc

import numpy as np
from recording import record

from treadle.plan import EpochPlan, explain, plan_epoch
from treadle.spec import BatchSpec, Budget, LongRows

ROWS, SLOTS, RANKS, FIXED = 100_000, 6272, 8, 64
PLANS = {
    "treadle, noise 0": BatchSpec(max_slots=str(SLOTS), noise=0.0),
    "treadle, noise 0.05 (default)": BatchSpec(max_slots=str(SLOTS)),
    "treadle, noise 0.1": BatchSpec(max_slots=str(SLOTS), noise=0.1),
    "treadle, time steps a multiple of 8": BatchSpec(max_slots=str(SLOTS), multiple_of=8),
    "treadle, budget of frames": BatchSpec(max_slots=str(SLOTS), budget=Budget.frames),
    "treadle, budget of 1,000, long rows in pieces": BatchSpec(max_slots="1000", long_rows=LongRows.chunk),
}


def lengths(num_rows: int = ROWS) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.clip(np.exp(rng.normal(4.1, 0.98, num_rows)), 1, 2000).astype(np.uint32)


def shuffled(lengths_N: np.ndarray) -> tuple[float, ...]:
    """Padded share, worst batch / budget and balances of torch's DataLoader(shuffle=True) and pad_sequence."""
    order = np.random.default_rng(1).permutation(len(lengths_N))
    batches = [lengths_N[order[i : i + FIXED]] for i in range(0, len(order), FIXED)]
    longest = np.array([int(batch.max()) for batch in batches])
    slots = longest * np.array([len(batch) for batch in batches])
    dealt = longest[: len(batches) // RANKS * RANKS].reshape(-1, RANKS)  # the next batch to the next rank
    balance = dealt.mean(axis=1).sum() / dealt.max(axis=1).sum()
    return 1 - lengths_N.sum() / slots.sum(), slots.max() / SLOTS, balance, balance


def timed(lengths_N: np.ndarray, batch: BatchSpec, times: int) -> tuple[EpochPlan, float]:
    """A plan, and the seconds of one core that an epoch's takes."""
    found = []
    for epoch in range(times):
        started = time.process_time()
        plan = plan_epoch(lengths_N, batch, lanes=RANKS, seed=0, epoch=epoch)
        found.append(time.process_time() - started)
    return plan, statistics.median(found)


def memory(lengths_N: np.ndarray, batch: BatchSpec) -> tuple[float, float]:
    """Bytes a row that a plan keeps, and that planning takes at its peak, beside the lengths."""
    tracemalloc.start()
    plan = plan_epoch(lengths_N, batch, lanes=RANKS, seed=0, epoch=0)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept / plan.num_entries, peak / plan.num_entries


def plans() -> None:
    lengths_N = lengths()
    rows = [("shuffled batches of 64 rows, padded", *(f"{v:.3g}" for v in shuffled(lengths_N)), "", "", "", "")]
    cases = [(name, lengths_N, batch, 9) for name, batch in PLANS.items()]
    cases += [(f"the default, {n // 10**6} M rows", lengths(n), PLANS["treadle, noise 0.05 (default)"], 3)
              for n in (10**6, 10**7)]  # fmt: skip
    for name, data, batch, times in cases:
        plan, took_s = timed(data, batch, times)
        started = time.process_time()
        found = explain(plan, ranks=RANKS)
        explained_s = time.process_time() - started
        shares = (found.pad, found.worst_over_budget, found.cells_balance, found.time_balance)
        costs = (f"{1000 * took_s:.0f} ms", f"{1000 * explained_s:.1f} ms", *(f"{v:.1f}" for v in memory(data, batch)))
        rows.append((name, *(f"{share:.3g}" for share in shares), *costs))
    headers = ["plan", "padded share of slots", "worst batch / budget", "balance of slots", "balance of time steps"]
    headers += ["to plan an epoch", "to explain it", "bytes a row kept", "at the peak"]
    record("batching", "Batches of 100,000 rows on 8 ranks", "make bench", headers, rows)


def variation(plan: EpochPlan, turn: list[int]) -> float:
    """Of the mean length of an update's rows, between updates: deviation / mean."""
    frames_G, rows_G = plan.frames_GL.sum(axis=1), plan.rows_GL.sum(axis=1)
    each = -(-plan.num_rounds // plan.num_updates)
    groups = [turn[i : i + each] for i in range(0, len(turn), each)]
    means = [frames_G[group].sum() / rows_G[group].sum() for group in groups]
    return float(np.std(means) / np.mean(means))


def updates() -> None:
    rows = []
    for rounds in (1, 2, 4, 8):
        found = []
        for epoch in range(9):
            batch = BatchSpec(max_slots=str(SLOTS), rounds_per_update=rounds)
            plan = plan_epoch(lengths(), batch, lanes=RANKS, seed=0, epoch=epoch)
            means = [plan.update_frames(u) / plan.update_rows(u) for u in range(plan.num_updates)]
            anyhow = np.random.default_rng(epoch).permutation(plan.num_rounds).tolist()
            found.append((np.std(means) / np.mean(means), variation(plan, anyhow)))
        rows.append((rounds, *(f"{statistics.median(column):.2f}" for column in zip(*found, strict=True))))
    headers = ["rounds an update", "one of each zone", "all rounds shuffled together"]
    record("batching_updates", "How much updates differ in the mean length of their rows", "make bench", headers, rows)


def rounds() -> None:
    rows = []
    for num_rows in (300, 1000, 3000, 10_000, 30_000, 100_000):
        cells: list[str] = []
        for lanes in (1, 2, 8, 32):
            plan = plan_epoch(lengths(num_rows), BatchSpec(max_slots=str(SLOTS)), lanes=lanes, seed=0, epoch=0)
            found = explain(plan, ranks=lanes)
            cells.append(f"{found.rounds}: {found.pad:.0%}, {found.time_balance:.2f}")
        rows.append((f"{num_rows:,}", *cells))
    headers = ["rows", *(f"{lanes} lanes: rounds, padding, balance of time steps" for lanes in (1, 2, 8, 32))]
    record("batching_rounds", "Few rounds pad", "make bench", headers, rows)


if __name__ == "__main__":
    plans()
    updates()
    rounds()

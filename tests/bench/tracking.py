"""What one row of metrics costs the training loop: the run's own journal beside W&B's `run.log` (offline)."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import wandb
from recording import record

from treadle.store import Journal
from treadle.store.local import LocalBlobs

ROUNDS, ROWS = 5, 400
METRICS = {f"group/metric_{i}": 0.1 * i for i in range(11)}


def microseconds(log: Callable[[int], object]) -> float:
    started = time.perf_counter()
    for update in range(ROWS):
        log(update)
    return 1e6 * (time.perf_counter() - started) / ROWS


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
        run = wandb.init(mode="offline", dir=folder, project="bench", settings=settings)
        journal = Journal(LocalBlobs(Path(folder)), "metrics.jsonl", writer="bench")
        times = [
            (
                microseconds(lambda update: journal.append({"update": update, "metrics": METRICS})),
                microseconds(lambda update: run.log({"update": update, **METRICS})),
            )
            for _ in range(ROUNDS)
        ]
        journal.close()
        run.finish()
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(theirs / ours for ours, theirs in times)
    rows = [
        ("treadle's journal, flushed", f"{ours:.0f} us", "1x"),
        ("wandb offline, run.log", f"{theirs:.0f} us", f"{ratio:.1f}x"),
    ]
    record("tracking", "One row of 11 metrics", "make bench", ["where", "per row", "ratio"], rows)


if __name__ == "__main__":
    main()

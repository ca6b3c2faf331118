"""One update on one long row: the whole row at once, in chunks with exact gradients, in chunks with truncated ones.

Each run is a process of its own, on one thread, since a process keeps memory it once had. Gradients are compared with
those of the whole row in float64.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recording import record
from torch import Tensor, nn

from treadle.nn import LSTM, MinGRU
from treadle.nn.footprint import ChunkPlan, measure_footprint, plan_chunk
from treadle.nn.long import train_in_chunks

BUDGET = 64 * 2**20
MIB = 2**20
CELLS = {"MinGRU": MinGRU, "LSTM": LSTM}


class Task:
    """A stack that follows a slow sine through noise; frames are made when they are asked for."""

    def __init__(self, cell: str, num_frames: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        self.num_frames = num_frames
        self.stack = CELLS[cell](8, 32, 2).to(dtype)
        self.head = nn.Linear(32, 1).to(dtype)
        self.parameters = [*self.stack.parameters(), *self.head.parameters()]

    def run_frames(self, first: int, stop: int, state: Any) -> tuple[Tensor, Any]:
        index_TD = torch.arange(first, stop)[:, None] * torch.tensor([3, 701, 1223, 1777, 2203, 2741, 3301, 3907])
        x_TD = (index_TD % 6283).float().div_(1000).sin_().to(self.dtype)
        y_BTH, state = self.stack(x_TD[None], state)
        return (self.head(y_BTH)[0, :, 0] - x_TD[:, 0]).square().sum() / self.num_frames, state

    def plan(self) -> ChunkPlan:
        def run(length: int) -> tuple[Tensor, Any]:
            fresh = {name: part.requires_grad_() for name, part in self.stack.initial_state(1).items()}
            return self.run_frames(0, length, fresh)

        footprint = measure_footprint(run, frames=512)
        fixed = footprint.fixed_bytes + MIB  # what is no tensor
        per_frame, per_state = footprint.bytes_per_frame, footprint.bytes_per_state
        return plan_chunk(BUDGET, per_frame, per_state, self.num_frames, fixed_bytes=fixed)


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(cell: str, num_frames: int, way: str, grads_path: str) -> dict[str, float]:
    """One update, in this process."""
    torch.set_num_threads(1)
    task = Task(cell, num_frames, torch.float64 if way == "reference" else torch.float32)
    plan = task.plan()

    def run(index: int, state: Any) -> tuple[Tensor, Any]:
        span = plan.span(index)
        return task.run_frames(span.start, span.stop, state)

    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    before, started = memory("VmHWM"), time.process_time()
    if way in ("whole", "reference"):
        loss, _ = task.run_frames(0, num_frames, None)
        loss.backward()
        loss_sum = loss.item()
    else:
        loss_sum = train_in_chunks(run, plan.num_chunks, exact=way == "exact").loss_sum.item()
    took, grown = time.process_time() - started, memory("VmHWM") - before
    grads = [parameter.grad for parameter in task.parameters if parameter.grad is not None]
    np.save(grads_path, torch.cat([grad.flatten() for grad in grads]).double().numpy())
    planned = plan.planned_bytes if way == "exact" else 0
    return {"took": took, "grown": grown, "planned": planned, "chunks": plan.num_chunks, "loss": loss_sum}


def measured(folder: Path, cell: str, num_frames: int, way: str, environment: dict[str, str]) -> dict[str, Any]:
    """The same in a process of its own."""
    path = folder / f"{cell}-{num_frames}-{way}.npy"
    command = [sys.executable, __file__, cell, str(num_frames), way, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return {**json.loads(done.stdout), "grads": np.load(path)}


def main() -> None:
    fixed = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks go back at once
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for cell, num_frames in (("MinGRU", 100_000), ("MinGRU", 1_000_000), ("LSTM", 100_000)):
            true = measured(Path(name), cell, num_frames, "reference", fixed)["grads"]
            whole: dict[str, Any] = {}
            for way in ("whole", "exact", "truncated"):
                found = measured(Path(name), cell, num_frames, way, fixed)
                usual = measured(Path(name), cell, num_frames, way, {})
                whole = whole or found
                error = np.linalg.norm(found["grads"] - true) / np.linalg.norm(true)
                rows.append(
                    (
                        cell,
                        f"{num_frames:,}",
                        way,
                        1 if way == "whole" else int(found["chunks"]),
                        f"{found['planned'] / MIB:.0f}" if found["planned"] else "",
                        f"{found['grown'] / MIB:.0f}",
                        f"{usual['grown'] / MIB:.0f}",
                        f"{found['took']:.1f} s",
                        f"{found['took'] / whole['took']:.2f}",
                        f"{error:.1e}",
                    )
                )
    headers = ["layers", "frames", "gradients", "chunks", "planned MiB", "peak MiB", "peak MiB, glibc as it comes"]
    headers += ["CPU time", "/ whole", "relative error of gradients"]
    title = f"One update on one row, two layers of 32 units, chunks planned for {BUDGET // MIB} MiB, fp32, one thread"
    record("long_rows", title, "python tests/bench/long_rows.py", headers, rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])))
    else:
        main()

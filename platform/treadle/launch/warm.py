"""What a rank needs imported, built and opened before its first update; done once, before any rank is forked."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path

import torch
import torch.distributed as _distributed  # noqa: F401
from torch import nn

import treadle.launch.rank as _rank  # noqa: F401
from treadle.data.load.gather_native import best_gather
from treadle.nn import scan_backends

__all__ = ["num_threads", "warm_up"]


def warm_up() -> None:
    """Pay for first calls: torch imports its compiler with the first optimizer, which takes as long as torch itself.

    Stays on one thread, because ranks are forked from this process: a lock that another thread holds at that moment
    would never be given back.
    """
    torch.set_num_threads(1)
    if torch.get_num_interop_threads() != 1:  # may be said once only
        torch.set_num_interop_threads(1)
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.sum().backward()
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    optimizer.step()
    scan_backends()
    best_gather()
    with contextlib.suppress(ImportError):
        importlib.import_module("pandas")  # pyarrow does so with its first array that becomes numpy's


def num_threads() -> int:
    """Threads of this process, as the kernel counts them; 1 where it does not say."""
    folder = Path("/proc/self/task")
    return len(list(folder.iterdir())) if sys.platform == "linux" and folder.is_dir() else 1

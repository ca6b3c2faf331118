"""What the machine and the process around a run are: keys, source, packages, capacity."""

from __future__ import annotations

import importlib.metadata
import netrc
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import treadle
from treadle import wire
from treadle.plan import Capacity
from treadle.store import Blobs

__all__ = [
    "code_facts",
    "default_store",
    "environment_digest",
    "has_wandb_key",
    "local_capacity",
    "package_folder",
    "wandb_folder",
]


def default_store() -> str:
    """$TREADLE_STORE, else ~/.treadle/store."""
    return os.environ.get("TREADLE_STORE") or str(Path.home() / ".treadle" / "store")


def has_wandb_key() -> bool:
    """Whether wandb will find a key: in the environment, or in ~/.netrc for its server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    server = os.environ.get("WANDB_BASE_URL", "wandb")
    return any(host in server or "wandb" in host for host in hosts)


def wandb_folder(blobs: Blobs, run: str) -> Path:
    """Where wandb keeps its own files of a run: beside the run, else below ~/.treadle."""
    return blobs.local_path(f"runs/{run}/wandb") or Path.home() / ".treadle" / "wandb" / run


def package_folder() -> Path:
    """The folder of the `treadle` package that is running."""
    return Path(treadle.__file__).resolve().parent


def code_facts() -> dict[str, Any]:
    """The git commit of the checkout that runs, and whether it has changes; else the version."""
    checkout = package_folder().parents[1]
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return {"git": f"treadle {treadle.__version__}", "dirty": False}
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        return {"git": commit, "dirty": bool(_git(checkout, "status", "--porcelain", "--untracked-files=no"))}
    except (subprocess.SubprocessError, OSError):
        return {"git": f"treadle {treadle.__version__}", "dirty": False}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def environment_digest() -> str:
    """sha256 over name and version of every installed package."""
    found = {(d.name or "").lower(): d.version for d in importlib.metadata.distributions()}
    return wire.digest(sorted(f"{name}=={version}" for name, version in found.items()))


def local_capacity(*, count_gpus: bool) -> Capacity:
    """What this machine offers. GPUs are counted only where asked: it loads torch."""
    gpus = 0
    if count_gpus:
        import torch

        gpus = torch.cuda.device_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Capacity(where="this machine", cpus=len(os.sched_getaffinity(0)), gpus=gpus, memory_bytes=memory)

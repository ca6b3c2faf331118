"""A printed table that is also kept, with what it was measured on."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["record"]

RESULTS = Path(__file__).resolve().parent / "results"


def record(
    name: str, title: str, command: str, headers: Sequence[str], rows: Sequence[Sequence[object]], *, keep: bool = True
) -> None:
    """Print a Markdown table and, unless it is not to be kept, write it to results/<name>.md."""
    line = "| " + " | ".join(headers) + " |"
    rule = "| " + " | ".join("---" for _ in headers) + " |"
    body = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    text = "\n".join([f"# {title}", "", f"`{command}`, {_machine()}", "", line, rule, *body, ""])
    print(text)
    if not keep:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")


def _machine() -> str:
    installed = {name for name in ("torch", "ray") if importlib.util.find_spec(name)}  # a GPU image may lack Ray
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "ray") if name in installed)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    when = dt.datetime.now(dt.UTC).date()
    return f"{len(os.sched_getaffinity(0))} CPU cores ({_cpu()}), {versions}, {when}, commit {commit.stdout.strip()}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"

"""What the command line costs before it does anything: `make bench`.

Child CPU time against a bare `python -c pass` of the same round, medians; and the wall time of refusals.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from recording import record

ROUNDS = 7
BIN = Path(sys.executable).parent
TREADLE = [sys.executable, "-P", "-m", "treadle"]
COMMANDS: dict[str, list[str]] = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "treadle --help": [*TREADLE, "--help"],
    "treadle ls": [*TREADLE, "ls"],
    "treadle status RUN (unknown)": [*TREADLE, "status", "nothing"],
    "treadle plan JOB (unknown job)": [*TREADLE, "plan", "nothing"],
    "treadle plan g2p (5 mistakes)": [
        *TREADLE,
        "plan",
        "g2p",
        "model=lst",
        "optim.lrr=1",
        "train.epochs=0",
        "+x=1",
        "split.seed=a",
    ],
    "ray --help": [str(BIN / "ray"), "--help"],
    "wandb --help": [str(BIN / "wandb"), "--help"],
}


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """CPU and wall seconds of one run."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    with tempfile.TemporaryDirectory() as store:
        environment = os.environ | {"TREADLE_STORE": store}
        rounds = [{name: measure(command, environment) for name, command in COMMANDS.items()} for _ in range(ROUNDS)]
    bare = "python -c pass"
    rows = []
    for name in COMMANDS:
        ratio = statistics.median(r[name][0] / r[bare][0] for r in rounds)
        rows.append((f"`{name}`", f"{ratio:.1f}x", f"{statistics.median(r[name][1] for r in rounds):.2f} s"))
    record("startup", "Start-up of the command line", "make bench", ["command", "CPU / bare Python", "wall"], rows)


if __name__ == "__main__":
    main()

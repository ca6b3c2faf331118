"""Every shipped job, trained as its card says: `make jobs`. Prints and records quality and time.

`--source PATH` names the folder of the Japanese Vowels files; without it the job fetches them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from recording import record

CELLS = ("gru", "lstm", "mingru", "minlstm")


def treadle(store: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "treadle", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TREADLE_STORE": store})
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", help="folder of the Japanese Vowels files")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as store:
        source = [f"data.source={Path(given.source).resolve()}"] if given.source else []
        treadle(store, "prepare", "vowels", *source)
        for cell in CELLS:
            found, seconds = [], []
            for seed in range(given.seeds):
                started = time.monotonic()
                run = treadle(store, "submit", "vowels", f"model={cell}", f"train.seed={seed}", *source)
                seconds.append(time.monotonic() - started)
                found.append(run["metrics"]["test/accuracy"])
            shown = " / ".join(f"{value:.4f}" for value in found)
            rows.append(("vowels", cell, "test accuracy", shown, "0.96", f"{sorted(seconds)[len(seconds) // 2]:.0f} s"))
        treadle(store, "prepare", "g2p")
        started = time.monotonic()
        run = treadle(store, "submit", "g2p")
        seconds = time.monotonic() - started
        for name, words in (("phone_error_rate", "phone error rate"), ("word_error_rate", "word error rate")):
            rows.append(
                ("g2p", "lstm", f"test {words}", f"{run['metrics'][f'test/{name}']:.4f}", "", f"{seconds:.0f} s")
            )
    headers = ["job", "cell", "metric", f"measured ({given.seeds} seeds for vowels)", "at least", "submit to end"]
    record("jobs", "Shipped jobs", "make jobs", headers, rows)


if __name__ == "__main__":
    main()

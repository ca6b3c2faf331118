"""A run of two ranks of Ray Train under random faults, one every 20 s, beside one that is left alone.

It ends in the very weights of the other, with every update once in its history, and the table says what was done to it.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
from process_rig import Trial, check_exact, toy, trial

from treadle.spec import CheckpointSpec, ClusterSpec, TrainSpec

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))
from recording import record

STILL_S = 3.0
BEGUN_S = 60.0


def lost_rank(run: Trial, rng: random.Random) -> None:
    os.kill(run.pid(rng.randrange(2)), signal.SIGKILL)


def lost_ranks(run: Trial, rng: random.Random) -> None:
    for rank in (0, 1):
        os.kill(run.pid(rank), signal.SIGKILL)


def lost_agent(run: Trial, rng: random.Random) -> None:
    os.kill(run.pid(rng.randrange(2), of="agent"), signal.SIGKILL)


def still_rank(run: Trial, rng: random.Random) -> None:
    pid = run.pid(rng.randrange(2))
    os.kill(pid, signal.SIGSTOP)
    time.sleep(STILL_S)
    os.kill(pid, signal.SIGCONT)


def lost_actor(run: Trial, rng: random.Random) -> None:
    psutil.Process(run.pid(rng.randrange(2), of="agent")).parent().kill()


def lost_controller(run: Trial, rng: random.Random) -> None:
    (found,) = [p for p in run.family() if "TrainController" in " ".join(p.cmdline())]
    found.kill()


def lost_driver(run: Trial, rng: random.Random) -> None:
    run.die()
    run.resume()


def ended_driver(run: Trial, rng: random.Random) -> None:
    assert run.driver is not None
    os.kill(run.driver.process.pid, signal.SIGTERM)
    run.end()
    if run.status.state.value == "stopped":
        run.start()


FAULTS: dict[str, tuple[float, Callable[[Trial, random.Random], None]]] = {
    "kill -9 of a rank": (8, lost_rank),
    "kill -9 of both ranks": (3, lost_ranks),
    "kill -9 of an agent, with its rank": (3, lost_agent),
    f"SIGSTOP of a rank for {STILL_S:.0f} s": (3, still_rank),
    "kill -9 of an actor of Ray Train": (1, lost_actor),
    "kill -9 of Ray Train's controller": (1, lost_controller),
    "kill -9 of the driver, resume": (2, lost_driver),
    "SIGTERM of the driver, start again": (1, ended_driver),
}


def disturb(run: Trial, every_s: float, rng: random.Random) -> tuple[Counter[str], Counter[str]]:
    """Until its end; what was injected, and what was in the middle of something else and was not."""
    done: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    at = time.monotonic() + BEGUN_S
    while True:
        while time.monotonic() < at:
            time.sleep(0.1)
            assert run.driver is not None
            if run.status.end is not None and not run.driver.is_alive():
                if run.status.state.value == "finished":
                    return done, missed
                print(f"{run.status.end.status.value}: {run.status.end.error}; resumed", flush=True)
                done["the attempt gave up, resume"] += 1
                run.driver.release()
                run.resume()
        at = time.monotonic() + every_s
        name = rng.choices(list(FAULTS), [weight for weight, _ in FAULTS.values()])[0]
        try:
            FAULTS[name][1](run, rng)
            done[name] += 1
        except (psutil.NoSuchProcess, ProcessLookupError, ValueError):  # it is just being replaced
            missed[name] += 1
        print(f"{time.strftime('%H:%M:%S')} update {run.update}: {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6600, help="half an hour on two cores")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two faults")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    spec = toy(
        train=TrainSpec(epochs=given.epochs, seed=3, log_every="1s"),
        checkpoint=CheckpointSpec(every="5s", keep_last=3),
        cluster=ClusterSpec(workers=2, max_failures=100_000),
    )
    with tempfile.TemporaryDirectory() as folder, trial(Path(folder, "whole"), spec) as whole:
        whole.start()
        with trial(Path(folder, "disturbed"), spec) as run:
            began = time.monotonic()
            run.start()
            done, missed = disturb(run, given.every, random.Random(given.seed))
            took_s = time.monotonic() - began
            whole.end(seconds=7200)
            check_exact(run, whole)
            fresh = sum(bool(row["is_fresh"]) for row in run.events("regrouped"))
            rows: list[tuple[object, object]] = [*sorted(done.items())]
            rows += [
                ("faults in all", sum(done.values())),
                ("chosen, but what it hits was just being replaced", sum(missed.values())),
                ("minutes", f"{took_s / 60:.1f}"),
                ("updates", run.num_updates),
                ("attempts", run.status.attempt),
                ("ranks that were replaced beside one that went on", len(run.events("rejoined"))),
                ("restored from a checkpoint, all ranks", fresh),
                ("points twice in the history", 0),
                ("weights bit-equal to the run left alone", "yes"),
            ]
    record("soak", "A random fault every 20 s", "make soak", ("what", "count"), rows)


if __name__ == "__main__":
    main()

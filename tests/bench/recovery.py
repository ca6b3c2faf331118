"""Recovery after kill -9 of a process that trains: treadle beside plain Ray Train and torchft.

    python tests/bench/recovery.py [--torchft FOLDER] [--rounds 3] [--kills 2] [--arms ARM ...] [--quick]

Two ranks on this machine train the same network on rows made up on the spot. In every round each arm runs once, in
turn, and loses ranks 0 and 1 by turns: the same as the other arms, after as many updates since it last was whole.
Measured is the time from SIGKILL to the next update that all ranks finished and that had not been reached before, so
that what is made again counts; also the first update of any kind, updates made twice, and the bits of the final
weights. `FOLDER` holds torchft (`pip install --no-deps --target FOLDER torchft==0.2.0`); without it that arm is left
out. About a minute an arm and round.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from recording import record
from recovery_marks import WORLD, Arm, Kill, Recovery, read_recovery, update_ms, wait_for
from recovery_peers import Peer
from recovery_treadle import NETWORK, PER_EPOCH, Treadle, prepare_store

EVERY = 20
"""Updates between checkpoints."""
GAP = (25, 64)
"""Least and most updates before a kill since the ranks were last whole."""
PLAIN = "Ray Train, as it comes"
TORCHFT = "torchft 0.2.0 in Ray Train"
LIGHTHOUSE = {"min_replicas": 1, "join_timeout_ms": 1000, "heartbeat_timeout_ms": 3000}


@dataclass
class Outcome:
    """What an arm came to over all rounds: recoveries by (round, kill), final weights, and why it failed."""

    recoveries: dict[tuple[int, int], Recovery] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)
    pace_ms: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def follow(arm: Arm, plan: list[tuple[int, int]]) -> list[Recovery]:
    """Kill as `plan` says: (updates since the ranks were whole, rank)."""
    found: list[Recovery] = []
    base = 0
    for gap, rank in plan:
        kill = wait_for(partial(strike, arm, base + gap, rank), f"update {base + gap}")
        found.append(wait_for(lambda kill=kill: read_recovery(arm.look(), kill), f"recovery of rank {rank}"))
        base = found[-1].update
        print(f"    rank {rank} at update {kill.seen}: {told(found[-1])}; {arm.stages(kill.at_s)}", flush=True)
    return found


def told(found: Recovery) -> str:
    return (
        f"any update {found.any_s:.2f} s, a new one {found.new_s:.2f} s, by all ranks {found.all_s:.2f} s "
        f"({found.update}), {found.replayed} made twice, {found.lost} of them behind a checkpoint"
    )


def strike(arm: Arm, update: int, rank: int) -> Kill | None:
    """Kill `rank` if so many updates are made."""
    marks = arm.look().marks
    seen = max((mark.update for mark in marks[-8:]), default=0)
    pid = arm.pid(rank)
    if seen < update or not pid:
        return None
    os.kill(pid, signal.SIGKILL)
    return Kill(rank=rank, pid=pid, at_s=time.time(), seen=seen)


def trial(start: Callable[[], Arm], plan: list[tuple[int, int]], outcome: Outcome, number: int) -> None:
    """One run of one arm; a failure is written down, and the others go on."""
    arm = start()
    try:
        for place, recovery in enumerate(follow(arm, plan)):
            outcome.recoveries[number, place] = recovery
        outcome.digests.append(arm.finish())
        outcome.pace_ms.append(update_ms(arm.look()))
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"    failed: {error}", flush=True)
        outcome.failures.append(str(error).splitlines()[0])
    finally:
        arm.stop()


def arms(folder: Path, job: Path, updates: int, site: Path | None) -> dict[str, Callable[[], Arm]]:
    """Every way to train, by the name in the table."""
    treadle = partial(Treadle, folder, job, updates=updates, every=EVERY)
    peer = partial(Peer, folder, updates=updates, every=EVERY)
    polled = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25"}
    found: dict[str, Callable[[], Arm]] = {
        PLAIN: peer,
        "Ray Train, polled every 0.25 s": partial(peer, environment=polled),
        TORCHFT: partial(peer, torchft=LIGHTHOUSE, site=site),
        "treadle, cluster.recovery=restart": partial(treadle, recovery="restart"),
        "treadle, cluster.recovery=replace": partial(treadle, recovery="replace"),
        "treadle, Ray's worker killed": partial(treadle, recovery="replace", victim="actor"),
    }
    return {name: start for name, start in found.items() if name != TORCHFT or site is not None}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--torchft", type=Path, help="folder that torchft is installed in")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=2, help="of each arm in each round")
    parser.add_argument("--arms", nargs="+", default=[""], help="parts of the names of the arms to run")
    parser.add_argument("--quick", action="store_true", help="nothing kept")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # through every `finally`: no run is left behind
    updates = -(-(given.kills * (GAP[1] + EVERY) + 2 * EVERY) // PER_EPOCH) * PER_EPOCH
    shuffler = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="recovery-") as scratch:
        job = prepare_store(Path(scratch))
        chosen = arms(Path(scratch), job, updates, given.torchft.resolve() if given.torchft else None)
        chosen = {name: start for name, start in chosen.items() if any(part in name for part in given.arms)}
        outcomes = {name: Outcome() for name in chosen}
        undisturbed = Outcome()
        if any(name.startswith("treadle") for name in chosen):
            trial(partial(Treadle, Path(scratch), job, updates=updates, every=EVERY), [], undisturbed, 0)
        for number in range(given.rounds):
            plan = [(shuffler.randint(*GAP), (number + place) % WORLD) for place in range(given.kills)]
            for name, start in chosen.items():
                print(f"round {number}, {name}: {plan}", flush=True)
                trial(start, plan, outcomes[name], number)
    report(outcomes, undisturbed.digests, keep=not given.quick)


def report(outcomes: dict[str, Outcome], undisturbed: list[str], *, keep: bool) -> None:
    plain = outcomes.get(PLAIN, Outcome()).recoveries
    rows: list[list[str]] = []
    for name, outcome in outcomes.items():
        found = outcome.recoveries
        pairs = [(found[key], plain[key]) for key in found if key in plain]
        rows.append(
            [
                name,
                str(len(found)),
                spread([recovery.all_s for recovery in found.values()]),
                ratio([(ours.all_s, theirs.all_s) for ours, theirs in pairs]),
                spread([recovery.new_s for recovery in found.values()]),
                ratio([(ours.new_s, theirs.new_s) for ours, theirs in pairs]),
                spread([recovery.any_s for recovery in found.values()]),
                counted([recovery.replayed for recovery in found.values()]),
                counted([recovery.lost for recovery in found.values()]),
                weights(name, outcome, undisturbed),
                f"{statistics.median(outcome.pace_ms):.0f}" if outcome.pace_ms else "-",
            ]
        )
    headers = [
        "trainer",
        "kills",
        "s to the next new update of all ranks: median (least to most)",
        "/ Ray Train",
        "s to the next new update of any rank",
        "/ Ray Train",
        "s to any update",
        "updates made twice",
        "of these, behind a checkpoint",
        "final weights",
        "ms an update",
    ]
    title = (
        f"Recovery after kill -9 of one of 2 ranks: LSTM of {NETWORK['layers']} x {NETWORK['hidden']} units, "
        f"a checkpoint every {EVERY} updates"
    )
    if keep:
        record("recovery", title, "python tests/bench/recovery.py --torchft FOLDER", headers, rows)
        return
    print(title)
    for row in rows:
        print("\n".join(f"  {header}: {cell}" for header, cell in zip(headers, row, strict=True)), end="\n\n")


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def ratio(pairs: list[tuple[float, float]]) -> str:
    """The median over kills of the same round and place."""
    return f"{statistics.median(ours / theirs for ours, theirs in pairs):.3f}" if pairs else "-"


def counted(values: list[int]) -> str:
    return f"{statistics.median(values):g} ({min(values)} to {max(values)})" if values else "-"


def weights(name: str, outcome: Outcome, undisturbed: list[str]) -> str:
    """Whether the kills show in them."""
    if outcome.failures:
        return f"{len(outcome.failures)} runs failed: {outcome.failures[0]}"
    found = [digest for digest in outcome.digests if digest]
    if not found:
        return "not compared"
    if name.startswith("treadle"):
        same = sum([digest] == undisturbed for digest in found)
        return f"{same} of {len(found)} bit-equal to the undisturbed run"
    return f"the same in all {len(found)} runs" if len(set(found)) == 1 else f"{len(set(found))} different"


if __name__ == "__main__":
    main()

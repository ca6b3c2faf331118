"""Runs of two real processes each, as a driver starts them: `python budget_ranks.py FOLDER` leaves what they saw there.

A run with `batch.max_slots=auto` is stopped and resumed by fresh processes; another is given the slots that it found.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from test_worker import Job, ask_to_stop, recorded

import treadle.launch.assemble as assembly
from treadle.data import load_manifest
from treadle.launch import mailbox, worker
from treadle.launch.assemble import budget_key
from treadle.launch.worker import Assignment, train_rank
from treadle.plan import trainable_rows
from treadle.plan.size import training_bytes
from treadle.spec import BatchSpec, ClusterSpec, CtcSpec, TrainSpec
from treadle.store import Backend, Registry
from treadle.train import World, budget

RANKS = 2


def attempt(made: Job, folder: Path, *, stop: bool = False) -> list[dict[str, Any]]:
    """One attempt of a run by as many new processes as it has ranks; what each of them saw."""
    number = made.runs.claim_attempt(made.run, Backend.inline)
    if stop:
        ask_to_stop(made)(number)
    fork = multiprocessing.get_context("fork")
    place = folder / f"{made.run}-{made.store.parent.name}-{number}"
    place.mkdir()
    ranks = [fork.Process(target=rank_main, args=(rank, made, number, place)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        sys.exit(f"{place.name}: exit codes {[process.exitcode for process in ranks]}")
    return [json.loads((place / f"{rank}.json").read_text()) for rank in range(RANKS)]


def rank_main(rank: int, made: Job, number: int, place: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{place}/join", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    seen: dict[str, Any] = {"probes": 0, "slots": []}
    watch(seen)
    assigned = Assignment(store=str(made.store), run=made.run, attempt=number, code={"git": "abc", "dirty": False})
    seen["status"] = train_rank(assigned, World.joined(torch.device("cpu")))["status"]
    (place / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def watch(seen: dict[str, Any]) -> None:
    """Note which budget this process trains with, and how often it looked for one."""
    find_budget, assemble = assembly.find_budget, worker.assemble

    def counted(*given: Any, **named: Any) -> Any:
        seen["probes"] += 1
        return find_budget(*given, **named)

    def noted(around: assembly.Surroundings) -> Any:
        run, *others = assemble(around)
        seen["slots"].append(run.spec.batch.slots)
        return run, *others

    assembly.find_budget, worker.assemble = counted, noted


def record_of(made: Job) -> tuple[str, Any]:
    """The version and the text of the recorded budget."""
    entry = made.blobs.head(budget_key(made.run))
    assert entry is not None
    return entry.version, recorded(made)


def model_of(made: Job) -> bytes:
    registry = Registry(made.blobs)
    return registry.read(registry.resolve("toy@1"), "model.safetensors")


def arithmetic_of(made: Job, found: dict[str, Any]) -> int:
    """Bytes that arithmetic says of the largest shape of a found budget, with the longest target of such rows."""
    card = load_manifest(made.blobs, "toy", made.digest).card(made.digest).splits["train"]
    rows = trainable_rows(card, made.spec.task)
    shape = max((trial for trial in found["trials"] if trial["slots"] == found["slots"]), key=lambda t: t["peak_bytes"])
    return training_bytes(
        made.spec.model,
        made.spec.task,
        made.plan.signature,
        made.spec.optim,
        rows=shape["rows"],
        time_steps=shape["time_steps"],
        labels=max(card.targets_N[row] for row in rows if card.lengths_N[row] <= shape["time_steps"]),
        world=RANKS,
    )


def main(folder: Path) -> None:
    # Budgets that differ from what is planned, and several of them to choose from.
    budget.LEAST_SLOTS, budget.FEW_ROUNDS = 16, 1
    mailbox.POLL_S = 0.002
    both = {
        "task": CtcSpec(frames_per_step=3),
        "cluster": ClusterSpec(workers=RANKS, cpus_per_worker=1),
        "train": TrainSpec(epochs=4, seed=1),
    }
    found = Job(folder / "found", batch=BatchSpec(max_slots="auto", lanes=2), **both)
    seen: dict[str, Any] = {"planned": found.plan.max_slots, "began": attempt(found, folder, stop=True)}
    first = record_of(found)
    seen["resumed"] = attempt(found, folder)
    seen["records"] = [first, record_of(found)]
    seen["arithmetic"] = arithmetic_of(found, first[1])
    seen["told"] = [event for event in found.events() if event["event"] == "budget"]
    given = Job(folder / "given", batch=BatchSpec(max_slots=str(first[1]["slots"]), lanes=2), **both)
    seen["given"] = attempt(given, folder)
    seen["same_model"] = model_of(found) == model_of(given)
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.optim.SGD([torch.zeros(1)])  # what takes seconds to import is imported once, before the fork
    main(Path(sys.argv[1]))

"""Ranks that come together at different updates: `python level_ranks.py FOLDER` leaves what every rank saw there.

A run is made once without disturbance. Then each rank takes up one of its states, as survivors and replacements of a
lost rank do, all are brought to one state, and go on to the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from train_rig import ADAMW, FP32, SGD, Toy, toy_spec, weights

from treadle.spec import BatchSpec, GruSpec, GuardSpec, MinGruSpec, Schedule, TrainSpec
from treadle.train import PrecisionChoice, Run, TrainState, World, fit, gradients
from treadle.train import level as module
from treadle.train.level import level
from treadle.train.watch import Watch
from treadle.train.world import PeerLost

SIZES = (2, 3)
NAN = float("nan")
BATCH = BatchSpec(max_slots="20", lanes=6)
GUARD = GuardSpec(warmup_updates=1, spike=10.0, roll_back_after=2)
PLATEAU = {"schedule": Schedule.plateau, "plateau_patience": 0, "ema": 0.8}
FP16 = dataclasses.replace(FP32, name="fp16")
Saved = tuple[dict[str, bytes], str]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model with its options; `spoilt` updates have no finite loss."""

    toy: Toy
    precision: PrecisionChoice
    spoilt: tuple[int, ...]

    @property
    def per_epoch(self) -> int:
        return self.toy.feed(World()).plan(0).num_updates

    def run(self, world: World, saved: Saved | None = None) -> Run:
        done = 0 if saved is None else json.loads(saved[1])["update"]
        spoilt = {divmod(u - 1, self.per_epoch): NAN for u in self.spoilt if u > done}
        return self.toy.run(world=world, saved=saved, precision=self.precision, spoilt=spoilt)


def kind(name: str) -> Kind:
    train = TrainSpec(epochs=2, seed=5, min_delta=1.0)  # nothing is an improvement
    if name == "fp16":
        model, optim = MinGruSpec(hidden_size=6, embedding_size=5, num_layers=2), dataclasses.replace(SGD, **PLATEAU)
    else:
        model, optim = GruSpec(hidden_size=6, embedding_size=5, dropout=0.2), dataclasses.replace(ADAMW, **PLATEAU)
    toy = Toy(toy_spec(model=model, optim=optim, guard=GUARD, batch=BATCH, train=train))
    spoilt = {"plain": (3,), "fp16": (3,), "rolled": (4, 5)}[name]
    return Kind(toy, FP16 if name == "fp16" else FP32, spoilt)


class Whole:
    """An undisturbed run of all ranks, and its states by update, on every rank."""

    def __init__(self, made: Kind, world: World) -> None:
        self.kind, self.world = made, world
        run = made.run(world)
        reached: list[TrainState] = []
        at = run.reached.at
        run.reached.at = lambda state: (reached.append(state), at(state))[1]  # type: ignore[method-assign]
        self.state = fit(run).state
        self.weights = weights(run)
        self.told = run.track.rows
        told = [run.checkpoints.states]
        dist.broadcast_object_list(told, src=0)
        self.states, self.reached = told[0], reached

    def taken_up(self, update: int) -> Run:
        """A run at that update; 0: one that begins."""
        run = self.kind.run(self.world, self.states[update] if update else None)
        run.reached.at(run.start)
        return run

    def ends_alike(self, run: Run, state: TrainState) -> dict[str, Any]:
        """Whether `run`, gone on with at `state`, ends as the undisturbed one."""
        run = dataclasses.replace(run, start=state)
        end = fit(run).state
        names = ("train/lr", "val/loss")
        known = {(u, name, repr(m[name])) for u, m in self.told for name in names if name in m}
        return {
            "at": state.update,
            "weights": torch.equal(weights(run), self.weights),
            "state": end == self.state,
            "rows": all((u, n, repr(m[n])) in known for u, m in run.track.rows for n in names if n in m),
        }


def together(whole: Whole, places: Mapping[int, int] | list[int]) -> dict[str, Any]:
    """Every rank at its own update."""
    run = whole.taken_up(places[whole.world.rank])
    return whole.ends_alike(run, level(run))


def evaluation(whole: Whole, *, known_by: tuple[int, ...]) -> dict[str, Any]:
    """All after the last update of an epoch, some of them after its evaluation, too."""
    update = whole.kind.per_epoch
    run = whole.taken_up(update)
    if whole.world.rank not in known_by:
        run = dataclasses.replace(run, start=dataclasses.replace(run.start, evaluated=0, watch=Watch()))
    run.reached.at(run.start)
    state = level(run)
    return {"evaluated": state.evaluated == update, **whole.ends_alike(run, state)}


def about_to_roll_back(whole: Whole) -> dict[str, Any]:
    """All but one have judged the update that is one too many, when the group breaks; one is replaced."""
    world, last = whole.world, whole.world.size - 1
    run = whole.taken_up(2)

    class Breaking:
        def newest(self) -> TrainState:
            raise PeerLost("a rank was lost")

    with contextlib.suppress(PeerLost):
        fit(dataclasses.replace(run, restore=Breaking()))  # type: ignore[arg-type]
        raise AssertionError("no roll-back")
    assert run.reached.state is not None
    if world.rank == last:
        run = Kind(whole.kind.toy, FP32, ()).run(world, whole.states[3])
        run.reached.at(run.start)
    return whole.ends_alike(run, level(run))


def rolled_back(whole: Whole) -> dict[str, Any]:
    """All but rank 0 have gone back to a checkpoint with half the rate; rank 0 comes from that very checkpoint."""
    back = next(state for state in whole.reached if state.updater.roll_backs)
    run = Kind(whole.kind.toy, FP32, ()).run(whole.world, whole.states[back.update])
    if whole.world.rank:
        before = next(state for state in reversed(whole.reached) if not state.updater.roll_backs)
        guard = dataclasses.replace(before.updater.guard, skipped=back.updater.guard.skipped)
        run.updater.roll_back(dataclasses.replace(before.updater, guard=guard))
        run.reached.at(dataclasses.replace(run.start, updater=run.updater.state))
        assert run.updater.state.rate_factor == 0.5
    else:
        run.reached.at(run.start)
    state = level(run)
    return {"roll_backs": state.updater.roll_backs, **whole.ends_alike(run, state)}


def lost_meanwhile(whole: Whole, folder: Path) -> dict[str, Any]:
    """The last rank dies while states travel; nothing has changed on the others, which can do it again."""
    world = whole.world
    run = whole.taken_up([3, 0, 2][world.rank])
    before, moments = weights(run), str(run.optimizer.state_dict())
    share, calls = module._share, []

    def dying(*given: Any) -> bytes:
        calls.append(1)
        if world.rank == 2 and len(calls) == 4:
            os._exit(0)
        return share(*given)

    module._share = dying
    try:
        level(run)
    except PeerLost as error:
        words = error.message
    else:
        words = ""
    module._share = share
    same = torch.equal(weights(run), before) and str(run.optimizer.state_dict()) == moments
    dist.destroy_process_group()
    join(folder, "again", world.rank, 2)
    world.rejoin(world.rank, 2)
    state = level(run)
    last = whole.taken_up(3)
    again = torch.equal(weights(run), weights(last)) and state == last.start
    return {"words": words, "same": same, "again": again, "calls": len(calls)}


def join(folder: Path, name: str, rank: int, size: int) -> None:
    method = f"file://{folder}/join-{name}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size, timeout=timedelta(seconds=60))


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    gradients.BUCKET_BYTES, gradients.END_BYTES = (
        400,
        200,
    )  # several buckets, of which some leave from the backward pass
    for size in SIZES:
        if rank >= size:
            continue
        join(folder, str(size), rank, size)
        world, last = World.joined(torch.device("cpu")), size - 1
        whole = Whole(kind("plain" if size == 2 else "fp16"), world)
        seen = {
            "per_epoch": whole.kind.per_epoch,
            "equal": together(whole, [3] * size),
            "one behind": together(whole, [3] * last + [2]),
            "a new rank 0": together(whole, [0] + [5] * last),
            "evaluated by one": evaluation(whole, known_by=(last,)),
        }
        if size == 2:
            seen["one ahead"] = together(whole, [2, 3])
            seen["a new one"] = together(whole, [5, 0])
            seen["evaluated by none"] = evaluation(whole, known_by=())
        else:
            seen["all different"] = together(whole, [2, 3, 0])
            seen["from a checkpoint"] = together(whole, [5, 5, 2])
        rolled = Whole(kind("rolled"), world)
        seen["about to roll back"] = about_to_roll_back(rolled)
        seen["rolled back"] = rolled_back(rolled)
        if size == 3:
            seen["lost meanwhile"] = lost_meanwhile(whole, folder)
        (folder / f"seen-{size}-{rank}.json").write_text(json.dumps(seen))
        dist.destroy_process_group()


if __name__ == "__main__":
    fit(kind("plain").run(World()))  # what takes seconds to import is imported once, before the fork
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=main, args=(rank, Path(sys.argv[1]))) for rank in range(max(SIZES))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))

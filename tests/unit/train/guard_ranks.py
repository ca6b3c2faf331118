"""What one rank's fault does to all: `python guard_ranks.py FOLDER` leaves there what every rank of three saw."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from train_rig import ADAMW, SGD, Toy, toy_draft, toy_spec, weights

from treadle import wire
from treadle.errors import DivergenceError, IntegrityError
from treadle.spec import (
    BatchSpec,
    ClassifySpec,
    ClusterSpec,
    GruSpec,
    GuardSpec,
    MinGruSpec,
    Parallel,
    RmsPropSpec,
    SplitSpec,
    TrainSpec,
)
from treadle.train import Run, World, fit, gradients

SIZE = 3
BATCH = BatchSpec(max_slots="26", lanes=12, noise=0.3)
GUARD = GuardSpec(warmup_updates=2, spike=20.0, roll_back_after=2)
MODELS = {"gru": GruSpec(hidden_size=6, embedding_size=5), "mingru": MinGruSpec(hidden_size=6, embedding_size=5)}
OPTIMS = {"adamw": dataclasses.replace(ADAMW, ema=0.9), "sgd": SGD, "rmsprop": RmsPropSpec(lr=1e-2)}
PAIRS = [("gru", "adamw"), ("gru", "rmsprop"), ("mingru", "adamw"), ("mingru", "sgd")]
GROSS = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"


def toy(model: str = "gru", optim: str = "adamw", **changes: Any) -> Toy:
    train = TrainSpec(**{"epochs": 2, "seed": 5, "check_replicas_every": 2} | changes)
    guard = dataclasses.replace(GUARD, max_roll_backs=1)
    return Toy(toy_spec(model=MODELS[model], optim=OPTIMS[optim], batch=BATCH, guard=guard, train=train))


def seen_of(run: Run, status: str) -> dict[str, Any]:
    assert run.reached.state is not None
    return {
        "status": status,
        "update": run.reached.state.update,
        "guard": wire.encode(run.updater.state),
        "weights": wire.digest(weights(run).numpy().tobytes()),
        "finite": bool(torch.isfinite(weights(run)).all()),
        "skipped": run.track.told("skipped"),  # type: ignore[attr-defined]
        "rolled_back": run.track.told("rolled_back"),  # type: ignore[attr-defined]
        "split": run.track.told("split"),  # type: ignore[attr-defined]
        "scaled": [m.get("guard/loss_scale") for _, m in run.track.rows],  # type: ignore[attr-defined]
    }


def spoilt_on_one(world: World) -> dict[str, Any]:
    """A NaN, and a spike, in the batches of rank 2 alone."""
    found = {}
    for model, optim in PAIRS:
        spoilt = {(0, 2): math.nan, (1, 1): 3e3} if world.rank == 2 else None
        run = toy(model, optim).run(world=world, spoilt=spoilt)
        found[f"{model}-{optim}"] = seen_of(run, fit(run).status)
    return found


def rolled_back(world: World) -> dict[str, Any]:
    """Two such updates in a row; rank 0 alone has checkpoints. Once more, without any."""
    found = {}
    for name, due in {"saved": True, "anew": False}.items():
        run = toy().run(world=world, spoilt={(1, 0): math.nan, (1, 1): math.inf} if world.rank == 1 else None)
        run.checkpoints.due = lambda state, due=due: due and state.update + 1 == 2  # type: ignore[attr-defined]
        found[name] = seen_of(run, fit(run).status)
    return found


def diverged(world: World) -> dict[str, Any]:
    run = toy().run(world=world, spoilt=None)
    scaled = run.updater.scaled
    run.updater.scaled = lambda loss: scaled(loss) * (math.nan if world.rank == 1 else 1.0)
    try:
        fit(run)
    except DivergenceError as error:
        return {"message": error.message, **error.context}
    return {}


def flipped(world: World) -> dict[str, Any]:
    """One bit of one weight of one rank, between two updates."""
    found = {}
    for name, ranks in {"one": [2], "none": [], "all": [0, 1, 2]}.items():
        data = toy(check_replicas_every=3)
        run = data.run(world=world)
        move = run.updater.move
        updates = iter(range(1, 1000))

        def moved(rate, move=move, updates=updates, run=run, ranks=ranks):
            done = move(rate)
            if next(updates) == 4 and world.rank in ranks:
                flat = list(run.network.parameters())[-1].data.view(-1).view(torch.int32)
                flat[0] ^= 1 << world.rank
            return done

        run.updater.move = moved
        try:
            found[name] = {"status": fit(run).status}
        except IntegrityError as error:
            found[name] = {"message": error.message, **error.context}
    return found


def short_on_one(world: World) -> dict[str, Any]:
    """Rank 1 runs out of memory on the way back, with buckets of gradients on their way to the others."""
    spec = toy_spec(
        task=ClassifySpec(), model=dataclasses.replace(MODELS["gru"], num_layers=3), optim=SGD, split=SplitSpec(),
        batch=BatchSpec(max_slots="60", lanes=3), train=TrainSpec(epochs=1),
    )  # fmt: skip
    found = {}
    for name, faults in {"short": (1, 5), "whole": ()}.items():
        run = Toy(spec, toy_draft(90, classes=True)).run(world=world)
        calls = iter(range(10_000))

        def fail(grad, calls=calls, faults=faults):
            """At the first layer, when the gradients of the last are known and have left."""
            if world.rank == 1 and next(calls) in faults:
                raise RuntimeError(GROSS)
            return grad

        embedding = run.network.embedding
        embedding.register_forward_hook(lambda _m, _i, out, fail=fail: out.register_hook(fail) and None)
        status = fit(run).status
        found[name] = seen_of(run, status) | {"values": weights(run).tolist()}
    return found


def sharded(world: World) -> dict[str, Any]:
    """A mean of weights, a skip and a roll-back, with parameters whole on each rank and spread over all."""
    found = {}
    for parallel in Parallel:
        data = toy(epochs=3)
        data.spec = dataclasses.replace(data.spec, cluster=ClusterSpec(parallel=parallel))
        spoilt = {(0, 1): math.nan, (1, 0): math.nan, (1, 1): math.inf}
        run = data.run(world=world, spoilt=spoilt if world.rank == 1 else None)
        run.checkpoints.due = lambda _: False  # type: ignore[attr-defined]
        status = fit(run).status
        values = [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in run.network.parameters()]
        found[parallel.value] = {
            "status": status,
            "guard": wire.encode(run.updater.state),
            "values": torch.cat([part.reshape(-1) for part in values]).tolist(),
            "to": [facts["to"] for facts in run.track.told("rolled_back")],  # type: ignore[attr-defined]
        }
    return found


SCENES = (sharded, spoilt_on_one, rolled_back, diverged, flipped, short_on_one)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    gradients.BUCKET_BYTES, gradients.END_BYTES = 400, 200  # of a few parameters each
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/join", rank=rank, world_size=SIZE, timeout=timedelta(seconds=60)
    )
    world = World.joined(torch.device("cpu"))
    seen = {scene.__name__: scene(world) for scene in SCENES}
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    toy().run()  # what takes seconds to import is imported once, before the fork
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=main, args=(rank, Path(sys.argv[1]))) for rank in range(SIZE)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))

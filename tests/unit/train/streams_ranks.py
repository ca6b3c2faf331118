"""Streams in worlds of one to three real processes: `python streams_ranks.py FOLDER` leaves what all ranks saw."""

from __future__ import annotations

import json
import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from streams_rig import StreamToy, stream_spec
from train_rig import SGD, weights

from treadle.spec import LstmSpec, TagSpec
from treadle.train import World, fit
from treadle.train.carry import CARRY_FILE

SIZES = (1, 2, 3)
STOPS = {1: 2, 2: 5, 3: None}
"""The run that goes from world to world: after which update each of them stops."""


def language() -> StreamToy:
    return StreamToy(stream_spec(model=LstmSpec(hidden_size=6, embedding_size=5, dropout=0.2), optim=SGD))


def trajectory(world: World, folder: Path) -> dict[str, Any]:
    """A whole run of each task, stopped in the middle and gone on with; the weights go into files."""
    found = {}
    for name, toy in {"language": language(), "tag": StreamToy(stream_spec(task=TagSpec(), optim=SGD))}.items():
        run = toy.run(world=world)
        outcome = fit(run)
        np.save(folder / f"{name}-{world.size}-{world.rank}.npy", weights(run).numpy())
        part = toy.run(world=world, stop_after=3 if world.rank == 0 else None)
        fit(part)
        saved = share(part.checkpoints.states.get(3), world, folder / f"{name}-{world.size}")
        rest = toy.run(world=world, saved=saved)
        fit(rest)
        found[name] = {
            "same": torch.equal(weights(rest), weights(run)),
            "losses": list(run.track.column("train/loss").values()),
            "test": outcome.test.metrics,
            "num_rows": outcome.test.num_rows,
        }
    return found


def relay(world: World, folder: Path) -> dict[str, Any]:
    """One world goes on where a smaller one stopped."""
    toy, before = language(), None
    if world.size > 1:
        before = read(folder / f"relay-{world.size - 1}")
    stop = STOPS[world.size]
    run = toy.run(world=world, saved=before, stop_after=stop if world.rank == 0 else None)
    outcome = fit(run)
    if stop is not None:
        share(run.checkpoints.states.get(stop), world, folder / f"relay-{world.size}")
    np.save(folder / f"relay-{world.size}-{world.rank}.npy", weights(run).numpy())
    return {"update": outcome.state.update, "frames": outcome.state.frames_seen}


def share(saved: tuple[dict[str, bytes], str] | None, world: World, folder: Path) -> tuple[dict[str, bytes], str]:
    if world.rank == 0:
        assert saved is not None
        assert CARRY_FILE in saved[0]
        folder.mkdir()
        for name, data in saved[0].items():
            (folder / name).write_bytes(data)
        (folder / "state.json").write_text(saved[1])
    with world.first():
        pass
    return read(folder)


def read(folder: Path) -> tuple[dict[str, bytes], str]:
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}
    return files, (folder / "state.json").read_text()


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for size in SIZES:
        if rank >= size:
            continue
        join = f"file://{folder}/join-{size}"
        dist.init_process_group("gloo", init_method=join, rank=rank, world_size=size, timeout=timedelta(seconds=60))
        world = World.joined(torch.device("cpu"))
        seen = {scene.__name__: scene(world, folder) for scene in (trajectory, relay)}
        (folder / f"seen-{size}-{rank}.json").write_text(json.dumps(seen))
        dist.destroy_process_group()


if __name__ == "__main__":
    language().run()  # what takes seconds to import is imported once, before the fork
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=main, args=(rank, Path(sys.argv[1]))) for rank in range(max(SIZES))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))

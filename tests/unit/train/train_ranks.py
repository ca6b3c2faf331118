"""Worlds of one to four real processes: `python train_ranks.py FOLDER [SCENE ...]` leaves what every rank saw there.

One process imports torch and forks the ranks; for each world size the first ranks join a gloo group.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from train_rig import ADAMW, SGD, Toy, toy_draft, toy_spec, weights

from treadle.errors import DivergenceError
from treadle.nn import recompute_layers
from treadle.spec import (
    BatchSpec,
    ClassifySpec,
    ClusterSpec,
    CtcSpec,
    GruSpec,
    LanguageSpec,
    LstmSpec,
    MinGruSpec,
    MinLstmSpec,
    Parallel,
    Pooling,
    Precision,
    RnnSpec,
    SplitSpec,
    TrainSpec,
)
from treadle.train import World, choose_precision, fit, gradients

SIZES = (1, 2, 3, 4)
# Twelve lanes of few rows: the round of the rest leaves lanes, and in larger worlds ranks, without rows.
LANES = BatchSpec(max_slots="26", lanes=12, rounds_per_update=2, noise=0.3)
TRAIN = TrainSpec(epochs=2, seed=5)
CTC = CtcSpec(frames_per_step=2, label_name="letter", sequence_name="word")


def ctc(**changes: Any) -> Toy:
    return Toy(toy_spec(batch=LANES, train=TRAIN, optim=SGD, **changes))


def trajectory(world: World, folder: Path) -> dict[str, Any]:
    """A whole run: rows, gradient norms, losses, evaluations; the weights go into a file."""
    toy = ctc()
    run = toy.run(world=world, stop_after=1 if world.rank else None)  # whoever asks another rank is not heard
    outcome = fit(run)
    np.save(folder / f"ctc-{world.size}-{world.rank}.npy", weights(run).numpy())
    updates = list(toy.feed(world).starting_at(0, 0))
    return {
        "state": outcome.state.to_json(),
        "rows": [[m.batch.rows_B.tolist() for m in update.micros] for update in updates],
        "told": run.track.rows,
        "test": outcome.test.metrics,
        "confusion": outcome.test.confusion,
        "num_rows": outcome.test.num_rows,
    }


def float64(world: World, folder: Path) -> dict[str, Any]:
    """Without rounding in the way of a tight comparison; some updates have rows for one rank only."""
    batch = BatchSpec(max_slots="26", lanes=4, noise=0.3)
    toy = Toy(toy_spec(task=ClassifySpec(), batch=batch, train=TRAIN, optim=SGD), toy_draft(49, classes=True))
    run = toy.run(world=world, double=True)
    outcome = fit(run)
    np.save(folder / f"float64-{world.size}-{world.rank}.npy", weights(run).numpy())
    return {
        "test": outcome.test.metrics,
        "micros": [len(update.micros) for update in toy.feed(world).starting_at(0, 0)],
    }


def resumed(world: World, folder: Path) -> dict[str, Any]:
    """Every rank stops at the same update, goes on, and ends where the unbroken run does, bit for bit."""
    found = {}
    for name, optim in {"sgd": SGD, "adamw": ADAMW}.items():
        toy = Toy(toy_spec(batch=LANES, train=TRAIN, optim=optim))
        whole = toy.run(world=world)
        fit(whole)
        part = toy.run(world=world, stop_after=1 if world.rank == 0 else None)
        stopped = fit(part)
        # Only rank 0 keeps states; the others read what it wrote.
        saved = share(part.checkpoints.states.get(1), world, folder / f"saved-{name}-{world.size}")
        rest = toy.run(world=world, saved=saved)
        fit(rest)
        same = torch.equal(weights(rest), weights(whole))
        found[name] = {
            "stopped": [stopped.status, stopped.state.update],
            "same": same,
            "kept": len(whole.checkpoints.states),
        }
    return found


def share(saved: tuple[dict[str, bytes], str] | None, world: World, folder: Path) -> tuple[dict[str, bytes], str]:
    if world.rank == 0:
        assert saved is not None
        folder.mkdir()
        for name, data in saved[0].items():
            (folder / name).write_bytes(data)
        (folder / "state.json").write_text(saved[1])
    with world.first():
        pass
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}
    return files, (folder / "state.json").read_text()


def diverging(world: World, folder: Path) -> dict[str, Any]:
    optim = dataclasses.replace(SGD, lr=1e25, clip_norm=None, warmup_share=0.0)
    run = Toy(toy_spec(batch=LANES, train=TRAIN, optim=optim)).run(world=world)
    try:
        fit(run)
    except DivergenceError as error:
        return {"update": error.context["update"], "kept": sorted(run.checkpoints.states)}
    return {"update": None}


def few_rows(world: World, folder: Path) -> dict[str, Any]:
    """Two rows to evaluate: ranks above the second get none."""
    toy = ctc(split=SplitSpec(valid=1, test=2))
    run = toy.run(world=world)
    found = run.test(run.network, run.precision)
    return {
        "metrics": found.metrics,
        "num_rows": found.num_rows,
        "own": len(found.samples),
        "mode": run.network.training,
    }


def agreeing(world: World, folder: Path) -> dict[str, Any]:
    toy = ctc()
    run = toy.run(world=world)
    choice = choose_precision(Precision.auto, run.network, run.task, run.feed.largest(), world)
    different = World(rank=world.rank, size=world.size)
    network = toy.network()
    weight = next(network.parameters())
    with torch.no_grad():
        weight.add_(world.rank)
    world.share_weights(network)
    return {
        "choice": [choice.name, choice.why, choice.probe_ms],
        "same": world.agree("ab" * 32),
        "other": different.agree(f"{world.rank:064x}"[::-1]),
        "sum": world.sum([1.0, float(world.rank), 0.1]),
        "shared": float((weight - next(toy.network().parameters())).detach().abs().max()),
    }


MODELS = {
    "lstm": LstmSpec(hidden_size=6, num_layers=2, bidirectional=True, embedding_size=5, dropout=0.3),
    "gru": GruSpec(hidden_size=7, num_layers=2, embedding_size=5, learned_state=True),
    "rnn": RnnSpec(hidden_size=6, num_layers=1, embedding_size=5),
    "mingru": MinGruSpec(hidden_size=6, num_layers=2, embedding_size=5, conv_size=3, mlp_factor=2.0, expansion=2.0),
    "minlstm": MinLstmSpec(hidden_size=6, num_layers=2, embedding_size=5, norm=True, residual=True),
    "language": GruSpec(hidden_size=6, num_layers=1, embedding_size=5),
    "recomputed": LstmSpec(hidden_size=6, num_layers=2, bidirectional=True, embedding_size=5, dropout=0.3),
    "hybrid": MinGruSpec(
        hidden_size=8, num_layers=2, embedding_size=5, attention_every=1, attention_heads=2, mlp_factor=1
    ),
}


def sharded(world: World, folder: Path) -> dict[str, Any]:
    """Parameters spread over the ranks, of every kind of layer and head, beside ranks that each hold all."""
    tasks = {"lstm": CTC, "rnn": ClassifySpec(pooling=Pooling.attention), "language": LanguageSpec(tied=True)}
    found: dict[str, Any] = {}
    for name, model in MODELS.items():
        task = tasks.get(name, ClassifySpec())
        draft, ends = toy_draft(45, classes=isinstance(task, ClassifySpec)), {}
        for parallel in Parallel:
            spec = toy_spec(model=model, task=task, batch=LANES, train=FEW, optim=SGD)
            run = Toy(dataclasses.replace(spec, cluster=ClusterSpec(parallel=parallel)), draft).run(world=world)
            recompute_layers(run.network, name == "recomputed")
            outcome = fit(run)
            state = {key: whole_tensor(part) for key, part in run.network.state_dict().items()}
            ends[parallel] = (state, run.track.column("train/grad_norm"), outcome.test.metrics)
        (data, told, test), (state, rows, metrics) = ends[Parallel.data], ends[Parallel.sharded]
        found[name] = {
            "names": list(state) == list(data),
            "difference": max(float((state[key] - data[key]).abs().max()) for key in data),
            "told": list(told.values()),
            "rows": list(rows.values()),
            "test": [test, metrics],
        }
    return found


def resharded(world: World, folder: Path) -> dict[str, Any]:
    """A sharded run that is stopped goes on in the same bits; its checkpoint is that of a whole network, and back."""
    found = {}
    for name, optim in {"sgd": SGD, "adamw": ADAMW}.items():
        spec = toy_spec(batch=LANES, train=FEW, optim=optim)
        toy = Toy(dataclasses.replace(spec, cluster=ClusterSpec(parallel=Parallel.sharded)))
        plain = Toy(spec)
        whole = toy.run(world=world)
        fit(whole)
        part = toy.run(world=world, stop_after=1 if world.rank == 0 else None)
        fit(part)
        saved = share(part.checkpoints.states.get(1), world, folder / f"sharded-{name}-{world.size}")
        rest = toy.run(world=world, saved=saved)
        fit(rest)
        alone = plain.run(saved=saved)  # one rank goes on from it without the others
        fit(alone)
        before = plain.run(world=world, stop_after=1 if world.rank == 0 else None)
        fit(before)
        other = share(before.checkpoints.states.get(1), world, folder / f"whole-{name}-{world.size}")
        back = toy.run(world=world, saved=other)
        fit(back)
        ends = [torch.cat([whole_tensor(p).flatten() for p in run.network.parameters()]) for run in (whole, rest, back)]
        found[name] = {
            "same": torch.equal(ends[0], ends[1]),
            "alone": float((weights(alone) - ends[0]).abs().max()),
            "back": float((ends[2] - ends[0]).abs().max()),
            "local": sum(p.to_local().numel() for p in whole.network.parameters()),
            "moments": sum(v.to_local().numel() for s in whole.optimizer.state.values() for v in s.values() if v.ndim),
            "all": ends[0].numel(),
            "files": {file: len(data) for file, data in saved[0].items()},
            "others": {file: len(data) for file, data in other[0].items()},
        }
    return found


def whole_tensor(part: torch.Tensor) -> torch.Tensor:
    return part.detach().full_tensor() if isinstance(part, DTensor) else part.detach()


SCENES = {
    trajectory: SIZES,
    float64: SIZES,
    few_rows: SIZES,
    resumed: (2, 3),  # of three numbers, the sum depends on the order
    diverging: (1, 3),
    agreeing: (1, 3),
}
MORE = {sharded: (2,), resharded: (2, 3)}
FEW = TrainSpec(epochs=1, seed=5)


def main(rank: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    # Of a few parameters each, so that toys have several, too.
    gradients.BUCKET_BYTES, gradients.END_BYTES = 400, 200
    scenes = {scene: sizes for scene, sizes in (SCENES | MORE).items() if scene.__name__ in names}
    for size in SIZES:
        if rank >= size or not any(size in sizes for sizes in scenes.values()):
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/join-{size}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=60),
        )
        world = World.joined(torch.device("cpu"))
        seen = {scene.__name__: scene(world, folder) for scene, sizes in scenes.items() if size in sizes}
        (folder / f"seen-{size}-{rank}.json").write_text(json.dumps(seen))
        dist.destroy_process_group()


if __name__ == "__main__":
    ctc().run()  # what takes seconds to import is imported once, before the fork
    names = sys.argv[2:] or [scene.__name__ for scene in SCENES]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=main, args=(rank, Path(sys.argv[1]), names)) for rank in range(max(SIZES))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))

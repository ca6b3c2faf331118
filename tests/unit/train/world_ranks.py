"""Ranks that are lost, and those that are left: `python world_ranks.py FOLDER` leaves what every rank saw there."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from treadle.train import World, gradients
from treadle.train.gradients import GradientSum, summing
from treadle.train.world import PeerLost

LOST = 2


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(30, 30) for _ in range(6)))


def loss(net: nn.Module, rank: int) -> Tensor:
    return net(torch.full((2, 30), 0.1 * (rank + 1))).sin().sum()


def join(folder: Path, name: str, rank: int, size: int) -> None:
    where = f"file://{folder}/{name}-{size}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size, timeout=timedelta(seconds=30))


def summed(world: World, net: nn.Module, total: GradientSum, *, expect: bool = True) -> Tensor:
    """One update's gradients of all ranks, flattened."""
    net.zero_grad(set_to_none=True)
    if expect:
        total.expect()
    loss(net, world.rank).backward()
    total.finish((1.0, float(world.rank)))
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def in_sum(world: World, net: nn.Module, total: GradientSum) -> None:
    world.sum([1.0])


def in_agree(world: World, net: nn.Module, total: GradientSum) -> None:
    world.agree("ab" * 32)


def in_share(world: World, net: nn.Module, total: GradientSum) -> None:
    world.share_weights(net, source=LOST)


def in_first(world: World, net: nn.Module, total: GradientSum) -> None:
    with world.first():
        pass


def in_tensor(world: World, net: nn.Module, total: GradientSum) -> None:
    world.sum_tensor(torch.ones(3))


def in_gradients(world: World, net: nn.Module, total: GradientSum) -> None:
    summed(world, net, total)


def in_backward(world: World, net: nn.Module, total: GradientSum) -> None:
    """The group is gone already when the first bucket wants to leave."""
    summed(world, net, total)
    time.sleep(1.0)
    net.zero_grad(set_to_none=True)
    for _ in range(20):  # the first of them may still be on its way when the loss of the rank shows
        total.expect()
        loss(net, world.rank).backward()
        time.sleep(0.1)
        total.finish((0.0,))


SCENES: tuple[Callable[[World, nn.Module, GradientSum], None], ...] = (
    in_sum,
    in_agree,
    in_share,
    in_first,
    in_tensor,
    in_gradients,
    in_backward,
)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    gradients.BUCKET_BYTES, gradients.END_BYTES = 8000, 4000
    phases: list[str] = []
    for scene in SCENES:
        join(folder, f"before-{scene.__name__}", rank, 3)
        world = World.joined(torch.device("cpu"))
        world.on_phase = phases.append
        net = network()
        found: dict[str, object] = {}
        with summing(world, net) as total:
            found["before"] = summed(world, net, total).tolist()
            if rank == LOST and scene is SCENES[-1]:
                os._exit(0)
            phases.clear()
            try:
                if rank == LOST:
                    dist.destroy_process_group()  # as a death looks to the others; a fork for each would take longer
                    time.sleep(1.5)
                    continue
                scene(world, net, total)
            except PeerLost as error:
                found["error"], found["exit_code"] = error.message, error.exit_code
            found["phases"] = list(phases)
            found["left"] = sum(p.grad is not None for p in net.parameters()) if "gradients" in scene.__name__ else 0
            dist.destroy_process_group()
            # The same handle, the same buckets, in a smaller group.
            join(folder, f"after-{scene.__name__}", rank, 2)
            world.rejoin(rank, 2)
            found["after"] = summed(world, net, total).tolist()
            found["late"] = summed(world, net, total, expect=False).tolist()
            found["alone"] = world.sum([1.0])
        dist.destroy_process_group()
        (folder / f"{scene.__name__}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    network()
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=main, args=(rank, Path(sys.argv[1]))) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))

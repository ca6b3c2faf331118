"""Two ranks beside one, and ways to add gradients up beside one another. One thread a rank, gloo, this machine.

Everything takes turns in the same two processes: while one rank trains alone the other waits. Batches of a microbatch
a rank; an update of two ranks has twice the frames of an update of one. `python tests/bench/ranks.py [ROUNDS]`.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from recording import record
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from treadle.nn import build_network, count_parameters
from treadle.spec import ClassifySpec, GruSpec, InputKind, LstmSpec, MinGruSpec, Signature
from treadle.train import World
from treadle.train.gradients import GradientSum

RANKS, SKIPPED, TIMES = 2, 2, 3
ROWS, STEPS, SYMBOLS, CLASSES = 24, 40, 2000, 40
CASES = {
    "LSTM 2 x 128, both directions": LstmSpec(hidden_size=128, num_layers=2, bidirectional=True, embedding_size=64),
    "GRU 3 x 512": GruSpec(hidden_size=512, num_layers=3, embedding_size=256),
    "MinGRU 3 x 512": MinGruSpec(
        hidden_size=512, num_layers=3, embedding_size=256, norm=True, residual=True, mlp_factor=4.0
    ),
}
TOKENS = Signature(input_kind=InputKind.tokens, input_size=SYMBOLS, num_labels=CLASSES, max_length=STEPS)
Update = Callable[[], None]


def flat(network: nn.Module) -> None:
    """One all-reduce of everything after the backward pass."""
    parameters = [p for p in network.parameters() if p.grad is not None]
    whole = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
    dist.all_reduce(whole)
    for p, part in zip(parameters, whole.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)


def ways(model: object, world: World, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[dict[str, Update], int]:
    """An update in each way, and the number of weights."""
    found: dict[str, Update] = {}

    def add(name: str, before: Update, after: Callable[[nn.Module], object], **ddp: bool) -> nn.Module:
        torch.manual_seed(0)
        network = build_network(model, ClassifySpec(), TOKENS).train()  # type: ignore[arg-type]
        call = DistributedDataParallel(network, **ddp) if ddp else network
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
        tokens, lengths, labels = batch

        def update() -> None:
            before()
            nn.functional.cross_entropy(call(tokens, lengths), labels).backward()
            after(network)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        found[name] = update
        return network

    sums: list[GradientSum] = []
    add("one rank alone", lambda: None, lambda _: None)
    network = add("treadle", lambda: sums[0].expect(), lambda _: sums[0].finish((0.0,)))  # noqa: PLW0108  not there yet
    sums.append(GradientSum(world, network))
    add("one all-reduce at the end", lambda: None, flat)
    add("DDP, buckets fixed", lambda: None, lambda _: None, find_unused_parameters=True, gradient_as_bucket_view=True)
    add("DDP, buckets sorted anew", lambda: None, lambda _: None, gradient_as_bucket_view=True)
    return found, count_parameters(network)


def main(rank: int, folder: Path, rounds: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    where = f"file://{folder}/join"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=RANKS, timeout=timedelta(minutes=5))
    world, rows = World.joined(torch.device("cpu")), []
    for name, model in CASES.items():
        torch.manual_seed(rank)
        tokens, labels = torch.randint(SYMBOLS, (ROWS, STEPS)), torch.randint(CLASSES, (ROWS,))
        updates, size = ways(model, world, (tokens, torch.full((ROWS,), STEPS), labels))
        times: dict[str, list[float]] = {way: [] for way in updates}
        for _ in range(rounds + SKIPPED):
            for way, update in updates.items():
                dist.barrier()
                started = time.perf_counter()
                if rank == 0 or way != "one rank alone":
                    for _ in range(TIMES):
                        update()
                times[way].append((time.perf_counter() - started) / TIMES)
        alone = times["one rank alone"][SKIPPED:]
        for way, taken in times.items():
            ratio = statistics.median(a / t for a, t in zip(alone, taken[SKIPPED:], strict=True))
            speed = f"{RANKS * ratio:.2f}x" if way != "one rank alone" else "1x"
            rows.append(
                (name, f"{size / 1e6:.1f} M", way, f"{1000 * statistics.median(taken[SKIPPED:]):.1f} ms", speed)
            )
    dist.destroy_process_group()
    if rank == 0:
        headers = ["network", "parameters", "gradients", "update", "frames a second"]
        title, command = "Two ranks beside one: frames trained a second", "python tests/bench/ranks.py"
        if rounds > 5:
            record("ranks", title, command, headers, rows)
        else:
            print("\n".join(map(str, rows)))


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as folder:
        fork = multiprocessing.get_context("fork")
        ranks = [fork.Process(target=main, args=(rank, Path(folder), rounds)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()

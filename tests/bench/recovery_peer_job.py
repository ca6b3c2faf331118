"""What a user of Ray Train, or of torchft below it, writes: `python recovery_peer_job.py CONFIG.json`.

Each rank appends a line for every update that it finished; that is all that the bench adds.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any


def build(config: dict[str, Any]) -> Any:  # untyped: torch is imported where it runs
    """The network of all arms, from torch's own parts."""
    import torch
    from torch import nn

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(config["symbols"], config["embedding"])
            self.lstm = nn.LSTM(config["embedding"], config["hidden"], config["layers"], batch_first=True)
            self.head = nn.Linear(config["hidden"], config["symbols"])

        def forward(self, x_BT: Any) -> Any:
            return self.head(self.lstm(self.embedding(x_BT))[0])

    torch.manual_seed(0)
    torch.set_num_threads(1)
    return Tagger()


def batch(config: dict[str, Any], update: int, rank: int) -> tuple[Any, Any]:
    """The rows of one rank at one update, the same at every try."""
    import torch

    generator = torch.Generator().manual_seed(2 * update + rank)
    x_BT = torch.randint(config["symbols"], (config["rows"], config["length"]), generator=generator)
    return x_BT, (x_BT + x_BT.roll(1, dims=1)) % config["symbols"]


class Notes:
    """Lines of one file, one write each."""

    def __init__(self, path: str, rank: int) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._rank = rank
        self.tell("started", pid=os.getpid())

    def tell(self, kind: str, **facts: Any) -> None:
        os.write(
            self._file, json.dumps({"kind": kind, "rank": self._rank, "time": time.time(), **facts}).encode() + b"\n"
        )


def train(config: dict[str, Any]) -> None:
    """Ray Train as its guide has it: a checkpoint reported by rank 0, taken up again after a restart."""
    import hashlib

    import ray.train
    import ray.train.torch
    import torch

    rank = ray.train.get_context().get_world_rank()
    notes = Notes(config["notes"], rank)
    network: Any = ray.train.torch.prepare_model(build(config))
    optimizer = torch.optim.AdamW(network.parameters(), lr=config["rate"])
    begin = 0
    if (kept := ray.train.get_checkpoint()) is not None:
        with kept.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt")
        network.module.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["update"]
    for update in range(begin, config["updates"]):
        begun_s = time.time()
        x_BT, y_BT = batch(config, update, rank)
        loss = torch.nn.functional.cross_entropy(network(x_BT).flatten(0, 1), y_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        notes.tell("update", update=update + 1, begun=begun_s)
        if (update + 1) % config["every"] == 0:
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = None
                if rank == 0:
                    state = {
                        "network": network.module.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "update": update + 1,
                    }
                    torch.save(state, Path(folder) / "state.pt")
                    checkpoint = ray.train.Checkpoint.from_directory(folder)
                ray.train.report({"loss": float(loss.detach()), "update": update + 1}, checkpoint=checkpoint)
            notes.tell("commit", update=update + 1)
    weights = b"".join(p.detach().numpy().tobytes() for p in network.parameters())
    notes.tell("weights", digest=hashlib.sha256(weights).hexdigest())


def train_torchft(config: dict[str, Any]) -> None:
    """torchft as Ray's own example has it; each rank is a replica group, the survivors go on without the lost one."""
    import ray.train
    import torch
    from torchft import (  # pyright: ignore[reportMissingImports]  in a folder of its own
        DistributedDataParallel,
        Manager,
        Optimizer,
        ProcessGroupGloo,
    )
    from torchft.checkpointing.pg_transport import PGTransport  # pyright: ignore[reportMissingImports]

    rank = ray.train.get_context().get_world_rank()
    notes = Notes(config["notes"], rank)
    network = build(config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config["rate"])
    group = ProcessGroupGloo(timeout=timedelta(seconds=30))

    def load(state: dict[str, Any]) -> None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=group,
        min_replica_size=1,
        load_state_dict=load,
        state_dict=lambda: {"network": network.state_dict(), "optimizer": optimizer.state_dict()},
        world_size=1,
        rank=0,
        replica_id=f"bench_{rank}",
        timeout=timedelta(seconds=60),
        checkpoint_transport=PGTransport(group, timeout=timedelta(seconds=30), device=torch.device("cpu")),
    )
    replicated = DistributedDataParallel(manager, network)
    managed = Optimizer(manager, optimizer)
    while manager.current_step() < config["updates"]:
        begun_s, before = time.time(), manager.current_step()
        x_BT, y_BT = batch(config, before, rank)
        managed.zero_grad()
        loss = torch.nn.functional.cross_entropy(replicated(x_BT).flatten(0, 1), y_BT.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        managed.step()
        if manager.current_step() > before:  # else it was given up, and is made again
            notes.tell("update", update=manager.current_step(), begun=begun_s, ranks=manager.num_participants())
    manager.shutdown()


def main() -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = json.loads(Path(sys.argv[1]).read_text())
    ray.init(
        address="local",
        num_cpus=4,  # torchft's lighthouse wants one beside the ranks'
        include_dashboard=False,
        object_store_memory=128 << 20,
        _temp_dir=config["ray_folder"],
        _node_ip_address="127.0.0.1",
    )
    if config["torchft"]:
        from ray.train.v2.torch.torchft_config import TorchftConfig

        backend, loop = TorchftConfig(lighthouse_kwargs=config["torchft"], backend="gloo"), train_torchft
    else:
        backend, loop = TorchConfig(backend="gloo"), train
    trainer = TorchTrainer(
        loop,
        train_loop_config=config,
        torch_config=backend,
        scaling_config=ScalingConfig(num_workers=config["world"]),
        run_config=RunConfig(
            name="bench", storage_path=config["storage"], failure_config=FailureConfig(max_failures=100)
        ),
    )
    try:
        trainer.fit()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()

"""Bringing ranks that have come together anew to one state: that of the rank which is furthest."""

from __future__ import annotations

import json

import numpy as np
import torch

from treadle import wire
from treadle.train.run import Run
from treadle.train.state import TrainState, pack, snapshot, unpack
from treadle.train.world import World

__all__ = ["level"]


def level(run: Run) -> TrainState:
    """The state that all ranks hold now; tensors travel only where ranks stand at different updates.

    A rank that was lost between two collectives of an update leaves others behind by one update at most; one that
    replaces it comes from the last checkpoint, or from the beginning.

    Raises:
        PeerLost: another rank was lost meanwhile.

    Not for networks whose state goes on from update to update: what a lost rank carried is in no other.
    """
    state, world = run.reached.state or run.start, run.world
    if world.size == 1:
        return state
    places = [0.0] * world.size
    places[world.rank] = _place(state)
    places = world.sum(places)
    source = places.index(max(places))
    is_source, is_behind = world.rank == source, places[world.rank] // 2 < places[source] // 2
    told = _share(world, wire.canonical(state.to_json()) if is_source else b"", source)
    state = TrainState.from_json(json.loads(told), where=f"state of rank {source}")
    if min(places) // 2 < places[source] // 2:
        live_tensors = {**snapshot(run.network, run.optimizer), **run.updater.tensors()} if is_source else {}
        files = {name: _share(world, data, source) for name, data in _named(world, pack(live_tensors), source).items()}
        if is_behind:
            unpack(files, run.network, run.optimizer)
            run.updater.load_tensors(files)
    # On all ranks: one that was about to roll back has judged the latest update already, and must do so again.
    run.updater.load(state.updater)
    return state


def _place(state: TrainState) -> float:
    """How far a rank is, as one exact number: who has gone back to a checkpoint, as all have agreed to, is further.

    The last bit is an evaluation: it ends in a meeting, too, and who has come out of it knows more.
    """
    return 2.0**40 * state.updater.roll_backs + 2.0 * state.update + (state.evaluated == state.update)


def _named(world: World, files: dict[str, bytes], source: int) -> dict[str, bytes]:
    """The files of rank `source`; their names only on the others."""
    names = json.loads(_share(world, json.dumps(sorted(files)).encode() if world.rank == source else b"", source))
    return {name: files.get(name, b"") if world.rank == source else b"" for name in names}


def _share(world: World, data: bytes, source: int) -> bytes:
    """The bytes of rank `source`."""
    (size,) = world.sum([float(len(data)) if world.rank == source else 0.0])
    buffer = torch.empty(int(size), dtype=torch.uint8, device=world.device)
    if world.rank == source:
        buffer.copy_(torch.from_numpy(np.frombuffer(data, np.uint8).copy()))
    world.share([buffer], source=source)
    return data if world.rank == source else buffer.cpu().numpy().tobytes()

"""The state that a network carries from update to update where its rows are streams.

Truncated backpropagation through time (Williams and Peng 1990): gradients flow back through one chunk, the state
through all of them. A state belongs to a lane, whichever rank runs it.

Shape letters: B streams that a microbatch reads, S streams of a lane, N frames of all streams laid end to end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from treadle.data import StreamBatch
from treadle.errors import IntegrityError
from treadle.nn import Network, State
from treadle.train.feed import Micro
from treadle.train.task import run_network
from treadle.train.tensors import read_tensors
from treadle.train.world import World

__all__ = ["CARRY_FILE", "Carried", "Carry", "NoCarry", "Position", "StreamMicro", "run_streams"]

CARRY_FILE = "carry.safetensors"

Position = tuple[int, int]
"""An epoch, and the number of an update in it."""


@dataclass(frozen=True, kw_only=True)
class StreamMicro(Micro):
    """A microbatch whose batch is a `StreamBatch`, and the update that it belongs to."""

    at: Position


class Carry(Protocol):
    """How a network runs over microbatches: what of its state outlives an update, and where that is kept."""

    def logits(self, network: nn.Module, micro: Micro, device: torch.device) -> Tensor:
        """The scores of a microbatch.

        It may come again, whole or in parts, while its update is not made: it then begins where it began.
        """
        ...

    def tensors(self, *, at: Position) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint before the update `at` keeps, by file and name: own copies, all of it on rank 0 alone.

        All ranks call it alike.
        """
        ...

    def load(self, files: Mapping[str, bytes], *, at: Position) -> None:
        """Go on from a checkpoint before the update `at`.

        Raises:
            IntegrityError: it does not hold the states of this network and plan.
        """
        ...


class NoCarry:
    """Every microbatch begins anew: rows are read whole."""

    def logits(self, network: nn.Module, micro: Micro, device: torch.device) -> Tensor:
        return run_network(network, micro.batch, device)

    def tensors(self, *, at: Position) -> dict[str, dict[str, Tensor]]:
        del at
        return {}

    def load(self, files: Mapping[str, bytes], *, at: Position) -> None: ...


class Carried:
    """The states of the streams of a rank's lanes.

    What an update leaves behind counts once a later one begins or is saved: an update that is made again, for want of
    memory, finds the states as they were. What a lost rank carried is in a checkpoint only.

    Args:
        network: its stack says what a state is.
        world: the ranks, which take lanes `rank::world`.
        lanes: shares of an update. streams: rows of a lane, S.
    """

    def __init__(self, network: Network, world: World, *, lanes: int, streams: int) -> None:
        self._world = world
        self._lanes = lanes
        self._streams = streams
        # Never read as it is: the state restarts at the first frame of each stream.
        initial = network.stack.initial_state(streams)
        self._blank = {name: torch.zeros(part.shape, dtype=part.dtype) for name, part in initial.items()}
        self._bits = {name: part.numel() * part.element_size() // 4 for name, part in self._blank.items()}
        self._states: dict[int, State] = {}
        self._next: dict[int, State] = {}
        self._next_of: Position = (-1, -1)

    def logits(self, network: nn.Module, micro: Micro, device: torch.device) -> Tensor:
        assert isinstance(micro, StreamMicro)
        self._settle(micro.at)
        batch = cast("StreamBatch", micro.batch)
        before, streams_B = self._state(micro.lane), None
        if len(batch.streams_B) < self._streams:
            streams_B = torch.from_numpy(batch.streams_B).to(device)
            before = {name: part.index_select(1, streams_B) for name, part in before.items()}
        logits, after = run_streams(network, batch, before, device)
        self._leave(micro.lane, streams_B, _sound({name: part.detach() for name, part in after.items()}))
        return logits

    def tensors(self, *, at: Position) -> dict[str, dict[str, Tensor]]:
        """Nothing where an epoch begins: all streams restart.

        Cost: one all-reduce of the states of all lanes, which are small beside the weights as a rule.
        """
        self._settle(at)
        if not at[1]:
            return {}
        everything = self._summed({lane: self._state(lane) for lane in self._own_lanes})
        if self._world.rank:
            return {}
        states = [self._unpacked(bits) for bits in everything]
        return {
            CARRY_FILE: {_key(lane, name): part for lane, state in enumerate(states) for name, part in state.items()}
        }

    def load(self, files: Mapping[str, bytes], *, at: Position) -> None:
        self._states, self._next, self._next_of = {}, {}, (-1, -1)
        if not at[1]:
            return
        if CARRY_FILE not in files:
            raise IntegrityError(f"checkpoint: got no {CARRY_FILE}, expected the states that streams carry")
        found = read_tensors(files[CARRY_FILE], where=CARRY_FILE)
        wanted = {_key(lane, name): part.shape for lane in range(self._lanes) for name, part in self._blank.items()}
        if {name: part.shape for name, part in found.items()} != wanted:
            raise IntegrityError(f"{CARRY_FILE}: got states of another network, or of other lanes or streams")
        for lane in self._own_lanes:
            self._states[lane] = {name: found[_key(lane, name)].to(self._world.device) for name in self._blank}

    @property
    def _own_lanes(self) -> range:
        return range(self._world.rank, self._lanes, self._world.size)

    def _state(self, lane: int) -> State:
        if lane not in self._states:
            self._states[lane] = {name: part.to(self._world.device) for name, part in self._blank.items()}
        return self._states[lane]

    def _settle(self, at: Position) -> None:
        """Take over what updates before `at` left behind."""
        if at > self._next_of:
            self._states.update(self._next)
            self._next, self._next_of = {}, at

    def _leave(self, lane: int, streams_B: Tensor | None, after: State) -> None:
        if streams_B is not None:  # the others have nothing left to read, or are read by another part
            base = self._next.get(lane, self._states[lane])
            after = {name: base[name].index_copy(1, streams_B, part) for name, part in after.items()}
        self._next[lane] = after

    def _summed(self, states: Mapping[int, State]) -> Tensor:
        """The bits of the states of all lanes, each of which one rank gives: [lanes, bits].

        As whole numbers, because -0.0 + 0.0 is not -0.0.
        """
        shape = (self._lanes, sum(self._bits.values()))
        everything = torch.zeros(shape, dtype=torch.int32, device=self._world.device)
        for lane, state in states.items():
            everything[lane] = torch.cat([state[name].contiguous().view(-1).view(torch.int32) for name in self._blank])
        return self._world.sum_tensor(everything)

    def _unpacked(self, bits: Tensor) -> State:
        parts = zip(self._blank.items(), bits.split(list(self._bits.values())), strict=True)
        return {name: part.clone().view(blank.dtype).view(blank.shape) for (name, blank), part in parts}


def run_streams(network: nn.Module, batch: StreamBatch, before: State, device: torch.device) -> tuple[Tensor, State]:
    """The scores of each frame, and the state after the last frame of each stream.

    Args:
        before: the state of the batch's streams before their first frames.
    """
    inputs = torch.from_numpy(batch.inputs).to(device, non_blocking=True)
    # Cells that pad their rows need not look for where to cut them where nothing restarts.
    starts = torch.from_numpy(batch.starts_N).to(device, non_blocking=True) if batch.starts_N.any() else None
    return network(inputs, torch.from_numpy(batch.lengths_B), packed=True, state=before, starts=starts)


def _sound(state: State) -> State:
    """The state, anew for streams in which it left the finite numbers: no update after them would be finite."""
    finite_B = torch.stack([torch.isfinite(part).all(dim=2).all(dim=0) for part in state.values()]).all(dim=0)
    return {name: torch.where(finite_B[None, :, None], part, 0.0) for name, part in state.items()}


def _key(lane: int, name: str) -> str:
    return f"lane/{lane}/{name}"

"""Parameters, gradients and moments spread over the ranks (FSDP2), for networks too large to be held by each.

Each part of a network (embedding, layer, head) is gathered before it runs and given up after it, forward and backward,
and its gradients are added up by reduce-scatter as soon as they are known. A part is gathered by all ranks together,
so all of them make the same number of passes: a rank with fewer microbatches than another runs empty ones.

What stands in a checkpoint is the whole network and its whole moments, under the same names as without sharding: any
number of ranks goes on from it, sharded or not.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from treadle.nn import Network
from treadle.train.world import World

# Renamed in torch 2.13, which warns of the old names.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

__all__ = ["gathered", "is_sharded", "placed", "shard", "unsharded", "whole"]


def shard(network: nn.Module, world: World) -> None:
    """Spread the parameters of `network` over the ranks, in place; it is called as before.

    Its parameters are other objects afterwards: build the optimizer, and whatever else holds on to them, after this.
    All ranks hold the same values before.

    Args:
        network: with `parts`, the modules that are gathered one at a time.
    """
    # It warns of operations in place on what a part returns, where that is a view. There are none here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(world.device.type, (world.size,))
    assert isinstance(network, Network)
    tied = getattr(network.head, "_tied", ())  # weights that two parts share stay gathered over the whole pass
    for part in network.parts:
        if part not in (*tied, network.head if tied else None) and any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
        if hasattr(part, "padded"):  # the method that a network calls beside `forward`
            register_fsdp_forward_method(part, "padded")
    fully_shard(network, mesh=mesh)
    for module in _sharded(network):
        # Sums, not means: losses are divided by one count of all ranks. gloo has no factor to multiply by.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.set_custom_all_gather(_AllGather(world))  # type: ignore[arg-type]
        module.set_custom_reduce_scatter(_ReduceScatter(world))  # type: ignore[arg-type]


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(network, FSDPModule)


@contextlib.contextmanager
def whole(network: nn.Module) -> Iterator[None]:
    """Every rank holds the whole network within, so that each can run it as often as it likes; not for training."""
    if not is_sharded(network):
        yield
        return
    modules = _sharded(network)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(module is not network, recurse=False)


def gathered(files: Mapping[str, Mapping[str, Tensor]], *, keep: bool) -> dict[str, dict[str, Tensor]]:
    """Live tensors by file and name with those that are spread put together; all ranks call it alike.

    Args:
        keep: whether this rank wants them. The others get empty files.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for file, tensors in files.items():
        found[file] = {}
        for name, tensor in tensors.items():  # one at a time: no rank holds all of them that does not keep them
            one = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if keep:
                found[file][name] = one
    return found


def placed(full: Tensor, like: Tensor) -> Tensor:
    """`full` on the device of `like`, and spread over the ranks where `like` is: every rank has `full`, and cuts it."""
    full = full.to(like.device)
    if not isinstance(like, DTensor) or full.shape != like.shape:  # AdamW's count of steps is a scalar
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def unsharded(network: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """The network itself, or where it is sharded a whole one on every rank; all ranks call it alike.

    Args:
        build: makes a network of the same spec.
    """
    if not is_sharded(network):
        return network
    fresh = build()
    files = gathered({"": {name: part.detach() for name, part in network.state_dict().items()}}, keep=True)
    fresh.load_state_dict(files[""])
    return fresh


def _sharded(network: nn.Module) -> list[FSDPModule]:
    return [module for module in network.modules() if isinstance(module, FSDPModule)]


class _Meets:
    """How FSDP2 meets other ranks here: as everybody does, through the world."""

    def __init__(self, world: World) -> None:
        self._world = world

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Meets):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        with self._world.meeting:
            return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


class _ReduceScatter(_Meets):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        with self._world.meeting:
            return _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)

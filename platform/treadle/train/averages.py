"""A running mean of the weights, which is evaluated and kept in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from treadle.errors import IntegrityError
from treadle.train.sharding import placed
from treadle.train.tensors import listed, local

__all__ = ["Average"]


class Average:
    """An exponential mean of a network's weights, on its device.

    Source: Polyak and Juditsky 1992; the decay min(decay, (1 + n) / (10 + n)) of update n as in TensorFlow's
    ExponentialMovingAverage (`num_updates`): a short run's mean forgets the initial weights in time.

    Args:
        network: whose parameters are followed, from the values that they have now. decay: per update.

    Cost: one times the weights; an update reads two of these and writes one.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._network = network
        self._decay = decay
        self._parameters = list(network.parameters())
        self._means = [p.detach().clone() for p in self._parameters]
        self._updates = torch.zeros((), dtype=torch.float64, device=self._parameters[0].device)

    @torch.no_grad()
    def move(self, taken: Tensor) -> None:
        """After an update.

        Args:
            taken: 1 where it moved the weights, 0 where it was refused; on the device, where it stays.
        """
        means, weights = self._local()
        decay = ((1 + self._updates) / (10 + self._updates)).clamp(max=self._decay)
        share = ((1 - decay) * taken).to(means[0].dtype)
        # One by one: the operation over lists wants the share as a number, which the host does not know yet.
        for mean, weight in zip(means, weights, strict=True):
            mean.lerp_(weight, share)
        self._updates += taken

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The network has the mean's weights within, and its own again after."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def keep(self) -> None:
        """Give the network the mean's weights for good."""
        means, weights = self._local()
        listed._foreach_copy_(weights, means)

    def tensors(self) -> tuple[dict[str, Tensor], Tensor]:
        """The mean under the names of the network's state, what is not averaged included, and the count of updates."""
        means = {id(p): mean for p, mean in zip(self._parameters, self._means, strict=True)}
        state = self._network.state_dict(keep_vars=True)
        named = {name: means[id(part)] if id(part) in means else part.detach() for name, part in state.items()}
        return named, self._updates

    def load(self, means: Mapping[str, Tensor], updates: Tensor) -> None:
        """Take back what `tensors` gave.

        Raises:
            IntegrityError: a mean is missing, or of another shape.
        """
        names = [name for name, _ in self._network.named_parameters()]
        for name, mean in zip(names, self._means, strict=True):
            if name not in means or means[name].shape != mean.shape:
                seen = tuple(means[name].shape) if name in means else "nothing"
                raise IntegrityError(f"mean of {name}: got {seen}, expected {tuple(mean.shape)}")
        with torch.no_grad():
            for name, mean in zip(names, self._means, strict=True):
                mean.copy_(placed(means[name], mean))
            self._updates.copy_(updates)

    def restart(self) -> None:
        """Begin anew from the network's weights."""
        means, weights = self._local()
        listed._foreach_copy_(means, weights)
        self._updates.zero_()

    def _local(self) -> tuple[list[Tensor], list[Tensor]]:
        """(means, weights) of this rank."""
        return [local(mean) for mean in self._means], [local(p.detach()) for p in self._parameters]

    def _swap(self) -> None:
        # By value: kernels of recurrent layers hold on to the memory of their weights.
        for mean, weight in zip(*self._local(), strict=True):
            own = weight.clone()
            weight.copy_(mean)
            mean.copy_(own)

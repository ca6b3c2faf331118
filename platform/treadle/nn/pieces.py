"""A classifying network that reads rows piece by piece, so that a row of any length trains in the memory of one.

Shape letters: B rows, T time steps, D features, H outputs of the stack, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from treadle.errors import ConfigError
from treadle.nn.cell import State
from treadle.nn.heads import ClassifyHead
from treadle.nn.network import Network
from treadle.nn.pooling import pool_last, pool_max, pool_mean
from treadle.nn.rows import Lengths, Rows

__all__ = ["PieceReader"]

_POOLINGS = ("last", "mean", "max")


@dataclass(frozen=True, kw_only=True)
class PieceReader:
    """Runs a network over pieces of the same rows; what a piece leaves behind is a state as `train_in_chunks` takes it.

    Args:
        network: classifies whole rows, in one direction, by the last, the mean or the largest output.

    Raises:
        ConfigError: a network that needs the whole row at once; the message says why.
    """

    network: Network

    def __post_init__(self) -> None:
        head = self.network.head
        if not isinstance(head, ClassifyHead):
            raise ConfigError(f"network: got a {type(head).__name__}, expected a ClassifyHead to read rows in pieces")
        if head.pool.name not in _POOLINGS:
            raise ConfigError(
                f"pooling: got {head.pool.name}, expected one of {list(_POOLINGS)} to read rows in pieces"
            )
        if getattr(self.network.stack, "bidirectional", False):
            raise ConfigError("model.bidirectional: got true, expected false to read rows in pieces")

    def read(
        self, x_BTD: Tensor, lengths: Lengths, before: tuple[State, Tensor, Tensor] | None
    ) -> tuple[State, Tensor, Tensor]:
        """What is known after one more piece: the stack's state, the pooled outputs [B, H], the frames seen [B].

        Args:
            x_BTD: frames or tokens of the piece, padded.
            lengths: frames of each row in this piece, 1 or more.
            before: what the piece before gave; None for the first.
        """
        network, shape = self.network, (x_BTD.shape[0], x_BTD.shape[1])
        rows = Rows.of_lengths(lengths, device=x_BTD.device, padded=shape)
        state, pooled, seen = before if before is not None else (None, None, None)
        packed = network._embedded(rows.pack(x_BTD))  # noqa: SLF001 - a part of the network in all but place
        h_NH, after = network.stack(packed, state, offsets=rows)
        return after, self._pooled(h_NH, rows, pooled, seen), _count(rows, seen)

    def logits(self, after: tuple[State, Tensor, Tensor]) -> Tensor:
        """logits_BK once the last piece is read."""
        head = self.network.head
        assert isinstance(head, ClassifyHead)
        return head.linear(after[1].to(head.linear.weight.dtype))

    def _pooled(self, h_NH: Tensor, rows: Rows, pooled_BH: Tensor | None, seen_B: Tensor | None) -> Tensor:
        head = self.network.head
        assert isinstance(head, ClassifyHead)
        if head.pool.name == "last":
            return pool_last(h_NH, rows)
        now_BH = pool_mean(h_NH, rows) if head.pool.name == "mean" else pool_max(h_NH, rows)
        if pooled_BH is None or seen_B is None:
            return now_BH
        if head.pool.name == "max":
            return torch.maximum(pooled_BH, now_BH)
        share_B1 = (rows.lengths_S.double() / (seen_B + rows.lengths_S))[:, None].to(now_BH.dtype)
        return pooled_BH + share_B1 * (now_BH - pooled_BH)


def _count(rows: Rows, seen_B: Tensor | None) -> Tensor:
    return rows.lengths_S if seen_B is None else seen_B + rows.lengths_S

"""One vector a row from its packed frames: last, mean, max or attention.

Shape letters: N frames of all rows laid end to end, S rows, D features, H hidden units of the scorer,
A heads of the attention.

A row's vector depends on its own frames only, to the bit: each row is summed frame by frame, whatever stands
beside it (tests/unit/nn/test_pooling.py). Sums run in fp32, in fp64 beside fp64. On CUDA `index_add` adds in an order
that changes from run to run unless `torch.use_deterministic_algorithms(True)` is set.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from treadle.errors import ConfigError, did_you_mean
from treadle.nn.gates import state_dtype
from treadle.nn.rows import Rows
from treadle.spec import Pooling

__all__ = [
    "AttentionPooling",
    "RowPooling",
    "pool_attention",
    "pool_last",
    "pool_max",
    "pool_mean",
    "segment_softmax",
]

_ATTENTION = "attention"
_BLOCK = 256
_NAMES = ("last", "mean", "max", _ATTENTION)


def pool_last(h_ND: Tensor, rows: Rows, num_directions: int = 1) -> Tensor:
    """What each direction gave last, [S, D]: ahead at the row's last frame, back at its first.

    Args:
        h_ND: outputs of a stack; with two directions the first half of the features is ahead's.
        rows: which frames belong to which row.
        num_directions: 1 or 2.

    Raises:
        ConfigError: frames that are not the rows', or features that do not halve.
    """
    _check_frames("h_ND", h_ND, rows)
    _check_directions(num_directions, h_ND.shape[-1])
    last_SD = h_ND.index_select(0, rows.last_S)
    if num_directions == 1:
        return last_SD
    half = h_ND.shape[-1] // 2
    first_SD = h_ND[:, half:].index_select(0, rows.offsets[:-1])
    return torch.cat((last_SD[:, :half], first_SD), dim=-1)


def pool_mean(h_ND: Tensor, rows: Rows) -> Tensor:
    """The mean frame of each row, [S, D], in fp32 (fp64 beside fp64).

    Raises:
        ConfigError: frames that are not the rows'.
    """
    _check_frames("h_ND", h_ND, rows)
    return _row_sums(_wide(h_ND), rows) / rows.lengths_S[:, None]


def pool_max(h_ND: Tensor, rows: Rows) -> Tensor:
    """The largest value of each feature in each row, [S, D], in the format of `h_ND`.

    Frames that share the largest value share its gradient equally. A row with a NaN gives NaN.

    Raises:
        ConfigError: frames that are not the rows'.
    """
    _check_frames("h_ND", h_ND, rows)
    return _RowMax.apply(h_ND, rows.row_N, rows.num_rows)  # type: ignore[no-any-return]


def segment_softmax(scores: Tensor, rows: Rows) -> Tensor:
    """Softmax over the frames of each row, in fp32 (fp64 beside fp64), in the shape of `scores`.

    Args:
        scores: [N], or [N, A] for A softmaxes side by side. -inf shuts a frame out; a row with nothing but -inf,
            and one with a NaN or +inf, gives NaN.
        rows: which frames belong to which row.

    Raises:
        ConfigError: frames that are not the rows'.

    Cost: pooling with it takes 0.2 to 0.65 of the time of a masked softmax over rows that are padded already, forward
    and backward (32 rows of up to 500 frames, fill 0.39, 256 features, fp32, one thread).
    """
    _check_frames("scores", scores, rows)
    wide = _wide(scores)
    # The shift cancels in the quotient, so no gradient need pass it; without it exp overflows from 89.
    weights = torch.exp(wide - _row_max(wide.detach(), rows.row_N, rows.num_rows).index_select(0, rows.row_N))
    return weights / _row_sums(weights, rows).index_select(0, rows.row_N)


def pool_attention(h_ND: Tensor, scores_NA: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Frames weighted by a softmax over each row, [S, A * D], and the weights, [N, A].

    Args:
        h_ND: frames.
        scores_NA: a score a frame and head, before the softmax.
        rows: which frames belong to which row.

    Returns:
        The heads' weighted means side by side, and the weights, both in fp32 (fp64 beside fp64).

    Raises:
        ConfigError: frames that are not the rows'.
    """
    _check_frames("h_ND", h_ND, rows)
    weights_NA = segment_softmax(scores_NA, rows)
    wide_ND = _wide(h_ND)
    # A head at a time: one product over all of them would hold [N, A, D].
    heads = [_row_sums(wide_ND * weight_N1, rows) for weight_N1 in weights_NA.split(1, dim=-1)]
    return torch.cat(heads, dim=-1), weights_NA


class AttentionPooling(nn.Module):
    """A learned weighted mean of the frames of each row.

    Source: Lin et al. 2017, arXiv 1703.03130, eq. 5 and 6 (additive, several heads); Ilse et al. 2018,
    arXiv 1802.04712, eq. 9 (gated).

    Args:
        input_size: features per frame, D.
        hidden_size: hidden units of the scorer; D / 2, rounded up, where None.
        num_heads: weighted means laid side by side, A.
        gated: multiply the scorer's tanh units by sigmoid units.

    Raises:
        ConfigError: sizes below 1.
    """

    def __init__(
        self, input_size: int, hidden_size: int | None = None, *, num_heads: int = 1, gated: bool = False
    ) -> None:
        super().__init__()
        hidden_size = (input_size + 1) // 2 if hidden_size is None else hidden_size
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_heads", num_heads)):
            if size < 1:
                raise ConfigError(f"{name}: got {size}, expected 1 or more")
        self.num_heads = num_heads
        self.output_size = num_heads * input_size
        self.hidden = nn.Linear(input_size, hidden_size)
        self.gate = nn.Linear(input_size, hidden_size) if gated else None
        self.score = nn.Linear(hidden_size, num_heads, bias=False)  # a bias would cancel in the softmax

    def forward(self, h_ND: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """The pooled rows [S, A * D] and the weights [N, A], which sum to 1 over each row.

        Raises:
            ConfigError: frames that are not the rows'.
        """
        units_NH = torch.tanh(self.hidden(h_ND))
        if self.gate is not None:
            units_NH = units_NH * torch.sigmoid(self.gate(h_ND))
        return pool_attention(h_ND, self.score(units_NH), rows)


class RowPooling(nn.Module):
    """One vector a row, by the pooling of that name.

    Args:
        pooling: last, mean, max or attention, or an `AttentionPooling` with options of its own.
        input_size: features per frame.
        num_directions: 1 or 2; only `last` asks.

    Raises:
        ConfigError: an unknown name, or sizes that do not fit.
    """

    def __init__(self, pooling: Pooling | str | AttentionPooling, input_size: int, num_directions: int = 1) -> None:
        super().__init__()
        _check_directions(num_directions, input_size)
        given = pooling.value if isinstance(pooling, Pooling) else pooling
        self.name = given if isinstance(given, str) else _ATTENTION
        if self.name not in _NAMES:
            near = did_you_mean(self.name, _NAMES)
            raise ConfigError(f"pooling: got {self.name!r}, expected one of {list(_NAMES)}{near}")
        self.num_directions = num_directions
        self.attention: AttentionPooling | None = None
        if self.name == _ATTENTION:
            self.attention = AttentionPooling(input_size) if isinstance(given, str) else given
        self.output_size = input_size if self.attention is None else self.attention.output_size

    def forward(self, h_ND: Tensor, rows: Rows) -> Tensor:
        """The pooled rows, [S, output_size].

        Raises:
            ConfigError: frames that are not the rows'.
        """
        if self.attention is not None:
            return self.attention(h_ND, rows)[0]
        if self.name == "mean":
            return pool_mean(h_ND, rows)
        return pool_max(h_ND, rows) if self.name == "max" else pool_last(h_ND, rows, self.num_directions)

    def extra_repr(self) -> str:
        return self.name


class _RowMax(torch.autograd.Function):
    """The maximum over each row; the backward pass looks for it again instead of keeping where it was.

    The derivative that torch has for scatter_reduce makes forward and backward cost 1.4 to 2.1 times as much (32 rows
    of up to 500 frames, 256 features, fp32, one thread).
    """

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, row_N: Tensor, num_rows: int) -> Tensor:
        max_SD = _row_max(h_ND, row_N, num_rows)
        ctx.save_for_backward(h_ND, max_SD, row_N)
        return max_SD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        h_ND, max_SD, row_N = ctx.saved_tensors
        top_ND = (h_ND == max_SD.index_select(0, row_N)).to(state_dtype(h_ND.dtype))
        count_SD = top_ND.new_zeros(max_SD.shape).index_add_(0, row_N, top_ND)
        share_SD = grads[0].to(count_SD.dtype) / count_SD
        return (top_ND * share_SD.index_select(0, row_N)).to(h_ND.dtype), None, None


def _row_max(x_N: Tensor, row_N: Tensor, num_rows: int) -> Tensor:
    """The maximum over each row of [N] or [N, D]; no gradient."""
    index = row_N.view(-1, *(1,) * (x_N.ndim - 1)).expand_as(x_N)
    lowest = x_N.new_full((num_rows, *x_N.shape[1:]), -torch.inf)
    return lowest.scatter_reduce(0, index, x_N, "amax")


def _row_sums(x_N: Tensor, rows: Rows) -> Tensor:
    """Sums over each row of [N] or [N, D]: blocks of frames first, then the blocks.

    One running sum over 32,768 frames of 0.1 is off by 3e-4 of itself in fp32; this way by 5e-6
    (test_means_of_long_rows_are_exact_enough).
    """
    tail = x_N.shape[1:]
    if rows.num_frames <= _BLOCK:
        return x_N.new_zeros((rows.num_rows, *tail)).index_add(0, rows.row_N, x_N)
    # Row s takes blocks from offsets[s] // BLOCK + s on: enough for its frames, and a bound that the host knows.
    first_S = rows.offsets[:-1] // _BLOCK + torch.arange(rows.num_rows, device=rows.device)
    block_N = first_S.index_select(0, rows.row_N) + rows.position_N // _BLOCK
    blocks = torch.arange(rows.num_frames // _BLOCK + rows.num_rows, device=rows.device)
    row_of_block = torch.searchsorted(first_S, blocks, right=True) - 1  # a block that nobody took adds zeros
    sums = x_N.new_zeros((len(blocks), *tail)).index_add(0, block_N, x_N)
    return x_N.new_zeros((rows.num_rows, *tail)).index_add(0, row_of_block, sums)


def _wide(x: Tensor) -> Tensor:
    return x.to(state_dtype(x.dtype))


def _check_frames(name: str, x_N: Tensor, rows: Rows) -> None:
    if x_N.ndim == 0 or x_N.shape[0] != rows.num_frames:
        raise ConfigError(
            f"{name}: got shape {tuple(x_N.shape)}, expected {rows.num_frames} packed frames at dim 0",
            hint="rows.pack(h_BTH) packs padded frames",
        )


def _check_directions(num_directions: int, size: int) -> None:
    if num_directions not in (1, 2) or size % num_directions:
        raise ConfigError(
            f"num_directions: got {num_directions} for {size} features, expected 1, or 2 for an even number"
        )

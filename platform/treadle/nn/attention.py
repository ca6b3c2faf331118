"""Self-attention over rows, with a state where it looks back over a window.

Shape letters: N frames of all rows laid end to end, B rows, T time steps, D width, A heads, E = D / A,
W frames that a frame looks back over beside itself, Q frames of a block, K = W + Q frames that a block sees.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from treadle.errors import ConfigError
from treadle.nn.autocast import low_precision_where_fast
from treadle.nn.cell import State, check_shapes
from treadle.nn.gates import state_dtype
from treadle.nn.rows import Rows

__all__ = ["AttentionLayer"]


# Shorter blocks cost more calls than they spare scores: 4,096 frames, window 16, forward and backward on one
# core take 43, 35 and 36 ms in blocks of 16, 32 and 64.
_SHORTEST_BLOCK = 32


class AttentionLayer(nn.Module):
    """Multi-head attention on normalised (RMS) input, each frame over its own row; the caller adds the residual.

    Positions enter as rotations of queries and keys, so only their distance counts. With a window, the rotation
    counts from the block and not from the row's start: it is as precise after a million frames as at first, and
    the carried state needs no position.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2; Su et al. 2021 (rotary positions), arXiv 2104.09864,
    section 3.2.2; window: Beltagy et al. 2020, arXiv 2004.05150, section 3.1, looking back only.

    Args:
        width: features of a frame, in and out.
        num_heads: parts of the width that attend on their own; each has an even number of features.
        causal: look at earlier frames and the own one; False looks at the whole row.
        window: how many frames a frame looks at, its own included, 2 or more; all where None. Only with a window
            is there a state, and with it runs in pieces and single steps.
        dropout: share of output values zeroed while training. Scores are not dropped: on a CPU, torch's fused kernel
            cannot, and would give way to one that keeps them all.
        rotary_base: wavelength / 2 pi of the slowest rotation, in frames.

    Cost: with a window, 2 * window scores a frame and head, and memory in proportion to the frames; without one,
    scores for all pairs of frames of a row, of which torch's fused kernels keep none.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        causal: bool,
        window: int | None = None,
        dropout: float = 0.0,
        rotary_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or width % (2 * num_heads):
            raise ConfigError(f"num_heads: got {num_heads}, expected one that parts a width of {width} into even sizes")
        if window is not None and (window < 2 or not causal):
            seen = window if causal else f"{window} for a layer that looks both ways"
            raise ConfigError(f"window: got {seen}, expected 2 or more frames for a causal layer, or None")
        self.width = width
        self.num_heads = num_heads
        self.causal = causal
        self.window = window
        self.rotary_base = rotary_base
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.state_names = ("key", "value", "count") if window is not None else ()

    def initial_state(self, num_rows: int) -> State:
        """The state before the first frame: keys and values [W, B, D], and how many of the newest are real [1, B, 1].

        Raises:
            ConfigError: the layer has no window.
        """
        if not self.causal:
            raise ConfigError("state: got attention both ways, expected one that looks back over a window")
        if self.window is None:
            raise ConfigError(
                "state: got causal attention without a window, expected one with a window: all that it looks back "
                "over would grow without bound",
                hint="set window, or run whole rows",
            )
        weight = self.qkv.weight
        shape = (self.window - 1, num_rows, self.width)
        parts = {"key": shape, "value": shape, "count": (1, num_rows, 1)}
        return {name: weight.new_zeros(shape, dtype=state_dtype(weight.dtype)) for name, shape in parts.items()}

    def forward(
        self,
        x_ND: Tensor,
        rows: Rows,
        state: State | None = None,
        *,
        starts_N: Tensor | None = None,
        final_state: bool = True,
    ) -> tuple[Tensor, State]:
        """Packed outputs [N, D], and the state after each row's last frame.

        Args:
            x_ND: packed frames.
            rows: where rows begin.
            state: where an earlier piece of the same rows ended; an empty past when not given.
            starts_N: True where a frame begins something new: no frame looks across it.
            final_state: False spares the state; {} comes back, as it does without a window.

        Raises:
            ConfigError: a state for a layer without a window, or shapes that do not fit.
        """
        self._check(x_ND, rows, starts_N)
        if state is not None or self.window is not None:
            state = self._checked(state, rows.num_rows)
        document_BT = None if starts_N is None else rows.pad(starts_N[:, None].long())[..., 0].cumsum(1)
        with low_precision_where_fast(x_ND):
            # Explicitly in the weights' format: beside bf16 inputs torch warns and leaves its fused kernel.
            qkv_BTD = rows.pad(self.qkv(self.norm(x_ND.to(self.norm.weight.dtype))))
            if state is None:
                attended_BTD, after = self._look_everywhere(qkv_BTD, rows, document_BT), {}
            else:
                attended_BTD, after = self._look_back(qkv_BTD, rows, document_BT, state)
            y_ND = self.out(rows.pack(attended_BTD))
        return self.dropout(y_ND.to(x_ND.dtype)), after if final_state else {}

    def step(self, x_BD: Tensor, state: State | None = None, *, starts: Tensor | None = None) -> tuple[Tensor, State]:
        """The output of one time step and the state after it; `starts` [B] is True at rows that begin something new.

        Raises:
            ConfigError: the layer has no window.
        """
        state = self.initial_state(x_BD.shape[0]) if state is None else state
        return self.forward(x_BD, Rows.full(x_BD.shape[0], 1, x_BD.device), state, starts_N=starts)

    def _look_everywhere(self, qkv_BTD: Tensor, rows: Rows, document_BT: Tensor | None) -> Tensor:
        q_BAT, k_BAT, v_BAT = (self._heads(part) for part in qkv_BTD.chunk(3, dim=-1))
        turns = self._turns(torch.arange(qkv_BTD.shape[1], device=qkv_BTD.device))
        valid = None
        if document_BT is not None:
            valid = document_BT[:, None, :, None] == document_BT[:, None, None, :]
            valid = valid.tril() if self.causal else valid & rows.valid_BT[:, None, None]
        elif not self.causal and not rows.is_full:
            valid = rows.valid_BT[:, None, None]
        # Padding stands after all frames of its row, so looking back alone never meets it.
        is_causal = self.causal and valid is None
        y_BAT = functional.scaled_dot_product_attention(
            _rotated(q_BAT, turns), _rotated(k_BAT, turns), v_BAT, attn_mask=valid, is_causal=is_causal
        )
        return y_BAT.transpose(1, 2).flatten(2)

    def _look_back(
        self, qkv_BTD: Tensor, rows: Rows, document_BT: Tensor | None, before: State
    ) -> tuple[Tensor, State]:
        """What each frame sees of the carried frames and of its row, and what to carry on."""
        num_past = before["key"].shape[0]
        q_BTD, k_BTD, v_BTD = qkv_BTD.chunk(3, dim=-1)
        k_BTD = torch.cat((before["key"].transpose(0, 1).to(k_BTD.dtype), k_BTD), dim=1)
        v_BTD = torch.cat((before["value"].transpose(0, 1).to(v_BTD.dtype), v_BTD), dim=1)
        if document_BT is None:
            document_BT = torch.zeros(q_BTD.shape[:2], dtype=torch.int64, device=q_BTD.device)
        after = {
            "key": _ends(k_BTD, num_past, rows),
            "value": _ends(v_BTD, num_past, rows),
            "count": _count(document_BT, num_past, rows, before["count"]),
        }
        age_W = torch.arange(num_past, 0, -1, device=q_BTD.device)
        carried_BW = torch.where(age_W <= before["count"][0], 0, -1)  # 0 goes on with the state's document
        attended_BTD = self._blockwise(q_BTD, k_BTD, v_BTD, document_BT, carried_BW)
        return attended_BTD, {name: part.to(before[name].dtype) for name, part in after.items()}

    def _blockwise(
        self, q_BTD: Tensor, k_BTD: Tensor, v_BTD: Tensor, document_BT: Tensor, carried_BW: Tensor
    ) -> Tensor:
        """Attention of blocks of Q frames, each over the K frames that any of them may see."""
        num_rows, num_steps, _ = q_BTD.shape
        num_past = carried_BW.shape[1]
        size = min(num_steps, max(_SHORTEST_BLOCK, num_past + 1))
        fill = -num_steps % size  # whole blocks; nothing that is kept looks ahead into it
        q_BTD, k_BTD, v_BTD = (functional.pad(part, (0, 0, 0, fill)) for part in (q_BTD, k_BTD, v_BTD))
        document_BT = functional.pad(document_BT, (0, fill))
        visible_MQK = _visible(document_BT.unflatten(1, (-1, size)), torch.cat((carried_BW, document_BT), dim=1))
        turns = self._turns(torch.arange(num_past + size, device=q_BTD.device))
        y_MAQE = functional.scaled_dot_product_attention(
            _rotated(self._heads(q_BTD.unflatten(1, (-1, size)).flatten(0, 1)), turns[:, num_past:]),
            _rotated(self._beside(k_BTD, num_past + size, size), turns),
            self._beside(v_BTD, num_past + size, size),
            attn_mask=visible_MQK[:, None],
        )
        return y_MAQE.transpose(1, 2).flatten(2).reshape(num_rows, num_steps + fill, -1)[:, :num_steps]

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _beside(self, x_BTD: Tensor, num_seen: int, size: int) -> Tensor:
        """For each block of each row, the frames it may see: [blocks, A, K, E]."""
        blocks = x_BTD.unfold(1, num_seen, size).flatten(0, 1)
        return blocks.unflatten(1, (self.num_heads, -1)).transpose(-1, -2)

    def _turns(self, position_T: Tensor) -> Tensor:
        """Cosines and sines [2, T, E / 2] of the positions' angles, which fp32 would blur from 10^5 frames on."""
        half = self.width // self.num_heads // 2
        exponent = torch.arange(half, device=position_T.device, dtype=torch.float64) / half
        angle = position_T[:, None] * self.rotary_base**-exponent
        return torch.stack((angle.cos(), angle.sin())).to(self.qkv.weight.dtype)

    def _check(self, x_ND: Tensor, rows: Rows, starts_N: Tensor | None) -> None:
        if tuple(x_ND.shape) != (expected := (rows.num_frames, self.width)):
            raise ConfigError(f"x_ND: got shape {tuple(x_ND.shape)}, expected {expected}, frames and features")
        if starts_N is not None and (starts_N.shape != x_ND.shape[:1] or starts_N.dtype != torch.bool):
            seen = f"{tuple(starts_N.shape)} of {starts_N.dtype}"
            raise ConfigError(f"starts_N: got shape {seen}, expected {expected[:1]} of torch.bool, one a frame")

    def _checked(self, state: State | None, num_rows: int) -> State:
        initial = self.initial_state(num_rows)
        if state is None:
            return initial
        check_shapes(state, initial)
        return state

    def extra_repr(self) -> str:
        return f"{self.width}, {self.num_heads}, causal={self.causal}, window={self.window}"


def _rotated(x_BATE: Tensor, turns: Tensor) -> Tensor:
    """Each pair of features (e, e + E / 2) turned by the angle of its position."""
    left, right = x_BATE.to(turns.dtype).chunk(2, dim=-1)
    cos, sin = turns
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x_BATE.dtype)


def _visible(document_BMQ: Tensor, beside_BT: Tensor) -> Tensor:
    """Whether a frame of a block may look at each frame beside it: [blocks, Q, K]."""
    _, num_blocks, size = document_BMQ.shape
    num_past = beside_BT.shape[1] - num_blocks * size
    frame_Q = torch.arange(size, device=beside_BT.device) + num_past
    distance_QK = frame_Q[:, None] - torch.arange(num_past + size, device=beside_BT.device)
    near_QK = (distance_QK >= 0) & (distance_QK <= num_past)
    beside_BMK = beside_BT.unfold(1, num_past + size, size)
    return ((document_BMQ[..., None] == beside_BMK[:, :, None]) & near_QK).flatten(0, 1)


def _ends(x_BTD: Tensor, num_past: int, rows: Rows) -> Tensor:
    """The last frames of each row, [W, B, D], of the carried ones followed by the padded ones."""
    if rows.is_full:
        # A copy: a view would keep all frames alive for as long as the state lives.
        return x_BTD[:, -num_past:].transpose(0, 1).clone(memory_format=torch.contiguous_format)
    num_rows, num_slots, _ = x_BTD.shape
    first_B = torch.arange(num_rows, device=x_BTD.device) * num_slots + rows.lengths_S
    index_WB = first_B + torch.arange(num_past, device=x_BTD.device)[:, None]
    return x_BTD.flatten(0, 1).index_select(0, index_WB.flatten()).unflatten(0, index_WB.shape)


def _count(document_BT: Tensor, num_past: int, rows: Rows, count: Tensor) -> Tensor:
    """How many frames of its last document each row has seen, as far as the state reaches: [1, B, 1]."""
    last_B1 = rows.last(document_BT[..., None])
    seen_B1 = ((document_BT == last_B1) & rows.valid_BT).sum(1, keepdim=True)
    return (seen_B1 + torch.where(last_B1 == 0, count[0], 0)).clamp(max=num_past)[None]

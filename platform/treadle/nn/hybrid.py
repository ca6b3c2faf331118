"""Recurrent layers with attention layers between them, called like a stack of recurrent layers alone.

Shape letters: B rows, T time steps, D features, N frames of all rows laid end to end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from treadle.errors import ConfigError
from treadle.nn.attention import AttentionLayer
from treadle.nn.cell import State, check_like
from treadle.nn.feedforward import FeedForward
from treadle.nn.frames import Frames, read_frames
from treadle.nn.recompute import recomputed
from treadle.nn.rows import Lengths, Offsets, Rows
from treadle.nn.stack import RecurrentStack

__all__ = ["HybridStack"]


class HybridStack(nn.Module):
    """Recurrent layers, and after every `attention_every`-th of them an attention layer, all residual and normalised.

    A recurrent layer is a `RecurrentStack` of one layer. An attention layer is x + attention(norm(x)) and then
    x + mlp(norm(x)). The recurrent layers carry what is far back, the attention picks from what is near.

    Source: De et al. 2024 (Griffin: recurrences beside attention over a window), arXiv 2402.19427, section 2.

    Args:
        cell_class: the recurrent layers' class, such as `MinGRU`.
        input_size: features per frame.
        hidden_size: hidden units per recurrent layer and direction.
        num_layers: recurrent layers.
        attention_every: recurrent layers before each attention layer, 1 to `num_layers`.
        num_heads: heads of an attention layer; each has an even share of hidden_size * directions.
        window: frames that a frame looks at, its own included; all earlier ones of its row where None, and then the
            stack carries no state. Not for `bidirectional`, which looks at the whole row.
        bidirectional: recurrent layers in both directions, attention both ways.
        dropout: share of values zeroed after each layer but the last, while training.
        mlp_factor: width of the feed-forward layer after each layer of either kind, in widths of the layer; 0 leaves
            it out.
        batch_first: padded inputs and outputs are [B, T, ...], else [T, B, ...].
        options: further arguments of the recurrent layers.

    Raises:
        ConfigError: arguments that do not fit one another.

    Cost: attention pads rows to the longest one of a batch, so rows of like length go together best.
    """

    packed = True
    """Packed frames are the form that costs least."""

    def __init__(
        self,
        cell_class: Callable[..., RecurrentStack],
        input_size: int,
        hidden_size: int,
        num_layers: int = 2,
        *,
        attention_every: int = 2,
        num_heads: int = 4,
        window: int | None = None,
        bidirectional: bool = False,
        dropout: float = 0.0,
        mlp_factor: float = 4.0,
        batch_first: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        if not 1 <= attention_every <= num_layers:
            raise ConfigError(f"attention_every: got {attention_every}, expected 1 to num_layers ({num_layers})")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.bidirectional = bidirectional
        self.recompute = False  # see `recompute_layers`
        self.window = window
        self.num_directions = 2 if bidirectional else 1
        self.output_size = hidden_size * self.num_directions
        options = {"norm": True, "residual": True, **options}
        self.recurrent = nn.ModuleList()
        self.attention = nn.ModuleList()
        self.mlp = nn.ModuleList()
        self._order: list[tuple[str, int]] = []
        for index in range(num_layers):
            size = self.output_size if index else input_size
            layer = cell_class(size, hidden_size, 1, bidirectional=bidirectional, mlp_factor=mlp_factor, **options)
            self.recurrent.append(layer)
            self._order.append(("recurrent", index))
            if (index + 1) % attention_every == 0:
                self._order.append(("attention", len(self.attention)))
                self.attention.append(
                    AttentionLayer(self.output_size, num_heads, causal=not bidirectional, window=window)
                )
                self.mlp.append(FeedForward(self.output_size, mlp_factor) if mlp_factor else nn.Identity())
        self._set_dropout(dropout)
        self.state_names = tuple(f"{place}.{name}" for place, layer in self._named() for name in _state_names(layer))

    def _set_dropout(self, dropout: float) -> None:
        """After each layer but the last. A stack of one layer is its own last one, and so built without."""
        last_kind, last_index = self._order[-1]
        for kind, index in self._order:
            parts = [self._layer(kind, index)] + ([self.mlp[index]] if kind == "attention" else [])
            share = 0.0 if (kind, index) == (last_kind, last_index) else dropout
            for module in (module for part in parts for module in part.modules()):
                if isinstance(module, nn.Dropout):
                    module.p = share

    def _layer(self, kind: str, index: int) -> RecurrentStack | AttentionLayer:
        layers = self.recurrent if kind == "recurrent" else self.attention
        return cast("RecurrentStack | AttentionLayer", layers[index])

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """Its layers of all kinds in the order in which they run."""
        found: list[nn.Module] = []
        for kind, index in self._order:
            found.append(self._layer(kind, index))
            found += [self.mlp[index]] if kind == "attention" else []
        return tuple(found)

    def _named(self) -> list[tuple[str, RecurrentStack | AttentionLayer]]:
        return [(f"{kind}{index}", self._layer(kind, index)) for kind, index in self._order]

    def initial_state(self, num_rows: int) -> State:
        """The state before the first frame: that of each layer, its names led by the layer's, such as "recurrent0.h".

        Raises:
            ConfigError: a stack that is bidirectional or has no window.
        """
        return {
            f"{place}.{name}": part
            for place, layer in self._named()
            for name, part in layer.initial_state(num_rows).items()
        }

    def forward(
        self,
        x: Tensor | PackedSequence,
        state: State | None = None,
        *,
        lengths: Lengths | None = None,
        offsets: Offsets | Rows | None = None,
        starts: Tensor | None = None,
        gaps: Tensor | None = None,
        final_state: bool = True,
    ) -> tuple[Any, State]:
        """Outputs of the last layer in the form of `x`, and the state at the last frame of every row.

        Without a window only the recurrent layers' part of a state comes back, and none is taken.

        Args:
            x, lengths, offsets, starts, gaps: as for `RecurrentStack`.
            state: where an earlier piece of the same rows ended; the initial state when not given.
            final_state: False spares the final state; {} comes back.

        Raises:
            ConfigError: a state for a stack that is bidirectional or has no window, or arguments that do not fit.
            DataError: an empty row; the message names its index.
        """
        frames = read_frames(
            x,
            input_size=self.input_size,
            batch_first=self.batch_first,
            lengths=lengths,
            offsets=offsets,
            starts=starts,
            gaps=gaps,
        ).packed()
        if state is not None:
            state = self._checked(state, frames.rows.num_rows)
        call = _packed_call(frames)
        values, after = frames.values, {}
        for place, layer in self._named():
            before = None if state is None else _part(state, place)
            if isinstance(layer, AttentionLayer):
                call_layer = functools.partial(recomputed, layer) if self._again else layer
                added, end = call_layer(values, frames.rows, before, starts_N=frames.starts_N, final_state=final_state)
                values = self._around(place, values, added)
            else:
                values, end = call(layer, values, before, final_state)
            after.update({f"{place}.{name}": part for name, part in end.items()})
        return frames.restore(values), after

    def step(
        self,
        x_BD: Tensor,
        state: State | None = None,
        *,
        starts: Tensor | None = None,
        gaps: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """The output of one time step and the state after it; arguments as for `RecurrentStack.step`.

        Raises:
            ConfigError: a stack that is bidirectional or has no window, or arguments that do not fit.
        """
        num_rows = x_BD.shape[0]
        state = self._checked(self.initial_state(num_rows) if state is None else state, num_rows)
        after = {}
        for place, layer in self._named():
            before = _part(state, place)
            if isinstance(layer, AttentionLayer):
                added_BD, end = layer.step(x_BD, before, starts=starts)
                x_BD = self._around(place, x_BD, added_BD)
            else:
                x_BD, end = layer.step(x_BD, before, starts=starts, gaps=gaps)
            after.update({f"{place}.{name}": part for name, part in end.items()})
        return x_BD, after

    def _around(self, place: str, x: Tensor, added: Tensor) -> Tensor:
        x = x + added
        mlp = self.mlp[int(place.removeprefix("attention"))]
        if not isinstance(mlp, FeedForward):
            return x
        return x + (recomputed(mlp, x) if self._again else mlp(x))

    @property
    def _again(self) -> bool:
        return self.recompute and torch.is_grad_enabled()

    def _checked(self, state: State, num_rows: int) -> State:
        check_like(state, self.initial_state(num_rows))
        return state

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, order={[kind for kind, _ in self._order]}"


def _state_names(layer: RecurrentStack | AttentionLayer) -> tuple[str, ...]:
    if isinstance(layer, AttentionLayer):
        return layer.state_names
    return tuple(layer.initial_state(1))


def _part(state: State, place: str) -> State:
    """The state of one layer."""
    return {name.removeprefix(f"{place}."): part for name, part in state.items() if name.startswith(f"{place}.")}


def _packed_call(
    frames: Frames,
) -> Callable[[RecurrentStack, Tensor, State | None, bool], tuple[Tensor, State]]:
    """A call of a recurrent layer over packed values: as padded rows where that is but a view, for kernels want it."""
    rows = frames.rows
    if rows.is_full:
        starts = None if frames.starts_N is None else rows.pad(frames.starts_N)
        gaps = None if frames.gaps_N is None else rows.pad(frames.gaps_N)

        def call(layer: RecurrentStack, x: Tensor, state: State | None, final_state: bool) -> tuple[Tensor, State]:
            y, end = layer(rows.pad(x), state, starts=starts, gaps=gaps, final_state=final_state)
            return rows.pack(y), end

        return call
    # On the host, so that no layer reads them back from the device; attention has had to once, to pad.
    offsets = torch.tensor((0, *rows.lengths)).cumsum(0)

    def call(layer: RecurrentStack, x: Tensor, state: State | None, final_state: bool) -> tuple[Tensor, State]:
        return layer(x, state, offsets=offsets, starts=frames.starts_N, gaps=frames.gaps_N, final_state=final_state)

    return call

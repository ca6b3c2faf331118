"""Layers on top of one another, in one or two directions, over rows of unlike length.

Shape letters: B or S rows, T time steps, D features, H hidden, L layers * directions, N frames of all rows laid
end to end.

A cell knows one layer in one direction; everything else is here, once for all cells.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from treadle.errors import ConfigError
from treadle.nn.cell import Cell, State, check_state
from treadle.nn.frames import Frames, groups_of_like_length, read_frames, split_at_starts
from treadle.nn.gates import state_dtype
from treadle.nn.layer import Layer, LayerOptions, LayerState
from treadle.nn.recompute import recomputed
from treadle.nn.rows import Lengths, Offsets, Rows, pick

__all__ = ["RecurrentStack"]


class RecurrentStack(nn.Module):
    """Recurrent layers with the constructor and the call of `torch.nn.GRU`; a subclass says which cell.

    A layer is, in this order: x + conv(x), where asked; y = cell(norm(x)); dropout of y except in the last layer;
    y + x where the widths agree; y + mlp(norm(y)), where asked.

    Two things differ from torch: `batch_first` is True by default, and the state is a dictionary of tensors
    ("h" is torch's h_n, "c" its c_n), fp32 whatever the precision around it. torch's own forms are taken as well.

    Args:
        input_size: features per frame.
        hidden_size: hidden units per layer and direction.
        num_layers: layers in the stack.
        bias: add biases to the pre-activations.
        batch_first: padded inputs and outputs are [B, T, ...], else [T, B, ...].
        dropout: share of values zeroed between layers, while training.
        bidirectional: also read each row from its own last frame to its first.
        residual: add a layer's input to its output where the widths agree.
        norm: normalise (RMS) the input of each layer.
        learned_state: learn the state before the first frame; zeros otherwise.
        time_decay: let the state fade with the time between frames (`gaps`), at a learned rate a unit.
        conv_size: taps of a causal depthwise convolution before each cell; 0 leaves it out.
        mlp_factor: width of a feed-forward layer after each cell, in widths of the layer; 0 leaves it out.
        options: further arguments of the cell.
    """

    cell_type: ClassVar[Callable[..., Cell]]
    _like: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        residual: bool = False,
        norm: bool = False,
        learned_state: bool = False,
        time_decay: bool = False,
        conv_size: int = 0,
        mlp_factor: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if size < 1:
                raise ConfigError(f"{name}: got {size}, expected 1 or more")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout: got {dropout}, expected 0 or more and below 1")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.bidirectional = bidirectional
        self.num_directions = 2 if bidirectional else 1
        self.output_size = hidden_size * self.num_directions
        make_cell = functools.partial(self.cell_type, hidden_size=hidden_size, bias=bias, **options)
        layer_options = LayerOptions(
            bidirectional=bidirectional,
            norm=norm,
            residual=residual,
            time_decay=time_decay,
            conv_size=conv_size,
            mlp_factor=mlp_factor,
        )
        sizes = [input_size] + [self.output_size] * (num_layers - 1)
        self.layers = nn.ModuleList(
            Layer(make_cell, size, layer_options, dropout=0.0 if index == num_layers - 1 else dropout)
            for index, size in enumerate(sizes)
        )
        cell = self._layer(0).ahead
        said = {"num_layers": num_layers, "bidirectional": bidirectional, "residual": residual, **options}
        self._said = [f"{name}={value}" for name, value in said.items()]
        self.state_names = cell.state_names
        self._state_size = cell.state_size
        self.packed = cell.packed  # whether packed frames are the form that costs least
        self.time_decay = time_decay
        self.recompute = False  # see `recompute_layers`
        self.call_packed: Callable[..., Any] | None = None  # see `compile_layers`
        # Has the format and the device of the weights, which are dear to look for at every step.
        self.register_buffer("_like", torch.empty(0), persistent=False)
        self._windows = {f"conv{index}": (conv_size, size) for index, size in enumerate(sizes) if conv_size}
        self.initial = nn.ParameterDict()
        if learned_state:
            shape = (num_layers * self.num_directions, cell.state_size)
            self.initial.update({name: nn.Parameter(torch.zeros(shape)) for name in cell.state_names})

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """Its layers, first to last."""
        return tuple(self.layers)

    def _layer(self, index: int) -> Layer:
        layer = self.layers[index]
        assert isinstance(layer, Layer)
        return layer

    def _state_shapes(self, num_rows: int) -> dict[str, tuple[int, int, int]]:
        cells = (self.num_layers * self.num_directions, num_rows, self._state_size)
        return dict.fromkeys(self.state_names, cells) | {
            name: (taps - 1, num_rows, width) for name, (taps, width) in self._windows.items()
        }

    def initial_state(self, num_rows: int) -> State:
        """The state before the first frame: learned, or zeros."""
        dtype, device = state_dtype(self._like.dtype), self._like.device
        return {
            name: self.initial[name].to(dtype)[:, None].expand(shape)
            if name in self.initial
            else torch.zeros(shape, dtype=dtype, device=device)
            for name, shape in self._state_shapes(num_rows).items()
        }

    def forward(
        self,
        x: Tensor | PackedSequence,
        state: State | Tensor | Sequence[Tensor] | None = None,
        *,
        lengths: Lengths | None = None,
        offsets: Offsets | Rows | None = None,
        starts: Tensor | None = None,
        gaps: Tensor | None = None,
        final_state: bool = True,
    ) -> tuple[Any, State]:
        """Outputs of the last layer in the form of `x`, and the state at the last frame of every row.

        The output has the format of `x`, under autocast that of autocast, for every cell. The
        state is fp32, so that a sequence run in pieces gives what the whole gives.

        Args:
            x: padded frames [B, T, D], where what stands at padded slots is never read and zeros come out; or packed
                frames [N, D] beside `offsets`; or a PackedSequence.
            state: where an earlier piece of the same rows ended; the initial state when not given.
            lengths: frames of each padded row, as a CPU tensor or integers; None where all rows are full.
            offsets: where each packed row begins, and the number of frames; best on the CPU, where it is checked. Or
                the `Rows` that they make.
            starts: True at frames before which the state restarts, [B, T] or [N]; a frame of a new document.
            gaps: time since the frame before, [B, T] or [N], not negative; needed by `time_decay`.
            final_state: False spares the final state ({} comes back), which costs the LSTM a second
                projection where rows are of unlike length.

        Raises:
            ConfigError: a state for a bidirectional stack, or arguments that do not fit; the message names which.
            DataError: an empty row (the message names its index), or NaN under `debug_checks`.
        """
        frames = read_frames(
            x,
            input_size=self.input_size,
            batch_first=self.batch_first,
            lengths=lengths,
            offsets=offsets,
            starts=starts,
            gaps=gaps,
        )
        if (gaps is None) == self.time_decay:
            expected = "time since the frame before, for time_decay" if self.time_decay else "none without time_decay"
            raise ConfigError(f"gaps: got {'none' if gaps is None else 'a tensor'}, expected {expected}")
        self._check_format(frames.values)
        before = self._checked(state, frames.rows.num_rows, frames.values.device)
        out_dtype = _output_dtype(frames.values)
        if self.packed:
            frames = frames.packed()
            y, after = self._run(frames, before, final_state=final_state)
        elif frames.padded and starts is None and len(self._groups(frames.rows)) == 1:
            frames = replace(frames, values=frames.rows.zeroed(frames.values))
            y, after = self._run(frames, before, final_state=final_state)
            y = frames.rows.zeroed(y)
        else:
            frames = frames.packed()
            y, after = self._run_groups(frames, before, final_state=final_state)
        return frames.restore(y.to(out_dtype)), after

    def step(
        self,
        x_BD: Tensor,
        state: State | Tensor | Sequence[Tensor] | None = None,
        *,
        starts: Tensor | None = None,
        gaps: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """The output of one time step and the state after it.

        Args:
            x_BD: the frame of each row.
            state: the state before it.
            starts: True [B] at rows whose state restarts before the frame.
            gaps: [B], time since the frame before, for `time_decay`.

        Raises:
            ConfigError: the stack is bidirectional, or arguments that do not fit.
        """
        if self.bidirectional:
            raise ConfigError("step: got a bidirectional stack, expected one that reads in one direction")
        if x_BD.ndim != 2 or x_BD.shape[-1] != self.input_size:
            raise ConfigError(f"x: got shape {tuple(x_BD.shape)}, expected (rows, {self.input_size})")
        if (gaps is None) == self.time_decay:
            raise ConfigError("gaps: expected with time_decay, and only then")
        self._check_format(x_BD)
        before = self._checked(state, x_BD.shape[0], x_BD.device)
        if starts is not None:
            before = _where(starts, self.initial_state(x_BD.shape[0]), before)
        out_dtype = _output_dtype(x_BD)
        ends: list[LayerState] = []
        for index, states in enumerate(self._split(before)):
            x_BD, end = self._layer(index).step(x_BD, states, gaps, starts)
            x_BD = x_BD.to(out_dtype)
            ends.append(end)
        return x_BD, self._joined(ends)

    def _run(self, frames: Frames, before: State, *, final_state: bool) -> tuple[Tensor, State]:
        """All layers over frames in the layout that the cells want."""
        values, out_dtype = frames.values, _output_dtype(frames.values)
        resets = None if frames.padded else self._split(self.initial_state(1))
        ends: list[LayerState] = []
        for index, state in enumerate(self._split(before)):
            reset = None if resets is None else resets[index]
            values, end = self._called(index, values, state, frames, reset, final_state=final_state)
            values = values.to(out_dtype)  # narrow between layers; only states stay fp32
            ends.append(end)
        return values, self._joined(ends) if final_state else {}

    def _called(
        self, index: int, x: Tensor, state: LayerState, frames: Frames, reset: LayerState | None, *, final_state: bool
    ) -> tuple[Tensor, LayerState]:
        """What a layer gives, called as `recompute_layers` and `compile_layers` have asked for."""
        layer = self._layer(index)
        call = recomputed if self.recompute and torch.is_grad_enabled() else _plainly
        is_plain = frames.starts_N is None and frames.gaps_N is None and layer.conv is None
        if self.call_packed is None or not is_plain:
            return call(layer, x, state, frames, reset, final_state=final_state)
        y, cells = call(self.call_packed, layer, x, state.cells, frames.rows.offsets, final_state)
        return y, LayerState(cells=cells)

    def _run_groups(self, frames: Frames, before: State, *, final_state: bool) -> tuple[Tensor, State]:
        """The same from packed frames for cells that want them padded: rows of like length together.

        A row is cut where its state restarts, and each piece is then a row of its own.
        """
        rows, starts_N, last_B = frames.rows, frames.starts_N, None
        if starts_N is not None:
            pieces = split_at_starts(rows, starts_N)
            fresh = self.initial_state(pieces.rows.num_rows)
            carried = {name: part.index_select(1, pieces.parent_S) for name, part in before.items()}
            before = _where(pieces.carries_S, carried, fresh)
            rows, last_B = pieces.rows, pieces.last_B
        outputs, ends, order, frame_order = [], [], [], []
        for on_host_G in self._groups(rows):
            part, frame_N = rows.select(on_host_G)
            group_G = on_host_G.to(rows.device)
            inner = Frames(
                values=part.pad(pick(frames.values, frame_N)),
                rows=part,
                padded=True,
                starts_N=None if starts_N is None else starts_N.index_select(0, frame_N),
                gaps_N=None if frames.gaps_N is None else frames.gaps_N.index_select(0, frame_N),
                restore=part.pack,
            )
            state = {name: whole.index_select(1, group_G) for name, whole in before.items()}
            y, end = self._run(inner, state, final_state=final_state)
            outputs.append(part.pack(y))
            ends.append(end)
            order.append(group_G)
            frame_order.append(frame_N)
        y_ND = pick(torch.cat(outputs), torch.cat(frame_order).argsort())
        place_S = torch.cat(order).argsort()
        place_B = place_S if last_B is None else place_S.index_select(0, last_B)
        after = {name: torch.cat([end[name] for end in ends], dim=1).index_select(1, place_B) for name in ends[0]}
        return y_ND, after

    def _groups(self, rows: Rows) -> list[Tensor]:
        # A launch on a device costs as much as the rows that would fill it.
        overhead = 256 if rows.device.type == "cuda" else self._layer(0).ahead.step_overhead
        return groups_of_like_length(rows, overhead)

    def _check_format(self, x: Tensor) -> None:
        if x.dtype != self._like.dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise ConfigError(
                f"x: got {x.dtype}, expected {self._like.dtype} like the weights",
                hint="torch.autocast runs fp32 weights in a lower precision",
            )

    def _checked(self, state: State | Tensor | Sequence[Tensor] | None, num_rows: int, device: torch.device) -> State:
        """The state as a dictionary of the right names, shapes, format and device; the initial one for None."""
        if state is None:
            return self.initial_state(num_rows)
        if self.bidirectional:
            raise ConfigError("state: got one for a bidirectional stack, expected none: its end is not a beginning")
        if isinstance(state, Tensor):
            state = {"h": state}
        elif not isinstance(state, dict):
            state = dict(zip("hc", state, strict=False))
        if not all(isinstance(part, Tensor) for part in state.values()):
            raise ConfigError("state: got something else than tensors, expected a state", hint="lengths= is a keyword")
        shapes = self._state_shapes(num_rows)
        check_state(state, shapes, dict.fromkeys(shapes, state_dtype(self._like.dtype)), device)
        return state

    def _split(self, state: State) -> list[LayerState]:
        """The state of each layer."""
        parts = {name: state[name].unbind(0) for name in self.state_names}
        cells = [{name: part[i] for name, part in parts.items()} for i in range(self.num_layers * self.num_directions)]
        return [
            LayerState(
                cells=cells[index * self.num_directions : (index + 1) * self.num_directions],
                window=state.get(f"conv{index}"),
            )
            for index in range(self.num_layers)
        ]

    def _joined(self, ends: list[LayerState]) -> State:
        """The inverse of `_split`."""
        cells = [cell for end in ends for cell in end.cells]
        state = {name: torch.stack([cell[name] for cell in cells]) for name in self.state_names}
        windows = {f"conv{index}": end.window for index, end in enumerate(ends) if end.window is not None}
        return state | {name: window.to(state["h"].dtype) for name, window in windows.items()}

    def extra_repr(self) -> str:
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *self._said])


def _plainly(layer: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    return layer(*inputs, **options)


def _where(rows_B: Tensor, chosen: State, other: State) -> State:
    """`chosen` at the rows where `rows_B` is True, else `other`."""
    return {name: torch.where(rows_B[None, :, None], part, other[name]) for name, part in chosen.items()}


def _output_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

"""Frames that do not come at a regular pace: state decay, missing values, time as features.

Shape letters: N frames of all rows laid end to end, S (or B) rows, D features, H hidden, F features of an embedding.

A gap is the time between a frame and the one before it in its row, in any one unit; the first frame of a row
has the gap to whatever came before the row, usually 0. With a state, that is the last frame of the piece before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from treadle.errors import ConfigError, DataError
from treadle.nn.cell import State, check_shapes
from treadle.nn.gates import state_dtype
from treadle.nn.rows import Rows

__all__ = ["MissingValues", "TimeDecay", "TimeEmbedding", "check_gaps"]


_YEAR_S = 365.25 * 86_400


def check_gaps(gaps_N: Tensor, rows: Rows | None = None, *, num_frames: int | None = None) -> None:
    """Refuse gaps that are negative or not finite.

    Only values on the host are looked at, since reading them back would stall a device. There a negative gap
    decays nothing, and a NaN shows in the output.

    Raises:
        ConfigError: not one gap a frame.
        DataError: a gap below 0, NaN or infinite; the message names the frame and, where `rows` is given, the row.
    """
    if num_frames is not None and tuple(gaps_N.shape) != (num_frames,):
        raise ConfigError(f"gaps_N: got shape {tuple(gaps_N.shape)}, expected ({num_frames},), one gap a frame")
    _refuse("gaps_N", gaps_N, gaps_N.isfinite() & (gaps_N >= 0), "a finite number of 0 or more", rows)


def _refuse(name: str, x: Tensor, good: Tensor, rule: str, rows: Rows | None) -> None:
    if x.device.type != "cpu" or torch.compiler.is_compiling() or bool(good.all()):
        return
    where = (~good).nonzero()[0].tolist()
    place = ""
    if rows is not None and len(where) == 1:
        place = f" (row {int(rows.row_N[where[0]])}, frame {int(rows.position_N[where[0]])} of it)"
    raise DataError(f"{name}{where}{place}: got {float(x[tuple(where)])}, expected {rule}")


def _decay(since: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.exp(-torch.relu(weight * since + bias))


class TimeDecay(nn.Module):
    """The share of a recurrent state that outlasts a gap, per hidden unit: exp(-relu(w gap + b)).

    Source: Che et al. 2018 (GRU-D), arXiv 1606.01865, equation 4, with one gap a frame.

    At first b is 0 and w falls geometrically from 1 to 0.01 per `unit`, so that the units forget at unlike paces
    and none starts where the relu has no slope.

    Args:
        hidden_size: H.
        unit: a usual gap, in the unit of the gaps; above 0.
    """

    def __init__(self, hidden_size: int, *, unit: float = 1.0) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.unit = _positive("unit", unit)
        self.weight = nn.Parameter(torch.logspace(0, -2, hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, gaps_N: Tensor, rows: Rows | None = None) -> Tensor:
        """decay_NH in [0, 1] for gaps of any shape; `rows` only helps an error to name the row.

        Raises:
            DataError: a gap below 0, NaN or infinite.
        """
        check_gaps(gaps_N, rows)
        with torch.autocast(gaps_N.device.type, enabled=False):
            scaled_N = (gaps_N / self.unit).to(self.weight.dtype)
            return _decay(scaled_N[..., None], self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, unit={self.unit:g}"


class MissingValues(nn.Module):
    """Features of frames of which some values are missing: [imputed x | observed | log1p(time since seen)].

    A missing value becomes the one last seen, which fades to the mean as time passes:
    x' = mean + g (last - mean), g = exp(-relu(w since + b)); before the first one was seen it is the mean.
    "Time since seen" counts from the observation before the frame, also where the frame is observed; before the
    first one it counts from the row's start.

    Source: Che et al. 2018 (GRU-D), arXiv 1606.01865, equations 2 and 5.

    Args:
        input_size: D.
        mean: mean of each feature over the observed training values; zeros when not given.
        unit: a usual gap, in the unit of the gaps; above 0.

    Cost: about 20 passes over [N, D]; no loop over frames.
    """

    state_names = ("value", "since", "seen")
    mean_D: Tensor

    def __init__(self, input_size: int, *, mean: Tensor | Sequence[float] | None = None, unit: float = 1.0) -> None:
        super().__init__()
        mean_D = torch.zeros(input_size) if mean is None else torch.as_tensor(mean, dtype=torch.get_default_dtype())
        if tuple(mean_D.shape) != (input_size,) or not bool(mean_D.isfinite().all()):
            seen = f"shape {tuple(mean_D.shape)} with {int((~mean_D.isfinite()).sum())} values that are not finite"
            raise ConfigError(f"mean: got {seen}, expected {input_size} finite numbers")
        self.input_size = input_size
        self.output_size = 3 * input_size
        self.unit = _positive("unit", unit)
        self.weight = nn.Parameter(torch.full((input_size,), 0.1))
        self.bias = nn.Parameter(torch.zeros(input_size))
        self.register_buffer("mean_D", mean_D.clone())

    def initial_state(self, num_rows: int) -> State:
        """Nothing seen yet. `since` is float64: a year in steps of a second would stand still in fp32."""
        dtype = state_dtype(self.weight.dtype)
        zeros = self.weight.new_zeros((1, num_rows, self.input_size), dtype=dtype)
        return {"value": zeros, "since": zeros.double(), "seen": zeros.clone()}

    def forward(
        self,
        x_ND: Tensor,
        gaps_N: Tensor,
        rows: Rows,
        state: State | None = None,
        *,
        observed_ND: Tensor | None = None,
        starts_N: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Features [N, 3 D], and what to carry into the rows' next frames.

        Args:
            x_ND: packed frames; NaN is missing.
            gaps_N: time since the frame before.
            rows: where rows begin.
            state: where an earlier piece of the same rows ended; nothing seen when not given.
            observed_ND: True where a value was observed; a NaN is missing all the same.
            starts_N: True where a frame begins something new: what was seen before it counts no more.

        Raises:
            ConfigError: shapes that do not fit.
            DataError: a gap below 0, NaN or infinite; the message names its frame and row.
        """
        self._check(x_ND, gaps_N, rows, observed_ND, starts_N)
        before = self._checked(state, rows.num_rows)
        with torch.autocast(x_ND.device.type, enabled=False):
            seen_ND = ~x_ND.isnan() if observed_ND is None else observed_ND & ~x_ND.isnan()
            # NaN is only selected away, never multiplied: 0 * NaN is NaN, forward and in the gradient.
            x_ND = x_ND.to(self.weight.dtype)
            first_N, carries_N = _documents(rows, starts_N)
            last_ND = _last_true(seen_ND)
            held_ND, ever_ND = self._held(x_ND, last_ND, first_N, carries_N, rows, before)
            since_ND = _since(last_ND, first_N, carries_N, gaps_N, rows, before["since"][0])
            scaled_ND = (since_ND / self.unit).to(x_ND.dtype)
            fading_ND = self.mean_D + _decay(scaled_ND, self.weight, self.bias) * (held_ND - self.mean_D)
            imputed_ND = torch.where(seen_ND, x_ND, fading_ND)
            features = torch.cat((imputed_ND, seen_ND.to(x_ND.dtype), torch.log1p(scaled_ND)), dim=-1)
        end_S = rows.last_S
        after = {
            "value": held_ND[end_S],
            "since": torch.where(seen_ND[end_S], 0.0, since_ND[end_S]),
            "seen": ever_ND[end_S],
        }
        return features, {name: part[None].to(before[name].dtype) for name, part in after.items()}

    def step(
        self, x_BD: Tensor, gaps_B: Tensor, state: State | None = None, *, observed_BD: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The features of one frame of every row, and the state after it."""
        rows = Rows.full(x_BD.shape[0], 1, x_BD.device)
        return self.forward(x_BD, gaps_B, rows, state, observed_ND=observed_BD)

    def _held(
        self, x_ND: Tensor, last_ND: Tensor, first_N: Tensor, carries_N: Tensor, rows: Rows, before: State
    ) -> tuple[Tensor, Tensor]:
        """The newest value of each feature, the frame's own included, and whether there is one."""
        here_ND = last_ND >= first_N[:, None]
        carried_ND = carries_N[:, None] & (before["seen"][0] > 0.5)[rows.row_N]
        earlier_ND = torch.where(carried_ND, before["value"][0].to(x_ND.dtype)[rows.row_N], self.mean_D)
        return torch.where(here_ND, x_ND.gather(0, last_ND.clamp(min=0)), earlier_ND), here_ND | carried_ND

    def _check(self, x_ND: Tensor, gaps_N: Tensor, rows: Rows, *flags: Tensor | None) -> None:
        if tuple(x_ND.shape) != (rows.num_frames, self.input_size):
            expected = f"({rows.num_frames}, {self.input_size})"
            raise ConfigError(f"x_ND: got shape {tuple(x_ND.shape)}, expected {expected}, frames and features")
        check_gaps(gaps_N, rows, num_frames=rows.num_frames)
        for name, flag, shape in zip(("observed_ND", "starts_N"), flags, (x_ND.shape, gaps_N.shape), strict=True):
            if flag is not None and (flag.shape != shape or flag.dtype != torch.bool):
                got = f"{tuple(flag.shape)} of {flag.dtype}"
                raise ConfigError(f"{name}: got shape {got}, expected {tuple(shape)} of torch.bool")

    def _checked(self, state: State | None, num_rows: int) -> State:
        initial = self.initial_state(num_rows)
        if state is None:
            return initial
        check_shapes(state, initial)
        return {name: part.to(initial[name].dtype) for name, part in state.items()}

    def extra_repr(self) -> str:
        return f"{self.input_size}, unit={self.unit:g}"


def _documents(rows: Rows, starts_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """For each frame, the first frame of what it belongs to, and whether the carried state belongs to that too."""
    first_N = rows.offsets[rows.row_N]
    if starts_N is None:
        return first_N, torch.ones_like(first_N, dtype=torch.bool)
    index_N = torch.arange(rows.num_frames, device=first_N.device)
    first_N = torch.where(starts_N, index_N, first_N).cummax(0).values
    return first_N, ~starts_N[first_N]


def _last_true(flag_ND: Tensor) -> Tensor:
    """The newest frame at or before each, whatever its row, at which the flag of the feature was up; -1 if none."""
    index_N = torch.arange(flag_ND.shape[0], device=flag_ND.device)
    # Along the contiguous dimension, the running maximum of 200,000 x 16 frames takes a third of the time.
    index_DN = torch.where(flag_ND.t().contiguous(), index_N, -1)
    return index_DN.cummax(1).values.t()


def _since(
    last_ND: Tensor, first_N: Tensor, carries_N: Tensor, gaps_N: Tensor, rows: Rows, carried_SD: Tensor
) -> Tensor:
    """Time since the observation before each frame (float64), or since the document's start."""
    gaps_N = gaps_N.double()
    elapsed_N = _cumsum_in_rows(gaps_N, rows)
    prior_ND = torch.cat((last_ND.new_full((1, last_ND.shape[1]), -1), last_ND[:-1]))
    from_start_N = elapsed_N - elapsed_N[first_N] + gaps_N[first_N]
    carried_ND = torch.where(carries_N[:, None], carried_SD[rows.row_N], 0.0)
    from_prior_ND = elapsed_N[:, None] - elapsed_N[prior_ND.clamp(min=0)]
    return torch.where(prior_ND >= first_N[:, None], from_prior_ND, from_start_N[:, None] + carried_ND)


def _cumsum_in_rows(x_N: Tensor, rows: Rows) -> Tensor:
    """Running sums that begin at each row: no row's rounding depends on the rows beside it."""
    if rows.is_full or rows.num_rows * max(rows.lengths) <= 8 * rows.num_frames:
        return rows.pack(rows.pad(x_N[:, None]).cumsum(1))[:, 0]
    return torch.cat([row_T.cumsum(0) for row_T in x_N.split(rows.lengths)])


class TimeEmbedding(nn.Module):
    """Learned features of a time or a gap: its logarithm, and sines of learned frequencies.

    [sign(t) log1p(|t| / shortest) / log1p(longest / shortest), sin(w_i t + p_i) ...]

    Source: Kazemi et al. 2019 (Time2Vec), arXiv 1907.05321, equation 1; the linear term is a logarithm here, so
    that seconds and years both lie in [0, 1].

    The periods start log-spaced from `shortest` to `longest`, with sines and cosines in turn. A frequency is
    learned as its distance from there in radians per `longest`: the gradient of a phase is at most 1 then. Learned
    as it stands, the frequency of a second would have a gradient of 3e7 after a year, and clipping by the norm
    would leave nothing of all others.

    Args:
        size: F, 2 or more.
        shortest: the shortest period, in the unit of the times; above 0.
        longest: the longest period and about the longest time; above `shortest`. A year of seconds when not given.

    Accuracy: phases are reduced in float64, so that times of years keep their seconds if given in float64
    (test_irregular.py::test_embedding_keeps_seconds_after_years).
    """

    def __init__(self, size: int, *, shortest: float = 1.0, longest: float = _YEAR_S) -> None:
        super().__init__()
        if size < 2:
            raise ConfigError(f"size: got {size}, expected 2 or more")
        if not _positive("shortest", shortest) < longest < math.inf:
            raise ConfigError(f"longest: got {longest}, expected a finite number above shortest ({shortest})")
        self.size = size
        self.shortest, self.longest = float(shortest), float(longest)
        num_sines = size - 1
        self.shift = nn.Parameter(torch.zeros(num_sines))
        # A period serves two features, a quarter turn apart: a single sine stands still twice a turn.
        self.phase = nn.Parameter(torch.arange(num_sines) % 2 * (math.pi / 2))

    def forward(self, times_N: Tensor, rows: Rows | None = None) -> Tensor:
        """Features [N, F] of times of any shape and sign; `rows` only helps an error to name the row.

        Raises:
            DataError: a time that is NaN or infinite.
        """
        _refuse("times_N", times_N, times_N.isfinite(), "a finite number", rows)
        dtype = self.shift.dtype
        with torch.autocast(times_N.device.type, enabled=False):
            times_N = times_N.double()[..., None]
            log_N = torch.sign(times_N) * torch.log1p(times_N.abs() / self.shortest)
            log_N = log_N / math.log1p(self.longest / self.shortest)
            turns_NF = times_N * self._frequencies(times_N.device)
            base_NF = ((turns_NF - turns_NF.floor()) * (2 * math.pi)).to(dtype)
            shift_NF = (times_N / self.longest).to(dtype) * self.shift
            return torch.cat((log_N.to(dtype), torch.sin(base_NF + shift_NF + self.phase)), dim=-1)

    def _frequencies(self, device: torch.device) -> Tensor:
        """Turns per unit of time, float64: computed, since a buffer would follow the module to bf16."""
        num_periods = self.size // 2
        exponent = torch.arange(self.size - 1, device=device, dtype=torch.float64) // 2 / max(1, num_periods - 1)
        return torch.exp(-exponent * math.log(self.longest / self.shortest)) / self.shortest

    def extra_repr(self) -> str:
        return f"{self.size}, shortest={self.shortest:g}, longest={self.longest:g}"


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name}: got {value}, expected a finite number above 0")
    return float(value)

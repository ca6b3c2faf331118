"""The gated scan on CUDA devices: forward, backward, and how the work is cut. Imports triton.

Shape letters: N frames of all rows laid end to end, S rows, H hidden, G = H * gates of the form,
C chunks.

Nothing here waits for the device: offsets stay there, and every size that the host must know
follows from N, S and H. So a call can be captured in a CUDA graph, and replayed with other offsets of
as many rows and frames. No sum depends on the order in which blocks run: same input, same bits.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from treadle.errors import ConfigError
from treadle.nn import triton_kernels as kernels

__all__ = ["Cut", "available", "backward", "choose_cut", "forward"]

# One warp a block: triton_tiles says why. The default for fusing a product and a sum changes with
# triton 3.10, and 3.9 warns where it is left open.
_OPTIONS: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": True}
_STAGES = 4  # three tiles on their way while one is worked on: 24 frames of 64 channels a block
_CHUNK = 128
_LAUNCHES = 180.0  # 8 microseconds for three more launches, in `choose_cut`'s unit of 44 ns


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How frames and channels are dealt out to blocks.

    Args:
        chunk: frames of a row that one block reads, a multiple of `frames`; 0 for whole rows.
        frames: time steps of a tile, a power of two.
        channels: of a block, a power of two.

    Raises:
        ConfigError: a chunk that is no multiple of `frames`.
    """

    chunk: int
    frames: int = 8
    channels: int = 64

    def __post_init__(self) -> None:
        if self.chunk % self.frames:
            raise ConfigError(f"chunk: got {self.chunk}, expected a multiple of frames, {self.frames}")


@functools.cache
def available() -> tuple[bool, str]:
    """Whether this process can run the kernels, and on what, or why not; asked once."""
    if not torch.cuda.is_available():
        return False, f"triton {triton.__version__}, but torch {torch.__version__} sees no CUDA device"
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if major < 8:
        return False, f"{name} has compute capability {major}.{minor}, expected 8.0 or more"
    return True, f"triton {triton.__version__} on {name}"


def choose_cut(
    num_rows: int, num_frames: int, hidden: int, *, max_length: int, multiprocessors: int, wide: bool = False
) -> Cut:
    """Whole rows where they are many and alike, chunks where a few long ones would leave most of the device idle.

    Compares estimated times, in units of what one scheduler takes to issue a frame of 64 channels
    (75 instructions): all frames shared among all schedulers, half again for memory, against the
    longest row on its own, which takes two units a frame, waiting for its own results. Chunks read
    the gates twice and take three more launches. From counts of bytes and instructions, not measured;
    never by trial runs, which would come back with every new batch shape.

    Args:
        max_length: frames of the longest row; 0 takes the worst that the other numbers allow.
        multiprocessors: of the device; each has four schedulers.
        wide: for float64, whose tiles take twice the registers.
    """
    frames = 4 if wide else 8
    channels = min(64, triton.next_power_of_2(hidden))
    longest = max_length or num_frames - num_rows + 1
    shared = 1.5 * num_frames * triton.cdiv(hidden, channels) / (4 * multiprocessors)
    by_rows = max(shared, 2.0 * longest)
    by_chunks = 1.6 * max(shared, 2.0 * _CHUNK) + _LAUNCHES
    return Cut(chunk=_CHUNK if by_chunks < by_rows else 0, frames=frames, channels=channels)


def forward(
    pre_NG: Tensor,
    h0_SH: Tensor,
    offsets: Tensor,
    starts_N: Tensor | None,
    reset_H: Tensor | None,
    decay_NH: Tensor | None,
    form: int,
    candidate: int,
    reverse: bool,
    max_length: int = 0,
    *,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor]:
    """h_NH in the format of `pre_NG`, and last_SH in that of the state. All tensors contiguous, on one device.

    Args:
        pre_NG: gates side by side: [k, x] (form 0) or [p_f, p_i, x] (1 normalised, 2 raw).
        h0_SH: state before the first frame read; fp32, float64 beside float64.
        offsets: int64 [S + 1], where each row begins; the last is N.
        starts_N: frames before which the state is set to `reset_H`, or to zero.
        reset_H: in the state's format.
        decay_NH: share of the state kept before the frame is read, but for starts.
        form: 0, 1 or 2.
        candidate: 0 the published one, 1 tanh, 2 x itself.
        reverse: read rows from their last frame to their first.
        max_length: frames of the longest row, 0 where the host does not know.
        cut: overrides what `choose_cut` decides.

    Cost: one launch and one pass; where rows are cut into chunks four, and the gates are read twice.
    """
    scan = _Scan(pre_NG, h0_SH, offsets, max_length, cut)
    kind = {"FORM": form, "CANDIDATE": candidate, "REVERSE": reverse}
    h_NH, last_SH = pre_NG.new_empty(pre_NG.shape[0], scan.hidden), torch.empty_like(h0_SH)
    given = (_as_bytes(starts_N), reset_H, decay_NH)
    with scan.on_device():
        init, rows_C = h0_SH, scan.chunk_rows()
        if rows_C is not None:
            steps = scan.new_lines(), scan.new_lines()
            kernels.forward_summary[scan.grid](pre_NG, offsets, rows_C, *given, *steps, **kind, **scan.sizes)
            init = scan.carries(h0_SH, *steps, back=False)
        kernels.forward_kernel[scan.grid](pre_NG, init, offsets, rows_C, *given, h_NH, last_SH, **kind, **scan.sizes)
    return h_NH, last_SH


def backward(
    grad_h_NH: Tensor,
    grad_last_SH: Tensor,
    pre_NG: Tensor,
    h_NH: Tensor,
    h0_SH: Tensor,
    offsets: Tensor,
    starts_N: Tensor | None,
    reset_H: Tensor | None,
    decay_NH: Tensor | None,
    form: int,
    candidate: int,
    reverse: bool,
    max_length: int = 0,
    *,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `pre_NG`, `h0_SH`, `reset_H` and `decay_NH`; the last two None where those are None.

    Gates are computed again from `pre_NG`, earlier states read from `h_NH`.

    Args:
        grad_h_NH: in the format of `pre_NG`.
        grad_last_SH: in the state's format.
        h_NH: what `forward` gave; the others are its arguments.
    """
    scan = _Scan(pre_NG, h0_SH, offsets, max_length, cut)
    kind: dict[str, Any] = {"FORM": form, "REVERSE": reverse}
    dpre_NG, dh0_SH = torch.empty_like(pre_NG), torch.empty_like(h0_SH)
    ddecay_NH = None if decay_NH is None else torch.empty_like(decay_NH)
    # A line a segment, summed below: atomic additions would come in another order each time.
    dreset_CH = None if reset_H is None else scan.new_lines()
    starts_N = _as_bytes(starts_N)
    with scan.on_device():
        init, rows_C = grad_last_SH, scan.chunk_rows()
        if rows_C is not None:
            steps = scan.new_lines(), scan.new_lines()
            given = (grad_h_NH, pre_NG, offsets, rows_C, starts_N, decay_NH)
            kernels.backward_summary[scan.grid](*given, *steps, **kind, **scan.sizes)
            init = scan.carries(grad_last_SH, *steps, back=True)
        saved = (pre_NG, h_NH, h0_SH, offsets, rows_C, starts_N, reset_H, decay_NH)
        grads = (dpre_NG, dh0_SH, dreset_CH, ddecay_NH)
        kind["CANDIDATE"] = candidate
        kernels.backward_kernel[scan.grid](grad_h_NH, init, *saved, *grads, **kind, **scan.sizes)
    return dpre_NG, dh0_SH, None if dreset_CH is None else dreset_CH.sum(0), ddecay_NH


class _Scan:
    """One call's sizes, its cut, and the passes that forward and backward share."""

    def __init__(self, pre_NG: Tensor, h0_SH: Tensor, offsets: Tensor, max_length: int, cut: Cut | None) -> None:
        num_frames, (self.rows, self.hidden) = pre_NG.shape[0], h0_SH.shape
        self.h0_SH, self.offsets = h0_SH, offsets
        self.cut = cut or choose_cut(
            self.rows,
            num_frames,
            self.hidden,
            max_length=max_length,
            multiprocessors=_multiprocessors(pre_NG.device),
            wide=pre_NG.dtype == torch.float64,
        )
        # Enough for a last, part-filled chunk in every row.
        self.segments = num_frames // self.cut.chunk + self.rows if self.cut.chunk else self.rows
        self.blocks = triton.cdiv(self.hidden, self.cut.channels)
        self.grid = (self.segments * self.blocks,)
        tile = {"BLOCK_T": self.cut.frames, "BLOCK_D": self.cut.channels, "STAGES": _STAGES}
        self.sizes: dict[str, Any] = {"H": self.hidden, "CHUNK": self.cut.chunk, **tile, **_OPTIONS}

    def on_device(self) -> contextlib.AbstractContextManager[object]:
        """Triton launches on the current device, which need not be that of the tensors."""
        device = self.h0_SH.device
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

    def chunk_rows(self) -> Tensor | None:
        """The row of each chunk; None where rows stay whole."""
        if not self.cut.chunk:
            return None
        # Zeros, should the offsets end before N: what is left over is then an empty chunk of row 0.
        rows_C = torch.zeros(self.segments, dtype=torch.int32, device=self.offsets.device)
        sizes: dict[str, Any] = {"CHUNK": self.cut.chunk, "BLOCK": 128, **_OPTIONS}
        kernels.chunk_rows[(self.rows,)](self.offsets, rows_C, **sizes)
        return rows_C

    def new_lines(self) -> Tensor:
        """[C, H] in the state's format, not yet filled."""
        return self.h0_SH.new_empty(self.segments, self.hidden)

    def carries(self, init_SH: Tensor, a_CH: Tensor, b_CH: Tensor, *, back: bool) -> Tensor:
        """What enters each chunk, from what enters each row and what each chunk does to it."""
        carry_CH = self.new_lines()
        kind: dict[str, Any] = {"BACK": back}
        lines = (init_SH, self.offsets, a_CH, b_CH, carry_CH)
        kernels.carry_kernel[(self.rows * self.blocks,)](*lines, **kind, **self.sizes)
        return carry_CH


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _as_bytes(starts_N: Tensor | None) -> Tensor | None:
    return None if starts_N is None else starts_N.view(torch.uint8)

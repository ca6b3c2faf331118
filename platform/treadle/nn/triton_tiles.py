# pyright: reportArgumentType=false, reportAssignmentType=false
# (what a kernel is handed as a plain number arrives as tl.constexpr)
"""What the Triton kernels of the gated scan are made of: gates, tiles of frames, and steps joined into one.

Shape letters: N frames of all rows laid end to end, S rows, H hidden, G = H * gates of the form,
C chunks; T frames (lines) of a tile, D channels of a block.

A block of one warp reads a segment, tile by tile, with the state in registers. A segment is a row, or
one of the chunks of CHUNK frames that a row is cut into. With 64 channels a block, each thread holds
whole columns of a tile, so that `tl.associative_scan` down the columns becomes a plain loop in registers:
no shuffles, no barriers, and sums in the order of the sequential loop. (Forward, bf16, sm_90: 38
instructions an element, against 46 and 13 barriers a tile with the compiler's own layout of four warps.)

Rules that hold throughout:
- Positions t count in the order of reading; frame `first + STEP * t` stands there. Frames are counted in
  64 bits, since frames * G passes 2^31 in ordinary batches; inside a tile 32 bits do.
- A line past the end of its segment is the identity, a = 1 and b = 0, so that the last line of a tile
  has the state behind the tile.
- a = -1 marks a frame, or a stretch that holds one, that forgets what came before it. 0 would not do:
  0 * NaN is NaN, and a broken frame must not reach past a start.
- H is fixed when a kernel is compiled: the addresses of a tile are then one register and constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "after",
    "after_cut",
    "block_of",
    "candidate_of",
    "flags_of",
    "fold",
    "gates",
    "inside_of",
    "line_of",
    "load",
    "segment_of",
    "sigmoids",
    "slope_of",
    "steps_of",
    "store",
    "tile_of",
    "vector_of",
    "vector_or_zeros",
]


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x), both to full relative precision; no exponential overflows."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def _normalised(p_f, p_i):
    """i / (f + i) and f / (f + i) of f = sigmoid(p_f), i = sigmoid(p_i), where both are 0 too."""
    over_f = 1.0 + tl.exp(-tl.abs(p_f))  # 1 / f = over_f * exp(max(-p_f, 0))
    over_i = 1.0 + tl.exp(-tl.abs(p_i))
    gap = tl.maximum(-p_i, 0.0) - tl.maximum(-p_f, 0.0)
    scale = tl.exp(-tl.abs(gap))
    i = tl.where(gap > 0, over_f * scale, over_f)
    f = tl.where(gap > 0, over_i, over_i * scale)
    whole = 1.0 / (f + i)
    return i * whole, f * whole


@triton.jit
def _tanh(x):
    """tanh to full relative precision: Cephes' rational form near 0, where 1 - exp(-2x) cancels."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    over = (-9.64399179425052238628e-1 * s - 9.92877231001918586564e1) * s - 1.61468768441708447952e3
    under = ((s + 1.12811678491632931402e2) * s + 2.23548839060100448583e3) * s + 4.84406305325125486048e3
    return tl.where(tl.abs(x) < 0.625, x + x * s * (over / under), tl.where(x >= 0, far, -far))


@triton.jit
def candidate_of(x, CANDIDATE: tl.constexpr):
    """g(x): 0 the published one, 1 tanh, 2 x itself."""
    if CANDIDATE == 0:
        e = tl.exp(-tl.abs(x))
        return tl.where(x >= 0, x + 0.5, e / (1.0 + e))
    elif CANDIDATE == 1:  # noqa: RET505 (the compiler wants its static branches spelled out)
        return _tanh(x)
    else:
        return x


@triton.jit
def slope_of(x, g, CANDIDATE: tl.constexpr):
    """dg / dx."""
    if CANDIDATE == 0:
        return tl.where(x >= 0, 1.0, g * (1.0 - g))
    elif CANDIDATE == 1:  # noqa: RET505
        return 1.0 - g * g
    else:
        return tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def after(a1, b1, a2, b2):
    """The step (a1, b1), then (a2, b2), as one step."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def after_cut(a1, b1, a2, b2):
    """`after` where a < 0 marks steps that forget the state."""
    return tl.where((a1 < 0) | (a2 < 0), -1.0, a1 * a2), tl.where(a2 < 0, b2, a2 * b1 + b2)


@triton.jit
def block_of(H: tl.constexpr, BLOCK_D: tl.constexpr):
    """The segment of this program, and its channels."""
    blocks: tl.constexpr = (H + BLOCK_D - 1) // BLOCK_D
    # Two (four) values a thread make a line of the tile exactly one warp wide.
    width: tl.constexpr = BLOCK_D // 32 if BLOCK_D >= 32 else 1
    program = tl.program_id(0)
    cols = tl.max_contiguous((program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D), width)
    return (program // blocks).to(tl.int64), cols


@triton.jit
def segment_of(seg, offsets, rows_C, CHUNK: tl.constexpr, REVERSE: tl.constexpr):
    """The row of a segment, the frame at the row's position 0, and the positions it covers of how many.

    Row s owns the chunks from offsets[s] // CHUNK + s: never too few, whatever the lengths, and found
    without a sum over the rows before it. Chunks too many are empty.
    """
    row = seg
    if rows_C is not None:
        row = tl.load(rows_C + seg).to(tl.int64)
    begin = tl.load(offsets + row)
    end = tl.load(offsets + row + 1)
    length = (end - begin).to(tl.int32)
    t_begin = tl.zeros((), tl.int32)
    t_end = length
    if rows_C is not None:
        t_begin = ((seg - row - begin // CHUNK) * CHUNK).to(tl.int32)
        t_end = tl.maximum(tl.minimum(t_begin + CHUNK, length), t_begin)
    first = begin
    if REVERSE:
        first = end - 1
    return row, first, t_begin, t_end, length


@triton.jit
def tile_of(base, frame, cols, lines, WIDTH: tl.constexpr, STEP: tl.constexpr):
    """Pointers to a tile whose line 0 is `frame`, of a tensor with WIDTH values a frame."""
    return (base + frame * WIDTH + cols)[None, :] + (lines * (STEP * WIDTH))[:, None]


@triton.jit
def load(pointers, inside, dtype: tl.constexpr):
    return tl.load(pointers, mask=inside, other=0.0).to(dtype)


@triton.jit
def store(pointers, values, inside):
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def inside_of(left, lines, cols, H: tl.constexpr, PARTIAL: tl.constexpr):
    """Which values of a tile with `left` frames exist. Where all do, the compiler drops the mask."""
    if PARTIAL:
        return (lines < left)[:, None] & (cols < H)[None, :]
    elif tl.constexpr(H) % cols.shape[0] != 0:  # noqa: RET505
        return (lines >= 0)[:, None] & (cols < H)[None, :]
    else:
        return tl.full((lines.shape[0], cols.shape[0]), True, tl.int1)


@triton.jit
def vector_of(base, index, cols, H: tl.constexpr):
    """Line `index` of an [*, H] tensor, 0 past its end."""
    return tl.load(base + index * H + cols, mask=cols < H, other=0.0)


@triton.jit
def vector_or_zeros(base, like, cols, H: tl.constexpr):
    if base is None:
        return tl.zeros_like(like)
    else:  # noqa: RET505
        return vector_of(base, 0, cols, H)


@triton.jit
def flags_of(starts, frame, left, lines, STEP: tl.constexpr):
    """Which frames of a tile are starts, [T, 1]."""
    return (tl.load(starts + frame + STEP * lines, mask=lines < left, other=0) != 0)[:, None]


@triton.jit
def gates(pre, inside, dtype: tl.constexpr, H: tl.constexpr, FORM: tl.constexpr):
    """The share of the candidate, the share of the state, and x."""
    first = load(pre, inside, dtype)
    if FORM == 0:
        share, keep = sigmoids(first)
        x = load(pre + H, inside, dtype)
    elif FORM == 1:
        share, keep = _normalised(first, load(pre + H, inside, dtype))
        x = load(pre + 2 * H, inside, dtype)
    else:
        keep, _ = sigmoids(first)
        share, _ = sigmoids(load(pre + H, inside, dtype))
        x = load(pre + 2 * H, inside, dtype)
    return share, keep, x


@triton.jit
def steps_of(
    pre, starts, decay, reset_D, frame, left, cols, lines, inside,
    H: tl.constexpr, FORM: tl.constexpr, CANDIDATE: tl.constexpr, STEP: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """The frames of a tile as steps h -> a * h + b."""
    G: tl.constexpr = H * (2 if FORM == 0 else 3)
    share, keep, x = gates(tile_of(pre, frame, cols, lines, G, STEP), inside, reset_D.dtype, H, FORM)
    a = keep
    b = share * candidate_of(x, CANDIDATE)
    if decay is not None:
        a = keep * load(tile_of(decay, frame, cols, lines, H, STEP), inside, reset_D.dtype)
    if starts is not None:
        flags = flags_of(starts, frame, left, lines, STEP)
        a = tl.where(flags, -1.0, a)
        b = tl.where(flags, keep * reset_D[None, :] + b, b)
    if PARTIAL:
        a = tl.where((lines < left)[:, None], a, 1.0)
        b = tl.where((lines < left)[:, None], b, 0.0)
    return a, b


@triton.jit
def line_of(values, lines, LINE: tl.constexpr):
    """Line LINE of a tile, by a sum that a compiler can see through where threads hold whole columns."""
    return tl.sum(tl.where((lines == LINE)[:, None], values, 0.0), 0)


@triton.jit
def fold(a_D, b_D, a, b, lines):
    """The step (a_D, b_D), then the steps of a tile, as one."""
    a_in, b_in = after_cut(a_D[None, :], b_D[None, :], a, b)
    top = (lines == 0)[:, None]
    a, b = tl.associative_scan((tl.where(top, a_in, a), tl.where(top, b_in, b)), 0, after_cut)
    return line_of(a, lines, lines.shape[0] - 1), line_of(b, lines, lines.shape[0] - 1)

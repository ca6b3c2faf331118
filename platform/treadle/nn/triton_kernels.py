# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
# (constants arrive as tl.constexpr; tl.range is a loop to the compiler only; branches on None are its own)
"""Triton kernels of the gated scan; treadle.nn.triton_scan launches them.

Shape letters as in treadle.nn.triton_tiles, whose rules hold here.

`forward_kernel` and `backward_kernel` read segments from what enters them. Where segments are rows
that is h0, or the gradient of the last state. Where they are chunks, a first pass finds what each
chunk does to what enters it, h -> a * h + b, and `carry_kernel` goes through these pairs row by row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from treadle.nn.triton_tiles import (
    after,
    after_cut,
    block_of,
    candidate_of,
    flags_of,
    fold,
    gates,
    inside_of,
    line_of,
    load,
    segment_of,
    sigmoids,
    slope_of,
    steps_of,
    store,
    tile_of,
    vector_of,
    vector_or_zeros,
)

__all__ = ["backward_kernel", "backward_summary", "carry_kernel", "chunk_rows", "forward_kernel", "forward_summary"]


@triton.jit
def _forward_tile(
    state, pre, h, starts, decay, reset_D, frame, left, cols, lines,
    H: tl.constexpr, FORM: tl.constexpr, CANDIDATE: tl.constexpr, STEP: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Writes h of a tile; gives the state behind it."""
    inside = inside_of(left, lines, cols, H, PARTIAL)
    a, b = steps_of(pre, starts, decay, reset_D, frame, left, cols, lines, inside, H, FORM, CANDIDATE, STEP, PARTIAL)
    # The state enters as part of line 0: what the scan gives are then states, and no products of a are formed.
    top = (lines == 0)[:, None]
    if starts is None:
        b = tl.where(top, a * state[None, :] + b, b)
        _, states = tl.associative_scan((a, b), 0, after)
    else:
        b = tl.where(top & ~(a < 0), a * state[None, :] + b, b)
        _, states = tl.associative_scan((a, b), 0, after_cut)
    store(tile_of(h, frame, cols, lines, H, STEP), states, inside)
    return line_of(states, lines, lines.shape[0] - 1)


@triton.jit
def forward_kernel(
    pre, init, offsets, rows_C, starts, reset, decay, h, last,
    H: tl.constexpr, CHUNK: tl.constexpr, FORM: tl.constexpr, CANDIDATE: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h of every segment, and the last state of the rows that end in one.

    Args:
        init: state before each segment: h0 where a segment is a row.
        rows_C: the row of each chunk; None where a segment is a row.
    """
    STEP: tl.constexpr = -1 if REVERSE else 1
    seg, cols = block_of(H, BLOCK_D)
    row, first, t_begin, t_end, length = segment_of(seg, offsets, rows_C, CHUNK, REVERSE)
    state = vector_of(init, seg, cols, H)
    reset_D = vector_or_zeros(reset, state, cols, H)
    lines = tl.arange(0, BLOCK_T)
    full = (t_end - t_begin) // BLOCK_T
    for i in tl.range(0, full, num_stages=STAGES):
        frame = first + STEP * (t_begin + i * BLOCK_T)
        state = _forward_tile(
            state, pre, h, starts, decay, reset_D, frame, BLOCK_T, cols, lines, H, FORM, CANDIDATE, STEP, False
        )
    left = t_end - t_begin - full * BLOCK_T
    if left > 0:
        frame = first + STEP * (t_end - left)
        state = _forward_tile(
            state, pre, h, starts, decay, reset_D, frame, left, cols, lines, H, FORM, CANDIDATE, STEP, True
        )
    if (t_end == length) & ((t_begin < t_end) | (t_begin == 0)):
        tl.store(last + row * H + cols, state, mask=cols < H)


@triton.jit
def forward_summary(
    pre, offsets, rows_C, starts, reset, decay, a_CH, b_CH,
    H: tl.constexpr, CHUNK: tl.constexpr, FORM: tl.constexpr, CANDIDATE: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What each chunk does to the state that enters it; nothing for a row's last, which nobody asks."""
    STEP: tl.constexpr = -1 if REVERSE else 1
    seg, cols = block_of(H, BLOCK_D)
    _, first, t_begin, t_end, length = segment_of(seg, offsets, rows_C, CHUNK, REVERSE)
    a_D = tl.full((BLOCK_D,), 1.0, a_CH.dtype.element_ty)
    b_D = tl.zeros_like(a_D)
    reset_D = vector_or_zeros(reset, a_D, cols, H)
    lines = tl.arange(0, BLOCK_T)
    inside = inside_of(BLOCK_T, lines, cols, H, False)
    if t_end < length:  # and then the chunk is full, and CHUNK a multiple of BLOCK_T
        for i in tl.range(0, CHUNK // BLOCK_T, num_stages=STAGES):
            frame = first + STEP * (t_begin + i * BLOCK_T)
            a, b = steps_of(
                pre, starts, decay, reset_D, frame, BLOCK_T, cols, lines, inside, H, FORM, CANDIDATE, STEP, False
            )
            a_D, b_D = fold(a_D, b_D, a, b, lines)
        tl.store(a_CH + seg * H + cols, a_D, mask=cols < H)
        tl.store(b_CH + seg * H + cols, b_D, mask=cols < H)


@triton.jit
def _gradient(p1, q1, a1, p2, q2, a2):
    """Two stretches of the gradient's recurrence, the later frames first, as one.

    A stretch turns the gradient c of the state behind it into p * c + q at its foremost frame, and a is
    that frame's share of the state before it. Carried along, it needs no second look at the gates of
    the frame behind.
    """
    m = a1 * p2
    return m * p1, m * q1 + q2, a2


@triton.jit
def _gradient_cut(p1, q1, a1, p2, q2, a2):
    """`_gradient` where p < 0 or a < 0 marks what lets no gradient through."""
    cut = (a1 < 0) | (p2 < 0)
    m = a1 * p2
    return tl.where(cut | (p1 < 0), -1.0, m * p1), tl.where(cut, q2, m * q1 + q2), a2


@triton.jit
def _before(
    h, h0_D, frame, t, left, cols, lines, H: tl.constexpr, BACK: tl.constexpr, PARTIAL: tl.constexpr
):  # fmt: skip
    """The states before the frames of a tile whose lines go back from position t: h0 before position 0."""
    behind = t
    if not PARTIAL:  # that all lines but the last have a state before them is then known at compile time
        behind = tl.where(t == lines.shape[0] - 1, t, lines.shape[0])
    known = (lines < behind)[:, None]
    inside = known & (lines < left)[:, None] & (cols < H)[None, :]
    states = tl.load(tile_of(h, frame + BACK, cols, lines, H, BACK), mask=inside, other=0.0).to(h0_D.dtype)
    return tl.where(known, states, h0_D[None, :])


@triton.jit
def _store_gates(
    dpre, pre, inside, dh, seen, share, keep, x, g, H: tl.constexpr, FORM: tl.constexpr, CANDIDATE: tl.constexpr
):
    """Writes the gradients of the pre-activations of a tile, from those of its states."""
    dx = dh * share * slope_of(x, g, CANDIDATE)
    if FORM == 0:
        store(dpre, dh * (g - seen) * share * keep, inside)
        store(dpre + H, dx, inside)
    elif FORM == 1:
        dk = dh * (g - seen) * share * keep
        _, shut_f = sigmoids(load(pre, inside, dh.dtype))
        _, shut_i = sigmoids(load(pre + H, inside, dh.dtype))
        store(dpre, -dk * shut_f, inside)
        store(dpre + H, dk * shut_i, inside)
        store(dpre + 2 * H, dx, inside)
    else:
        _, shut_f = sigmoids(load(pre, inside, dh.dtype))
        _, shut_i = sigmoids(load(pre + H, inside, dh.dtype))
        store(dpre, dh * seen * keep * shut_f, inside)
        store(dpre + H, dh * g * share * shut_i, inside)
        store(dpre + 2 * H, dx, inside)


@triton.jit
def _backward_tile(
    carry, dreset_D, grad_h, pre, h, h0_D, starts, decay, reset_D, dpre, ddecay, frame, t, left, cols, lines,
    H: tl.constexpr, FORM: tl.constexpr, CANDIDATE: tl.constexpr, BACK: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of a tile whose lines go back from position t.

    Gives the gradient of the state before the tile, and what went to the reset so far.
    """
    LAST: tl.constexpr = lines.shape[0] - 1
    G: tl.constexpr = H * (2 if FORM == 0 else 3)
    dtype: tl.constexpr = carry.dtype
    inside = inside_of(left, lines, cols, H, PARTIAL)
    pre_TD = tile_of(pre, frame, cols, lines, G, BACK)
    share, keep, x = gates(pre_TD, inside, dtype, H, FORM)
    g = candidate_of(x, CANDIDATE)
    before = _before(h, h0_D, frame, t, left, cols, lines, H, BACK, PARTIAL)
    a = keep
    seen = before
    if decay is not None:
        decays = load(tile_of(decay, frame, cols, lines, H, BACK), inside, dtype)
        a = keep * decays
        seen = decays * before
    if starts is not None:
        flags = flags_of(starts, frame, left, lines, BACK)
        a = tl.where(flags, -1.0, a)
        seen = tl.where(flags, reset_D[None, :], seen)
    if PARTIAL:
        a = tl.where((lines < left)[:, None], a, 1.0)
    q = load(tile_of(grad_h, frame, cols, lines, H, BACK), inside, dtype)
    q = tl.where((lines == 0)[:, None], q + carry[None, :], q)
    p = tl.full(q.shape, 1.0, dtype)
    if starts is None:
        _, dh, _ = tl.associative_scan((p, q, a), 0, _gradient)
        out = a * dh
    else:
        _, dh, _ = tl.associative_scan((p, q, a), 0, _gradient_cut)
        out = tl.where(a < 0, 0.0, a * dh)
        dreset_D += tl.sum(tl.where(flags, keep * dh, 0.0), 0)
    if ddecay is not None:
        through = dh * keep * before
        if starts is not None:
            through = tl.where(flags, 0.0, through)
        store(tile_of(ddecay, frame, cols, lines, H, BACK), through, inside)
    dpre_TD = tile_of(dpre, frame, cols, lines, G, BACK)
    _store_gates(dpre_TD, pre_TD, inside, dh, seen, share, keep, x, g, H, FORM, CANDIDATE)
    return line_of(out, lines, LAST), dreset_D


@triton.jit
def backward_kernel(
    grad_h, init, pre, h, h0, offsets, rows_C, starts, reset, decay, dpre, dh0, dreset_CH, ddecay,
    H: tl.constexpr, CHUNK: tl.constexpr, FORM: tl.constexpr, CANDIDATE: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of every segment; of h0 for the rows that begin in one; of the reset, a line a segment.

    Args:
        init: gradient of the state behind each segment: grad_last where a segment is a row.
    """
    BACK: tl.constexpr = 1 if REVERSE else -1
    seg, cols = block_of(H, BLOCK_D)
    row, first, t_begin, t_end, _ = segment_of(seg, offsets, rows_C, CHUNK, REVERSE)
    carry = vector_of(init, seg, cols, H)
    h0_D = vector_of(h0, row, cols, H)
    reset_D = vector_or_zeros(reset, carry, cols, H)
    dreset_D = tl.zeros_like(carry)
    lines = tl.arange(0, BLOCK_T)
    full = (t_end - t_begin) // BLOCK_T
    for i in tl.range(0, full, num_stages=STAGES):
        t = t_end - 1 - i * BLOCK_T
        carry, dreset_D = _backward_tile(
            carry, dreset_D, grad_h, pre, h, h0_D, starts, decay, reset_D, dpre, ddecay,
            first - BACK * t, t, BLOCK_T, cols, lines, H, FORM, CANDIDATE, BACK, False,
        )  # fmt: skip
    left = t_end - t_begin - full * BLOCK_T
    if left > 0:
        t = t_begin + left - 1
        carry, dreset_D = _backward_tile(
            carry, dreset_D, grad_h, pre, h, h0_D, starts, decay, reset_D, dpre, ddecay,
            first - BACK * t, t, left, cols, lines, H, FORM, CANDIDATE, BACK, True,
        )  # fmt: skip
    if t_begin == 0:
        tl.store(dh0 + row * H + cols, carry, mask=cols < H)
    if dreset_CH is not None:
        tl.store(dreset_CH + seg * H + cols, dreset_D, mask=cols < H)


@triton.jit
def backward_summary(
    grad_h, pre, offsets, rows_C, starts, decay, a_CH, b_CH,
    H: tl.constexpr, CHUNK: tl.constexpr, FORM: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What each chunk does to the gradient that enters it from behind; nothing for a row's first."""
    BACK: tl.constexpr = 1 if REVERSE else -1
    G: tl.constexpr = H * (2 if FORM == 0 else 3)
    seg, cols = block_of(H, BLOCK_D)
    _, first, t_begin, t_end, _ = segment_of(seg, offsets, rows_C, CHUNK, REVERSE)
    a_D = tl.full((BLOCK_D,), 1.0, a_CH.dtype.element_ty)
    b_D = tl.zeros_like(a_D)
    lines = tl.arange(0, BLOCK_T)
    if (t_begin > 0) & (t_begin < t_end):
        for t in tl.range(0, t_end - t_begin, BLOCK_T, num_stages=STAGES):
            left = t_end - t_begin - t
            frame = first - BACK * (t_end - 1 - t)
            inside = inside_of(left, lines, cols, H, True)
            a = gates(tile_of(pre, frame, cols, lines, G, BACK), inside, a_D.dtype, H, FORM)[1]
            if decay is not None:
                a = a * load(tile_of(decay, frame, cols, lines, H, BACK), inside, a_D.dtype)
            b = a * load(tile_of(grad_h, frame, cols, lines, H, BACK), inside, a_D.dtype)
            if starts is not None:
                flags = flags_of(starts, frame, left, lines, BACK)
                a = tl.where(flags, -1.0, a)
                b = tl.where(flags, 0.0, b)
            a = tl.where((lines < left)[:, None], a, 1.0)
            a_D, b_D = fold(a_D, b_D, a, b, lines)
        tl.store(a_CH + seg * H + cols, a_D, mask=cols < H)
        tl.store(b_CH + seg * H + cols, b_D, mask=cols < H)


@triton.jit
def carry_kernel(
    init, offsets, a_CH, b_CH, carry_CH, BACK: tl.constexpr,
    H: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What enters each chunk of a row: the state from before it, or the gradient from behind it if BACK."""
    STEP: tl.constexpr = -1 if BACK else 1
    row, cols = block_of(H, BLOCK_D)
    begin = tl.load(offsets + row)
    chunks = tl.maximum(tl.cdiv(tl.load(offsets + row + 1) - begin, CHUNK), 1).to(tl.int32)
    first = begin // CHUNK + row
    if BACK:
        first += chunks - 1
    state = vector_of(init, row, cols, H)
    tl.store(carry_CH + first * H + cols, state, mask=cols < H)
    lines = tl.arange(0, BLOCK_T)
    for c in tl.range(0, chunks - 1, BLOCK_T, num_stages=STAGES):
        chunk = first + STEP * c
        inside = inside_of(chunks - 1 - c, lines, cols, H, True)
        a = load(tile_of(a_CH, chunk, cols, lines, H, STEP), inside, state.dtype)
        b = load(tile_of(b_CH, chunk, cols, lines, H, STEP), inside, state.dtype)
        a = tl.where((lines < chunks - 1 - c)[:, None], a, 1.0)
        b = tl.where((lines == 0)[:, None] & ~(a < 0), a * state[None, :] + b, b)
        _, states = tl.associative_scan((a, b), 0, after_cut)
        store(tile_of(carry_CH, chunk + STEP, cols, lines, H, STEP), states, inside)
        state = line_of(states, lines, BLOCK_T - 1)


@triton.jit
def chunk_rows(offsets, rows_C, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The row that owns each chunk, as `segment_of` reads it."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets + row) // CHUNK + row
    behind = tl.load(offsets + row + 1) // CHUNK + row + 1
    for chunk in tl.range(first, behind, BLOCK):
        chunks = chunk + tl.arange(0, BLOCK)
        tl.store(rows_C + chunks, row.to(tl.int32), mask=chunks < behind)

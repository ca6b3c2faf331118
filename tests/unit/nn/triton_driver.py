"""Runs the Triton scan through triton's interpreter and prints what it found as JSON.

A script of its own, since triton reads TRITON_INTERPRET once, when it is first imported; one process
for all cases, since importing torch and triton takes seconds. test_triton_scan.py starts it. The oracle
is a loop over the frames in float64.

Shape letters: N frames, S rows, H hidden, G = H * gates.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from treadle.nn import triton_scan
from treadle.nn.triton_scan import Cut
from treadle.nn.triton_tiles import segment_of, tile_of

ROWS = Cut(chunk=0, frames=8, channels=4)
CHUNKS = Cut(chunk=8, frames=4, channels=4)
LENGTHS = (1, 7, 8, 9, 17)  # a tile of 8 frames, one less, one more
LONG = (7, 8, 41)  # 41 is 6 chunks of 8, and their 5 carries more than a tile of 4
Options = dict[str, Any]
Found = dict[str, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One scan, forward and backward."""

    cut: Cut = ROWS
    lengths: tuple[int, ...] = LENGTHS
    hidden: int = 3
    dtype: torch.dtype = torch.float32
    form: int = 0
    candidate: int = 0
    reverse: bool = False
    starts: bool = False
    reset: bool = False
    decay: bool = False

    def options(self) -> tuple[int, int, bool]:
        return self.form, self.candidate, self.reverse


# Every option with rows and with chunks, every pair of form and candidate, every format of numbers.
CASES = {
    "rows": Case(hidden=5),
    "rows reverse tanh": Case(form=1, candidate=1, reverse=True),
    "rows identity all": Case(form=2, candidate=2, starts=True, reset=True, decay=True),
    "rows float64 all": Case(
        form=1, candidate=0, reverse=True, starts=True, reset=True, decay=True, dtype=torch.float64
    ),
    "rows float64 tanh": Case(form=0, candidate=1, starts=True, dtype=torch.float64, lengths=(9,), hidden=1),
    "rows bf16": Case(form=0, candidate=2, reverse=True, decay=True, dtype=torch.bfloat16),
    "rows bf16 all": Case(form=2, candidate=1, starts=True, reset=True, decay=True, dtype=torch.bfloat16),
    "rows fp16": Case(form=1, candidate=2, starts=True, dtype=torch.float16, lengths=(3, 6)),
    "chunks": Case(cut=CHUNKS, lengths=LONG, hidden=5),
    "chunks reverse all": Case(
        cut=CHUNKS, lengths=LONG, form=1, reverse=True, starts=True, reset=True, decay=True, candidate=1
    ),
    "chunks starts": Case(cut=CHUNKS, lengths=LONG, form=2, starts=True),
    "chunks float64": Case(
        cut=CHUNKS, lengths=(17, 1), form=0, candidate=2, reverse=True, decay=True, dtype=torch.float64
    ),
    "chunks bf16 all": Case(
        cut=CHUNKS, lengths=(12, 25), form=0, starts=True, reset=True, decay=True, dtype=torch.bfloat16
    ),
}


def loop(tensors: Options, offsets: Tensor, form: int, candidate: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """h_NH and last_SH, a frame at a time, as the definition has it."""
    pre_NG, h0_SH = tensors["pre"], tensors["h0"]
    starts_N, reset_H, decay_NH = tensors["starts"], tensors["reset"], tensors["decay"]
    *gates, x_NH = pre_NG.chunk(2 if form == 0 else 3, dim=-1)
    g_NH = (torch.where(x_NH >= 0, x_NH + 0.5, torch.sigmoid(x_NH)), torch.tanh(x_NH), x_NH)[candidate]
    if form == 1:
        softplus = torch.nn.functional.softplus
        gates = [softplus(-gates[0]) - softplus(-gates[1])]
    h: dict[int, Tensor] = {}
    lasts: list[Tensor] = []
    for row, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        h_H = h0_SH[row]
        for n in reversed(range(begin, end)) if reverse else range(begin, end):
            if starts_N is not None and starts_N[n]:
                h_H = torch.zeros_like(h_H) if reset_H is None else reset_H
            elif decay_NH is not None:
                h_H = decay_NH[n] * h_H
            if form == 2:
                h_H = torch.sigmoid(gates[0][n]) * h_H + torch.sigmoid(gates[1][n]) * g_NH[n]
            else:
                h_H = h_H + torch.sigmoid(gates[0][n]) * (g_NH[n] - h_H)
            h[n] = h_H
        lasts.append(h_H)
    return torch.stack([h[n] for n in range(len(h))]), torch.stack(lasts)


def offsets_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def drawn(case: Case) -> Options:
    """Inputs and gradients of a case."""
    generator = torch.Generator().manual_seed(0)
    state = torch.float64 if case.dtype == torch.float64 else torch.float32
    num, rows, hidden = sum(case.lengths), len(case.lengths), case.hidden

    def normal(*shape: int, dtype: torch.dtype = state, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    starts_N = torch.rand(num, generator=generator) < 0.15
    starts_N[0] = starts_N[-2:] = True  # the first frame of a row, the last, and two in a row
    decay_NH = torch.rand(num, hidden, generator=generator).to(case.dtype)
    return {
        "pre": normal(num, hidden * (2 if case.form == 0 else 3), dtype=case.dtype, scale=2.0),
        "h0": normal(rows, hidden),
        "starts": starts_N if case.starts else None,
        "reset": normal(hidden) if case.reset else None,
        "decay": decay_NH if case.decay else None,
        "grad_h": normal(num, hidden, dtype=case.dtype),
        "grad_last": normal(rows, hidden),
    }


def run(
    tensors: Options, lengths: tuple[int, ...], options: tuple[int, int, bool], cut: Cut
) -> dict[str, Tensor | None]:
    """What the kernels give, by name."""
    offsets = offsets_of(lengths)
    given = [tensors[name] for name in ("starts", "reset", "decay")]
    h_NH, last_SH = triton_scan.forward(tensors["pre"], tensors["h0"], offsets, *given, *options, cut=cut)
    grads = triton_scan.backward(
        tensors["grad_h"], tensors["grad_last"], tensors["pre"], h_NH, tensors["h0"], offsets, *given, *options, cut=cut
    )
    return {"h": h_NH, "last": last_SH} | dict(zip(("dpre", "dh0", "dreset", "ddecay"), grads, strict=True))


def expected(tensors: Options, lengths: tuple[int, ...], options: tuple[int, int, bool]) -> dict[str, Tensor]:
    """What the loop and autograd give in float64, by name."""
    wide = {name: t.detach().double() if t is not None and t.is_floating_point() else t for name, t in tensors.items()}
    leaves = {name: wide[name].requires_grad_() for name in ("pre", "h0", "reset", "decay") if wide[name] is not None}
    h_NH, last_SH = loop(wide, offsets_of(lengths), *options)
    total = (h_NH * wide["grad_h"]).sum() + (last_SH * wide["grad_last"]).sum()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    found = {"h": h_NH.detach(), "last": last_SH.detach()}
    return found | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def errors(got: Found, want: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each output in units of its number format's spacing at max(1, value)."""
    assert {name for name, value in got.items() if value is not None} == set(want)
    found = {}
    for name, wanted in want.items():
        value = got[name]
        assert value is not None
        unit = torch.finfo(value.dtype).eps * wanted.abs().clamp(min=1.0)
        found[name] = ((value.double() - wanted).abs() / unit).max().item()
    return found


def extremes(form: int) -> dict[str, float]:
    """Errors where gates are as far out as they get: every pair of them in forms with two."""
    points = [sign * size for size in (1e30, 300.0, 120.0, 89.0, 87.0, 0.0) for sign in (1.0, -1.0)]
    gates = torch.tensor(list(itertools.product(points, repeat=1 if form == 0 else 2)))
    hidden, lengths = len(gates), (3,)
    tensors = drawn(Case(form=form, hidden=hidden, lengths=lengths))
    tensors["pre"][:, :-hidden] = gates.T.flatten()
    tensors["pre"][:, -hidden:] = torch.tensor([2.0, -120.0, 89.0])[:, None]
    cut = Cut(chunk=0, frames=4, channels=256)
    return errors(run(tensors, lengths, (form, 0, False), cut), expected(tensors, lengths, (form, 0, False)))


def small_tanh() -> float:
    """The largest relative error of tanh from 1e-6 to 20, read off a scan whose gate is open."""
    x_H = torch.logspace(-6, math.log10(20), 64)
    pre_NG = torch.cat([torch.full((64,), 200.0), x_H])[None]
    cut = Cut(chunk=0, frames=1, channels=64)
    h_NH, _ = triton_scan.forward(pre_NG, torch.zeros(1, 64), offsets_of((1,)), None, None, None, 0, 1, False, cut=cut)
    wanted = torch.tanh(x_H.double())
    return ((h_NH[0].double() - wanted).abs() / wanted / torch.finfo(torch.float32).eps).max().item()


def broken(case: Case) -> dict[str, bool]:
    """What NaN and infinity in one row do: as in the loop there, nothing to other rows, nor across a start."""
    num_gates = 2 if case.form == 0 else 3
    marks = list(itertools.product(range(num_gates), (math.nan, math.inf, -math.inf)))
    lengths, hidden = (5, 14, 9), len(marks)
    case = Case(**{**case.__dict__, "lengths": lengths, "hidden": hidden})
    whole = drawn(case)
    whole["starts"] = torch.zeros(sum(lengths), dtype=torch.bool)
    bad, start = 13, 15  # the first line of the row's second tile, and two frames on
    whole["starts"][start] = True
    broke = {**whole, "pre": whole["pre"].clone()}
    for channel, (gate, value) in enumerate(marks):
        broke["pre"][bad, gate * hidden + channel] = value
    got, kept = run(broke, lengths, case.options(), case.cut), run(whole, lengths, case.options(), case.cut)
    wide = {name: t.double() if t is not None and t.is_floating_point() else t for name, t in broke.items()}
    h_NH, last_SH = loop(wide, offsets_of(lengths), *case.options())
    same = {
        "h": torch.equal(got["h"].isfinite(), h_NH.isfinite()),
        "last": torch.equal(got["last"].isfinite(), last_SH.isfinite()),
        "some broke": not got["h"].isfinite().all(),
        "none behind the start": bool(got["h"][start:].isfinite().all()),
    }
    # Frames before the broken one keep their states, frames behind the start keep states and gradients.
    for name, frames in {"h": (*range(bad), *range(start, 28)), "dpre": (*range(5), *range(start, 28))}.items():
        same[f"{name} elsewhere"] = torch.equal(got[name][list(frames)], kept[name][list(frames)])
    same["dh0 elsewhere"] = torch.equal(got["dh0"][[0, 2]], kept["dh0"][[0, 2]])
    # A gradient that is not a number behind a start stays behind it.
    behind = {**whole, "grad_h": whole["grad_h"].clone()}
    behind["grad_h"][start + 2] = math.nan
    got = run(behind, lengths, case.options(), case.cut)
    same["dpre before the start"] = torch.equal(got["dpre"][:start], kept["dpre"][:start])
    same["dpre behind it"] = not got["dpre"][start : start + 3].isfinite().any()
    return same


def pieces() -> bool:
    """Whether rows read in pieces, each from where the last one ended, give the bits of the whole."""
    case = Case(form=1, lengths=(23,))
    tensors = drawn(case)
    arguments = (None, None, None, *case.options())
    whole_NH, last_SH = triton_scan.forward(tensors["pre"], tensors["h0"], offsets_of((23,)), *arguments, cut=ROWS)
    h_SH, parts = tensors["h0"], []
    for piece in tensors["pre"].split([1, 7, 13, 2]):
        h_NH, h_SH = triton_scan.forward(piece, h_SH, offsets_of((len(piece),)), *arguments, cut=ROWS)
        parts.append(h_NH)
    return torch.equal(torch.cat(parts), whole_NH) and torch.equal(h_SH, last_SH)


def empty_row() -> bool:
    """Whether a row without frames, as a batch padded to a fixed number of rows has, passes its state on."""
    case = Case(lengths=(9, 0, 4))
    tensors = drawn(case)
    results = [run(tensors, case.lengths, case.options(), cut) for cut in (ROWS, CHUNKS)]
    return all(
        torch.equal(found["last"][1], tensors["h0"][1]) and torch.equal(found["dh0"][1], tensors["grad_last"][1])
        for found in results
    )


@triton.jit
def probe(base, offsets, found, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """The address of the last tile line of row 1."""
    STEP: tl.constexpr = -1 if REVERSE else 1
    row = tl.program_id(0).to(tl.int64)
    _, first, _, t_end, _ = segment_of(row, offsets, None, 0, REVERSE)
    pointers = tile_of(base, first + STEP * (t_end - 4), tl.arange(0, 2), tl.arange(0, 4), WIDTH, STEP)
    tl.store(found + row * 8 + tl.arange(0, 4)[:, None] * 2 + tl.arange(0, 2)[None, :], pointers.to(tl.int64))


def addresses() -> list[int]:
    """How far from the address it should have each value of a tile is, far beyond 2^31 values."""
    width, begin = 768, 2**31 - 5
    base = torch.empty(1)
    offsets = torch.tensor([0, begin, begin + 9])
    wrong = []
    for reverse in (False, True):
        found = torch.zeros(2, 4, 2, dtype=torch.int64)
        probe[(2,)](base, offsets, found, WIDTH=width, REVERSE=reverse)
        frames = begin + torch.arange(5, 9) if not reverse else begin + torch.arange(3, -1, -1)
        wanted = base.data_ptr() + 4 * (frames[:, None] * width + torch.arange(2))
        wrong += (found[1] - wanted).flatten().tolist()
    return wrong


def patch_once() -> None:
    """Halves the time: the interpreter patches triton.language again for each call of each helper."""
    patched: set[int] = set()

    def call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def main() -> None:
    torch.set_num_threads(1)
    patch_once()
    found: dict[str, Any] = {"cases": {}, "extremes": [extremes(form) for form in range(3)]}
    for name, case in CASES.items():
        tensors = drawn(case)
        got = run(tensors, case.lengths, case.options(), case.cut)
        found["cases"][name] = errors(got, expected(tensors, case.lengths, case.options()))
    found["broken"] = {
        "rows": broken(Case(form=2, cut=Cut(chunk=0, frames=8, channels=16))),
        "chunks": broken(Case(form=1, cut=Cut(chunk=8, frames=8, channels=16), dtype=torch.bfloat16, decay=True)),
    }
    found |= {"tanh": small_tanh(), "pieces": pieces(), "empty row": empty_row(), "addresses": addresses()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""The compiled scan: its numbers against a float64 loop, and what it does to the process."""

from __future__ import annotations

import ctypes
import itertools
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from treadle import native as build
from treadle.nn import native

FORMS = {"mingru": 0, "minlstm": 1, "minlstm_raw": 2}
CANDIDATES = {"g": 0, "tanh": 1, "identity": 2}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# Of the largest value: some 8 roundings to fp32 on the way; float64 takes exp from libm.
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-14}
EXTREMES = [sign * size for sign in (1.0, -1.0) for size in (1e30, 300.0, 120.0, 89.0, 87.0, 0.0)]

every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
every_candidate = pytest.mark.parametrize("candidate", CANDIDATES.values(), ids=CANDIDATES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def kernel() -> native.Kernel:
    """The kernel of this process, built by the first test that asks."""
    found = native.load()
    if found is None:
        pytest.skip(f"no compiled scan here: {native.status().detail}")
    return found


@dataclass(frozen=True)
class Inputs:
    """The arguments of a scan."""

    pre_NG: Tensor
    h0_SH: Tensor
    offsets: Tensor
    starts_N: Tensor | None
    reset_H: Tensor | None
    decay_NH: Tensor | None
    form: int
    candidate: int
    reverse: bool

    def forward(self) -> tuple[Tensor, Tensor]:
        return native.forward(*vars(self).values())

    def backward(self, grad_h_NH: Tensor, grad_last_SH: Tensor, h_NH: Tensor) -> list[Tensor]:
        pre_NG, *others = vars(self).values()
        grads = native.backward(grad_h_NH, grad_last_SH, pre_NG, h_NH, *others)
        return [grad for grad in grads if grad is not None]

    def run(self) -> list[Tensor]:
        """Outputs and gradients."""
        h_NH, last_SH = self.forward()
        return [h_NH, last_SH, *self.backward(*cotangents(self), h_NH)]


def drawn(
    lengths: Sequence[int],
    num_hidden: int,
    form: int,
    candidate: int,
    dtype: torch.dtype,
    *,
    reverse: bool = False,
    starts: bool = False,
    reset: bool = False,
    decay: bool = False,
) -> Inputs:
    generator = torch.Generator().manual_seed(num_hidden)
    state = torch.float64 if dtype is torch.float64 else torch.float32
    num = sum(lengths)
    return Inputs(
        pre_NG=(2 * torch.randn(num, (2 if form == 0 else 3) * num_hidden, generator=generator)).to(dtype),
        h0_SH=torch.randn(len(lengths), num_hidden, generator=generator).to(state),
        offsets=torch.tensor([0, *itertools.accumulate(lengths)]),
        starts_N=torch.rand(num, generator=generator) < 0.2 if starts else None,
        reset_H=torch.randn(num_hidden, generator=generator).to(state) if reset else None,
        decay_NH=torch.rand(num, num_hidden, generator=generator).to(dtype) if decay else None,
        form=form,
        candidate=candidate,
        reverse=reverse,
    )


def cotangents(x: Inputs) -> tuple[Tensor, Tensor]:
    """Positive, so that the gradients that meet in a state do not cancel: extremes would multiply what is left."""
    generator = torch.Generator().manual_seed(1)
    h_NH = 0.5 + torch.rand(len(x.pre_NG), x.h0_SH.shape[1], generator=generator)
    return h_NH.to(x.pre_NG.dtype), torch.rand(x.h0_SH.shape, generator=generator).to(x.h0_SH.dtype)


def float64_loop(x: Inputs, stored_NH: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The equations, a frame at a time.

    `stored_NH` takes the place of the states that frames meet, while gradients flow as if it had not: backward reads
    states as they were rounded when they were stored.
    """
    *shares, raw_NH = x.pre_NG.chunk(2 if x.form == 0 else 3, dim=1)
    g_NH = (torch.where(raw_NH >= 0, raw_NH + 0.5, torch.sigmoid(raw_NH)), torch.tanh(raw_NH), raw_NH)[x.candidate]
    outputs: dict[int, Tensor] = {}
    lasts: list[Tensor] = []
    for row, (begin, end) in enumerate(itertools.pairwise(x.offsets.tolist())):
        h_H, former = x.h0_SH[row], -1
        for n in reversed(range(begin, end)) if x.reverse else range(begin, end):
            if stored_NH is not None and former >= 0:
                h_H = h_H + (stored_NH[former] - h_H).detach()
            if x.starts_N is not None and x.starts_N[n]:
                h_H = torch.zeros_like(h_H) if x.reset_H is None else x.reset_H
            elif x.decay_NH is not None:
                h_H = x.decay_NH[n] * h_H
            if x.form == FORMS["minlstm_raw"]:
                h_H = torch.sigmoid(shares[0][n]) * h_H + torch.sigmoid(shares[1][n]) * g_NH[n]
            else:
                k_H = shares[0][n]
                if x.form == FORMS["minlstm"]:
                    k_H = functional.logsigmoid(shares[1][n]) - functional.logsigmoid(shares[0][n])
                z_H = functional.logsigmoid(k_H).exp()  # the derivative of sigmoid is z (1 - z), which cancels at z = 1
                h_H = h_H + z_H * (g_NH[n] - h_H)
            outputs[n], former = h_H, n
        lasts.append(h_H)
    return torch.stack([outputs[n] for n in range(len(outputs))]), torch.stack(lasts)


def expected(x: Inputs, h_NH: Tensor) -> list[Tensor]:
    """What `Inputs.run` should give: outputs of the loop, and its gradients where frames met the states `h_NH`."""
    names = [name for name in ("pre_NG", "h0_SH", "reset_H", "decay_NH") if getattr(x, name) is not None]
    wide = replace(x, **{name: getattr(x, name).double().requires_grad_() for name in names})
    with torch.no_grad():
        outputs = float64_loop(wide)
    grads = torch.autograd.grad(
        float64_loop(wide, h_NH.double()),
        [getattr(wide, name) for name in names],
        [grad.double() for grad in cotangents(x)],
        allow_unused=True,
        materialize_grads=True,
    )
    return [*outputs, *grads]


def assert_close(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.shape == theirs.shape
        rounding = 2**-8 if mine.dtype is torch.bfloat16 else 0.0
        largest = theirs.abs().max().clamp(min=1).item()
        close = CLOSE.get(mine.dtype, CLOSE[torch.float32]) * largest
        torch.testing.assert_close(mine.double(), theirs, rtol=rounding, atol=close)


# ---- numbers ----


@every_form
@every_candidate
@every_dtype
@pytest.mark.usefixtures("kernel")
def test_every_option_equals_the_float64_loop(form: int, candidate: int, dtype: torch.dtype) -> None:
    names = ("reverse", "starts", "reset", "decay")
    for flags in itertools.product((False, True), repeat=len(names)):
        x = drawn((1, 2, 5), 17, form, candidate, dtype, **dict(zip(names, flags, strict=True)))
        got = x.run()
        assert [tensor.dtype for tensor in got[:2]] == [dtype, x.h0_SH.dtype]
        assert_close(got, expected(x, got[0]))


@every_form
@pytest.mark.parametrize(
    ("dtype", "num_hidden"),
    [*itertools.product((torch.float32, torch.bfloat16), (1, 63, 64, 65, 130)), (torch.float64, 65)],
    ids=str,
)
@pytest.mark.usefixtures("kernel")
def test_every_shape_equals_the_float64_loop(form: int, dtype: torch.dtype, num_hidden: int) -> None:
    wide = num_hidden > 64
    x = drawn((1, 2, 63, 64, 65, 130), num_hidden, form, form, dtype, reverse=wide, starts=wide, reset=wide)
    got = x.run()
    assert_close(got, expected(x, got[0]))


@every_form
@pytest.mark.usefixtures("kernel")
def test_more_channels_than_backward_converts_at_once(form: int) -> None:
    x = drawn((3, 2), 1100, form, 0, torch.bfloat16, starts=True, reset=True, decay=True)
    got = x.run()
    assert_close(got, expected(x, got[0]))


@every_form
@every_candidate
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("kernel")
def test_extremes_are_finite_and_right(form: int, candidate: int, dtype: torch.dtype) -> None:
    """Every combination of extreme pre-activations, a channel each."""
    parts = 2 if form == 0 else 3
    pre_G = torch.cartesian_prod(*[torch.tensor(EXTREMES)] * parts).T.flatten().to(dtype)
    x = drawn((3,), pre_G.numel() // parts, form, candidate, dtype)
    x = replace(x, pre_NG=pre_G.expand(3, -1).contiguous())
    got = x.run()
    for mine, theirs in zip(got, expected(x, got[0]), strict=True):
        assert mine.isfinite().all()
        error = 1e-5 if mine.dtype != torch.bfloat16 else 2**-8
        torch.testing.assert_close(mine.double(), theirs, rtol=error, atol=1e-5)


@every_form
@every_candidate
@every_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.usefixtures("kernel")
def test_what_is_not_finite_comes_out(form: int, candidate: int, dtype: torch.dtype, bad: float) -> None:
    """A channel for each place at which one frame goes bad, beside a sound one."""
    parts = 2 if form == 0 else 3
    x = drawn((5,), parts + 1, form, candidate, dtype)
    for part in range(parts):
        x.pre_NG[2, part * (parts + 1) + part] = bad
    got = x.run()
    for mine, theirs in zip(got, expected(x, got[0]), strict=True):
        assert torch.equal(mine.isfinite(), theirs.isfinite())


@every_candidate
@pytest.mark.usefixtures("kernel")
def test_candidates_are_right_to_the_last_digits(candidate: int) -> None:
    size_M = torch.logspace(-30, 1.3, 20_000)
    x_M = torch.cat((size_M, -size_M))
    shut, num = torch.full_like(x_M, 100.0), len(x_M)  # sigmoid(100) is 1: the state becomes the candidate
    pre_NG = torch.cat((shut, x_M))[None]
    h_NH, _ = native.forward(pre_NG, torch.zeros(1, num), torch.tensor([0, 1]), None, None, None, 0, candidate, False)
    wide = x_M.double()
    exact = (torch.where(wide >= 0, wide + 0.5, torch.sigmoid(wide)), torch.tanh(wide), wide)[candidate]
    assert ((h_NH[0] - exact) / exact).abs().max() < 5e-7


@pytest.mark.usefixtures("kernel")
def test_shares_are_right_to_the_last_digits() -> None:
    k_M = torch.linspace(-86, 86, 40_001)
    pre_NG = torch.cat((k_M, torch.zeros_like(k_M), torch.zeros_like(k_M)))[None]
    h0_SH = torch.ones(1, len(k_M))
    raw, identity = FORMS["minlstm_raw"], CANDIDATES["identity"]
    h_NH, _ = native.forward(pre_NG, h0_SH, torch.tensor([0, 1]), None, None, None, raw, identity, False)
    exact = torch.sigmoid(k_M.double())
    assert ((h_NH[0] - exact) / exact).abs().max() < 5e-7


@pytest.mark.usefixtures("kernel")
def test_bf16_is_stored_as_torch_rounds_it() -> None:
    """Ties go to even: a gate that keeps everything shows the initial state, which lies half-way between numbers."""
    halfway_H = torch.arange(0x3F80, 0x4080, dtype=torch.int32) << 16 | 0x8000
    h0_SH = torch.cat((halfway_H, halfway_H + 1, halfway_H - 1)).view(torch.float32)[None]
    keep_H = torch.full_like(h0_SH, 100.0)
    pre_NG = torch.cat((keep_H, -keep_H, 0 * keep_H), dim=1).to(torch.bfloat16)
    raw, identity = FORMS["minlstm_raw"], CANDIDATES["identity"]
    h_NH, last_SH = native.forward(pre_NG, h0_SH, torch.tensor([0, 1]), None, None, None, raw, identity, False)
    assert torch.equal(last_SH, h0_SH)
    assert torch.equal(h_NH, h0_SH.to(torch.bfloat16))


@pytest.mark.usefixtures("kernel")
def test_a_nan_of_all_ones_stays_a_nan_in_bf16() -> None:
    """Rounding its bits up would wrap to -0."""
    x = drawn((1,), 4, FORMS["mingru"], 0, torch.bfloat16)
    all_ones_SH = torch.full((1, 4), -1, dtype=torch.int32).view(torch.float32)
    h_NH, _ = replace(x, h0_SH=all_ones_SH).forward()
    assert h_NH.isnan().all()


# ---- bits ----


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("kernel")
def test_threads_do_not_change_bits(form: int, dtype: torch.dtype) -> None:
    x = drawn((40, 1, 90), 200, form, 0, dtype, starts=True, reset=True, decay=True)  # few rows: channels are split too
    alone = x.run()
    torch.set_num_threads(2)
    try:
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(alone, x.run(), strict=True))
    finally:
        torch.set_num_threads(1)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("kernel")
def test_pieces_give_the_bits_of_the_whole(form: int, dtype: torch.dtype) -> None:
    x = drawn((80,), 65, form, 1, dtype)
    h_NH, last_SH = x.forward()
    pieces, state_SH = [], x.h0_SH
    for pre_NG in x.pre_NG.split((1, 7, 64, 8)):
        piece = replace(x, pre_NG=pre_NG, h0_SH=state_SH, offsets=torch.tensor([0, len(pre_NG)]))
        h_piece, state_SH = piece.forward()
        pieces.append(h_piece)
    assert torch.equal(torch.cat(pieces), h_NH)
    assert torch.equal(state_SH, last_SH)


@pytest.mark.usefixtures("kernel")
def test_rows_do_not_see_each_other() -> None:
    x = drawn((4, 9, 3), 65, 1, 0, torch.float32)
    other = replace(x, pre_NG=x.pre_NG.clone())
    other.pre_NG[4:13] += 1
    (h, last, dpre, dh0), (h_, last_, dpre_, dh0_) = x.run(), other.run()
    apart_N, apart_S = [0, 1, 2, 3, 13, 14, 15], [0, 2]
    assert all(torch.equal(a[apart_N], b[apart_N]) for a, b in ((h, h_), (dpre, dpre_)))
    assert all(torch.equal(a[apart_S], b[apart_S]) for a, b in ((last, last_), (dh0, dh0_)))
    assert not torch.equal(h, h_)


@every_form
@pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "back"])
def test_frames_are_addressed_in_64_bits(kernel: native.Kernel, form: int, reverse: bool) -> None:
    """Frame numbers past 2^32, at addresses moved back by as much: the same small tensors are read and written."""
    x = drawn((9,), 5, form, 0, torch.float32, reverse=reverse, starts=True, reset=True, decay=True)
    assert x.starts_N is not None
    assert x.decay_NH is not None
    h_NH, last_SH, dpre_NG, dh0_SH, dreset_H, ddecay_NH = x.run()
    grad_h_NH, grad_last_SH = cotangents(x)
    first = 2**32 + 3
    offsets = torch.tensor([first, first + 9])
    outputs = [torch.empty_like(t) for t in (h_NH, last_SH, dpre_NG, dh0_SH, dh0_SH, dreset_H, ddecay_NH)]
    h, last, dpre, dh0, rows, dreset, ddecay = outputs
    framed = (x.pre_NG, x.starts_N, x.decay_NH, h, grad_h_NH, dpre, ddecay)
    order = (x.pre_NG, x.h0_SH, offsets, x.starts_N, x.reset_H, x.decay_NH, h, last, grad_h_NH, grad_last_SH)
    words = []
    for tensor in (*order, dpre, dh0, rows, dreset, ddecay):
        assert tensor is not None
        back = first * tensor[0].numel() * tensor.element_size() if any(tensor is t for t in framed) else 0
        words.append(tensor.data_ptr() - back)
    block = (ctypes.c_int64 * 22)(*words, 1, 5, 0, form, 0, int(reverse), 1)
    kernel.library.treadle_scan_forward(block)
    kernel.library.treadle_scan_backward(block)
    for mine, theirs in zip((h, last, dpre, dh0, dreset, ddecay), x.run(), strict=True):
        assert torch.equal(mine, theirs)


# ---- the process ----

IN_A_PROCESS = """
import ctypes, sys
from pathlib import Path
import importlib.util
import torch
from treadle import native as build
spec = importlib.util.spec_from_file_location("native", sys.argv[2])  # the whole package takes longer
native = sys.modules["native"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
kernel, detail = build.find([Path(sys.argv[1])], build.COMPILERS, native.SOURCE, native.SELF_CHECK)
assert kernel is not None, detail
torch.set_num_threads(2)
assert torch.randn(300_000).sin().sum().isfinite()
native._found = lambda: (kernel, detail)
pre, h0 = torch.randn(1000, 128), torch.zeros(10, 64)
h, _ = native.forward(pre, h0, torch.arange(11) * 100, None, None, None, 0, 0, False)
assert h.isfinite().all()
smallest = 2.0**-1074
assert smallest * 2 * 0.5 == smallest and (torch.tensor(1e-40) * 0.5).item() > 0, "denormals are off"
maps = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line.split()[-1]}
assert len(maps) == 1, maps
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps")
def test_denormals_and_the_one_openmp_runtime_survive_loading(kernel: native.Kernel) -> None:
    command = [sys.executable, "-c", IN_A_PROCESS, str(kernel.path.parent), native.__file__]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout == outcome.stderr == ""


def test_supports_what_it_computes(kernel: native.Kernel) -> None:
    assert [dtype for dtype in (*DTYPES, torch.float16, torch.int64) if native.supports(dtype)] == list(DTYPES)
    status = native.status()
    assert status.available
    assert str(kernel.path) in status.detail


# ---- finding ----


def test_the_check_of_the_scan_sees_wrong_numbers(tmp_path: Path) -> None:
    source = tmp_path / "small.c"
    source.write_text("void treadle_scan_forward(void *p) {}\nvoid treadle_scan_backward(void *p) {}\n")
    kernel, detail = build.find([tmp_path / "kernels"], build.COMPILERS, source, native.SELF_CHECK)
    assert kernel is None
    assert "wrong state" in detail or "no C compiler" in detail


def test_without_a_compiler_there_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "folders", lambda: [tmp_path])
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    with caplog.at_level(logging.INFO, native.__name__):
        kernel, detail = native._found.__wrapped__()
    assert kernel is None
    assert [record.getMessage() for record in caplog.records] == [
        f"the gated scan runs as a plain torch loop: {detail}"
    ]

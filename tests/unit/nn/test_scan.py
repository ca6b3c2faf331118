"""The gated scan, through both CPU back ends: values, derivatives, extremes, restarts, and what torch makes of it."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from treadle.nn import loop, native, scan
from treadle.nn.gates import Candidate, GateForm, ScanOptions
from treadle.nn.rows import Rows
from treadle.nn.scan import gated_scan, gated_step

every_form = pytest.mark.parametrize("form", GateForm, ids=lambda form: form.name)
EXTREMES = [1e30, 300.0, 120.0, 89.0, 87.0, 0.0]
BACKENDS = {"loop": loop, "native": native}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Each back end in turn, whatever this machine would choose."""
    chosen = BACKENDS[request.param]
    if chosen is native and not native.status().available:
        pytest.skip(f"no compiled scan here: {native.status().detail}")
    monkeypatch.setattr(scan, "_backend", lambda _: chosen)
    return chosen


def rows_of(*lengths: int) -> Rows:
    return Rows.of_lengths(lengths, device=torch.device("cpu"))


def scan_loop(
    pre_NG: Tensor,
    h0_SH: Tensor,
    rows: Rows,
    options: ScanOptions,
    *,
    starts_N: Tensor | None = None,
    reset_H: Tensor | None = None,
    decay_NH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The published equations in float64, a frame at a time, gate by gate."""
    *shares, x_NH = pre_NG.double().chunk(options.form.num_gates, dim=-1)
    g_NH = {
        Candidate.g: torch.where(x_NH >= 0, x_NH + 0.5, torch.sigmoid(x_NH)),
        Candidate.tanh: torch.tanh(x_NH),
        Candidate.identity: x_NH,
    }[options.candidate]
    if options.form is GateForm.mingru:
        add_NH, keep_NH = torch.sigmoid(shares[0]), torch.sigmoid(-shares[0])
    else:
        keep_NH, add_NH = (torch.sigmoid(share) for share in shares)
        if options.form is GateForm.minlstm:
            keep_NH, add_NH = keep_NH / (keep_NH + add_NH), add_NH / (keep_NH + add_NH)
    outputs: list[Tensor] = [torch.empty(0)] * len(pre_NG)
    lasts = []
    for row, (begin, end) in enumerate(itertools.pairwise(rows.offsets.tolist())):
        h_H = h0_SH[row].double()
        for n in reversed(range(begin, end)) if options.reverse else range(begin, end):
            if starts_N is not None and starts_N[n]:
                h_H = torch.zeros_like(h_H) if reset_H is None else reset_H.double()
            elif decay_NH is not None:
                h_H = decay_NH[n].double() * h_H
            h_H = keep_NH[n] * h_H + add_NH[n] * g_NH[n]
            outputs[n] = h_H
        lasts.append(h_H)
    return torch.stack(outputs), torch.stack(lasts)


def drawn(form: GateForm, rows: Rows, num_hidden: int, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    num = rows.num_frames
    return {
        "pre": (2 * torch.randn(num, form.num_gates * num_hidden, generator=generator)).to(dtype),
        "h0": torch.randn(rows.num_rows, num_hidden, generator=generator).to(
            torch.float64 if dtype is torch.float64 else torch.float32
        ),
        "starts": torch.rand(num, generator=generator) < 0.2,
        "reset": torch.randn(num_hidden, generator=generator).to(
            torch.float64 if dtype is torch.float64 else torch.float32
        ),
        "decay": torch.rand(num, num_hidden, generator=generator).to(dtype),
    }


@every_form
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    num_hidden=st.sampled_from([1, 3, 64, 65]),
    seed=st.integers(0, 2**16),
    candidate=st.sampled_from(Candidate),
    reverse=st.booleans(),
    starts=st.booleans(),
    decay=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_equals_the_float64_loop(
    form: GateForm,
    lengths: list[int],
    num_hidden: int,
    seed: int,
    candidate: Candidate,
    reverse: bool,
    starts: bool,
    decay: bool,
) -> None:
    rows = rows_of(*lengths)
    options = ScanOptions(form=form, candidate=candidate, reverse=reverse)
    x = drawn(form, rows, num_hidden, seed, torch.float32)
    extra = {"starts_N": x["starts"], "reset_H": x["reset"]} if starts else {}
    extra |= {"decay_NH": x["decay"]} if decay else {}
    expected_NH, expected_SH = scan_loop(x["pre"], x["h0"], rows, options, **extra)
    codes = (options.form.value, options.candidate.value, options.reverse)
    arguments = (x["pre"], x["h0"], rows.offsets, *(extra.get(name) for name in ("starts_N", "reset_H", "decay_NH")))
    for backend in BACKENDS.values():
        if backend is native and not native.status().available:
            continue
        h_NH, last_SH = backend.forward(*arguments, *codes)
        assert h_NH.dtype == last_SH.dtype == torch.float32
        torch.testing.assert_close(h_NH.double(), expected_NH, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last_SH.double(), expected_SH, rtol=1e-5, atol=1e-5)


@every_form
@pytest.mark.parametrize("candidate", Candidate, ids=lambda candidate: candidate.name)
@pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "back"])
def test_first_and_second_derivatives(backend: ModuleType, form: GateForm, candidate: Candidate, reverse: bool) -> None:
    rows = rows_of(3, 1)
    options = ScanOptions(form=form, candidate=candidate, reverse=reverse)
    x = drawn(form, rows, 1, 0, torch.float64)
    starts_N = torch.tensor([False, True, False, reverse])

    def run(pre: Tensor, h0: Tensor, reset: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        return gated_scan(pre, h0, rows, options, starts_N=starts_N, reset_H=reset, decay_NH=decay)

    def run_plain(pre: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        return gated_scan(pre, h0, rows, options)

    inputs = [x[name].requires_grad_() for name in ("pre", "h0", "reset", "decay")]
    assert torch.autograd.gradcheck(run_plain, inputs[:2])
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_equal_those_of_the_float64_loop(backend: ModuleType, form: GateForm, dtype: torch.dtype) -> None:
    rows, options = rows_of(70, 1, 33), ScanOptions(form=form)
    x = drawn(form, rows, 65, 3, dtype)
    weights_NH = torch.randn(rows.num_frames, 65)

    def gradients(run: object, pre: Tensor, h0: Tensor) -> tuple[Tensor, ...]:
        pre, h0 = pre.detach().requires_grad_(), h0.detach().requires_grad_()
        h_NH, last_SH = run(pre, h0, rows, options)  # type: ignore[operator]
        loss = (h_NH.double() * weights_NH).sum() + last_SH.double().sin().sum()
        return torch.autograd.grad(loss, (pre, h0))

    got = gradients(gated_scan, x["pre"], x["h0"])
    wanted = gradients(scan_loop, x["pre"].double(), x["h0"].double())
    error = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]  # bf16 holds 8 bits
    for mine, theirs in zip(got, wanted, strict=True):
        assert ((mine.double() - theirs).norm() / theirs.norm()).item() < error


def test_a_restart_stops_gradients_and_needs_no_rows_of_its_own(backend: ModuleType) -> None:
    rows, options = rows_of(6), ScanOptions(form=GateForm.mingru)
    x = drawn(GateForm.mingru, rows, 4, 1, torch.float32)
    for starts in ([0], [1], [5], [2, 3], [0, 1, 2, 3, 4, 5]):
        starts_N = torch.zeros(6, dtype=torch.bool).index_fill(0, torch.tensor(starts), True)
        h0_SH = x["h0"].clone().requires_grad_()
        h_NH, _ = gated_scan(x["pre"], h0_SH, rows, options, starts_N=starts_N)
        bounds = sorted({0, *starts, 6})
        h0s = torch.cat([x["h0"]] + [torch.zeros(1, 4)] * (len(bounds) - 2)) * (0.0 if 0 in starts else 1.0)
        pieces, _ = gated_scan(x["pre"], h0s, rows_of(*(b - a for a, b in itertools.pairwise(bounds))), options)
        assert torch.equal(h_NH, pieces)
        (grad,) = torch.autograd.grad(h_NH[-1].sum(), h0_SH)
        assert not grad.any()


@every_form
def test_a_restart_ends_what_is_not_a_number(backend: ModuleType, form: GateForm) -> None:
    rows, options = rows_of(6), ScanOptions(form=form)
    pre_NG = torch.zeros(6, form.num_gates * 2)
    pre_NG[1, 0] = torch.nan
    pre_NG.requires_grad_()
    starts_N = torch.tensor([False, False, False, True, False, False])
    h_NH, last_SH = gated_scan(pre_NG, torch.zeros(1, 2), rows, options, starts_N=starts_N)
    assert h_NH.isfinite().all(1).tolist() == [True, False, False, True, True, True]
    assert last_SH.isfinite().all()
    (grad,) = torch.autograd.grad(h_NH[3:].sum(), pre_NG)
    assert grad[3:].isfinite().all()
    assert grad[3:].any()


@every_form
def test_extreme_gates_stay_finite_and_right(backend: ModuleType, form: GateForm) -> None:
    values = EXTREMES + [-value for value in EXTREMES]
    shares = torch.cartesian_prod(*[torch.tensor(values)] * (form.num_gates - 1)).view(-1, form.num_gates - 1)
    pre_NG = torch.cat((shares, torch.full((len(shares), 1), -0.3)), dim=-1).repeat_interleave(3, 0).requires_grad_()
    h0_SH = torch.full((len(shares), 1), 0.7, requires_grad=True)
    rows, options = rows_of(*[3] * len(shares)), ScanOptions(form=form)
    h_NH, last_SH = gated_scan(pre_NG, h0_SH, rows, options)
    (h_NH.sum() + last_SH.sum()).backward()
    assert h_NH.isfinite().all()
    for given_tensor in (pre_NG, h0_SH):
        assert given_tensor.grad is not None
        assert given_tensor.grad.isfinite().all()
    expected, _ = scan_loop(pre_NG.detach(), h0_SH.detach(), rows, options)
    sound = expected.isfinite()  # the ratio form is 0 / 0 where both gates are shut, which is why it is not used
    assert sound.float().mean() > 0.7
    torch.testing.assert_close(h_NH.double()[sound], expected[sound], rtol=1e-5, atol=1e-5)


def test_both_gates_shut_share_equally(backend: ModuleType) -> None:
    pre_NG = torch.tensor([[-200.0, -200.0, 1.0]])
    _, last_SH = gated_scan(pre_NG, torch.tensor([[3.0]]), rows_of(1), ScanOptions(form=GateForm.minlstm))
    assert last_SH.item() == pytest.approx(0.5 * 3.0 + 0.5 * 1.5)


@every_form
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_divergence_shows_in_the_output(backend: ModuleType, form: GateForm, bad: float) -> None:
    pre_NG = torch.zeros(3, form.num_gates)
    pre_NG[1, -1] = bad
    h_NH, last_SH = gated_scan(pre_NG, torch.zeros(1, 1), rows_of(3), ScanOptions(form=form))
    assert h_NH[:, 0].isfinite().tolist() == [True, False, False]
    assert not last_SH.isfinite().any()


@every_form
@pytest.mark.parametrize("candidate", Candidate, ids=lambda candidate: candidate.name)
def test_step_equals_scan(backend: ModuleType, form: GateForm, candidate: Candidate) -> None:
    options = ScanOptions(form=form, candidate=candidate)
    pre_NG, h_BH, decay_NH = torch.randn(6, form.num_gates * 4), torch.randn(1, 4), torch.rand(6, 4)
    h_NH, _ = gated_scan(pre_NG, h_BH, rows_of(6), options, decay_NH=decay_NH)
    for n in range(6):
        h_BH = gated_step(pre_NG[n : n + 1], h_BH * decay_NH[n], options)
        torch.testing.assert_close(h_BH[0], h_NH[n], rtol=0, atol=1e-6)


def test_saves_pre_activations_and_outputs_only(backend: ModuleType) -> None:
    rows = rows_of(64, 32)
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    pre_NG = torch.randn(96, 2 * 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        gated_scan(pre_NG, torch.zeros(2, 256), rows, ScanOptions(form=GateForm.mingru))
    assert sum(saved.values()) / (96 * 256) <= 3.1


def test_the_definition_has_no_index_nodes() -> None:
    pre_NG = torch.randn(8, 6, requires_grad=True)
    options = ScanOptions(form=GateForm.mingru)
    h_NH, _ = loop.reference_scan(pre_NG, torch.zeros(2, 3), rows_of(5, 3).offsets, None, None, None, options)
    waiting, names = [h_NH.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(type(node).__name__)
            waiting += [parent for parent, _ in node.next_functions]
    assert "UnbindBackward0" in names
    assert not names & {"SelectBackward0", "SliceBackward0"}  # they fill a tensor of the whole size at every step


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows_stay_accurate(form: GateForm, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pre_NG = torch.randn(32_768, form.num_gates * 4)
    pre_NG[:, : 4 * (form.num_gates - 1)] -= 3  # gates that keep most of the state
    pre_NG = pre_NG.to(dtype)
    rows, options = rows_of(32_768), ScanOptions(form=form)
    h_NH, _ = gated_scan(pre_NG, torch.zeros(1, 4), rows, options)
    expected, _ = scan_loop(pre_NG, torch.zeros(1, 4), rows, options)
    error = ((h_NH.double() - expected).norm() / expected.norm()).item()
    assert error < {torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]


def test_torch_accepts_the_operators() -> None:
    rows = rows_of(4, 2)
    x = drawn(GateForm.minlstm, rows, 3, 0, torch.float32)
    arguments = (x["pre"], x["h0"], rows.offsets, x["starts"], x["reset"], x["decay"], 1, 0, False, 4)
    for requires_grad in (False, True):
        inputs = [x[name].detach().requires_grad_(requires_grad) for name in ("pre", "h0")]
        torch.library.opcheck(torch.ops.treadle.gated_scan.default, (*inputs, *arguments[2:]))
    plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    h_NH, last_SH = torch.ops.treadle.gated_scan(*plain)
    torch.library.opcheck(torch.ops.treadle.gated_scan_backward.default, (h_NH, last_SH, h_NH, *plain))


def test_compiled_graphs_hold_the_operator_whole() -> None:
    rows, options = rows_of(5, 3), ScanOptions(form=GateForm.mingru)
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    def run(pre: Tensor, h0: Tensor) -> Tensor:
        h_NH, last_SH = gated_scan(pre, h0, rows, options)
        return h_NH.sin().sum() + last_SH.sum()

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(run, backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True)
    pre_NG, h0_SH = torch.randn(8, 6, requires_grad=True), torch.randn(2, 3)
    torch.testing.assert_close(compiled(pre_NG, h0_SH), run(pre_NG, h0_SH), rtol=0, atol=1e-6)
    (got,) = torch.autograd.grad(compiled(pre_NG, h0_SH), pre_NG)
    (wanted,) = torch.autograd.grad(run(pre_NG, h0_SH), pre_NG)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    assert "treadle.gated_scan.default" in seen
    assert "treadle.gated_scan_backward.default" in seen

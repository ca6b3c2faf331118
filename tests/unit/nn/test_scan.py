"""The gated scan: derivatives, extremes, and a graph that grows linearly with time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from treadle.nn.rows import Rows
from treadle.nn.scan import GateForm, gated_scan, gated_step

every_form = pytest.mark.parametrize("form", GateForm, ids=lambda form: form.name)
EXTREMES = [1e30, 300.0, 120.0, 89.0, 87.0, 0.0]


def scan_loop(pre_BTG: Tensor, h0_BH: Tensor, form: GateForm) -> Tensor:
    """The published equations in float64, a frame at a time, gate by gate."""
    *gates, x = pre_BTG.double().chunk(form.num_gates, dim=-1)
    g = torch.where(x >= 0, x + 0.5, torch.sigmoid(x))
    if form is GateForm.mingru:
        add = torch.sigmoid(gates[0])
        keep = torch.sigmoid(-gates[0])
    else:
        keep, add = (torch.sigmoid(gate) for gate in gates)
        if form is GateForm.minlstm:
            keep, add = keep / (keep + add), add / (keep + add)
    h, steps = h0_BH.double(), []
    for t in range(pre_BTG.shape[1]):
        h = keep[:, t] * h + add[:, t] * g[:, t]
        steps.append(h)
    return torch.stack(steps, dim=1)


@every_form
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    num_hidden=st.sampled_from([1, 3, 64, 65]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_equals_the_float64_loop(form: GateForm, lengths: list[int], num_hidden: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths), form.num_gates * num_hidden)
    pre_BTG = 2 * torch.randn(shape, generator=generator)
    h0_BH = torch.randn(shape[0], num_hidden, generator=generator)
    expected = scan_loop(pre_BTG, h0_BH, form)
    h_BTH, last_BH = gated_scan(pre_BTG, h0_BH, form=form, rows=Rows.of(lengths, pre_BTG))
    assert h_BTH.dtype == torch.float32
    for row, length in enumerate(lengths):
        torch.testing.assert_close(h_BTH[row, :length].double(), expected[row, :length], rtol=1e-5, atol=1e-5)
        assert torch.equal(last_BH[row], h_BTH[row, length - 1])


@every_form
@pytest.mark.parametrize("ragged", [False, True])
def test_first_and_second_derivatives(form: GateForm, ragged: bool) -> None:
    torch.manual_seed(0)
    pre_BTG = torch.randn(2, 4, form.num_gates * 2, dtype=torch.float64, requires_grad=True)
    h0_BH = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    rows = Rows.of([4, 2], pre_BTG) if ragged else None

    def run(pre: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        return gated_scan(pre, h0, form=form, rows=rows)

    assert torch.autograd.gradcheck(run, (pre_BTG, h0_BH))
    assert torch.autograd.gradgradcheck(run, (pre_BTG, h0_BH))


@every_form
def test_extreme_gates_stay_finite_and_right(form: GateForm) -> None:
    values = EXTREMES + [-value for value in EXTREMES]
    gates = torch.cartesian_prod(*[torch.tensor(values)] * (form.num_gates - 1)).view(-1, form.num_gates - 1)
    pre_BTG = torch.cat((gates, torch.full((len(gates), 1), -0.3)), dim=-1)[:, None].repeat(1, 3, 1).requires_grad_()
    h0_BH = torch.full((len(gates), 1), 0.7, requires_grad=True)
    h_BTH, last_BH = gated_scan(pre_BTG, h0_BH, form=form)
    (h_BTH.sum() + last_BH.sum()).backward()
    assert h_BTH.isfinite().all()
    assert pre_BTG.grad is not None
    assert h0_BH.grad is not None
    assert pre_BTG.grad.isfinite().all()
    assert h0_BH.grad.isfinite().all()
    expected = scan_loop(pre_BTG.detach(), h0_BH.detach(), form)
    sound = expected.isfinite()  # the ratio form is 0 / 0 where both gates are shut, which is why it is not used
    assert sound.float().mean() > 0.7
    torch.testing.assert_close(h_BTH.double()[sound], expected[sound], rtol=1e-5, atol=1e-5)


def test_both_gates_shut_share_equally() -> None:
    pre_BTG = torch.tensor([[[-200.0, -200.0, 1.0]]])
    _, last_BH = gated_scan(pre_BTG, torch.tensor([[3.0]]), form=GateForm.minlstm)
    assert last_BH.item() == pytest.approx(0.5 * 3.0 + 0.5 * 1.5)


@every_form
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_divergence_shows_in_the_output(form: GateForm, bad: float) -> None:
    pre_BTG = torch.zeros(1, 3, form.num_gates)
    pre_BTG[0, 1, -1] = bad
    h_BTH, last_BH = gated_scan(pre_BTG, torch.zeros(1, 1), form=form)
    assert h_BTH[0, :, 0].isfinite().tolist() == [True, False, False]
    assert not last_BH.isfinite().any()


@every_form
def test_step_equals_scan(form: GateForm) -> None:
    pre_BTG = torch.randn(3, 6, form.num_gates * 4)
    h_BH = torch.randn(3, 4)
    h_BTH, _ = gated_scan(pre_BTG, h_BH, form=form)
    for t, pre_BG in enumerate(pre_BTG.unbind(1)):
        h_BH = gated_step(pre_BG, h_BH, form=form)
        torch.testing.assert_close(h_BH, h_BTH[:, t], rtol=0, atol=1e-6)


@every_form
def test_no_index_nodes_in_the_graph(form: GateForm) -> None:
    pre_BTG = torch.randn(2, 5, form.num_gates * 3, requires_grad=True)
    h_BTH, _ = gated_scan(pre_BTG, torch.zeros(2, 3), form=form, rows=Rows.of([5, 3], pre_BTG))
    waiting, names = [h_BTH.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(type(node).__name__)
            waiting += [parent for parent, _ in node.next_functions]
    assert "UnbindBackward0" in names
    assert not names & {"SelectBackward0", "SliceBackward0"}


@every_form
def test_long_rows_stay_accurate(form: GateForm) -> None:
    torch.manual_seed(0)
    pre_BTG = torch.randn(1, 4096, form.num_gates * 8)
    pre_BTG[..., : 8 * (form.num_gates - 1)] -= 3  # gates that keep most of the state
    h_BTH, _ = gated_scan(pre_BTG, torch.zeros(1, 8), form=form)
    expected = scan_loop(pre_BTG, torch.zeros(1, 8), form)
    assert ((h_BTH - expected).norm() / expected.norm()).item() < 2e-6

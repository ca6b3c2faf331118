"""Training in chunks against the whole row: gradients, losses, states, random numbers, and memory as planned.

Shape letters: B rows, T time steps, D features.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cell_oracles import KINDS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from treadle.errors import ConfigError, InfeasibleError
from treadle.nn import LSTM, MinGRU, native
from treadle.nn.footprint import measure_footprint, peak_bytes, plan_chunk
from treadle.nn.long import checkpointed, train_in_chunks
from treadle.nn.stack import RecurrentStack

every_kind = pytest.mark.parametrize("kind", KINDS)
NUM_STEPS = 72


class Row:
    """Rows of frames, a stack and a head: whole or in pieces of the given sizes."""

    def __init__(self, kind: str, sizes: list[int], *, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.stack: RecurrentStack = KINDS[kind](3, 5, 2, dropout=dropout, learned_state=True).double()
        self.head = nn.Linear(5, 2).double()
        self.parts = (*self.stack.parameters(), *self.head.parameters())
        for parameter in self.parts:
            nn.init.normal_(parameter, std=0.4)
        self.frames = torch.randn(2, NUM_STEPS, 3, dtype=torch.float64).split(sizes, dim=1)

    def run(self, index: int, state: Any) -> tuple[Tensor, Any]:
        y_BTH, state = self.stack(self.frames[index], state)
        return self.head(y_BTH).square().sum(), state

    def gradients(self) -> list[Tensor]:
        grads = [parameter.grad for parameter in self.parts]
        for parameter in self.parts:
            parameter.grad = None
        return [grad for grad in grads if grad is not None]


def assert_near(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted) > 0
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).norm() <= 1e-12 * other.norm()


@every_kind
@pytest.mark.parametrize(
    "sizes", [[1, 7, 64], [NUM_STEPS], [24, 24, 24], [1] * NUM_STEPS], ids=["1, 7, rest", "one", "three", "all"]
)
def test_exact_chunks_equal_the_whole(kind: str, sizes: list[int]) -> None:
    row = Row(kind, sizes)
    whole_loss, state = torch.zeros(()), None
    for index in range(len(sizes)):
        loss, state = row.run(index, state)
        whole_loss = whole_loss + loss
    whole_loss.backward()
    wanted = row.gradients()
    assert len(wanted) == len(row.parts)
    trained = train_in_chunks(row.run, len(sizes))
    assert_near(row.gradients(), wanted)
    torch.testing.assert_close(trained.loss_sum, whole_loss.detach(), rtol=1e-12, atol=0)
    assert state is not None
    for name, part in state.items():
        assert torch.equal(trained.state[name], part)
        assert not trained.state[name].requires_grad


def test_fp32_chunks_are_within_rounding() -> None:
    row = Row("lstm", [24] * 3)
    row.stack.float()
    row.head.float()
    row.frames = tuple(piece.float() for piece in row.frames)
    (y_BTH, _) = row.stack(torch.cat(row.frames, 1))
    row.head(y_BTH).square().sum().backward()
    wanted = row.gradients()
    train_in_chunks(row.run, 3)
    for got, other in zip(row.gradients(), wanted, strict=True):
        assert (got - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize(("exact", "overlap"), [(True, 0), (False, 0), (False, 2)])
def test_dropout_is_the_same_in_both_passes(exact: bool, overlap: int) -> None:
    row = Row("gru", [9] * 8, dropout=0.5)
    torch.manual_seed(7)
    state, losses = None, []
    for index in range(8):
        loss, state = row.run(index, state)
        losses.append(loss)
        if not exact and overlap == 0:
            state = {name: part.detach() for name, part in state.items()}
    after = torch.rand(1)
    sum(losses, torch.zeros(())).backward()
    wanted = row.gradients()
    torch.manual_seed(7)
    trained = train_in_chunks(row.run, 8, exact=exact, overlap=overlap)
    assert torch.equal(torch.rand(1), after)  # the generator stands where one run would have left it
    torch.testing.assert_close(trained.loss_sum, sum(losses, torch.zeros(())).detach(), rtol=1e-12, atol=0)
    if overlap == 0:
        assert_near(row.gradients(), wanted)


@pytest.mark.parametrize("overlap", [0, 1, 3, 20])
def test_truncated_gradients_reach_back_over_the_overlap(overlap: int) -> None:
    row = Row("mingru", [6] * 12)
    for index in range(12):  # for each loss a graph of its own, cut at the first chunk it may reach
        first = max(0, index - overlap)
        state = None
        with torch.no_grad():
            for earlier in range(first):
                _, state = row.run(earlier, state)
        loss = torch.zeros(())
        for reached in range(first, index + 1):
            loss, state = row.run(reached, state)
        loss.backward()
    wanted = row.gradients()
    trained = train_in_chunks(row.run, 12, exact=False, overlap=overlap)
    assert_near(row.gradients(), wanted)
    assert not trained.state["h"].requires_grad
    if overlap == 20:
        train_in_chunks(row.run, 12)
        assert_near(row.gradients(), wanted)


class Carried(NamedTuple):
    memory: dict[str, Tensor]
    sums: tuple[Tensor, list[Tensor | None]]


def test_nested_states_carry_gradients_to_the_first_one() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    start = torch.randn(4, dtype=torch.float64, requires_grad=True)
    frames = torch.randn(5, 4, dtype=torch.float64)

    def run(index: int, state: Carried) -> tuple[Tensor | None, Carried]:
        (count, (total, none)) = (state.memory["count"], state.sums)
        h = torch.tanh(state.memory["h"] * weight + frames[index])
        total = total + h.sum()
        loss = total.square() if index == 4 else None  # a loss of the whole row: it needs the running sum
        return loss, Carried(memory={"h": h, "count": count + 1}, sums=(total, none))

    def first() -> Carried:
        memory = {"h": start * 2, "count": torch.zeros((), dtype=torch.int64)}
        return Carried(memory=memory, sums=(torch.zeros((), dtype=torch.float64), [None]))

    state = first()
    for index in range(5):
        loss, state = run(index, state)
    assert loss is not None
    wanted = torch.autograd.grad(loss, (weight, start))
    trained = train_in_chunks(run, 5, first())
    assert weight.grad is not None
    assert start.grad is not None
    assert_near([weight.grad, start.grad], list(wanted))
    assert isinstance(trained.state, Carried)
    assert trained.state.memory["count"] == 5
    assert trained.state.sums[1] == [None]
    weight.grad = start.grad = None
    train_in_chunks(run, 5, first(), exact=False, overlap=4)
    assert_near([weight.grad, start.grad], list(wanted))


def test_gradients_are_added_to_those_there_are() -> None:
    row = Row("rnn_tanh", [24] * 3)
    train_in_chunks(row.run, 3)
    once = [parameter.grad.clone() for parameter in row.parts]
    train_in_chunks(row.run, 3)
    assert_near(row.gradients(), [2 * grad for grad in once])


@pytest.mark.parametrize("around", [True, False])
def test_autocast_leaves_no_weight_without_gradient(around: bool) -> None:
    # A cast of a weight that autocast keeps from the pass without gradients would take the weight's away.
    row = Row("lstm", [36, 36])
    layer = nn.Linear(3, 3)
    row.frames = tuple(piece.float() for piece in row.frames)

    def run(index: int, state: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not around or torch.is_autocast_enabled("cpu")):
            y_BTD = layer(layer(row.frames[index]) + state[:, None])
        return y_BTD.float().square().sum(), y_BTD[:, -1].float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, state = run(0, torch.zeros(2, 3))
        loss = loss + run(1, state)[0]
    wanted = torch.autograd.grad(loss, list(layer.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
        train_in_chunks(run, 2, torch.zeros(2, 3))
    for parameter, grad in zip(layer.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grad, rtol=0.02, atol=0.02 * grad.abs().max().item())


def test_states_keep_no_outputs_alive() -> None:
    weight = torch.ones(1, requires_grad=True)
    seen: list[int] = []

    def run(index: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if state is not None:
            seen.append(state.untyped_storage().nbytes())
        y_T = torch.zeros(1000) + (0 if state is None else state) + weight
        return y_T.sum(), y_T[-1:]

    trained = train_in_chunks(run, 4)
    assert set(seen) == {4}
    assert trained.state.untyped_storage().nbytes() == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loss, state: (loss.detach(), {name: part.detach() for name, part in state.items()}), "has part in"),
        (lambda _, state: (None, state), "no loss from any chunk"),
        (lambda loss, state: (loss.expand(2), state), r"loss of shape \(2,\)"),
        (lambda loss, state: (loss, [state, 1]), "state: got a int"),
    ],
)
@pytest.mark.parametrize("exact", [True, False])
def test_runs_that_give_no_gradient_are_refused(change: Callable[..., Any], message: str, exact: bool) -> None:
    row = Row("rnn_tanh", [NUM_STEPS])
    with pytest.raises(ConfigError, match=message):
        train_in_chunks(lambda index, state: change(*row.run(index, state)), 1, exact=exact)


def test_misfits_are_refused() -> None:
    row = Row("rnn_tanh", [24] * 3)
    for arguments in ({"num_chunks": 0}, {"num_chunks": 3, "overlap": 1}, {"num_chunks": 3, "overlap": -1}):
        with pytest.raises(ConfigError, match="num_chunks: got"):
            train_in_chunks(row.run, **arguments)
    with pytest.raises(ConfigError, match=r"run: got a state of 0 tensors after chunk 1, expected 1"):
        train_in_chunks(
            lambda i, s: (row.run(i, None)[0], None if i == 1 and torch.is_grad_enabled() else row.run(i, s)[1]), 3
        )
    with pytest.raises(ConfigError, match="chunk: got 0"):
        checkpointed(row.stack, row.frames[0], chunk=0)


@every_kind
@pytest.mark.parametrize("chunk", [1, 10, 100])
def test_checkpointed_equals_the_plain_call(kind: str, chunk: int) -> None:
    row = Row(kind, [40, 32], dropout=0.3)
    x_BTD = row.frames[0].requires_grad_()
    given = {name: torch.rand(2, 2, 5, dtype=torch.float64, requires_grad=True) for name in row.stack.state_names}
    inputs = [x_BTD, *given.values(), *(p for name, p in row.stack.named_parameters() if "initial" not in name)]

    def pieces(x_BTD: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs = []
        for piece_BTD in x_BTD.split(chunk, 1):
            y_BTD, state = row.stack(piece_BTD, state)
            outputs.append(y_BTD)
        return torch.cat(outputs, 1), state

    results = []
    for call in (pieces, lambda x, state: checkpointed(row.stack, x, state, chunk=chunk)):
        torch.manual_seed(3)
        y_BTD, end = call(x_BTD, given)
        loss = y_BTD.square().sum() + sum(part.sin().sum() for part in end.values())
        results.append((y_BTD, torch.autograd.grad(loss, inputs)))
    assert torch.equal(results[0][0], results[1][0])
    assert_near(list(results[1][1]), list(results[0][1]))


def test_checkpointed_takes_less_memory() -> None:
    stack, x_BTD = LSTM(16, 16, 3), torch.randn(2, 400, 16)
    plain = peak_bytes(lambda: stack(x_BTD)[0].sum().backward())
    pieces = peak_bytes(lambda: checkpointed(stack, x_BTD, chunk=20)[0].sum().backward())
    assert pieces < plain / 4


def test_peaks_are_counted_to_the_byte() -> None:
    kept = torch.ones(1000)

    def run() -> None:
        one = kept * 2  # 4,000 bytes
        view = one.view(10, 100)
        two = view + 1  # 4,000 more
        del one, view, two
        kept.view(10, 100).add_(torch.zeros(100))  # 400

    assert peak_bytes(run) == 8_000
    assert peak_bytes(lambda: kept.view(10, 100).add_(torch.zeros(100))) == 400
    assert peak_bytes(lambda: torch.tensor([1.0] * 500) + 1) == 4_000
    weight = torch.ones(1000, requires_grad=True)
    # exp's result, saved; the sum, its gradient, and the gradient of the weight.
    assert peak_bytes(lambda: weight.exp().sum().backward()) == 4_000 + 4 + 4 + 4_000


def test_footprint_is_what_a_chunk_takes() -> None:
    torch.manual_seed(0)
    stack = LSTM(8, 8, 2, dropout=0.1)
    before = [parameter.detach().clone() for parameter in stack.parameters()]

    def run(num_frames: int) -> tuple[Tensor, Any]:
        state = {name: part.requires_grad_() for name, part in stack.initial_state(3).items()}
        y_BTD, state = stack(torch.randn(3, num_frames, 8), state)
        return y_BTD.square().sum(), state

    generator = torch.get_rng_state()
    footprint = measure_footprint(run)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in stack.parameters())
    assert all(torch.equal(*pair) for pair in zip(before, stack.parameters(), strict=True))
    assert footprint.bytes_per_state == 2 * 2 * 3 * 8 * 4 + len(generator)

    def train(num_frames: int) -> None:
        loss, _ = run(num_frames)
        loss.backward()

    train(8)  # the gradients that are added to
    num_weights = sum(parameter.numel() for parameter in stack.parameters())
    for num_frames in (100, 500):
        planned = footprint.bytes_per_frame * num_frames + footprint.fixed_bytes - 4 * num_weights
        assert peak_bytes(lambda: train(num_frames)) == pytest.approx(planned, rel=0.05)  # noqa: B023
    with pytest.raises(ConfigError, match=r"run: got .* bytes for 128 frames"):
        measure_footprint(lambda _: run(64))


def test_footprint_counts_gradients_and_those_they_are_added_to() -> None:
    weight = torch.ones(1000, requires_grad=True)
    footprint = measure_footprint(lambda num_frames: ((torch.ones(num_frames, 1000) * weight).sum(), None))
    assert 8_000 <= footprint.fixed_bytes <= 8_100
    assert footprint.bytes_per_frame == 8_000  # the frame, saved, and the gradient beside it
    assert footprint.bytes_per_state == 0


@given(
    budget=st.integers(0, 3000),
    frame=st.floats(0.1, 30),
    state=st.floats(0, 30),
    frames=st.integers(1, 120),
    fixed=st.floats(0, 100),
)
def test_plan_takes_the_fewest_chunks_that_fit(
    budget: int, frame: float, state: float, frames: int, fixed: float
) -> None:
    def needed(num_chunks: int) -> float:
        return fixed + state * num_chunks + frame * -(-frames // num_chunks)

    fitting = [num_chunks for num_chunks in range(1, frames + 1) if needed(num_chunks) <= budget]
    if not fitting:
        with pytest.raises(InfeasibleError) as caught:
            plan_chunk(budget, frame, state, frames, fixed_bytes=fixed)
        assert caught.value.context["needed_bytes"] == -(-min(map(needed, range(1, frames + 1))) // 1)
        return
    plan = plan_chunk(budget, frame, state, frames, fixed_bytes=fixed)
    assert plan.num_chunks == fitting[0]
    assert plan.planned_bytes <= budget
    spans = [plan.span(index) for index in range(plan.num_chunks)]
    assert [n for span in spans for n in range(span.start, span.stop)] == list(range(frames))
    assert all(span.stop > span.start for span in spans)
    assert max(span.stop - span.start for span in spans) == plan.chunk


def test_plan_refuses_with_numbers() -> None:
    with pytest.raises(InfeasibleError, match=r"budget_bytes: got 1,000, expected 1,620 or more for 1 frames of 1,500"):
        plan_chunk(1000, 1500, 120, 1)
    with pytest.raises(ConfigError, match="num_frames: got 0 frames"):
        plan_chunk(1000, 10, 10, 0)
    assert plan_chunk(10**6, 1000, 64, 10**9 // 10**5).num_chunks == 11
    with pytest.raises(InfeasibleError):
        plan_chunk(10**4, 1000, 64, 10**9)  # answered at once, for a row of any length


LONG_ROW = """
import contextlib, sys, time
from pathlib import Path
import torch
from treadle.nn import MinGRU
from treadle.nn.footprint import measure_footprint, plan_chunk
from treadle.nn.long import train_in_chunks

torch.set_num_threads(1)
torch.manual_seed(0)
num_frames, budget = int(sys.argv[1]), int(sys.argv[2])
stack, head = MinGRU(8, 16), torch.nn.Linear(16, 1)

def run_frames(first, length, state):
    phase_T = torch.arange(first, first + length, dtype=torch.float64)[:, None] * torch.linspace(0.001, 1, 8)
    y_BTH, state = stack(torch.sin(phase_T).float()[None], state)
    return head(y_BTH).square().sum() / num_frames, state

def fresh():
    return {name: part.requires_grad_() for name, part in stack.initial_state(1).items()}

def run(index, state):
    span = plan.span(index)
    return run_frames(span.start, span.stop - span.start, state)

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

footprint = measure_footprint(lambda length: run_frames(0, length, fresh()), frames=512)
# A mebibyte for what is no tensor: Python's objects, the generators' states, pages that are partly used.
plan = plan_chunk(budget, footprint.bytes_per_frame, footprint.bytes_per_state, num_frames,
                  fixed_bytes=footprint.fixed_bytes + 2**20)
with contextlib.suppress(OSError):
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before, started = memory("VmHWM"), time.monotonic()
trained = train_in_chunks(run, plan.num_chunks)
took, grown = time.monotonic() - started, memory("VmHWM") - before
norm = sum(p.grad.norm().item() for p in stack.parameters())
print(grown, plan.planned_bytes, plan.num_chunks, took, trained.loss_sum.item(), norm)
print(footprint.bytes_per_frame * num_frames)
"""


@pytest.mark.skipif(
    not native.supports(torch.float32), reason="a loop in torch keeps more in its graph than in tensors"
)
def test_a_row_of_a_million_frames_trains_within_its_plan(root: Path) -> None:
    budget = 16 * 2**20
    # Left to itself, glibc keeps freed blocks of some MB for later, up to twice the plan for so small a budget.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(root / "platform")}
    command = [sys.executable, "-c", LONG_ROW, "1000000", str(budget)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    grown, planned, num_chunks, took, loss, norm, whole = map(float, done.stdout.split())
    assert grown <= planned <= budget < whole / 20
    assert num_chunks > 20
    assert took <= 20
    assert 0 < loss < 10
    assert norm > 0


def test_min_cells_in_chunks_over_packed_rows_of_unlike_length() -> None:
    # A chunk holds what each row has left: rows that have ended leave the batch, and their states with them.
    torch.manual_seed(0)
    stack = MinGRU(3, 4).double()
    lengths, chunk = [23, 9, 16], 8
    x_BTD = torch.randn(3, 23, 3, dtype=torch.float64)

    def run(index: int, state: dict[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        left = [min(chunk, length - index * chunk) for length in lengths]
        alive = [row for row, length in enumerate(left) if length > 0]
        before = stack.initial_state(3) if state is None else state
        piece = x_BTD[alive, index * chunk :][:, :chunk]
        y_BTD, after = stack(piece, {"h": before["h"][:, alive]}, lengths=[left[row] for row in alive])
        h = before["h"].index_copy(1, torch.tensor(alive), after["h"])
        return y_BTD.square().sum() + h.sum(), {"h": h}

    loss, state = torch.zeros(()), None
    for index in range(3):
        part, state = run(index, state)
        loss = loss + part
    wanted = torch.autograd.grad(loss, list(stack.parameters()))
    train_in_chunks(run, 3)
    assert_near([p.grad for p in stack.parameters() if p.grad is not None], list(wanted))

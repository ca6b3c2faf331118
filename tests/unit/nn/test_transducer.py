"""The transducer's loss against a double loop over the lattice, against every path, and at its limits.

Shape letters: B rows, T time steps, U label positions, V classes, D features.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from treadle.errors import ConfigError, DataError
from treadle.nn import LSTM, MinGRU, transducer
from treadle.nn.transducer import transducer_loss_from_joint, transducer_loss_sum
from treadle.nn.transducer_model import Joint, Transducer

Lengths = list[int]


def loop_loss(logits_BTUV: Tensor, targets_BU: Tensor, frames: Lengths, labels: Lengths) -> Tensor:
    """The forward variables of Graves 2012, one cell after the other."""
    total = logits_BTUV.new_zeros(())
    for row, (num_frames, num_labels) in enumerate(zip(frames, labels, strict=True)):
        log_p = logits_BTUV[row, :num_frames, : num_labels + 1].log_softmax(-1)
        alpha: dict[tuple[int, int], Tensor] = {}
        for t, u in itertools.product(range(num_frames), range(num_labels + 1)):
            ways = [alpha[t - 1, u] + log_p[t - 1, u, 0]] if t else []
            if u:
                ways.append(alpha[t, u - 1] + log_p[t, u - 1, int(targets_BU[row, u - 1])])
            alpha[t, u] = torch.logsumexp(torch.stack(ways), 0) if ways else total.new_zeros(())
        total = total - alpha[num_frames - 1, num_labels] - log_p[num_frames - 1, num_labels, 0]
    return total


def every_path_loss(logits_TUV: Tensor, labels: list[int]) -> float:
    """Minus the log of the summed probability of all orders of blanks and labels that end in a blank."""
    probs = logits_TUV.double().softmax(-1).tolist()
    num_frames, num_labels = logits_TUV.shape[0], len(labels)
    total = 0.0
    for places in itertools.combinations(range(num_frames - 1 + num_labels), num_labels):
        t = u = 0
        chance = 1.0
        for turn in range(num_frames - 1 + num_labels):
            if turn in places:
                chance, u = chance * probs[t][u][labels[u]], u + 1
            else:
                chance, t = chance * probs[t][u][0], t + 1
        total += chance * probs[t][u][0]
    return -math.log(total)


def loss_and_grad(
    logits_BTUV: Tensor, targets_BU: Tensor, frames: Lengths, labels: Lengths, of: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    logits_BTUV = logits_BTUV.detach().requires_grad_()
    loss = of(logits_BTUV, targets_BU, frames, labels)
    return loss.detach(), torch.autograd.grad(loss, logits_BTUV)[0]


def difference(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


# Several labels a time step, no label at all, one time step, fewer time steps than labels.
RAGGED: tuple[Lengths, Lengths] = ([7, 3, 1, 2, 7, 1], [5, 0, 4, 5, 1, 0])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)]
)
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_equals_the_double_loop(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    torch.manual_seed(0)
    frames, labels = RAGGED
    logits_BTUV = (scale * torch.randn(6, 7, 6, 5)).to(dtype)
    targets_BU = torch.randint(1, 5, (6, 5))
    expected, expected_grad = loss_and_grad(logits_BTUV.double(), targets_BU, frames, labels, loop_loss)
    loss, grad = loss_and_grad(logits_BTUV, targets_BU, frames, labels, transducer_loss_sum)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    assert loss.item() == pytest.approx(expected.item(), rel=min(tolerance, 1e-6))
    assert difference(grad, expected_grad) <= tolerance


@given(data=st.data())
def test_equals_the_double_loop_for_any_lengths(data: st.DataObject) -> None:
    num_rows, most_frames, most_labels = (data.draw(st.integers(1, 4)) for _ in range(3))
    frames = data.draw(st.lists(st.integers(1, most_frames), min_size=num_rows, max_size=num_rows))
    labels = data.draw(st.lists(st.integers(0, most_labels), min_size=num_rows, max_size=num_rows))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    logits_BTUV = torch.randn(num_rows, most_frames, most_labels + 1, 3, dtype=torch.float64, generator=generator)
    targets_BU = torch.randint(1, 3, (num_rows, most_labels), generator=generator)
    expected = loss_and_grad(logits_BTUV, targets_BU, frames, labels, loop_loss)
    got = loss_and_grad(logits_BTUV, targets_BU, frames, labels, transducer_loss_sum)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4])
@pytest.mark.parametrize("num_labels", [0, 1, 2, 3, 4])
def test_sums_over_every_path(num_frames: int, num_labels: int) -> None:
    torch.manual_seed(num_frames)
    logits_BTUV = torch.randn(1, num_frames, num_labels + 1, 3)
    labels = torch.randint(1, 3, (num_labels,)).tolist()
    targets_BU = torch.tensor([labels], dtype=torch.int64)
    loss = transducer_loss_sum(logits_BTUV, targets_BU, [num_frames], [num_labels])
    assert loss.item() == pytest.approx(every_path_loss(logits_BTUV[0], labels), rel=1e-6)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    logits_BTUV = torch.randn(3, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    targets_BU = torch.randint(1, 4, (3, 2))
    assert torch.autograd.gradcheck(lambda x: 3 * transducer_loss_sum(x, targets_BU, [4, 2, 1], [2, 0, 2]), logits_BTUV)


def test_is_differentiable_once() -> None:
    logits_BTUV = torch.randn(1, 2, 2, 3, requires_grad=True)
    loss = transducer_loss_sum(logits_BTUV, torch.tensor([[1]]), [2], [1])
    (first,) = torch.autograd.grad(loss, logits_BTUV, retain_graph=True)
    (again,) = torch.autograd.grad(loss, logits_BTUV, retain_graph=True)
    assert torch.equal(first, again)
    with pytest.raises(ConfigError, match="create_graph"):
        torch.autograd.grad(loss, logits_BTUV, create_graph=True)


def test_gradient_stays_accurate_where_the_loss_is_large() -> None:
    torch.manual_seed(0)
    frames, labels = [500, 480, 460], [80, 80, 70]
    logits_BTUV, targets_BU = torch.randn(3, 500, 81, 32), torch.randint(1, 32, (3, 80))
    expected, expected_grad = loss_and_grad(logits_BTUV.double(), targets_BU, frames, labels, transducer_loss_sum)
    loss, grad = loss_and_grad(logits_BTUV, targets_BU, frames, labels, transducer_loss_sum)
    assert expected > 4500
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert difference(grad, expected_grad) <= 1e-6  # 1e-4 to 1e-3 with an fp32 lattice


@pytest.mark.parametrize("size", [89.0, 300.0, 1e4, 1e30])
def test_extreme_scores(size: float) -> None:
    """Unlikely blanks, unlikely labels, and all of them at random: finite, and what the float64 loop says.

    fp32 holds a log-probability of such a size to one part in 2^23, and the gradient follows from differences.
    """
    torch.manual_seed(0)
    frames, labels = [5, 4, 2], [3, 3, 3]
    targets_BU = torch.randint(1, 4, (3, 3))
    for pattern in ("blank", "labels", "random"):
        signs = torch.randint(0, 2, (3, 5, 4, 4)).mul(2).sub(1).float()
        if pattern != "random":
            signs[:] = 1.0
            (signs[..., 0] if pattern == "blank" else signs[..., 1:])[:] = -1.0
        logits_BTUV = size * signs
        expected, expected_grad = loss_and_grad(logits_BTUV.double(), targets_BU, frames, labels, loop_loss)
        loss, grad = loss_and_grad(logits_BTUV, targets_BU, frames, labels, transducer_loss_sum)
        assert loss.isfinite()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert grad.abs().max() <= 2.0
        if size < 1e5:
            torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=4 * 2**-23 * size)


@pytest.mark.parametrize(("size", "dtype"), [(1e36, torch.float32), (1e20, torch.float64), (1e36, torch.float64)])
def test_scores_that_round_by_more_than_any_log_probability(size: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits_BTUV, targets_BU = size * torch.randn(4, 30, 11, 5, dtype=dtype), torch.randint(1, 5, (4, 10))
    loss, grad = loss_and_grad(logits_BTUV, targets_BU, [30, 25, 20, 3], [10, 8, 10, 10], transducer_loss_sum)
    assert loss.isfinite()
    assert grad.abs().max() <= 2.0


def test_a_class_ruled_out_is_no_obstacle_unless_it_is_needed() -> None:
    torch.manual_seed(0)
    logits_BTUV = torch.randn(2, 4, 3, 4)
    logits_BTUV[..., 3] = -torch.inf
    loss, grad = loss_and_grad(logits_BTUV, torch.tensor([[1, 2], [2, 1]]), [4, 3], [2, 2], transducer_loss_sum)
    expected = transducer_loss_sum(logits_BTUV[..., :3], torch.tensor([[1, 2], [2, 1]]), [4, 3], [2, 2])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert grad.isfinite().all()
    loss, grad = loss_and_grad(logits_BTUV, torch.tensor([[1, 3], [2, 1]]), [4, 3], [2, 2], transducer_loss_sum)
    assert loss.isposinf()
    assert grad[0, :, :3].isnan().all()  # not a finite gradient of no meaning
    assert grad[1].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_shows(value: float) -> None:
    logits_BTUV = torch.randn(2, 3, 2, 4)
    logits_BTUV[1, 2, 1, 3] = value
    loss, grad = loss_and_grad(logits_BTUV, torch.tensor([[1], [2]]), [3, 3], [1, 1], transducer_loss_sum)
    assert loss.isnan()
    assert grad[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_neither_read_nor_given_a_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    frames, labels = RAGGED
    logits_BTUV, targets_BU = torch.randn(6, 7, 6, 5).to(dtype), torch.randint(1, 5, (6, 5))
    valid_BT = torch.arange(7) < torch.tensor(frames)[:, None]
    valid_BU = torch.arange(6) <= torch.tensor(labels)[:, None]
    valid_BTU = valid_BT[:, :, None] & valid_BU[:, None]
    expected, expected_grad = loss_and_grad(logits_BTUV, targets_BU, frames, labels, transducer_loss_sum)
    logits_BTUV[~valid_BTU] = torch.nan
    targets_BU[~valid_BU[:, 1:]] = -99
    loss, grad = loss_and_grad(logits_BTUV, targets_BU, frames, labels, transducer_loss_sum)
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad)
    assert not grad[~valid_BTU].any()
    assert grad[valid_BTU].any(-1).all()


def test_rows_do_not_touch_one_another_and_bits_repeat() -> None:
    torch.manual_seed(0)
    frames, labels = RAGGED
    logits_BTUV, targets_BU = torch.randn(6, 7, 6, 5), torch.randint(1, 5, (6, 5))
    first = loss_and_grad(logits_BTUV, targets_BU, frames, labels, transducer_loss_sum)
    again = loss_and_grad(logits_BTUV, targets_BU, frames, labels, transducer_loss_sum)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    logits_BTUV[2] += torch.randn(7, 6, 5)
    _, grad = loss_and_grad(logits_BTUV, targets_BU, frames, labels, transducer_loss_sum)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(grad[others], first[1][others])
    assert not torch.equal(grad[2], first[1][2])


@pytest.mark.parametrize("numbers", [1, 70, 500, 10_000])
def test_working_in_pieces_changes_no_bit(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    frames, labels = RAGGED
    logits_BTUV, targets_BU = torch.randn(6, 7, 6, 5), torch.randint(1, 5, (6, 5))
    whole = loss_and_grad(logits_BTUV, targets_BU, frames, labels, transducer_loss_sum)
    monkeypatch.setattr(transducer, "_PIECE_CPU", numbers)
    pieces = loss_and_grad(logits_BTUV, targets_BU, frames, labels, transducer_loss_sum)
    assert all(torch.equal(a, b) for a, b in zip(pieces, whole, strict=True))


def test_scores_in_another_memory_order() -> None:
    torch.manual_seed(0)
    frames, labels = RAGGED
    stored_VUTB, targets_BU = torch.randn(5, 6, 7, 6), torch.randint(1, 5, (6, 5))
    logits_BTUV = stored_VUTB.permute(3, 2, 1, 0)
    expected = loss_and_grad(logits_BTUV.contiguous(), targets_BU, frames, labels, transducer_loss_sum)
    got = loss_and_grad(logits_BTUV, targets_BU, frames, labels, transducer_loss_sum)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autocast_changes_nothing_within(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits_BTUV, targets_BU = torch.randn(2, 4, 3, 5).to(dtype), torch.randint(1, 5, (2, 2))
    expected = loss_and_grad(logits_BTUV, targets_BU, [4, 3], [2, 1], transducer_loss_sum)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss_and_grad(logits_BTUV, targets_BU, [4, 3], [2, 1], transducer_loss_sum)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_lengths_and_labels_may_be_tensors_of_any_whole_kind() -> None:
    logits_BTUV, targets_BU = torch.randn(2, 4, 3, 5), torch.tensor([[1, 2], [4, 3]])
    expected = transducer_loss_sum(logits_BTUV, targets_BU, [4, 3], [2, 1])
    frames, labels = torch.tensor([4, 3], dtype=torch.int32), torch.tensor([2, 1])
    assert torch.equal(transducer_loss_sum(logits_BTUV, targets_BU.int(), frames, labels), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits_BTUV": torch.zeros(2, 4, 3)}, ConfigError, "logits_BTUV: got torch.float32 of shape"),
        ({"logits_BTUV": torch.zeros(2, 4, 3, 5).int()}, ConfigError, "logits_BTUV: got torch.int32"),
        ({"logits_BTUV": torch.zeros(0, 4, 3, 5)}, DataError, "batch: got shape"),
        ({"targets_BU": torch.ones(2, 3).long()}, ConfigError, r"targets_BU: got shape \(2, 3\), expected \(2, 2\)"),
        ({"targets_BU": torch.ones(2, 2)}, ConfigError, "targets_BU: got torch.float32"),
        ({"targets_BU": torch.tensor([[1, 2], [3, 0]])}, DataError, r"targets_BU\[1, 1\]: got 0, expected a label"),
        ({"targets_BU": torch.tensor([[1, 5], [3, 4]])}, DataError, r"targets_BU\[0, 1\]: got 5, .* 1 to 4"),
        ({"targets_BU": torch.tensor([[-1, 5], [3, 4]])}, DataError, r"targets_BU\[0, 0\]: got -1"),
        ({"frame_lengths": [4, 0]}, DataError, r"frame_lengths\[1\]: got 0, expected 1 to 4"),
        ({"frame_lengths": [5, 1]}, DataError, r"frame_lengths\[0\]: got 5"),
        ({"frame_lengths": [4]}, ConfigError, "frame_lengths: got 1 lengths, expected 2"),
        ({"target_lengths": [2, 3]}, DataError, r"target_lengths\[1\]: got 3, expected 0 to 2"),
        ({"target_lengths": [-1, 2]}, DataError, r"target_lengths\[0\]: got -1"),
        ({"target_lengths": torch.zeros(2, device="meta")}, ConfigError, "target_lengths: got a tensor on meta"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given_ = {
        "logits_BTUV": torch.zeros(2, 4, 3, 5),
        "targets_BU": torch.tensor([[1, 2], [3, 4]]),
        "frame_lengths": [4, 3],
        "target_lengths": [2, 2],
    }
    assert transducer_loss_sum(**given_).isfinite()
    with pytest.raises(error, match=message):
        transducer_loss_sum(**given_ | change)


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors made within that are alive at once, and the largest."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.alive = self.peak = self.largest = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak, self.largest = max(self.peak, self.alive), max(self.largest, size)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_holds_one_tensor_of_the_size_of_the_scores(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transducer, "_PIECE_CPU", 2**12)
    logits_BTUV = torch.randn(4, 32, 9, 512).to(dtype).requires_grad_()
    targets_BU = torch.randint(1, 512, (4, 8))
    size = logits_BTUV.numel() * logits_BTUV.element_size()
    with PeakBytes(logits_BTUV) as used:
        loss = transducer_loss_sum(logits_BTUV, targets_BU, [32, 30, 20, 9], [8, 8, 5, 0])
        assert used.peak < size / 4
        torch.autograd.grad(loss, logits_BTUV)
    assert size <= used.peak < 1.25 * size
    assert used.largest == size


def joint_case(num_frames: int, num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return Joint(6, num_classes), {
        "encoder_BTD": torch.randn(3, num_frames, 6),
        "predictor_BUD": torch.randn(3, 5, 6),
        "targets_BU": torch.randint(1, num_classes, (3, 4)),
        "frame_lengths": [num_frames, num_frames // 2, 1],
        "target_lengths": [4, 2, 0],
    }


def direct_loss(encoder_BTD: Tensor, predictor_BUD: Tensor, joint: nn.Module, *given: Any) -> Tensor:
    return transducer_loss_sum(joint(encoder_BTD, predictor_BUD), *given)


def joint_gradients(of: Callable[..., Tensor], joint: nn.Module, case: dict[str, Any], **options: Any) -> list[Tensor]:
    encoder_BTD, predictor_BUD, *rest = case.values()
    inputs = [encoder_BTD.clone().requires_grad_(), predictor_BUD.clone().requires_grad_(), *joint.parameters()]
    loss = of(inputs[0], inputs[1], joint, *rest, **options)
    return [loss.detach(), *torch.autograd.grad(2 * loss, inputs)]


@pytest.mark.parametrize("chunk_frames", [1, 3, 8, 100])
def test_from_the_joint_in_chunks(chunk_frames: int) -> None:
    joint, case = joint_case(num_frames=8, num_classes=7)
    expected = joint_gradients(direct_loss, joint, case)
    got = joint_gradients(transducer_loss_from_joint, joint, case, chunk_frames=chunk_frames)
    assert [difference(a, b) <= 1e-6 for a, b in zip(got, expected, strict=True)] == [True] * 5
    with torch.no_grad():
        encoder_BTD, predictor_BUD, *rest = case.values()
        assert torch.equal(transducer_loss_from_joint(encoder_BTD, predictor_BUD, joint, *rest), expected[0])


def test_from_the_joint_draws_the_same_dropout_again() -> None:
    joint, case = joint_case(num_frames=8, num_classes=7)
    joint.double()
    case |= {name: case[name].double() for name in ("encoder_BTD", "predictor_BUD")}

    def loss(bias_V: Tensor) -> Tensor:
        def dropped(encoder_BTD: Tensor, predictor_BUD: Tensor) -> Tensor:
            return nn.functional.dropout(joint(encoder_BTD, predictor_BUD) + bias_V, 0.5)

        torch.manual_seed(5)
        encoder_BTD, predictor_BUD, *rest = case.values()
        return transducer_loss_from_joint(encoder_BTD, predictor_BUD, dropped, *rest, chunk_frames=3)

    assert torch.autograd.gradcheck(loss, torch.randn(7, dtype=torch.float64, requires_grad=True))


def test_from_the_joint_padding_reaches_no_weight() -> None:
    joint, case = joint_case(num_frames=8, num_classes=7)
    expected = joint_gradients(transducer_loss_from_joint, joint, case, chunk_frames=3)
    for row, (num_frames, num_labels) in enumerate(zip(case["frame_lengths"], case["target_lengths"], strict=True)):
        case["encoder_BTD"][row, num_frames:] = torch.nan
        case["predictor_BUD"][row, num_labels + 1 :] = torch.nan
    got = joint_gradients(transducer_loss_from_joint, joint, case, chunk_frames=3)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_from_the_joint_memory_is_that_of_a_chunk() -> None:
    joint, case = joint_case(num_frames=64, num_classes=512)
    peaks: dict[int, int] = {}
    for chunk_frames in (4, 64):
        with PeakBytes() as used:
            joint_gradients(transducer_loss_from_joint, joint, case, chunk_frames=chunk_frames)
        chunk_bytes = 4 * 3 * chunk_frames * 5 * 512
        peaks[chunk_frames] = used.peak
        assert used.largest <= chunk_bytes
        assert 2 * chunk_bytes <= used.peak  # the scores and their gradient
    assert peaks[4] < peaks[64] / 8


def test_from_the_joint_keeps_two_scores_a_cell_for_the_backward_pass() -> None:
    joint, case = joint_case(num_frames=64, num_classes=512)
    encoder_BTD, predictor_BUD, *rest = case.values()
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        transducer_loss_from_joint(encoder_BTD.requires_grad_(), predictor_BUD, joint, *rest, chunk_frames=4)
    assert max(sizes) <= 2 * 3 * 64 * 5


def test_from_the_joint_refuses_what_does_not_fit() -> None:
    joint, case = joint_case(num_frames=8, num_classes=7)
    encoder_BTD, predictor_BUD, *rest = case.values()
    with pytest.raises(ConfigError, match="encoder_BTD, predictor_BUD: got shapes"):
        transducer_loss_from_joint(encoder_BTD, predictor_BUD[:2], joint, *rest)
    with pytest.raises(ConfigError, match="chunk_frames 0"):
        transducer_loss_from_joint(encoder_BTD, predictor_BUD, joint, *rest, chunk_frames=0)
    with pytest.raises(ConfigError, match=r"joint: got shape \(3, 8, 5, 6\), expected \(3, 8, 4, 'classes'\)"):
        transducer_loss_from_joint(
            encoder_BTD, predictor_BUD[:, :4], lambda *_: torch.zeros(3, 8, 5, 6), rest[0][:, :3], rest[1], [3, 2, 0]
        )
    with pytest.raises(DataError, match=r"targets_BU\[0, 0\]: got 9, expected a label from 1 to 6"):
        transducer_loss_from_joint(encoder_BTD, predictor_BUD, joint, rest[0].clone().fill_(9), *rest[1:])


def model(**options: Any) -> Transducer:
    torch.manual_seed(0)
    return Transducer(LSTM(6, 5, bidirectional=True), MinGRU(4, 5), Joint(8, 6), **options).double()


@pytest.mark.parametrize("time_reduction", [1, 2, 3])
@pytest.mark.parametrize("chunk_frames", [None, 2])
def test_the_model_reads_no_padding(time_reduction: int, chunk_frames: int | None) -> None:
    network = model(time_reduction=time_reduction)
    x_BTD, targets_BU = torch.randn(3, 7, 6 // time_reduction).double(), torch.randint(1, 6, (3, 4))
    frames, labels = [7, 4, 1], [4, 0, 2]
    alone = sum(
        network.loss_sum(x_BTD[row : row + 1, :num_frames], [num_frames], targets_BU[row : row + 1, :n], [n]).item()
        for row, (num_frames, n) in enumerate(zip(frames, labels, strict=True))
    )
    for row, (num_frames, num_labels) in enumerate(zip(frames, labels, strict=True)):
        x_BTD[row, num_frames:] = torch.nan
        targets_BU[row, num_labels:] = -5
    loss = network.loss_sum(x_BTD, frames, targets_BU, labels, chunk_frames=chunk_frames)
    loss.backward()
    assert loss.item() == pytest.approx(alone, rel=1e-12)
    grads = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert grads.keys() == dict(network.named_parameters()).keys()
    assert all(grad.isfinite().all() and grad.any() for grad in grads.values())
    assert not grads["embedding.weight"][0].any()  # the start stays a vector of zeros


def test_the_model_gives_scores_of_every_cell() -> None:
    network = model(time_reduction=2)
    x_BTD, targets_BU = torch.randn(2, 5, 3).double(), torch.tensor([[1, 2], [3, 0]])
    logits_BTUV = network(x_BTD, [5, 3], targets_BU, [2, 1])
    assert logits_BTUV.shape == (2, 3, 3, 6)
    assert network.encoded_lengths([5, 3]) == [3, 2]
    loss = transducer_loss_sum(logits_BTUV, targets_BU, [3, 2], [2, 1])
    assert torch.equal(loss, network.loss_sum(x_BTD, [5, 3], targets_BU, [2, 1]))


def test_the_model_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="predictor: got a bidirectional stack"):
        Transducer(LSTM(6, 5), LSTM(4, 5, bidirectional=True), Joint(8, 6))
    with pytest.raises(ConfigError, match="time_reduction: got 4"):
        model(time_reduction=4)
    with pytest.raises(ConfigError, match="batch_first"):
        Transducer(LSTM(6, 5, batch_first=False), LSTM(4, 5), Joint(8, 6))
    with pytest.raises(ConfigError, match="num_classes: got 1"):
        Joint(8, 1)
    with pytest.raises(DataError, match=r"targets_BU\[0, 1\]: got 6, expected a label from 1 to 5"):
        model().loss_sum(torch.randn(1, 3, 6).double(), [3], torch.tensor([[1, 6]]), [2])

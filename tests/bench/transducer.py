"""The transducer's loss beside a bare log_softmax of the same scores, and what a lattice in fp32 costs.

Forward and backward, process CPU time on one thread, medians; the candidates of a row take turns in one process, so
that only ratios matter.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from recording import record
from torch import Tensor

from treadle.nn import transducer
from treadle.nn.transducer import transducer_loss_from_joint, transducer_loss_sum
from treadle.nn.transducer_model import Joint

B, T, U, JOINT = 8, 200, 40, 256
COMMAND = "python tests/bench/transducer.py"


def medians_s(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """CPU seconds of each run; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):  # the first two turns warm up
        for name, run in runs.items():
            started = time.process_time()
            run()
            if turn > 1:
                times[name].append(time.process_time() - started)
    return {name: statistics.median(found) for name, found in times.items()}


def lengths(longest: int, step: int) -> list[int]:
    return [longest - step * (row % 4) for row in range(B)]


def speed() -> None:
    headers = [
        "V",
        "log_softmax, forward + backward",
        "loss / log_softmax",
        "with rows of unlike length",
        "forward alone",
        "joint and loss, in chunks of 32 frames / whole",
    ]
    rows = [(num_classes, *beside_log_softmax(num_classes), from_joint(num_classes)) for num_classes in (64, 128, 512)]
    title = f"Transducer loss, {B} rows x {T} frames x {U} labels x V classes, fp32, one thread"
    record("transducer", title, COMMAND, headers, rows)


def beside_log_softmax(num_classes: int) -> list[str]:
    logits_BTUV, grad_BTUV = torch.randn(2, B, T, U + 1, num_classes)
    targets_BU = torch.randint(1, num_classes, (B, U))
    ragged, full = (lengths(T, T // 8), lengths(U, U // 8)), ([T] * B, [U] * B)

    def loss(frames: list[int], labels: list[int], *, needs_grad: bool = True) -> Tensor:
        return transducer_loss_sum(logits_BTUV.detach().requires_grad_(needs_grad), targets_BU, frames, labels)

    runs = {
        "log_softmax": lambda: torch.log_softmax(logits_BTUV.detach().requires_grad_(), -1).backward(grad_BTUV),
        "full": lambda: loss(*full).backward(),
        "ragged": lambda: loss(*ragged).backward(),
        "forward": lambda: loss(*full, needs_grad=False),
    }
    found = medians_s(runs, 11)
    base = found.pop("log_softmax")
    return [f"{1e3 * base:.0f} ms", *(f"{seconds / base:.2f}" for seconds in found.values())]


def from_joint(num_classes: int) -> str:
    """How much longer the joint, the loss and their backward pass take when the joint is computed again by chunks."""
    joint = Joint(JOINT, num_classes)
    encoder_BTJ, predictor_BUJ = torch.randn(B, T, JOINT), torch.randn(B, U + 1, JOINT)
    given = (torch.randint(1, num_classes, (B, U)), [T] * B, [U] * B)

    def whole() -> None:
        inputs = encoder_BTJ.detach().requires_grad_(), predictor_BUJ.detach().requires_grad_()
        transducer_loss_sum(joint(*inputs), *given).backward()

    def chunks() -> None:
        inputs = encoder_BTJ.detach().requires_grad_(), predictor_BUJ.detach().requires_grad_()
        transducer_loss_from_joint(*inputs, joint, *given, chunk_frames=32).backward()

    found = medians_s({"whole": whole, "chunks": chunks}, 3)
    return f"{found['chunks'] / found['whole']:.2f}"


@contextlib.contextmanager
def fp32_lattice() -> Iterator[None]:
    """The same sums in fp32, as most implementations have them."""
    skewed, closed = transducer._skewed, transducer._CLOSED
    transducer._CLOSED = -1e30
    transducer._skewed = lambda scores, grid: skewed(scores, grid).float()
    try:
        yield
    finally:
        transducer._skewed, transducer._CLOSED = skewed, closed


def loss_and_grad(logits_BTUV: Tensor, targets_BU: Tensor) -> tuple[float, Tensor]:
    logits_BTUV = logits_BTUV.detach().requires_grad_()
    loss = transducer_loss_sum(logits_BTUV, targets_BU, [logits_BTUV.shape[1]] * 2, [targets_BU.shape[1]] * 2)
    (grad,) = torch.autograd.grad(loss, logits_BTUV)
    return loss.item(), grad.double()


def accuracy() -> None:
    rows = []
    for num_frames, num_labels in ((60, 15), (240, 40), (640, 80)):
        logits_BTUV, targets_BU = torch.randn(2, num_frames, num_labels + 1, 64), torch.randint(1, 64, (2, num_labels))
        loss, expected = loss_and_grad(logits_BTUV.double(), targets_BU)

        def error(grad: Tensor, expected: Tensor = expected) -> str:
            return f"{((grad - expected).norm() / expected.norm()).item():.1e}"

        with fp32_lattice():
            narrow = error(loss_and_grad(logits_BTUV, targets_BU)[1])
        rows.append((f"{loss:.0f}", error(loss_and_grad(logits_BTUV, targets_BU)[1]), narrow))
    headers = ["loss", "lattice in float64 (treadle)", "lattice in fp32"]
    title = "Relative error of the transducer loss's gradient against float64, fp32 scores"
    record("transducer_accuracy", title, COMMAND, headers, rows)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    speed()
    accuracy()


if __name__ == "__main__":
    main()

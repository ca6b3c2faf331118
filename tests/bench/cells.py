"""The recurrent layers beside torch's own and the published minGRU's code: time, memory, accuracy, ragged rows.

Forward and backward with the gradients of weights and inputs, process CPU time on one thread, medians; the candidates
of a table take turns in one process, so that only ratios matter.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import torch
from minGRU_pytorch.minGRU import minGRU
from minGRU_pytorch.minLSTM import minLSTM
from recording import record
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from treadle.nn import GRU, LSTM, RNN, MinGRU, MinLSTM
from treadle.nn.stack import RecurrentStack

B, D, T = 32, 256, 512
Runs = dict[str, Callable[[], None]]


def medians_s(runs: Runs, repeats: int) -> dict[str, float]:
    """CPU seconds of each run; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):  # the first turn warms up
        for name, run in runs.items():
            started = time.process_time()
            run()
            if turn:
                times[name].append(time.process_time() - started)
    return {name: statistics.median(found) for name, found in times.items()}


def stepping(module: nn.Module, x: Tensor, *, bf16: bool = False, **arguments: object) -> Callable[[], None]:
    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            y = module(x, **arguments)
        y = y[0] if isinstance(y, tuple) else y
        y.float().sum().backward()

    return run


def speed() -> None:
    x = torch.randn(B, T, D, requires_grad=True)
    modules = {
        "treadle MinGRU": MinGRU(D, D),
        "treadle MinLSTM": MinLSTM(D, D),
        "projection of MinGRU alone": nn.Linear(D, 2 * D),
        "projection of MinLSTM alone": nn.Linear(D, 3 * D),
        "torch.nn.RNN": nn.RNN(D, D, batch_first=True),
        "torch.nn.LSTM": nn.LSTM(D, D, batch_first=True),
        "torch.nn.GRU": nn.GRU(D, D, batch_first=True),
        "minGRU-pytorch 0.2.1 minGRU": minGRU(D),
        "minGRU-pytorch 0.2.1 minLSTM": minLSTM(D),
    }
    fp32 = medians_s({name: stepping(module, x) for name, module in modules.items()}, 5)
    ours = {name: module for name, module in modules.items() if name.startswith(("treadle", "minGRU"))}
    bf16 = medians_s({name: stepping(module, x, bf16=True) for name, module in ours.items()}, 1)
    rows = []
    for name, seconds in fp32.items():
        low = bf16.get(name)
        rows.append(
            (
                name,
                f"{1e3 * seconds:.0f} ms",
                f"{seconds / fp32['treadle MinGRU']:.2f}",
                f"{seconds / fp32['treadle MinLSTM']:.2f}",
                "" if low is None else f"{low / bf16['treadle MinGRU']:.1f}",
                "" if low is None else f"{low / bf16['treadle MinLSTM']:.1f}",
            )
        )
    headers = ["layer", "fp32 CPU time", "/ MinGRU", "/ MinLSTM", "bf16 autocast / MinGRU", "bf16 / MinLSTM"]
    title = f"Forward + backward of one layer, {B} rows x {T} frames x {D} features, {D} hidden, one thread"
    record("cells", title, "make bench-cells", headers, rows)


def saved_floats(layer: nn.Module, x: Tensor) -> float:
    """Numbers kept for the backward pass per frame and channel, each memory counted once; input and weights not."""
    given = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            seen[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        layer(x)
    return sum(seen.values()) / (B * T * D)


def memory_and_accuracy() -> None:
    x = torch.randn(B, T, D, requires_grad=True)
    layers = {
        "treadle MinGRU": MinGRU(D, D),
        "treadle MinLSTM": MinLSTM(D, D),
        "torch.nn.LSTM": nn.LSTM(D, D, batch_first=True),
        "torch.nn.GRU": nn.GRU(D, D, batch_first=True),
        "minGRU-pytorch 0.2.1 minGRU": minGRU(D),
    }
    errors = {"treadle MinGRU": long_errors(MinGRU), "treadle MinLSTM": long_errors(MinLSTM)}
    errors["minGRU-pytorch 0.2.1 minGRU"] = peer_errors()
    rows = []
    for name, layer in layers.items():
        fp32, bf16 = (f"{error:.1e}" for error in errors[name]) if name in errors else ("", "")
        rows.append((name, f"{saved_floats(layer, x):.2f}", fp32, bf16))
    headers = ["layer", "floats saved per frame-channel", "rel. error at T = 32,768, fp32", "the same, bf16 autocast"]
    record(
        "memory",
        "Memory for the backward pass, and accuracy on long rows against float64",
        "make bench-cells",
        headers,
        rows,
    )


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def remembering(layer: RecurrentStack) -> RecurrentStack:
    """Gates that keep 98 % of the state a frame at first: what is hard on accuracy, and what long rows need."""
    bias = layer.get_parameter("layers.0.ahead.project.bias").data
    if len(bias) == 2 * layer.hidden_size:
        bias[: layer.hidden_size] -= 4.0
    else:
        bias[layer.hidden_size : 2 * layer.hidden_size] -= 4.0
    return layer


@torch.no_grad()
def long_errors(kind: type[RecurrentStack]) -> tuple[float, float]:
    torch.manual_seed(0)
    layer, x = remembering(kind(16, 16)), torch.randn(1, 32_768, 16)
    exact = kind(16, 16).double()
    exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    wanted = exact(x.double())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)[0]
    return relative(layer(x)[0], wanted), relative(low, wanted)


@torch.no_grad()
def peer_errors() -> tuple[float, float]:
    torch.manual_seed(0)
    layer, x = minGRU(16), torch.randn(1, 32_768, 16)
    x[..., 0] = 1.0
    ours = MinGRU(16, 16, bias=False).double()
    with torch.no_grad():
        layer.to_hidden_and_gate.weight[16:, 0] -= 4.0
    state, gate = layer.to_hidden_and_gate.weight.double().chunk(2)
    ours.load_state_dict({"layers.0.ahead.project.weight": torch.cat((gate, state))})
    wanted = ours(x.double())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
    return relative(layer(x), wanted), relative(low, wanted)


def packed_by_fill() -> None:
    rows = []
    for kind in (MinGRU, MinLSTM, GRU, LSTM):
        layer = kind(D, D)
        for shortest in (16, 128, 384):
            torch.manual_seed(1)
            lengths = torch.randint(shortest, T + 1, (B,)) if shortest != 16 else (T * torch.rand(B) ** 2.5).long() + 1
            lengths[0] = T
            fill = lengths.sum().item() / (B * T)
            x_BTD = torch.randn(B, T, D, requires_grad=True)
            x_ND = torch.cat([x[:n] for x, n in zip(x_BTD.detach(), lengths, strict=True)]).requires_grad_()
            offsets = [0, *lengths.cumsum(0).tolist()]
            runs = {
                "padded": stepping(layer, x_BTD, final_state=False),
                "lengths": stepping(layer, x_BTD, lengths=lengths, final_state=False),
                "packed": stepping(layer, x_ND, offsets=offsets, final_state=False),
            }
            found = medians_s(runs, 3)
            shares = (f"{found[name] / found['padded']:.2f}" for name in ("lengths", "packed"))
            rows.append((kind.__name__, f"{fill:.2f}", *shares, f"{fill + 0.12:.2f}"))
    headers = ["layer", "fill", "with lengths / padded", "packed / padded", "fill + 0.12"]
    title = f"Cost of ragged rows beside all {B} x {T} slots, {D} hidden, one thread"
    record("ragged", title, "make bench-cells", headers, rows)


def beside_packed_sequences() -> None:
    num_rows, steps = 32, 500
    rows = []
    for ours, theirs in ((RNN, nn.RNN), (LSTM, nn.LSTM), (GRU, nn.GRU)):
        for both in (False, True):
            for hidden in (128, 256):
                torch.manual_seed(1)
                lengths = torch.randint(430, steps + 1, (num_rows,))
                lengths[0] = steps
                x = torch.randn(num_rows, steps, hidden, requires_grad=True)
                layer = ours(hidden, hidden, bidirectional=both)
                peer = theirs(hidden, hidden, batch_first=True, bidirectional=both)

                def packed(peer: nn.Module = peer, x: Tensor = x, lengths: Tensor = lengths) -> None:
                    y, _ = peer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
                    y.data.sum().backward()

                runs = {"ours": stepping(layer, x, lengths=lengths, final_state=False), "packed": packed}
                found = medians_s(runs, 1)
                fill = lengths.sum().item() / (num_rows * steps)
                ratio = found["packed"] / found["ours"]
                name = f"{'bidirectional ' if both else ''}{ours.__name__}"
                rows.append((name, hidden, f"{fill:.2f}", f"{1e3 * found['ours']:.0f} ms", f"{ratio:.1f}"))
    headers = ["layer", "hidden", "fill", "treadle, lengths given", "pack_padded_sequence / treadle"]
    title = f"Rows of unlike length in torch's kernels, {num_rows} rows of up to {steps} frames, one thread"
    record("packed_sequences", title, "make bench-cells", headers, rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    speed()
    memory_and_accuracy()
    packed_by_fill()
    beside_packed_sequences()

"""The min cells on a CUDA device: the scan beside the device's own copy rate, the layers beside cuDNN's.

Times are medians of wall time between device events, each of many runs, after a warm-up; candidates take turns. A
layer step is forward and backward with the gradients of weights and inputs. bf16 is autocast; fp32 allows TF32 for
all alike. The last table is against a loop that runs one frame at a time, which is what the often quoted 175x and
235x of arXiv 2410.01201 are against: not cuDNN.

Shape letters: B rows, T time steps, D features and hidden units, N frames of all rows laid end to end.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

D = 256
LENGTHS_T = (128, 512, 4096)
BATCHES_B = (16, 64)
FP32, BF16 = torch.float32, torch.bfloat16
COMMAND = "python tests/bench/gpu_cells.py"
Run = Callable[[], object]


def machine() -> str:
    """The device, its driver, the software and the day."""
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        driver = answer[torch.cuda.current_device()].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    day = dt.datetime.now(dt.UTC).date()
    return f"{torch.cuda.get_device_name()}, driver {driver}, {versions}, triton {triton.__version__}, {day}"


def medians_ms(runs: Sequence[Run], *, repeats: int = 20) -> list[float]:
    """Milliseconds of each run; they take turns."""
    for run in runs:
        for _ in range(3):
            run()
    marks: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
    for _ in range(repeats):
        for found, run in zip(marks, runs, strict=True):
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record()
            run()
            ended.record()
            found.append((started, ended))
    torch.cuda.synchronize()
    return [statistics.median(a.elapsed_time(b) for a, b in found) for found in marks]


def keep(name: str, title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table, and records it where the packages that recording looks up are installed."""
    for row in (headers, *rows):
        print(" | ".join(str(cell) for cell in row), flush=True)
    print(flush=True)
    from recording import record

    try:
        record(name, f"{title} ({machine()})", COMMAND, headers, rows)
    except ImportError as error:
        print(f"not recorded: {error}", file=sys.stderr)


def copy_rate() -> float:
    """Bytes read and written per second by a device-to-device copy of 1 GiB."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    (ms,) = medians_ms([lambda: target.copy_(source)])
    return 2 * source.nbytes / (ms / 1e3)


def drawn_lengths(num_rows: int) -> list[int]:
    """Log-normal, median 200, up to 2,000."""
    generator = torch.Generator().manual_seed(0)
    return torch.exp(5.3 + 0.9 * torch.randn(num_rows, generator=generator)).clamp(1, 2000).int().tolist()


def scan_row(lengths: list[int], dtype: torch.dtype, form: int, rate: float) -> list[str]:
    """Times of the four ways, each with its share of the copy rate, and which way `choose_cut` goes."""
    from treadle.nn.triton_scan import Cut, backward, choose_cut, forward

    num, width = sum(lengths), D * (2 if form == 0 else 3)
    pre_NG = torch.randn(num, width, device="cuda", dtype=dtype)
    h0_SH = torch.zeros(len(lengths), D, device="cuda")
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda")
    given = (h0_SH, offsets, None, None, None, form, 0, False)
    h_NH, grad_NH = forward(pre_NG, *given)[0], torch.randn(num, D, device="cuda", dtype=dtype)
    rows, chunks = Cut(chunk=0), Cut(chunk=128)
    runs: list[Run] = [
        lambda: forward(pre_NG, *given, cut=rows),
        lambda: forward(pre_NG, *given, cut=chunks),
        lambda: backward(grad_NH, h0_SH, pre_NG, h_NH, *given, cut=rows),
        lambda: backward(grad_NH, h0_SH, pre_NG, h_NH, *given, cut=chunks),
    ]
    least = num * (width + D) * pre_NG.element_size()  # read the gates, write h; backward twice that
    shares = [f"{ms:.3f} ms, {least * (1 + i // 2) / ms * 1e3 / rate:.0%}" for i, ms in enumerate(medians_ms(runs))]
    count = torch.cuda.get_device_properties(pre_NG.device).multi_processor_count
    chosen = choose_cut(len(lengths), num, D, max_length=max(lengths), multiprocessors=count)
    return [*shares, "chunks" if chosen.chunk else "rows"]


def scan_table() -> None:
    """The scan, by rows and by chunks, as a share of the copy rate."""
    rate = copy_rate()
    print(f"{machine()}: copies {rate / 1e9:.0f} GB/s, read and written", flush=True)
    ragged = drawn_lengths(256)
    shapes = {f"{count} x {steps}": [steps] * count for count, steps in ((16, 4096), (128, 512), (512, 512))}
    shapes[f"256 ragged, {sum(ragged)} frames"] = ragged
    rows = []
    for (name, lengths), dtype, form in itertools.product(shapes.items(), (BF16, FP32), (0, 1)):
        place = (name, "minLSTM" if form else "minGRU", str(dtype).removeprefix("torch."))
        rows.append((*place, *scan_row(lengths, dtype, form, rate)))
    ways = ["forward, rows", "forward, chunks", "backward, rows", "backward, chunks"]
    title = f"Scan of {D} channels: time, and least bytes over time as a share of a copy's {rate / 1e9:.0f} GB/s"
    keep("gpu_scan", title, ["rows x frames", "gates", "format", *ways, "chosen"], rows)


def stepping(layer: nn.Module, x: Tensor, dtype: torch.dtype, **arguments: object) -> Run:
    """A forward and backward pass of `layer`."""
    x = x.detach().requires_grad_()
    parameters = [x, *layer.parameters()]

    def run() -> None:
        with torch.autocast("cuda", dtype=BF16) if dtype == BF16 else contextlib.nullcontext():
            y = layer(x, **arguments)[0]
        torch.autograd.grad(y, parameters, torch.ones_like(y), allow_unused=True)

    return run


def layers() -> dict[str, nn.Module]:
    from treadle.nn import GRU, LSTM, MinGRU, MinLSTM

    candidates = {
        "cuDNN, torch.nn.GRU": nn.GRU(D, D, batch_first=True),
        "cuDNN, torch.nn.LSTM": nn.LSTM(D, D, batch_first=True),
        "treadle GRU": GRU(D, D, 1),
        "treadle LSTM": LSTM(D, D, 1),
        "treadle MinGRU": MinGRU(D, D, 1),
        "treadle MinLSTM": MinLSTM(D, D, 1),
    }
    return {name: layer.cuda() for name, layer in candidates.items()}


def layer_table() -> None:
    """A step of every layer, rows of one length."""
    candidates = layers()
    rows = []
    for dtype, num_rows, steps in itertools.product((BF16, FP32), BATCHES_B, LENGTHS_T):
        x_BTD = torch.randn(num_rows, steps, D, device="cuda")
        runs = [stepping(layer, x_BTD, dtype) for layer in candidates.values()]
        times = dict(zip(candidates, medians_ms(runs, repeats=10), strict=True))
        gru, lstm = (times[f"cuDNN, torch.nn.{name}"] for name in ("GRU", "LSTM"))
        for name, ms in times.items():
            place = (str(dtype).removeprefix("torch."), num_rows, steps)
            rows.append((*place, name, f"{ms:.2f} ms", f"{gru / ms:.2f}", f"{lstm / ms:.2f}"))
    headers = ["format", "rows", "frames", "layer", "step", "times faster than cuDNN GRU", "than cuDNN LSTM"]
    keep("gpu_layers", f"Forward + backward of one layer, {D} features, {D} hidden", headers, rows)


def ragged_table() -> None:
    """Rows of unlike length, packed beside padded."""
    from treadle.nn.rows import Rows

    candidates = layers()
    lengths = drawn_lengths(64)
    offsets = Rows.of_lengths(lengths, device=torch.device("cuda"))
    packed_ND = torch.randn(sum(lengths), D, device="cuda")
    padded_BTD = torch.randn(len(lengths), max(lengths), D, device="cuda")
    fill = sum(lengths) / (len(lengths) * max(lengths))
    rows = []
    for dtype, name in itertools.product((BF16, FP32), ("treadle MinGRU", "treadle MinLSTM")):
        layer = candidates[name]
        runs = [
            stepping(candidates["cuDNN, torch.nn.GRU"], padded_BTD, dtype),
            stepping(layer, padded_BTD, dtype),
            stepping(layer, packed_ND, dtype, offsets=offsets),
        ]
        gru, padded, packed = medians_ms(runs, repeats=10)
        times = (f"{gru:.2f} ms", f"{padded:.2f} ms", f"{packed:.2f} ms")
        place = (str(dtype).removeprefix("torch."), name)
        rows.append((*place, *times, f"{padded / packed:.2f}", f"{0.9 / fill:.2f}", f"{gru / packed:.2f}"))
    headers = ["format", "layer", "cuDNN GRU padded", "padded", "packed", "padded / packed", "0.9 / fill"]
    title = f"Forward + backward of {len(lengths)} rows of 1 to {max(lengths)} frames, fill {fill:.2f}"
    keep("gpu_ragged", title, [*headers, "cuDNN GRU padded / packed"], rows)


class FrameLoop(nn.Module):
    """A GRU or LSTM as a Python loop over the frames, one cell call each."""

    def __init__(self, cell: nn.GRUCell | nn.LSTMCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, None]:
        state, steps = None, []
        for x_BD in x_BTD.unbind(1):
            state = self.cell(x_BD, state)
            steps.append(state if isinstance(state, Tensor) else state[0])
        return torch.stack(steps, dim=1), None


def loop_table() -> None:
    """What the min cells gain on a loop over the frames, which nobody need run."""
    candidates = layers()
    pairs = {"MinGRU": FrameLoop(nn.GRUCell(D, D)).cuda(), "MinLSTM": FrameLoop(nn.LSTMCell(D, D)).cuda()}
    rows = []
    for steps, (name, loop) in itertools.product(LENGTHS_T[:2], pairs.items()):
        x_BTD = torch.randn(64, steps, D, device="cuda")
        classic = candidates[f"cuDNN, torch.nn.{name.removeprefix('Min')}"]
        runs = [stepping(layer, x_BTD, FP32) for layer in (loop, classic, candidates[f"treadle {name}"])]
        slow, cudnn, ours = medians_ms(runs, repeats=5)
        times = (f"{slow:.1f} ms", f"{cudnn:.2f} ms", f"{ours:.2f} ms")
        rows.append((steps, name, *times, f"{slow / ours:.0f}", f"{cudnn / ours:.2f}"))
    headers = ["frames", "layer", "loop over frames", "cuDNN", "treadle", "loop / treadle", "cuDNN / treadle"]
    title = (
        "Beside a Python loop that calls the classic cell once a frame, 64 rows, fp32. The 175x (minGRU) and 235x"
        " (minLSTM) of arXiv 2410.01201 are against such a loop; the last column is against what one would run"
    )
    keep("gpu_loop", title, headers, rows)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("gpu_cells.py: no CUDA device here; nothing measured")
    torch.set_float32_matmul_precision("high")  # as cuDNN's recurrent kernels do by default
    for table in (scan_table, layer_table, ragged_table, loop_table):
        table()


if __name__ == "__main__":
    main()

"""The gated scan on a CUDA device: the same invariants as on the CPU, and what only a device can show.

Shape letters: N frames of all rows laid end to end, S rows, H hidden, G = H * gates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from treadle.nn import MinGRU, loop, scan, triton_scan
from treadle.nn.gates import Candidate, GateForm, ScanOptions
from treadle.nn.rows import Rows
from treadle.nn.triton_scan import Cut, available, choose_cut

DEVICE = torch.device("cuda")
CUTS = {"rows": 0, "chunks": 128}
LENGTHS = (1, 7, 8, 9, 127, 128, 129, 400, 64, 1)  # tiles have 8 frames, chunks 128
# What a result may be off by, beside the larger of 1 and its own size: an approximate exponential in fp32;
# one spacing of the narrow formats, two for gradients, which start from rounded states.
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}

every_cut = pytest.mark.parametrize("chunk", CUTS.values(), ids=CUTS)


def cut_of(hidden: int, chunk: int, dtype: torch.dtype) -> Cut:
    chosen = choose_cut(1, 1, hidden, max_length=1, multiprocessors=1, wide=dtype == torch.float64)
    return Cut(chunk=chunk, frames=chosen.frames, channels=chosen.channels)


def drawn(lengths: tuple[int, ...], hidden: int, dtype: torch.dtype, form: int, options: str = "") -> dict[str, Any]:
    """Inputs and gradients; those named in `options` beside them."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    num, rows = sum(lengths), len(lengths)

    def normal(*shape: int, dtype: torch.dtype = state) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=dtype)

    starts_N = torch.rand(num, generator=generator, device=DEVICE) < 0.02
    starts_N[0] = starts_N[-1] = True
    decay_NH = torch.rand(num, hidden, generator=generator, device=DEVICE).to(dtype)
    return {
        "pre": 2 * normal(num, hidden * (2 if form == 0 else 3), dtype=dtype),
        "h0": normal(rows, hidden),
        "offsets": torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE),
        "starts": starts_N if "starts" in options else None,
        "reset": normal(hidden) if "reset" in options else None,
        "decay": decay_NH if "decay" in options else None,
        "grad_h": normal(num, hidden, dtype=dtype),
        "grad_last": normal(rows, hidden),
    }


def run(tensors: dict[str, Any], codes: tuple[int, int, bool], chunk: int) -> dict[str, Tensor | None]:
    """What the kernels give, by name."""
    cut = cut_of(tensors["h0"].shape[1], chunk, tensors["pre"].dtype)
    given = [tensors[name] for name in ("h0", "offsets", "starts", "reset", "decay")]
    h_NH, last_SH = triton_scan.forward(tensors["pre"], *given, *codes, cut=cut)
    grads = triton_scan.backward(tensors["grad_h"], tensors["grad_last"], tensors["pre"], h_NH, *given, *codes, cut=cut)
    return {"h": h_NH, "last": last_SH} | dict(zip(("dpre", "dh0", "dreset", "ddecay"), grads, strict=True))


def expected(tensors: dict[str, Any], codes: tuple[int, int, bool]) -> dict[str, Tensor | None]:
    """The same by the loop of torch operations, in float64 on the CPU."""
    wide = {name: None if t is None else t.cpu() for name, t in tensors.items()}
    wide = {name: t.double() if t is not None and t.is_floating_point() else t for name, t in wide.items()}
    given = [wide[name] for name in ("h0", "offsets", "starts", "reset", "decay")]
    h_NH, last_SH = loop.forward(wide["pre"], *given, *codes)
    grads = loop.backward(wide["grad_h"], wide["grad_last"], wide["pre"], h_NH, *given, *codes)
    return {"h": h_NH, "last": last_SH} | dict(zip(("dpre", "dh0", "dreset", "ddecay"), grads, strict=True))


def assert_close(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    for name, wanted in want.items():
        value = got[name]
        if wanted is None:
            assert value is None, name
            continue
        assert value is not None, name
        error = ((value.cpu().double() - wanted).abs() / wanted.abs().clamp(min=1.0)).max().item()
        narrow = value.dtype in (torch.bfloat16, torch.float16) and name != "h"
        assert error <= CLOSE[value.dtype] * (2 if narrow else 1), (name, error)


def assert_same(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    for name, wanted in want.items():
        value = got[name]
        assert (value is None) == (wanted is None), name
        assert value is None or wanted is None or torch.equal(value, wanted), name


def test_the_kernels_are_what_runs_here() -> None:
    usable, detail = available()
    assert usable, detail
    assert torch.cuda.get_device_name() in detail
    assert scan._backend(torch.zeros(1, device=DEVICE)) is triton_scan


@every_cut
@pytest.mark.parametrize(
    ("dtype", "hidden", "codes", "options"),
    [
        (torch.float32, 256, (0, 0, False), ""),
        (torch.float32, 65, (1, 0, True), "starts reset decay"),
        (torch.float32, 64, (2, 2, False), "starts"),
        (torch.float32, 1, (0, 1, True), "decay"),
        (torch.bfloat16, 128, (0, 0, False), "starts reset"),
        (torch.bfloat16, 63, (1, 1, True), "starts reset decay"),
        (torch.bfloat16, 192, (2, 0, False), "decay"),
        (torch.float16, 64, (1, 0, False), ""),
        (torch.float64, 70, (1, 1, False), "starts reset decay"),
        (torch.float64, 8, (2, 0, True), ""),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_agrees_with_a_float64_loop(
    chunk: int, dtype: torch.dtype, hidden: int, codes: tuple[int, int, bool], options: str
) -> None:
    tensors = drawn(LENGTHS, hidden, dtype, codes[0], options)
    assert_close(run(tensors, codes, chunk), expected(tensors, codes))


@every_cut
@pytest.mark.parametrize("form", range(3))
def test_gates_at_their_extremes(chunk: int, form: int) -> None:
    points = [sign * size for size in (1e30, 300.0, 120.0, 89.0, 87.0, 0.0) for sign in (1.0, -1.0)]
    gates = torch.tensor(list(itertools.product(points, repeat=1 if form == 0 else 2)), device=DEVICE)
    hidden = len(gates)
    tensors = drawn((3, 200), hidden, torch.float32, form)
    tensors["pre"][:, :-hidden] = gates.T.flatten()
    tensors["pre"][:, -hidden:] = torch.tensor([2.0, -120.0, 89.0], device=DEVICE).repeat(68)[:203, None]
    assert_close(run(tensors, (form, 0, False), chunk), expected(tensors, (form, 0, False)))


@every_cut
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_not_a_number_stays_in_its_row_and_before_the_next_start(chunk: int, dtype: torch.dtype) -> None:
    codes, lengths, bad, start = (2, 0, False), (5, 300, 9), 5 + 128, 5 + 140
    whole = drawn(lengths, 64, dtype, codes[0], "starts reset")
    whole["starts"][:] = False
    whole["starts"][start] = True
    kept = run(whole, codes, chunk)
    for value in (math.nan, math.inf, -math.inf):
        broke = {**whole, "pre": whole["pre"].clone()}
        for gate in range(3):
            broke["pre"][bad, 64 * gate + gate] = value
        got, want = run(broke, codes, chunk), expected(broke, codes)
        assert torch.equal(got["h"][:start].isfinite().cpu(), want["h"][:start].isfinite())
        frames = [*range(bad), *range(start, sum(lengths))]
        assert torch.equal(got["h"][frames], kept["h"][frames])
        frames = [*range(5), *range(start, sum(lengths))]
        assert torch.equal(got["dpre"][frames], kept["dpre"][frames])
        assert torch.equal(got["dh0"][[0, 2]], kept["dh0"][[0, 2]])


@every_cut
def test_two_runs_give_the_same_bits(chunk: int) -> None:
    tensors = drawn(LENGTHS, 256, torch.bfloat16, 1, "starts reset decay")
    assert_same(run(tensors, (1, 0, False), chunk), run(tensors, (1, 0, False), chunk))


@every_cut
def test_pieces_of_a_row_agree_with_the_whole(chunk: int) -> None:
    tensors = drawn((400,), 64, torch.float32, 1)
    cut, codes = cut_of(64, chunk, torch.float32), (1, 0, False)
    arguments = (None, None, None, *codes)
    whole_NH, last_SH = triton_scan.forward(tensors["pre"], tensors["h0"], tensors["offsets"], *arguments, cut=cut)
    h_SH, parts = tensors["h0"], []
    for piece in tensors["pre"].split([1, 7, 64, 328]):
        offsets = torch.tensor([0, len(piece)], device=DEVICE)
        h_NH, h_SH = triton_scan.forward(piece, h_SH, offsets, *arguments, cut=cut)
        parts.append(h_NH)
    torch.testing.assert_close(torch.cat(parts), whole_NH, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(h_SH, last_SH, rtol=1e-6, atol=1e-6)


@every_cut
def test_a_captured_graph_replays_with_other_values_and_offsets(chunk: int) -> None:
    first, second = (100, 30, 300, 70), (1, 299, 50, 150)
    codes = (1, 0, False)
    static, other = (drawn(lengths, 128, torch.bfloat16, 1, "starts reset decay") for lengths in (first, second))
    other["pre"].mul_(-1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(static, codes, chunk)  # compiles outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run(static, codes, chunk)
    for name, tensor in other.items():
        static[name].copy_(tensor)
    graph.replay()
    assert_same(replayed, run(other, codes, chunk))


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:.*[Ss]ynchronization debug mode")
@every_cut
def test_the_kernels_never_wait_for_the_device(chunk: int, request: pytest.FixtureRequest) -> None:
    tensors = drawn(LENGTHS, 64, torch.float32, 1, "starts reset decay")
    run(tensors, (1, 0, False), chunk)
    torch.cuda.synchronize()
    request.getfixturevalue("_no_waiting")
    run(tensors, (1, 0, False), chunk)


@pytest.mark.filterwarnings("ignore:.*[Ss]ynchronization debug mode")
def test_a_training_step_never_waits_for_the_device(request: pytest.FixtureRequest) -> None:
    rows = Rows.of_lengths((40, 3, 200), device=DEVICE)
    layer = MinGRU(16, 64, 2).to(DEVICE)
    x_ND = torch.randn(243, 16, device=DEVICE, requires_grad=True)

    def step() -> None:
        y_NH, _ = layer(x_ND, offsets=rows)
        y_NH.square().sum().backward()

    step()
    torch.cuda.synchronize()
    request.getfixturevalue("_no_waiting")
    step()


def test_the_operator_passes_gradcheck() -> None:
    tensors = drawn((5, 1, 12), 3, torch.float64, 1, "starts reset decay")
    rows = Rows.of_lengths((5, 1, 12), device=DEVICE)
    options = ScanOptions(form=GateForm.minlstm, candidate=Candidate.tanh)
    leaves = [tensors[name].requires_grad_() for name in ("pre", "h0", "reset", "decay")]

    def op(pre: Tensor, h0: Tensor, reset: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        given = {"starts_N": tensors["starts"], "reset_H": reset, "decay_NH": decay}
        return scan.gated_scan(pre, h0, rows, options, **given)

    assert torch.autograd.gradcheck(op, leaves)


@every_cut
def test_more_values_than_32_bits_can_count(chunk: int) -> None:
    hidden, codes = 1024, (0, 0, False)
    lengths = (2**20 - 36, 100)  # the second row's frames lie on both sides of value 2^31
    assert sum(lengths) * 2 * hidden > 2**31
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free device memory")
    tensors = drawn(lengths, hidden, torch.bfloat16, 0)
    got = run(tensors, codes, chunk)
    alone = {name: None if t is None else t[-100:] for name, t in tensors.items() if name in ("pre", "grad_h")}
    ends = {name: tensors[name][1:] for name in ("h0", "grad_last")}
    offsets = {"offsets": torch.tensor([0, 100], device=DEVICE)}
    want = run({**tensors, **alone, **ends, **offsets}, codes, chunk)
    assert torch.equal(got["h"][-100:], want["h"])
    assert torch.equal(got["dpre"][-100:], want["dpre"])
    assert torch.equal(got["last"][1:], want["last"])
    assert torch.equal(got["dh0"][1:], want["dh0"])
    assert got["h"].isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_a_device_that_is_not_current() -> None:
    tensors = drawn((20, 3), 64, torch.float32, 0)
    moved = {name: None if t is None else t.to("cuda:1") for name, t in tensors.items()}
    got = run(moved, (0, 0, False), 0)
    assert got["h"].device == torch.device("cuda:1")
    assert_close(got, expected(tensors, (0, 0, False)))

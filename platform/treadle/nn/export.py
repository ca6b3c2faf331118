"""A trained stack or network for other run times: ONNX, and torch.export. Written only when it gives the same numbers.

Shape letters: B rows, T time steps, D features.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from treadle.errors import ConfigError, InternalError
from treadle.nn.compress import serialised_bytes
from treadle.nn.export_torch import TorchExport, export_torch
from treadle.nn.network import Network
from treadle.nn.onnx_graph import OPSET
from treadle.nn.onnx_network import build_model, state_shapes
from treadle.nn.stack import RecurrentStack

__all__ = ["ExportReport", "TorchExport", "export_onnx", "export_torch"]


_TOLERANCE = 1e-5
_MOST_BYTES = 2**31 - 2**20  # of a file in protobuf's format
_INT8_TOLERANCE = 0.1
# Rows of one length, one frame, many rows of unlike length, and lengths beside which much is padding.
_CASES = ((7,), (1,), (5, 5, 5), (12, 1, 7, 3), (40, 39, 2, 17, 1, 8, 40))


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written, and how far it is from the module.

    Args:
        path: the file.
        num_bytes: its size.
        max_error: largest difference of an output, in units of max(1, largest output).
        relative_error: root-mean-square difference over root-mean-square output, the worst case.
        cases: lengths of the batches compared.
        opset: version of ONNX's operators.
    """

    path: Path
    num_bytes: int
    max_error: float
    relative_error: float
    cases: tuple[tuple[int, ...], ...]
    opset: int


def export_onnx(
    module: nn.Module, path: str | os.PathLike[str], *, state_inputs: bool = False, int8: bool = False
) -> ExportReport:
    """Writes an ONNX file that onnxruntime has run and that gives the module's numbers.

    Inputs: "x", frames_BTD (fp32) or tokens_BT (int64), and "lengths" [B] (int64), each from 1 to T. Outputs: "logits"
    of a network; "y" [B, T, H] and the state at each row's last frame, "last_h" and so on, of a stack. B and T are
    free.

    Args:
        module: a Network or a RecurrentStack on the CPU, fp32.
        path: where to; it appears whole or not at all.
        state_inputs: a stack also takes the state before the first frame, "h" and so on: for rows that come in pieces.
        int8: matrices as bytes, inputs rounded as they come. The LSTM then needs onnxruntime's own operator;
            GRU and RNN keep fp32 weights, since onnxruntime has no int8 operator for them.

    Raises:
        ConfigError: no onnx or onnxruntime, or a module that has no form in ONNX here.
        InternalError: the file would give other numbers: an error above 1e-5 in units of max(1, largest output), or,
            with int8, a relative error above 0.1.

    Cost: a second or so.
    """
    onnx, runtime = _package("onnx"), _package("onnxruntime")
    _check(module)
    model = build_model(module, state_inputs=state_inputs, int8=int8, onnx=onnx)
    try:
        onnx.checker.check_model(model, full_check=not int8)  # onnxruntime's own operators have no types there
        content: bytes = model.SerializeToString()
        session = _session(runtime, content)
    except Exception as error:  # of many classes, which the packages share no base for
        raise InternalError(f"export: got a graph that onnx or onnxruntime refuses: {error}") from error
    errors = [_error(*pair) for pair in _pairs(module, session, state_inputs=state_inputs)]
    max_error, relative_error = torch.tensor(errors, dtype=torch.float64).amax(0).tolist()
    worst, most = (relative_error, _INT8_TOLERANCE) if int8 else (max_error, _TOLERANCE)
    if not worst <= most:  # NaN too
        raise InternalError(
            f"export: got outputs of onnxruntime that differ by {max_error:.2g} ({relative_error:.2g} relative), "
            f"expected {most}{' relative' if int8 else ''} or less",
            max_error=max_error,
        )
    _write(Path(path), content)
    return ExportReport(
        path=Path(path),
        num_bytes=len(content),
        max_error=max_error,
        relative_error=relative_error,
        cases=_CASES,
        opset=OPSET,
    )


def _check(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ConfigError(f"{name}: got {parameter.dtype} on {parameter.device}, expected torch.float32 on cpu")
    if (size := serialised_bytes(module)) > _MOST_BYTES:
        raise ConfigError(f"module: got {size} bytes of weights, expected {_MOST_BYTES} or less in one ONNX file")


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"export_onnx: got no {name}, expected it", hint="pip install 'treadle[onnx]'") from error


def _session(runtime: ModuleType, content: bytes) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _pairs(module: nn.Module, session: Any, *, state_inputs: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """What the module gives and what the session gives, output by output, case by case."""
    generator = torch.Generator().manual_seed(0)
    training = module.training
    with torch.no_grad():
        try:
            module.eval()
            for lengths in _CASES:
                feeds = _feeds(module, lengths, generator, state_inputs=state_inputs)
                got = session.run(None, {name: value.numpy() for name, value in feeds.items()})
                expected = _expected(module, feeds, lengths)
                yield from zip(expected, map(torch.from_numpy, got), strict=True)
        finally:
            module.train(training)


def _feeds(
    module: nn.Module, lengths: tuple[int, ...], generator: torch.Generator, *, state_inputs: bool
) -> dict[str, Tensor]:
    """Random inputs; what stands at padded slots is random too."""
    stack = module.stack if isinstance(module, Network) else module
    assert isinstance(stack, RecurrentStack)
    shape = (len(lengths), max(lengths))
    embedding = module.embedding if isinstance(module, Network) else None
    if embedding is None:
        x = torch.randn(*shape, stack.input_size, generator=generator)
    else:
        x = torch.randint(embedding.num_embeddings, shape, generator=generator)
    feeds = {"x": x, "lengths": torch.tensor(lengths)}
    if state_inputs:
        for name, sizes in state_shapes(stack).items():
            feeds[name] = torch.randn(
                [len(lengths) if size == "B" else int(size) for size in sizes], generator=generator
            )
    return feeds


def _expected(module: nn.Module, feeds: Mapping[str, Tensor], lengths: tuple[int, ...]) -> list[Tensor]:
    if isinstance(module, Network):
        return [module(feeds["x"], lengths)]
    state = {name: value for name, value in feeds.items() if name not in ("x", "lengths")}
    y, last = module(feeds["x"], state or None, lengths=lengths)
    return [y, *last.values()]


def _error(expected: Tensor, got: Tensor) -> tuple[float, float]:
    """Largest difference in units of max(1, largest output), and relative error; infinite where shapes differ."""
    if expected.shape != got.shape:
        return float("inf"), float("inf")
    difference = (expected - got).double()
    size = expected.double().square().mean().sqrt().clamp(min=1e-12)
    largest = difference.abs().max() / expected.abs().max().clamp(min=1)
    return float(largest), float(difference.square().mean().sqrt() / size)


def _write(path: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

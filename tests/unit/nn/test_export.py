"""Exported files give the module's numbers, or are not written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cell_oracles import KINDS
from torch import nn

from treadle.errors import ConfigError, InternalError
from treadle.nn.export import export_onnx, export_torch
from treadle.nn.heads import ClassifyHead, CtcHead, TagHead
from treadle.nn.network import Network
from treadle.nn.quantize import quantize

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

LENGTHS = [9, 1, 30, 7]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {"bidirectional": True, "residual": True, "norm": True, "learned_state": True},
    "everything": {"conv_size": 4, "mlp_factor": 2.0, "residual": True, "norm": True, "learned_state": True},
    "no-bias": {"bias": False},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty one: a home with compiled kernels may stand in `tmp_path`."""
    (tmp_path / "exports").mkdir()
    return tmp_path / "exports"


def make_stack(kind: str, hidden: int = 12, **options: Any) -> Any:
    torch.manual_seed(0)
    stack = KINDS[kind](7, hidden, 2, **options)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.normal_(0, 0.4)
    return stack.eval()


def make_network(kind: str, head: str, **options: Any) -> Network:
    stack = make_stack(kind, **options)
    made: nn.Module = (
        CtcHead(stack.output_size, 5, 3)
        if head == "ctc"
        else ClassifyHead(stack.output_size, 4, head, stack.num_directions)
    )
    return Network(embedding=nn.Embedding(11, 7), dropout=0.2, stack=stack, head=made)  # type: ignore[arg-type]


def run(path: Path, **feeds: Any) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: np.asarray(value) for name, value in feeds.items()})


@every_kind
@pytest.mark.parametrize("options", OPTIONS)
def test_stack_in_onnxruntime(kind: str, options: str, folder: Path) -> None:
    stack = make_stack(kind, **OPTIONS[options])
    report = export_onnx(stack, folder / "stack.onnx")
    assert report.max_error <= 1e-5
    assert report.num_bytes == (folder / "stack.onnx").stat().st_size
    assert list(folder.iterdir()) == [folder / "stack.onnx"]
    # What the exporter checked, once more from the file, with NaN at padded slots.
    x = torch.randn(len(LENGTHS), max(LENGTHS), 7)
    for row, length in enumerate(LENGTHS):
        x[row, length:] = torch.nan
    y, *last = run(report.path, x=x, lengths=np.array(LENGTHS))
    with torch.no_grad():
        expected, state = stack(x, lengths=LENGTHS)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-5)
    for name, got in zip(state, last, strict=True):
        np.testing.assert_allclose(got, state[name], rtol=1e-6, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("candidate", ["tanh", "identity"])
@pytest.mark.parametrize("kind", ["mingru", "minlstm", "minlstm_raw"])
def test_candidates_and_expansion(kind: str, candidate: str, folder: Path) -> None:
    stack = make_stack(kind, candidate=candidate, expansion=1.5)
    assert export_onnx(stack, folder / "stack.onnx").max_error <= 1e-5


@every_kind
def test_rows_in_pieces(kind: str, folder: Path) -> None:
    stack = make_stack(kind, conv_size=4, learned_state=True)
    path = export_onnx(stack, folder / "stack.onnx", state_inputs=True).path
    x = torch.randn(2, 13, 7)
    with torch.no_grad():
        whole, _ = stack(x)
        state = stack.initial_state(2)
    names, parts, pieces = list(state), [part.detach() for part in state.values()], []
    for piece in (x[:, :1], x[:, 1:3], x[:, 3:]):
        lengths = np.full(2, piece.shape[1])
        y, *parts = run(path, x=piece, lengths=lengths, **dict(zip(names, map(np.asarray, parts), strict=True)))
        pieces.append(y)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", ["ctc", "last", "mean", "max", "attention"])
@pytest.mark.parametrize(("kind", "options"), [("lstm", "bidirectional"), ("minlstm", "everything")])
def test_network_in_onnxruntime(kind: str, options: str, head: str, folder: Path) -> None:
    network = make_network(kind, head, **OPTIONS[options]).train()
    report = export_onnx(network, folder / "network.onnx")
    assert report.max_error <= 1e-5
    assert network.training
    tokens = torch.randint(11, (len(LENGTHS), max(LENGTHS)))
    (logits,) = run(report.path, x=tokens, lengths=np.array(LENGTHS))
    with torch.no_grad():
        np.testing.assert_allclose(logits, network.eval()(tokens, LENGTHS), rtol=0, atol=1e-5)


def test_sizes_stay_free(folder: Path) -> None:
    model = onnx.load(export_onnx(make_network("gru", "mean"), folder / "network.onnx").path)
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"x": ["B", "T"], "lengths": ["B"], "logits": ["B", 4]}
    assert [node.op_type for node in model.graph.node].count("GRU") == 2


@pytest.mark.parametrize(("kind", "shrinks"), [("lstm", True), ("mingru", True), ("minlstm", True), ("gru", False)])
def test_int8_in_onnxruntime(kind: str, shrinks: bool, folder: Path) -> None:
    torch.manual_seed(0)
    stack = KINDS[kind](64, 128, 2)
    plain = export_onnx(stack, folder / "fp32.onnx")
    small = export_onnx(stack, folder / "int8.onnx", int8=True)
    assert small.relative_error < 0.05
    assert (plain.num_bytes / small.num_bytes >= 3.4) == shrinks  # onnxruntime has no int8 GRU
    assert (small.relative_error > 1e-4) == shrinks


def test_a_wrong_file_is_not_written(folder: Path) -> None:
    path = folder / "stack.onnx"
    path.write_bytes(b"the old one")
    stack = make_stack("gru")
    with torch.no_grad():
        stack.layers[1].ahead.rnn.bias_hh_l0[3] = torch.nan
    with pytest.raises(InternalError, match="differ by nan"):
        export_onnx(stack, path)
    assert path.read_bytes() == b"the old one"
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_package_names_the_extra(package: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what Python itself does to forbid an import
    with pytest.raises(ConfigError, match=f"got no {package}") as caught:
        export_onnx(make_stack("gru"), folder / "stack.onnx")
    assert "treadle[onnx]" in caught.value.hint
    assert not list(folder.iterdir())


def test_refusals(folder: Path) -> None:
    path = folder / "file.onnx"
    with pytest.raises(ConfigError, match="module: got Linear"):
        export_onnx(nn.Linear(3, 3), path)
    with pytest.raises(ConfigError, match="time_decay"):
        export_onnx(make_stack("gru", time_decay=True), path)
    with pytest.raises(ConfigError, match="got a cell Int8Cell"):
        export_onnx(quantize(make_stack("gru"))[0], path)
    with pytest.raises(ConfigError, match="got a layer Int8Linear"):
        export_onnx(quantize(make_stack("mingru", hidden=96))[0], path)
    with pytest.raises(ConfigError, match=r"got torch\.float64"):
        export_onnx(make_stack("gru").double(), path)
    with pytest.raises(ConfigError, match="state_inputs"):
        export_onnx(make_stack("gru", bidirectional=True), path, state_inputs=True)
    network = make_network("gru", "mean")
    network.head = TagHead(12, 3)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="got a head TagHead"):
        export_onnx(network, path)
    with pytest.raises(ConfigError, match="module: got Linear"):
        export_torch(nn.Linear(3, 3))
    with pytest.raises(ConfigError, match="packed: got GRU"):
        export_torch(make_stack("gru"), packed=True)
    with pytest.raises(ConfigError, match="time_decay"):
        export_torch(make_stack("gru", time_decay=True))
    assert not list(folder.iterdir())


def operators(program: torch.export.ExportedProgram) -> set[str]:
    """Of all graphs: what runs outside autocast stands in a graph of its own."""
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    return {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize(
    ("kind", "operator"),
    [
        ("lstm", "recurrent_layer"),
        ("gru", "recurrent_layer"),
        ("rnn_relu", "recurrent_layer"),
        ("mingru", "gated_scan"),
    ],
)
def test_stack_as_a_program(kind: str, operator: str) -> None:
    stack = make_stack(kind, learned_state=True)
    export = export_torch(stack)
    assert export.max_error <= 1e-5
    assert f"treadle.{operator}.default" in operators(export.program)
    x = torch.randn(4, 29, 7)
    with torch.no_grad():
        y, *state = export.program.module()(x)
        expected, expected_state = stack(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(state, list(expected_state.values()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "head", "bidirectional"), [("gru", "attention", False), ("lstm", "last", True), ("minlstm", "ctc", False)]
)
def test_network_as_a_program(kind: str, head: str, bidirectional: bool, folder: Path) -> None:
    network = make_network(kind, head, bidirectional=bidirectional)
    torch.export.save(export_torch(network).program, folder / "network.pt2")
    program = torch.export.load(folder / "network.pt2")
    tokens = torch.randint(11, (2, 17))
    with torch.no_grad():
        expected = network.eval()(tokens)
        torch.testing.assert_close(program.module()(tokens)[0], expected, rtol=0, atol=1e-5)


def test_packed_rows_as_a_program() -> None:
    stack = make_stack("mingru", bidirectional=True, residual=True, norm=True)
    export = export_torch(stack, packed=True)
    assert "treadle.gated_scan.default" in operators(export.program)
    x, offsets = torch.randn(60, 7), torch.tensor([0, 9, 10, 60])
    with torch.no_grad():
        y, _ = export.program.module()(x, offsets)
        torch.testing.assert_close(y, stack(x, offsets=offsets)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", ["attention", "ctc"])
def test_packed_network_as_a_program(head: str) -> None:
    network = make_network("minlstm", head)
    program = export_torch(network, packed=True).program
    tokens, lengths = torch.randint(11, (17,)), [9, 1, 7]
    with torch.no_grad():
        (got,) = program.module()(tokens, torch.tensor([0, 9, 10, 17]))
        rows = [network.eval()(row[None])[0] for row in tokens.split(lengths)]
    expected = torch.stack(rows) if head == "attention" else torch.cat(rows)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)

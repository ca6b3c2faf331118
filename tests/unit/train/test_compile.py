"""Compiled layers beside those that are run operation by operation; minutes of compiling, so slow."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from train_rig import SGD, Toy, toy_spec

from treadle.errors import ConfigError
from treadle.nn import build_network, compile_layers, recompute_layers
from treadle.nn import compiled as module
from treadle.spec import ClassifySpec, InputKind, LstmSpec, MinGruSpec, Signature, TrainSpec
from treadle.train import PrecisionChoice, fit, load_weights, pack
from treadle.train.compiling import compiled
from treadle.train.state import MODEL_FILE, snapshot

CPU = torch.device("cpu")
FP32 = PrecisionChoice(name="fp32", device="cpu", why="", probe_ms={})
TOKENS = Signature(input_kind=InputKind.tokens, input_size=30, num_labels=5, max_length=99)
MODEL = MinGruSpec(hidden_size=24, num_layers=3, embedding_size=16, norm=True, residual=True, mlp_factor=2.0)
# Inductor's own modules use what Python and torch are about to drop.
pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = build_network(MODEL, ClassifySpec(), TOKENS).train()
    other = build_network(MODEL, ClassifySpec(), TOKENS).train()
    other.load_state_dict(plain.state_dict())
    return plain, other


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    chance = random.Random(seed)
    lengths_B = torch.tensor([chance.randint(2, 30) for _ in range(chance.randint(2, 9))])
    return torch.randint(0, 30, (int(lengths_B.sum()),)), lengths_B


def passed(network: nn.Module, x: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    network.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(network(x, lengths_B, packed=True), lengths_B % 5)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in network.parameters()])


@pytest.mark.slow
def test_compiled_layers_give_the_same_for_rows_of_any_length():
    plain, other = pair()
    assert compiled(other, FP32, CPU) == 3
    assert all(p.grad is None for p in other.parameters())
    graphs = counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    for seed in range(6):
        x, lengths_B = batch(seed)
        (loss, grads), (other_loss, other_grads) = passed(plain, x, lengths_B), passed(other, x, lengths_B)
        assert abs(float(other_loss - loss)) < 1e-6
        assert float((other_grads - grads).abs().max()) < 1e-6
        assert torch.equal(passed(other, x, lengths_B)[1], other_grads)  # and the same bits again
    with torch.no_grad():
        x, lengths_B = batch(9)
        assert torch.allclose(
            plain.eval()(x, lengths_B, packed=True), other.eval()(x, lengths_B, packed=True), atol=1e-6
        )
    assert counters["stats"]["unique_graphs"] == graphs  # nothing was compiled after the beginning
    plain.train()
    other.train()
    recompute_layers(other)
    x, lengths_B = batch(3)
    assert float((passed(other, x, lengths_B)[1] - passed(plain, x, lengths_B)[1]).abs().max()) < 1e-6


@pytest.mark.slow
def test_checkpoints_are_exchanged_with_runs_that_are_not_compiled():
    toy = Toy(toy_spec(model=MODEL, task=ClassifySpec(), optim=SGD, train=TrainSpec(epochs=1, seed=5)))
    plain, run = toy.run(), toy.run()
    assert compiled(run.network, FP32, CPU)
    fit(plain)
    fit(run)
    ours, theirs = snapshot(run.network, run.optimizer), snapshot(plain.network, plain.optimizer)
    assert {file: list(part) for file, part in ours.items()} == {file: list(part) for file, part in theirs.items()}
    load_weights(plain.network, pack(ours)[MODEL_FILE], where="compiled")
    load_weights(run.network, pack(theirs)[MODEL_FILE], where="plain")
    for name, part in ours[MODEL_FILE].items():
        assert torch.allclose(part, theirs[MODEL_FILE][name], atol=1e-5), name


def test_kernels_of_torch_are_left_as_they_are():
    network = build_network(LstmSpec(hidden_size=4, embedding_size=4), ClassifySpec(), TOKENS)
    assert compile_layers(network, CPU) == 0
    mixed = build_network(LstmSpec(hidden_size=4, embedding_size=4, mlp_factor=1.0), ClassifySpec(), TOKENS)
    assert compile_layers(mixed, CPU) == mixed.stack.num_layers
    conv = build_network(MinGruSpec(hidden_size=4, embedding_size=4, conv_size=3), ClassifySpec(), TOKENS)
    assert compile_layers(conv, CPU) == 0


def test_without_a_compiler_the_job_must_change(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert module.shutil.which("g++") is None
    with pytest.raises(ConfigError, match=r"train\.compile: got true without a C\+\+ compiler"):
        compile_layers(nn.Linear(2, 2), CPU)

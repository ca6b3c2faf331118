"""Choosing a number format: what is left alone, what is refused, and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from train_rig import Toy, frames_draft, toy_spec

from treadle.errors import ConfigError, DivergenceError
from treadle.spec import (
    ClassifySpec,
    GruSpec,
    LstmSpec,
    MinGruSpec,
    MinLstmSpec,
    Precision,
    RnnSpec,
    SplitSpec,
)
from treadle.train import World, choose_precision

CELLS = [kind(hidden_size=6, embedding_size=5) for kind in (RnnSpec, GruSpec, LstmSpec, MinGruSpec, MinLstmSpec)]


class NoBf16(nn.Module):
    """A network with a layer that is not there in bf16, as on a device without the kernel."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, lengths_B: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("not implemented for 'BFloat16'\nand a trace")
        return self.inner(x, lengths_B)


@pytest.fixture(scope="module")
def toy():
    return Toy(toy_spec())


def choose(toy, mode, network=None):
    run = toy.run()
    return choose_precision(mode, network or run.network, run.task, run.feed.largest(), World())


@pytest.mark.parametrize("mode", list(Precision))
def test_nothing_is_touched(toy, mode):
    run = toy.run()
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    gradients = []
    for p in run.network.parameters():
        p.grad = torch.randn_like(p)
        gradients.append(p.grad.clone())
    stream = torch.get_rng_state()
    choose_precision(mode, run.network, run.task, run.feed.largest(), World())
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(before[name], value) for name, value in run.network.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(run.network.parameters(), gradients, strict=True))
    assert run.network.training


def test_fp32_is_not_probed(toy):
    choice = choose(toy, Precision.fp32)
    assert (choice.name, choice.why, choice.probe_ms) == ("fp32", "as asked", {})


def test_bf16_as_asked(toy):
    choice = choose(toy, Precision.bf16)
    assert (choice.name, choice.why) == ("bf16", "as asked")
    assert set(choice.probe_ms) == {"bf16"}


@pytest.mark.parametrize("model", CELLS, ids=[cell.kind for cell in CELLS])
def test_fp16_as_asked(model):
    choice = choose(Toy(toy_spec(model=model)), Precision.fp16)
    assert (choice.name, choice.why, choice.is_scaled) == ("fp16", "as asked", True)
    assert set(choice.probe_ms) == {"fp16"}
    with choice.autocast():
        assert torch.get_autocast_dtype("cpu") is torch.float16


class Loud(nn.Module):
    """A network whose gradients in fp16 are finite for a small scale of the loss only, or for none."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner = inner
        self.factor = factor

    def forward(self, x: Tensor, lengths_B: Tensor) -> Tensor:
        logits = self.inner(x, lengths_B)
        return (logits / self.factor * self.factor) if torch.is_autocast_enabled("cpu") else logits


@pytest.mark.parametrize(("factor", "is_sound"), [(1.0, True), (4096.0, True), (3e38, False)])
def test_fp16_is_probed_with_a_scale_that_has_room(toy, factor, is_sound):
    network = Loud(toy.network(), factor)
    if is_sound:
        assert choose(toy, Precision.fp16, network).name == "fp16"
        return
    with pytest.raises(ConfigError, match="got fp16, but fp16 fails here: gradients are not finite"):
        choose(toy, Precision.fp16, network)


def test_fp16_that_fails_says_why(toy):
    with pytest.raises(ConfigError, match="got fp16, but fp16 fails here: not implemented") as refused:
        choose(toy, Precision.fp16, NoBf16(toy.network()))
    assert refused.value.hint == "precision=auto or precision=fp32"


def test_auto_says_what_it_measured(toy):
    choice = choose(toy, Precision.auto)
    assert set(choice.probe_ms) == {"bf16", "fp32"}
    ratio = choice.probe_ms["bf16"] / choice.probe_ms["fp32"]
    assert choice.name == ("bf16" if ratio < 0.75 else "fp32")
    assert choice.why == f"a step in bf16 takes {ratio:.2f}x the time of fp32"


def test_bf16_that_fails_is_an_error_only_where_it_was_asked_for(toy):
    network = NoBf16(toy.network())
    with pytest.raises(ConfigError, match="got bf16, but bf16 fails here: not implemented for 'BFloat16'\n") as refused:
        choose(toy, Precision.bf16, network)
    assert "precision=auto" in refused.value.hint
    choice = choose(toy, Precision.auto, network)
    assert (choice.name, choice.why) == ("fp32", "bf16 fails here: not implemented for 'BFloat16'")


class OnlyFinite(nn.Module):
    """A network whose answers leave bf16's neighbourhood of fp32: finite in fp32 alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, lengths_B: Tensor) -> Tensor:
        logits = self.inner(x, lengths_B)
        return logits * float("inf") if torch.is_autocast_enabled("cpu") else logits


def test_bf16_that_is_not_finite_is_not_taken(toy):
    network = OnlyFinite(toy.network())
    choice = choose(toy, Precision.auto, network)
    assert (choice.name, choice.why) == ("fp32", "bf16 fails here: gradients are not finite")
    with pytest.raises(ConfigError, match="gradients are not finite"):
        choose(toy, Precision.bf16, network)


def test_a_network_that_is_not_finite_in_fp32_is_divergence(toy):
    network = toy.network()
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    with pytest.raises(DivergenceError, match="first step in fp32"):
        choose(toy, Precision.auto, network)


def test_frames_run_in_bf16_too():
    spec = toy_spec(task=ClassifySpec(), model=RnnSpec(hidden_size=4), split=SplitSpec(test=6))
    toy = Toy(spec, frames_draft(30))
    assert choose(toy, Precision.bf16).name == "bf16"

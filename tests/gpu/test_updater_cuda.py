"""Updates on a CUDA device: nothing waits for it, refused ones move nothing, and runs resume to the same bits."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from treadle.nn import MinGRU
from treadle.spec import AdamWSpec, ClassifySpec, DataSpec, GruSpec, GuardSpec, JobSpec, RmsPropSpec, SgdSpec, StoreSpec
from treadle.train.optim import build_optimizer
from treadle.train.precision import FIRST_SCALE, PrecisionChoice
from treadle.train.replicas import weights_hash
from treadle.train.state import live, pack, unpack
from treadle.train.updater import Updater

DEVICE = torch.device("cuda")
OPTIMS = {"adamw": AdamWSpec(ema=0.9, clip_value=0.1), "sgd": SgdSpec(ema=0.9), "rmsprop": RmsPropSpec(momentum=0.9)}


class Bench:
    def __init__(self, optim, precision):
        spec = JobSpec(
            name="x",
            task=ClassifySpec(),
            model=GruSpec(),
            data=DataSpec(name="x"),
            optim=optim,
            guard=GuardSpec(warmup_updates=2, spike=10.0),
            store=StoreSpec(uri="/nowhere"),
        )
        torch.manual_seed(0)
        self.args = (optim, precision)
        self.network = MinGRU(16, 16, 2).to(DEVICE)
        self.optimizer = build_optimizer(optim, self.network)
        choice = PrecisionChoice(name=precision, device="cuda", why="", probe_ms={})
        self.updater = Updater(spec, self.network, self.optimizer, choice)

    def give(self, factor=1.0):
        scale = FIRST_SCALE if self.args[1] == "fp16" else 1.0
        for p in self.network.parameters():
            p.grad = torch.full_like(p, 1e-2 * factor * scale)

    def move(self, factor=1.0):
        self.give(factor)
        verdict = self.updater.judge()
        return verdict, self.updater.move(0.01)

    def packed(self):
        return pack({**live(self.network, self.optimizer), **self.updater.tensors()})


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("optim", OPTIMS.values(), ids=OPTIMS)
def test_a_refused_update_moves_nothing(optim, precision):
    bench = Bench(optim, precision)
    bench.move(math.nan)  # the very first, too
    for _ in range(3):
        bench.move()
    before = bench.packed()
    bench.move(math.nan)
    verdict, moved = bench.move()
    assert verdict.reason == ("overflow" if precision == "fp16" else "not finite")
    assert float(moved.taken) == 1
    bench.move(50.0)
    after = bench.packed()
    bench.updater.judge()
    other = Bench(optim, precision)
    unpack(before, other.network, other.optimizer)
    other.updater.load_tensors(before)
    other.updater.load(bench.updater.state)
    assert other.packed()["model.safetensors"] == before["model.safetensors"] != after["model.safetensors"]


@pytest.mark.parametrize("optim", [OPTIMS["adamw"], OPTIMS["sgd"]], ids=["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nobody_waits_for_the_device(optim, precision):
    bench = Bench(optim, precision)
    bench.move()
    bench.move()
    bench.give()
    torch.cuda.set_sync_debug_mode("error")
    try:
        bench.updater.move(0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_resuming_changes_no_bit():
    bench = Bench(OPTIMS["adamw"], "fp16")
    for step in range(4):
        bench.move(math.inf if step == 2 else 1.0)
    other = Bench(*bench.args)
    files = bench.packed()
    unpack(files, other.network, other.optimizer)
    other.updater.load_tensors(files)
    other.updater.load(bench.updater.state)
    for part in (bench, other):
        part.move()
        part.move()
    assert bench.packed() == other.packed()
    assert bench.updater.state == other.updater.state


def test_a_flipped_bit_shows():
    bench = Bench(dataclasses.replace(OPTIMS["adamw"]), "fp32")
    before = weights_hash(bench.network)
    assert weights_hash(bench.network) == before
    next(bench.network.parameters()).data.view(-1).view(torch.int32)[3] ^= 1
    assert weights_hash(bench.network) != before

"""Moving weights: what a refused update leaves alone, clipping, the scale of fp16, the mean of weights, resuming."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from train_rig import ADAMW, FP32, SGD, Toy, toy_spec

from treadle.errors import IntegrityError
from treadle.spec import GuardSpec, RmsPropSpec, SgdSpec
from treadle.train import build_optimizer, pack
from treadle.train.precision import FIRST_SCALE, GROWS_AFTER, LEAST_SCALE, MOST_SCALE, LossScale
from treadle.train.state import live, snapshot, unpack
from treadle.train.updater import AVERAGE_FILE, UPDATER_FILE, Updater, UpdaterState

FP16 = dataclasses.replace(FP32, name="fp16")
OPTIMS = {
    "adamw": ADAMW,
    "sgd": SGD,
    "plain": SgdSpec(momentum=0.0),
    "rmsprop": RmsPropSpec(weight_decay=0.01),
    "rmsprop-momentum": RmsPropSpec(momentum=0.9),
}


class Bench:
    """A network, its optimizer and its updater, to be given gradients."""

    def __init__(self, optim, *, precision=FP32, guard=None):
        self.toy = Toy(toy_spec(optim=optim, guard=guard or GuardSpec(warmup_updates=2, spike=10.0)))
        self.precision = precision
        self.network = self.toy.network()
        self.optimizer = build_optimizer(optim, self.network)
        self.updater = Updater(self.toy.spec, self.network, self.optimizer, precision)
        self.draws = torch.Generator().manual_seed(3)

    def give(self, factor=1.0, *, at=None):
        """Gradients of a norm of 1 times a factor, or with one value replaced."""
        parts = [torch.randn(p.shape, generator=self.draws) for p in self.network.parameters()]
        norm = torch.nn.utils.get_total_norm(parts)
        for p, part in zip(self.network.parameters(), parts, strict=True):
            p.grad = part / norm * factor * float(self.updater.scaled(torch.tensor(1.0)))
        if at is not None:
            next(iter(self.network.parameters())).grad.view(-1)[0] = at

    def move(self, factor=1.0, *, at=None, rate=0.1):
        verdict = self.updater.judge()
        self.give(factor, at=at)
        moved = self.updater.move(rate)
        return verdict, moved

    def everything(self):
        files = {**snapshot(self.network, self.optimizer), **self.updater.tensors()}
        return {
            f"{file}/{name}": t.clone()
            for file, part in files.items()
            for name, t in part.items()
            if "latest" not in name
        }

    def packed(self):
        return pack({**live(self.network, self.optimizer), **self.updater.tensors()})

    def again(self):
        """Another, put together from a checkpoint of this one."""
        other = Bench(self.toy.spec.optim, precision=self.precision, guard=self.toy.spec.guard)
        files = self.packed()
        unpack(files, other.network, other.optimizer)
        other.updater.load_tensors(files)
        other.updater.load(self.updater.state)
        other.draws.set_state(self.draws.get_state())
        return other


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("optim", OPTIMS.values(), ids=OPTIMS)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_refused_update_leaves_everything_as_it_was(optim, steps, value):
    bench, other = (Bench(dataclasses.replace(optim, ema=0.9)) for _ in range(2))
    for part in (bench, other):
        for _ in range(steps):
            part.move()
    before = bench.everything()
    draws = bench.draws.get_state()
    _, moved = bench.move(at=value)
    assert float(moved.taken) == 0
    assert not bool(torch.isfinite(moved.norm))
    assert all(p.grad is None for p in bench.network.parameters())
    after = bench.everything()
    if steps:
        assert same(after, before)
    bench.draws.set_state(draws)
    # What comes after is as if it had not been, from the first update on: no optimizer remembers it.
    for part in (bench, other):
        part.move()
        part.move()
    assert same(bench.everything(), other.everything())
    assert bench.updater.state.guard.skipped == 1
    assert other.updater.state.guard.skipped == 0


@pytest.mark.parametrize("optim", [ADAMW, OPTIMS["rmsprop"]], ids=["adamw", "rmsprop"])
def test_a_spike_is_refused_and_told_one_update_later(optim):
    bench = Bench(optim)
    assert bench.move()[0] is None  # nothing came before
    assert bench.move()[0].reason == ""
    bench.move()
    before = bench.everything()
    verdict, moved = bench.move(11.0)
    assert (verdict.reason, float(moved.taken)) == ("", 0.0)
    assert same(bench.everything(), before)
    verdict, moved = bench.move()
    assert (verdict.reason, verdict.norm, float(moved.taken)) == ("spike", pytest.approx(11.0, rel=1e-5), 1.0)
    assert verdict.limit == pytest.approx(10.0, rel=1e-4)
    assert bench.updater.judge().reason == ""
    assert bench.updater.judge() is None  # told once


def test_settled_is_judged_at_once_and_not_again_after_a_restart():
    bench = Bench(ADAMW)
    bench.move()
    assert bench.again().updater.judge().reason == ""
    assert bench.updater.settle().reason == ""
    assert bench.updater.judge() is None
    assert bench.again().updater.judge() is None


@pytest.mark.parametrize("optim", OPTIMS.values(), ids=OPTIMS)
@pytest.mark.parametrize("precision", [FP32, FP16], ids=["fp32", "fp16"])
def test_a_restart_at_any_update_changes_no_bit(optim, precision):
    bench = Bench(dataclasses.replace(optim, ema=0.9, clip_value=0.01), precision=precision)
    for step in range(8):
        other = bench.again()
        for part in (bench, other):
            part.move(*{3: (100.0,)}.get(step, ()), at={5: math.nan}.get(step))
        assert same(bench.everything(), other.everything())
        assert bench.updater.state == other.updater.state
        bench = other if step % 2 else bench
    assert bench.updater.state.guard.skipped == (1 if precision is FP16 else 2)


def test_a_checkpoint_without_an_updater_is_that_of_an_older_version():
    bench = Bench(dataclasses.replace(ADAMW, ema=0.9), precision=FP16)
    bench.move()
    files = {name: data for name, data in bench.packed().items() if name not in (UPDATER_FILE, AVERAGE_FILE)}
    other = Bench(dataclasses.replace(ADAMW, ema=0.9), precision=FP16)
    unpack(files, other.network, other.optimizer)
    other.updater.load_tensors(files)
    other.updater.load(UpdaterState())
    assert other.updater.judge() is None
    weights = [p.clone() for p in other.network.parameters()]
    with other.updater.averaged():
        assert all(torch.equal(a, b) for a, b in zip(weights, other.network.parameters(), strict=True))


def test_means_of_another_network_are_refused():
    bench = Bench(dataclasses.replace(ADAMW, ema=0.9))
    other = Toy(toy_spec(model=dataclasses.replace(bench.toy.spec.model, hidden_size=7))).network()
    files = bench.packed() | {AVERAGE_FILE: pack({"x": dict(other.state_dict())})["x"]}
    with pytest.raises(IntegrityError, match=r"mean of .*: got \(.*\), expected \("):
        bench.updater.load_tensors(files)
    with pytest.raises(IntegrityError, match="not readable as safetensors"):
        bench.updater.load_tensors({UPDATER_FILE: b"no"})


def test_values_are_clipped_after_the_norm():
    # Gradients of a plain step at rate 1 are what the weights lose.
    bench = Bench(SgdSpec(momentum=0.0, clip_norm=0.5, clip_value=0.02))
    before = [p.detach().clone() for p in bench.network.parameters()]
    bench.give(2.0)
    given = [p.grad.clone() for p in bench.network.parameters()]
    moved = bench.updater.move(1.0)
    assert float(moved.norm) == pytest.approx(2.0, rel=1e-5)
    wanted = [(part * (0.5 / (2.0 + 1e-6))).clamp(-0.02, 0.02) for part in given]
    found = [a - b.detach() for a, b in zip(before, bench.network.parameters(), strict=True)]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(found, wanted, strict=True))
    assert any(bool((part.abs() == 0.02).any()) for part in wanted)


def test_the_clip_is_torchs_bit_by_bit():
    bench = Bench(ADAMW)
    bench.give(3.0)
    given = [torch.nn.Parameter(p.detach().clone()) for p in bench.network.parameters()]
    for p, q in zip(given, bench.network.parameters(), strict=True):
        p.grad = q.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(given, 1.0)
    assert torch.equal(bench.updater.clip(), norm)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(given, bench.network.parameters(), strict=True))


def test_a_scaled_loss_moves_the_weights_alike():
    plain, scaled = Bench(ADAMW), Bench(ADAMW, precision=FP16)
    for step in range(4):
        norms = [part.move(1.0 + step)[1].norm for part in (plain, scaled)]
        assert torch.equal(*norms)  # a power of two
    first, second = plain.everything(), scaled.everything()
    assert all(torch.equal(first[name], second[name]) for name in first)
    loss = torch.tensor(3.0)
    assert float(scaled.updater.scaled(loss)) == 3.0 * FIRST_SCALE
    assert float(scaled.updater.unscaled(scaled.updater.scaled(loss))) == 3.0
    assert plain.updater.scaled(loss) is loss
    assert "guard/loss_scale" not in plain.updater.facts()


def test_an_overflow_halves_the_scale_and_is_no_fault_until_it_is_at_its_least():
    bench = Bench(ADAMW, precision=FP16)
    times = round(math.log2(FIRST_SCALE / LEAST_SCALE))
    for step in range(times):
        assert bench.updater.facts()["guard/loss_scale"] == FIRST_SCALE / 2**step
        bench.move(at=math.inf)
        assert bench.updater.judge().reason == "overflow"
    assert bench.updater.facts()["guard/loss_scale"] == LEAST_SCALE
    assert bench.updater.facts()["guard/overflows"] == times
    bench.move(at=math.inf)
    assert bench.updater.judge().reason == "not finite"
    assert bench.updater.facts()["guard/loss_scale"] == LEAST_SCALE
    assert (bench.updater.state.guard.streak, bench.updater.state.guard.skipped) == (1, 1)


def test_the_scale_grows_after_enough_sound_updates_and_no_further_than_it_may():
    scale = LossScale(torch.device("cpu"))
    sound, broken = torch.tensor(True), torch.tensor(False)
    for _ in range(GROWS_AFTER - 1):
        scale.follow(sound)
    assert float(scale.value) == FIRST_SCALE
    scale.follow(broken)
    for _ in range(GROWS_AFTER - 1):
        scale.follow(sound)
    assert float(scale.value) == FIRST_SCALE / 2
    scale.follow(sound)
    assert float(scale.value) == FIRST_SCALE
    scale.value.fill_(MOST_SCALE)
    scale.sound.fill_(GROWS_AFTER - 1)
    scale.follow(sound)
    assert float(scale.value) == MOST_SCALE


def test_the_mean_of_weights_is_the_formula():
    bench = Bench(dataclasses.replace(SGD, ema=0.5))
    means = [p.detach().double().clone() for p in bench.network.parameters()]
    for n in range(9):
        spoilt = n == 4
        bench.move(at=math.nan if spoilt else None)
        if spoilt:
            continue
        taken = n if n < 4 else n - 1
        decay = min(0.5, (1 + taken) / (10 + taken))
        means = [decay * m + (1 - decay) * p.double() for m, p in zip(means, bench.network.parameters(), strict=True)]
    own = [p.detach().clone() for p in bench.network.parameters()]
    with bench.updater.averaged():
        for p, mean in zip(bench.network.parameters(), means, strict=True):
            assert torch.allclose(p.double(), mean, rtol=0, atol=1e-6)
        assert not torch.equal(own[0], next(bench.network.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(own, bench.network.parameters(), strict=True))
    bench.updater.average.keep()
    for p, mean in zip(bench.network.parameters(), means, strict=True):
        assert torch.allclose(p.double(), mean, rtol=0, atol=1e-6)


def test_own_weights_come_back_where_an_evaluation_fails():
    bench = Bench(dataclasses.replace(ADAMW, ema=0.9))
    bench.move()
    before = bench.everything()
    with pytest.raises(KeyError), bench.updater.averaged():
        raise KeyError
    assert same(bench.everything(), before)


def test_the_rate_of_a_roll_back_holds_on():
    bench = Bench(ADAMW, guard=GuardSpec(rate_factor=0.5))
    bench.move()
    old = bench.again()
    bench.move(at=math.nan)
    bench.updater.judge()
    full = bench.updater.rate(0.5, cuts=0)
    for times in (1, 2):
        before = bench.updater.state
        bench.updater.load_tensors(old.packed())
        bench.updater.load(old.updater.state)
        bench.updater.roll_back(before)
        assert bench.updater.rate(0.5, cuts=0) == full * 0.5**times
        assert (bench.updater.state.roll_backs, bench.updater.state.guard.streak) == (times, 0)
        assert bench.updater.state.guard.skipped == 1  # of the whole run
        assert bench.updater.judge() is None  # what was judged before the checkpoint counts no more


def test_weights_are_looked_through():
    bench = Bench(ADAMW)
    assert bench.updater.is_finite()
    for value in (math.nan, math.inf, -math.inf):
        with torch.no_grad():
            last = list(bench.network.parameters())[-1]
            last.view(-1)[-1] = value
        assert not bench.updater.is_finite()
        with torch.no_grad():
            last.view(-1)[-1] = 3e38  # finite, though its square is not
        assert bench.updater.is_finite()

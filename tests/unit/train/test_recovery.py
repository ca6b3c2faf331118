"""The loop off its course and back: updates refused, roll-backs, and the end; all of it the same after a restart."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from train_rig import ADAMW, FP32, SGD, Toy, toy_draft, toy_spec, weights

from treadle.errors import ConfigError, DivergenceError
from treadle.spec import (
    ClassifySpec,
    GruSpec,
    GuardSpec,
    Keep,
    MinGruSpec,
    RmsPropSpec,
    Schedule,
    SgdSpec,
    SplitSpec,
    TrainSpec,
)
from treadle.train import fit

GRU = GruSpec(hidden_size=6, embedding_size=5, dropout=0.2)
MINGRU = MinGruSpec(hidden_size=6, embedding_size=5, num_layers=2)
GUARD = GuardSpec(warmup_updates=2, spike=10.0, roll_back_after=2)
FP16 = dataclasses.replace(FP32, name="fp16")
PLATEAU = {"schedule": Schedule.plateau, "plateau_patience": 0, "ema": 0.8, "clip_value": 0.05}
NAN, SPIKE = math.nan, 30.0
PER_EPOCH = 4

EVERYTHING = {
    "gru, adamw": (GRU, dataclasses.replace(ADAMW, **PLATEAU), FP32),
    "mingru, sgd in fp16": (MINGRU, dataclasses.replace(SGD, **PLATEAU), FP16),
    "gru, rmsprop in fp16": (GRU, RmsPropSpec(lr=1e-2, momentum=0.5, **PLATEAU), FP16),
}


def toy(model=GRU, optim=ADAMW, guard=GUARD, **train):
    return Toy(toy_spec(model=model, optim=optim, guard=guard, train=TrainSpec(**{"epochs": 3, "seed": 5} | train)))


def where(data, update):
    """The position of the `update`-th update, from 1 on."""
    assert data.feed(data.run().world).plan(0).num_updates == PER_EPOCH
    return divmod(update - 1, PER_EPOCH)


@pytest.mark.parametrize("options", EVERYTHING.values(), ids=EVERYTHING)
def test_with_every_option_on_a_restart_anywhere_changes_no_bit(options):
    model, optim, precision = options
    data = toy(model, optim, min_delta=1.0)  # nothing is an improvement
    spoilt = {where(data, 5): NAN, where(data, 7): SPIKE, where(data, 10): NAN}
    run = data.run(precision=precision, spoilt=spoilt)
    outcome = fit(run)
    last = outcome.state.update
    states = run.checkpoints.states
    is_scaled = precision is FP16  # a NaN may be the scale's then
    assert [facts["update"] for facts in run.track.told("skipped")] == ([7] if is_scaled else [5, 7, 10])
    # In a streak, as far as it is known, nothing is saved; where an epoch ends, all is known.
    assert sorted(states) == [u for u in range(1, last + 1) if is_scaled or u not in (6, 11)]
    names = ("train/loss", "train/lr", "train/grad_norm", "guard/skipped", "val/letter_error_rate")
    for update in sorted(states):
        later = {place: factor for place, factor in spoilt.items() if place >= where(data, update + 1)}
        rest = data.run(saved=states[update], precision=precision, spoilt=later)
        assert fit(rest) == outcome
        assert torch.equal(weights(rest), weights(run)), update
        assert all(files == states[u] for u, files in rest.checkpoints.states.items())
        for name in names:
            known = run.track.column(name)
            assert repr(rest.track.column(name)) == repr({u: known[u] for u in rest.track.column(name)})
    assert outcome.state.watch.cuts > 0


@pytest.mark.parametrize("optim", [ADAMW, SGD, RmsPropSpec(lr=1e-2)], ids=["adamw", "sgd", "rmsprop"])
@pytest.mark.parametrize("factor", [NAN, math.inf, SPIKE])
def test_a_spoilt_update_is_as_if_it_had_no_rows(optim, factor):
    data = toy(optim=dataclasses.replace(optim, ema=0.9))
    place = where(data, 6)
    run = data.run(spoilt={place: factor}, stop_after=6)
    fit(run)
    before, after = run.checkpoints.states[5][0], run.checkpoints.states[6][0]
    for name in ("model.safetensors", "optim.safetensors", "ema.safetensors"):
        assert before[name] == after[name]
    rest = data.run(saved=run.checkpoints.states[6])
    outcome = fit(rest)
    (told,) = rest.track.told("skipped")
    assert told["update"] == 6
    assert told["reason"] == ("spike" if factor == SPIKE else "not finite")
    assert told["rows"] == run.feed.rows_of(*place)[:64]
    assert told["num_rows"] == len(run.feed.rows_of(*place))
    assert told["level"] == "warning"
    assert rest.track.column("guard/skipped")[outcome.state.update] == 1
    assert bool(torch.isfinite(weights(rest)).all())
    # The loss of the row in which it was is that of the other updates, a number.
    losses = run.track.column("train/loss")
    assert 6 not in losses
    assert all(math.isfinite(loss) for loss in losses.values())


def test_roll_backs_go_to_the_last_checkpoint_and_lower_the_rate():
    data = toy()
    spoilt = {where(data, 5): NAN, where(data, 6): NAN}
    run = data.run(spoilt=dict(spoilt))
    run.checkpoints.due = lambda state: state.update + 1 == 3
    outcome = fit(run)
    (told,) = run.track.told("rolled_back")
    assert (told["update"], told["to"], told["rate_factor"], told["level"]) == (6, 3, 0.5, "alert")
    plain = data.run()
    fit(plain)
    rates, wanted = run.track.column("train/lr"), plain.track.column("train/lr")
    assert rates[3] == wanted[3]
    assert all(rates[u] == pytest.approx(wanted[u] / 2) for u in range(4, outcome.state.update + 1))
    state = outcome.state.updater
    assert (state.rate_factor, state.roll_backs, state.guard.skipped) == (0.5, 1, 2)
    # From the checkpoint on, it is the run with half the rate.
    saved, text = run.checkpoints.states[3]
    half = data.run(
        saved=(saved, text.replace('"rate_factor": 1.0, "roll_backs": 0', '"rate_factor": 0.5, "roll_backs": 1'))
    )
    fit(half)
    assert torch.equal(weights(half), weights(run))
    assert outcome.status == "finished"


def test_without_a_checkpoint_it_begins_anew_from_the_seed():
    data = toy()
    run = data.run(spoilt={where(data, 1): NAN, where(data, 2): NAN})
    run.checkpoints.due = lambda _: False
    outcome = fit(run)
    (told,) = run.track.told("rolled_back")
    assert (told["update"], told["to"]) == (2, 0)
    half = toy(optim=dataclasses.replace(ADAMW, lr=ADAMW.lr / 2)).run()
    fit(half)
    assert torch.equal(weights(half), weights(run))
    assert outcome.state.update == 3 * PER_EPOCH


def test_a_streak_that_ends_an_epoch_is_seen_at_once():
    data = toy(epochs=1)
    last = PER_EPOCH
    run = data.run(spoilt={where(data, last - 1): NAN, where(data, last): NAN})
    run.checkpoints.due = lambda state: state.update + 1 == 1
    outcome = fit(run)
    assert [facts["to"] for facts in run.track.told("rolled_back")] == [1]
    assert run.track.column("val/loss").keys() == {last}  # not before it was gone through again
    assert outcome.state.updater.guard.streak == 0


PLAIN = SgdSpec(lr=1e25, momentum=0.0, schedule=Schedule.constant, warmup_share=0.0, clip_norm=None)


@pytest.mark.parametrize("log_every_s", [0.0, 1e9])  # without any row of metrics, too
def test_divergence_ends_the_run_before_a_broken_state_is_saved(log_every_s):
    data = toy(optim=PLAIN, guard=GuardSpec(max_roll_backs=2, rate_factor=1.0))
    run = dataclasses.replace(data.run(), log_every_s=log_every_s)
    with pytest.raises(DivergenceError, match=r"training diverged at update \d+, again after 2 roll-backs") as refused:
        fit(run)
    assert refused.value.exit_code == 5
    assert "a smaller optim.lr" in refused.value.hint
    told = run.track.told("rolled_back")
    assert [facts["times"] for facts in told] == [1, 2]
    update, rows = refused.value.context["update"], refused.value.context["rows"]
    assert rows == run.feed.rows_of(*where(data, update))
    for saved in run.checkpoints.states.values():
        assert bool(torch.isfinite(weights(data.run(saved=saved))).all())
    assert all(saved_update < update for saved_update in run.checkpoints.states)


def test_weights_that_left_the_finite_numbers_do_not_outlive_their_epoch():
    # One update more, at its end, makes them infinite with a gradient that is finite.
    data = toy(optim=dataclasses.replace(PLAIN, lr=1e-3), epochs=1, guard=GuardSpec(max_roll_backs=1))
    run = data.run()
    move = run.updater.move
    run.updater.move = lambda rate: move(1e39 if run.reached.state.update == PER_EPOCH - 1 else rate)
    run.reached.state = run.start
    with pytest.raises(DivergenceError):
        fit(run)
    assert [facts["update"] for facts in run.track.told("rolled_back")] == [PER_EPOCH]
    assert PER_EPOCH not in run.checkpoints.states
    assert run.track.column("test/loss") == {}


def test_training_in_fp16_learns_what_fp32_learns():
    for model in (dataclasses.replace(GRU, dropout=0.0), MINGRU):
        spec = toy_spec(
            task=ClassifySpec(), model=model, optim=dataclasses.replace(ADAMW, lr=2e-2), train=TrainSpec(epochs=25)
        )
        losses = {}
        for precision in (FP32, FP16):
            run = Toy(spec, toy_draft(90, classes=True)).run(precision=precision)
            outcome = fit(run)
            losses[precision.name] = run.track.column("val/loss")
            assert outcome.state.precision == precision.name
        first, *_, last = losses["fp32"].values()
        assert last < 0.5 * first
        assert list(losses["fp16"].values())[-1] == pytest.approx(last, rel=0.02)


def test_the_mean_of_weights_is_evaluated_and_becomes_the_model():
    data = toy(optim=dataclasses.replace(ADAMW, ema=0.9))
    run, plain = data.run(), toy().run()
    outcome = fit(run)
    fit(plain)
    files, _ = run.checkpoints.states[outcome.state.update]
    assert files["model.safetensors"] == plain.checkpoints.states[outcome.state.update][0]["model.safetensors"]
    assert not torch.equal(weights(run), weights(plain))
    judged = data.run(saved=run.checkpoints.states[outcome.state.update])
    with judged.updater.averaged():
        assert torch.equal(weights(judged), weights(run))
        assert judged.valid(judged.network, FP32).metrics["loss"] == run.track.column("val/loss")[outcome.state.update]
        assert judged.test(judged.network, FP32).metrics == outcome.test.metrics


def falling(run, values):
    """`run` whose validation gives these headline metrics, one after the other."""
    evaluate, left = run.valid, iter(values)

    class Told:
        def __len__(self):
            return len(evaluate)

        def __call__(self, *given):
            found = evaluate(*given)
            return dataclasses.replace(found, metrics=found.metrics | {"letter_error_rate": next(left)})

    return dataclasses.replace(run, valid=Told())


def test_training_ends_early_and_the_best_weights_become_the_model():
    data = toy(epochs=9)
    data.spec = dataclasses.replace(data.spec, train=TrainSpec(epochs=9, seed=5, patience=2, keep=Keep.best))
    values = [0.9, 0.5, NAN, 0.6, 0.1]
    run = falling(data.run(), values)
    run.checkpoints.due = lambda _: False
    outcome = fit(run)
    per_epoch = data.feed(run.world).plan(0).num_updates
    assert (outcome.status, outcome.why, outcome.state.update) == ("finished", "early", 4 * per_epoch)
    assert (outcome.state.watch.best, outcome.state.watch.best_update) == (0.5, 2 * per_epoch)
    # The best ones are saved when they are found, and the last state at the end.
    assert sorted(run.checkpoints.states) == [per_epoch, 2 * per_epoch, 4 * per_epoch]
    best = data.run(saved=run.checkpoints.states[2 * per_epoch])
    assert torch.equal(weights(run), weights(best))
    assert outcome.test.metrics == best.test(best.network, FP32).metrics
    assert run.track.told("best_restored") == [{"update": 2 * per_epoch, "best": 0.5}]
    assert run.track.told("ended_early")[0]["best_update"] == 2 * per_epoch
    # Over is over, also after a restart.
    rest = falling(data.run(saved=run.checkpoints.states[4 * per_epoch]), [])
    rest.checkpoints.best = run.checkpoints.best
    assert fit(rest) == outcome
    assert torch.equal(weights(rest), weights(run))


def test_the_last_weights_become_the_model_where_they_are_the_best_or_the_best_are_lost():
    spec = TrainSpec(epochs=2, seed=5, keep=Keep.best)
    data = Toy(toy_spec(model=GRU, train=spec))
    run = falling(data.run(), [0.9, 0.5])
    outcome = fit(run)
    assert (outcome.why, run.track.told("best_restored")) == ("epochs", [])
    lost = falling(data.run(), [0.5, 0.9])
    restored = dataclasses.replace(lost.restore, kept=type(lost.checkpoints)())
    fit(dataclasses.replace(lost, restore=restored))
    assert [facts["level"] for facts in lost.track.told("best_missing")] == ["warning"]
    assert torch.equal(weights(lost), weights(run))


def test_a_plateau_lowers_the_rate_from_the_next_update_on():
    optim = dataclasses.replace(
        ADAMW, schedule=Schedule.plateau, plateau_patience=0, plateau_factor=0.1, warmup_share=0.0
    )
    data = toy(optim=dataclasses.replace(optim, final_lr_share=0.0), epochs=4)
    run = falling(data.run(), [0.5, 0.5, 0.4, 0.5])
    fit(run)
    per_epoch = data.feed(run.world).plan(0).num_updates
    rates = list(run.track.column("train/lr").values())
    wanted = [optim.lr] * (2 * per_epoch) + [optim.lr * 0.1] * (2 * per_epoch)
    assert rates == pytest.approx(wanted)
    assert [facts["cuts"] for facts in run.track.told("rate_cut")] == [1, 2]


def test_what_goes_by_evaluations_needs_rows_for_them():
    data = Toy(toy_spec(split=SplitSpec(), train=TrainSpec(patience=1)))
    with pytest.raises(ConfigError, match=r"train.patience: got 1 without validation rows"):
        fit(data.run())

"""The training loop, one function, readable top to bottom."""

from __future__ import annotations

import time
from dataclasses import replace

from treadle.errors import DivergenceError
from treadle.spec import JobSpec, Keep, Parallel
from treadle.train.backward import by_rows, counted, go_back, seed_dropout, summed_loss
from treadle.train.feed import Update
from treadle.train.gradients import GradientSum, summing
from treadle.train.guard import Verdict
from treadle.train.meters import Course, Meters
from treadle.train.optim import rate_scale
from treadle.train.replicas import check_replicas
from treadle.train.run import Checkpointer, Control, NoPulse, Outcome, Pulse, Reached, Restorer, Run
from treadle.train.sharding import gathered, is_sharded
from treadle.train.split import Splitter
from treadle.train.state import TrainState, live
from treadle.train.watch import check_watched, headline

__all__ = [
    "Checkpointer",
    "Control",
    "NoPulse",
    "Outcome",
    "Pulse",
    "Reached",
    "Restorer",
    "Run",
    "by_rows",
    "fit",
    "go_back",
    "progress",
    "seed_dropout",
]

NUM_ROWS_TOLD = 64
"""Most row numbers in an event."""


def fit(run: Run) -> Outcome:
    """Train to the last epoch, until evaluations get no better, or to the update at which all ranks agree to stop.

    Every decision that depends on time or on people is rank 0's and travels with the gradients; all others follow from
    numbers that are the same on all ranks. So all of them take it at the same update.

    Raises:
        DivergenceError: training leaves its course again and again; what was saved is of before.
        InfeasibleError: a single row does not fit into memory. IntegrityError: the ranks' weights are not the same.
        ConfigError: what goes by evaluations has no rows for them.
    """
    check_watched(run.spec.train, run.spec.optim, num_valid=len(run.valid))
    with summing(run.world, run.network) as gradients:
        return _trained(run, gradients)


def _trained(run: Run, gradients: GradientSum) -> Outcome:
    state, meters, course, splitter = run.start, Meters(run), Course(run.feed, run.start), Splitter()
    scale = rate_scale(run.spec.optim, run.feed.mean_rows)
    if _owes_evaluation(run, state):  # the loop was left between an update and its evaluation
        state = _evaluated(run, state, meters)
    for update in meters.waiting(course):
        if state.watch.is_over(run.spec.train):
            break
        count = counted(run, update)
        if not run.network.training:  # a walk over all modules
            run.network.train()
        loss = summed_loss(run, state, update, count, gradients=gradients, splitter=splitter)
        stop, save, log = gradients.finish(_signals(run, state, meters))
        if _is_off_course(run, state, run.updater.judge()):  # of the update before: the device need not be waited for
            state = course.go_to(_rolled_back(run, state, meters))
            continue  # a stop is asked for again, and a checkpoint would hold what was just put back
        run.checkpoints.join()
        rate = scale * run.updater.rate(progress(run.spec, update), cuts=state.watch.cuts)
        moved = run.updater.move(rate)
        verdict = run.updater.settle() if update.is_last_of_epoch else None
        state = state.advanced(update.frames, run.updater.state, is_last_of_epoch=update.is_last_of_epoch)
        run.reached.at(state)
        if _is_off_course(run, state, verdict) or (update.is_last_of_epoch and not _is_finite(run)):
            state = course.go_to(_rolled_back(run, state, meters))
            continue
        meters.add(update, loss=loss, count=count, moved=moved)
        _check_replicas(run, state)
        if log or stop or update.is_last_of_epoch:
            meters.log(state, update, rate)
        if _owes_evaluation(run, state):
            state = _evaluated(run, state, meters)
        if stop or _is_to_be_kept(run, state) or (save and not state.updater.guard.streak):
            _save(run, state)
        if stop:
            run.checkpoints.wait()
            return Outcome(status="stopped", why="asked", state=state)
    run.reached.pulse.enter("ending")
    _save(run, state)
    _put_model_in(run, state)
    test = run.test(run.network, run.precision) if len(run.test) else None
    if test is not None:
        run.track.log(state.update, {f"test/{name}": value for name, value in test.metrics.items()})
    run.checkpoints.wait()
    why = "early" if state.watch.is_over(run.spec.train) else "epochs"
    return Outcome(status="finished", why=why, state=state, test=test)


def progress(spec: JobSpec, update: Update) -> float:
    """Share of the run behind the end of this update, 0 to 1."""
    return min(1.0, (update.epoch + (update.index + 1) / update.num_updates) / spec.train.epochs)


def _signals(run: Run, state: TrainState, meters: Meters) -> tuple[float, float, float]:
    """(stop, save, log), decided by rank 0 alone."""
    if run.world.rank:
        return 0.0, 0.0, 0.0
    save = run.checkpoints.is_due(state) or run.control.wants_checkpoint()
    return float(run.control.wants_stop()), float(save), float(meters.is_due)


def _is_off_course(run: Run, state: TrainState, verdict: Verdict | None) -> bool:
    """Tell of the update that led to `state` if it was refused; whether it was one too many in a row."""
    if verdict is None or not verdict.is_fault:
        return False
    if run.world.rank == 0:
        rows = run.feed.rows_before(state.epoch, state.index)
        run.track.event(
            "skipped",
            level="warning",
            update=state.update,
            reason=verdict.reason,
            grad_norm=verdict.norm,
            limit=verdict.limit,
            num_rows=len(rows),
            rows=rows[:NUM_ROWS_TOLD],
        )
    return run.updater.state.guard.streak >= run.spec.guard.roll_back_after


def _is_finite(run: Run) -> bool:
    """Whether the weights of all ranks are."""
    return run.world.sum([float(not run.updater.is_finite())])[0] == 0


def _rolled_back(run: Run, state: TrainState, meters: Meters) -> TrainState:
    """The newest saved state, put back, to go on from with a lower rate.

    Raises:
        DivergenceError: that was done `max_roll_backs` times already.
    """
    before = run.updater.state
    if before.roll_backs >= run.spec.guard.max_roll_backs:
        rows = run.feed.rows_before(state.epoch, state.index)
        raise DivergenceError(
            f"training diverged at update {state.update}, again after {before.roll_backs} roll-backs: "
            f"{before.guard.streak} updates in a row with a gradient that is not finite or far too large",
            hint="a new run with a smaller optim.lr, a longer optim.warmup_share, optim.clip_norm=1 or precision=fp32; "
            f"look at the latest update's rows of the data set: {', '.join(map(str, rows[:8]))} ...",
            update=state.update,
            rows=rows[:NUM_ROWS_TOLD],
        )
    run.network.zero_grad(set_to_none=True)
    run.checkpoints.join()
    back = run.restore.newest()
    run.updater.roll_back(before)
    back = replace(back, updater=run.updater.state, inputs=state.inputs)
    run.reached.at(back)
    meters.restart()
    factor = run.updater.state.rate_factor
    run.track.event(
        "rolled_back",
        level="alert",
        update=state.update,
        to=back.update,
        rate_factor=factor,
        times=before.roll_backs + 1,
    )
    return back


def _check_replicas(run: Run, state: TrainState) -> None:
    every = run.spec.train.check_replicas_every
    if every and state.update % every == 0 and run.spec.cluster.parallel is Parallel.data:
        check_replicas(run.world, run.network, update=state.update, last_update=state.update - every)


def _owes_evaluation(run: Run, state: TrainState) -> bool:
    """Whether an epoch has ended that is to be evaluated and was not yet."""
    if state.index or not state.epoch or state.evaluated == state.update or not len(run.valid):
        return False
    return state.epoch % run.spec.train.evaluate_every == 0 or state.epoch == run.spec.train.epochs


def _evaluated(run: Run, state: TrainState, meters: Meters) -> TrainState:
    run.reached.pulse.enter("evaluating")
    if run.updater.average is not None:
        run.checkpoints.join()  # the mean's weights take the place of those that may be being copied
    with run.updater.averaged():
        evaluation = run.valid(run.network, run.precision)
    meters.log_evaluation(state, evaluation)
    watch = state.watch.after(headline(evaluation.metrics, run.spec), state.update, spec=run.spec)
    if watch.cuts > state.watch.cuts:
        run.track.event("rate_cut", update=state.update, cuts=watch.cuts, factor=run.spec.optim.plateau_factor)
    state = replace(state, evaluated=state.update, watch=watch)
    run.reached.at(state)
    run.reached.pulse.enter("training")
    return state


def _is_to_be_kept(run: Run, state: TrainState) -> bool:
    return run.spec.train.keep is Keep.best and state.is_best


def _save(run: Run, state: TrainState) -> None:
    started = time.monotonic()
    carried = run.carry.tensors(at=(state.epoch, state.index))  # of all ranks
    files = {**live(run.network, run.optimizer), **run.updater.tensors(), **carried}
    if is_sharded(run.network):
        files = gathered(files, keep=run.world.rank == 0)
    if run.world.rank == 0:
        run.checkpoints.save(state, files, best=_is_to_be_kept(run, state))
        run.track.log(state.update, {"ckpt/update": state.update, "ckpt/save_s": time.monotonic() - started})


def _put_model_in(run: Run, state: TrainState) -> None:
    """Give the network the weights that become the model: the last or the best ones, or their mean."""
    if state.watch.is_over(run.spec.train):
        run.track.event("ended_early", update=state.update, best=state.watch.best, best_update=state.watch.best_update)
    run.checkpoints.join()
    if run.spec.train.keep is Keep.best and not state.is_best:
        best = run.restore.best()
        if best is None:
            run.track.event("best_missing", level="warning", update=state.update, best_update=state.watch.best_update)
        else:
            run.track.event("best_restored", update=best.update, best=best.watch.best)
    if run.updater.average is not None:
        run.updater.average.keep()

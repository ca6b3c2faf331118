"""A learning-rate range test of a job, in this process, with nothing written to the store."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from math import log10

import torch

from treadle.launch.assemble import Surroundings, assemble
from treadle.launch.mailbox import NoMailbox
from treadle.launch.saver import NoSaver
from treadle.plan import Plan
from treadle.spec import JobSpec
from treadle.store import Blobs, Checkpoints, open_blobs
from treadle.store.aside import Aside
from treadle.track import NullTracker
from treadle.track.picture import Panel, picture
from treadle.track.svg import Line, line_chart, number
from treadle.train import World
from treadle.train.lr_range import Course, Suggestion, range_test

__all__ = ["draw_course", "measure_rates", "rehearsed_job"]

_NAME = "lr-range"  # of a run that stands aside


def rehearsed_job(spec: JobSpec, *, num_updates: int) -> JobSpec:
    """The job as the test trains it: one rank, as many epochs as it takes, and no guard that skips large gradients."""
    return replace(
        spec,
        cluster=replace(spec.cluster, workers=0),
        train=replace(spec.train, epochs=num_updates, patience=None),
        guard=replace(spec.guard, spike=None),
        batch=replace(spec.batch, lanes=spec.batch.lanes or max(1, spec.cluster.workers)),
    )


def measure_rates(
    spec: JobSpec,
    plan: Plan,
    blobs: Blobs,
    *,
    rates: tuple[float, float],
    num_updates: int,
    tell: Callable[[int, float, float], object],
) -> Course:
    """Run the test on the CPU or the first GPU, as the job says.

    Args:
        spec, plan: of `rehearsed_job`. rates: lowest and highest. tell: of `range_test`.

    Raises:
        DivergenceError: no loss is finite. InfeasibleError: the largest microbatch does not fit.
    """
    torch.set_num_threads(spec.cluster.cpus_per_worker)
    with tempfile.TemporaryDirectory(prefix="treadle-lr-") as scratch:
        aside = Aside(blobs, open_blobs(scratch), folder=f"runs/{_NAME}")
        run, _, reader = assemble(_around(spec, plan, aside))
        with reader:
            return range_test(run, low=rates[0], high=rates[1], num_updates=num_updates, tell=tell)


def _around(spec: JobSpec, plan: Plan, blobs: Blobs) -> Surroundings:
    return Surroundings(
        blobs=blobs,
        run=_NAME,
        attempt=1,
        spec=spec,
        plan=plan,
        world=World(device=torch.device("cuda", 0)) if spec.cluster.gpus_per_worker else World(),
        checkpoints=Checkpoints(
            blobs, _NAME, attempt=1, keep_last=1, spec_digest=plan.spec_digest, data_digest=plan.data_digest
        ),
        saver=NoSaver(),
        control=NoMailbox(),
        track=NullTracker(),
    )


def draw_course(spec: JobSpec, course: Course, found: Suggestion | None) -> str:
    """The course as an SVG picture, with the suggested rates marked."""
    xs = [log10(rate) for rate in course.rates]
    top = max(course.smoothed[0], min(course.smoothed)) * 1.5
    # What comes after the loss has left the picture would only flatten the rest.
    lines = [
        Line(label=label, xs=xs, ys=[y if y <= top else float("nan") for y in ys])
        for label, ys in (("loss", course.losses), ("smoothed", course.smoothed))
    ]
    marks = {} if found is None else {log10(found.lr): f"{found.lr:g}"}
    chart = line_chart(
        lines, label="loss over the learning rate", unit="loss", x_label="log10 of optim.lr", marks=marks
    )
    note = f"{len(xs)} updates, {course.why}" + (f"; suggested optim.lr={number(found.lr)}" if found else "")
    title = f"{spec.name}: learning-rate range test"
    return picture([Panel(title=title, note=note, chart=chart)], label=f"{title}. {note}")

"""Finding a setting before training: `treadle tune lr`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from treadle.cli.options import answer, asked, compose, job_argument, json_option, overrides_argument, page, say

__all__ = ["tune"]


@click.group()
def tune() -> None:
    """Find a setting before training."""


@tune.command(short_help="Suggest a learning rate from a range test.")
@job_argument
@overrides_argument
@click.option("--from", "low", type=float, default=1e-7, show_default=True, help="Rate to begin with.")
@click.option("--to", "high", type=float, default=10.0, show_default=True, help="Rate to end with.")
@click.option("--updates", "num_updates", type=click.IntRange(min=10), default=100, show_default=True)
@click.option("--out", "output", type=click.Path(dir_okay=False, path_type=Path), help="Write the curve as an SVG.")
@json_option
def lr(
    job: str,
    overrides: tuple[str, ...],
    low: float,
    high: float,
    num_updates: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Train for a few updates while the learning rate rises, and say which rate their losses suggest.

    A range test (Smith 2017): the job's own network, data, batches and optimizer, on one rank in this process. It ends
    where the smoothed loss is four times its best. The suggestion is the smaller of two: the rate where the loss falls
    fastest, and a tenth of the rate where it is lowest (both fastai's rules). Nothing is kept in the store.
    """
    from treadle.cli.submit import capacity_of
    from treadle.launch.lr_range import draw_course, measure_rates, rehearsed_job
    from treadle.launch.submit import plan_job
    from treadle.store import open_blobs
    from treadle.track.screen import Screen
    from treadle.train.lr_range import rates_between, suggest

    rates_between(low, high, num_updates)  # refused before anything is read
    composed, folder = compose(job, overrides)
    spec = rehearsed_job(composed, num_updates=num_updates)
    blobs = open_blobs(spec.store.uri)
    plan = plan_job(spec, folder, blobs, capacity_of(spec, "local"), asked=asked(job, overrides))
    screen = Screen(sys.stderr)
    say(f"{spec.name}: {num_updates} updates of about {plan.rows_per_update:.0f} rows, {spec.optim.kind}")

    def tell(number: int, rate: float, loss: float) -> None:
        if screen.is_live:
            screen.draw(f"update {number}/{num_updates}  lr {rate:.2e}  loss {loss:.4g}"[: screen.columns])

    course = measure_rates(spec, plan, blobs, rates=(low, high), num_updates=num_updates, tell=tell)
    screen.end()
    found = suggest(course)
    if output is not None:
        output.write_text(draw_course(spec, course, found), encoding="utf-8")
    body = {
        "job": spec.name,
        "lr": found.lr if found else None,
        "steepest": found.steepest if found else None,
        "tenth_of_lowest": found.tenth if found else None,
        "ended": course.why,
        "rates": course.rates,
        "losses": course.losses,
        "smoothed": course.smoothed,
        "picture": str(output) if output is not None else None,
    }
    answer(as_json, _finite(body), lambda: _text(course, found, composed.optim.lr, output))


def _finite(body: dict[str, Any]) -> dict[str, Any]:
    from math import isfinite

    return {
        key: [v if isfinite(v) else None for v in value] if isinstance(value, tuple) else value
        for key, value in body.items()
    }


def _text(course: Any, found: Any, lr_now: float, output: Path | None) -> str:
    from treadle.track import chart

    top = 1.5 * course.smoothed[0]
    drawn = [loss if loss <= top else float("nan") for loss in course.smoothed]
    width, is_ascii = page()
    lines = []
    if not is_ascii:
        lines.append(chart(drawn, width=min(60, max(20, width - 12)), label="smoothed loss"))
        margin = " " * (len(lines[0].splitlines()[-1]) - len(lines[0].splitlines()[-1].split("┤")[-1]))
        first, last = f"{course.rates[0]:.0e}", f"{course.rates[-1]:.0e}"
        size = min(60, max(20, width - 12))
        lines.append(f"{margin}{first}{' ' * (size - len(first) - len(last))}{last}  optim.lr")
    lines.append(f"ended     {course.why} after {len(course.rates)} updates, at {course.rates[-1]:.3g}")
    if found is None:
        lines.append("the loss never fell; try --from lower, --updates more, or look at the data")
    else:
        lines += [
            f"steepest  {found.steepest:.2g}  the loss falls fastest there",
            f"lowest/10 {found.tenth:.2g}  a tenth of where the loss is lowest",
            f"suggested optim.lr={found.lr:g}  the smaller of both; the job has {lr_now:g}",
        ]
    if output is not None:
        lines.append(f"picture   {output}")
    return "\n".join(lines)

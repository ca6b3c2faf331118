"""An explained epoch as people read it: in a terminal, and as a picture."""

from __future__ import annotations

import bisect
import math

from treadle.plan.explain import Explained
from treadle.track.histogram import Range, format_ranges
from treadle.track.picture import Panel, picture
from treadle.track.svg import Bar, bar_chart
from treadle.units import format_count, format_duration_s

__all__ = ["explain_picture", "explain_text"]


def explain_text(
    found: Explained, *, head: str = "", counts: str = "slots", width: int = 100, ascii_only: bool = False
) -> str:
    """The numbers as aligned lines, then the lengths of rows as bars, then padding by zone of lengths.

    Args:
        head: what was explained.
        counts: what the budget counts, slots or frames.
        width: columns of the terminal.
    """
    cuts = f", {found.long_rounds:,} of them in pieces" if found.long_rounds else ""
    lines = {
        **({"data": head} if head else {}),
        "rows": f"{found.entries:,} of {found.lengths[0]:,} to {found.lengths[-1]:,} time steps, "
        f"median {_quantile(found, 50):,}, 99 % up to {_quantile(found, 99):,}; {format_count(found.frames)} frames",
        "ranks": f"{found.ranks}, which share {found.lanes} lanes" if found.lanes != found.ranks else f"{found.ranks}",
        "fill": f"{found.fill:.1%} of {format_count(found.slots)} {counts}; {found.pad:.1%} is padding",
        "budget": f"{found.limit:,} {counts} a microbatch; the largest has {found.worst_over_budget:.3f} of it",
        "balance": f"{found.cells_balance:.3f} in {counts}, {found.time_balance:.3f} in time steps "
        "(mean / slowest rank, 1 where none waits)",
        "batches": f"{found.rows_min:,} to {found.rows_max:,} rows a microbatch, {found.rows_median:,} in the middle",
        "updates": f"{found.updates:,} an epoch, from {found.rounds:,} rounds{cuts}",
        "epoch": f"{found.serial:,} time steps of the slowest ranks, one after the other",
        "shapes": f"{found.shapes:,} distinct (rows, time steps)",
        "planning": format_duration_s(found.plan_s),
    }
    texts = [f"{name:<9} {line}" for name, line in lines.items()]
    return "\n".join([*texts, "", _lengths(found, width, ascii_only), "", _zones(found, width, ascii_only)])


def _quantile(found: Explained, share: int) -> int:
    return found.lengths[found.length_shares.index(share)]


def _lengths(found: Explained, width: int, ascii_only: bool) -> str:
    """A line for each bin of lengths; behind its rows the zones that end in it."""
    edges = _edges(found)
    ranges = []
    for low, high, rows in _bins(found):
        inside = [f"{edge:,}" for edge in edges if low <= edge < high]
        ranges.append(Range(label=_span(low, high - 1), value=rows, notes=(f"{rows:,}", " ".join(inside))))
    return format_ranges(
        ranges, headers=["time steps", "rows", "zone ends", ""], width=min(width, 100), ascii_only=ascii_only
    )


def _zones(found: Explained, width: int, ascii_only: bool) -> str:
    ranges = [
        Range(
            label=_span(zone.shortest, zone.longest),
            value=zone.pad,
            notes=(f"{zone.rounds:,}", f"{zone.rows:,}", f"{zone.frames_share:.1%}", f"{zone.pad:.1%}"),
        )
        for zone in found.zones
    ]
    headers = ["zone", "rounds", "rows each", "of frames", "padding", ""]
    return format_ranges(ranges, headers=headers, width=min(width, 100), ascii_only=ascii_only)


def _span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _bins(found: Explained) -> list[tuple[int, int, int]]:
    return list(zip(found.bin_edges[:-1], found.bin_edges[1:], found.bin_rows, strict=True))


def _edges(found: Explained) -> list[int]:
    """Where one zone ends and the next begins: the longest row of each zone but the last."""
    return sorted({zone.longest for zone in found.zones[:-1]})


def explain_picture(found: Explained, *, head: str = "", counts: str = "slots") -> str:
    """The same as an SVG file: rows by length with the edges of the zones, and the padding of each zone."""
    bins = _bins(found)
    bars = [
        Bar(name=f"{low:,}", value=rows, title=f"{_span(low, high - 1)} time steps: {rows:,} rows")
        for low, high, rows in bins
    ]
    marks = {_place(found, edge): f"zones part at {edge:,} time steps" for edge in _edges(found)}
    lengths = bar_chart(
        bars,
        label="Rows by length",
        unit="rows",
        x_label="time steps of a row",
        last_edge=f"{found.bin_edges[-1] - 1:,}",
        marks=marks,
    )
    padded = [
        Bar(
            name=f"{zone.shortest:,}",
            value=100 * zone.pad,
            title=f"{_span(zone.shortest, zone.longest)} time steps: {zone.pad:.1%} padding, {zone.rounds:,} rounds of "
            f"{zone.rows:,} rows a microbatch",
        )
        for zone in found.zones
    ]
    padding = bar_chart(
        padded,
        label="Padding by zone of lengths",
        unit=f"% of {counts}",
        x_label="shortest row of the zone, in time steps",
    )
    note = f"{found.entries:,} rows, {format_count(found.frames)} frames; dashed: where zones of like length part"
    panels = [
        Panel(title="Rows by length", note=f"{head}: {note}" if head else note, chart=lengths),
        Panel(
            title=f"Padding by zone: {found.pad:.1%} over all",
            note=f"{found.limit:,} {counts} a microbatch, {found.ranks} ranks, {found.updates:,} updates an epoch",
            chart=padding,
        ),
    ]
    return picture(panels, label="Lengths of rows and padding of their batches")


def _place(found: Explained, length: int) -> float:
    """Where a length stands among the bins, in bars from the left; bins grow by one ratio."""
    number = min(max(bisect.bisect_right(found.bin_edges, length) - 1, 0), len(found.bin_rows) - 1)
    low, high = found.bin_edges[number : number + 2]
    return number + math.log(length / low) / math.log(high / low)

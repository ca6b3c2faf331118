"""Data sets as people read them: what one holds, what a store holds, what an audit or a check found."""

from __future__ import annotations

from collections.abc import Sequence

from treadle import wire
from treadle.data.describe import ChannelFacts, DatasetFacts
from treadle.data.listing import Listed
from treadle.data.manifest import Finding
from treadle.data.verify import Damage
from treadle.launch.words import split_words
from treadle.spec import SplitSpec
from treadle.track.histogram import Range, format_ranges
from treadle.track.terminal import table
from treadle.units import format_bytes, format_count

__all__ = ["damage_text", "dataset_text", "findings_text", "listed_text"]

SHOWN = 20
"""Lines of a table of channels or labels; the rest is counted. `--json` has them all."""


def dataset_text(facts: DatasetFacts, *, width: int = 100, ascii_only: bool = False) -> str:
    """What a data set holds, in blocks: facts, splits, lengths, labels, channels, findings."""
    head = "\n".join(f"{name:<9} {line}" for name, line in _facts(facts).items())
    ranges = [Range(label=_span(a, b - 1), value=rows, notes=(f"{rows:,}",)) for a, b, rows in facts.lengths]
    lengths = format_ranges(ranges, headers=["time steps", "rows", ""], width=min(width, 100), ascii_only=ascii_only)
    parts = [head, _splits(facts), lengths, _labels(facts), _channels(facts), _values(facts)]
    if facts.findings:
        parts.append(findings_text(facts.findings))
    return "\n\n".join(filter(None, parts))


def _facts(facts: DatasetFacts) -> dict[str, str]:
    split = split_words(wire.decode(SplitSpec, facts.split)) if facts.split else "not split"
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in facts.dropped.items())
    source = ", ".join(f"{name} {digest[:12]}" for name, digest in list(facts.source.items())[:3])
    more = f" and {len(facts.source) - 3} more" if len(facts.source) > 3 else ""
    lines = {
        "data": f"{facts.name}@{facts.digest[:12]}",
        "rows": f"{facts.rows:,} with {format_count(facts.frames)} frames, rows up to {facts.max_length:,} accepted",
        "inputs": _inputs(facts),
        "target": _target(facts),
        "split": split,
        "dropped": f"{dropped} (in no split)" if dropped else "",
        "set aside": f"{facts.set_aside:,} rows in {facts.quarantine}" if facts.set_aside else "",
        "stored": f"{format_bytes(facts.num_bytes)} in {facts.num_blocks:,} blocks, {facts.num_shards:,} shards",
        "licence": facts.licence,
        "source": source + more,
        "recipe": facts.recipe[:12],
    }
    return {name: line for name, line in lines.items() if line}


def _inputs(facts: DatasetFacts) -> str:
    if facts.inputs == "tokens":
        return f"{facts.num_symbols:,} symbols, {facts.known_symbols:,} of them in training rows"
    gap = f", and the gap since the frame before (mean {facts.gap.mean:.4g}, log)" if facts.gap else ""
    missing = "" if facts.missing in ("", "refuse") else f", missing values: {facts.missing}"
    timed = ", timed" if facts.timed else ""
    return f"{len(facts.channels):,} channels{missing}{timed}{gap}"


def _target(facts: DatasetFacts) -> str:
    if facts.target == "none":
        return "none"
    what = f"{len(facts.labels):,} labels" if facts.target == "labels" else f"{len(facts.values):,} values"
    return f"{what} per {facts.target_per}"


def _splits(facts: DatasetFacts) -> str:
    headers = ["split", "rows", "entities", "frames", "targets", "shortest", "median", "99 % up to", "longest"]
    rows = [
        (
            s.split,
            s.rows,
            s.entities,
            s.frames,
            s.targets,
            s.length_min,
            round(s.length_median),
            round(s.length_p99),
            s.length_max,
        )
        for s in facts.splits
    ]
    return table(rows, headers)


def _labels(facts: DatasetFacts) -> str:
    if not facts.labels or not any(split.labels for split in facts.splits):
        return ""
    total = {label: sum(split.labels.get(label, 0) for split in facts.splits) for label in facts.labels}
    order = sorted(facts.labels, key=lambda label: -total[label])
    rows = [(label, *(split.labels.get(label, 0) for split in facts.splits)) for label in order[:SHOWN]]
    return table(rows, ["label", *(split.split for split in facts.splits)]) + _more(len(order))


def _channels(facts: DatasetFacts) -> str:
    return "" if facts.inputs == "tokens" or not facts.fitted_rows else _scales("channel", facts.channels, facts)


def _values(facts: DatasetFacts) -> str:
    return _scales("value", facts.values, facts) if facts.values else ""


def _scales(name: str, channels: Sequence[ChannelFacts], facts: DatasetFacts) -> str:
    rows = [(channel.name, channel.mean, channel.deviation) for channel in channels[:SHOWN]]
    fitted = f"\nfitted on {facts.fitted_rows:,} training rows"
    return table(rows, [name, "mean", "deviation"]) + _more(len(channels)) + fitted


def _more(count: int) -> str:
    return f"\n... and {count - SHOWN:,} more (--json)" if count > SHOWN else ""


def _span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def findings_text(findings: Sequence[Finding]) -> str:
    """What an audit found, one line a kind."""
    if not findings:
        return "no leaks found"
    rows = [(f.leak.value, "accepted" if f.accepted else "NOT accepted", f.detail) for f in findings]
    return table(rows, ["leak", "", "what was found"])


def listed_text(listed: Sequence[Listed]) -> str:
    """The data sets of a store, a line each."""
    rows = [
        (d.name, d.digest[:12], d.rows, format_bytes(d.num_bytes), d.num_blocks, d.made_at or None)
        if not d.damage
        else (d.name, d.digest[:12], None, None, None, d.made_at or None)
        for d in listed
    ]
    damage = [f"damaged: {d.damage}" for d in listed if d.damage]
    return "\n".join([table(rows, ["data", "digest", "rows", "size", "blocks", "made"]), *damage])


def damage_text(damage: Sequence[Damage]) -> str:
    """Each damaged place: its shard, its bytes, and the rows that are lost."""
    rows = [
        (d.block, d.key, f"{d.offset:,} to {d.offset + d.size:,}", f"{d.rows[0]:,} to {d.rows[1]:,}", d.what)
        for d in damage
    ]
    return table(rows, ["block", "shard", "bytes", "rows", "what"])

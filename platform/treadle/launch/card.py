"""The model card: what a registered model is, for the person who finds it later."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from treadle.data import Header
from treadle.launch.words import augment_words, split_words
from treadle.spec import JobSpec, Leak, SplitBy

__all__ = ["model_card"]


def model_card(spec: JobSpec, data: Header, metrics: Mapping[str, float], run: str) -> str:
    """A Markdown card with front matter as model hubs read it."""
    front = {
        "library_name": "treadle",
        "tags": [spec.model.kind, spec.task.kind, "recurrent"],
        "datasets": [spec.data.name],
        "metrics": sorted(metrics),
    }
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    kind = "bidirectional " if spec.model.bidirectional else ""
    return f"""---
{yaml.safe_dump(front, sort_keys=True).strip()}
---
# {spec.name}

{spec.summary}

## Model

A {kind}{spec.model.kind} with {spec.model.num_layers} x {spec.model.hidden_size} hidden units, trained for the task
`{spec.task.kind}`{_targets(data)}. Inputs up to {data.max_length} time steps.{_augmented(spec)}

## Data

`{spec.data.name}`: {data.licence}

{_data(spec, data)}

## Measured

| metric | value |
| --- | --- |
{rows}

## Lineage

run `{run}` · spec `{spec.digest[:12]}` · data recipe `{data.recipe[:12]}`
"""


def _targets(data: Header) -> str:
    if data.content.labels:
        return f" over {len(data.content.labels)} labels"
    return f" of {', '.join(data.content.value_names)}" if data.content.value_names else ""


def _augmented(spec: JobSpec) -> str:
    words = augment_words(spec.augment)
    return f" Training rows were changed at random: {words}." if words else ""


def _data(spec: JobSpec, data: Header) -> str:
    """How rows were split, and which of them count nowhere."""
    lines = [f"- Split {split_words(spec.split)}; what the source itself splits stays as it is."]
    if spec.split.by in (SplitBy.time, SplitBy.walk_forward):
        lines.append("- The numbers below are from rows later than those trained on.")
    elif not any(finding.leak is Leak.entity for finding in data.findings):
        lines.append("- The numbers below are from rows whose entity was never trained on.")
    lines += [f"- {count:,} rows are in no split: {reason}." for reason, count in (data.dropped or {}).items()]
    if data.set_aside:
        lines.append(f"- {data.set_aside:,} rows broke a rule and were set aside (`{data.quarantine}`).")
    lines += [f"- Accepted finding of the leakage audit, {f.leak.value}: {f.detail}" for f in data.findings]
    if not data.findings:
        lines.append("- The leakage audit found nothing.")
    return "\n".join(lines)

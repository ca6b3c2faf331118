"""The model card: what a registered model is, for the person who finds it later."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from treadle.data import Header
from treadle.spec import JobSpec

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
`{spec.task.kind}` over {len(data.preprocessing.labels)} labels. Inputs up to {data.max_length} time steps.

## Data

`{spec.data.name}`: {data.licence}

Splits are by entity; the numbers below are from rows whose entity was never trained on.

## Measured

| metric | value |
| --- | --- |
{rows}

## Lineage

run `{run}` · spec `{spec.digest[:12]}` · data recipe `{data.recipe[:12]}`
"""

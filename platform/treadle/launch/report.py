"""The report of a run, out of what the store holds of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from treadle import wire
from treadle.data import load_manifest
from treadle.errors import NotFoundError
from treadle.launch.records import read_job
from treadle.launch.view import plan_text
from treadle.plan import Plan
from treadle.spec import JobSpec
from treadle.store import Blobs, RunRecord, Runs, read_journal
from treadle.track import Example, LabelScore, ReportInput, catalogue, evaluation_names, read_metrics, render_report

__all__ = ["run_report"]

MAX_CONFUSIONS = 15
NUM_BUCKETS = 24


def run_report(blobs: Blobs, run: str) -> str:
    """One HTML page about a run, finished or not."""
    runs = Runs(blobs)
    record = runs.get(run)
    spec, plan = read_job(runs, record.run)
    status = runs.status(record.run)
    history = read_metrics(read_journal(blobs, f"runs/{record.run}/metrics.jsonl"))
    events = read_journal(blobs, f"runs/{record.run}/events.jsonl")
    end = status.end
    version = f"{spec.name}@{end.model_version}" if end and end.model_version else ""
    evaluation = _evaluation(blobs, record, status.attempt)
    times = [float(event["time"]) for event in events if "time" in event]
    split = "test" if plan.test_rows else "val"
    given = ReportInput(
        job=spec.name,
        run_id=record.run,
        status=status.state.value,
        history=history,
        catalogue=catalogue(spec.task),
        summary=spec.summary,
        model_version=version,
        started_s=min(times, default=None),
        duration_s=max(times) - min(times) if times else None,
        facts={
            "network": f"{'bidirectional ' if spec.model.bidirectional else ''}{spec.model.kind}",
            "parameters": f"{plan.parameters:,}",
            "ranks": str(plan.world),
            "precision": next((str(e["format"]) for e in events if e.get("event") == "precision"), "?"),
        },
        headline=[f"{split}/{name}" for name in evaluation_names(spec.task)[1:]],
        final=end.metrics if end else {},
        events=events,
        lengths=_lengths(blobs, spec, plan),
        plan=plan_text(spec, plan),
        spec=wire.encode(spec),
        lineage=_lineage(record, plan),
        made_by=f"treadle report {record.run}",
        **_details(evaluation),
    )
    return render_report(given)


def _evaluation(blobs: Blobs, record: RunRecord, attempt: int) -> dict[str, Any] | None:
    key = f"runs/{record.run}/model-a{attempt}/eval.json"
    try:
        return wire.parse_json(blobs.get(key), where=key)
    except NotFoundError:
        return None


def _details(evaluation: dict[str, Any] | None) -> dict[str, Any]:
    if evaluation is None or evaluation["test"] is None:
        return {}
    counts = np.array(evaluation["test"]["confusion"], np.int64)
    labels = [*evaluation["labels"][: len(counts) - 1], "(nothing)"]  # language models answer with none of them
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    worst = np.argsort(wrong, axis=None)[::-1][:MAX_CONFUSIONS]
    pairs = [(int(i) // len(labels), int(i) % len(labels)) for i in worst]
    scores = [
        LabelScore(
            label=label,
            count=int(counts[i].sum()),
            recall=counts[i, i] / max(1, counts[i].sum()),
            precision=counts[i, i] / max(1, counts[:, i].sum()),
        )
        for i, label in enumerate(labels[:-1])
    ]
    examples = [
        Example(input=s["inputs"], expected=s["expected"][0], predicted=s["answered"])
        for s in evaluation["test"]["samples"]
    ]
    return {
        "labels": scores,
        "confusions": [(labels[i], labels[j], int(wrong[i, j])) for i, j in pairs if wrong[i, j]],
        "examples": examples,
    }


def _lengths(blobs: Blobs, spec: JobSpec, plan: Plan) -> list[tuple[int, int, int]]:
    manifest = load_manifest(blobs, spec.data.name, plan.data_digest)
    lengths = manifest.columns["length"][manifest.rows_of("train")]
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, NUM_BUCKETS + 1).round().astype(int))
    counts, _ = np.histogram(lengths, bins=edges)
    return [(int(a), int(b), int(c)) for a, b, c in zip(edges[:-1], edges[1:], counts, strict=True)]


def _lineage(record: RunRecord, plan: Plan) -> dict[str, str]:
    code = record.info.get("code", {})
    return {
        "spec": plan.spec_digest,
        "data": plan.data_digest,
        "batches": plan.batch_digest,
        "code": f"{code.get('git', 'unknown')}{' with changes' if code.get('dirty') else ''}",
        "store": record.store,
    }

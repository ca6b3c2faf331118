"""A plan as people read it before anything runs."""

from __future__ import annotations

import enum
from dataclasses import fields

from treadle.launch.words import augment_words, split_words
from treadle.plan import Plan
from treadle.spec import JobSpec, ModelSpec
from treadle.units import format_bytes, format_count

__all__ = ["plan_text"]


_SAID = {"hidden_size", "num_layers", "bidirectional", "embedding_size"}


def _chosen(model: ModelSpec) -> str:
    """What a model has beside its size, where it is not as by default: norm, residual, conv_size 4."""
    words = []
    for field in fields(model):
        value = getattr(model, field.name)
        if field.name not in _SAID and value != field.default:
            shown = value.value if isinstance(value, enum.Enum) else value
            words.append(field.name if shown is True else f"{field.name} {shown}")
    return ", ".join(words)


def _streams(spec: JobSpec, plan: Plan) -> str:
    streams = f"{plan.lanes} x {spec.batch.streams} streams" if plan.lanes > 1 else f"{spec.batch.streams} streams"
    return (
        f"{plan.updates_per_epoch:,} updates an epoch of up to {spec.batch.chunk} frames of {streams}, "
        "the state carried on"
    )


def plan_text(spec: JobSpec, plan: Plan) -> str:
    """The plan as aligned lines: what is trained, on what, where, and how much of it."""
    model, directions = spec.model, "bidirectional " if spec.model.bidirectional else ""
    device = "GPU" if spec.cluster.gpus_per_worker else "CPU"
    ranks = "1 rank in the driver" if spec.cluster.workers == 0 else f"{plan.world} Ray Train workers"
    step = f"{plan.rows_per_update:.0f} rows"
    counts = spec.batch.budget.value
    found = "" if plan.slots_found == "given" else f" ({spec.batch.max_slots}: {plan.slots_found})"
    lines = {
        "job": f"{spec.name}: {spec.summary}" if spec.summary else spec.name,
        "model": f"{directions}{model.kind}, {model.num_layers} x {model.hidden_size}, "
        f"{plan.parameters:,} parameters, task {spec.task.kind}",
        **({"layers": chosen} if (chosen := _chosen(model)) else {}),
        "data": f"{spec.data.name} {plan.data_digest[:12]}: {plan.train_rows:,} rows to train on, "
        f"{plan.valid_rows:,} to watch, {plan.test_rows:,} to test",
        "split": split_words(spec.split),
        "lengths": f"{plan.length_min} to {plan.length_max} time steps, median {plan.length_median}, "
        f"99 % up to {plan.length_p99}; {format_count(plan.train_frames)} frames an epoch",
        "batches": _streams(spec, plan)
        if spec.batch.streams
        else f"{plan.updates_per_epoch:,} updates an epoch of {step}, fill {plan.fill:.1%}, "
        f"at most {plan.worst_slots:,} {counts} of {plan.max_slots:,}{found}",
        **({"augment": changes} if (changes := augment_words(spec.augment)) else {}),
        "training": f"{spec.train.epochs} epochs, about {plan.num_updates:,} updates, {spec.optim.kind} "
        f"at {spec.optim.lr:g} {spec.optim.schedule.value}, precision {spec.precision.mode.value}",
        "workers": f"{ranks} on the {device}, {spec.cluster.cpus_per_worker} CPU each, "
        f"about {format_bytes(plan.worker_bytes)} each",
        "keeps": f"a checkpoint every {spec.checkpoint.every}, the last {spec.checkpoint.keep_last}",
        "store": spec.store.uri,
        "tracking": f"metrics.jsonl in the store; W&B {spec.track.wandb.value}",
    }
    text = "\n".join(f"{name:<9} {line}" for name, line in lines.items())
    return "\n".join([text, *(f"warning   {line}" for line in plan.warnings)])

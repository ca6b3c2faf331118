"""What a plan says before anything runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from treadle.launch.view import _chosen, plan_text
from treadle.plan import Capacity, DataCard, SplitCard, make_plan
from treadle.spec import (
    AdamWSpec,
    AugmentSpec,
    BatchSpec,
    Candidate,
    ClassifySpec,
    ClusterSpec,
    DataSpec,
    GruSpec,
    InputKind,
    JobSpec,
    MinLstmSpec,
    Signature,
    SplitBy,
    SplitSpec,
    StoreSpec,
    TargetKind,
    TargetPer,
)

SPEC = JobSpec(
    name="toy",
    task=ClassifySpec(),
    model=GruSpec(hidden_size=8),
    data=DataSpec(name="toy"),
    split=SplitSpec(by=SplitBy.time, test=0.1, horizon=30),
    batch=BatchSpec(max_slots="2k"),
    optim=AdamWSpec(),
    cluster=ClusterSpec(workers=0),
    store=StoreSpec(uri="/nowhere"),
)


def told(spec: JobSpec) -> dict[str, str]:
    """The lines of a plan, by name."""
    rows = 500
    train = SplitCard(
        lengths_N=np.arange(rows, dtype=np.int64) % 50 + 1,
        targets_N=np.ones(rows, np.int64),
        label_frames_N=np.zeros(rows, np.int64),
        labels_N=np.arange(rows) % 3,
        weights_N=np.ones(rows, np.float32),
        num_entities=rows,
    )
    card = DataCard(
        name="toy",
        digest="0" * 64,
        signature=Signature(input_kind=InputKind.frames, input_size=4, num_labels=3, max_length=400),
        target=TargetKind.labels,
        target_per=TargetPer.row,
        splits={"train": train},
    )
    plan = make_plan(spec, card, Capacity(where="here", cpus=2, gpus=0, memory_bytes=8 << 30))
    return {line[:9].strip(): line[10:] for line in plan_text(spec, plan).splitlines()}


def test_layers_are_named_where_they_are_not_as_by_default() -> None:
    assert _chosen(GruSpec(hidden_size=64, num_layers=3, bidirectional=True)) == ""
    model = MinLstmSpec(norm=True, residual=True, conv_size=4, candidate=Candidate.tanh, normalize_gates=False)
    assert _chosen(model) == "residual, norm, conv_size 4, candidate tanh, normalize_gates False"


def test_split_and_limit_are_said_as_asked() -> None:
    lines = told(SPEC)
    assert lines["split"] == "by time, 10% to test, horizon 30"
    assert lines["batches"].endswith(" slots of 2,000")
    assert "augment" not in lines


def test_a_limit_that_was_found_and_what_is_augmented() -> None:
    lines = told(replace(SPEC, batch=BatchSpec(max_slots="auto"), augment=AugmentSpec(jitter=0.05)))
    assert lines["batches"].endswith(" (auto: estimated)")
    assert lines["augment"] == "jitter 0.05"

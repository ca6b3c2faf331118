"""Plans: what is refused, what is dropped, and that the arithmetic agrees with real networks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from treadle import wire
from treadle.errors import ConfigError, DataError, InfeasibleError
from treadle.plan import Capacity, DataCard, Plan, SplitCard, count_parameters, make_plan
from treadle.spec import (
    AdamWSpec,
    BatchSpec,
    ClassifySpec,
    ClusterSpec,
    CtcSpec,
    DataSpec,
    GruSpec,
    InputKind,
    JobSpec,
    LstmSpec,
    MinGruSpec,
    MinLstmSpec,
    MinSpec,
    Pooling,
    RnnSpec,
    Signature,
    StoreSpec,
)

TOKENS = Signature(input_kind=InputKind.tokens, input_size=30, num_labels=39, max_length=64)
FRAMES = Signature(input_kind=InputKind.frames, input_size=12, num_labels=9, max_length=64)
ROOMY = Capacity(where="a test", cpus=8, gpus=0, memory_bytes=0)


def job(**changes) -> JobSpec:
    spec = JobSpec(
        name="toy",
        task=CtcSpec(frames_per_step=2),
        model=LstmSpec(hidden_size=16),
        data=DataSpec(name="toy"),
        batch=BatchSpec(slots=64),
        optim=AdamWSpec(),
        store=StoreSpec(uri="/nowhere"),
    )
    return dataclasses.replace(spec, **changes)


def card(lengths=(3, 4, 5, 6), label_frames=(2, 9, 3, 12), split="train") -> DataCard:
    rows = SplitCard(
        lengths_N=np.array(lengths, np.int64),
        label_frames_N=np.array(label_frames, np.int64),
        num_entities=len(lengths),
    )
    return DataCard(name="toy", digest="d", signature=TOKENS, splits={split: rows})


def test_targets_that_have_no_alignment_are_left_out_and_said():
    plan = make_plan(job(), card(), ROOMY)
    assert (plan.train_rows, plan.dropped_rows) == (3, 1)
    assert any("1 training rows" in line for line in plan.warnings)


def test_a_plan_survives_the_wire():
    plan = make_plan(job(), card(), ROOMY)
    assert wire.unrecord(Plan, wire.record("plan", 1, plan), kind="plan", schema=1, where="x") == plan


def test_lanes_default_to_the_workers_and_may_not_be_fewer():
    assert make_plan(job(cluster=ClusterSpec(workers=3)), card(), ROOMY).lanes == 3
    with pytest.raises(ConfigError, match=r"batch\.lanes: got 1, expected at least cluster\.workers = 2"):
        make_plan(job(batch=BatchSpec(slots=64, lanes=1)), card(), ROOMY)


@pytest.mark.parametrize(
    ("cluster", "capacity", "words"),
    [
        (ClusterSpec(workers=9), ROOMY, "at most 8 CPUs on a test"),
        (ClusterSpec(workers=1, gpus_per_worker=1), ROOMY, "at most 0 GPUs"),
        (ClusterSpec(workers=2), Capacity(where="a test", cpus=8, gpus=0, memory_bytes=1000), "memory: 2 workers"),
    ],
)
def test_what_does_not_fit_is_refused(cluster, capacity, words):
    with pytest.raises(InfeasibleError, match=words) as refused:
        make_plan(job(cluster=cluster), card(), capacity)
    assert refused.value.exit_code == 3
    assert refused.value.hint


def test_no_training_rows_is_a_data_error():
    with pytest.raises(DataError, match="no training rows"):
        make_plan(job(), card(split="test"), ROOMY)


@pytest.mark.parametrize("cls", [RnnSpec, LstmSpec, GruSpec, MinGruSpec, MinLstmSpec])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"bidirectional": True, "num_layers": 3, "norm": True, "residual": True, "learned_state": True},
        {"num_layers": 2, "norm": True, "conv_size": 4, "mlp_factor": 1.7, "learned_state": True},
        {"num_layers": 2, "bidirectional": True, "expansion": 1.3},
        {"num_layers": 3, "attention_every": 2, "attention_window": 5, "mlp_factor": 2.0, "conv_size": 3},
        {"num_layers": 2, "attention_every": 1, "attention_heads": 2, "bidirectional": True, "norm": True},
    ],
)
@pytest.mark.parametrize(
    ("task", "signature"),
    [
        (CtcSpec(frames_per_step=3), TOKENS),
        (ClassifySpec(), FRAMES),
        (ClassifySpec(pooling=Pooling.attention), FRAMES),
    ],
)
def test_parameters_are_those_of_the_network(cls, more, task, signature):
    from treadle.nn import build_network

    if not issubclass(cls, MinSpec):
        more = {name: value for name, value in more.items() if name != "expansion"}
    model = cls(hidden_size=24, embedding_size=10, **more)
    network = build_network(model, task, signature)
    assert count_parameters(model, task, signature) == sum(p.numel() for p in network.parameters())

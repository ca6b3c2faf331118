"""Jobs over streams: what the plan says of them, what it refuses, and that its arithmetic is that of real networks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from treadle import wire
from treadle.data import Batch, Form
from treadle.errors import ConfigError, InfeasibleError
from treadle.launch.explain import explain_job
from treadle.launch.explain_view import explain_text
from treadle.launch.view import plan_text
from treadle.nn import build_network
from treadle.plan import (
    Capacity,
    DataCard,
    Plan,
    PlanInputs,
    Position,
    SplitCard,
    check_position,
    make_plan,
    plan_inputs,
)
from treadle.plan.size import count_parameters, training_bytes
from treadle.plan.streaming import carried_values
from treadle.spec import (
    AdamWSpec,
    AugmentSpec,
    BatchSpec,
    ClassifySpec,
    ClusterSpec,
    DataSpec,
    GruSpec,
    InputKind,
    JobSpec,
    LanguageSpec,
    LstmSpec,
    MinGruSpec,
    MinLstmSpec,
    ModelSpec,
    RnnSpec,
    Signature,
    StoreSpec,
    TagSpec,
    TargetKind,
    TargetPer,
)
from treadle.train import PrecisionChoice, build_optimizer, build_task
from treadle.train.budget import Learner, peak_of_update

TOKENS = Signature(input_kind=InputKind.tokens, input_size=30, num_labels=0, max_length=100_000)
FRAMES = Signature(input_kind=InputKind.frames, input_size=12, num_labels=9, max_length=100_000)
ROOMY = Capacity(where="a test", cpus=8, gpus=0, memory_bytes=0)
STREAMS = BatchSpec(max_slots="4096", lanes=2, streams=4, chunk=50)
LENGTHS = (np.arange(100) * 37) % 91 + 2


def job(**changes) -> JobSpec:
    spec = JobSpec(
        name="toy",
        task=LanguageSpec(),
        model=LstmSpec(hidden_size=16),
        data=DataSpec(name="toy"),
        batch=STREAMS,
        optim=AdamWSpec(),
        store=StoreSpec(uri="/nowhere"),
        cluster=ClusterSpec(workers=2),
    )
    return dataclasses.replace(spec, **changes)


def card(lengths=LENGTHS, *, signature=TOKENS, weight=1.0) -> DataCard:
    nothing = np.zeros(len(lengths), np.int64)
    split = SplitCard(
        lengths_N=np.array(lengths, np.int64),
        targets_N=nothing,
        label_frames_N=nothing,
        labels_N=nothing - 1,
        weights_N=np.full(len(lengths), weight, np.float32),
        num_entities=len(lengths),
    )
    frames = signature.input_kind is InputKind.frames
    return DataCard(
        name="toy",
        digest="d" * 64,
        signature=signature,
        target=TargetKind.labels if frames else TargetKind.none,
        target_per=TargetPer.frame if frames else TargetPer.row,
        splits={"train": split},
    )


def test_a_plan_of_streams_in_numbers():
    plan = make_plan(job(), card(), ROOMY)
    frames = int(LENGTHS.sum())
    longest = -(-frames // 8)
    assert plan.updates_per_epoch == -(-longest // 50)
    assert plan.num_updates == 10 * plan.updates_per_epoch
    assert (plan.train_frames, plan.train_rows, plan.lanes, plan.world) == (frames, 100, 2, 2)
    assert (plan.max_slots, plan.fill) == (200, 1.0)
    assert plan.worst_slots <= 200
    assert plan.warnings == ()
    assert wire.decode(Plan, wire.encode(plan)) == plan
    assert plan.batch_digest != make_plan(job(batch=dataclasses.replace(STREAMS, chunk=49)), card(), ROOMY).batch_digest
    text = plan_text(job(), plan)
    words = (
        f"batches   {plan.updates_per_epoch} updates an epoch of up to 50 frames of 2 x 4 streams, the state carried on"
    )
    assert words in text


def test_streams_are_explained():
    _, found = explain_job(job(batch=dataclasses.replace(STREAMS, lanes=3)), card(), ROOMY)
    assert (found.ranks, found.lanes, found.entries, found.pad) == (2, 3, 100, 0.0)
    assert found.time_balance == 0.75  # one rank has two lanes of three
    assert "4 to 4 rows a microbatch" in explain_text(found)


def test_one_update_an_epoch_is_said():
    plan = make_plan(job(batch=dataclasses.replace(STREAMS, chunk=1000)), card(), ROOMY)
    assert plan.updates_per_epoch == 1
    assert "no state is carried" in plan.warnings[0]


def test_rows_of_one_symbol_teach_nothing():
    plan = make_plan(job(), card([1, 40, 50, 1, 60]), ROOMY)
    assert (plan.train_rows, plan.dropped_rows) == (3, 2)
    assert "one symbol alone" in plan.warnings[-1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": GruSpec(bidirectional=True), "task": TagSpec()}, "model.bidirectional: got true, expected false"),
        ({"model": MinGruSpec(attention_every=1)}, "model.attention_window: got null, expected a number of frames"),
        ({"batch": dataclasses.replace(STREAMS, max_slots="auto")}, "batch.max_slots: got auto, expected a number"),
        ({"batch": dataclasses.replace(STREAMS, max_slots="199")}, "batch.max_slots: got 199, expected at least 200"),
        ({"batch": dataclasses.replace(STREAMS, rounds_per_update=2)}, "batch.rounds_per_update: got 2, expected 1"),
        ({"batch": dataclasses.replace(STREAMS, multiple_of=8)}, "batch.multiple_of: got 8, expected 1"),
        ({"augment": AugmentSpec(jitter=0.1), "task": TagSpec()}, "augment: got changes of rows, expected none"),
        ({"batch": dataclasses.replace(STREAMS, streams=9000, chunk=1, max_slots="1M")}, "2 x 9000 streams"),
    ],
)
def test_what_cannot_carry_a_state_is_refused(changes, words):
    signature = FRAMES if isinstance(changes.get("task"), TagSpec) else TOKENS
    with pytest.raises(ConfigError, match=r"batch\.streams: got") as refused:
        make_plan(job(**changes), card(signature=signature), ROOMY)
    assert words in refused.value.message


def test_tasks_and_rows_that_streams_have_no_place_for():
    labelled = dataclasses.replace(
        card(), target=TargetKind.labels, signature=dataclasses.replace(TOKENS, num_labels=3)
    )
    with pytest.raises(ConfigError, match="task: got classify, expected language or tag"):
        make_plan(job(task=ClassifySpec()), labelled, ROOMY)
    with pytest.raises(ConfigError, match=r"got rows of weight 0\.5, expected 1 each"):
        make_plan(job(), card(weight=0.5), ROOMY)


@pytest.mark.parametrize("batch", [STREAMS, BatchSpec()])
def test_a_language_model_reads_symbols_and_not_ahead(batch):
    with pytest.raises(ConfigError, match="which are frames of numbers, expected symbols"):
        make_plan(job(batch=batch), card(signature=FRAMES), ROOMY)
    with pytest.raises(ConfigError, match="it would see what it predicts"):
        make_plan(job(batch=batch, model=GruSpec(bidirectional=True)), card(), ROOMY)
    with pytest.raises(ConfigError, match="inputs are the targets"):
        make_plan(job(batch=batch, augment=AugmentSpec(time_masks=1)), card(), ROOMY)


def test_memory_counts_what_is_carried():
    small = Capacity(where="here", cpus=8, gpus=0, memory_bytes=1 << 30)
    wide = MinGruSpec(hidden_size=64, attention_every=1, attention_window=1 << 15)
    with pytest.raises(InfeasibleError, match="memory"):
        make_plan(job(model=wide, batch=dataclasses.replace(STREAMS, streams=80)), card(), small)


MODELS: list[ModelSpec] = [
    RnnSpec(hidden_size=6, num_layers=2),
    LstmSpec(hidden_size=6, num_layers=3, conv_size=3, embedding_size=5),
    MinGruSpec(hidden_size=6, expansion=2.0, conv_size=2, embedding_size=5),
    MinLstmSpec(hidden_size=8, num_layers=4, attention_every=2, attention_window=5),
]


@pytest.mark.parametrize("model", MODELS)
def test_carried_values_are_those_of_a_real_state(model):
    network = build_network(model, LanguageSpec(), TOKENS)
    state = network.stack.initial_state(3)
    assert carried_values(model, model.embedding_size) == sum(part.numel() for part in state.values()) / 3


@pytest.mark.parametrize("task", [LanguageSpec(), LanguageSpec(tied=True), TagSpec()])
@pytest.mark.parametrize("model", [*MODELS, GruSpec(hidden_size=64, embedding_size=64)])
def test_parameters_are_counted(task, model):
    signature = FRAMES if isinstance(task, TagSpec) else TOKENS
    network = build_network(model, task, signature)
    assert count_parameters(model, task, signature) == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("cell", [RnnSpec, LstmSpec, GruSpec, MinGruSpec, MinLstmSpec])
@pytest.mark.parametrize("classes", [8, 400])
def test_memory_of_frame_heads_is_within_15_percent(cell, classes):
    signature = dataclasses.replace(TOKENS, input_size=classes)
    model, task = cell(hidden_size=96, num_layers=2, embedding_size=64), LanguageSpec()
    network = build_network(model, task, signature).train()
    learner = Learner(
        network=network,
        optimizer=build_optimizer(AdamWSpec(), network),
        task=build_task(task, 0),
        precision=PrecisionChoice(name="fp32", device="cpu", why="", probe_ms={}),
        device=torch.device("cpu"),
        read=lambda _: pytest.fail("no data here"),
    )
    rows, steps = 8, 60
    batch = Batch(
        inputs=np.random.default_rng(0).integers(0, classes, rows * steps),
        lengths_B=np.full(rows, steps),
        labels_BU=np.zeros((rows, 0), np.int64),
        label_lengths_B=np.zeros(rows, np.int64),
        rows_B=np.arange(rows),
        weights_B=np.ones(rows, np.float32),
        form=Form.packed,
    )
    learner.update(batch)
    measured = peak_of_update(learner, batch)
    predicted = training_bytes(
        model, task, signature, AdamWSpec(), rows=rows, time_steps=steps, frames=rows * steps, world=1
    )
    assert abs(predicted / measured - 1) < 0.15, predicted / measured


def test_another_chunk_is_another_position():
    inputs = plan_inputs(STREAMS, LENGTHS, data="d" * 64, lanes=2, seed=0)
    assert (inputs.streams, inputs.chunk) == (4, 50)
    other = plan_inputs(dataclasses.replace(STREAMS, chunk=25), LENGTHS, data="d" * 64, lanes=2, seed=0)
    with pytest.raises(ConfigError, match=r"batch\.chunk: got 25, expected 50, with which the run began"):
        check_position(Position(inputs=inputs), other)
    plain = plan_inputs(BatchSpec(), LENGTHS, data="d" * 64, lanes=2, seed=0)
    assert (plain.streams, plain.chunk) == (0, 0)
    before = {name: value for name, value in wire.encode(plain).items() if name not in ("streams", "chunk")}
    assert wire.decode(PlanInputs, before) == plain

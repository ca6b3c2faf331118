"""Plans: what is refused, what is dropped, and that the arithmetic agrees with real networks."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle import wire
from treadle.errors import ConfigError, DataError, InfeasibleError
from treadle.plan import Capacity, DataCard, Plan, SplitCard, count_parameters, make_plan, plan_epoch, with_slots
from treadle.plan.size import training_bytes
from treadle.spec import (
    AdamWSpec,
    BatchSpec,
    Budget,
    ClassifySpec,
    ClassWeights,
    ClusterSpec,
    CtcSpec,
    DataSpec,
    GruSpec,
    InputKind,
    JobSpec,
    LongRows,
    LstmSpec,
    MinGruSpec,
    MinLstmSpec,
    MinSpec,
    Pooling,
    RnnSpec,
    Signature,
    StoreSpec,
    TargetKind,
    TargetPer,
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
        batch=BatchSpec(max_slots="64"),
        optim=AdamWSpec(),
        store=StoreSpec(uri="/nowhere"),
    )
    return dataclasses.replace(spec, **changes)


def card(
    lengths=(3, 4, 5, 6),
    label_frames=(2, 9, 3, 12),
    *,
    targets=None,
    labels=None,
    weights=None,
    split="train",
    target=TargetKind.labels,
    per=TargetPer.sequence,
) -> DataCard:
    num = len(lengths)
    rows = SplitCard(
        lengths_N=np.array(lengths, np.int64),
        targets_N=np.ones(num, np.int64) if targets is None else np.array(targets, np.int64),
        label_frames_N=np.array(label_frames, np.int64) if len(label_frames) == num else np.zeros(num, np.int64),
        labels_N=np.full(num, -1) if labels is None else np.array(labels),
        weights_N=np.ones(num, np.float32) if weights is None else np.array(weights, np.float32),
        num_entities=num,
    )
    return DataCard(name="toy", digest="d", signature=TOKENS, target=target, target_per=per, splits={split: rows})


def labelled(labels, lengths=None, **more) -> DataCard:
    return card(lengths or [4] * len(labels), (), labels=labels, per=TargetPer.row, **more)


CLASSIFY = dict(task=ClassifySpec())
REFERENCE = np.clip(np.exp(np.random.default_rng(0).normal(4.1, 0.98, 20_000)), 1, 2000).astype(int)


def test_targets_that_have_no_alignment_are_left_out_and_said():
    plan = make_plan(job(), card(), ROOMY)
    assert (plan.train_rows, plan.dropped_rows) == (3, 1)
    assert any("1 training rows" in line for line in plan.warnings)


def test_rows_without_weight_are_left_out():
    plan = make_plan(job(**CLASSIFY), labelled([0, 1, 0], weights=[1, 0, 0.5]), ROOMY)
    assert (plan.train_rows, plan.dropped_rows) == (2, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1])
def test_a_weight_that_counts_nothing_sensible_is_refused(bad):
    with pytest.raises(DataError, match=r"data\.toy: got weight .* of row 1"):
        make_plan(job(**CLASSIFY), labelled([0, 1, 0], weights=[1, bad, 1]), ROOMY)


def test_a_plan_survives_the_wire():
    plan = make_plan(job(), card(), ROOMY)
    assert wire.unrecord(Plan, wire.record("plan", 1, plan), kind="plan", schema=1, where="x") == plan


def test_lanes_default_to_the_workers_and_may_not_be_fewer():
    assert make_plan(job(cluster=ClusterSpec(workers=3)), card(), ROOMY).lanes == 3
    with pytest.raises(ConfigError, match=r"batch\.lanes: got 1, expected at least cluster\.workers = 2"):
        make_plan(job(batch=BatchSpec(max_slots="64", lanes=1)), card(), ROOMY)


def test_a_rank_without_a_row_is_refused_and_a_lane_without_one_is_said():
    with pytest.raises(ConfigError, match=r"cluster\.workers: got 4, expected at most 3") as refused:
        make_plan(job(cluster=ClusterSpec(workers=4)), card(), ROOMY)
    assert refused.value.hint == "cluster.workers=3"
    plan = make_plan(job(batch=BatchSpec(max_slots="64", lanes=8)), card(), ROOMY)
    assert any("8 lanes for 3 rows" in line for line in plan.warnings)


@pytest.mark.parametrize(
    ("task", "data", "words", "hint"),
    [
        (CtcSpec(), labelled([0, 1]), "got ctc on data toy, which have labels per row, expected labels per sequence",
         "task=classify"),
        (ClassifySpec(), card(), "got classify on data toy, which have labels per sequence, expected labels per row",
         "task=ctc"),
        (ClassifySpec(), card(target=TargetKind.values, per=TargetPer.row), "have values per row", "another data"),
        (ClassifySpec(), card(target=TargetKind.none, per=TargetPer.row), "have no targets", "another data"),
    ],
)  # fmt: skip
def test_a_task_that_wants_other_targets_is_refused(task, data, words, hint):
    with pytest.raises(ConfigError, match=words) as refused:
        make_plan(job(task=task), data, ROOMY)
    assert hint in refused.value.hint


def test_rare_labels_are_repeated():
    data = labelled([0] * 90 + [1] * 10)
    plain, balanced = (
        make_plan(job(batch=BatchSpec(max_slots="64", class_balance=power), **CLASSIFY), data, ROOMY)
        for power in (0.0, 1.0)
    )
    assert (plain.batches.entries, balanced.batches.entries) == (100, 180)
    assert balanced.train_rows == 100
    assert balanced.rows_per_update > 0.9 * 180 / balanced.updates_per_epoch
    with pytest.raises(ConfigError, match=r"batch\.class_balance: got 1, expected 0"):
        make_plan(job(batch=BatchSpec(max_slots="64", class_balance=1.0)), card(), ROOMY)
    twice = job(batch=BatchSpec(class_balance=1.0), task=ClassifySpec(class_weights=ClassWeights.balanced))
    assert any("both make rare labels count more" in line for line in make_plan(twice, data, ROOMY).warnings)


def test_a_plan_says_what_its_batches_cost():
    plan = make_plan(
        job(batch=BatchSpec(max_slots="2k"), **CLASSIFY), labelled([0] * 20_000, REFERENCE.tolist()), ROOMY
    )
    assert (plan.max_slots, plan.slots_found) == (2000, "given")
    assert plan.batches.ranks == plan.world == 2
    assert (plan.fill, plan.worst_slots) == (plan.batches.fill, plan.batches.worst_over_budget * 2000)
    assert plan.batches.pad < 0.06
    assert not plan.warnings


def auto(memory_bytes, lengths=REFERENCE, **more):
    spec = job(batch=BatchSpec(max_slots="auto", **more), **CLASSIFY)
    capacity = dataclasses.replace(ROOMY, memory_bytes=memory_bytes)
    return make_plan(spec, labelled([0] * len(lengths), [int(n) for n in lengths]), capacity)


def test_slots_are_estimated_from_memory_and_rounds():
    tight, roomy, unknown = auto(40 << 20), auto(64 << 30), auto(0)
    assert {plan.slots_found for plan in (tight, roomy, unknown)} == {"estimated"}
    assert tight.max_slots < roomy.max_slots
    assert tight.worker_bytes <= 20 << 20
    assert roomy.max_slots & (roomy.max_slots - 1) == 0
    assert 80 <= roomy.batches.rounds < 170
    assert unknown.max_slots == 4096
    assert auto(64 << 30, lanes=8).max_slots == roomy.max_slots // 4


def test_estimated_slots_hold_the_longest_row_unless_it_may_be_cut():
    lengths = [5] * 50 + [3001]
    assert auto(0, lengths).max_slots == 3001
    assert auto(0, lengths, multiple_of=8).max_slots == 3008
    plan = auto(0, lengths, long_rows=LongRows.chunk)
    assert (plan.max_slots, plan.batches.long_rounds) == (256, 1)


def test_few_rounds_are_said_with_what_helps():
    data = labelled([0] * len(REFERENCE), np.minimum(REFERENCE, 300).tolist())
    spec = job(batch=BatchSpec(max_slots="16k", lanes=8), **CLASSIFY)
    (warning,) = make_plan(spec, data, ROOMY).warnings
    assert "rounds an epoch over 8 lanes" in warning
    slots = warning.split("batch.max_slots=")[1].split(" ")[0]
    better = make_plan(job(batch=BatchSpec(max_slots=slots, lanes=8), **CLASSIFY), data, ROOMY)
    assert better.batches.rounds >= 80
    assert not better.warnings
    few = labelled([0] * 300, REFERENCE[:300].tolist())
    assert any("fewer lanes" in line for line in make_plan(spec, few, ROOMY).warnings)
    assert not make_plan(job(**CLASSIFY), labelled([0] * 50, [7] * 50), ROOMY).warnings  # few, and nothing is lost


def test_padding_to_a_multiple_is_said_to_do_nothing_for_frames():
    spec = job(batch=BatchSpec(max_slots="64", budget=Budget.frames, multiple_of=8), **CLASSIFY)
    assert any("multiple_of does nothing" in line for line in make_plan(spec, labelled([0] * 50), ROOMY).warnings)


def words_card(targets, lengths=(40,) * 320) -> DataCard:
    """Rows with so many targets each, none twice in a row."""
    return card(lengths, targets, targets=targets)


def test_memory_is_that_of_the_longest_target_of_a_microbatch():
    spec = job(batch=BatchSpec(max_slots="800"))

    def size(labels):
        return training_bytes(spec.model, spec.task, TOKENS, spec.optim, rows=20, time_steps=40, labels=labels, world=2)

    assert {n: make_plan(spec, words_card([n] * 320), ROOMY).worker_bytes for n in (3, 70)} == {
        n: size(n) for n in (3, 70)
    }
    assert size(70) > 1.2 * size(3)
    for row in (0, 170, 319):  # whichever microbatch it falls into
        mixed = [70 if n == row else 3 for n in range(320)]
        assert make_plan(spec, words_card(mixed), ROOMY).worker_bytes == size(70)
    left_out = words_card([*[3] * 319, 90])  # needs more label frames than the row has
    assert make_plan(spec, left_out, ROOMY).worker_bytes == size(3)


def test_a_long_target_in_a_smaller_microbatch_is_seen():
    # 2 rows of 40 frames fill their microbatch; 26 of 3 frames leave slots unused and have the longer targets.
    lengths = [40] * 20 + [3] * 260
    spec = job(batch=BatchSpec(max_slots="80", lanes=2), task=CtcSpec(frames_per_step=20), model=RnnSpec(hidden_size=4))
    short, long = (make_plan(spec, words_card([2] * 20 + [n] * 260, lengths), ROOMY).worker_bytes for n in (2, 60))
    assert long > 1.4 * short


def test_slots_estimated_from_memory_leave_room_for_the_targets():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 60, 20_000)
    spec = job(batch=BatchSpec(max_slots="auto"))
    tight = dataclasses.replace(ROOMY, memory_bytes=40 << 20)
    few, many = (make_plan(spec, words_card(lengths // by * 2, lengths), tight) for by in (20, 1))
    assert many.max_slots < few.max_slots
    assert many.worker_bytes <= 20 << 20


ONE_LONG_AMONG_SHORT = [4096, 2000, *[20] * 3000]


def most_by_microbatch(spec, data, plan):
    """What `training_bytes` says of each microbatch of epoch 0, one by one; the most of them."""
    train = data.splits["train"]
    batch = with_slots(spec.batch, plan.max_slots)
    epoch = plan_epoch(train.lengths_N, batch, lanes=plan.lanes, seed=spec.train.seed, epoch=0)
    found = []
    for place in itertools.product(range(epoch.num_rounds), range(epoch.lanes)):
        rows = epoch.lane_rows(*place)
        if len(rows):
            num_pieces = epoch.pieces(place[0])
            frames = epoch.steps(*place) if num_pieces > 1 else int(train.lengths_N[rows].sum())
            found.append(
                training_bytes(
                    spec.model,
                    spec.task,
                    TOKENS,
                    spec.optim,
                    rows=len(rows),
                    time_steps=epoch.steps(*place),
                    frames=frames if batch.budget is Budget.frames else None,
                    labels=int(train.targets_N[rows].max()),
                    world=plan.world,
                )
            )
    return max(found)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 200), min_size=2, max_size=60),
    st.sampled_from([LstmSpec, GruSpec, MinGruSpec]),
    st.sampled_from([ClassifySpec(), CtcSpec(frames_per_step=2)]),
    st.sampled_from(Budget),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_memory_is_that_of_the_microbatch_that_takes_most(lengths, cell, task, budget, cut, chance):
    cut = cut and isinstance(task, ClassifySpec)
    targets = [chance.randint(1, n) for n in lengths]
    data = (labelled if isinstance(task, ClassifySpec) else words_card)(
        *([[0] * len(lengths), lengths] if isinstance(task, ClassifySpec) else [targets, lengths])
    )
    batch = BatchSpec(
        max_slots="60" if cut else "300", budget=budget, long_rows=LongRows.chunk if cut else LongRows.refuse
    )
    spec = job(model=cell(hidden_size=16), task=task, batch=batch)
    plan = make_plan(spec, data, ROOMY)
    assert plan.worker_bytes == pytest.approx(most_by_microbatch(spec, data, plan), abs=2)


@pytest.mark.parametrize("model", [LstmSpec(hidden_size=16), MinGruSpec(hidden_size=16)])
@pytest.mark.parametrize("task", [ClassifySpec(), CtcSpec()])
def test_a_budget_of_frames_is_sized_by_padded_rows_where_the_network_pads(model, task):
    lengths = ONE_LONG_AMONG_SHORT
    data = labelled([0] * len(lengths), lengths) if isinstance(task, ClassifySpec) else words_card([1] * 3002, lengths)
    batch, cluster = BatchSpec(max_slots="4096", budget=Budget.frames), ClusterSpec(workers=1)
    spec = job(model=model, task=task, batch=batch, cluster=cluster)
    plan = make_plan(spec, data, ROOMY)
    assert plan.worst_slots == 4096
    sizes = dict(rows=100, time_steps=2000, frames=4000, labels=1, world=1)  # the second round has a few more
    padded = training_bytes(spec.model, spec.task, TOKENS, spec.optim, **sizes)
    warned = [line for line in plan.warnings if "batch.budget=slots" in line]
    if isinstance(model, MinGruSpec) and isinstance(task, ClassifySpec):
        assert not warned
        assert plan.worker_bytes < padded * 2
    else:
        assert plan.worker_bytes >= padded
        assert len(warned) == 1
        assert ("lstm" if isinstance(model, LstmSpec) else "ctc") in warned[0]
        tight = dataclasses.replace(ROOMY, memory_bytes=plan.worker_bytes - 1)
        with pytest.raises(InfeasibleError, match="memory") as refused:
            make_plan(spec, data, tight)
        assert refused.value.hint.startswith("batch.budget=slots")


def test_many_short_rows_keep_a_state_each():
    data = labelled([0] * 9001, [4096, *[1] * 9000])
    spec = job(batch=BatchSpec(max_slots="4096"), cluster=ClusterSpec(workers=1), model=LstmSpec(hidden_size=64))
    short = training_bytes(spec.model, ClassifySpec(), TOKENS, spec.optim, rows=4096, time_steps=1, world=1)
    long = training_bytes(spec.model, ClassifySpec(), TOKENS, spec.optim, rows=1, time_steps=4096, world=1)
    assert short > 1.5 * long
    assert make_plan(dataclasses.replace(spec, **CLASSIFY), data, ROOMY).worker_bytes == short


@pytest.mark.parametrize("budget", list(Budget))
def test_estimated_slots_leave_room_for_the_worst_microbatch(budget):
    lengths = [1000, *[5] * 100_000]
    spec = job(batch=BatchSpec(max_slots="auto", budget=budget, lanes=2), **CLASSIFY)
    capacity = dataclasses.replace(ROOMY, memory_bytes=40 << 20)
    plan = make_plan(spec, labelled([0] * len(lengths), lengths), capacity)
    assert plan.worker_bytes <= 20 << 20


def test_a_worker_fits_into_a_node():
    spec = job(cluster=ClusterSpec(workers=1), **CLASSIFY)
    data = labelled([0, 1, 0, 1])
    size = make_plan(spec, data, ROOMY).worker_bytes
    nodes = dataclasses.replace(ROOMY, memory_bytes=8 * size, node_bytes=size)
    assert make_plan(spec, data, nodes).worker_bytes == size
    with pytest.raises(InfeasibleError, match=r"memory: .* for a worker, expected at most .* a node on a test"):
        make_plan(spec, data, dataclasses.replace(nodes, node_bytes=size - 1))
    lengths = REFERENCE.tolist()
    found = job(cluster=ClusterSpec(workers=1), batch=BatchSpec(max_slots="auto"), **CLASSIFY)
    one, many = (
        make_plan(found, labelled([0] * len(lengths), lengths), dataclasses.replace(ROOMY, **place))
        for place in (dict(memory_bytes=40 << 20), dict(memory_bytes=4 << 30, node_bytes=40 << 20))
    )
    assert many.max_slots == one.max_slots


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

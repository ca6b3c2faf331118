"""What an epoch would be, of a bare list of lengths and of a job; bad lists are refused by name."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import ConfigError, DataError, InfeasibleError
from treadle.launch.explain import explain_job, explain_lengths, read_lengths
from treadle.launch.explain_view import explain_picture, explain_text
from treadle.plan import Capacity, DataCard, SplitCard, plan_epoch
from treadle.spec import (
    AdamWSpec,
    BatchSpec,
    ClassifySpec,
    ClusterSpec,
    DataSpec,
    GruSpec,
    InputKind,
    JobSpec,
    Signature,
    StoreSpec,
    TargetKind,
    TargetPer,
)
from treadle.track.screen import cells

LENGTHS = np.random.default_rng(0).geometric(0.02, 3000).clip(1, 400).astype(np.int64)


def npy(array: np.ndarray, **options: bool) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, **options)
    return sink.getvalue()


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.uint32, ">i4"])
def test_lengths_are_read_whatever_their_width(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "l.npy"
    path.write_bytes(npy(np.array([3, 1, 200], dtype)))
    assert read_lengths(path).tolist() == [3, 1, 200]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npy(np.array([3, -1])), "got length -1 of row 1"),
        (npy(np.array([0, 3])), "got length 0 of row 0"),
        (npy(np.array([1 << 40])), "got length 1099511627776 of row 0"),
        (npy(np.array([1.0])), r"got float64 of shape \(1,\)"),
        (npy(np.array([5], "m8[s]")), r"got timedelta64\[s\] of shape \(1,\)"),
        (npy(np.array([True])), r"got bool of shape \(1,\)"),
        (npy(np.array(5)), r"got int64 of shape \(\)"),
        (npy(np.ones((2, 2), int)), r"got int64 of shape \(2, 2\)"),
        (npy(np.array([], int)), "got no rows"),
        (npy(np.array([{}], object), allow_pickle=True), "got no plain array"),
        (npy(np.arange(1, 9))[:-3], "got no plain array"),
        (b"PK\x03\x04", "got no .npy file"),
        (b"1\n2\n", "got no .npy file"),
        (b"", "got no .npy file"),
    ],
)
def test_what_is_no_list_of_lengths(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "l.npy"
    path.write_bytes(data)
    with pytest.raises(DataError, match=words) as refused:
        read_lengths(path)
    assert str(path) in refused.value.message
    assert "pickle" not in refused.value.message


@pytest.mark.parametrize("name", ["missing.npy", "."])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^--lengths: got"):
        read_lengths(tmp_path / name)


def test_lengths_are_planned_as_a_job_would() -> None:
    batch = BatchSpec(max_slots="2k", rounds_per_update=2)
    found = explain_lengths(LENGTHS, batch, ranks=4, seed=3)
    plan = plan_epoch(LENGTHS, batch, lanes=4, seed=3, epoch=0)
    assert (found.updates, found.frames, found.slots) == (plan.num_updates, int(LENGTHS.sum()), plan.slots)
    assert found.pad == pytest.approx(1 - LENGTHS.sum() / plan.slots)
    assert found.worst_over_budget <= 1.0
    assert found.plan_s > 0
    with pytest.raises(ConfigError, match=r"^--lanes: got 2, expected at least --ranks = 4"):
        explain_lengths(LENGTHS, replace(batch, lanes=2), ranks=4, seed=0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (dict(ranks=10**9), r"^--ranks: got 1000000000, expected .*4096"),
        (dict(lanes=100_000), r"^--lanes: got 100000, expected .*4096"),
        (dict(seed=10**20), r"^--seed: got 100000000000000000000, expected .*2147483648"),
        (dict(slots="999999999999999999g"), r"^batch\.max_slots: got 999,999,.*, expected at most 1,099,"),
    ],
)
def test_numbers_that_no_job_may_have_are_refused(flags: dict[str, Any], words: str) -> None:
    given = dict(ranks=1, lanes=None, seed=0, slots="2k") | flags
    batch = BatchSpec(max_slots=given["slots"], lanes=given["lanes"])
    with pytest.raises(ConfigError, match=words):
        explain_lengths(LENGTHS, batch, ranks=given["ranks"], seed=given["seed"])


SPEC = JobSpec(
    name="toy",
    task=ClassifySpec(),
    model=GruSpec(hidden_size=8),
    data=DataSpec(name="toy"),
    batch=BatchSpec(max_slots="2k"),
    optim=AdamWSpec(),
    cluster=ClusterSpec(workers=2),
    store=StoreSpec(uri="/nowhere"),
)
HERE = Capacity(where="here", cpus=2, gpus=0, memory_bytes=8 << 30)


def card() -> DataCard:
    rows = len(LENGTHS)
    train = SplitCard(
        lengths_N=LENGTHS,
        targets_N=np.ones(rows, np.int64),
        label_frames_N=np.zeros(rows, np.int64),
        labels_N=np.arange(rows) % 3,
        weights_N=np.ones(rows, np.float32),
        num_entities=rows,
    )
    return DataCard(
        name="toy",
        digest="0" * 64,
        signature=Signature(input_kind=InputKind.frames, input_size=4, num_labels=3, max_length=400),
        target=TargetKind.labels,
        target_per=TargetPer.row,
        splits={"train": train},
    )


def test_a_job_is_explained_as_it_is_planned() -> None:
    plan, found = explain_job(SPEC, card(), HERE)
    assert replace(found, plan_s=0.0) == plan.batches
    assert (plan.world, found.ranks) == (2, 2)


def test_more_ranks_than_the_place_has() -> None:
    plan, found = explain_job(SPEC, card(), HERE, ranks=8)
    assert (plan.world, found.ranks, found.lanes) == (8, 8, 8)
    with pytest.raises(ConfigError, match=r"batch\.lanes: got 4, expected at least cluster\.workers = 8"):
        explain_job(replace(SPEC, batch=BatchSpec(lanes=4)), card(), HERE, ranks=8)
    with pytest.raises(ConfigError, match=r"^--ranks: got 5000, expected"):
        explain_job(SPEC, card(), HERE, ranks=5000)


def test_a_job_that_does_not_fit_into_the_memory_is_refused() -> None:
    with pytest.raises(InfeasibleError, match="memory"):
        explain_job(SPEC, card(), replace(HERE, memory_bytes=1 << 10))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 4), st.integers(40, 140), st.booleans())
def test_text_and_picture_of_any_lengths(lengths: list[int], ranks: int, width: int, plain: bool) -> None:
    found = explain_lengths(np.array(lengths), BatchSpec(max_slots="300"), ranks=ranks, seed=0)
    text = explain_text(found, head="x", width=width, ascii_only=plain)
    assert f"{found.pad:.1%} is padding" in text
    bars = text.split("\n\n", 1)[1].splitlines()
    assert all(cells(line) <= max(width, 52) for line in bars)
    assert text.isascii() or not plain
    picture = explain_picture(found, head="<&>")
    assert picture.count("zones part at") == len({zone.longest for zone in found.zones[:-1]})
    assert "&lt;&amp;&gt;" in picture


def test_the_picture_says_what_the_budget_counts() -> None:
    found = explain_lengths(LENGTHS, BatchSpec(max_slots="2k"), ranks=1, seed=0)
    picture = explain_picture(found, counts="frames")
    assert "2,000 frames a microbatch" in picture
    assert "% of frames" in picture
    assert "slots" not in picture

"""Views: a planted leak of each kind fails, its clean twin passes, and what is accepted stays on record."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from row_tables import frames_table, table, tokens_table

from treadle import wire
from treadle.data.build.pipeline import build_rows
from treadle.data.draft import Draft, Frames, Labels, Row
from treadle.data.load.reader import RowReader
from treadle.data.manifest import NO_SPLIT, Manifest
from treadle.data.splits.fit import fit_preprocessing
from treadle.data.splits.view import make_view
from treadle.errors import ConfigError, DataError
from treadle.spec import DataSpec, Leak, Missing, SplitBy, SplitSpec
from treadle.testing.memory import MemoryBlobs

TRAIN, VALID, TEST = range(3)
DATA = DataSpec(name="toy")
ENTITY = SplitSpec(valid=0.2, test=0.2, seed=1)
N = 200


def entity_leak(*, planted):
    # The source says the split, and says it of two rows of one person.
    return frames_table(
        N, entity=["a", "a" if planted else "b", *map(str, range(2, N))], split=[0, 2] + [255] * (N - 2)
    )


def window_leak(*, planted):
    time = np.arange(N, dtype=float)
    time[150:] += 0 if planted else 10
    return frames_table(N, time=time, last=time, split=[TRAIN] * 100 + [VALID] * 50 + [TEST] * 50)


def content_leak(*, planted):
    rows, reader = frames_table(N)
    values = list(reader.values)
    split = np.zeros(N, np.uint8)
    split[[20, 30]] = VALID, TEST
    values[20] = values[30 if planted else 20]
    label = rows.columns["label"].copy()
    label[20] = label[30]
    return table(values, channels=["a", "b", "c"], labels=("no", "yes"), label=label.tolist(), split=split.tolist())


def future_leak(*, planted):
    time = np.arange(N, dtype=float)
    return frames_table(N, time=time, last=time + 1 * planted * (time == 77))


def feature_leak(*, planted):
    rows, reader = frames_table(N)
    label = rows.columns["label"]
    values = [v + np.float32(9 * planted * y) for v, y in zip(reader.values, label, strict=True)]
    return table(values, channels=["a", "b", "c"], labels=("no", "yes"), label=label.tolist())


PLANTED = {
    Leak.entity: (entity_leak, ENTITY),
    Leak.window: (window_leak, SplitSpec(horizon=5)),
    Leak.content: (content_leak, SplitSpec()),
    Leak.future: (future_leak, ENTITY),
    Leak.feature: (feature_leak, ENTITY),
}


@pytest.mark.parametrize("leak", PLANTED, ids=lambda leak: leak.value)
def test_a_planted_leak_fails_and_its_clean_twin_passes(leak):
    make, split = PLANTED[leak]
    if leak is Leak.window:  # the clean twin keeps the distance, at both borders
        clean = frames_table(N, time=np.arange(N) + 10.0 * (np.arange(N) >= 100), split=[TRAIN] * 100 + [TEST] * 100)
    else:
        clean = make(planted=False)
    assert make_view(*clean, DATA, split).header.findings == ()
    with pytest.raises(DataError) as error:
        make_view(*make(planted=True), DATA, split)
    assert error.value.context == {"leaks": [leak.value]}
    assert f"\n- {leak.value}: " in error.value.message
    assert error.value.hint.startswith(f"data.allow_leaks=[{leak.value}]")
    allowed = dataclasses.replace(DATA, allow_leaks=[leak])
    view = make_view(*make(planted=True), allowed, split)
    (finding,) = view.header.findings
    assert finding.accepted
    assert finding.leak is leak
    assert finding.detail in error.value.message


@pytest.mark.parametrize("make", [frames_table, tokens_table])
def test_statistics_of_all_rows_fail_and_those_of_training_rows_pass(make):
    rows, reader = make(N, **({"num_symbols": 900} if make is tokens_table else {}))
    everything = fit_preprocessing(rows, np.zeros(N, np.uint8), reader, DATA)
    with pytest.raises(DataError, match=r"- statistics: ") as error:
        make_view(rows, reader, DATA, ENTITY, preprocessing=everything)
    assert error.value.context == {"leaks": ["statistics"]}
    fitted = make_view(rows, reader, DATA, ENTITY)
    again = make_view(rows, reader, DATA, ENTITY, preprocessing=fitted.preprocessing)
    assert again.to_bytes() == fitted.to_bytes()
    allowed = dataclasses.replace(DATA, allow_leaks=[Leak.statistics])
    used = make_view(rows, reader, allowed, ENTITY, preprocessing=everything)
    assert used.preprocessing == everything
    assert [finding.leak for finding in used.header.findings] == [Leak.statistics]


def test_all_leaks_are_told_at_once():
    time = np.arange(N, dtype=float)
    rows = frames_table(
        N, entity=["a"] * 2 + list(map(str, range(2, N))), split=[0, 2] + [0] * (N - 2), last=time + 1, time=time
    )
    with pytest.raises(DataError) as error:
        make_view(*rows, dataclasses.replace(DATA, allow_leaks=[Leak.content]), SplitSpec(horizon=1))
    assert error.value.context == {"leaks": ["entity", "window", "future"]}
    assert "data.toy: got 3 leaks" in error.value.message
    assert "[content,entity,future,window]" in error.value.hint


def test_a_view_is_a_manifest_of_the_same_blocks():
    time = np.arange(N, dtype=float)
    rows, reader = frames_table(N, time=time, last=time)
    split = SplitSpec(by=SplitBy.time, valid=20, test=0.2, horizon=3)
    view = make_view(rows, reader, DATA, split)
    assert view.header.blocks == rows.header.blocks
    assert view.header.content == rows.header.content
    assert view.header.split == wire.encode(split)
    assert view.header.dropped == {"purged": 6}
    counts = [len(view.rows_of(name)) for name in ("train", "valid", "test")]
    assert counts == [N - 66, 20, 40]
    assert (view.columns["split"] == NO_SPLIT).sum() == 6
    assert view.preprocessing.fitted_rows == N - 66
    assert view.preprocessing == fit_preprocessing(rows, view.columns["split"], reader, DATA)
    assert (rows.columns["split"] == NO_SPLIT).all()  # the table of rows is as it was
    assert make_view(rows, reader, DATA, split).to_bytes() == view.to_bytes()


def test_an_empty_training_split_is_refused():
    with pytest.raises(DataError, match="nothing to train on"):
        make_view(*frames_table(4, split=[2, 2, 1, 1]), DATA, SplitSpec())


def test_preprocessing_of_another_form_is_refused():
    rows, reader = frames_table(N)
    fitted = make_view(rows, reader, DATA, ENTITY).preprocessing
    for changes in ({"channels": ("x", "y", "z")}, {"labels": ("no",)}, {"gap": (0.0, 1.0)}, {"symbols": ("a",)}):
        with pytest.raises(ConfigError, match=f"preprocessing: got {next(iter(changes))}"):
            make_view(rows, reader, DATA, ENTITY, preprocessing=dataclasses.replace(fitted, **changes))


def test_a_view_of_a_built_data_set():
    """The real way: a draft, its shards in a store, and a reader of them."""
    rng = np.random.default_rng(0)
    shelf = MemoryBlobs()
    draft = Draft(
        rows=[
            Row(
                entity=f"p{i // 2}",
                inputs=np.where(rng.random((i % 7 + 1, 2)) < 0.2, np.nan, rng.normal(3, 2, size=(i % 7 + 1, 2))),
                target="ab"[i % 2],
                time=float(i),
                times=np.arange(i - i % 7, i + 1.0),
            )
            for i in range(300)
        ],
        inputs=Frames(channels=("x", "y"), missing=True),
        target=Labels(),
        licence="none",
    )
    data = DataSpec(name="toy", missing=Missing.indicator, gaps=True)
    _, rows = build_rows(draft, data, shelf, recipe="r")
    split = SplitSpec(by=SplitBy.time, test=60, valid=30, horizon=2, disjoint=True)
    with RowReader(shelf, rows) as reader:
        view = make_view(rows, reader, data, split)
        train = reader.raw(view.rows_of("train"))
    read = Manifest.from_bytes(view.to_bytes(), where="view", digest=wire.digest(view.to_bytes()))
    assert read.header == view.header
    assert view.header.dropped == {"purged": 4}
    assert len(view.rows_of("train")) == 300 - 60 - 30 - 4
    assert sorted(view.columns["time"][view.rows_of("test")]) == list(range(240, 300))
    frames = train.values.reshape(-1, 2).astype(np.float64)
    np.testing.assert_allclose(view.preprocessing.mean, np.nanmean(frames, axis=0), rtol=1e-12)
    np.testing.assert_allclose(view.preprocessing.deviation, np.nanstd(frames, axis=0), rtol=1e-12)
    assert train.gaps_N is not None
    np.testing.assert_allclose(view.preprocessing.gap[0], np.log1p(train.gaps_N.astype(np.float64)).mean(), rtol=1e-12)
    assert view.preprocessing.input_size == 5

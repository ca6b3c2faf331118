"""Copying rows into batches: C and NumPy alike, against plain loops and torch's padding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reader_rig import Toy, assert_same, expected, expected_frames, toy
from torch.nn.utils.rnn import pad_sequence

from treadle import native
from treadle.data.load import gather_native
from treadle.data.load.batch import Form
from treadle.data.load.buffers import Buffers, aligned
from treadle.data.load.gather import Gather, NumpyGather
from treadle.data.load.gather_native import NativeGather, best_gather, gather_status
from treadle.data.load.reader import RowReader
from treadle.errors import IntegrityError
from treadle.spec import Missing, TargetKind, TargetPer
from treadle.testing import MemoryBlobs

FORMS = list(Form)


def gathers() -> list[Gather]:
    found: list[Gather] = [NumpyGather()]
    return [best_gather(), *found] if gather_status().available else found


@pytest.fixture(params=["C", "NumPy"])
def gather(request: pytest.FixtureRequest) -> Gather:
    if request.param == "NumPy":
        return NumpyGather()
    if not gather_status().available:
        pytest.skip(gather_status().detail)
    return best_gather()


def reader_of(data: Toy, gather: Gather) -> RowReader:
    return RowReader(data.write(MemoryBlobs()), data.manifest, gather=gather)


def poisoned() -> Buffers:
    """Memory full of NaN, before its first use too."""

    def allocate(size: int) -> np.ndarray:
        data = aligned(size)
        data.view(np.float32).fill(np.nan)
        return data

    return Buffers(allocate, poison=True)


INPUTS = {
    "symbols": {"channels": 0},
    "one channel": {"channels": 1},
    "five channels": {"channels": 5},
    "eight channels": {"channels": 8},
    "sixteen channels": {"channels": 16},
    "mean of missing": {"channels": 5, "missing": Missing.mean},
    "indicator": {"channels": 3, "missing": Missing.indicator},
    "gap": {"channels": 4, "timed": True, "gap": True},
    "indicator and gap": {"channels": 8, "missing": Missing.indicator, "timed": True, "gap": True},
    "times without gap": {"channels": 0, "timed": True},
}
TARGETS = {
    "none": {"target": TargetKind.none},
    "label": {},
    "labels of frames": {"per": TargetPer.frame},
    "label sequence": {"per": TargetPer.sequence},
    "values": {"target": TargetKind.values},
    "values of frames": {"target": TargetKind.values, "per": TargetPer.frame, "num_values": 3},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("inputs", "target"), [*((i, "label") for i in INPUTS), *(("gap", t) for t in TARGETS)])
def test_every_kind_of_row_is_what_a_plain_loop_gives(gather: Gather, inputs: str, target: str, form: Form) -> None:
    data = toy(**INPUTS[inputs], **TARGETS[target])
    reader, buffers = reader_of(data, gather), poisoned()
    rng = np.random.default_rng(1)
    for size in (1, 2, 7, 60):
        lease = buffers.lease()
        rows = rng.integers(0, len(data.inputs), size)
        assert_same(reader.batch(rows, form=form, lease=lease), expected(data, rows.tolist(), form))
        wide = 3 + max(len(data.inputs[row]) for row in rows)
        assert_same(
            reader.batch(rows, form=form, steps=wide, lease=lease), expected(data, rows.tolist(), form, steps=wide)
        )
        lease.release()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("inputs", ["symbols", "indicator and gap"])
def test_pieces_of_rows(gather: Gather, inputs: str, target: str, form: Form) -> None:
    data = toy(**INPUTS[inputs], **TARGETS[target])
    reader, buffers = reader_of(data, gather), poisoned()
    rng = np.random.default_rng(2)
    for _ in range(5):
        rows = rng.integers(0, len(data.inputs), 20)
        starts = np.array([rng.integers(0, len(data.inputs[row])) for row in rows])
        stops = np.array([rng.integers(a + 1, len(data.inputs[r]) + 1) for a, r in zip(starts, rows, strict=True)])
        lease = buffers.lease()
        got = reader.batch(rows, form=form, starts_B=starts, stops_B=stops, lease=lease)
        spans = list(zip(starts.tolist(), stops.tolist(), strict=True))
        assert_same(got, expected(data, rows.tolist(), form, spans))
        lease.release()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inputs", ["symbols", "sixteen channels", "indicator and gap"])
def test_several_batches_at_once_are_what_each_is_alone(gather: Gather, inputs: str, form: Form) -> None:
    data = toy(**INPUTS[inputs], per=TargetPer.sequence)
    reader, lease = reader_of(data, gather), poisoned().lease()
    rng = np.random.default_rng(3)
    parts = [rng.integers(0, len(data.inputs), size) for size in (4, 1, 30)]
    steps = [40, 0, 35]
    found = reader.batches(parts, form=form, steps=steps, lease=lease)
    for batch, rows, wide in zip(found, parts, steps, strict=True):
        assert_same(batch, expected(data, rows.tolist(), form, steps=wide))
    for batch, rows in zip(reader.batches(parts, form=form), parts, strict=True):
        assert_same(batch, expected(data, rows.tolist(), form))


def test_rows_of_other_lengths_in_between_do_no_harm(gather: Gather) -> None:
    # Of counts 2, 1, 2, 3, 2 the first and the last are as far apart as if all were 2; the one between is not.
    data = toy(120, per=TargetPer.sequence, rows_per_block=60)
    reader = reader_of(data, gather)
    counts = np.array([len(target) for target in data.targets]).reshape(2, 60)
    for block, count in itertools.product(range(2), range(1, 6)):
        alike = np.flatnonzero(counts[block] == count) + 60 * block
        for rows in itertools.combinations(alike.tolist(), 3):
            labels_BU, _ = reader.labels(np.array(rows))
            wanted = [[1, 2, 0][stored] for row in rows for stored in data.targets[row][:, 0]]
            assert labels_BU.reshape(-1).tolist() == wanted


def test_it_pads_as_torch_does(gather: Gather) -> None:
    data = toy(channels=16)
    rows = np.random.default_rng(4).permutation(len(data.inputs))[:50]
    batch = reader_of(data, gather).batch(rows, lease=poisoned().lease())
    wanted = pad_sequence([torch.from_numpy(expected_frames(data, row)) for row in rows], batch_first=True)
    assert torch.equal(torch.from_numpy(batch.inputs), wanted)


@given(data=st.data())
def test_any_rows_in_any_order_are_the_same_in_c_and_numpy(data: st.DataObject) -> None:
    channels = data.draw(st.sampled_from([0, 1, 2, 7, 8, 16, 32, 33]))
    rows_per_block = data.draw(st.integers(1, 50))
    made = toy(60, channels=channels, missing=Missing.indicator, rows_per_block=rows_per_block, longest=40)
    rows = np.array(data.draw(st.lists(st.integers(0, 59), min_size=1, max_size=40)))
    form = data.draw(st.sampled_from(FORMS))
    first, *others = [reader_of(made, each).batch(rows, form=form, lease=poisoned().lease()) for each in gathers()]
    assert_same(first, expected(made, rows.tolist(), form))
    for other in others:
        assert first.inputs.tobytes() == other.inputs.tobytes()
        assert_same(other, first)


def test_what_is_written_into_a_batch_stays_there(gather: Gather) -> None:
    data = toy()
    reader = reader_of(data, gather)
    rows = np.arange(20)
    batch = reader.batch(rows)
    batch.inputs.fill(9)
    batch.labels_BU.fill(9)
    batch.weights_B.fill(9)
    batch.lengths_B.fill(9)
    assert_same(reader.batch(rows), expected(data, rows.tolist(), Form.padded))


@pytest.mark.parametrize(
    ("rows", "starts", "stops"),
    [
        ([0, 200], None, None),
        ([-1], None, None),
        ([0], [0], [31]),
        ([0], [-1], [1]),
        ([199], [3], [2]),
        ([199], [40], None),
    ],
)
def test_rows_and_frames_that_do_not_exist_are_refused(
    gather: Gather, rows: list[int], starts: list[int] | None, stops: list[int] | None
) -> None:
    reader = reader_of(toy(), gather)
    reader.batch(np.arange(200))
    ranges = {"starts_B": starts and np.array(starts), "stops_B": stops and np.array(stops)}
    with pytest.raises(IndexError, match="got"):
        reader.batch(np.array(rows), **ranges)


def test_a_symbol_beyond_the_vocabulary_is_refused(gather: Gather) -> None:
    # Blocks are checked by their bytes; a manifest of another vocabulary must not make the copy read beyond it.
    data = toy(channels=0)
    reader = reader_of(data, gather)
    assert reader._symbol_ids is not None
    reader._symbol_ids = reader._symbol_ids[:4].copy()
    with pytest.raises(IndexError, match="id"):
        reader.batch(np.arange(200))


def test_a_block_with_other_lengths_than_the_manifest_is_refused(gather: Gather) -> None:
    for column in ("length", "targets"):
        data = toy(per=TargetPer.sequence)
        data.manifest.columns[column][7] += 1
        with pytest.raises(IntegrityError, match="rows of other lengths than the manifest's"):
            reader_of(data, gather).batch(np.array([3]))


def test_raw_rows_are_as_stored(gather: Gather) -> None:
    for kind, target in itertools.product(("symbols", "indicator and gap"), TARGETS.values()):
        data = toy(**INPUTS[kind], **target)
        rows = np.random.default_rng(5).integers(0, len(data.inputs), 40)
        found = reader_of(data, gather).raw(rows)
        for i, row in enumerate(rows.tolist()):
            mine = found.values[found.value_offsets[i] : found.value_offsets[i + 1]]
            np.testing.assert_array_equal(mine, data.inputs[row].reshape(-1))
            mine = found.targets[found.target_offsets[i] : found.target_offsets[i + 1]]
            np.testing.assert_array_equal(mine, data.targets[row].reshape(-1))
            assert found.entities[i].as_py() == f"e{row}"
        if found.gaps_N is not None:
            np.testing.assert_array_equal(found.gaps_N, np.concatenate([data.gaps[row] for row in rows]))


# ---- the compiled part ----


def test_the_self_check_sees_wrong_copies(tmp_path) -> None:
    if native.find([tmp_path], native.COMPILERS, gather_native.SOURCE, "", native.SERIAL)[0] is None:
        pytest.skip("no C compiler here")
    text = gather_native.SOURCE.read_text()
    faults = {
        "(x[j] - mean[j])": "(x[j] + mean[j])",
        "x[j] == x[j] ? 1.0f : 0.0f": "1.0f",
        "memset(y, 0": "memset(y, 1",
        "out[t] = d->fill;": ";",
        "x->weight[i] = entry->weight;": ";",
        "return 0;\n        out[t]": "continue;\n        out[t]",
        "out[k] = (uint32_t)c->fill;": "out[k] = 1;",
        "y[j + d] = (x[j + d] - mean[d])": "y[j + d] = (x[j + d] - mean[0] - 1)",
    }
    for good, bad in faults.items():
        assert good in text
        source = tmp_path / "gather.c"
        source.write_text(text.replace(good, bad, 1))
        kernel, detail = native.find([tmp_path], native.COMPILERS, source, gather_native.SELF_CHECK, native.SERIAL)
        assert kernel is None, good
        assert "self-check" in detail


def test_without_a_compiler_numpy_copies(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(native, "folders", lambda: [tmp_path])
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    library, detail = gather_native._found.__wrapped__()
    assert library is None
    assert "no C compiler" in detail


def test_the_object_brings_no_openmp_runtime() -> None:
    if isinstance(gather := best_gather(), NativeGather):
        assert gather is not None
        kernel, _ = native.find(
            native.folders(), native.COMPILERS, gather_native.SOURCE, gather_native.SELF_CHECK, native.SERIAL
        )
        assert kernel is not None
        assert b"libgomp" not in kernel.path.read_bytes()

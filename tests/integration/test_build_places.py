"""The same data set from other places: an S3 store, and the workers of a Ray cluster."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from treadle.data import Form, Means, Origin, RowReader, build_rows, build_view, open_source
from treadle.data.sources.files import digests_of
from treadle.errors import DataError
from treadle.launch.spread import build_means, run_on_ray
from treadle.spec import ColumnsSpec, DataSpec, SplitSpec
from treadle.store.dev import DevServer
from treadle.store.local import LocalBlobs
from treadle.store.s3 import S3Blobs

COLUMNS = ColumnsSpec(entity="who", inputs=["frames"], target=["label"])
SMALL = {"run_bytes": 20_000, "shard_bytes": 30_000, "block_bytes": 5_000}


@pytest.fixture
def data(tmp_path: Path) -> DataSpec:
    """Three files of frames; the second has a bad row if asked for."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "source"
    folder.mkdir()
    frame = pa.list_(pa.list_(pa.float32()))
    schema = pa.schema([("who", pa.string()), ("frames", frame), ("label", pa.string())])
    for number in range(3):
        frames = [rng.normal(size=(1 + i % 40, 4)).astype(np.float32).tolist() for i in range(150)]
        who = [f"p{number}-{i}" for i in range(150)]
        table = pa.table({"who": who, "frames": frames, "label": ["xyz"[i % 3] for i in range(150)]}, schema=schema)
        with pa.OSFile(str(folder / f"{number}.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_table(table)
    return DataSpec(name="toy", source=str(folder))


def make(data: DataSpec, blobs, means: Means, tmp_path: Path):
    with_source = open_source(data, COLUMNS, scratch=tmp_path)
    origin = Origin(licence="made up", source=digests_of(with_source.lines.place, {}))
    return build_rows(with_source, data, blobs, recipe="r", origin=origin, means=means)


@pytest.mark.s3
def test_a_data_set_on_s3_is_the_same_and_reads_the_same(data, tmp_path, s3_server: DevServer):
    near = LocalBlobs(tmp_path / "store")
    far = S3Blobs(s3_server.bucket, f"test/{uuid.uuid4().hex}", s3_server.options())
    made = [make(data, blobs, Means(**SMALL), tmp_path) for blobs in (near, far)]
    assert made[0][0] == made[1][0]
    assert far.children("data/toy") == ["rows", "shards"]
    views = [build_view(made[0][1], data, SplitSpec(test=50), blobs, recipe="v") for blobs in (near, far)]
    assert views[0][0] == views[1][0]
    rows = views[0][1].rows_of("test")
    with RowReader(near, views[0][1]) as a, RowReader(far, views[1][1]) as b:
        batches = [reader.batch(rows, form=Form.packed) for reader in (a, b)]
    assert np.array_equal(batches[0].inputs, batches[1].inputs)
    assert np.array_equal(batches[0].labels_BU, batches[1].labels_BU)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_workers_of_a_cluster_build_the_same(data, tmp_path):
    from treadle.cluster import own_ray

    def refusing(number: int) -> int:  # not of this module, which workers cannot import
        if number == 3:
            raise DataError(f"got {number}", hint="another")
        return number

    alone, _ = make(data, LocalBlobs(tmp_path / "alone"), Means(**SMALL), tmp_path)
    store = tmp_path / "store"
    with own_ray(num_cpus=2), build_means(str(store), lambda *_: None, on_ray=True) as found:
        means = Means(run=found.run, open_shelf=found.open_shelf, **SMALL)
        spread, manifest = make(data, LocalBlobs(store), means, tmp_path)
        assert list(run_on_ray(lambda number: number * number, iter(range(50)))) == [n * n for n in range(50)]
        with pytest.raises(DataError, match="got 3") as refused:
            list(run_on_ray(refusing, range(9)))
        assert type(refused.value) is DataError
        assert refused.value.hint == "another"
    assert spread == alone
    assert len({block.key for block in manifest.header.blocks}) > 3


def test_a_cluster_is_used_where_one_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with build_means(str(tmp_path), lambda *_: None) as means:
        assert means.open_shelf is None
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with build_means(str(tmp_path), lambda *_: None, on_ray=False) as means:
        assert means.open_shelf is None

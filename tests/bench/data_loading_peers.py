"""Padded batches of one epoch from warm files: a plain copy, treadle, torch's DataLoader, Hugging Face's, Ray's.

100,000 rows of 16 float32 channels, 625 MB, in batches of at most 16,384 slots (1 MB) that treadle's default plan
gives; each path reads the file that suits it best, 2.5 GB in the temporary folder. Ray Data takes no plan: it gets rows
sorted by length, which spares it the padding. Rates are real frames per CPU second of all processes, medians of
epochs; on one thread, but for the two worker processes and what Ray starts.
"""

from __future__ import annotations

import functools
import logging
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from data_loading import copies, ours, write_rows
from data_peers import Ints, reference_lengths
from numpy.typing import NDArray
from recording import record
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from treadle.plan import plan_epoch
from treadle.spec import BatchSpec

C, SLOTS, LANES, PART = 16, 16_384, 8, 2000
REPEATS, QUICK = 3, 15
COPY, OURS = "a plain copy", "treadle"
Batches = Iterable[Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The data set in memory: `frames_NC[offsets[i]:offsets[i + 1]]` is row i."""

    lengths_R: Ints
    offsets: Ints
    frames_NC: NDArray[np.float32]
    batches: list[list[int]]

    def table(self, first: int, stop: int) -> pa.Table:
        """Rows as flat lists, the layout that was fastest for every peer (nested lists: 30 times slower)."""
        offsets = self.offsets[first : stop + 1]
        values = self.frames_NC[offsets[0] : offsets[-1]].reshape(-1)
        lists = pa.ListArray.from_arrays(pa.array(((offsets - offsets[0]) * C).astype(np.int32)), pa.array(values))
        return pa.table({"x": lists})

    def tables(self) -> list[pa.Table]:
        num_rows = len(self.lengths_R)
        return [self.table(first, min(num_rows, first + PART)) for first in range(0, num_rows, PART)]


@dataclass(frozen=True, kw_only=True)
class Loader:
    """One way to make the batches of an epoch."""

    name: str
    batches: Callable[[], Batches]
    repeats: int = REPEATS


@dataclass(frozen=True, kw_only=True)
class Rate:
    cpu: float
    wall: float
    first_s: float


def make_rows(lengths_R: Ints) -> Rows:
    plan = plan_epoch(lengths_R, BatchSpec(max_slots=str(SLOTS)), lanes=LANES, seed=0, epoch=0)
    rounds = (number for update in range(plan.num_updates) for number in plan.rounds_of(update))
    lanes = (plan.lane_rows(number, lane).tolist() for number in rounds for lane in range(LANES))
    offsets = np.concatenate(([0], np.cumsum(lengths_R)))
    frames_NC = np.random.default_rng(0).standard_normal((int(offsets[-1]), C), dtype=np.float32)
    return Rows(lengths_R=lengths_R, offsets=offsets, frames_NC=frames_NC, batches=[rows for rows in lanes if rows])


def cpu_s() -> float:
    """CPU seconds of this process, of those it has waited for, and of those that still run."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for process in psutil.Process().children(recursive=True):
        try:
            total += sum(process.cpu_times()[:4])  # user and system, its own and of those it has waited for
        except psutil.NoSuchProcess:
            continue
    return total


def measure(loaders: Sequence[Loader], frames: int) -> dict[str, Rate]:
    """Medians; the loaders take turns."""
    found: dict[str, list[tuple[float, float, float]]] = {loader.name: [] for loader in loaders}
    for turn in range(max(loader.repeats for loader in loaders)):
        for loader in loaders:
            if turn >= loader.repeats:
                continue
            cpu, started, first = cpu_s(), time.perf_counter(), 0.0
            for _batch in loader.batches():
                first = first or time.perf_counter() - started
            found[loader.name].append((cpu_s() - cpu, time.perf_counter() - started, first))
    medians = {name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in found.items()}
    return {
        name: Rate(cpu=frames / cpu, wall=frames / wall, first_s=first) for name, (cpu, wall, first) in medians.items()
    }


def check(path: Loader, rows: Rows) -> None:
    """The batches hold the rows: all of the first batch, where the path takes a plan, and all rows in any case."""
    num_rows, total = 0, 0.0
    for number, batch in enumerate(path.batches()):
        num_rows += len(batch)
        total += float(batch.sum(dtype=torch.float64))
        if number == 0 and len(batch) == len(rows.batches[0]):
            wanted = pad_sequence([row(rows, i) for i in rows.batches[0]], batch_first=True)
            if not torch.equal(batch, wanted):
                raise AssertionError(f"{path.name}: the first batch is not the plan's")
    if num_rows != len(rows.lengths_R) or not np.isclose(total, rows.frames_NC.sum(dtype=np.float64), atol=1e-3):
        raise AssertionError(f"{path.name}: got {num_rows} rows of sum {total}")


def row(rows: Rows, number: int) -> Tensor:
    return torch.from_numpy(rows.frames_NC[rows.offsets[number] : rows.offsets[number + 1]])


class RowDataset(Dataset[Tensor]):
    """One row an item, out of the mapped file: what a user of torch writes."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows.lengths_R)

    def __getitem__(self, index: int) -> Tensor:
        return row(self.rows, index)


def dataloader(rows: Rows, workers: int) -> Batches:
    collate = functools.partial(pad_sequence, batch_first=True)
    return DataLoader(RowDataset(rows), batch_sampler=rows.batches, collate_fn=collate, num_workers=workers)


def write_stream(rows: Rows, path: Path) -> None:
    tables = rows.tables()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)


def pad_items(items: Sequence[dict[str, Any]]) -> Tensor:
    return pad_sequence([torch.as_tensor(item["x"]).reshape(-1, C) for item in items], batch_first=True)


def pad_table(table: pa.Table) -> Tensor:
    lists = table.column(0).combine_chunks()
    values = torch.from_numpy(lists.flatten().to_numpy())
    sizes = np.diff(lists.offsets.to_numpy()).tolist()
    return pad_sequence([part.reshape(-1, C) for part in values.split(sizes)], batch_first=True)


def hf_paths(rows: Rows, folder: Path) -> list[Loader]:
    import datasets

    write_stream(rows, folder / "rows.arrow")
    stored = datasets.Dataset.from_file(str(folder / "rows.arrow"))

    def loader(form: str) -> Batches:
        return DataLoader(stored.with_format(form), batch_sampler=rows.batches, collate_fn=pad_items)

    def tables() -> Batches:
        formatted = stored.with_format("arrow")
        return (pad_table(formatted[batch]) for batch in rows.batches)

    name = f"datasets {datasets.__version__}"
    return [
        Loader(name=f"{name}, torch format, DataLoader, pad_sequence", batches=functools.partial(loader, "torch")),
        Loader(name=f"{name}, numpy format, DataLoader, pad_sequence", batches=functools.partial(loader, "numpy")),
        Loader(name=f"{name}, arrow format, own padding", batches=tables),
    ]


@contextmanager
def ray_paths(rows: Rows, folder: Path) -> Iterator[list[Loader]]:
    """Batches of as many rows as treadle's have in the mean, of rows sorted by length."""
    import ray
    from ray.data import DataContext
    from ray.data.collate_fn import ArrowBatchCollateFn, NumpyBatchCollateFn

    class Pad(ArrowBatchCollateFn):
        def __call__(self, batch: pa.Table) -> Tensor:
            return pad_table(batch)

    class PadArrays(NumpyBatchCollateFn):
        def __call__(self, batch: dict[str, Any]) -> Tensor:
            return pad_sequence([torch.from_numpy(np.array(x).reshape(-1, C)) for x in batch["x"]], batch_first=True)

    tables = by_length(rows).tables()
    (folder / "parquet").mkdir()
    for number, table in enumerate(tables):
        pq.write_table(table, folder / "parquet" / f"{number:04d}.parquet", compression="none", use_dictionary=False)
    with tempfile.TemporaryDirectory(prefix="trb", dir="/tmp") as sockets:  # a socket's path holds 107 characters
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=2 << 30,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=sockets,
        )
        try:
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            context = DataContext.get_current()
            context.enable_progress_bars = context.print_on_execution_start = False
            size = len(rows.lengths_R) // len(rows.batches)
            stored = ray.data.from_arrow(tables)
            files = ray.data.read_parquet(str(folder / "parquet"))

            def batches(source: Any, collate: Any) -> Batches:
                return source.iter_torch_batches(batch_size=size, collate_fn=collate)

            name = f"Ray Data {ray.__version__} iter_torch_batches"
            yield [
                Loader(name=f"{name}, object store, arrays", batches=functools.partial(batches, stored, PadArrays())),
                Loader(name=f"{name}, object store, Arrow", batches=functools.partial(batches, stored, Pad())),
                Loader(
                    name=f"{name}, Parquet, arrays", batches=functools.partial(batches, files, PadArrays()), repeats=1
                ),
                Loader(name=f"{name}, Parquet, Arrow", batches=functools.partial(batches, files, Pad()), repeats=1),
            ]
        finally:
            ray.shutdown()


def by_length(rows: Rows) -> Rows:
    order = np.argsort(rows.lengths_R, kind="stable")
    lengths_R = rows.lengths_R[order]
    starts = np.repeat(rows.offsets[:-1][order], lengths_R)
    offsets = np.concatenate(([0], np.cumsum(lengths_R)))
    frames_NC = rows.frames_NC[starts + np.arange(len(starts)) - np.repeat(offsets[:-1], lengths_R)]
    return Rows(lengths_R=lengths_R, offsets=offsets, frames_NC=frames_NC, batches=rows.batches)


def own_paths(rows: Rows, folder: Path) -> list[Loader]:
    """A plain copy of the batches' bytes out of the same maps into as many buffers, and treadle."""
    blobs, manifest, places_R = write_rows(folder / "treadle", rows.lengths_R, rows.frames_NC)
    batches = [places_R[batch] for batch in rows.batches]
    copy, make = copies(blobs, manifest, batches), ours(blobs, manifest, batches)
    return [
        Loader(name=COPY, batches=lambda: map(torch.from_numpy, copy()), repeats=QUICK),
        Loader(name=OURS, batches=lambda: map(torch.from_numpy, make()), repeats=QUICK),
    ]


def torch_paths(rows: Rows) -> list[Loader]:
    name = f"torch {torch.__version__.split('+')[0]} DataLoader, row by row, pad_sequence"
    return [
        Loader(name=f"{name}, {workers} workers", batches=functools.partial(dataloader, rows, workers))
        for workers in (0, 2)
    ]


def main() -> None:
    made = make_rows(reference_lengths())
    frames = int(made.lengths_R.sum())
    with tempfile.TemporaryDirectory(prefix="loading") as name:
        folder = Path(name)
        made.frames_NC.tofile(folder / "rows.f32")
        mapped = np.memmap(folder / "rows.f32", dtype=np.float32, mode="c", shape=(frames, C))
        rows = Rows(lengths_R=made.lengths_R, offsets=made.offsets, frames_NC=mapped, batches=made.batches)
        loaders = [*own_paths(made, folder), *torch_paths(rows), *hf_paths(made, folder)]
        for loader in loaders[1:]:
            check(loader, made)  # warms up as well
        rates = measure(loaders, frames)
        with ray_paths(made, folder) as loaders:
            for loader in loaders[:2]:  # Parquet takes longer; its rows are the same
                check(loader, made)
            rates |= measure(loaders, frames)
    report(rates)


def report(rates: dict[str, Rate]) -> None:
    rows = [
        (
            name,
            f"{rate.cpu / 1e6:.3g}",
            f"{rate.cpu / rates[COPY].cpu:.2g}",
            f"{rates[OURS].cpu / rate.cpu:.3g}",
            f"{rate.wall / 1e6:.3g}",
            f"{1e3 * rate.first_s:.0f} ms",
        )
        for name, rate in rates.items()
    ]
    headers = ["path", "million frames / CPU-s", "of a copy", "treadle / it", "million frames / s", "first batch after"]
    title = f"Padded batches of {SLOTS:,} slots from 100,000 rows of {C} float32 channels, warm files"
    record("data_loading_peers", title, "python tests/bench/data_loading_peers.py", headers, rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()

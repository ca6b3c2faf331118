"""How fast rows become a data set: sorted, hashed and checked, against writing the same bytes as they come.

    python tests/bench/data_build.py [--gb 1] [--rounds 3] [--folder DIR]

The baseline reads the same record batches from the mapped source file and writes them unsorted with pyarrow's own IPC
writer, 64 MB a shard, through the same store, which waits for the disk after each; a build writes all rows twice,
sorted runs first. Each round does both, in this process, with memory that is backed already; the medians are compared.
Peak memory is that of a fresh process which does nothing but build.
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from recording import record

from treadle.data.build.pipeline import Origin, build_rows
from treadle.data.sources.declared import open_source
from treadle.spec import ColumnsSpec, DataSpec
from treadle.store.local import LocalBlobs

CHANNELS = 16
SHARD_BYTES = 64 << 20
COLUMNS = ColumnsSpec(entity="entity", inputs=["frames"], target=["label"])


def write_source(path: Path, gb: float) -> int:
    """Rows of log-normal lengths (median 60), 16 float32 a frame, in batches of about 8 MB; gives their number."""
    rng = np.random.default_rng(0)
    frame = pa.list_(pa.float32(), CHANNELS)
    schema = pa.schema([("entity", pa.string()), ("frames", pa.list_(frame)), ("label", pa.string())])
    done = number = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while done < gb * (1 << 30):
            lengths = np.clip(np.exp(rng.normal(np.log(60), 1.0, 1300)), 1, 2000).astype(np.int32)
            values = rng.standard_normal((int(lengths.sum()), CHANNELS), np.float32)
            offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
            frames = pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(values.reshape(-1), CHANNELS))
            entity = pa.array([f"person-{number + i}" for i in range(len(lengths))])
            label = pa.array(rng.choice(["yes", "no"], len(lengths)))
            writer.write_batch(pa.record_batch([entity, frames, label], schema=schema))
            done, number = done + values.nbytes, number + len(lengths)
    return number


def write_as_is(source: Path, blobs: LocalBlobs) -> None:
    """The same batches, unsorted, in shards."""
    with pa.memory_map(str(source)) as mapped:
        reader = pa.ipc.open_file(mapped)
        number = shard = 0
        while number < reader.num_record_batches:
            sink = io.BytesIO()
            with pa.ipc.new_file(sink, reader.schema) as writer:
                while number < reader.num_record_batches and sink.tell() < SHARD_BYTES:
                    writer.write_batch(reader.get_batch(number))
                    number += 1
            blobs.create(f"plain/{shard:04d}.arrow", sink.getvalue())
            shard += 1


def build(source: Path, blobs: LocalBlobs) -> str:
    data = DataSpec(name="bench", source=str(source))
    with tempfile.TemporaryDirectory() as scratch:
        opened = open_source(data, COLUMNS, scratch=Path(scratch))
        digest, _ = build_rows(opened, data, blobs, recipe="bench", origin=Origin(licence="made up"))
    return digest


def touch(gb: float) -> None:
    """Have so much memory backed, and free it: a virtual machine gives long-free pages back to its host, and to get
    them again takes four seconds a GiB, more than all that is measured here."""
    pages = np.empty(int(gb * (1 << 27)))
    pages[::512] = 1


def timed(work: Callable[[Path, LocalBlobs], object], source: Path, store: Path) -> tuple[float, float]:
    """Seconds by the clock, and of all cores."""
    shutil.rmtree(store, ignore_errors=True)
    touch(3 * source.stat().st_size / (1 << 30))
    started, used = time.perf_counter(), time.process_time()
    work(source, LocalBlobs(store))
    return time.perf_counter() - started, time.process_time() - used


def high_water_mb() -> int:
    """Most resident memory of this process; ru_maxrss would also count the parent's, at the time of the fork."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) // 1024


def peak_mb(source: Path, store: Path) -> int:
    """Resident memory of a process that builds, at its highest."""
    shutil.rmtree(store, ignore_errors=True)
    command = [sys.executable, __file__, "--child", str(source), str(store)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", nargs=2, type=Path)
    options = parser.parse_args()
    if options.child:
        build(options.child[0], LocalBlobs(options.child[1]))
        print(high_water_mb())
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        place = Path(folder)
        source, store = place / "source.arrow", place / "store"
        rows = write_source(source, options.gb)
        size = source.stat().st_size / (1 << 30)
        timed(write_as_is, source, store)  # once for the page cache of the source
        times = [(*timed(write_as_is, source, store), *timed(build, source, store)) for _ in range(options.rounds)]
        plain, plain_cpu, built, built_cpu = (statistics.median(column) for column in zip(*times, strict=True))
        peaks = [peak_mb(source, store)]
        write_source(source, 2 * options.gb)
        peaks.append(peak_mb(source, store))
    table = [
        ("written as they come", f"{plain:.2f}", f"{plain_cpu:.2f}", f"{size / plain:.2f}", "1.00", ""),
        (
            "built: checked, hashed, sorted",
            f"{built:.2f}",
            f"{built_cpu:.2f}",
            f"{size / built:.2f}",
            f"{plain / built:.2f}",
            peaks[0],
        ),
        ("built, twice the rows", "", "", "", "", peaks[1]),
    ]
    record(
        "data_build",
        f"Building a data set of {rows:,} rows, {size:.2f} GiB",
        f"python tests/bench/data_build.py --gb {options.gb:g}",
        ("", "seconds", "CPU-s", "GiB/s", "of the rate of writing", "peak memory, MiB"),
        table,
    )


if __name__ == "__main__":
    main()

"""How near batches come to the speed of memory: padded and packed, by C and by NumPy, beside a plain copy.

The reference rows: 100,000 of log-normal length (median 60, at most 2,000 frames), 16 float32 channels, 625 MB in
shards of 64 MB and blocks of 2 MB, warm. The batches are those of treadle's default plan: at most 16,384 slots, 8
lanes, noise .05. A plain copy moves as many bytes from the same maps into buffers that are used again, as the batches
are. All run by turns in one process, on one thread; the times are of each update, the least of all turns, so that a
busy machine weighs on all alike.

    python tests/bench/data_loading.py [folder]
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from data_peers import Ints, reference_lengths
from numpy.typing import NDArray
from recording import record

from treadle.data.blocks import BlockRows, encode_shard
from treadle.data.load.batch import Form
from treadle.data.load.buffers import Buffers
from treadle.data.load.gather import Gather, NumpyGather
from treadle.data.load.gather_native import best_gather, gather_status
from treadle.data.load.reader import RowReader
from treadle.data.manifest import Block, Content, Header, Manifest, Preprocessing
from treadle.plan import plan_epoch
from treadle.spec import BatchSpec, TargetKind, TargetPer
from treadle.store.local import LocalBlobs

C, SLOTS, LANES = 16, 16_384, 8
BLOCK_BYTES, SHARD_BYTES, ZONE_ROWS = 2 << 20, 64 << 20, 4096
TURNS = 7
Batches = Callable[[], Iterator[NDArray[np.float32]]]


def write_rows(folder: Path, lengths_R: Ints, frames_NC: NDArray[np.float32]) -> tuple[LocalBlobs, Manifest, Ints]:
    """The rows as a data set, sorted by length, with their labels; and the place of each row in it."""
    blobs = LocalBlobs(folder)
    order_R = np.argsort(lengths_R, kind="stable")
    sorted_R = lengths_R[order_R]
    starts_R = (np.cumsum(lengths_R) - lengths_R)[order_R]
    channels = tuple(f"c{i}" for i in range(C))
    content = Content(
        symbols=(),
        channels=channels,
        target=TargetKind.labels,
        target_per=TargetPer.row,
        labels=("no", "yes"),
        value_names=(),
        missing=False,
        timed=False,
    )

    def block(first: int, stop: int) -> BlockRows:
        offsets = np.concatenate([[0], np.cumsum(sorted_R[first:stop])]) * C
        ranges = zip(starts_R[first:stop].tolist(), sorted_R[first:stop].tolist(), strict=True)
        return BlockRows(
            values=np.concatenate([frames_NC[start : start + length].reshape(-1) for start, length in ranges]),
            value_offsets=offsets.astype(np.int64),
            targets=(order_R[first:stop] % 2).astype(np.int32),
            target_offsets=np.arange(stop - first + 1),
            gaps_N=None,
            entities=pa.array([str(row) for row in order_R[first:stop]], pa.string()),
        )

    blocks: list[Block] = []
    byte_R = np.cumsum(sorted_R) * 4 * C
    shard_edges = _edges(byte_R, SHARD_BYTES)
    for number, (first, stop) in enumerate(itertools.pairwise(shard_edges)):
        edges = [first + edge for edge in _edges(byte_R[first:stop] - (byte_R[first - 1] if first else 0), BLOCK_BYTES)]
        data, found = encode_shard((block(a, b) for a, b in itertools.pairwise(edges)), content)
        blobs.put(f"data/bench/{number}.arrow", data)
        blocks += [_with_key(each, f"data/bench/{number}.arrow") for each in found]
    mean, deviation = (0.0,) * C, (1.0,) * C
    preprocessing = Preprocessing(symbols=(), channels=channels, mean=mean, deviation=deviation, labels=content.labels)
    header = Header(
        name="bench",
        recipe="",
        licence="made up",
        source={},
        max_length=int(sorted_R[-1]),
        content=content,
        blocks=tuple(blocks),
        preprocessing=preprocessing,
    )
    columns = {
        "length": sorted_R.astype(np.uint32),
        "targets": np.ones(len(sorted_R), np.uint32),
        "label": (order_R % 2).astype(np.int32),
        "weight": np.ones(len(sorted_R), np.float32),
    }
    places_R = np.empty(len(order_R), np.int64)
    places_R[order_R] = np.arange(len(order_R))
    return blobs, Manifest(header=header, columns=columns), places_R


def ours(
    blobs: LocalBlobs, manifest: Manifest, batches: Sequence[Ints], form: Form = Form.padded, gather: Any = None
) -> Batches:
    """Makes the batches of an epoch, those of an update together, in memory that the next update uses again.

    Args:
        blobs, manifest: of `write_rows`. batches: rows of each, by place in the data set.
        gather: who copies; C where there is a compiler.
    """
    reader = RowReader(blobs, manifest, gather=gather)
    buffers = Buffers()
    updates = [batches[i : i + LANES] for i in range(0, len(batches), LANES)]

    def run() -> Iterator[NDArray[np.float32]]:
        lease = buffers.lease()
        for update in updates:
            yield from (batch.inputs for batch in reader.batches(update, form=form, lease=lease))
            lease.release()

    return run


def copies(blobs: LocalBlobs, manifest: Manifest, batches: Sequence[Ints]) -> Batches:
    """Plain copies of as many bytes as the rows of each batch have, one after the other from the same shards."""
    sizes = [int(manifest.columns["length"][rows].sum()) * 4 * C for rows in batches]
    buffers = [np.empty(SLOTS * C, np.float32) for _ in range(LANES)]
    keys = list(dict.fromkeys(block.key for block in manifest.header.blocks))
    maps = [np.memmap(blobs.local_path(key), np.uint8, "r") for key in keys]

    def run() -> Iterator[NDArray[np.float32]]:
        shard, place = 0, 0
        for i, size in enumerate(sizes):
            if place + size > len(maps[shard]):
                shard, place = (shard + 1) % len(maps), 0
            ctypes.memmove(buffers[i % LANES].ctypes.data, maps[shard].ctypes.data + place, size)
            place += size
            yield buffers[i % LANES]

    return run


def plan_batches(lengths_R: Ints) -> list[Ints]:
    """The rows of every microbatch of an epoch of the default plan, in its order."""
    plan = plan_epoch(lengths_R, BatchSpec(max_slots=str(SLOTS)), lanes=LANES, seed=0, epoch=0)
    rounds = (number for update in range(plan.num_updates) for number in plan.rounds_of(update))
    lanes = (plan.lane_rows(number, lane) for number in rounds for lane in range(LANES))
    return [np.asarray(rows, np.int64) for rows in lanes if len(rows)]


def least_s(paths: dict[str, Batches], turns: int = TURNS) -> dict[str, float]:
    """Seconds of an epoch: of each update, the least of all turns, which the paths take one after the other."""
    least: dict[str, NDArray[np.float64]] = {}
    for _ in range(turns):
        for name, make in paths.items():
            times = []
            batches, started = make(), time.perf_counter()
            while sum(1 for _ in itertools.islice(batches, LANES)):
                now = time.perf_counter()
                times.append(now - started)
                started = now
            least[name] = np.minimum(least.get(name, np.inf), times)
    return {name: float(times.sum()) for name, times in least.items()}


def _edges(byte_R: Ints, size: int) -> list[int]:
    """Where parts of about `size` bytes begin, and the end."""
    starts = np.flatnonzero(np.diff((byte_R - 1) // size)) + 1
    return [0, *starts.tolist(), len(byte_R)]


def _with_key(block: Block, key: str) -> Block:
    return Block(
        key=key, offset=block.offset, size=block.size, rows=block.rows, longest=block.longest, checksum=block.checksum
    )


def main(folder: Path) -> None:
    lengths_R = reference_lengths()
    frames_NC = np.random.default_rng(0).standard_normal((int(lengths_R.sum()), C), dtype=np.float32)
    blobs, manifest, _ = write_rows(folder, lengths_R, frames_NC)
    num_bytes = frames_NC.nbytes
    del frames_NC
    batches = plan_batches(manifest.columns["length"].astype(np.int64))
    gathers: dict[str, Gather] = {"C": best_gather(), "NumPy": NumpyGather()}
    if not gather_status().available:
        raise SystemExit(gather_status().detail)
    paths = {"a plain copy": copies(blobs, manifest, batches)}
    for form in Form:
        paths |= {f"{form.value}, {name}": ours(blobs, manifest, batches, form, g) for name, g in gathers.items()}
    times = least_s(paths)
    copied = times["a plain copy"]
    rows = [
        (name, f"{num_bytes / 1e9 / took:.1f}", f"{copied / took:.2f}", f"{1e6 * took / len(batches):.0f}")
        for name, took in times.items()
    ]
    headers = ["path", "GB/s", "of a plain copy", "us a batch"]
    record("data_loading", "Batches of 100,000 rows, 625 MB", "python tests/bench/data_loading.py", headers, rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            main(Path(name))

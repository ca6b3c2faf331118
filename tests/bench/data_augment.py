"""What changing training rows costs a value, beside reading them: one thread, batches that a reader has just made."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from recording import record

from treadle.data import Batch, Draft, Form, Frames, Labels, Row, RowReader, build_dataset
from treadle.data.load.augment import augment_batch
from treadle.spec import AugmentSpec, DataSpec, Leak
from treadle.testing import MemoryBlobs

CHANNELS, ROWS, REPEATS = 16, 2000, 15
KINDS = {
    "jitter": AugmentSpec(jitter=0.1),
    "scale": AugmentSpec(scale=0.1),
    "time masks (2)": AugmentSpec(time_masks=2),
    "channel masks (1)": AugmentSpec(channel_masks=1, channel_mask_share=0.2),
    "warp": AugmentSpec(warp=0.2),
    "crop": AugmentSpec(crop=0.2),
    "drop": AugmentSpec(drop=0.1),
    "all but crop and drop": AugmentSpec(
        jitter=0.1, scale=0.1, time_masks=2, channel_masks=1, channel_mask_share=0.2, warp=0.2
    ),
}


def data() -> tuple[MemoryBlobs, Any]:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(60), 1, ROWS).astype(int), 2, 2000)
    rows = [
        Row(entity=str(i), inputs=rng.normal(size=(length, CHANNELS)).astype(np.float32), target="xy"[i % 2])
        for i, length in enumerate(lengths)
    ]
    names = tuple(f"c{i}" for i in range(CHANNELS))
    draft = Draft(rows=rows, inputs=Frames(channels=names), target=Labels(), licence="made up here")
    blobs = MemoryBlobs()
    spec = DataSpec(name="toy", allow_leaks=list(Leak))
    return blobs, build_dataset(draft, spec, blobs, recipe="r")[1]


def fresh(batch: Batch) -> Batch:
    return batch._replace(inputs=batch.inputs.copy())


def ns_a_value(work, batches: list[Any], values: int) -> float:
    """Of the fastest pass over all batches."""
    best = float("inf")
    for _ in range(REPEATS):
        ready = [fresh(batch) if isinstance(batch, Batch) else batch for batch in batches]
        started = time.perf_counter()
        for batch in ready:
            work(batch)
        best = min(best, time.perf_counter() - started)
    return 1e9 * best / values


def main() -> None:
    blobs, manifest = data()
    reader = RowReader(blobs, manifest)
    order = np.argsort(manifest.columns["length"], kind="stable")
    groups = np.array_split(order, 40)  # of like length, as plans make them
    rows = []
    for form in Form:
        batches = [reader.batch(group, form=form) for group in groups]
        values = sum(batch.frames for batch in batches) * CHANNELS

        def change(spec: AugmentSpec, batch: Batch) -> None:
            augment_batch(batch, spec, manifest.preprocessing, seed=0, epoch=0)

        reading = ns_a_value(lambda group, form=form: reader.batch(group, form=form), groups, values)
        rows.append((form.value, "reading", f"{reading:.2f}", "1.00"))
        for name, spec in KINDS.items():
            took = ns_a_value(lambda batch, spec=spec: change(spec, batch), batches, values)
            rows.append((form.value, name, f"{took:.2f}", f"{took / reading:.2f}"))
    title = f"Changing training rows: {ROWS} rows of {CHANNELS} channels, lengths log-normal around 60, 40 batches"
    record(
        "data_augment", title, "python tests/bench/data_augment.py", ["form", "change", "ns a value", "/ reading"], rows
    )


if __name__ == "__main__":
    main()

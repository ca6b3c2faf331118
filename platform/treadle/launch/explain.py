"""What an epoch's batches would be, of a job or of a bare list of lengths; reads, plans, changes nothing."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.errors import ConfigError, DataError
from treadle.plan import Capacity, DataCard, Plan, make_plan, trainable_rows, with_slots
from treadle.plan.batches import EpochPlan, plan_epoch
from treadle.plan.explain import Explained, explain
from treadle.plan.repeats import class_repeats
from treadle.spec import BatchSpec, JobSpec
from treadle.spec.schema import job_keys

__all__ = ["explain_job", "explain_lengths", "read_lengths"]

_MAGIC = b"\x93NUMPY"


def read_lengths(path: Path) -> NDArray[Any]:
    """The lengths of rows in a .npy file: one dimension of whole numbers, at least 1 each.

    Raises:
        ConfigError: no such file. DataError: it holds something else.
    """
    what = "expected a .npy file with one whole number a row, at least 1"
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise DataError(f"{path}: got no .npy file, {what}")
        lengths_N = np.load(path, mmap_mode="r")
    except OSError as error:
        raise ConfigError(f"--lengths: got {str(path)!r} ({error.strerror}), {what}") from None
    except ValueError as error:  # cut off, or objects, which would have to be unpickled
        raise DataError(f"{path}: got no plain array ({str(error).splitlines()[0].rstrip('.')}), {what}") from None
    if lengths_N.ndim != 1 or lengths_N.dtype.kind not in "iu":  # durations are integers, too, to np.issubdtype
        raise DataError(f"{path}: got {lengths_N.dtype} of shape {lengths_N.shape}, {what}")
    if not len(lengths_N):
        raise DataError(f"{path}: got no rows, {what}")
    if int(lengths_N.min()) < 1:
        row = int(lengths_N.argmin())
        raise DataError(f"{path}: got length {lengths_N[row]} of row {row}, {what}")
    if int(lengths_N.max()) >= 1 << 32:
        row = int(lengths_N.argmax())
        raise DataError(f"{path}: got length {lengths_N[row]} of row {row}, expected below {1 << 32:,}")
    return np.ascontiguousarray(lengths_N)


def explain_lengths(lengths_N: NDArray[Any], batch: BatchSpec, *, ranks: int, seed: int) -> Explained:
    """Epoch 0 of rows with these lengths, on so many ranks with one lane each, or `batch.lanes` among them.

    Raises:
        ConfigError: a row above the limit, fewer lanes than ranks, or numbers that no job may have.
    """
    lanes = batch.lanes or ranks
    _check_flags({"--ranks": ranks, "--lanes": lanes, "--seed": seed})
    if lanes < ranks:
        raise ConfigError(f"--lanes: got {lanes}, expected at least --ranks = {ranks}")
    return _timed(lengths_N, batch, lanes=lanes, ranks=ranks, seed=seed)[1]


def _check_flags(given: dict[str, int]) -> None:
    """Nothing, where a job may have each of the numbers at the key that the flag stands for."""
    keys = {"--ranks": "cluster.workers", "--lanes": "batch.lanes", "--seed": "train.seed"}
    for flag, value in given.items():
        key = job_keys()[keys[flag]]
        if not key.accepts(value):
            raise ConfigError(f"{flag}: got {value}, expected {key.range}")


def explain_job(
    spec: JobSpec, card: DataCard, capacity: Capacity, *, ranks: int | None = None
) -> tuple[Plan, Explained]:
    """The plan of a job and its epoch 0, as on `ranks` workers where that is given, whether the place has them or not.

    Raises:
        ConfigError: more ranks than a job may have.
        DataError, ConfigError, InfeasibleError: what `make_plan` raises, but for missing devices.
    """
    if ranks is not None:
        _check_flags({"--ranks": ranks})
        spec = replace(spec, cluster=replace(spec.cluster, workers=ranks))
    wanted = max(1, spec.cluster.workers)
    cpus, gpus = wanted * spec.cluster.cpus_per_worker, wanted * spec.cluster.gpus_per_worker
    capacity = replace(capacity, cpus=max(capacity.cpus, cpus), gpus=max(capacity.gpus, gpus))
    if ranks is not None:  # memory of other machines than this one
        capacity = replace(capacity, memory_bytes=0, node_bytes=0)
    plan = make_plan(spec, card, capacity)
    if spec.batch.streams:
        return plan, plan.batches
    train = card.splits["train"]
    rows = trainable_rows(train, spec.task)
    batch = with_slots(spec.batch, plan.max_slots)
    repeats = class_repeats(train.labels_N[rows], batch)
    found = _timed(
        train.lengths_N[rows], batch, lanes=plan.lanes, ranks=plan.world, seed=spec.train.seed, repeats_N=repeats
    )
    return plan, found[1]


def _timed(
    lengths_N: NDArray[Any],
    batch: BatchSpec,
    *,
    lanes: int,
    ranks: int,
    seed: int,
    repeats_N: NDArray[np.float64] | None = None,
) -> tuple[EpochPlan, Explained]:
    np.random.Philox(key=[seed, 0])  # numpy loads its random numbers now, or it would count as planning
    started_s = time.perf_counter()
    epoch = plan_epoch(lengths_N, batch, lanes=lanes, seed=seed, epoch=0, repeats_N=repeats_N)
    return epoch, explain(epoch, ranks=ranks, plan_s=time.perf_counter() - started_s)

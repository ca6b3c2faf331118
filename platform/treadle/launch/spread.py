"""Building data sets with the workers of a Ray cluster: pieces of work as tasks, results in order."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from treadle.data import Means
from treadle.errors import TransientError, TreadleError
from treadle.store import Blobs, open_blobs

if TYPE_CHECKING:
    import ray

__all__ = ["build_means", "run_on_ray"]

T = TypeVar("T")
U = TypeVar("U")


@contextlib.contextmanager
def build_means(uri: str, progress: Callable[[str, int, int], None], *, on_ray: bool | None = None) -> Iterator[Means]:
    """How to build a data set into the store at `uri`: with this process, or with a cluster, left in the block's end.

    Args:
        on_ray: on the cluster of this process, or that RAY_ADDRESS names; None: if that is set.

    Raises:
        TransientError: no cluster, or it refuses this process.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not (bool(address) if on_ray is None else on_ray):
        yield Means(progress=progress)
        return
    from treadle.cluster import joined_ray

    with joined_ray(address):
        yield Means(run=run_on_ray, open_shelf=functools.partial(_opened, uri), progress=progress)


def run_on_ray(work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """`work` of each item as a task of one CPU, in order; two items for each CPU are on their way.

    Tasks are run again when their worker dies, so `work` must bear that.

    Raises:
        TreadleError: what `work` raises first. TransientError: workers died again and again.
    """
    import ray

    task = ray.remote(num_cpus=1)(_carried_out)
    shared = ray.put(work)
    most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    running: deque[ray.ObjectRef[Any]] = deque()
    try:
        for item in items:
            running.append(task.remote(shared, item))
            if len(running) >= most:
                yield _result(running.popleft())
        while running:
            yield _result(running.popleft())
    finally:
        for reference in running:
            ray.cancel(reference)


def _result(reference: Any) -> Any:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        value, error = ray.get(reference)
    except RayTaskError as failed:  # a bug: its traceback is the useful part
        raise failed.as_instanceof_cause() from None
    except RayError as failed:
        raise TransientError(f"Ray: {str(failed).splitlines()[0]}", hint="prepare again") from failed
    if error is not None:
        raise error
    return value


def _carried_out(work: Callable[[Any], Any], item: Any) -> tuple[Any, TreadleError | None]:
    """The result, or the error: Ray would wrap it in a class of its own."""
    try:
        return work(item), None
    except TreadleError as error:
        return None, error


@functools.lru_cache(maxsize=4)
def _opened(uri: str) -> Blobs:
    """One store for all tasks of a worker: opening S3 takes 0.3 s."""
    return open_blobs(uri)

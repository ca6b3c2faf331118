"""A Ray cluster to train or serve on: an own one on this machine, gone with its block, or one that runs already."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # Ray reads it as it is imported, and would leave out lines of ranks

import ray
from ray._private.state import state as ray_state  # what Ray Train's own watcher of preemptions asks
from ray._raylet import AuthenticationTokenLoader, Config, PlacementGroupID  # pyright: ignore[reportAttributeAccessIssue]
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

from treadle.errors import TransientError, TreadleError

__all__ = ["free_places", "is_connected", "joined_ray", "own_ray", "this_node", "watched_nodes"]

_LOOK_S = 1.0
_DRAIN_S = 30
"""What a node that names no deadline is taken to have."""

_PREFIX, _OWNER = "trd", "owner"
_LONGEST_FOLDER = 40  # Ray's sockets lie 62 characters below it, and a socket's path holds 107


def is_connected() -> bool:
    """Whether this process is connected to a cluster."""
    return ray.is_initialized()


@contextmanager
def own_ray(*, num_cpus: int, show_logs: bool = False) -> Iterator[None]:
    """A cluster for this process alone; on exit it has neither processes nor files left.

    Args:
        num_cpus: what it may hand out.
        show_logs: print what Ray and its workers write.

    Raises:
        TransientError: Ray did not start.
    """
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > _LONGEST_FOLDER:
        parent = Path("/tmp")  # noqa: S108
    _sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    (folder / _OWNER).write_text(str(os.getpid()))
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": str(folder),
        "RAY_ADDRESS": None,  # would lead to another cluster
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_raylet_start_wait_time_s": "180",  # 30 is too few on a busy machine
    }
    with _restored_signals(), _set(environment):
        try:
            _start(
                show_logs=show_logs,
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=128 << 20,
                namespace="treadle",
                _temp_dir=str(folder),
                _node_ip_address="127.0.0.1",
            )
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove what processes left there that were killed inside `own_ray`."""
    for owner in parent.glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(owner.read_text())
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                shutil.rmtree(owner.parent, ignore_errors=True)


@contextmanager
def joined_ray(address: str | None, *, show_logs: bool = False) -> Iterator[None]:
    """The cluster that this process is connected to, or the one at `address`; it is left running.

    Raises:
        TransientError: there is none, or it refuses this process.
    """
    if ray.is_initialized():
        yield
        return
    with _restored_signals():
        try:
            _start(show_logs=show_logs, address=address, namespace="treadle")
            yield
        finally:
            ray.shutdown()


def this_node() -> str:
    """The address of this machine for the others of the cluster."""
    return ray.util.get_node_ip_address()


def free_places() -> None:
    """Give back every place that was reserved on this process's own cluster: who reserved it has died."""
    for name, place in placement_group_table().items():
        if place["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


@contextmanager
def watched_nodes(on_drain: Callable[[float], None]) -> Iterator[None]:
    """While the block runs, `on_drain` is told once for each node that is about to go away, and in how many seconds.

    Every node of the cluster counts: the driver's is one that a run cannot do without.
    """
    over = threading.Event()

    def look() -> None:
        seen: set[str] = set()
        while not over.wait(_LOOK_S):
            try:
                draining = ray_state.get_draining_nodes() or {}
            except Exception:  # noqa: S112  the head may be away for a moment
                continue
            for node, deadline_ms in draining.items():
                if node not in seen:
                    left_s = deadline_ms / 1000 - _wall_s() if deadline_ms else float(_DRAIN_S)
                    with contextlib.suppress(TreadleError):  # the store is away for a moment: told at the next look
                        on_drain(max(0.0, left_s))
                        seen.add(node)

    thread = threading.Thread(target=look, name="treadle-nodes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _wall_s() -> float:
    # Ray states deadlines on the wall clock, so here it must be asked.
    return time.time()


def _start(*, show_logs: bool, **options: object) -> None:
    level = logging.INFO if show_logs else logging.ERROR
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(log_to_driver=show_logs, logging_level=level, configure_logging=True, **options)  # type: ignore[arg-type]
    except (ConnectionError, RuntimeError, TimeoutError, ray.exceptions.RayError) as error:  # type: ignore[attr-defined]
        raise TransientError(f"Ray: did not start ({str(error).splitlines()[0] if str(error) else error!r})") from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in kept.items():
            # Ray's handler ends the process. Who had one of his own, such as a driver that commits a
            # checkpoint first, gets it back; for others Ray's is better than none: it unwinds.
            if callable(handler) and handler is not signal.default_int_handler:
                signal.signal(number, handler)


def _environment() -> os._Environ[str]:
    # Ray takes these settings from the environment alone, for this process and for those it starts.
    return os.environ


@contextmanager
def _set(values: Mapping[str, str | None]) -> Iterator[None]:
    environment = _environment()
    before = {name: environment.get(name) for name in values}
    _write(environment, values)
    _forget_credentials()
    try:
        yield
    finally:
        _write(environment, before)
        _forget_credentials()


def _forget_credentials() -> None:
    """Let Ray read mode and token again: it keeps those of its import, or of the process's last cluster."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _write(environment: MutableMapping[str, str], values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = value


@contextmanager
def _restored_signals() -> Iterator[None]:
    """Ray puts a SIGTERM handler in place, which leaves through every `finally`; it must not outlive Ray."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, kept)

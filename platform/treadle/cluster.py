"""A Ray cluster to train or serve on: an own one on this machine, gone with its block, or one that runs already."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path

import ray
from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

from treadle.errors import TransientError

__all__ = ["is_connected", "joined_ray", "own_ray"]

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
    parent = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="trd", dir=parent if len(parent) <= _LONGEST_FOLDER else "/tmp"))  # noqa: S108
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

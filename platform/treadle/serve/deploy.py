"""Puts a model version on Ray Serve, which keeps its replicas alive. The only importer of `ray.serve`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.schema import ApplicationStatus

from treadle import wire
from treadle.cluster import is_connected, joined_ray, own_ray
from treadle.errors import ConfigError, InternalError, TransientError, did_you_mean, error_from_json
from treadle.serve.client import is_answering
from treadle.serve.listener import Listener, reserve_port
from treadle.spec import ServeSpec
from treadle.spec.schema import fields_of, show
from treadle.store import open_blobs
from treadle.store.models import ModelVersion
from treadle.store.registry import Registry

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ["Endpoint", "serve_model"]

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104
_TRY_EVERY_S = 0.05
_LOOK_EVERY_S = 1.0
_OWN_ERROR = re.compile(r"^treadle\.errors\.(\w+): (.*)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model that answers at `url`."""

    url: str
    model: str
    version: int


@serve.deployment(
    name="Replica",
    # Of Serve's own limits and times, those that are unlimited, minutes, or endless by default.
    max_ongoing_requests=512,
    max_queued_requests=256,
    graceful_shutdown_wait_loop_s=0.1,
    graceful_shutdown_timeout_s=15,
    health_check_period_s=2,
    health_check_timeout_s=10,
    max_constructor_retry_count=3,
)
@serve.ingress()
class Replica:
    """One process with the model in it, listening on the endpoint's port.

    Where Serve has HTTP proxies of its own, they reach the same app.
    """

    def __init__(self, store_uri: str, ref: str, limits: dict[str, Any], host: str, port: int) -> None:
        self._open = contextlib.ExitStack()
        # Here, because the process that deploys only waits: torch would cost it 2 s of its start.
        from treadle.serve.app import build_app
        from treadle.serve.engine import Engine
        from treadle.serve.predictor import Predictor

        spec = wire.decode(ServeSpec, limits, where="serve")
        self._engine = Engine(Predictor.load(open_blobs(store_uri), ref, serve=spec))
        self._open.callback(self._engine.close)
        self._asgi = build_app(self._engine)
        self._listener = Listener(self._asgi, host, port)
        self._open.callback(self._listener.close)
        self._listener.start()

    def __serve_build_asgi_app__(self) -> Starlette:
        return self._asgi

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if not (self._engine.is_alive and self._listener.is_alive):
            raise InternalError("replica: the engine or the HTTP server has ended, expected both")

    def __del__(self) -> None:
        """Serve calls it before it ends the process: requests under way are answered."""
        self._open.close()


@contextmanager
def serve_model(
    ref: str,
    *,
    store_uri: str,
    overrides: Mapping[str, Any] | None = None,
    address: str | None = None,
    timeout_s: float = 180.0,
) -> Iterator[Endpoint]:
    """An endpoint of `ref` that answers while the context is open, and leaves nothing behind.

    Args:
        ref: `name@3`, `name@alias` or `name`; the version it means now is the one served.
        store_uri: where the model is registered.
        overrides: fields of the model's `ServeSpec` that differ here, such as `{"port": 0}`.
        address: a Ray cluster of this machine to join ("auto": the one that runs). Without it the
            one this process is connected to is used, or an own one is started.
        timeout_s: time until it must answer.

    Raises:
        NotFoundError: no such model, version or alias; Ray was not started.
        ConfigError: an unknown override, or a port that is taken.
        IntegrityError: the model is not what was registered.
        TransientError: Ray or the endpoint did not start.
    """
    registry = Registry(open_blobs(store_uri))
    version = registry.resolve(ref)
    spec = _overridden(_own_spec(registry, version), overrides or {})
    with reserve_port(spec.host, spec.port) as reserved:
        port = reserved.getsockname()[1]
        host = _EVERYWHERE.get(spec.host, spec.host)
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        is_own = address is None and not is_connected()
        with own_ray(num_cpus=spec.replicas + 1) if is_own else joined_ray(address):
            replica = Replica.options(num_replicas=spec.replicas, ray_actor_options={"num_cpus": 1}).bind(
                store_uri, str(version), wire.encode(spec), spec.host, port
            )
            with _deployed(replica, f"treadle-{version.name}-{port}"):
                _wait_for(url, f"treadle-{version.name}-{port}", timeout_s)
                yield Endpoint(url=url, model=version.name, version=version.version)


def _own_spec(registry: Registry, version: ModelVersion) -> ServeSpec:
    """The limits that the model was registered with; the rest of its config would need torch to read."""
    data = registry.read(version, "config.json")
    body = wire.unrecord(dict, data, kind="model", schema=1, where=f"{version}/config.json")
    return wire.decode(ServeSpec, body.get("serve"), where=f"{version}/config.json: serve")


def _overridden(spec: ServeSpec, overrides: Mapping[str, Any]) -> ServeSpec:
    known = fields_of(ServeSpec, "serve")
    for name, value in overrides.items():
        if name not in known:
            raise ConfigError(
                f"serve.{name}: got an unknown key, expected one of {', '.join(known)}{did_you_mean(name, known)}"
            )
        if type(value) is not known[name].value_type or not known[name].accepts(value):
            raise ConfigError(f"serve.{name}: got {show(value)}, expected {known[name].expected}")
    return dataclasses.replace(spec, **overrides)


@contextmanager
def _deployed(replica: serve.Application, name: str) -> Iterator[None]:
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    # Without proxies: the replicas listen themselves, and one process less starts.
    serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False, "log_level": "WARNING"})
    target = serve.RunTarget(target=replica, name=name, route_prefix=f"/{name}")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    try:
        yield
    finally:
        with contextlib.suppress(Exception):  # the cluster may be gone already
            serve.delete(name)


def _wait_for(url: str, name: str, timeout_s: float) -> None:
    """Returns once `url` answers."""
    until = time.monotonic() + timeout_s
    look_at = time.monotonic()
    while not is_answering(url):
        now = time.monotonic()
        if now > until:
            raise TransientError(
                f"{url}: got no answer in {timeout_s:g} s, expected one", hint="try again; the machine may be busy"
            )
        if now > look_at:  # rarely: the process that is asked is the one that starts the replicas
            _check_starting(name)
            look_at = now + _LOOK_EVERY_S
        time.sleep(_TRY_EVERY_S)


def _check_starting(name: str) -> None:
    """Nothing, while a replica may still come.

    Raises:
        TreadleError: what a replica raised.
    """
    found = serve.status().applications.get(name)
    if found is None:
        return
    told = "\n".join([found.message, *(deployment.message for deployment in found.deployments.values())])
    if own := _OWN_ERROR.findall(told):
        kind, message = own[-1]
        error = error_from_json({"error": kind, "message": message})
        if not error.retry:
            raise error
    if found.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
        lines = [line for line in told.splitlines() if line.strip()]
        raise InternalError(f"replica: did not start ({lines[-1] if lines else found.status})")

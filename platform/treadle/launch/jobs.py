"""A driver on a running Ray cluster, through the Ray Jobs API."""

from __future__ import annotations

import json
import os
import shlex
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treadle.errors import ConfigError, InfeasibleError, TransientError
from treadle.launch.surroundings import package_folder
from treadle.plan import Capacity
from treadle.store import Backend

__all__ = ["RayCluster"]

_TIMEOUT_S = 5.0
_SETTLE_S = 10.0
_DEFAULT = "http://127.0.0.1:8265"


class RayCluster:
    """A cluster by the address of its dashboard, with token authentication.

    The token is Ray's own: $RAY_AUTH_TOKEN, the file $RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token.

    Args:
        address: http(s)://host:port; None takes $RAY_API_SERVER_ADDRESS, else the default of a local head.

    Raises:
        ConfigError: not such an address. InfeasibleError: no cluster answers there.
    """

    def __init__(self, address: str | None) -> None:
        self.address = (address or os.environ.get("RAY_API_SERVER_ADDRESS") or _DEFAULT).rstrip("/")
        if urllib.parse.urlsplit(self.address).scheme not in ("http", "https"):
            raise ConfigError(
                f"cluster.address: got {self.address!r}, expected the dashboard's http://host:port",
                hint=f"cluster.address={_DEFAULT}",
            )
        self._headers = _auth_headers()
        self.version = str(self._get("/api/version").get("ray_version", "unknown"))

    def capacity(self) -> Capacity:
        """CPUs, GPUs and memory of all nodes that are up, whoever uses them now."""
        nodes = self._resources()
        deadline = time.monotonic() + _SETTLE_S
        while not any(node.get("CPU") for node in nodes) and time.monotonic() < deadline:
            time.sleep(0.5)  # a head that has just started answers before it knows its own node
            nodes = self._resources()

        def of(name: str) -> list[float]:
            return [float(node.get(name, 0)) for node in nodes]

        return Capacity(
            where=f"the cluster at {self.address}",
            cpus=int(sum(of("CPU"))),
            gpus=int(sum(of("GPU"))),
            memory_bytes=int(sum(of("memory"))),
            node_bytes=int(max(of("memory"), default=0)),
        )

    def _resources(self) -> list[dict[str, float]]:
        """What each node has that is up."""
        nodes = self._get("/nodes?view=summary").get("data", {}).get("summary", [])
        raylets = [node.get("raylet", {}) for node in nodes]
        return [raylet.get("resourcesTotal", {}) for raylet in raylets if raylet.get("state") == "ALIVE"]

    def submit(self, store: str, run: str, attempt: int) -> str:
        """Start the driver of a run on the cluster; returns the submission id, which is the same for the same attempt.

        Raises:
            TransientError: the cluster did not take it.
        """
        driver = ["-m", "treadle.launch.driver", "--store", store, "--run", run, "--backend", Backend.ray.value]
        driver += ["--after", str(attempt - 1)]
        return self.start(driver, f"{run}-a{attempt}", {"treadle_run": run})

    def start(self, arguments: Sequence[str], submission: str, metadata: dict[str, str]) -> str:
        """Start Python with `arguments` on the cluster, under an id; returns it.

        Raises:
            TransientError: the cluster did not take it.
        """
        client = self._client()
        try:
            client.submit_job(
                entrypoint=f"python {shlex.join(arguments)}",
                submission_id=submission,
                runtime_env=_runtime_environment(),
                metadata=metadata,
            )
        except RuntimeError as error:
            raise TransientError(f"{self.address}: the job was not taken: {_first_line(error)}") from None
        return submission

    def job(self, submission: str) -> dict[str, Any]:
        """What the cluster knows of a submission: at least `status` and `message`."""
        return self._get(f"/api/jobs/{submission}")

    def stop(self, submission: str) -> None:
        """Signal the driver and its children; the run's own stop request is the gentle way."""
        self._client().stop_job(submission)

    def _client(self) -> Any:
        from ray.job_submission import JobSubmissionClient

        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            os.environ.pop(name, None)  # they would override the address that was asked for
        try:
            return JobSubmissionClient(self.address, headers=dict(self._headers))
        except (ConnectionError, RuntimeError) as error:
            raise InfeasibleError(f"{self.address}: {_first_line(error)}") from None

    def _get(self, path: str) -> dict[str, Any]:
        request = urllib.request.Request(self.address + path, headers=self._headers)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise InfeasibleError(
                    f"cluster.address: {self.address} refuses the token ({error.code} on GET {path})",
                    hint="set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token",
                ) from None
            raise InfeasibleError(f"cluster.address: {self.address} answers {error.code} on GET {path}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise InfeasibleError(
                f"cluster.address: no Ray cluster at {self.address} (tried GET {path}: {reason})",
                hint="start one with `ray start --head`, or give cluster.address=http://host:8265",
            ) from None


def _auth_headers() -> dict[str, str]:
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token and path.is_file():
        token = path.read_text(encoding="utf-8").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _runtime_environment() -> dict[str, Any]:
    """From a checkout the package travels with the job; installed, the cluster's image must hold it."""
    folder = package_folder()
    # Names of places, never secrets: they show in the Jobs API. Credentials are the cluster's own.
    environment: dict[str, Any] = {"env_vars": {"PYTHONUNBUFFERED": "1"}}
    if "site-packages" not in folder.parts:
        environment["py_modules"] = [str(folder)]
    return environment


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)

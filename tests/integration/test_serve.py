"""A registered model on Ray Serve: it answers, survives a kill, and leaves nothing behind."""

from __future__ import annotations

import os
import string
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
import xxhash

from treadle import wire
from treadle.data import Preprocessing
from treadle.errors import ConfigError, IntegrityError, NotFoundError, RequestError, TransientError
from treadle.nn import build_network
from treadle.serve import ask
from treadle.serve.deploy import serve_model
from treadle.serve.listener import reserve_port
from treadle.serve.predictor import Predictor
from treadle.spec import CtcSpec, GruSpec, ServeSpec
from treadle.store.local import LocalBlobs
from treadle.store.models import ModelDraft, ModelFile
from treadle.store.registry import Registry
from treadle.train import ModelConfig, export_network

WORDS = ["cat", "encyclopedia", "a", "loom", "treadle"]


@pytest.fixture
def store(tmp_path: Path) -> LocalBlobs:
    """A store with the model `g2p`, in production."""
    blobs = LocalBlobs(tmp_path / "store")
    preprocessing = Preprocessing(
        symbols=("<unknown>", *string.ascii_lowercase), channels=(), mean=(), deviation=(), labels=tuple("ABCDEFGH")
    )
    signature = preprocessing.signature(40)
    model, task = GruSpec(hidden_size=32, bidirectional=True), CtcSpec()
    torch.manual_seed(1)
    config = ModelConfig(
        name="g2p",
        model=model,
        task=task,
        signature=signature,
        preprocessing=preprocessing,
        serve=ServeSpec(port=0),
    )
    files = {}
    for name, data in export_network(build_network(model, task, signature), config).items():
        blobs.put(f"runs/g2p-1/{name}", data)
        files[name] = ModelFile(
            key=f"runs/g2p-1/{name}", size_bytes=len(data), xxh3_128=xxhash.xxh3_128_hexdigest(data)
        )
    registry = Registry(blobs)
    version = registry.register(
        ModelDraft(
            name="g2p",
            run="g2p-1",
            files=files,
            signature=wire.encode(signature),
            spec_digest="0" * 64,
            data_digest="1" * 64,
        )
    )
    registry.promote("g2p", version.version, actor="tests")
    return blobs


def ray_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("trd*"))


def settings() -> dict[str, str]:
    """What is set for Ray; the one that it sets itself, when it is imported, aside."""
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_") and name != "RAY_CLIENT_MODE"}


def our_replicas() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "ServeReplica" in " ".join(process.cmdline())]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_model_is_served_survives_a_kill_and_leaves_nothing(store, capfd):
    folders, environment = ray_folders(), settings()
    processes_before = set(psutil.Process().children(recursive=True))
    began_s = time.monotonic()
    with serve_model("g2p@production", store_uri=store.uri, overrides={"max_rows": 5}) as endpoint:
        answer = ask(endpoint.url, WORDS)
        print(f"{time.monotonic() - began_s:.1f} s to the first answer")
        assert (endpoint.model, endpoint.version) == ("g2p", 1)
        predictor = Predictor.load(store, "g2p")
        outputs = predictor.predict(predictor.validate(WORDS))
        assert [found["labels"] for found in answer["outputs"]] == [list(output.labels) for output in outputs]
        assert [found["confidence"] for found in answer["outputs"]] == pytest.approx(
            [output.confidence for output in outputs], abs=1e-5
        )
        with pytest.raises(RequestError, match=r"inputs: got 6, expected 1 to 5 \(serve.max_rows\)"):
            ask(endpoint.url, [*WORDS, "six"])

        # Ray Serve replaces a killed replica, which gets the same port although it just answered there.
        (replica,) = our_replicas()
        replica.kill()
        replica.wait(10)
        with pytest.raises(TransientError, match="no endpoint there"):
            ask(endpoint.url, WORDS)
        until_s = time.monotonic() + 60
        while True:
            try:
                assert ask(endpoint.url, WORDS) == answer
                break
            except TransientError:
                assert time.monotonic() < until_s
                time.sleep(0.1)

        # A second endpoint on that port is told so before it starts anything.
        port = int(endpoint.url.rpartition(":")[2])
        with (
            pytest.raises(ConfigError, match="which is taken"),
            serve_model("g2p", store_uri=store.uri, overrides={"port": port}),
        ):
            pass
        processes = set(psutil.Process().children(recursive=True)) - processes_before
        assert len(processes) > 4
        assert len(ray_folders() - folders) == 1

    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    assert ray_folders() == folders
    assert settings() == environment
    with pytest.raises(TransientError):
        ask(endpoint.url, WORDS)
    reserve_port("127.0.0.1", port).close()


def refuse_to_start(*args, **options):
    raise AssertionError("Ray was started")


@pytest.mark.parametrize(
    ("ref", "overrides", "error", "message"),
    [
        ("g2q@production", {}, NotFoundError, "model: got 'g2q', expected a registered one .* did you mean 'g2p'"),
        ("g2p@staging", {}, NotFoundError, "model: got 'g2p@staging'"),
        ("g2p", {"prot": 1}, ConfigError, r"serve\.prot: got an unknown key, .* did you mean 'port'"),
        ("g2p", {"port": 70000}, ConfigError, r"serve\.port: got 70000, expected a whole number"),
        ("g2p", {"port": "8000"}, ConfigError, r"serve\.port: got '8000', expected a whole number"),
        ("g2p", {"host": "203.0.113.9"}, ConfigError, r"serve\.host: got '203\.0\.113\.9'"),
    ],
)
def test_what_cannot_be_served_is_refused_without_ray(store, monkeypatch, ref, overrides, error, message):
    monkeypatch.setattr("ray.init", refuse_to_start)
    with pytest.raises(error, match=message), serve_model(ref, store_uri=store.uri, overrides=overrides):
        pass


def test_a_damaged_config_is_refused_without_ray(store, monkeypatch):
    monkeypatch.setattr("ray.init", refuse_to_start)
    store.put("runs/g2p-1/config.json", store.get("runs/g2p-1/config.json")[:-1] + b" ")
    with pytest.raises(IntegrityError), serve_model("g2p", store_uri=store.uri):
        pass

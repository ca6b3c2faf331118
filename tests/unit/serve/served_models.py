"""Small real models in a real store, and a server around them."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Iterator

import torch
import xxhash

from treadle import wire
from treadle.data import Preprocessing
from treadle.nn import build_network
from treadle.serve.app import build_app
from treadle.serve.engine import Engine
from treadle.serve.listener import Listener
from treadle.serve.predictor import Predictor
from treadle.spec import ClassifySpec, CtcSpec, GruSpec, LstmSpec, ModelSpec, ServeSpec, TaskSpec
from treadle.store import Blobs
from treadle.store.models import ModelDraft, ModelFile, ModelVersion
from treadle.store.registry import Registry
from treadle.train import ModelConfig, export_network

MAX_LENGTH = 24
SPELLING = Preprocessing(
    symbols=("<unknown>", *string.ascii_lowercase, "é"),
    channels=(),
    mean=(),
    deviation=(),
    labels=tuple("ABCDEFGH"),
)
SYLLABLES = Preprocessing(
    symbols=("<unknown>", "ka", "ta", "na"), channels=(), mean=(), deviation=(), labels=("x", "y")
)
MOTION = Preprocessing(
    symbols=(),
    channels=("left", "right", "up"),
    mean=(1.0, -2.0, 0.5),
    deviation=(2.0, 0.25, 1.0),
    labels=("walk", "sit", "run"),
)
KINDS: dict[str, tuple[Preprocessing, ModelSpec, TaskSpec]] = {
    "g2p": (SPELLING, LstmSpec(hidden_size=24, num_layers=2, bidirectional=True, embedding_size=8), CtcSpec()),
    "syllables": (SYLLABLES, GruSpec(hidden_size=8, embedding_size=4), ClassifySpec()),
    "motion": (MOTION, GruSpec(hidden_size=16, bidirectional=True), ClassifySpec()),
}


def register(blobs: Blobs, name: str, **limits: object) -> ModelVersion:
    """A model of `KINDS` with fresh weights, registered and in production."""
    preprocessing, model, task = KINDS[name]
    signature = preprocessing.signature(MAX_LENGTH)
    torch.manual_seed(7)
    network = build_network(model, task, signature)
    for parameter in network.parameters():  # fresh weights answer nearly the same to everything
        torch.nn.init.normal_(parameter, std=0.6)
    config = ModelConfig(
        name=name,
        model=model,
        task=task,
        signature=signature,
        preprocessing=preprocessing,
        serve=ServeSpec(**limits),
    )
    files = {}
    for file, data in export_network(network, config).items():
        key = f"runs/{name}-1/{file}"
        blobs.put(key, data)
        files[file] = ModelFile(key=key, size_bytes=len(data), xxh3_128=xxhash.xxh3_128_hexdigest(data))
    draft = ModelDraft(
        name=name,
        run=f"{name}-1",
        files=files,
        signature=wire.encode(signature),
        spec_digest="0" * 64,
        data_digest="1" * 64,
        metrics={"accuracy": 0.75},
    )
    registry = Registry(blobs)
    version = registry.register(draft)
    registry.promote(name, version.version, actor="tests")
    return version


def load(blobs: Blobs, name: str, **limits: object) -> Predictor:
    """The predictor of a model that is registered first."""
    register(blobs, name, **limits)
    return Predictor.load(blobs, f"{name}@production")


@contextlib.contextmanager
def serving(engine: Engine, **options: float) -> Iterator[str]:
    """The URL of a server around `engine`, on a free port of the loopback interface."""
    listener = Listener(build_app(engine, **options), "127.0.0.1", 0, drain_s=1)
    listener.start()
    try:
        yield f"http://127.0.0.1:{listener.port}"
    finally:
        listener.close()
        engine.close()

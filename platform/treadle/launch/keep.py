"""What is left of a finished run: the model's files, registered."""

from __future__ import annotations

from typing import Any

from torch import nn

from treadle import wire
from treadle.data import Manifest
from treadle.launch.assemble import Surroundings
from treadle.launch.card import model_card
from treadle.launch.surroundings import environment_digest
from treadle.store import Code, ModelDraft, ModelFile, Registry
from treadle.train import Evaluation, ModelConfig, Outcome, export_network

__all__ = ["keep_model"]


def keep_model(
    around: Surroundings, code: dict[str, Any], network: nn.Module, manifest: Manifest, outcome: Outcome
) -> dict[str, Any]:
    """Write the model's files below the run and register them; registering copies nothing."""
    spec, blobs, header, preprocessing = around.spec, around.blobs, manifest.header, manifest.preprocessing
    signature = preprocessing.signature(header.max_length)
    config = ModelConfig(
        name=spec.name,
        model=spec.model,
        task=spec.task,
        signature=signature,
        preprocessing=preprocessing,
        serve=spec.serve,
    )
    metrics = {f"test/{name}": value for name, value in outcome.test.metrics.items()} if outcome.test else {}
    files = export_network(network, config)
    files["eval.json"] = _evaluation_json(outcome.test, preprocessing.labels)
    files["card.md"] = model_card(spec, header, metrics, around.run).encode()
    folder = f"runs/{around.run}/model-a{around.attempt}"
    kept = {}
    for name, data in files.items():
        blobs.put(f"{folder}/{name}", data)
        kept[name] = ModelFile.of(f"{folder}/{name}", data)
    version = Registry(blobs).register(
        ModelDraft(
            name=spec.name,
            run=around.run,
            files=kept,
            signature=wire.encode(signature),
            spec_digest=spec.digest,
            data_digest=around.plan.data_digest,
            code=Code(**code),
            environment_digest=environment_digest(),
            metrics=metrics,
            card=f"{folder}/card.md",
        )
    )
    return {"metrics": metrics, "model_version": version.version}


def _evaluation_json(evaluation: Evaluation | None, labels: tuple[str, ...]) -> bytes:
    body = wire.encode(evaluation) if evaluation is not None else None
    return wire.canonical({"schema": 1, "labels": list(labels), "test": body})

"""A model version in memory: what it takes, and what it answers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from treadle import wire
from treadle.data import Batch
from treadle.data.load.collate import collate_inputs
from treadle.errors import IntegrityError
from treadle.serve.inputs import Encoded, Reader
from treadle.spec import ClassifySpec, LanguageSpec, ServeSpec
from treadle.store import Blobs
from treadle.store.models import ModelVersion
from treadle.store.registry import Registry
from treadle.train import ModelConfig, build_task, restore_network, run_network
from treadle.train.export import CONFIG_FILE, WEIGHTS_FILE

__all__ = ["Output", "Predictor"]

_CPU = torch.device("cpu")
_DIGITS = 6  # of a confidence; more are noise


@dataclass(frozen=True, kw_only=True)
class Output:
    """The answer to one input.

    Args:
        labels: the answered labels in order; one for classification.
        confidence: how sure the network is, 0 to 1; NaN where it got lost in huge numbers.
        is_class: the labels are one class.
        likeliest: labels with their probabilities, where a task answers with several.
    """

    labels: tuple[str, ...]
    confidence: float
    is_class: bool = False
    likeliest: tuple[tuple[str, float], ...] = ()

    @property
    def label(self) -> str:
        """The class."""
        return self.labels[0]

    def to_json(self) -> dict[str, Any]:
        named = {"label": self.label} if self.is_class else {}
        several = {"likeliest": {name: round(p, _DIGITS) for name, p in self.likeliest}} if self.likeliest else {}
        return {**named, "labels": list(self.labels), "confidence": round(self.confidence, _DIGITS), **several}


class Predictor:
    """Answers with one model version.

    Args:
        version: the registered version.
        config: its `config.json`.
        network: restored, in evaluation mode.
        serve: limits; the model's own when not given.
    """

    def __init__(
        self, version: ModelVersion, config: ModelConfig, network: nn.Module, serve: ServeSpec | None = None
    ) -> None:
        self.version = version
        self.config = config
        self.serve = serve or config.serve
        self.reader = Reader(config.signature, config.preprocessing, self.serve)
        self._network = network
        self._task = build_task(config.task, config.signature.num_labels)
        self._is_class = isinstance(config.task, ClassifySpec | LanguageSpec)  # of a text, its next symbol

    @classmethod
    def load(cls, blobs: Blobs, ref: str, *, serve: ServeSpec | None = None) -> Predictor:
        """The predictor of `name@3`, `name@alias` or `name`. Sets this process to one torch thread.

        Raises:
            NotFoundError: no such model, version or alias.
            IntegrityError: its files are not what was registered, or do not belong together.
        """
        # Two threads on a busy machine took eight times as long as one: a barrier per time step.
        torch.set_num_threads(1)
        registry = Registry(blobs)
        version = registry.resolve(ref)
        config = ModelConfig.from_bytes(registry.read(version, CONFIG_FILE), where=f"{version}/{CONFIG_FILE}")
        if wire.encode(config.signature) != version.signature:
            raise IntegrityError(f"{version}: the signature in {CONFIG_FILE} is not the one that was registered")
        network = restore_network(config, registry.read(version, WEIGHTS_FILE))
        return cls(version, config, network, serve)

    def validate(self, inputs: Any) -> list[Encoded]:
        """The rows of a request's inputs.

        Raises:
            RequestError: the model cannot take them; the message says which and why.
        """
        return self.reader.read(inputs)

    def predict(self, rows: Sequence[Encoded]) -> list[Output]:
        """The answer to each row; which rows share the batch changes nothing beyond rounding.

        Accuracy: confidences within 1e-5 of those of a batch of one (test_predictor).
        """
        if not rows:
            return []
        inputs, lengths_B = collate_inputs([row.values for row in rows], self.config.preprocessing)
        nothing_B = np.zeros(len(rows), np.int64)
        batch = Batch(
            inputs=inputs,
            lengths_B=lengths_B,
            labels_BU=np.zeros((len(rows), 0), np.int64),
            label_lengths_B=nothing_B,
            rows_B=nothing_B,
            weights_B=np.ones(len(rows), np.float32),
        )
        with torch.inference_mode():
            logits = run_network(self._network, batch, _CPU)
            answers = self._task.answers(logits, torch.from_numpy(lengths_B))
        names = self._task.names(self.config.preprocessing)
        return [
            Output(
                labels=tuple(names[i] for i in a.labels),
                confidence=a.confidence,
                is_class=self._is_class,
                likeliest=tuple((names[i], p) for i, p in a.likeliest),
            )
            for a in answers
        ]

    @functools.cached_property
    def card(self) -> Mapping[str, Any]:
        """What there is to know about the model, JSON-ready."""
        finite = {name: value if np.isfinite(value) else None for name, value in self.version.metrics.items()}
        return {
            "model": self.version.name,
            "version": self.version.version,
            "digest": self.version.digest,
            "created_at": self.version.created_at,
            "run": self.version.run,
            "signature": wire.encode(self.config.signature),
            "input": self.reader.expected,
            "example": {"inputs": [self.reader.example]},
            "labels": list(self._task.names(self.config.preprocessing)),
            "metrics": finite,
            "limits": {
                field.name: getattr(self.serve, field.name)
                for field in dataclasses.fields(ServeSpec)
                if field.name.startswith(("max", "batch"))
            },
        }

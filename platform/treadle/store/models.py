"""What is registered, as values; `treadle.store.registry` numbers and keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from treadle import wire
from treadle.store.sealed import checksum, spell_nonfinite

__all__ = ["Code", "ModelDraft", "ModelFile", "ModelVersion"]


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """An object in the store and what it must contain."""

    key: str
    size_bytes: int
    xxh3_128: str

    @classmethod
    def of(cls, key: str, data: bytes) -> ModelFile:
        """The entry of an object that holds `data`."""
        return cls(key=key, size_bytes=len(data), xxh3_128=checksum(data))


@dataclass(frozen=True, kw_only=True)
class Code:
    """The source that trained a model: git commit, or "unknown"; dirty: with uncommitted changes."""

    git: str = "unknown"
    dirty: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelDraft:
    """What is registered.

    Args:
        name: name of the model; its job's name.
        run: the run that trained it.
        files: objects by logical name ("model.safetensors", "config.json", ...).
        signature: what it takes and gives (`treadle.spec.Signature`, encoded).
        spec_digest: sha256 of the job spec.
        data_digest: digest of the data set.
        code: the source.
        environment_digest: digest of the installed packages.
        metrics: measured values by name; a version with NaN cannot be promoted.
        card: key of the model card, or None.
    """

    name: str
    run: str
    files: dict[str, ModelFile]
    signature: dict[str, Any]
    spec_digest: str
    data_digest: str
    code: Code = Code()
    environment_digest: str = "unknown"
    metrics: dict[str, float] = field(default_factory=dict)
    card: str | None = None

    def __post_init__(self) -> None:
        wire.check_name("model", self.name)
        object.__setattr__(self, "metrics", {name: float(value) for name, value in self.metrics.items()})

    @property
    def content_digest(self) -> str:
        """sha256 of what was registered, whatever number it got and whenever."""
        return wire.digest(spell_nonfinite({f.name: wire.encode(getattr(self, f.name)) for f in fields(ModelDraft)}))


@dataclass(frozen=True, kw_only=True)
class ModelVersion(ModelDraft):
    """A registered draft: its number for people, its digest for machines."""

    version: int
    digest: str
    created_at: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

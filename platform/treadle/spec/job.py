"""What is asked: one frozen dataclass a component, one job out of them.

Every field carries its range as an annotation, which Hydra's structured configs, the
validator (spec/compose.py), the generated `conf/README.md` and the editor's JSON Schema read
from here. A variant of a component is a subclass with a `kind` class variable; which one a job
takes is chosen by a config group, never by a class path in a file.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le, Lt, MinLen

from treadle import wire
from treadle.errors import ConfigError
from treadle.units import parse_bytes, parse_duration_s

__all__ = [
    "AdamWSpec",
    "BatchSpec",
    "Candidate",
    "CheckpointSpec",
    "ClassifySpec",
    "ClusterSpec",
    "CtcSpec",
    "DataSpec",
    "GruSpec",
    "JobSpec",
    "LstmSpec",
    "MinGruSpec",
    "MinLstmSpec",
    "MinSpec",
    "ModelSpec",
    "OptimSpec",
    "Pooling",
    "Precision",
    "PrecisionSpec",
    "RnnSpec",
    "Schedule",
    "ServeSpec",
    "SgdSpec",
    "StoreSpec",
    "TaskSpec",
    "TrackSpec",
    "TrainSpec",
    "WandbMode",
]


# Enums: member name == value, because OmegaConf converts by name and pydantic by value.
class Pooling(enum.Enum):
    last = "last"
    mean = "mean"
    max = "max"
    attention = "attention"


class Nonlinearity(enum.Enum):
    tanh = "tanh"
    relu = "relu"


class Candidate(enum.Enum):
    g = "g"
    tanh = "tanh"
    identity = "identity"


class Precision(enum.Enum):
    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class Schedule(enum.Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class WandbMode(enum.Enum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A stack of recurrent layers; the subclass says which cell."""

    kind: ClassVar[str]
    hidden_size: Annotated[int, Ge(1), Le(16384)] = 128
    """Hidden units per layer and direction."""
    num_layers: Annotated[int, Ge(1), Le(64)] = 1
    """Layers in the stack."""
    bidirectional: bool = False
    """Read every sequence in both directions."""
    embedding_size: Annotated[int, Ge(1), Le(16384)] = 64
    """Width of the embedding of token inputs; frames of numbers have none."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of values zeroed after the embedding and between layers, while training."""
    residual: bool = False
    """Add a layer's input to its output where the widths agree."""
    norm: bool = False
    """Normalise (RMS) the input of each layer."""
    learned_state: bool = False
    """Learn the state before the first frame; zeros otherwise."""
    conv_size: Annotated[int, Ge(0), Le(64)] = 0
    """Taps of a causal convolution before each cell, 2 or more; 0 leaves it out. Not beside `bidirectional`."""
    mlp_factor: Annotated[float, Ge(0), Le(64)] = 0.0
    """Width of a feed-forward layer after each cell, in widths of the layer; 0 leaves it out."""

    attention_every: Annotated[int, Ge(0), Le(64)] = 0
    """Recurrent layers before each attention layer, at most `num_layers`; 0 leaves attention out."""
    attention_heads: Annotated[int, Ge(1), Le(256)] = 4
    """Heads of an attention layer; each has an even share of its width."""
    attention_window: Annotated[int, Ge(2)] | None = None
    """Frames that a frame looks at, its own included; null: all earlier ones (`bidirectional`: the whole row)."""

    def __post_init__(self) -> None:
        self._check_attention()
        if self.conv_size == 1:
            raise ConfigError("model.conv_size: got 1, expected 0 (none) or 2 taps and more")
        if self.conv_size and self.bidirectional:
            raise ConfigError(
                f"model.conv_size: got {self.conv_size} beside bidirectional, expected 0",
                hint="a causal convolution reads ahead only",
            )

    def _check_attention(self) -> None:
        if not self.attention_every:
            return
        width = self.hidden_size * (2 if self.bidirectional else 1)
        if self.attention_every > self.num_layers:
            raise ConfigError(
                f"model.attention_every: got {self.attention_every}, expected at most num_layers ({self.num_layers})"
            )
        if width % (2 * self.attention_heads):
            raise ConfigError(
                f"model.attention_heads: got {self.attention_heads}, expected one that parts a width of {width} into "
                "even sizes"
            )
        if self.attention_window is not None and self.bidirectional:
            raise ConfigError(
                f"model.attention_window: got {self.attention_window} beside bidirectional, expected null",
                hint="attention both ways looks at the whole row",
            )


@dataclass(frozen=True, kw_only=True)
class RnnSpec(ModelSpec):
    kind: ClassVar[str] = "rnn"
    nonlinearity: Nonlinearity = Nonlinearity.tanh
    """Activation of the state."""


@dataclass(frozen=True, kw_only=True)
class LstmSpec(ModelSpec):
    kind: ClassVar[str] = "lstm"


@dataclass(frozen=True, kw_only=True)
class GruSpec(ModelSpec):
    kind: ClassVar[str] = "gru"


@dataclass(frozen=True, kw_only=True)
class MinSpec(ModelSpec):
    """A cell whose gates see the input only."""

    candidate: Candidate = Candidate.g
    """What enters the state: `g` (x + 0.5 from 0 on, sigmoid(x) below), `tanh` or `identity`."""
    expansion: Annotated[float, Gt(0), Le(64)] = 1.0
    """Width of the state in hidden sizes; other than 1, a projection leads back to the hidden size."""


@dataclass(frozen=True, kw_only=True)
class MinGruSpec(MinSpec):
    kind: ClassVar[str] = "mingru"


@dataclass(frozen=True, kw_only=True)
class MinLstmSpec(MinSpec):
    kind: ClassVar[str] = "minlstm"
    forget_bias: Annotated[float, Ge(0), Le(20)] = 0.0
    """Added to the forget gate's initial bias, so that the state begins by remembering."""
    normalize_gates: bool = True
    """Divide the forget and input gates by their sum, as the published equations do."""


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What is predicted from a sequence; the subclass says how."""

    kind: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class CtcSpec(TaskSpec):
    """A shorter or longer sequence of labels, without alignment (Graves 2006)."""

    kind: ClassVar[str] = "ctc"
    frames_per_step: Annotated[int, Ge(1), Le(16)] = 1
    """Label frames given out per input time step; more than 1 allows targets longer than inputs."""
    label_name: Annotated[str, MinLen(1)] = "label"
    """What one label is called in metrics: `phone` gives `phone_error_rate`."""
    sequence_name: Annotated[str, MinLen(1)] = "sequence"
    """What one sequence is called in metrics: `word` gives `word_error_rate`."""


@dataclass(frozen=True, kw_only=True)
class ClassifySpec(TaskSpec):
    """One class per sequence."""

    kind: ClassVar[str] = "classify"
    pooling: Pooling = Pooling.mean
    """How the frames of a sequence become one vector."""
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the target probability spread over all classes."""


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which data set, from what source, split how."""

    name: Annotated[str, MinLen(1)]
    """Name of the prepared data set in the store."""
    source: str | None = None
    """A URL, folder or file that the preparation script reads; what it means is the script's."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Expected sha256 of each source file, by file name; a mismatch stops the preparation."""
    limit: Annotated[int, Ge(1)] | None = None
    """Keep only this many entities (chosen by hash), for a trial run."""
    valid: Annotated[int, Ge(0)] = 0
    """Entities set aside to watch training with."""
    test: Annotated[int, Ge(0)] = 0
    """Entities set aside for the final evaluation, unless the source says which they are."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the split and of the choice that `limit` makes."""
    max_length: Annotated[int, Ge(1)] = 100_000
    """Longest sequence accepted, in time steps."""

    def __post_init__(self) -> None:
        wire.check_name("data.name", self.name)


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """How sequences share a forward pass. Slots = rows x longest row, padding included."""

    slots: Annotated[int, Ge(1)] = 4096
    """Hard limit of slots in one microbatch (one lane of one round)."""
    max_rows: Annotated[int, Ge(1)] = 4096
    """Most sequences in one microbatch."""
    lanes: Annotated[int, Ge(1), Le(4096)] | None = None
    """Canonical shares of a round, dealt to the ranks; the number of workers when not given."""
    rounds_per_update: Annotated[int, Ge(1)] = 1
    """Rounds, each from another length zone, whose gradients make one update."""
    noise: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Relative noise on lengths before sorting, so that no epoch has the batches of another."""


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """How weights move; the subclass says by which rule."""

    kind: ClassVar[str]
    lr: Annotated[float, Gt(0), Le(100)] = 1e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay of matrices; biases and gains are left alone."""
    schedule: Schedule = Schedule.cosine
    """Course of the learning rate after the warm-up, down to `final_lr_share` of the peak."""
    warmup_share: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Share of all updates during which the rate rises linearly."""
    final_lr_share: Annotated[float, Ge(0), Le(1)] = 0.05
    """Rate at the end, as a share of the peak."""
    clip_norm: Annotated[float, Gt(0)] | None = 1.0
    """Largest global gradient norm; null switches clipping off."""


@dataclass(frozen=True, kw_only=True)
class AdamWSpec(OptimSpec):
    kind: ClassVar[str] = "adamw"
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.98
    """Decay of the second moment."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment."""


@dataclass(frozen=True, kw_only=True)
class SgdSpec(OptimSpec):
    kind: ClassVar[str] = "sgd"
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Nesterov momentum."""


@dataclass(frozen=True, kw_only=True)
class PrecisionSpec:
    """In what number format the forward and backward passes run. Weights stay in fp32."""

    mode: Precision = Precision.auto
    """auto times a short step in bf16 and in fp32 on the device and takes the faster sound one."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    """When the state of a run is written, and how much of it is kept."""

    every: str = "30s"
    """Time between checkpoints; one more is written at every stop and at the end."""
    every_updates: Annotated[int, Ge(1)] | None = None
    """Also write after each such number of updates."""
    keep_last: Annotated[int, Ge(1)] = 2
    """Checkpoints kept; an older one goes only after a newer one is committed."""

    def __post_init__(self) -> None:
        if self.every_s <= 0:
            raise ConfigError(f"checkpoint.every: got {self.every!r}, expected more than 0 s")

    @property
    def every_s(self) -> float:
        return parse_duration_s(self.every)


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """How long, from which seed, and how often the run is looked at."""

    epochs: Annotated[int, Ge(1)] = 10
    """Passes over the training rows."""
    seed: Annotated[int, Ge(0), Lt(1 << 31)] = 0
    """Seed of weights, batch order and dropout."""
    evaluate_every: Annotated[int, Ge(1)] = 1
    """Epochs between evaluations on the validation rows."""
    log_every: str = "1s"
    """Least time between two rows of metrics."""

    def __post_init__(self) -> None:
        parse_duration_s(self.log_every)

    @property
    def log_every_s(self) -> float:
        return parse_duration_s(self.log_every)


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """Where the workers run, and what each of them gets."""

    workers: Annotated[int, Ge(0), Le(4096)] = 2
    """Ray Train workers; 0 trains inside the driver process, without Ray."""
    cpus_per_worker: Annotated[int, Ge(1)] = 1
    """CPUs reserved, and threads used, per worker."""
    gpus_per_worker: Annotated[int, Ge(0), Le(1)] = 0
    """1 trains on a GPU, 0 on the CPU."""
    address: str | None = None
    """Dashboard address of a running Ray cluster, for `submit --on ray`."""


@dataclass(frozen=True, kw_only=True)
class ServeSpec:
    """How a model answers."""

    host: str = "127.0.0.1"
    """Interface to listen on."""
    port: Annotated[int, Ge(0), Le(65535)] = 8000
    """HTTP port; 0 takes a free one."""
    replicas: Annotated[int, Ge(1)] = 1
    """Processes that hold the model."""
    batch_slots: Annotated[int, Ge(1)] = 8192
    """Most slots in one forward pass of the server."""
    max_rows: Annotated[int, Ge(1)] = 256
    """Most sequences in one request."""
    max_queue_slots: Annotated[int, Ge(1)] = 262_144
    """Slots that may wait; above it requests are answered 503 with Retry-After."""
    max_body: str = "1MiB"
    """Largest request body."""

    def __post_init__(self) -> None:
        parse_bytes(self.max_body)

    @property
    def max_body_bytes(self) -> int:
        return parse_bytes(self.max_body)


@dataclass(frozen=True, kw_only=True)
class TrackSpec:
    """Where numbers go beside the run's own metrics.jsonl, which always is the truth."""

    wandb: WandbMode = WandbMode.auto
    """auto goes online when a key is there, else logs offline and says so once."""
    project: str = "treadle"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null takes the key's default."""


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """Where data sets, runs, checkpoints and models live."""

    uri: Annotated[str, MinLen(1)]
    """A folder or s3://bucket/prefix. Default: $TREADLE_STORE, else ~/.treadle/store."""


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One training job, whole."""

    name: Annotated[str, MinLen(1)]
    """Name of the job; its runs and its model are called after it."""
    summary: str = ""
    """One line for people."""
    task: TaskSpec
    model: ModelSpec
    data: DataSpec
    batch: BatchSpec = BatchSpec()
    optim: OptimSpec
    precision: PrecisionSpec = PrecisionSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    train: TrainSpec = TrainSpec()
    cluster: ClusterSpec = ClusterSpec()
    serve: ServeSpec = ServeSpec()
    track: TrackSpec = TrackSpec()
    store: StoreSpec

    def __post_init__(self) -> None:
        wire.check_name("name", self.name)
        if len(self.name) > 24:
            raise ConfigError(f"name: got {len(self.name)} characters, expected at most 24 (run ids add 21)")

    @property
    def digest(self) -> str:
        """sha256 of the whole spec."""
        return wire.digest(wire.encode(self))

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
from treadle.units import parse_bytes, parse_count, parse_duration_s

__all__ = [
    "AdamWSpec",
    "AugmentSpec",
    "BatchSpec",
    "Budget",
    "Candidate",
    "CheckpointSpec",
    "ClassWeights",
    "ClassifySpec",
    "ClusterSpec",
    "ColumnsSpec",
    "CtcSpec",
    "DataSpec",
    "Format",
    "GruSpec",
    "GuardSpec",
    "JobSpec",
    "Keep",
    "LanguageSpec",
    "Layout",
    "Leak",
    "LongRows",
    "LstmSpec",
    "MinGruSpec",
    "MinLstmSpec",
    "MinSpec",
    "Missing",
    "ModelSpec",
    "OnBadRow",
    "OptimSpec",
    "Parallel",
    "Pooling",
    "Precision",
    "PrecisionSpec",
    "RateScaling",
    "Recovery",
    "RmsPropSpec",
    "RnnSpec",
    "Schedule",
    "ServeSpec",
    "SgdSpec",
    "SplitBy",
    "SplitSpec",
    "StoreSpec",
    "TagSpec",
    "TargetPer",
    "TaskSpec",
    "TrackSpec",
    "TrainSpec",
    "WandbMode",
    "Window",
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
    fp16 = "fp16"
    fp32 = "fp32"


class Schedule(enum.Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    inverse_sqrt = "inverse_sqrt"
    plateau = "plateau"


class RateScaling(enum.Enum):
    none = "none"
    linear = "linear"
    sqrt = "sqrt"


class Keep(enum.Enum):
    last = "last"
    best = "best"


class Parallel(enum.Enum):
    data = "data"
    sharded = "sharded"


class Recovery(enum.Enum):
    restart = "restart"
    replace = "replace"


class SplitBy(enum.Enum):
    entity = "entity"
    stratified = "stratified"
    time = "time"
    walk_forward = "walk_forward"


class Window(enum.Enum):
    expanding = "expanding"
    rolling = "rolling"


class Layout(enum.Enum):
    rows = "rows"
    events = "events"


class Format(enum.Enum):
    auto = "auto"
    parquet = "parquet"
    arrow = "arrow"
    csv = "csv"
    jsonl = "jsonl"
    huggingface = "huggingface"


class TargetPer(enum.Enum):
    row = "row"
    frame = "frame"
    sequence = "sequence"


class OnBadRow(enum.Enum):
    fail = "fail"
    quarantine = "quarantine"


class Missing(enum.Enum):
    refuse = "refuse"
    mean = "mean"
    indicator = "indicator"


class Leak(enum.Enum):
    entity = "entity"
    window = "window"
    content = "content"
    future = "future"
    statistics = "statistics"
    feature = "feature"


class Budget(enum.Enum):
    slots = "slots"
    frames = "frames"


class LongRows(enum.Enum):
    refuse = "refuse"
    chunk = "chunk"


class ClassWeights(enum.Enum):
    none = "none"
    balanced = "balanced"


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
    class_weights: ClassWeights = ClassWeights.none
    """What a row counts in the loss: alike, or by how rare its label is in training rows."""


@dataclass(frozen=True, kw_only=True)
class LanguageSpec(TaskSpec):
    """The next symbol after each one: a language model of whatever the symbols are."""

    kind: ClassVar[str] = "language"
    tied: bool = False
    """Use the embedding's vectors as the weights of the output, too; fewer weights for large vocabularies."""


@dataclass(frozen=True, kw_only=True)
class TagSpec(TaskSpec):
    """One label for each frame that has one."""

    kind: ClassVar[str] = "tag"
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the target probability spread over all classes."""


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which data set, from what source, and what its rows must keep to."""

    name: Annotated[str, MinLen(1)]
    """Name of the data set in the store."""
    source: str | None = None
    """A URL, folder, file or pattern of files, for the preparation script; for `columns` where there is none."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Expected sha256 of each source file, by file name; a mismatch stops the build."""
    format: Format = Format.auto
    """Of the source files; auto goes by their names. Not used by a preparation script."""
    licence: str = "not stated"
    """Of the source, a line for people. A preparation script says its own."""
    limit: Annotated[int, Ge(1)] | None = None
    """Keep only this many entities (chosen by hash), for a trial run."""
    max_length: Annotated[int, Ge(1)] = 100_000
    """Longest sequence accepted, in time steps."""
    missing: Missing = Missing.refuse
    """Values that are NaN or null: refused, replaced by the mean, or that and a channel more that says so."""
    gaps: bool = False
    """Give the time since the frame before to the model, as one more channel."""
    on_bad_row: OnBadRow = OnBadRow.fail
    """What a row that breaks a rule does: fail the build, with all of them listed, or be set aside in a file."""
    bad_rows: Annotated[float, Ge(0)] = 0.01
    """Most rows to set aside: a share of all below 1, else a number. More fail the build."""
    allow_leaks: list[Leak] = field(default_factory=list)
    """Findings of the leakage audit that are accepted; they are kept with the data set and the model."""

    def __post_init__(self) -> None:
        wire.check_name("data.name", self.name)


@dataclass(frozen=True, kw_only=True)
class ColumnsSpec:
    """Which column of the source files is what, where no preparation script says it."""

    layout: Layout = Layout.rows
    """`rows`: a line is a whole sequence, its columns lists. `events`: a line is one frame of its entity."""
    entity: str | None = None
    """What must not stand in two splits: a word, a person, a recording. Its own number where there is none."""
    group: str | None = None
    """What is split as one where that is more than the entity: a family, a matched set."""
    id: str | None = None
    """A key that no two rows share."""
    inputs: list[str] = field(default_factory=list)
    """One column of symbols or ids, or one column of numbers for each channel."""
    symbols: list[str] = field(default_factory=list)
    """The vocabulary, where it is closed: others break a rule. Else it is what training rows hold."""
    lower: dict[str, float] = field(default_factory=dict)
    """Least value of an input or target column."""
    upper: dict[str, float] = field(default_factory=dict)
    """Largest value of an input or target column."""
    times: str | None = None
    """When each frame was: a list of numbers that never fall, or for events a number or a timestamp."""
    time: str | None = None
    """When a row is asked about: nothing it holds may be later, and splits by time go by it."""
    weight: str | None = None
    """What a row counts in the loss; 1 where there is none."""
    split: str | None = None
    """`train`, `valid` or `test` where the source says it."""
    target: list[str] = field(default_factory=list)
    """One column of labels, or one column for each value to be predicted."""
    target_per: TargetPer = TargetPer.row
    """Whether a target is of the row, of each frame, or a sequence of its own (for `ctc`)."""
    labels: list[str] = field(default_factory=list)
    """The labels in the order of their ids; those that occur, sorted, where there are none."""


@dataclass(frozen=True, kw_only=True)
class SplitSpec:
    """Which rows are trained on, which are watched, which are the test. Where the source says it, the source."""

    by: SplitBy = SplitBy.entity
    """By hash of the entity, so and with like shares of labels, by time, or by one fold of walking forward in time."""
    valid: Annotated[float, Ge(0)] = 0.0
    """Set aside to watch training with: a share below 1, else a number. Of entities; of rows where it goes by time."""
    test: Annotated[float, Ge(0)] = 0.0
    """Set aside for the final evaluation, unless the source says which: as `valid`."""
    seed: Annotated[int, Ge(0)] = 0
    """Of the hash."""
    horizon: Annotated[float, Ge(0)] = 0.0
    """How long after its time a row's target is decided. Splits by time drop rows that are so near to a later one."""
    embargo: Annotated[float, Ge(0)] = 0.0
    """Time left empty between two splits, beside the horizon; of splits by time."""
    folds: Annotated[int, Ge(2)] = 5
    """Test blocks, one after the other, of walking forward."""
    fold: Annotated[int, Ge(0)] = 0
    """Which of them is the test."""
    window: Window = Window.expanding
    """Train on everything before the test block, or on the latest `train_rows` of it."""
    train_rows: Annotated[int, Ge(1)] | None = None
    """Of a rolling window."""
    disjoint: bool = False
    """Also drop training rows of entities that occur in a later split, where it goes by time."""

    def __post_init__(self) -> None:
        for name in ("valid", "test"):
            value = getattr(self, name)
            if value >= 1 and value != int(value):
                raise ConfigError(f"split.{name}: got {value}, expected a share below 1 or a whole number")
        if self.fold >= self.folds:
            raise ConfigError(f"split.fold: got {self.fold}, expected below split.folds = {self.folds}")
        if self.embargo and self.by in (SplitBy.entity, SplitBy.stratified):
            raise ConfigError(
                f"split.embargo: got {self.embargo:g}, expected 0 beside split.by={self.by.value}: only splits by time "
                "have time between them"
            )
        if self.window is Window.rolling and self.train_rows is None:
            raise ConfigError("split.train_rows: got null, expected a number of rows beside split.window=rolling")


@dataclass(frozen=True, kw_only=True)
class AugmentSpec:
    """Random changes of training rows, drawn from (seed, epoch, row), so that a resumed run draws the same."""

    jitter: Annotated[float, Ge(0)] = 0.0
    """Standard deviation of noise added to frames, in deviations of the channel."""
    scale: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Frames of a row are multiplied by 1 +- this at most."""
    time_masks: Annotated[int, Ge(0), Le(16)] = 0
    """Spans of a row that are blanked: frames become the mean, symbols unknown."""
    time_mask_share: Annotated[float, Gt(0), Le(1)] = 0.1
    """Longest such span, as a share of the row."""
    channel_masks: Annotated[int, Ge(0), Le(16)] = 0
    """Spans of channels that are blanked over the whole row."""
    channel_mask_share: Annotated[float, Gt(0), Le(1)] = 0.1
    """Widest such span, as a share of the channels."""
    warp: Annotated[float, Ge(0), Lt(1)] = 0.0
    """The middle of a row moves by this share of its length at most; the length stays."""
    crop: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of a row cut off at its ends, at most."""
    drop: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Probability of each frame to be left out; one at least stays."""

    @property
    def shortens(self) -> bool:
        """Whether rows may lose frames."""
        return self.crop > 0 or self.drop > 0


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """How sequences share a forward pass. Slots = rows x longest row, padding included."""

    max_slots: Annotated[str, MinLen(1)] = "4096"
    """Hard limit of one microbatch (one lane of one round), such as 8192 or 8k; `auto` finds the device's largest."""
    budget: Budget = Budget.slots
    """What the limit counts: padded slots, or real frames, which is what cells cost that read packed rows."""
    max_rows: Annotated[int, Ge(1)] = 4096
    """Most sequences in one microbatch."""
    lanes: Annotated[int, Ge(1), Le(4096)] | None = None
    """Canonical shares of a round, dealt to the ranks; the number of workers when not given."""
    rounds_per_update: Annotated[int, Ge(1)] = 1
    """Rounds, each from another length zone, whose gradients make one update."""
    noise: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Relative noise on lengths before sorting, so that no epoch has the batches of another."""
    multiple_of: Annotated[int, Ge(1), Le(4096)] = 1
    """Pad to a multiple of so many time steps: fewer distinct shapes, for compiled graphs."""
    long_rows: LongRows = LongRows.refuse
    """A row above the limit: refused before anything runs, or read in chunks that carry the state."""
    class_balance: Annotated[float, Ge(0), Le(1)] = 0.0
    """How far rare labels are repeated: 0 not at all, 1 until all labels occur alike; by powers between."""
    max_repeats: Annotated[int, Ge(1)] = 20
    """Most times that a row stands in one epoch because its label is rare."""
    streams: Annotated[int, Ge(1), Le(65536)] | None = None
    """Streams that a lane reads side by side: sequences laid end to end, the state carried from update to update.
    null: whole rows, batched by length."""
    chunk: Annotated[int, Ge(1)] = 256
    """Most frames of each stream in an update, which gradients flow back through; beside `streams`."""

    def __post_init__(self) -> None:
        try:
            is_sound = self.is_auto or self.slots >= 1
        except ConfigError:
            is_sound = False
        if not is_sound:
            raise ConfigError(f"batch.max_slots: got {self.max_slots!r}, expected a count such as 8192 or 8k, or auto")

    @property
    def is_auto(self) -> bool:
        """Whether the limit is found on the device."""
        return self.max_slots == "auto"

    @property
    def slots(self) -> int:
        """The limit as a number.

        Raises:
            ConfigError: it is `auto`, or no quantity.
        """
        if self.is_auto:
            raise ConfigError("batch.max_slots: got auto, expected a number here", hint="batch.max_slots=4096")
        return parse_count(self.max_slots)


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """How weights move; the subclass says by which rule."""

    kind: ClassVar[str]
    lr: Annotated[float, Gt(0), Le(100)] = 1e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Weight decay of matrices: taken from the weights, by `sgd` through the gradient. Biases and gains have none."""
    schedule: Schedule = Schedule.cosine
    """Course of the rate after the warm-up, down to `final_lr_share` of the peak; `inverse_sqrt` has no floor,
    `plateau` lowers it where evaluations get no better."""
    warmup_share: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Share of all updates during which the rate rises linearly."""
    final_lr_share: Annotated[float, Ge(0), Le(1)] = 0.05
    """Rate at the end, as a share of the peak."""
    clip_norm: Annotated[float, Gt(0)] | None = 1.0
    """Largest global gradient norm; null switches clipping off."""
    clip_value: Annotated[float, Gt(0)] | None = None
    """Largest absolute value of each gradient element, applied after `clip_norm`; null switches it off."""
    plateau_factor: Annotated[float, Gt(0), Lt(1)] = 0.5
    """What `schedule=plateau` multiplies the rate by."""
    plateau_patience: Annotated[int, Ge(0)] = 2
    """Evaluations without improvement that it lets pass; at the next one it does."""
    rate_scaling: RateScaling = RateScaling.none
    """How `lr` grows with the mean rows of an update, from the `base_rows` it was found at."""
    base_rows: Annotated[int, Ge(1)] | None = None
    """Rows of an update at which `lr` was found; needed beside `rate_scaling`."""
    decay_embeddings: bool = True
    """Weight decay also holds for embeddings."""
    ema: Annotated[float, Gt(0), Lt(1)] | None = None
    """Decay of a running mean of the weights, per update, which is evaluated and kept as the model; null: none."""

    def __post_init__(self) -> None:
        if self.rate_scaling is not RateScaling.none and self.base_rows is None:
            raise ConfigError(
                f"optim.base_rows: got null, expected a number beside optim.rate_scaling={self.rate_scaling.value}",
                hint="the rows of an update at which optim.lr was found",
            )


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
class RmsPropSpec(OptimSpec):
    kind: ClassVar[str] = "rmsprop"
    alpha: Annotated[float, Ge(0), Lt(1)] = 0.99
    """Decay of the mean of squared gradients."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Momentum; 0 keeps none."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the mean."""


@dataclass(frozen=True, kw_only=True)
class GuardSpec:
    """What happens where training leaves its course. All ranks decide alike."""

    spike: Annotated[float, Gt(1)] | None = 50.0
    """An update whose gradient norm is above this many times the running mean of the accepted ones (a geometric mean)
    is skipped, unless the norms have long spread so wide by themselves; null: only those that are not finite."""
    warmup_updates: Annotated[int, Ge(1)] = 100
    """Accepted updates before spikes are judged, and length of the running mean."""
    roll_back_after: Annotated[int, Ge(1)] = 3
    """Updates skipped in a row at which the run goes back to its last checkpoint."""
    rate_factor: Annotated[float, Gt(0), Le(1)] = 0.5
    """What a roll-back multiplies the learning rate by, for the rest of the run."""
    max_roll_backs: Annotated[int, Ge(0)] = 3
    """Roll-backs before the run ends with exit code 5."""


@dataclass(frozen=True, kw_only=True)
class PrecisionSpec:
    """In what number format the forward and backward passes run. Weights stay in fp32."""

    mode: Precision = Precision.auto
    """auto times a short step in bf16 (fp16 where a device lacks it) and fp32 and takes the faster sound one."""


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
    patience: Annotated[int, Ge(1)] | None = None
    """Evaluations without improvement of the headline metric after which training ends early; null: never."""
    min_delta: Annotated[float, Ge(0)] = 0.0
    """Least change of the headline metric, against its best value so far, that counts as an improvement."""
    keep: Keep = Keep.last
    """Which weights become the model: of the last update, or of the best evaluation."""
    recompute: bool = False
    """Compute activations again on the way back instead of keeping them: less memory, a third more time."""
    compile: bool = False
    """Run the network through torch.compile."""
    check_replicas_every: Annotated[int, Ge(1)] | None = 500
    """Updates between two comparisons of the ranks' weights, which must be equal bit by bit; null: never."""

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
    min_workers: Annotated[int, Ge(1)] | None = None
    """Go on with as few workers as this where nodes are lost; batches stay those of `workers`. null: never fewer."""
    parallel: Parallel = Parallel.data
    """`data`: every rank holds the whole network. `sharded`: parameters and moments are spread (FSDP2)."""
    recovery: Recovery = Recovery.replace
    """A lost rank: `replace` it, the others keep their state; or `restart` all from the last checkpoint."""
    max_failures: Annotated[int, Ge(0)] = 3
    """Lost ranks and nodes in a row, without a checkpoint between, that a run outlives."""
    max_preemptions: Annotated[int, Ge(0)] | None = None
    """Preempted nodes that a run outlives; null: any number."""
    hang_after: str = "10s"
    """Least time without progress after which a rank counts as hung; never below 5 median updates."""

    def __post_init__(self) -> None:
        if self.hang_after_s <= 0:
            raise ConfigError(f"cluster.hang_after: got {self.hang_after!r}, expected more than 0 s")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ConfigError(
                f"cluster.min_workers: got {self.min_workers}, expected at most cluster.workers = {self.workers}"
            )

    @property
    def hang_after_s(self) -> float:
        return parse_duration_s(self.hang_after)


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
    columns: ColumnsSpec = ColumnsSpec()
    split: SplitSpec = SplitSpec()
    augment: AugmentSpec = AugmentSpec()
    batch: BatchSpec = BatchSpec()
    optim: OptimSpec
    guard: GuardSpec = GuardSpec()
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

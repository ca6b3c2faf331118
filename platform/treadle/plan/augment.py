"""Which changes of training rows a job can ask for: what the task and the kind of input allow."""

from __future__ import annotations

from treadle.errors import ConfigError
from treadle.spec import AugmentSpec, CtcSpec, InputKind, JobSpec, LongRows, Missing, Signature

__all__ = ["check_augment"]

_OF_FRAMES = ("jitter", "scale", "channel_masks", "warp")
_NEEDS_WHOLE_ROWS = ("crop", "drop", "warp")


def check_augment(spec: JobSpec, signature: Signature) -> None:
    """Nothing, where `augment` asks for what this job's rows can take.

    Raises:
        ConfigError: a line for each of these: symbols that are to be jittered, scaled, warped or masked by channel;
            rows to be shortened whose targets may then have no alignment; whole rows to be changed that are read in
            pieces; masks that are too narrow to hold one channel.
    """
    augment = spec.augment
    if augment == AugmentSpec():
        return
    problems: list[str] = []
    tokens = signature.input_kind is InputKind.tokens

    def refuse(names: tuple[str, ...], why: str) -> None:
        problems.extend(f"augment.{name}: got {getattr(augment, name):g}, expected 0 {why}" for name in names)

    def asked(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if getattr(augment, name))

    if tokens:
        refuse(asked(_OF_FRAMES), "where inputs are symbols")
    if isinstance(spec.task, CtcSpec):
        refuse(asked(("crop", "drop")), "with task=ctc: a shortened row may have no alignment")
    if spec.batch.long_rows is LongRows.chunk:
        refuse(asked(_NEEDS_WHOLE_ROWS), "beside batch.long_rows=chunk, which reads rows in pieces")
    if augment.channel_masks and not tokens:
        channels = num_channels(spec, signature)
        if augment.channel_mask_share * channels < 1:
            problems.append(
                f"augment.channel_mask_share: got {augment.channel_mask_share:g} of {channels} channels, "
                f"expected {1 / channels:.2g} or more, one channel"
            )
    if problems:
        raise ConfigError("\n".join(problems), hint="augment=none, or leave these out")


def num_channels(spec: JobSpec, signature: Signature) -> int:
    """Channels of a frame as the source has them: without what says that a value is missing, and without the gap."""
    read = signature.input_size - spec.data.gaps
    return read // 2 if spec.data.missing is Missing.indicator else read

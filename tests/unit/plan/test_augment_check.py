"""Changes of rows that a job cannot have, all said at once."""

from __future__ import annotations

import pytest

from treadle.errors import ConfigError
from treadle.plan.augment import check_augment
from treadle.spec import (
    AdamWSpec,
    AugmentSpec,
    BatchSpec,
    ClassifySpec,
    CtcSpec,
    DataSpec,
    GruSpec,
    InputKind,
    JobSpec,
    LongRows,
    Missing,
    Signature,
    StoreSpec,
)

TOKENS = Signature(input_kind=InputKind.tokens, input_size=30, num_labels=5, max_length=64)
FRAMES = Signature(input_kind=InputKind.frames, input_size=9, num_labels=5, max_length=64)
ALL = AugmentSpec(jitter=0.1, scale=0.1, time_masks=1, channel_masks=1, channel_mask_share=0.3, warp=0.1)


def job(augment, task=None, **changes):
    return JobSpec(
        name="toy",
        task=task or ClassifySpec(),
        model=GruSpec(),
        data=changes.pop("data", DataSpec(name="toy")),
        optim=AdamWSpec(),
        store=StoreSpec(uri="/nowhere"),
        augment=augment,
        **changes,
    )


@pytest.mark.parametrize(
    ("spec", "signature"),
    [
        (job(AugmentSpec(), CtcSpec()), TOKENS),
        (job(AugmentSpec(time_masks=2, crop=0.1, drop=0.1)), TOKENS),
        (job(ALL), FRAMES),
        (job(ALL, CtcSpec()), FRAMES),
        (job(AugmentSpec(jitter=0.1, time_masks=1), batch=BatchSpec(long_rows=LongRows.chunk)), FRAMES),
    ],
)
def test_what_rows_can_take_is_accepted(spec, signature):
    check_augment(spec, signature)


def test_all_that_symbols_cannot_take_is_said_at_once():
    with pytest.raises(ConfigError) as refused:
        check_augment(job(ALL), TOKENS)
    for name in ("jitter", "scale", "channel_masks", "warp"):
        assert f"augment.{name}: got " in refused.value.message
    assert "time_masks" not in refused.value.message


@pytest.mark.parametrize("name", ["crop", "drop"])
def test_rows_that_need_an_alignment_are_not_shortened(name):
    with pytest.raises(ConfigError, match=rf"augment\.{name}: got 0\.2, expected 0 with task=ctc"):
        check_augment(job(AugmentSpec(**{name: 0.2}), CtcSpec()), FRAMES)


@pytest.mark.parametrize("name", ["crop", "drop", "warp"])
def test_rows_that_are_read_in_pieces_are_not_changed_as_a_whole(name):
    spec = job(AugmentSpec(**{name: 0.2}), batch=BatchSpec(long_rows=LongRows.chunk))
    with pytest.raises(ConfigError, match=rf"augment\.{name}: .* pieces"):
        check_augment(spec, FRAMES)


def test_a_mask_too_narrow_for_a_channel_is_refused():
    masks = AugmentSpec(channel_masks=1, channel_mask_share=0.2)
    check_augment(job(masks), FRAMES)  # 9 channels
    data = DataSpec(name="toy", missing=Missing.indicator, gaps=True)
    with pytest.raises(ConfigError, match=r"got 0\.2 of 4 channels, expected 0\.25 or more"):
        check_augment(job(masks, data=data), FRAMES)  # 4, 4 that say whether they were observed, and the gap

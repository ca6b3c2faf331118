"""Splits and augmentation in a few words."""

from __future__ import annotations

import pytest

from treadle.launch.words import augment_words, split_words
from treadle.spec import AugmentSpec, SplitBy, SplitSpec, Window


@pytest.mark.parametrize(
    ("split", "words"),
    [
        (SplitSpec(), "by entity"),
        (SplitSpec(valid=2000, test=0.125, seed=3), "by entity, 2,000 to watch, 12.5% to test, seed 3"),
        (SplitSpec(by=SplitBy.stratified, test=0.1), "by entity, stratified by label, 10% to test"),
        (
            SplitSpec(by=SplitBy.time, valid=0.1, test=0.1, horizon=30, embargo=7, disjoint=True),
            "by time, 10% to watch, 10% to test, horizon 30, embargo 7, entities of later splits dropped",
        ),
        (
            SplitSpec(by=SplitBy.walk_forward, fold=1, test=0.3, window=Window.rolling, train_rows=5000),
            "walking forward, test block 2 of 5, rolling window of 5,000 rows",
        ),
    ],
)
def test_a_split(split: SplitSpec, words: str) -> None:
    assert split_words(split) == words


def test_augmentation() -> None:
    assert augment_words(AugmentSpec()) == ""
    assert augment_words(AugmentSpec(time_mask_share=0.5)) == ""
    assert augment_words(AugmentSpec(jitter=0.05, time_masks=1, channel_masks=2, channel_mask_share=0.3)) == (
        "jitter 0.05, 1 time mask of up to 10%, 2 channel masks of up to 30%"
    )

"""Parts of a job in a few words, for plans, cards and data sets."""

from __future__ import annotations

from dataclasses import fields

from treadle.spec import AugmentSpec, SplitBy, SplitSpec, Window

__all__ = ["augment_words", "split_words"]


def split_words(split: SplitSpec) -> str:
    """How rows are split: `by time, 10% to watch, 10% to test, horizon 30`. What the source says comes before it."""
    by = split.by.value.replace("_", " ")
    words = [f"by {by}" if split.by is not SplitBy.stratified else "by entity, stratified by label"]
    if split.by is SplitBy.walk_forward:
        words = [f"walking forward, test block {split.fold + 1} of {split.folds}", f"{split.window.value} window"]
        if split.window is Window.rolling:
            words[-1] += f" of {split.train_rows:,} rows"
    shares = {"to watch": split.valid, "to test": 0.0 if split.by is SplitBy.walk_forward else split.test}
    words += [f"{_share(share)} {what}" for what, share in shares.items() if share]
    if split.by in (SplitBy.time, SplitBy.walk_forward):
        words += [f"{name} {getattr(split, name):g}" for name in ("horizon", "embargo") if getattr(split, name)]
        words += ["entities of later splits dropped"] if split.disjoint else []
    elif split.seed:
        words.append(f"seed {split.seed}")
    return ", ".join(words)


def _share(share: float) -> str:
    return f"{100 * share:.3g}%" if share < 1 else f"{int(share):,}"


def augment_words(augment: AugmentSpec) -> str:
    """What is changed of training rows, and how far; "" where nothing is."""
    default = AugmentSpec()
    words = []
    for field in fields(augment):
        value = getattr(augment, field.name)
        if field.name.endswith("_share") or value == getattr(default, field.name):
            continue
        name = field.name.replace("_", " ")
        if field.name.endswith("_masks"):
            share = getattr(augment, f"{field.name.removesuffix('s')}_share")
            words.append(f"{value} {name if value > 1 else name.removesuffix('s')} of up to {share:.0%}")
        else:
            words.append(f"{name} {value:g}")
    return ", ".join(words)

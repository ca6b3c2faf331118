"""What training could know of the rows that it is judged by: one check for each way in which it leaks.

Shape letters: R rows, D channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from treadle.data.draft import SPLITS
from treadle.data.manifest import NO_SPLIT, Finding, Manifest, Preprocessing
from treadle.data.splits.assign import is_timed, window_reaches
from treadle.data.splits.features import Telling, telling_features
from treadle.data.splits.fit import RowSource
from treadle.spec import DataSpec, Leak, SplitSpec

__all__ = ["HINTS", "audit"]

TOLERANCE = 1e-5
"""In deviations. Fitting on other rows too moves a mean by about 1 / sqrt(rows), in float32 by 1e-7."""
MOST_AUC = 0.99
_SHOWN = 3

HINTS = {
    Leak.entity: "give rows that belong together one entity or group, or let split.by place them",
    Leak.window: "split.by=time with split.horizon drops such rows; split.horizon=0 where targets are decided at once",
    Leak.content: "drop one of the two, or give both rows one entity",
    Leak.future: "cut each row at the time when it is asked about",
    Leak.statistics: "fit on the training rows: leave preprocessing out",
    Leak.feature: "leave the feature out if it is made after the answer is known",
}


def audit(
    rows: Manifest,
    split_R: NDArray[np.uint8],
    preprocessing: Preprocessing,
    reader: RowSource,
    data: DataSpec,
    split: SplitSpec,
    *,
    fitted: Preprocessing | None = None,
) -> tuple[Finding, ...]:
    """What leaks, at most one finding of each kind.

    - entity: an entity or group in two splits; of splits by time only if `split.disjoint` asks for it.
    - window: a row's label window (time, time + horizon] reaches into a later split, by time or given by the source, or
      the windows of the later split reach the row.
    - content: equal rows in two splits.
    - future: a row holds a frame later than the time when it is asked about.
    - statistics: scales or symbols that are not those of the training rows.
    - feature: one feature alone tells a label from all others (features.py).

    Args:
        rows: before the split: its column `split` is what the source says.
        split_R: place in SPLITS of each row, or NO_SPLIT.
        data: of the job; its `allow_leaks` says which findings are accepted. split: of the job.
        fitted: what the training rows say, where `preprocessing` was not fitted on them just now.

    Cost: 1 s per million rows, and up to five seconds for features; reads a sample of the training rows.
    """
    details = {
        Leak.entity: _entity(rows, split_R, reader, split),
        Leak.window: _window(rows, split_R, reader, split),
        Leak.content: _content(rows, split_R, reader),
        Leak.future: _future(rows, split_R, reader),
        Leak.statistics: _statistics(preprocessing, fitted) if fitted else "",
        Leak.feature: _feature(rows, split_R, preprocessing, reader),
    }
    allowed = data.allow_leaks
    return tuple(
        Finding(leak=leak, accepted=leak in allowed, detail=detail) for leak, detail in details.items() if detail
    )


def _entity(rows: Manifest, split_R: NDArray[np.uint8], reader: RowSource, split: SplitSpec) -> str:
    if is_timed(split) and not split.disjoint:
        return ""  # one person at several times: the label window is the guard
    found = []
    for name, plural in (("entity", "entities"), ("group", "groups")):
        key_R = rows.columns[name]
        if name == "group" and (key_R == rows.columns["entity"]).all():
            continue
        count, pairs = _in_two_splits(key_R, split_R)
        if count:
            found.append(
                f"{count} {name if count == 1 else plural} in two splits: {_shown(pairs, count, split_R, reader)}"
            )
    return "; ".join(found)


def _content(rows: Manifest, split_R: NDArray[np.uint8], reader: RowSource) -> str:
    count, pairs = _in_two_splits(rows.columns["content"], split_R)
    if not count:
        return ""
    what = "row stands" if count == 1 else "rows stand"
    return f"{count} {what} in two splits with equal values and target: {_shown(pairs, count, split_R, reader)}"


def _in_two_splits(key_R: NDArray[np.uint64], split_R: NDArray[np.uint8]) -> tuple[int, list[tuple[int, int]]]:
    """How many keys stand in more than one split, and for the first of them a row in each of two splits."""
    kept = np.flatnonzero(split_R != NO_SPLIT)
    order = kept[np.lexsort((kept, split_R[kept], key_R[kept]))]
    same = key_R[order[1:]] == key_R[order[:-1]]
    at = np.flatnonzero(same & (split_R[order[1:]] != split_R[order[:-1]]))
    pairs = sorted(zip(order[at].tolist(), order[at + 1].tolist(), strict=True))
    return len(np.unique(key_R[order[at]])), pairs[:_SHOWN]


def _shown(pairs: Sequence[tuple[int, int]], count: int, split_R: NDArray[np.uint8], reader: RowSource) -> str:
    names = _entities([row for pair in pairs for row in pair], reader)
    places = [f"{name} in {SPLITS[split_R[row]]}" for name, row in zip(names, np.ravel(pairs), strict=True)]
    return _listed([f"{a} and {b}" for a, b in zip(places[::2], places[1::2], strict=True)], count)


def _entities(rows: Sequence[int], reader: RowSource) -> list[str]:
    """The entities of some rows, quoted."""
    return [repr(name) for name in reader.raw(np.array(rows, np.int64)).entities.to_pylist()]


def _listed(parts: Iterable[str], count: int) -> str:
    shown = list(parts)
    return ", ".join(shown) + (", ..." if count > len(shown) else "")


def _window(rows: Manifest, split_R: NDArray[np.uint8], reader: RowSource, split: SplitSpec) -> str:
    given_R = rows.columns["split"]
    by_source = ((given_R == SPLITS.index("valid")) | (given_R == SPLITS.index("test"))).any()
    if not split.horizon or not (by_source or is_timed(split)):
        return ""
    time_R = rows.columns["time"]
    reaching, first = 0, []
    for earlier, later in ((0, 1), (0, 2), (1, 2)):
        own = np.flatnonzero(split_R == earlier)
        found = own[window_reaches(time_R[own], split.horizon, time_R[split_R == later])]
        reaching += len(found)
        first += [(int(row), later) for row in found[: _SHOWN - len(first)]]
    if not reaching:
        return ""
    names = _entities([row for row, _ in first], reader)
    shown = (
        f"{name} in {SPLITS[split_R[row]]} at {time_R[row]:.15g} and {SPLITS[later]}"
        for name, (row, later) in zip(names, first, strict=True)
    )
    return (
        f"{reaching} rows are within a label window of {split.horizon:g} of a later split: {_listed(shown, reaching)}"
    )


def _future(rows: Manifest, split_R: NDArray[np.uint8], reader: RowSource) -> str:
    time_R, last_R = rows.columns["time"], rows.columns["last"]
    late = np.flatnonzero((last_R > time_R) & (split_R != NO_SPLIT))  # NaN is later than nothing
    if not len(late):
        return ""
    names = _entities(late[:_SHOWN].tolist(), reader)
    shown = (
        f"{name} is asked about at {time_R[row]:.15g} and goes on to {last_R[row]:.15g}"
        for name, row in zip(names, late.tolist(), strict=False)
    )
    return f"{len(late)} rows hold frames later than the time when they are asked about: {_listed(shown, len(late))}"


def _statistics(given: Preprocessing, fitted: Preprocessing) -> str:
    unlike = [
        f"{what} (got {a:.6g}, training rows have {b:.6g})"
        for what, a, b, scale in _numbers(given, fitted)
        if not abs(a - b) <= TOLERANCE * scale + 1e-12 * abs(b)
    ]
    unseen = sorted(set(given.symbols) - set(fitted.symbols))
    found = []
    if unlike:
        found.append(f"{len(unlike)} statistics are not of the training rows: {_listed(unlike[:_SHOWN], len(unlike))}")
    if unseen:
        shown = _listed(map(repr, unseen[:_SHOWN]), len(unseen))
        found.append(f"{len(unseen)} symbols of the vocabulary are in no training row: {shown}")
    return "; ".join(found)


def _numbers(given: Preprocessing, fitted: Preprocessing) -> Iterable[tuple[str, float, float, float]]:
    """Each fitted number: what it is, as given, as fitted, and the deviation that it is compared on."""
    for i, name in enumerate(fitted.channels):
        yield f"mean of {name!r}", given.mean[i], fitted.mean[i], fitted.deviation[i]
        yield f"deviation of {name!r}", given.deviation[i], fitted.deviation[i], fitted.deviation[i]
    pairs: dict[str, tuple[Sequence[float], Sequence[float]]]
    pairs = {f"target {i}": pair for i, pair in enumerate(zip(given.values, fitted.values, strict=True))}
    if fitted.gap:
        pairs["the gaps"] = (given.gap, fitted.gap)
    for name, (mine, theirs) in pairs.items():
        for what, a, b in zip(("mean", "deviation"), mine, theirs, strict=True):
            yield f"{what} of {name}", a, b, theirs[1]


def _feature(rows: Manifest, split_R: NDArray[np.uint8], preprocessing: Preprocessing, reader: RowSource) -> str:
    found = telling_features(rows, split_R, preprocessing, reader, above=MOST_AUC)
    if not found:
        return ""
    what = "rows" if (rows.columns["label"] >= 0).any() else "frames"
    shown = _listed([f"{one.feature} tells {_label(one)} (AUC {one.auc:.4f})" for one in found[:_SHOWN]], len(found))
    return (
        f"{len(found)} of the features each tell a label from all others, with an AUC above {MOST_AUC} on "
        f"{found[0].sample} {what}: {shown}"
    )


def _label(one: Telling) -> str:
    return "every label" if one.label is None else repr(one.label)

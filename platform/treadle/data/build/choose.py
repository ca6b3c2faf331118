"""Which rows of the parts a data set holds, and in which order.

Shape letters: R rows of all parts, run by run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.data.build.facts import FACTS
from treadle.data.build.parts import PartFacts, PartMeta
from treadle.data.build.quarantine import Quarantine, duplicate_ids
from treadle.data.chunk import Problem
from treadle.data.order import row_order
from treadle.errors import DataError
from treadle.spec import DataSpec

__all__ = ["Columns", "choose_rows", "gather_facts"]

Columns = dict[str, NDArray[Any]]
_OF_IDS = ("id", "place", "number", "file")


def gather_facts(counts: Sequence[int], parts: Iterable[PartFacts]) -> tuple[Columns, list[PartMeta]]:
    """The facts of all parts side by side: 80 bytes a row, 105 where rows have ids.

    Args:
        counts: rows of each part. parts: in their order, looked at one by one.
    """
    ends = np.cumsum([0, *counts])
    columns: Columns = {}
    metas: list[PartMeta] = []
    for part, start, stop in zip(parts, ends, ends[1:], strict=False):
        for name, values in part.columns.items():
            if name in _OF_IDS and not part.meta.keyed:
                continue
            if name not in columns:
                columns[name] = np.zeros(ends[-1], FACTS.field(name).type.to_pandas_dtype())
            columns[name][start:stop] = values
        metas.append(part.meta)
    return columns, metas


def choose_rows(data: DataSpec, columns: Columns, metas: Sequence[PartMeta]) -> tuple[NDArray[np.int64], bytes, int]:
    """The rows to be written in their order; the file of those set aside, b"" without, and how many these are.

    Of rows with one id the first of the source stays. `data.limit` keeps the entities with the smallest hashes.

    Raises:
        DataError: no rows, or more that break a rule than `data` allows.
    """
    quarantine = Quarantine(data)
    for meta in metas:
        quarantine.add(meta.problems)
    kept_R = _within_limit(columns["entity"], data.limit)
    num_good = sum(meta.num_good for meta in metas)
    if any(meta.keyed for meta in metas):
        num_good -= _leave_repeated(columns, kept_R, metas, quarantine)
    lines = quarantine.close(num_good)
    if not kept_R.any():
        raise DataError(f"data.{data.name}: got no rows, expected at least one", hint="look at data.source")
    order = row_order(columns)
    return order[kept_R[order]], lines, quarantine.num_rows


def _within_limit(entity_R: NDArray[np.uint64], limit: int | None) -> NDArray[np.bool_]:
    if limit is None:
        return np.ones(len(entity_R), bool)
    smallest = np.unique(entity_R)[:limit]
    return entity_R <= smallest[-1] if len(smallest) else np.ones(len(entity_R), bool)


def _leave_repeated(
    columns: Columns, kept_R: NDArray[np.bool_], metas: Sequence[PartMeta], quarantine: Quarantine
) -> int:
    """Take rows whose id an earlier row of the source has from those that are kept; gives how many these are."""
    part_R = np.repeat(np.arange(len(metas)), [sum(run.rows for run in meta.runs) for meta in metas])
    rows = np.flatnonzero(kept_R)
    rows = rows[np.lexsort((columns["place"][rows], part_R[rows]))]
    ids = columns["id"][rows]
    repeats = duplicate_ids(ids)
    kept_R[rows[repeats]] = False
    told = repeats[: quarantine.room(len(repeats), sum(meta.num_good for meta in metas))]
    seen, first = np.unique(ids, return_index=True)

    def place(row: int) -> tuple[str, int]:
        return metas[part_R[row]].files[columns["file"][row]], int(columns["number"][row])

    def problem(row: int, earlier: int) -> Problem:
        before, (file, number) = place(earlier), place(row)
        named = f"{before[0]}:{before[1]}" if before[0] else f"row {before[1]}"
        message = f"got the id of {named}, expected one that no other row has"
        return Problem(file=file, number=number, column="id", message=message)

    firsts = rows[first[np.searchsorted(seen, ids[told])]]
    quarantine.add(map(problem, rows[told].tolist(), firsts.tolist()))
    quarantine.count(len(repeats) - len(told))
    return len(repeats)

"""Rows that are set aside: their reasons, how many there may be, and the file in which they are kept."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.data.chunk import Problem
from treadle.errors import DataError
from treadle.spec import DataSpec, OnBadRow

__all__ = ["Quarantine", "duplicate_ids"]

SHOWN = 20
"""Problems that an error lists."""
_MOST_KEPT = 1_000_000
"""Rows whose reasons are kept; more than these are not set aside, whatever the budget."""


class Quarantine:
    """Collects what is wrong with the rows of one data set; rows are counted by file and number.

    Args:
        spec: `on_bad_row` and `bad_rows` are read.
        most: rows whose reasons are kept, and most that are set aside.

    Example:
        quarantine = Quarantine(spec.data)
        for chunk in source.read(part):
            good, problems = check_chunk(chunk, source.schema, max_length=spec.data.max_length)
            quarantine.add(problems)
        lines = quarantine.close(good_rows)
    """

    def __init__(self, spec: DataSpec, *, most: int = _MOST_KEPT) -> None:
        self._spec = spec
        self._most = most if spec.on_bad_row is OnBadRow.quarantine else 50 * SHOWN
        self._rows: dict[tuple[str, int], list[Problem]] = {}
        self._dropped = 0
        self._dropped_problems = 0

    @property
    def num_rows(self) -> int:
        """Rows with a problem, each counted once."""
        return len(self._rows) + self._dropped

    def add(self, problems: Iterable[Problem]) -> None:
        """Problems of rows in any order, all those of a row at once."""
        for problem in problems:
            self._rows.setdefault((problem.file, problem.number), []).append(problem)
        if len(self._rows) > 2 * self._most:  # the first ones stay, whatever the order in which parts are read
            for key in sorted(self._rows)[self._most :]:
                self._dropped_problems += len(self._rows.pop(key))
                self._dropped += 1

    def count(self, rows: int) -> None:
        """More rows with a problem each, which need not be told: there are others, and too many."""
        self._dropped += rows
        self._dropped_problems += rows

    def room(self, more: int, good_rows: int) -> int:
        """Of `more` rows of the `good_rows` that turn out bad, how many need a problem: all, unless they are too many.

        An error then names a few of them, and 10^8 problems would be 40 GB.
        """
        is_fatal = self._spec.on_bad_row is OnBadRow.fail or self.num_rows + more > self.allowed(
            good_rows + self.num_rows
        )
        return min(more, 50 * SHOWN) if is_fatal else more

    def close(self, good_rows: int) -> bytes:
        """The file of the rows set aside, a JSON object a line by file and number; b"" where there are none.

        Args:
            good_rows: rows without a problem.

        Raises:
            DataError: there are bad rows and `data.on_bad_row` is fail, or more than `data.bad_rows` allows; the
                first 20 problems are listed.
        """
        if not self.num_rows:
            return b""
        total = good_rows + self.num_rows
        if self._spec.on_bad_row is OnBadRow.fail:
            raise self._error(
                f"{self.num_rows} of {total} rows cannot be used, expected none",
                hint="mend them, or set them aside with data.on_bad_row=quarantine",
            )
        allowed = self.allowed(total)
        if self.num_rows > allowed:
            raise self._error(
                f"got {self.num_rows} bad rows of {total}, expected at most {allowed} "
                f"(data.bad_rows = {self._spec.bad_rows:g})",
                hint="mend them, or a larger data.bad_rows" if self.num_rows <= self._most else "mend them",
            )
        return b"".join(_line(self._rows[key]) for key in sorted(self._rows))

    def allowed(self, total: int) -> int:
        """Most rows that may be set aside, of so many."""
        share = self._spec.bad_rows
        return min(self._most, int(share * total + 1e-9) if share < 1 else int(share))

    def _error(self, message: str, *, hint: str) -> DataError:
        rows = [self._rows[key] for key in sorted(self._rows)[:SHOWN]]
        problems = [problem for row in rows for problem in row]
        known = sum(map(len, self._rows.values())) + self._dropped_problems
        more = known - min(known, SHOWN)
        shown = "\n".join(map(str, problems[:SHOWN])) + (f"\n... and {more} more" if more else "")
        return DataError(
            f"data.{self._spec.name}: {message}\n{shown}",
            hint=hint,
            bad_rows=self.num_rows,
            problems=[f"{problem}" for problem in problems[:SHOWN]],
        )


def _line(problems: list[Problem]) -> bytes:
    first = problems[0]
    value: dict[str, Any] = {"file": first.file, "row": first.number, "entity": first.entity}
    if first.where:
        value["where"] = first.where
    value["reasons"] = [f"{problem.column}: {problem.message}" for problem in problems]
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def duplicate_ids(hashes_R: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The rows, rising, whose id an earlier row has.

    Args:
        hashes_R: 64-bit hash of each row's id. Among 10^8 rows, two ids share one by accident once in 3,700 sets.

    Cost: a sort, about 0.1 s per million rows.
    """
    order = np.argsort(hashes_R, kind="stable")
    repeats = np.flatnonzero(hashes_R[order][1:] == hashes_R[order][:-1]) + 1
    return np.sort(order[repeats]).astype(np.int64)

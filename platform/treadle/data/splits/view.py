"""A data set as a job sees it: rows that are there already, split, scaled and audited.

No shard is written: a view is the rows' blocks with another split column and other statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from treadle import wire
from treadle.data.manifest import Finding, Manifest, Preprocessing
from treadle.data.splits.assign import assign
from treadle.data.splits.audit import HINTS, audit
from treadle.data.splits.fit import RowSource, fit_preprocessing
from treadle.errors import ConfigError, DataError
from treadle.spec import DataSpec, SplitSpec

__all__ = ["make_view"]


def make_view(
    rows: Manifest,
    reader: RowSource,
    data: DataSpec,
    split: SplitSpec,
    *,
    preprocessing: Preprocessing | None = None,
) -> Manifest:
    """The manifest of `rows` with splits, preprocessing, and what the audit accepted.

    Args:
        rows: a table of rows; its column `split` is what the source says. reader: of these rows.
        data, split: of a job.
        preprocessing: of a model that goes on with these rows; fitted on the training rows where it is None.

    Raises:
        ConfigError: a split or a scaling that such rows cannot have.
        DataError: no rows in a split that was asked for, values missing, or leaks that `data.allow_leaks` does not
            list, all of them in one message.

    Cost: one pass over the blocks, and the audit's seconds.
    """
    assigned = assign(rows.columns, split)
    fitted = fit_preprocessing(rows, assigned.split_R, reader, data)
    used = fitted if preprocessing is None else _usable(preprocessing, fitted)
    compared = None if preprocessing is None else fitted
    findings = audit(rows, assigned.split_R, used, reader, data, split, fitted=compared)
    _refuse([finding for finding in findings if not finding.accepted], data)
    header = dataclasses.replace(
        rows.header,
        preprocessing=used,
        split=wire.encode(split),
        dropped=assigned.dropped,
        findings=findings,
    )
    return Manifest(header=header, columns={**rows.columns, "split": assigned.split_R.astype(np.uint8)})


def _usable(given: Preprocessing, fitted: Preprocessing) -> Preprocessing:
    """`given`, if these rows have the form that it reads."""
    unlike = [name for name in ("channels", "labels", "missing") if getattr(given, name) != getattr(fitted, name)]
    unlike += [name for name in ("gap", "values") if len(getattr(given, name)) != len(getattr(fitted, name))]
    unlike += ["symbols"] if bool(given.symbols) != bool(fitted.symbols) else []
    if unlike:
        shown = "; ".join(
            f"{name} {_short(getattr(given, name))} for {_short(getattr(fitted, name))}" for name in unlike
        )
        raise ConfigError(
            f"preprocessing: got {shown}, expected what these rows have",
            hint="leave preprocessing out, and it is fitted on the training rows",
        )
    return given


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse(findings: Sequence[Finding], data: DataSpec) -> None:
    if not findings:
        return
    lines = [f"- {finding.leak.value}: {finding.detail}\n  {HINTS[finding.leak]}" for finding in findings]
    allowed = ",".join(sorted({leak.value for leak in (*data.allow_leaks, *(f.leak for f in findings))}))
    raise DataError(
        f"data.{data.name}: got {len(findings)} leaks from validation or test into training, expected none\n"
        + "\n".join(lines),
        hint=f"data.allow_leaks=[{allowed}] accepts what is meant to be so, and keeps it on record",
        leaks=[finding.leak.value for finding in findings],
    )

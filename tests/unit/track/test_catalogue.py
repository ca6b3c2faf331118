"""The table of metrics: complete, named alike everywhere, good directions right."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from treadle.errors import InternalError
from treadle.spec import ClassifySpec, CtcSpec, LanguageSpec, TagSpec, TaskSpec
from treadle.track import Direction, catalogue, evaluation_names, headline_name

TASKS = [CtcSpec(), CtcSpec(label_name="phone", sequence_name="word"), ClassifySpec(), LanguageSpec(), TagSpec()]
NAMES = ["ctc", "named ctc", "classify", "language", "tag"]


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_every_evaluation_name_is_there_for_both_splits(task: TaskSpec) -> None:
    known = catalogue(task)
    for name in evaluation_names(task):
        assert known[f"val/{name}"].good is known[f"test/{name}"].good is not Direction.level
    assert headline_name(task) in evaluation_names(task)
    assert headline_name(task) != "loss"


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_entries_are_well_formed_and_few(task: TaskSpec) -> None:
    known = catalogue(task)
    assert 15 <= len(known) <= 28
    groups = {"trainer", "train", "guard", "perf", "data", "val", "test", "ckpt"}
    for name, metric in known.items():
        assert name == metric.name
        assert metric.group in groups
        assert re.fullmatch(r"[A-Z].*[^ .]\.", metric.meaning), metric
        assert metric.unit == "share" or metric.name.rsplit("_", 1)[-1] != "share"


def test_ctc_names_come_from_the_task() -> None:
    task = CtcSpec(label_name="phone", sequence_name="word")
    assert evaluation_names(task) == ("loss", "phone_error_rate", "word_error_rate")
    assert catalogue(task)["val/phone_error_rate"].good is Direction.down
    assert "test/label_error_rate" not in catalogue(task)


def test_losses_say_what_they_are_divided_by() -> None:
    assert {catalogue(CtcSpec())[name].unit for name in ("train/loss", "val/loss")} == {"nats/label frame"}
    assert {catalogue(ClassifySpec())[name].unit for name in ("train/loss", "test/loss")} == {"nats/row"}
    for task in (LanguageSpec(), TagSpec()):
        assert {catalogue(task)[name].unit for name in ("train/loss", "test/loss")} == {"nats/frame"}


def test_a_task_without_metrics_is_a_bug() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Unheard(TaskSpec):
        pass

    with pytest.raises(InternalError, match="Unheard"):
        catalogue(Unheard())


def test_the_loop_and_the_catalogue_name_the_same_numbers(root: Path) -> None:
    """What train/ logs by a literal name is known, and no known name is never logged."""
    pattern = r'"((?:trainer|train|guard|perf|data|ckpt)/\w+)"'
    logged = {
        name
        for file in (root / "platform/treadle/train").glob("*.py")
        for name in re.findall(pattern, file.read_text())
    }
    for task in TASKS:
        known = {name for name in catalogue(task) if not name.startswith(("val/", "test/"))}
        assert logged == known

"""The README of treadle.nn: its code runs as it stands, and what it promises of that code holds."""

from __future__ import annotations

import inspect
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import treadle.nn
from treadle.nn import cells
from treadle.nn.stack import RecurrentStack

README = Path(treadle.nn.__file__).with_name("README.md")


@pytest.fixture
def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_every_block_runs_in_order(blocks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{README.name}, block {number + 1}", "exec"), names)
    assert len(blocks) >= 8


def test_the_forms_and_the_pieces_agree(blocks: list[str]) -> None:
    """The README says that every form gives the same numbers, and that pieces and steps give what the whole gives."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    layer, x_BTD = names["layer"], names["x_BTD"]
    whole: Tensor = layer(x_BTD)[0]
    exec(blocks[1], names)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(names["y_BTH"][1, :20], names["y_NH"][50:70], **close)
    torch.testing.assert_close(names["y_sequence"].data.sum(), names["y_NH"].sum(), rtol=1e-4, atol=1e-3)
    exec(blocks[2], names)
    torch.testing.assert_close(torch.cat((names["head"], names["tail"]), dim=1), whole, **close)
    torch.testing.assert_close(names["y_BD"], whole[:, -1], **close)
    torch.testing.assert_close(names["y_BTH"][:, 25:], layer(x_BTD[:, 25:])[0], **close)


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).resolve().exists(), target


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table(text: str, first: str) -> list[list[str]]:
    """The rows below the header that begins with `first`."""
    lines = text.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    body = itertools.takewhile(lambda line: line.startswith("|"), lines[begin + 2 :])
    return [cells_of(line) for line in body]


def test_the_figures_are_those_that_were_recorded(root: Path) -> None:
    results = root / "tests" / "bench" / "results"
    shown = {row[0]: row[2:] for row in table(README.read_text(encoding="utf-8"), "what the rows ask for")}
    tasks = table((results / "choose_tasks.md").read_text(encoding="utf-8"), "task")
    for name, _, _, *scores in tasks:
        assert shown.pop(name) == scores, name
    speed = table((results / "choose_speed.md").read_text(encoding="utf-8"), "layer")
    parameters = [int(row[1].replace(",", "")) for row in speed]
    wanted = {
        "training": [row[3] for row in speed],
        "one time step": [row[5] for row in speed],
        "weights": [f"{count / parameters[2]:.2f}" for count in parameters],
    }
    assert {name.split(",")[0].split(" of ")[0]: row for name, row in shown.items()} == wanted


def test_every_option_of_the_layers_is_named() -> None:
    """A new option of a stack or a cell belongs in the README's table."""
    text = README.read_text(encoding="utf-8")
    parameters = set(inspect.signature(RecurrentStack.__init__).parameters)
    for cell in (cells._RnnCell, cells._MinCell, cells._MinLstmCell):
        parameters |= set(inspect.signature(cell.__init__).parameters)
    known = {"self", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "options", "form"}
    missing = {name for name in parameters - known if f"`{name}`" not in text}
    assert not missing

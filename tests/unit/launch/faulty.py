"""Faults at exact places of a rank: a file `POINT.RANK` in a folder is Python that the rank runs there, once.

Points: started, assembled, update-N (N updates are made), valid and test (before the sums of an evaluation), swap
(before a checkpoint counts), holding, meet, level, share (while ranks come to one state), register, registered.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any


class Here:
    """This process."""

    folder = Path()
    rank = 0


def reach(point: str) -> None:
    """This process is at a point."""
    path = Here.folder / f"{point}.{Here.rank}"
    if path.exists():
        code = path.read_text()
        with contextlib.suppress(FileNotFoundError):  # once, whoever comes later
            path.rename(path.with_name(f"{path.name}.done"))
            exec(compile(code, str(path), "exec"), {"reach": reach})


def install(folder: str) -> None:
    """Look for faults from now on; before any rank is forked."""
    Here.folder = Path(folder)
    from treadle.launch import rank, worker
    from treadle.store.lease import Lease
    from treadle.train import evaluate, level, run

    _before(rank, "run_rank", lambda orders, *_: _be(orders.rank))
    _before(rank._Group, "meet", lambda *_: reach("meet"))
    _before(rank._Group, "meet_again", lambda *_: reach("holding"))
    _before(worker, "level", lambda *_: reach("level"))
    _before(level, "_share", lambda *_: reach("share"))
    _before(worker, "keep_model", lambda *_: reach("register"))
    _after(worker, "keep_model", lambda *_: reach("registered"))
    _after(worker, "assemble", lambda *_: reach("assembled"))
    _before(Lease, "swap", lambda *_: reach("swap"))
    _after(run.Reached, "at", lambda _, state: reach(f"update-{state.update}"))
    _after(evaluate.Evaluator, "__init__", lambda self, *_, split, **__: setattr(self, "split", split))
    _before(evaluate.Evaluator, "_summed", lambda self, *_: reach(self.split))


def _be(rank: int) -> None:
    Here.rank = rank
    reach("started")


def _before(place: Any, name: str, call: Any) -> None:
    function = getattr(place, name)

    @functools.wraps(function)
    def wrapped(*args: Any, **named: Any) -> Any:
        call(*args)
        return function(*args, **named)

    setattr(place, name, wrapped)


def _after(place: Any, name: str, call: Any) -> None:
    function = getattr(place, name)

    @functools.wraps(function)
    def wrapped(*args: Any, **named: Any) -> Any:
        found = function(*args, **named)
        call(*args, **(named if name == "__init__" else {}))
        return found

    setattr(place, name, wrapped)

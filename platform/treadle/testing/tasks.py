"""Sequence tasks whose answers are known, drawn as they are needed.

Shape letters: B rows, T time steps of the longest row, D features.

A task draws rows of unlike length and says what chance would score on them; `solve` works the answers out from the
rows alone. What stands at padded slots is drawn like everything else, so that a layer that reads it shows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from treadle.errors import ConfigError
from treadle.nn.losses import IGNORED

__all__ = [
    "AddingTask",
    "Chance",
    "CopyTask",
    "DelayedLabelTask",
    "Form",
    "ParityTask",
    "SelectiveCopyTask",
    "Task",
    "TaskBatch",
]


@dataclass(frozen=True, kw_only=True)
class TaskBatch:
    """Rows of a task.

    Args:
        x: tokens_BT, int64, or frames_BTD, fp32.
        lengths_B: frames of each row, int64 on the CPU.
        targets: int64 [B, T] where every frame may be asked (`IGNORED` where it is not), else one a row, [B]: int64
            for a class, fp32 for a number.
    """

    x: Tensor
    lengths_B: Tensor
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class Chance:
    """What the best guess scores that has not seen the row.

    Args:
        loss: mean cross-entropy in nats, or mean squared error, of an answer.
        accuracy: share of right answers; None where the answer is a number.
    """

    loss: float
    accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class Form:
    """What goes into a task and what comes out.

    Args:
        num_symbols: tokens that rows are made of, from 0; 0 where frames are numbers.
        frame_size: numbers of a frame; 0 where frames are tokens.
        num_classes: possible answers, from 0; 0 where the answer is a number.
        per_frame: whether frames are asked, or the row as a whole once it has been read.
    """

    num_symbols: int = 0
    frame_size: int = 0
    num_classes: int = 0
    per_frame: bool = False


class Task(ABC):
    """Draws rows and knows their answers. The same generator state gives the same rows."""

    @property
    @abstractmethod
    def form(self) -> Form:
        """What goes in and what comes out."""

    @abstractmethod
    def solve(self, x: Tensor, lengths_B: Tensor) -> Tensor:
        """The targets of rows, from the rows alone; see `TaskBatch`."""

    @abstractmethod
    def _rows(self, num_rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """x and lengths_B."""

    @property
    def chance(self) -> Chance:
        """What guessing scores; every answer is as likely as any other."""
        return Chance(loss=math.log(self.form.num_classes), accuracy=1 / self.form.num_classes)

    def draw(self, num_rows: int, generator: Generator) -> TaskBatch:
        """Rows and their answers, on the CPU.

        Args:
            num_rows: how many, 1 or more.
            generator: where chance comes from; a CPU generator.

        Raises:
            ConfigError: fewer rows than one.
        """
        _check("num_rows", num_rows, 1)
        x, lengths_B = self._rows(num_rows, generator)
        return TaskBatch(x=x, lengths_B=lengths_B, targets=self.solve(x, lengths_B))


@dataclass(frozen=True, kw_only=True)
class CopyTask(Task):
    """Symbols, a delay, and as many marks: at the marks the symbols are asked, in order.

    Source: Hochreiter and Schmidhuber 1997; in this form Arjovsky et al. 2016, arXiv 1511.06464, with a
    mark at each frame that is asked and a delay that differs from row to row.

    Args:
        num_values: different symbols. Tokens are 0 (blank), 1 (mark), and 2 up (symbols); answers count from 0.
        num_items: symbols of a row.
        shortest_delay, longest_delay: blanks between them and the marks.
    """

    num_values: int = 8
    num_items: int = 4
    shortest_delay: int = 0
    longest_delay: int = 16

    def __post_init__(self) -> None:
        _check("num_values", self.num_values, 2)
        _check("num_items", self.num_items, 1)
        _check_range("delay", self.shortest_delay, self.longest_delay, 0)

    @property
    def form(self) -> Form:
        return Form(num_symbols=2 + self.num_values, num_classes=self.num_values, per_frame=True)

    def _rows(self, num_rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
        delay_B = _between(self.shortest_delay, self.longest_delay, num_rows, generator)
        tokens_BT, step_T = self._slots(num_rows, delay_B, generator)
        answer_B = (self.num_items + delay_B)[:, None]
        blank_BT = (step_T >= self.num_items) & (step_T < answer_B)
        tokens_BT = tokens_BT.masked_fill(blank_BT, 0)
        return _marked(tokens_BT, answer_B, self.num_items), delay_B + 2 * self.num_items

    def _slots(self, num_rows: int, between_B: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """A symbol at every slot, and the number of each time step."""
        num_steps = 2 * self.num_items + int(between_B.max())
        tokens_BT = torch.randint(2, 2 + self.num_values, (num_rows, num_steps), generator=generator)
        return tokens_BT, torch.arange(num_steps)

    def solve(self, x: Tensor, lengths_B: Tensor) -> Tensor:
        """targets_BT: the symbols at the marks, in the order in which they were read."""
        step_T = torch.arange(x.shape[1])
        # Symbols first, as they were read; those behind a row come after its own, as many as there are marks.
        order_BT = (x < 2).long().argsort(dim=1, stable=True)
        place_BT = step_T - (lengths_B[:, None] - self.num_items)
        asked_BT = (place_BT >= 0) & (place_BT < self.num_items)
        items_BT = x.gather(1, order_BT) - 2
        return items_BT.gather(1, place_BT.clamp(0, self.num_items - 1)).masked_fill(~asked_BT, IGNORED)


@dataclass(frozen=True, kw_only=True)
class SelectiveCopyTask(CopyTask):
    """Symbols at places drawn among blanks, then as many marks, where the symbols are asked in order.

    A layer must tell symbols from blanks, and count both symbols and marks.

    Source: Gu and Dao 2023, arXiv 2312.00752, section 4.1.1; Feng et al. 2024, arXiv 2410.01201, section 4.2, where
    4,096 frames hold 16 symbols. Here the number of blanks differs from row to row.

    Args:
        num_values: different symbols. Tokens are 0 (blank), 1 (mark), and 2 up (symbols); answers count from 0.
        num_items: symbols of a row.
        shortest_delay, longest_delay: blanks among them.
    """

    def _rows(self, num_rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
        noise_B = _between(self.shortest_delay, self.longest_delay, num_rows, generator)
        tokens_BT, step_T = self._slots(num_rows, noise_B, generator)
        answer_B = (self.num_items + noise_B)[:, None]
        # The frames with the greatest of independent draws are a subset in which no frame is likelier than another.
        draw_BT = torch.rand(tokens_BT.shape, generator=generator).masked_fill(step_T >= answer_B, -1.0)
        chosen_BI = draw_BT.topk(self.num_items, dim=1).indices
        blank_BT = (step_T < answer_B).scatter(1, chosen_BI, value=False)
        return _marked(tokens_BT.masked_fill(blank_BT, 0), answer_B, self.num_items), noise_B + 2 * self.num_items


@dataclass(frozen=True, kw_only=True)
class AddingTask(Task):
    """Numbers from 0 to 1, two of them marked, one in each half of the row: their sum is asked.

    Source: Hochreiter and Schmidhuber 1997, experiment 4; in this form Le et al. 2015, arXiv 1504.00941.

    Args:
        shortest, longest: frames of a row, 2 or more. A frame is (number, 1 where marked else 0).
    """

    shortest: int = 20
    longest: int = 40

    def __post_init__(self) -> None:
        _check_range("length", self.shortest, self.longest, 2)

    @property
    def form(self) -> Form:
        return Form(frame_size=2)

    @property
    def chance(self) -> Chance:
        """1 is the best guess: the sum of two such numbers has a variance of 2 / 12."""
        return Chance(loss=1 / 6, accuracy=None)

    def _rows(self, num_rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
        lengths_B = _between(self.shortest, self.longest, num_rows, generator)
        num_steps = int(lengths_B.max())
        value_BT = torch.rand(num_rows, num_steps, generator=generator)
        mark_BT = torch.randint(0, 2, (num_rows, num_steps), generator=generator).float()
        mark_BT.masked_fill_(torch.arange(num_steps) < lengths_B[:, None], 0.0)
        half_B = lengths_B // 2
        for first_B, count_B in ((torch.zeros_like(half_B), half_B), (half_B, lengths_B - half_B)):
            share_B = torch.rand(num_rows, generator=generator, dtype=torch.float64)
            mark_BT.scatter_(1, (first_B + (share_B * count_B).long())[:, None], 1.0)
        return torch.stack((value_BT, mark_BT), dim=-1), lengths_B

    def solve(self, x: Tensor, lengths_B: Tensor) -> Tensor:
        """targets_B: the sum of the two marked numbers."""
        valid_BT = torch.arange(x.shape[1]) < lengths_B[:, None]
        return (x[..., 0] * x[..., 1] * valid_BT).sum(1)


@dataclass(frozen=True, kw_only=True)
class ParityTask(Task):
    """Bits: whether the ones so far are odd in number, asked at every frame or once at the end.

    The state must flip at every one. Layers whose state is h' = a h + b with a in (0, 1) and a, b set by the input
    alone (minGRU, minLSTM) cannot do that for rows of any length at finite precision, however many are stacked (Sarrof
    et al. 2024, arXiv 2405.17394; Grazzi et al. 2024, arXiv 2411.12537): what they learn on short rows fails on longer.

    Args:
        shortest, longest: frames of a row.
        running: ask at every frame, else at the end.
    """

    shortest: int = 1
    longest: int = 16
    running: bool = True

    def __post_init__(self) -> None:
        _check_range("length", self.shortest, self.longest, 1)

    @property
    def form(self) -> Form:
        return Form(num_symbols=2, num_classes=2, per_frame=self.running)

    def _rows(self, num_rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
        lengths_B = _between(self.shortest, self.longest, num_rows, generator)
        return torch.randint(0, 2, (num_rows, int(lengths_B.max())), generator=generator), lengths_B

    def solve(self, x: Tensor, lengths_B: Tensor) -> Tensor:
        """1 where the ones up to here, the frame included, are odd in number: targets_BT if running, else targets_B."""
        odd_BT = x.cumsum(1) % 2
        if self.running:
            return odd_BT.masked_fill(torch.arange(x.shape[1]) >= lengths_B[:, None], IGNORED)
        return odd_BT.gather(1, lengths_B[:, None] - 1)[:, 0]


@dataclass(frozen=True, kw_only=True)
class DelayedLabelTask(Task):
    """A cue at one of the first frames, distraction elsewhere: at the end the cue is asked.

    Args:
        num_cues: different cues, the tokens from 0 up.
        num_distractors: different other tokens, which come after them.
        cue_within: the cue is one of so many frames at the start of the row.
        shortest, longest: frames of a row.
    """

    num_cues: int = 6
    num_distractors: int = 6
    cue_within: int = 8
    shortest: int = 24
    longest: int = 48

    def __post_init__(self) -> None:
        _check("num_cues", self.num_cues, 2)
        _check("num_distractors", self.num_distractors, 1)
        _check("cue_within", self.cue_within, 1)
        _check_range("length", self.shortest, self.longest, self.cue_within)

    @property
    def form(self) -> Form:
        return Form(num_symbols=self.num_cues + self.num_distractors, num_classes=self.num_cues)

    def _rows(self, num_rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
        lengths_B = _between(self.shortest, self.longest, num_rows, generator)
        shape = (num_rows, int(lengths_B.max()))
        valid_BT = torch.arange(shape[1]) < lengths_B[:, None]
        other_BT = torch.randint(self.num_cues, self.num_cues + self.num_distractors, shape, generator=generator)
        cue_BT = torch.randint(0, self.num_cues, shape, generator=generator)
        place_B = torch.randint(0, self.cue_within, (num_rows,), generator=generator)
        here_BT = torch.zeros(shape, dtype=torch.bool).scatter(1, place_B[:, None], value=True)
        return torch.where(here_BT | ~valid_BT, cue_BT, other_BT), lengths_B

    def solve(self, x: Tensor, lengths_B: Tensor) -> Tensor:
        """targets_B: the cue."""
        cue_BT = (x < self.num_cues) & (torch.arange(x.shape[1]) < lengths_B[:, None])
        return x.gather(1, cue_BT.long().argmax(1, keepdim=True))[:, 0]


def _between(least: int, most: int, num_rows: int, generator: Generator) -> Tensor:
    return torch.randint(least, most + 1, (num_rows,), generator=generator)


def _marked(tokens_BT: Tensor, answer_B1: Tensor, num_items: int) -> Tensor:
    """`tokens_BT` with marks (1) from each row's `answer` on; behind them what was there."""
    step_T = torch.arange(tokens_BT.shape[1])
    return tokens_BT.masked_fill((step_T >= answer_B1) & (step_T < answer_B1 + num_items), 1)


def _check(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}: got {value}, expected {least} or more")


def _check_range(name: str, shortest: int, longest: int, least: int) -> None:
    _check(f"shortest {name}", shortest, least)
    _check(f"longest {name}", longest, shortest)

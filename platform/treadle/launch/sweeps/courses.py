"""Which trial is next: known points, what a search proposes, or the rounds of a population."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from treadle.errors import ConfigError
from treadle.launch.sweeps.desk import Desk
from treadle.launch.sweeps.records import Asked
from treadle.launch.sweeps.results import Trial, score
from treadle.spec.sweeps import ChoiceAxis, Exploit, IntervalAxis, Search, select
from treadle.store.sweeps import Member, MemberState

__all__ = ["Course", "Round", "Task", "build_course", "next_round"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A trial to go on with, to its end or to so many evaluations."""

    member: Member
    until: int | None = None


class Course(Protocol):
    """Gives out tasks; `ended` is told of each that was given out."""

    def next_task(self) -> Task | None:
        """A task, or None: there is none now, or (`is_over`) never again."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to give out. Something may still be under way."""
        ...

    def ended(self, task: Task, trial: Trial) -> None:
        """Take note of how a task ended."""
        ...


class Points:
    """The candidates in order; those that an earlier attempt began come first."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        over = {trial.number for trial in desk.trials() if trial.is_over}
        self._begun = deque(member for member in desk.members() if member.number not in over)
        self._num = len(desk.members())

    def next_task(self) -> Task | None:
        if self._begun:
            return Task(member=self._begun.popleft())
        if self._num == len(self._desk.frozen.candidates):
            return None
        member = self._desk.begin(self._desk.frozen.candidates[self._num])
        self._num += 1
        return Task(member=member)

    @property
    def is_over(self) -> bool:
        return not self._begun and self._num == len(self._desk.frozen.candidates)

    def ended(self, task: Task, trial: Trial) -> None: ...


class Proposals:
    """What Optuna's tree-structured Parzen estimator proposes, given all trials so far, earlier attempts' too."""

    def __init__(self, desk: Desk) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._desk = desk
        self._space = _distributions(desk.frozen.asked)
        trials = desk.trials()
        over = {trial.number for trial in trials if trial.is_over}
        self._begun = deque(member for member in desk.members() if member.number not in over)
        self._num = len(trials)
        # Another stream each time: the same draws would propose the same points again.
        sampler = optuna.samplers.TPESampler(seed=desk.frozen.asked.seed + self._num, constant_liar=True)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._open: dict[int, Any] = {}
        for trial in trials:
            if trial.is_over:
                self._add(trial)

    def next_task(self) -> Task | None:
        if self._begun:
            return Task(member=self._begun.popleft())
        while self._num < self._desk.frozen.asked.trials:
            self._num += 1
            proposed = self._study.ask(self._space)
            values = {key: _text(self._desk.frozen.asked, key, value) for key, value in proposed.params.items()}
            try:
                member = self._desk.begin(self._desk.proposed(values))
            except ConfigError:  # does not fit, for reasons that its choices and the ends of its numbers do not show
                self._study.tell(proposed, state=_state("FAIL"))
                continue
            self._open[member.number] = proposed
            return Task(member=member)
        return None

    @property
    def is_over(self) -> bool:
        return not self._begun and self._num >= self._desk.frozen.asked.trials

    def ended(self, task: Task, trial: Trial) -> None:
        proposed = self._open.pop(trial.number, None)
        if proposed is None:
            self._add(trial)
            return
        for number, (_, value) in enumerate(trial.evaluations, start=1):
            if math.isfinite(value):
                proposed.report(self._score(value), number)
        state, value = self._told(trial)
        self._study.tell(proposed, value, state=state)

    def _add(self, trial: Trial) -> None:
        import optuna

        state, value = self._told(trial)
        known = {key: _value(self._desk.frozen.asked, key, text) for key, text in trial.values.items()}
        between = {number: self._score(v) for number, (_, v) in enumerate(trial.evaluations, 1) if math.isfinite(v)}
        self._study.add_trial(
            optuna.trial.create_trial(
                params=known, distributions=self._space, value=value, state=state, intermediate_values=between
            )
        )

    def _told(self, trial: Trial) -> tuple[Any, float | None]:
        """The state and value of a trial in Optuna's words."""
        value = self._score(trial.value)
        if trial.state == MemberState.finished.value and value > -math.inf:
            return _state("COMPLETE"), value
        return _state("PRUNED" if trial.state == MemberState.pruned.value and trial.evaluations else "FAIL"), None

    def _score(self, value: float | None) -> float:
        return score(value, larger_is_better=self._desk.frozen.asked.larger_is_better)


def _state(name: str) -> Any:
    import optuna

    return optuna.trial.TrialState[name]


def _distributions(asked: Asked) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for axis in asked.axes:
        if isinstance(axis, ChoiceAxis):
            found[axis.key] = CategoricalDistribution(axis.texts)
        elif isinstance(axis, IntervalAxis) and axis.is_whole:
            found[axis.key] = IntDistribution(int(axis.at(0)), int(axis.at(1)), log=axis.is_log)
        elif isinstance(axis, IntervalAxis):
            found[axis.key] = FloatDistribution(axis.low, axis.high, log=axis.is_log)
    return found


def _text(asked: Asked, key: str, value: Any) -> str:
    axis = next(axis for axis in asked.axes if axis.key == key)
    return axis.text(value) if isinstance(axis, IntervalAxis) else value


def _value(asked: Asked, key: str, text: str) -> Any:
    axis = next(axis for axis in asked.axes if axis.key == key)
    if not isinstance(axis, IntervalAxis):
        return text
    return int(text) if axis.is_whole else float(text)


# ---- population-based training


@dataclass(frozen=True, kw_only=True)
class Round:
    """What a population needs next.

    Args:
        number: of the round, from 1. until: evaluations at which it is compared; None: it ends.
        waiting: trials that are not there yet. exploits: slots that go on from another, where all are there.
        holders: the trial in each slot.
    """

    number: int
    until: int | None
    waiting: tuple[Trial, ...]
    exploits: tuple[Exploit, ...]
    holders: tuple[Trial, ...]


def next_round(trials: Sequence[Trial], asked: Asked) -> Round | None:
    """The round that a population is in, from its trials alone; None where all is done.

    Rounds are compared when all have the same number of evaluations, so that a decision depends neither on how many ran
    at once nor on how often the sweep was taken up again.
    """
    slots = sorted({trial.slot for trial in trials})
    boundaries = [*range(asked.interval, asked.evaluations, asked.interval), None]
    for number, until in enumerate(boundaries, start=1):
        holders = tuple(
            max((t for t in trials if t.slot == slot and t.generation < number), key=lambda t: t.generation)
            for slot in slots
        )
        waiting = tuple(t for t in holders if not t.is_over and (until is None or t.value_at(until) is None))
        if waiting or until is None:
            return Round(number=number, until=until, waiting=waiting, exploits=(), holders=holders) if waiting else None
        scores = [score(t.value_at(until), larger_is_better=asked.larger_is_better) for t in holders]
        wanted = select(scores, [t.values for t in holders], asked.axes, seed=asked.seed * 1000 + number)
        made = {t.slot for t in trials if t.generation == number}
        if missing := tuple(e for e in wanted if slots[e.slot] not in made):
            return Round(number=number, until=until, waiting=(), exploits=missing, holders=holders)
    return None


class Population:
    """Synchronous population-based training: `next_round`, carried out."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._queue: deque[Task] = deque()
        self._num_out = 0
        for candidate in desk.frozen.candidates[len(desk.members()) :]:
            desk.begin(candidate)
        self._is_over = False
        self._advance()

    def next_task(self) -> Task | None:
        if not self._queue:
            return None
        self._num_out += 1
        return self._queue.popleft()

    @property
    def is_over(self) -> bool:
        return self._is_over

    def ended(self, task: Task, trial: Trial) -> None:
        self._num_out -= 1
        if not self._num_out and not self._queue:
            self._advance()

    def _advance(self) -> None:
        """Make the exploits of the rounds that are complete, and queue the next one's trials."""
        self._tell_replaced()
        while (found := next_round(self._desk.trials(), self._desk.frozen.asked)) is not None:
            if found.waiting:
                numbers = {trial.number for trial in found.waiting}
                members = [member for member in self._desk.members() if member.number in numbers]
                self._queue.extend(Task(member=member, until=found.until) for member in members)
                return
            for exploit in found.exploits:
                loser, donor = found.holders[exploit.slot], found.holders[exploit.donor]
                self._desk.begin_from(donor, loser.slot, found.number, exploit.values)
            self._tell_replaced()
        self._is_over = True

    def _tell_replaced(self) -> None:
        trials = self._desk.trials()
        for trial in trials:
            newer = [t for t in trials if t.slot == trial.slot and t.generation > trial.generation]
            if newer and not trial.is_over:
                reason = f"trial {newer[0].number} has its place, from the state of {newer[0].parent or 'no one'}"
                self._desk.end(trial.number, MemberState.replaced, reason)


def build_course(desk: Desk) -> Course:
    """The course of a sweep, from where its trials stand."""
    search = desk.frozen.asked.search
    if search is Search.optuna:
        return Proposals(desk)
    return Population(desk) if search is Search.pbt else Points(desk)

"""Every deliberate error, its exit code and whether trying again can help.

A class exists for a *reaction*, not for a message: a new class needs a new exit code or
a new retry rule. An error is a message to a person (`message`, `hint`) and an instruction
to a machine (`exit_code`, `retry`, `context`).

Form of a message: `<key or place>: got <seen>, expected <rule>`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

__all__ = [
    "ConfigError",
    "ConflictError",
    "DataError",
    "DivergenceError",
    "InfeasibleError",
    "IntegrityError",
    "InternalError",
    "NotFoundError",
    "OverloadError",
    "PreemptedError",
    "RequestError",
    "TransientError",
    "TreadleError",
    "did_you_mean",
    "error_from_json",
    "nearest",
]


class TreadleError(Exception):
    """Root of the deliberate errors.

    Args:
        message: what was seen and what was expected, one or more lines.
        hint: the command or edit that helps, or "".
        context: JSON-ready facts for machines.
    """

    exit_code: ClassVar[int] = 70
    retry: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "", **context: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.context = context

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> Any:
        # Exceptions with keyword-only arguments do not pickle by default, and Ray then hands
        # back an UnserializableException without type or fields.
        return (_rebuild, (type(self), self.message, self.hint, self.context))

    def to_json(self) -> dict[str, Any]:
        return {
            "error": type(self).__name__,
            "message": self.message,
            "hint": self.hint,
            "exit_code": self.exit_code,
            "retry": self.retry,
            "context": self.context,
        }


def _rebuild(cls: type[TreadleError], message: str, hint: str, context: dict[str, Any]) -> TreadleError:
    return cls(message, hint=hint, **context)


class ConfigError(TreadleError):
    """The caller must change the job."""

    exit_code = 2


class InfeasibleError(ConfigError):
    """The job is valid but there is no place where it fits or can be started."""

    exit_code = 3


class DataError(TreadleError):
    """The data must change, or be prepared first."""

    exit_code = 4


class DivergenceError(TreadleError):
    """Training left the finite numbers."""

    exit_code = 5


class IntegrityError(TreadleError):
    """Stored bytes are not what was written."""

    exit_code = 6


class ConflictError(TreadleError):
    """Someone else changed it first."""

    exit_code = 7


class NotFoundError(TreadleError):
    """A run, model, version or object of that name does not exist."""

    exit_code = 8


class RequestError(TreadleError):
    """One inference request is malformed.

    Args:
        status: the HTTP status that answers it, 400 to 499.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "", status: int = 422, **context: Any) -> None:
        super().__init__(message, hint=hint, status=status, **context)
        self.status = status


class TransientError(TreadleError):
    """The same call may work later."""

    exit_code = 75
    retry = True


class OverloadError(TransientError):
    """Load is being shed; come back later (HTTP 503 with Retry-After)."""


class PreemptedError(TreadleError):
    """The run was asked to leave; its state is saved and it can be resumed."""

    exit_code = 76
    retry = True


class InternalError(TreadleError):
    """A bug in treadle."""

    exit_code = 70


_BY_NAME: dict[str, type[TreadleError]] = {
    cls.__name__: cls
    for cls in (
        ConfigError,
        InfeasibleError,
        DataError,
        DivergenceError,
        IntegrityError,
        ConflictError,
        NotFoundError,
        RequestError,
        TransientError,
        OverloadError,
        PreemptedError,
        InternalError,
    )
}


def error_from_json(value: Mapping[str, Any]) -> TreadleError:
    """The error that `to_json` described; an unknown class comes back as InternalError."""
    cls = _BY_NAME.get(str(value.get("error")), InternalError)
    return cls(str(value.get("message", "")), hint=str(value.get("hint", "")), **dict(value.get("context", {})))


def nearest(word: str, known: Iterable[str], *, at_least: float = 0.6) -> tuple[str, ...]:
    """The known words that `word` may stand for: the best one and its equals, three at most, or ().

    Case and the kind of dash do not count. Dotted keys are compared whole and by their last
    component, so that `hidden=3` finds `model.hidden_size` and `optm.lr` finds `optim.lr`.
    """
    scored = sorted(((_likeness(_plain(word), _plain(option)), option) for option in set(known)), reverse=True)
    best = scored[0][0] if scored else 0.0
    return tuple(option for score, option in scored[:3] if best >= at_least and score > best - 0.005)[::-1]


def _plain(word: str) -> str:
    return word.strip().lower().replace("-", "_")


def _likeness(word: str, option: str) -> float:
    """0 to 1. A last component that agrees in part counts less than a whole word that agrees."""
    whole = difflib.SequenceMatcher(None, word, option).ratio()
    (group, _, last), (parent, _, tail) = word.rpartition("."), option.rpartition(".")
    part = difflib.SequenceMatcher(None, last, tail).ratio()
    shorter, longer = sorted((last, tail), key=len)
    if len(shorter) >= 3 and (longer.startswith(shorter) or shorter in longer.split("_")):
        part = max(part, 0.8 + 0.1 * len(shorter) / len(longer))
    if part < 0.72:
        return whole
    # The group is written, and another one: a little less likely than the same component of that group.
    return max(whole, part - 0.01 - (0.04 if group and group != parent else 0.0))


def did_you_mean(word: str, known: Iterable[str], *, at_least: float = 0.6) -> str:
    """` - did you mean 'x'?` for the nearest known word, or "" where none is near."""
    found = nearest(word, known, at_least=at_least)
    return f" - did you mean {' or '.join(map(repr, found))}?" if found else ""

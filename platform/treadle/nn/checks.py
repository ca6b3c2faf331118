"""What targets and options must be before a head or a loss takes them.

Shape letters: B rows, K classes.

Targets that stand on the host are checked, and the message names the first bad one. On a device they are not:
reading them back would stall it. There a class that does not exist stops the kernel, and NaN shows in the loss.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from treadle.errors import ConfigError, DataError, TreadleError, did_you_mean

__all__ = [
    "IGNORED",
    "check_at_least",
    "check_classes",
    "check_levels",
    "check_numbers",
    "check_rising",
    "check_same_shape",
    "member",
    "per_class",
    "refuse",
]

IGNORED = -1
"""The target of a frame that is not to be learned from."""

_Enum = TypeVar("_Enum", bound=enum.Enum)


def refuse(
    name: str, values: Tensor, bad: Callable[[Tensor], Tensor], rule: str, error: type[TreadleError] = DataError
) -> None:
    """Name the first bad one of `values`, if they stand on the host; else do nothing.

    Args:
        name: how the message calls the values.
        values: what to look at.
        bad: says of each value whether it is.
        rule: what was expected.
        error: what to raise.

    Raises:
        DataError: there is one; or the given error.
    """
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return
    found = bad(values)
    if bool(found.any()):
        place = found.nonzero()[0].tolist()
        raise error(f"{name}{place}: got {values[tuple(place)].item()}, expected {rule}")


def check_classes(name: str, targets: Tensor, scores_shape: Sequence[int], *, ignored: int | None = None) -> None:
    """Targets are classes that the scores have, in the scores' leading shape.

    Args:
        name: how the message calls the targets.
        targets: whole numbers.
        scores_shape: of the scores, [..., K].
        ignored: a further value that is allowed.

    Raises:
        ConfigError: shapes that do not fit, or targets that are not int64.
        DataError: a class that does not exist; the message names place and value.
    """
    if tuple(targets.shape) != tuple(scores_shape[:-1]) or targets.dtype != torch.int64:
        raise ConfigError(
            f"{name}: got shape {tuple(targets.shape)} of {targets.dtype}, expected {tuple(scores_shape[:-1])} of "
            f"torch.int64 for scores of shape {tuple(scores_shape)}"
        )
    num_classes = scores_shape[-1]
    rule = f"0 to {num_classes - 1}"
    if ignored is None:
        refuse(name, targets, lambda x: (x < 0) | (x >= num_classes), rule)
    else:
        rule = f"{rule}, or {ignored} to leave it out"
        refuse(name, targets, lambda x: ((x < 0) & (x != ignored)) | (x >= num_classes), rule)


def check_numbers(name: str, values: Tensor, *, at_least: float = -math.inf) -> None:
    """Values are finite and not below `at_least`.

    Raises:
        DataError: one is not; the message names place and value.
    """
    rule = "a finite number" if at_least == -math.inf else f"a finite number, {at_least:g} or more"
    refuse(name, values, lambda x: ~x.isfinite() | (x < at_least), rule)


def check_same_shape(name: str, values: Tensor, other: Tensor, other_name: str) -> None:
    """Two tensors have one shape: broadcasting [B] against [B, 1] would make B * B errors of B.

    Raises:
        ConfigError: they do not.
    """
    if values.shape != other.shape:
        raise ConfigError(
            f"{name}: got shape {tuple(values.shape)}, expected {tuple(other.shape)}, the shape of {other_name}"
        )


def check_at_least(name: str, value: float, lowest: float, *, above: bool = False) -> None:
    """A number is not below `lowest`, or with `above` is above it.

    Raises:
        ConfigError: it is not, or it is not finite.
    """
    if not math.isfinite(value) or value < lowest or (above and value == lowest):
        raise ConfigError(f"{name}: got {value}, expected a number {'above' if above else 'not below'} {lowest:g}")


def check_rising(name: str, values: Sequence[float], rule: str, *, low: float, high: float = math.inf) -> None:
    """There are values, each finite, from `low` to `high`, and larger than the one before.

    Raises:
        ConfigError: not so.
    """
    inside = all(math.isfinite(value) and low <= value <= high for value in values)
    if not values or not inside or any(after <= before for before, after in itertools.pairwise(values)):
        raise ConfigError(f"{name}: got {tuple(values)}, expected {rule}")


def check_levels(levels: Sequence[float]) -> None:
    """Quantile levels rise between 0 and 1, both left out.

    Raises:
        ConfigError: not so.
    """
    check_rising("levels", levels, "rising numbers between 0 and 1", low=math.ulp(0.0), high=math.nextafter(1.0, 0.0))


def member(cls: type[_Enum], name: str, given: _Enum | str) -> _Enum:
    """The member of `cls` that has the given name, or is given.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(given, cls):
        return given
    names = list(cls.__members__)
    if given not in names:
        raise ConfigError(f"{name}: got {given!r}, expected one of {names}{did_you_mean(str(given), names)}")
    return cls[str(given)]


def per_class(name: str, values_K: Tensor, logits_BK: Tensor, *, above_zero: bool = False) -> Tensor:
    """One number a class, in the format of the scores and beside them.

    Raises:
        ConfigError: not one a class, or (looked at on the host only) negative, not finite, or 0 with `above_zero`.
    """
    num_classes = logits_BK.shape[-1]
    if values_K.shape != (num_classes,):
        raise ConfigError(f"{name}: got shape {tuple(values_K.shape)}, expected ({num_classes},), one a class")
    rule = "a finite number above 0" if above_zero else "a finite number, 0 or more"
    refuse(name, values_K, lambda x: ~x.isfinite() | ((x <= 0) if above_zero else (x < 0)), rule, ConfigError)
    return values_K.to(logits_BK)

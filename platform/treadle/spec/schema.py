"""What keys a job has: their types, ranges, defaults and meaning, read off the spec classes.

One reading of the annotations serves the check of a value, the messages, did-you-mean, shell
completion and the generated reference, so they cannot disagree. Imports no Hydra.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import inspect
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MinLen

from treadle.errors import did_you_mean
from treadle.spec.job import JobSpec

__all__ = ["SECRET", "FieldDoc", "fields_of", "job_keys", "show", "suggest_key", "variants_of"]

_NOUNS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
}
_ITEMS = {int: "whole numbers", float: "numbers", str: "text"}
_TYPES = {bool: "bool", int: "int", float: "float", str: "text", dict: "mapping", tuple: "list", list: "list"}
_RULES: dict[type, tuple[str, Callable[[Any, Any], bool]]] = {
    Ge: ("ge", lambda value, bound: value >= bound),
    Gt: ("gt", lambda value, bound: value > bound),
    Le: ("le", lambda value, bound: value <= bound),
    Lt: ("lt", lambda value, bound: value < bound),
    MinLen: ("min_length", lambda value, bound: len(value) >= bound),
}
_SIGNS = {Ge: ">=", Gt: ">", Le: "<=", Lt: "<", MinLen: "length >="}

SECRET = re.compile(
    r"://[^/\s:@]*:[^/\s@]+@"  # user:password@host
    r"|[?&](?:X-Amz-Signature|X-Amz-Credential|Signature|sig|token|access_token|api_key)=[^&\s'\"]*"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bwandb_v1_\w+|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
)

# What people who come from elsewhere, or from before, write: whole keys, then last components.
_SYNONYMS = {
    "checkpoint.keep": "checkpoint.keep_last",
    "data.seed": "split.seed",
    "learning_rate": "optim.lr",
    "batch_size": "batch.max_slots",
    "bptt": "batch.chunk",
    "slots": "batch.max_slots",
    "max_tokens": "batch.max_slots",
    "valid": "split.valid",
    "validation": "split.valid",
    "test": "split.test",
    "test_size": "split.test",
    "gap": "split.embargo",
    "n_splits": "split.folds",
    "features": "columns.inputs",
    "channels": "columns.inputs",
    "vocabulary": "columns.symbols",
    "class_weight": "task.class_weights",
    "oversample": "batch.class_balance",
    "wd": "optim.weight_decay",
    "gradient_clip": "optim.clip_norm",
    "grad_clip": "optim.clip_norm",
    "max_grad_norm": "optim.clip_norm",
    "num_workers": "cluster.workers",
    "num_gpus": "cluster.gpus_per_worker",
    "gpus": "cluster.gpus_per_worker",
    "num_cpus": "cluster.cpus_per_worker",
    "cpus": "cluster.cpus_per_worker",
    "num_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "accumulate": "batch.rounds_per_update",
    "grad_accum": "batch.rounds_per_update",
    "layers": "model.num_layers",
    "cell": "model",
    "optimizer": "optim",
}


def show(value: Any) -> str:
    """A value as a message shows it: 60 characters at most, without its secrets."""
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = SECRET.sub("***", repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True, kw_only=True)
class FieldDoc:
    """One key of a job.

    Args:
        key: dotted key.
        value_type: what a value is once converted; a dataclass for a key that has keys of its own.
        optional: may be null.
        bounds: constraints of `annotated_types`.
        item_type: of the values of a mapping or list, else None.
        default: value when nothing sets it; `dataclasses.MISSING` when something must.
        variants: kinds of the component that have this key; () when all have it.
        description: one or two sentences.
    """

    key: str
    value_type: type
    optional: bool
    bounds: tuple[Any, ...]
    item_type: type | None
    default: Any
    variants: tuple[str, ...] = ()
    description: str = ""

    @property
    def is_node(self) -> bool:
        """Has keys of its own."""
        return dataclasses.is_dataclass(self.value_type)

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of an enumeration, or of a list of them, else ()."""
        kind = self.item_type or self.value_type
        return tuple(member.value for member in kind) if issubclass(kind, enum.Enum) else ()

    @property
    def type(self) -> str:
        """Short name of the type: `int`, `float or null`, `bool`."""
        if self.item_type is not None:
            item = "choice" if self.choices else _TYPES[self.item_type]
            return f"{_TYPES[self.value_type]} of {item}" + (" or null" if self.optional else "")
        name = "choice" if self.choices else _TYPES.get(self.value_type, self.value_type.__name__)
        return name + (" or null" if self.optional else "")

    @property
    def range(self) -> str:
        """`>= 1, <= 64`, the choices of an enumeration, or ""."""
        if self.choices:
            return ", ".join(self.choices)
        return ", ".join(f"{_SIGNS[type(b)]} {_bound(b)}" for b in self.bounds)

    @property
    def expected(self) -> str:
        """What a value must be, as it reads after "expected "."""
        if self.is_node:
            return "a mapping of keys"
        if self.item_type is not None:
            text = f"{_NOUNS[self.value_type]} of {self.range if self.choices else _ITEMS[self.item_type]}"
        else:
            text = f"one of {self.range}" if self.choices else _NOUNS.get(self.value_type, self.type)
        if MinLen in map(type, self.bounds):
            text = f"{text} that is not empty"
        elif self.bounds:
            text = f"{text} {' and '.join(self.range.split(', '))}"
        return text + (" or null" if self.optional else "")

    def accepts(self, value: Any) -> bool:
        """Whether a value of the right type is within the bounds; infinities and NaN never are."""
        if value is None:
            return self.optional
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
        if any(isinstance(item, float) and not math.isfinite(item) for item in items):
            return False
        return all(_RULES[type(b)][1](value, _bound(b)) for b in self.bounds)


def _bound(constraint: Any) -> Any:
    return getattr(constraint, _RULES[type(constraint)][0])


@functools.cache
def _descriptions(module: str) -> Mapping[tuple[str, str], str]:
    """The string below each field, by class and field name."""
    found: dict[tuple[str, str], str] = {}
    for cls in ast.parse(inspect.getsource(sys.modules[module])).body:
        if not isinstance(cls, ast.ClassDef):
            continue
        for statement, below in zip(cls.body, cls.body[1:], strict=False):
            match statement, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[cls.name, name] = " ".join(text.split())
                case _:
                    pass
    return found


def _describe(cls: type, name: str) -> str:
    texts = (_descriptions(c.__module__).get((c.__name__, name)) for c in cls.__mro__ if c is not object)
    return next((text for text in texts if text), "")


def _read_hint(hint: Any) -> dict[str, Any]:
    """The parts of an annotation such as `Annotated[int, Ge(1)] | None`."""
    optional, bounds = False, ()
    while (origin := typing.get_origin(hint)) in (typing.Union, types.UnionType, typing.Annotated):
        arguments = typing.get_args(hint)
        if origin is typing.Annotated:
            bounds += arguments[1:]
            hint = arguments[0]
        else:
            optional = type(None) in arguments
            (hint,) = (a for a in arguments if a is not type(None))
    item = None
    if origin is not None:
        item = typing.get_args(hint)[1 if origin is dict else 0]
        hint = origin
    for bound in bounds:
        if type(bound) not in _RULES:
            raise TypeError(f"no check is written for the constraint {bound!r}")
    return dict(value_type=hint, optional=optional, bounds=bounds, item_type=item)


@functools.cache
def fields_of(cls: type, at: str = "") -> Mapping[str, FieldDoc]:
    """The fields of a spec class by name; `at` is the key of the component in the job."""
    hints = typing.get_type_hints(cls, include_extras=True)
    docs: dict[str, FieldDoc] = {}
    for f in dataclasses.fields(cls):
        factory = f.default_factory
        default = f.default if factory is dataclasses.MISSING else factory()
        key = f"{at}.{f.name}" if at else f.name
        docs[f.name] = FieldDoc(
            key=key, default=default, description=_describe(cls, f.name), **_read_hint(hints[f.name])
        )
    return docs


@functools.cache
def variants_of(cls: type) -> Mapping[str, type]:
    """The concrete subclasses of a component by kind, or {} where it has no variants."""
    found: dict[str, type] = {}
    for child in cls.__subclasses__():
        if isinstance(kind := child.__dict__.get("kind"), str):
            found[kind] = child
        found |= variants_of(child)
    return found


@functools.cache
def job_keys() -> Mapping[str, FieldDoc]:
    """Every dotted key that a job of any variant can set, in the order of the classes."""
    found: dict[str, FieldDoc] = {}
    for name, doc in fields_of(JobSpec).items():
        if not doc.is_node:
            found[name] = doc
            continue
        shared = set(fields_of(doc.value_type, name))
        for kind, cls in (variants_of(doc.value_type) or {"": doc.value_type}).items():
            for inner in fields_of(cls, name).values():
                own = inner.key.rsplit(".", 1)[-1] not in shared
                before = found.get(inner.key)
                kinds = (*before.variants, kind) if before else (kind,)
                found[inner.key] = dataclasses.replace(inner, variants=kinds if own else ())
    return found


def suggest_key(key: str, known: Iterable[str]) -> str:
    """` - did you mean 'x'?` for a key that does not exist, or "" where none is near."""
    options = set(known)
    tail = key.rsplit(".", 1)[-1].lower().replace("-", "_")
    group = key.split(".", 1)[0]
    if tail in {"kind", "name", "type", "cell"} and f"{group}.{tail}" not in options and group in options:
        return f" - did you mean '{group}=OPTION'?"
    meant = _SYNONYMS.get(key.lower(), _SYNONYMS.get(tail))
    if meant in options:
        return f" - did you mean '{meant}'?"
    if "." not in key and (top := {o for o in options if "." not in o}) and did_you_mean(key, top, at_least=0.72):
        return did_you_mean(key, top)
    return did_you_mean(key, options)

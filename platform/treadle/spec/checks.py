"""Checks one source of values (a file, the command line) against the keys a job has.

Every value that may stand comes out as a `Leaf`; everything else becomes a `Problem`. Nothing
stops at the first mistake.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from treadle.errors import ConfigError, did_you_mean
from treadle.spec.job import JobSpec
from treadle.spec.places import conf_folder, list_groups, list_options, short_path
from treadle.spec.schema import SECRET, FieldDoc, fields_of, job_keys, show, suggest_key

__all__ = ["Checker", "Leaf", "Path", "Problem", "blank", "raise_problems"]

Path = tuple[str, ...]

_REFERENCE = re.compile(r"\$\{([A-Za-z][A-Za-z0-9_.]*)\}")


@dataclass(frozen=True, kw_only=True, order=True)
class Problem:
    """One mistake: which key, what was seen, what may stand there, and where it was written."""

    key: str
    got: str
    expected: str
    place: str = ""
    suggestion: str = ""

    def __str__(self) -> str:
        place = f" ({self.place})" if self.place else ""
        return f"{self.key}: got {self.got}, expected {self.expected}{place}{self.suggestion}"


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One value that may stand, at its key."""

    key: Path
    value: Any
    place: str


def raise_problems(problems: list[Problem]) -> None:
    """Nothing, where there is no problem.

    Raises:
        ConfigError: one line a problem, sorted, each once.
    """
    if not problems:
        return
    found = sorted(set(problems))
    raise ConfigError(
        "\n".join(dict.fromkeys(map(str, found))),
        hint=f"{short_path(conf_folder() / 'README.md')} lists every key with its type, range and meaning",
        problems=[dict(key=p.key, got=p.got, expected=p.expected, place=p.place) for p in found],
    )


def blank(cls: type) -> DictConfig:
    """The structured config of a spec class, its defaults filled in."""
    node = OmegaConf.structured(cls)

    def thaw(part: Any) -> None:
        # OmegaConf marks frozen classes read-only and would then refuse to merge a file into them.
        OmegaConf.set_readonly(part, None)
        for key in part if isinstance(part, DictConfig) else ():
            if not OmegaConf.is_missing(part, key) and isinstance(part[key], Container):
                thaw(part[key])

    thaw(node)
    return node


class Checker:
    """Collects leaves and problems over all sources of one job.

    Args:
        classes: the chosen class of each component, by key.
        undecided: components whose option could not be read; keys of any variant may stand there,
            those that the stand-in class lacks are dropped.
    """

    def __init__(self, classes: Mapping[str, type], *, undecided: frozenset[str] = frozenset()) -> None:
        self.classes = classes
        self.undecided = undecided
        self.problems: list[Problem] = []
        self._drafts = {cls: blank(cls) for cls in (JobSpec, *classes.values())}
        self.known = {key for key in job_keys() if self._stands(tuple(key.split(".")))} | set(classes)

    def leaves(self, tree: Any, place: Callable[[Path], str], key: Path = ()) -> Iterator[Leaf]:
        """The good values below `key`; `place` says where a key was written."""
        cls = self.classes[key[0]] if key else JobSpec
        if not isinstance(tree, Mapping):
            self._refuse_scalar(tree, place, key)
            return
        for name, value in tree.items():
            where = (*key, str(name))
            field = fields_of(cls, ".".join(key)).get(str(name))
            if field is not None and field.is_node:
                yield from self.leaves(value, place, where)
            elif field is not None:
                yield from self._leaf(field, cls, Leaf(key=where, value=value, place=place(where)))
            else:
                self._unknown(where, value, place)

    def _stands(self, key: Path) -> bool:
        return len(key) == 1 or key[1] in fields_of(self.classes[key[0]])

    def _add(self, leaf: Leaf, expected: str, *, got: str = "", suggestion: str = "") -> None:
        self.problems.append(
            Problem(
                key=".".join(leaf.key),
                got=got or show(leaf.value),
                expected=expected,
                place=leaf.place,
                suggestion=suggestion,
            )
        )

    def _refuse_scalar(self, value: Any, place: Callable[[Path], str], key: Path) -> None:
        leaf = Leaf(key=key or ("job",), value=value, place=place(key))
        expected, near = "a mapping of keys", ""
        if key and key[0] in list_groups():
            expected += f"; an option is chosen in the defaults list, `- override /{key[0]}: OPTION`"
            near = did_you_mean(str(value), list_options(key[0]))
        self._add(leaf, expected, got="nothing" if value is None else "", suggestion=near)

    def _unknown(self, key: Path, value: Any, place: Callable[[Path], str]) -> None:
        while isinstance(value, Mapping) and len(value) == 1 and not key[-1].startswith("_"):
            ((name, value),) = value.items()
            key = (*key, str(name))
        leaf, dotted = Leaf(key=key, value=value, place=place(key)), ".".join(key)
        if any(part.startswith("_") for part in key):
            self._add(leaf, "no key that starts with _: a job names no classes or functions", got="a reserved key")
        elif key[0] == "hydra" or key[0].startswith("hydra/"):
            self._add(leaf, "keys of the job only: Hydra's own settings are not part of it", got="a key of Hydra")
        elif "." in key[-1] and dotted in job_keys():
            nested = ": {".join(dotted.split("."))
            self._add(leaf, f"keys below one another, as in {nested}: ...}}", got="a key with a dot")
        elif dotted in job_keys() and len(key) > 1:
            kinds = " or ".join(f"{key[0]}={kind}" for kind in job_keys()[dotted].variants)
            if key[0] not in self.undecided:
                here = getattr(self.classes[key[0]], "kind", "")
                self._add(leaf, f"a key of {key[0]}={here}", got=f"a key that only {kinds} has")
        else:
            self._add(leaf, "a key of the job", got="an unknown key", suggestion=suggest_key(dotted, self.known))

    def _leaf(self, field: FieldDoc, cls: type, leaf: Leaf) -> Iterator[Leaf]:
        before = len(self.problems)
        self._inspect(leaf)
        if len(self.problems) > before or leaf.value == "???":
            return
        if isinstance(leaf.value, str) and "${" in leaf.value and field.item_type is None:
            yield leaf  # what it refers to is checked when the whole job is there
            return
        converted = _convert(field, self._drafts[cls], leaf.value)
        if converted is not None or (leaf.value is None and field.optional):
            yield leaf
            return
        nearest = _near(leaf.value, field)
        # YAML reads no, off and on as booleans.
        quoted = ", in quotes" if isinstance(leaf.value, bool) and (field.choices or field.value_type is str) else ""
        self._add(leaf, field.expected + quoted, suggestion=nearest)

    def _inspect(self, leaf: Leaf) -> None:
        """Reports what may stand nowhere, at any depth of a value."""
        if isinstance(leaf.value, Mapping):
            for name, value in leaf.value.items():
                inner = replace(leaf, key=(*leaf.key, str(name)), value=value)
                if str(name).startswith("_"):
                    self._add(inner, "no key that starts with _: a job names no classes or functions")
                elif "${" in str(name):
                    self._add(inner, "a plain name", got="a reference as a name")
                else:
                    self._inspect(inner)
        elif isinstance(leaf.value, list):
            for index, value in enumerate(leaf.value):
                self._inspect(replace(leaf, key=(*leaf.key, str(index)), value=value))
        elif isinstance(leaf.value, str):
            self._inspect_text(leaf, leaf.value)

    def _inspect_text(self, leaf: Leaf, text: str) -> None:
        if SECRET.search(text):
            self._add(
                leaf, "no secret: a job is stored and logged as it is", got="a value with a password or key in it"
            )
        if "${" in _REFERENCE.sub("", text):
            self._add(leaf, "a plain reference such as ${train.seed}: nothing else is looked up or computed")
        for target in _REFERENCE.findall(text):
            parent = ".".join(target.split(".")[:2])
            doc = job_keys().get(parent)
            item = doc is not None and doc.value_type is dict
            if parent not in self.known or (target != parent and not item):
                self._add(leaf, "a reference to a key of the job", suggestion=suggest_key(target, self.known))


def _near(value: Any, field: FieldDoc) -> str:
    """A suggestion for a value that should be in a list, or for the first that is none of the field's choices."""
    if field.value_type is list and isinstance(value, str):
        return f" - did you mean [{value}]?"
    if not field.choices:
        return ""
    wrong = [item for item in (value if isinstance(value, list) else [value]) if item not in field.choices]
    return did_you_mean(str(wrong[0]), field.choices) if wrong else ""


def _convert(field: FieldDoc, draft: DictConfig, value: Any) -> Any:
    """`value` as the type of the field, or None where it is none or out of range."""
    is_flag = isinstance(value, bool)
    items = value if isinstance(value, list) else ()
    if (field.value_type is str and is_flag) or (field.item_type is str and any(isinstance(i, bool) for i in items)):
        return None  # OmegaConf would make `name: on` the text "True"
    if field.value_type is bool and isinstance(value, int) and not is_flag:
        return None  # OmegaConf takes 2 for true
    name = field.key.rsplit(".", 1)[-1]
    try:
        draft[name] = value
        converted = draft[name]
    except (OmegaConfBaseException, ValueError, TypeError):
        return None
    return converted if field.accepts(converted) else None

"""Composes one job from `conf/`, `jobs/` and overrides, and reports every mistake at once.

The only importer of Hydra. Hydra merges; it does not judge: it accepts `+model.hiden_size=64`,
values out of range and lookups of the environment, and stops at its first error. So overrides
and files are checked on their own first, the composed job is validated after, and both kinds
of mistakes come out in one ConfigError.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from treadle.errors import InternalError
from treadle.spec.checks import Checker, Leaf, Problem, blank, raise_problems
from treadle.spec.job import JobSpec
from treadle.spec.places import conf_folder, find_job, list_groups, list_options, short_path
from treadle.spec.schema import SECRET, fields_of, job_keys, show, suggest_key, variants_of
from treadle.spec.sources import Sources, read_sources
from treadle.spec.sweeps import Axis, ChoiceAxis, IntervalAxis, Space
from treadle.spec.validate import NOTHING, assemble, build

__all__ = ["compose_job", "parse_sweep"]

# Hydra keeps its state in process-wide singletons, and its parser shares caches.
_LOCK = threading.RLock()

_MOST_VALUES = 1000


def compose_job(job: str, overrides: Sequence[str], *, default_store: str) -> JobSpec:
    """The whole, validated job.

    Args:
        job: name of a job, or a path to a folder that holds job.yaml.
        overrides: `KEY=VALUE` or `GROUP=OPTION`, one each.
        default_store: `store.uri` where neither the job nor an override sets it.

    Raises:
        ConfigError: one line for every mistake in the files and overrides;
            `context["problems"]` has key, got, expected and place of each.
    """
    folder = find_job(job)
    with _LOCK:
        return _compose(folder, overrides, default_store)


def _compose(folder: Path, overrides: Sequence[str], default_store: str) -> JobSpec:
    problems: list[Problem] = []
    arguments = list(_parse(overrides, problems))
    sources = read_sources(folder, [(a.key, a.value, a.place) for a in arguments if a.is_switch])
    checker = Checker(sources.classes, undecided=frozenset(sources.undecided))
    leaves = list(checker.leaves({"store": {"uri": default_store}}, lambda _: "default store"))
    for document in sources.documents:
        leaves += checker.leaves(_nest(document.at, document.tree), document.place)
    leaves += _check_arguments(arguments, sources, checker)
    problems += [*_duplicates(arguments), *sources.problems, *checker.problems]
    # A job with mistakes is put together from its good values: what only the whole shows is told too.
    texts = [a.text for a in arguments]
    node = assemble(sources.classes, leaves) if problems else _merge(folder, texts, default_store)
    later: list[Problem] = []
    spec = build(node, sources.classes, later)
    if not sources.complete:
        later = [p for p in later if p.got != NOTHING]
    told, written = {p.key for p in problems}, {".".join(leaf.key): leaf.place for leaf in leaves}
    problems += [replace(p, place=written.get(p.key, "")) for p in later if p.key not in told]
    raise_problems(problems)
    assert isinstance(spec, JobSpec)
    return spec


# ---- sweeps


def parse_sweep(job: str, overrides: Sequence[str]) -> Space:
    """What overrides with several values say, in Hydra's own syntax and by its own parser.

    Values are not checked here: each trial is composed, and then they are.

    Args:
        job: name or folder; `glob(...)` goes over its options of a group and those of conf/.

    Raises:
        ConfigError: one line for every override that is none, has no value, or more than a sweep takes.
    """
    folder = find_job(job)
    problems: list[Problem] = []
    axes: list[Axis] = []
    with _LOCK:
        parser = OverridesParser.create()
        for index, text in enumerate(overrides):
            place = f"argument {index + 1}"
            try:
                (override,) = parser.parse_overrides([text if not text.startswith("=") else ""])
            except (HydraException, RecursionError):
                problem = _syntax(text, place, parser)
                if "null" in text and "choice(" in text:  # which Hydra's function does not take
                    problem = replace(problem, expected="a list with commas, such as 1.0,null", suggestion="")
                problems.append(problem)
                continue
            if override.is_sweep_override():
                axes += _axis(override, index, place, folder, problems)
    first: dict[str, int] = {}
    for axis in axes:
        if first.setdefault(axis.key, axis.index) != axis.index:
            got = f"several values twice, in arguments {first[axis.key] + 1} and {axis.index + 1}"
            problems.append(Problem(key=axis.key, got=got, expected="them once"))
    raise_problems(problems)
    return Space(arguments=tuple(overrides), axes=tuple(axes))


def _axis(override: Override, index: int, place: str, folder: Path, problems: list[Problem]) -> Iterator[Axis]:
    """The axis of one override; none where there is a problem with it."""
    key, value = override.get_key_element(), override.value()
    got, expected = SECRET.sub("***", _raw(override.input_line or "")), ""
    doc = job_keys().get(override.key_or_group)
    if key in ("name", "store.uri"):
        expected = "one value: the trials of a sweep are one job in one store"
    elif isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        low, high, is_log = float(value.start), float(value.end), "log" in value.tags
        if doc is not None and doc.value_type not in (int, float):
            expected = "values to choose from, such as a,b: only numbers have intervals"
        elif not (low < high and math.isfinite(high - low)) or (is_log and low <= 0):
            expected = f"a finite lower end {'above 0 and ' if is_log else ''}below the upper one"
        else:
            is_whole = doc is not None and doc.value_type is int
            yield IntervalAxis(key=key, index=index, low=low, high=high, is_log=is_log, is_whole=is_whole)
    else:
        texts, expected = _texts(override, folder)
        if texts:
            yield ChoiceAxis(key=key, index=index, texts=tuple(dict.fromkeys(texts)))
    if expected:
        problems.append(Problem(key=key, got=got, expected=expected, place=place))


def _texts(override: Override, folder: Path) -> tuple[list[str], str]:
    """The values of an override as overrides write them, or none and what was expected."""
    value = override.value()
    if isinstance(value, Glob):
        group = override.key_or_group
        found = value.filter(list(list_options(group, folder)))
        options = ", ".join(list_options(group, folder)) or f"a group: {', '.join(list_groups())}"
        return found, "" if found else f"a pattern for some of {options}"
    try:
        texts = list(itertools.islice(override.sweep_string_iterator(), _MOST_VALUES + 1))
    except (HydraException, ValueError, ArithmeticError) as error:
        return [], f"a range that can be counted ({error})"
    if not texts:
        return [], "at least one value"
    return ([], f"at most {_MOST_VALUES:,} values") if len(texts) > _MOST_VALUES else (texts, "")


# ---- overrides


@dataclass(frozen=True, kw_only=True)
class _Argument:
    """One parsed override."""

    key: str
    value: Any
    text: str
    place: str
    override: Override

    @property
    def kind(self) -> str:
        """CHANGE `k=v`, ADD `+k=v`, FORCE_ADD `++k=v` or DEL `~k`."""
        return self.override.type.name

    @property
    def is_switch(self) -> bool:
        """`model=gru`: chooses an option; not `train={epochs: 3}` or `model.hidden_size=3`."""
        return self.key in list_groups() and not isinstance(self.value, Mapping) and self.kind == "CHANGE"


def _parse(overrides: Sequence[str], problems: list[Problem]) -> Iterator[_Argument]:
    parser = OverridesParser.create()
    for number, text in enumerate(overrides, start=1):
        place = f"argument {number}"
        try:
            (override,) = parser.parse_overrides([text if not text.startswith("=") else ""])
        except (HydraException, RecursionError):
            problems.append(_syntax(text, place, parser))
            continue
        key = override.key_or_group
        if override.is_sweep_override():
            doc = job_keys().get(key)
            if doc is not None and doc.value_type is list:
                quote = f" - did you mean {key}=[{_raw(text)}]?"
            else:
                quote = f" - text with a comma is quoted: '{key}=\"{_raw(text)}\"'"
            problems.append(
                Problem(
                    key=key,
                    got=f"several values, {SECRET.sub('***', _raw(text))}",
                    expected="one value: a job is one run, several are `treadle sweep`",
                    place=place,
                    suggestion=quote if override.value_type is ValueType.SIMPLE_CHOICE_SWEEP else "",
                )
            )
            continue
        yield _Argument(key=key, value=override.value(), text=text, place=place, override=override)


def _raw(text: str) -> str:
    return text.split("=", 1)[-1]


def _syntax(text: str, place: str, parser: OverridesParser) -> Problem:
    """Why an argument is no override, with the form that would be one."""
    key, equals, raw = (part.strip() for part in text.partition("="))
    key = key.lstrip("-")
    known = {*job_keys(), *list_groups()}
    word = key.lstrip("+~")
    near = "" if word in known else suggest_key(word, known)
    expected = "KEY=VALUE or GROUP=OPTION"
    if not equals:
        near = f" - did you mean '{word}=VALUE'?" if word in known else near
        return Problem(key=place, got=show(text), expected=expected, suggestion=near)
    quoted = raw.strip("'\"").replace("\\", "\\\\").replace('"', '\\"')
    for fixed, form in ((f"{key}={raw}", "{}"), (f'{key}="{quoted}"', "'{}' with the quotes")):
        with contextlib.suppress(HydraException):
            parser.parse_overrides([fixed if key else ""])
            expected = f"KEY=VALUE, as in {form.format(SECRET.sub('***', fixed))}"
            break
    return Problem(key=key or place, got=show(text), expected=expected, place=place, suggestion=near)


def _duplicates(arguments: Sequence[_Argument]) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for argument in arguments:
        for key in _flat(argument.key, argument.value):
            if key in seen:
                yield Problem(
                    key=key,
                    got=f"two values, {seen[key]} and {argument.place}",
                    expected="one",
                    place=argument.place,
                )
            seen[key] = argument.place


def _flat(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(f"{key}.{name}", item)
    else:
        yield key


def _check_arguments(arguments: Sequence[_Argument], sources: Sources, checker: Checker) -> Iterator[Leaf]:
    """The good values of the command line; the others go to `checker.problems`."""
    for argument in arguments:
        if argument.is_switch and argument.override.package is None:
            continue
        expected = _better_form(argument, sources)
        if expected:
            got = show(argument.text)
            checker.problems.append(Problem(key=argument.key, got=got, expected=expected, place=argument.place))
        if expected and (argument.kind == "DEL" or (argument.key in sources.choices and not _is_map(argument))):
            continue
        tree = _nest(tuple(argument.key.split(".")), argument.value)
        good = list(checker.leaves(tree, lambda _, place=argument.place: place))
        yield from () if expected else good


def _is_map(argument: _Argument) -> bool:
    return isinstance(argument.value, Mapping)


def _better_form(argument: _Argument, sources: Sources) -> str:
    """What should stand in place of an override whose form is wrong whatever its value, or ""."""
    key = argument.key
    parent = ".".join(key.split(".")[:2])
    doc = job_keys().get(parent)
    is_item = doc is not None and key != parent
    if argument.override.package is not None:
        return "no @package"
    if doc is None and key not in sources.classes:
        return ""
    if argument.kind == "DEL":
        return "KEY=VALUE: a key cannot be removed, only set (to null where that is allowed)"
    if key in sources.choices:
        return f"{key}=OPTION, or {key}.KEY=VALUE for each key"
    if argument.kind == "ADD" and not is_item:
        return f"{key}=VALUE: the key exists, + has nothing to add"
    return "a value" if argument.value == "???" else ""


def _nest(key: tuple[str, ...], value: Any) -> Any:
    for name in reversed(key):
        value = {name: value}
    return value


# ---- merging


def _register() -> None:
    """Puts the schemas under group `schema`, out of the way of the options people choose from."""
    store = ConfigStore.instance()
    job = blank(JobSpec)
    for name, doc in fields_of(JobSpec).items():
        if not doc.is_node:
            continue
        for kind, cls in variants_of(doc.value_type).items():
            store.store(group=f"schema/{name}", name=kind, node=blank(cls))
        # OmegaConf would create a missing node itself, read-only, and then refuse the file's values.
        job[name] = blank(doc.value_type)
    store.store(group="schema", name="job", node=job)


_register()


def _merge(folder: Path, overrides: Sequence[str], default_store: str) -> DictConfig:
    """Hydra's own composition of checked files and overrides."""
    conf = str(conf_folder()).replace("\\", "\\\\").replace("'", "\\'")
    state = GlobalHydra.instance()
    outer = state.hydra
    state.clear()
    try:
        with initialize_config_dir(str(folder.resolve()), job_name="treadle", version_base="1.3"):
            node = compose("job", overrides=[f"hydra.searchpath=['file://{conf}']", *map(_settable, overrides)])
    except (HydraException, OmegaConfBaseException) as error:
        # The checks are meant to leave nothing for Hydra to refuse.
        reason = " ".join(str(error.__cause__ or error).split())
        raise InternalError(f"{short_path(folder)}: got a job that cannot be composed ({reason})") from error
    finally:
        state = GlobalHydra.instance()
        state.clear()
        state.hydra = outer
    if OmegaConf.is_missing(node.store, "uri"):
        node.store.uri = default_store
    return node


def _settable(text: str) -> str:
    """An override of a mapping's item as one that may add it."""
    key = text.split("=", 1)[0].lstrip("+")
    doc = job_keys().get(".".join(key.split(".")[:2]))
    return f"++{text.lstrip('+')}" if doc is not None and doc.value_type is dict else text

"""Reads the YAML files a job is made of, with the line of every key, and the options they choose.

The order is that of composition: base.yaml, the chosen option of each group, job.yaml. Mistakes
are collected, not raised.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from treadle.errors import did_you_mean, nearest
from treadle.spec.checks import Problem
from treadle.spec.job import JobSpec
from treadle.spec.places import conf_folder, list_options, short_path
from treadle.spec.schema import fields_of, show, variants_of

__all__ = ["Document", "Sources", "read_sources"]

Key = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """One YAML file: its values, its defaults list, the line of each key.

    Args:
        at: key of the component whose values these are, () for the whole job.
    """

    path: Path
    at: Key
    tree: Mapping[Any, Any]
    defaults: Sequence[Any]
    lines: Mapping[Key, int]

    def place(self, key: Key) -> str:
        """`jobs/g2p/job.yaml:14` for a key of the job."""
        inner = key[len(self.at) :]
        while inner and inner not in self.lines:
            inner = inner[:-1]
        line = self.lines.get(inner)
        return short_path(self.path) + (f":{line}" if line else "")


@dataclass(kw_only=True)
class Sources:
    """The files of one job and what they choose.

    Args:
        choices: option of each group.
        documents: in the order of composition.
        classes: class of each component, by key.
        undecided: components whose class is a stand-in, as their option is wrong.
        complete: every file could be read.
    """

    choices: dict[str, str] = field(default_factory=dict)
    documents: list[Document] = field(default_factory=list)
    classes: dict[str, type] = field(default_factory=dict)
    undecided: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    complete: bool = True


@dataclass(frozen=True, kw_only=True)
class _Choice:
    group: str
    option: Any
    place: str


def read_sources(job: Path, chosen: Sequence[tuple[str, Any, str]]) -> Sources:
    """What the files of the job in folder `job` say.

    Args:
        chosen: group, option and place of each switch on the command line.
    """
    sources = Sources()
    base = _read(conf_folder() / "base.yaml", (), sources.problems)
    own = _read(job / "job.yaml", (), sources.problems)
    for choice in _base_choices(base):
        _settle(choice, job, sources)
    switched = [_Choice(group=group, option=option, place=place) for group, option, place in chosen]
    for choice in (*_job_choices(own, sources.problems), *switched):
        _choose(choice, job, sources)
    options = [doc for group, option in sources.choices.items() for doc in _option(group, option, job, sources)]
    sources.documents = [doc for doc in (base, *options, own) if doc is not None]
    sources.complete = sources.complete and None not in (base, own)
    for key, doc in fields_of(JobSpec).items():
        if doc.is_node and key not in sources.classes:
            family = variants_of(doc.value_type)
            sources.classes[key] = next(iter(family.values()), doc.value_type)
            if family:
                sources.undecided.add(key)
    return sources


def _read(path: Path, at: Key, problems: list[Problem]) -> Document | None:
    """The document in `path`, or None with the reason in `problems`."""
    shown = short_path(path)

    def refuse(got: str, expected: str, line: int = 0) -> None:
        problems.append(Problem(key=shown, got=got, expected=expected, place=f"{shown}:{line}" if line else ""))

    try:
        text = path.read_text("utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[Key, int] = {}
        if node is not None and not isinstance(node, yaml.MappingNode):
            refuse("no mapping", "`key: value` lines", node.start_mark.line + 1)
            return None
        duplicates = list(_outline(node, (), lines)) if node else []
        for key, line in duplicates:
            refuse(f"{'.'.join(key)} twice", "each key once", line)
        if duplicates:  # without the first of the two, which OmegaConf would refuse
            text = yaml.serialize(node)
        if "@package" in text:
            refuse("a @package line", "none: values stand where the group says", 1)
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        refuse(what, "YAML", mark.line + 1 if mark else 0)
        return None
    except RecursionError:
        refuse("an anchor that holds itself", "YAML")
        return None
    except (OSError, UnicodeDecodeError) as error:
        refuse(str(error), "a readable UTF-8 file")
        return None
    assert isinstance(tree, dict)
    defaults = tree.pop("defaults", None)
    if defaults is not None and not isinstance(defaults, list):
        refuse(f"defaults: {show(defaults)}", "a list below `defaults:`", lines.get(("defaults",), 0))
        defaults = []
    return Document(path=path, at=at, tree=tree, defaults=defaults or [], lines=lines)


def _outline(node: yaml.MappingNode, at: Key, lines: dict[Key, int]) -> Iterator[tuple[Key, int]]:
    """Fills `lines`; yields the keys written twice and leaves only their last value in `node`."""
    last: dict[str, tuple[Any, Any]] = {}
    for name, value in node.value:
        key = (*at, str(name.value))
        line = name.start_mark.line + 1
        if str(name.value) in last:
            yield key, line
        last[str(name.value)] = (name, value)
        lines[key] = line
        if isinstance(value, yaml.MappingNode):
            yield from _outline(value, key, lines)
        elif key == ("defaults",) and isinstance(value, yaml.SequenceNode):
            lines |= {(*key, str(i)): item.start_mark.line + 1 for i, item in enumerate(value.value)}
    node.value = list(last.values())


def _base_choices(base: Document | None) -> Iterator[_Choice]:
    for entry in base.defaults if base else ():
        if isinstance(entry, dict):
            ((group, option),) = entry.items()
            yield _Choice(group=group, option=option, place="base.yaml")


def _job_choices(own: Document | None, problems: list[Problem]) -> Iterator[_Choice]:
    """The `override /group: option` entries; anything else but /base and _self_ is a problem."""
    if own is None:
        return
    seen: set[str] = set()
    if own.defaults[:1] != ["/base"] or own.defaults[-1] != "_self_":
        problems.append(
            Problem(
                key="defaults",
                got=show(list(own.defaults)) if own.defaults else "nothing",
                expected="a list that starts with /base and ends with _self_",
                place=own.place(("defaults",)),
            )
        )
    for index, entry in enumerate(own.defaults):
        place = own.place(("defaults", str(index)))
        words = next(iter(entry), "").split() if isinstance(entry, dict) and len(entry) == 1 else []
        if len(words) == 2 and words[0] == "override":
            group = words[1].removeprefix("/")
            if group in seen:
                problems.append(Problem(key=group, got="a second override", expected="one for each group", place=place))
            seen.add(group)
            yield _Choice(group=group, option=next(iter(entry.values())), place=place)
        elif entry not in ("/base", "_self_"):
            problems.append(
                Problem(
                    key="defaults",
                    got=show(entry),
                    expected="/base, `override /GROUP: OPTION` or _self_",
                    place=place,
                )
            )


def _choose(choice: _Choice, job: Path, sources: Sources) -> None:
    """Switches a group of base.yaml to an option; what cannot be switched becomes a problem."""
    problem = functools.partial(Problem, key=choice.group, place=choice.place)
    if choice.group in sources.choices:
        _settle(choice, job, sources)
    elif choice.group.startswith("hydra"):
        sources.problems.append(problem(got="a group of Hydra", expected="groups of the job only"))
    else:
        known = ", ".join(sources.choices)
        near = did_you_mean(choice.group, sources.choices)
        sources.problems.append(problem(got="an unknown group", expected=f"one of {known}", suggestion=near))


def _settle(choice: _Choice, job: Path, sources: Sources) -> None:
    """Notes the option of a group; where there is no such option, the nearest one stands in for it."""
    group, option = choice.group, choice.option
    options = list_options(group, job)
    if isinstance(option, str) and option in options:
        sources.choices[group] = option
        sources.undecided.discard(group)
        return
    sources.problems.append(
        Problem(
            key=group,
            got=show(option),
            expected=f"one of {', '.join(options)}",
            place=choice.place,
            suggestion=did_you_mean(str(option), options),
        )
    )
    sources.undecided.add(group)
    for stand_in in nearest(str(option), options)[:1]:
        sources.choices[group] = stand_in


def _option(group: str, option: str, job: Path, sources: Sources) -> list[Document]:
    """The documents of an option: those it builds on first. Notes the class it chooses."""
    expected = f"/schema/{group}/KIND@_here_, another option of {group} or _self_"
    chain: list[Document] = []
    family = variants_of(fields_of(JobSpec)[group].value_type)
    options = list_options(group, job)

    def visit(name: str, above: tuple[str, ...]) -> None:
        doc = _read(options[name], (group,), sources.problems)
        refuse = functools.partial(Problem, key=f"{group}={option}", place=short_path(options[name]))
        for entry in doc.defaults if doc else ():
            kind = entry.removeprefix(f"/schema/{group}/").removesuffix("@_here_") if isinstance(entry, str) else ""
            if kind in family and entry == f"/schema/{group}/{kind}@_here_":
                sources.classes[group] = family[kind]
            elif entry in options and entry not in (*above, name):
                visit(entry, (*above, name))
            elif entry != "_self_":
                sources.problems.append(refuse(got=f"{show(entry)} in its defaults", expected=expected))
        if doc is None:
            sources.complete = False
        else:
            chain.append(doc)

    visit(option, ())
    if not family:
        sources.classes[group] = fields_of(JobSpec)[group].value_type
    elif group not in sources.classes:
        first = next(iter(family))
        sources.problems.append(
            Problem(
                key=f"{group}={option}",
                got="no schema in its defaults",
                expected=f"a line such as `- /schema/{group}/{first}@_here_`",
                place=short_path(options[option]),
            )
        )
    return chain

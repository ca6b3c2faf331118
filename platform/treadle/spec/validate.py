"""Makes the frozen job out of a composed config, node by node as the concrete class of each.

Values are checked once more here: a reference to another key shows its value only now, and so
do the rules that a spec class has of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from treadle.errors import ConfigError
from treadle.spec.checks import Leaf, Problem, blank
from treadle.spec.job import JobSpec
from treadle.spec.schema import fields_of, job_keys, show

__all__ = ["NOTHING", "assemble", "build"]

NOTHING = "nothing"
_MESSAGE = re.compile(r"(?P<key>[^\n]*?): got (?P<got>.*?), expected (?P<expected>.*)", re.DOTALL)


def assemble(classes: Mapping[str, type], leaves: Sequence[Leaf]) -> DictConfig:
    """A job of good values alone, whatever else stands in its files; later leaves win."""
    node = blank(JobSpec)
    for name, cls in classes.items():
        node[name] = blank(cls)
    for leaf in leaves:
        head, tail = ".".join(leaf.key[:-1]), leaf.key[-1]
        parent = OmegaConf.select(node, head) if head else node
        OmegaConf.update(parent, tail, leaf.value, merge=True, force_add=True)
    return node


def build(node: DictConfig, classes: Mapping[str, type], problems: list[Problem]) -> JobSpec | None:
    """The job that a composed node describes; reasons against it go to `problems`."""
    return _build(node, JobSpec, "", problems, classes)


def _build(node: DictConfig, cls: type, at: str, problems: list[Problem], classes: Mapping[str, type]) -> Any:
    """The instance a composed node describes, or None with the reasons in `problems`."""
    values: dict[str, Any] = {}
    before = len(problems)
    for name, doc in fields_of(cls, at).items():
        if doc.is_node:
            values[name] = _build(node[name], classes[name], doc.key, problems, classes)
            continue
        values[name] = None
        if OmegaConf.is_missing(node, name):
            problems.append(Problem(key=doc.key, got=NOTHING, expected=doc.expected))
            continue
        try:
            value = node[name]
            values[name] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException as error:
            raw = OmegaConf.to_container(node, resolve=False)
            assert isinstance(raw, dict)
            reason = str(error).splitlines()[0][:60]
            problems.append(Problem(key=doc.key, got=f"{show(raw[name])} ({reason})", expected=doc.expected))
            continue
        if not doc.accepts(values[name]):
            problems.append(Problem(key=doc.key, got=show(values[name]), expected=doc.expected))
    try:
        return cls(**values)
    except ConfigError as error:
        problems.append(_own_rule(error, cls, at, values))
    except (TypeError, AttributeError, ValueError):
        # A rule over several fields met the None that stands for one already reported.
        if len(problems) == before:
            raise
    return None


def _own_rule(error: ConfigError, cls: type, at: str, values: Mapping[str, Any]) -> Problem:
    """A refusal by the class itself; names the field where the message does not."""
    match = _MESSAGE.fullmatch(error.message)
    if match is None:
        return Problem(key=at or "job", got="a refusal", expected=error.message)
    key, got = match["key"], match["got"]
    if key not in job_keys():
        holders = [f.name for f in fields(cls) if repr(values[f.name]) == got]
        key = ".".join(filter(None, [at, *holders[:1]])) or "job"
    return Problem(key=key, got=got, expected=match["expected"])

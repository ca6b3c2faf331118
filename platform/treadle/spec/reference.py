"""The reference of every key and option, written from the spec classes and the option files.

`python -m treadle.spec.reference` prints it; conf/README.md is its output.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treadle.spec.job import JobSpec
from treadle.spec.places import list_groups, list_options
from treadle.spec.schema import FieldDoc, fields_of, job_keys, variants_of

__all__ = ["config_markdown", "describe_option"]

_HEAD = """\
# Keys and options of a job

<!-- Written by `python -m treadle.spec.reference > conf/README.md`; a test compares. -->

A job is `base.yaml`, then one option of each group below, then `jobs/NAME/job.yaml`, then the
overrides of the command line. What comes later wins: a value written in job.yaml stays when an
option is switched, and the command line has the last word.

| to | write |
| --- | --- |
| set a key | `model.hidden_size=64` |
| choose an option | `model=minlstm`, in job.yaml `- override /model: minlstm` |
| set to nothing | `optim.clip_norm=null` |
| set a list | `columns.inputs='[hr, spo2]'` |
| set one item of a mapping | `columns.lower.hr=0` |
| refer to another key | `split.seed='${train.seed}'` |
| give text with a comma, space or = | `'summary="a, b"'` |

Keys that do not exist, values out of range, lookups of the environment and sweeps are refused,
all in one message.
"""


def config_markdown() -> str:
    """The text of conf/README.md."""
    return "\n".join([_HEAD, *_tables()])


def describe_option(path: Path) -> str:
    """What an option is for: the comment in the first line of its file, or ""."""
    first = path.read_text("utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def _tables() -> Iterator[str]:
    nodes = {name: doc for name, doc in fields_of(JobSpec).items() if doc.is_node}
    yield "## The job itself\n"
    yield from _table([doc for key, doc in job_keys().items() if "." not in key])
    for name, node in nodes.items():
        yield f"## {name}\n"
        yield f"{(inspect.getdoc(node.value_type) or '').partition(chr(10))[0]}\n"
        if name in list_groups():
            yield "| option | what it is for |\n| --- | --- |"
            yield from (f"| `{name}={option}` | {describe_option(path)} |" for option, path in _options(name))
            yield ""
        yield from _table([doc for key, doc in job_keys().items() if key.startswith(f"{name}.")])


def _options(group: str) -> Iterator[tuple[str, Path]]:
    """Options in the order of the classes where they are named like them, else by name."""
    kinds = list(variants_of(fields_of(JobSpec)[group].value_type))
    order = {kind: number for number, kind in enumerate(kinds)}
    yield from sorted(list_options(group).items(), key=lambda item: (order.get(item[0], len(order)), item[0]))


def _table(docs: list[FieldDoc]) -> Iterator[str]:
    if docs:
        yield "| key | type | default | range | meaning |\n| --- | --- | --- | --- | --- |"
    for doc in docs:
        group = doc.key.split(".", 1)[0]
        only = " or ".join(f"`{group}={kind}`" for kind in doc.variants)
        meaning = f"{doc.description} Only {only}." if only else doc.description
        yield f"| `{doc.key}` | {doc.type} | {_default(doc)} | {doc.range} | {meaning} |"
    if docs:
        yield ""


def _default(doc: FieldDoc) -> str:
    value: Any = doc.default
    if value is dataclasses.MISSING:
        return "required"
    return f"`{json.dumps(value.value if isinstance(value, enum.Enum) else value)}`"


if __name__ == "__main__":
    sys.stdout.write(config_markdown())

"""The README's commands: each is a verb that exists, and each shown block is run somewhere."""

from __future__ import annotations

import re
import shlex

from treadle.cli.main import VERBS


def commands(text: str) -> list[list[str]]:
    """Every `treadle ...` line of the shell blocks."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    parts = [part for line in lines for part in re.split(r"&&|;|\|", line.split("  #")[0])]
    return [shlex.split(part) for part in parts if part.strip().startswith("treadle ")]


def test_every_command_is_parsed_by_its_verb(root):
    import importlib

    import click

    found = commands((root / "README.md").read_text(encoding="utf-8"))
    found += [
        c for card in sorted((root / "jobs").glob("*/README.md")) for c in commands(card.read_text(encoding="utf-8"))
    ]
    assert len(found) >= 8
    for _, verb, *rest in found:
        module, attribute = VERBS[verb][0].split(":")
        command = getattr(importlib.import_module(module), attribute)
        while isinstance(command, click.Group):
            command = command.commands[rest.pop(0)]
        command.make_context(verb, rest)  # refuses unknown options and missing arguments


def test_every_link_into_the_repository_leads_somewhere(root):
    for page in [root / "README.md", root / "platform" / "DESIGN.md", *(root / "jobs").glob("*/README.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page, target)


def test_every_path_named_in_the_readme_exists(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:platform|jobs|conf|infra|tests|k8s)/[\w./-]+)`", text):
        assert (root / path).exists(), path

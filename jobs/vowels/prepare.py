"""Nine speakers saying two Japanese vowels: 12 LPC coefficients a frame, 7 to 29 frames."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from treadle.data import Draft, Frames, Labels, Row, fetch
from treadle.errors import DataError
from treadle.spec import DataSpec

LICENCE = "UCI Japanese Vowels (M. Kudo, J. Toyama, M. Shimbo), CC BY 4.0"
CHANNELS = 12


def prepare(spec: DataSpec) -> Draft:
    """The published training and test files; `split.valid` utterances of the training file watch training."""
    files = fetch(spec.source, spec.sha256)
    return Draft(
        rows=[row for name, data in files.items() for row in read_rows(name, data.decode("utf-8"))],
        inputs=Frames(channels=tuple(f"lpc{i}" for i in range(1, CHANNELS + 1))),
        target=Labels(names=tuple("123456789")),
        licence=LICENCE,
        source=spec.sha256,
    )


def read_rows(name: str, text: str) -> Iterator[Row]:
    """Rows of a .ts file: channels separated by ":", values by ",", the speaker last."""
    split = "test" if "TEST" in name else "train"
    _, _, body = text.partition("@data")
    if not body:
        raise DataError(f"{name}: got no @data line, expected the .ts form of the time-series archive")
    for number, line in enumerate(body.strip().splitlines(), start=1):
        *channels, speaker = line.strip().split(":")
        where = f"{name}, series {number}"
        try:
            frames_TD = np.array([[float(v) for v in channel.split(",")] for channel in channels], np.float32).T
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        # Each utterance is its own entity: the task is to tell the same nine speakers apart.
        yield Row(
            entity=f"{split}-{number}",
            inputs=frames_TD,
            target=speaker,
            split=split,
            where=where,
        )

"""Whether the files of a source are what they were, told by their sizes and times, without reading them."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from treadle import wire
from treadle.data.sources.files import Place, list_files
from treadle.errors import IntegrityError, TreadleError
from treadle.spec import DataSpec, Format

__all__ = ["Watch", "watch_source"]

Stamp = tuple[int, ...]
"""When a file was last written or replaced, and its size: all that a store of objects says; of a local file also the
inode and when that changed, which a writer that sets the times of its files does not set."""
_SHOWN = 3
_SECOND_NS = 1_000_000_000
_TICK_NS = 20_000_000
"""The clock of local file systems stands still for up to 10 ms."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Watch:
    """Files as they were at one time. What is read of them after it is all of one state if `check` finds nothing.

    Args:
        place: the files. stamps: of each, by name.
    """

    place: Place
    stamps: Mapping[str, Stamp]

    @functools.cached_property
    def digest(self) -> str:
        """Equal where no file was written to, added or taken away."""
        return wire.digest({name: list(stamp) for name, stamp in self.stamps.items()})

    def check(self, place: Place) -> None:
        """Nothing, if the files of `place`, which are those that were read, are still the same.

        Raises:
            IntegrityError: some were written to since, added or taken away; the first are named.
        """
        now = _stamps(place)
        changed = sorted(name for name in {*now, *self.stamps} if now.get(name) != self.stamps.get(name))
        if changed:
            more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            raise IntegrityError(
                f"data.source: {', '.join(changed[:_SHOWN])}{more}: got files that changed while they were read, "
                "expected that nobody writes to them meanwhile",
                hint="treadle data build once more, when they are written",
            )


def watch_source(data: DataSpec, *, declared: bool) -> Watch | None:
    """The files of `data.source`, watched from now on; None where they cannot be: at a URL, not there, or not named.

    Args:
        declared: whether the job says what its columns are; else any files there may be what its script reads.

    Cost: a listing, and a status of each local file; up to 2 s of waiting where a file was written just now.
    """
    if not data.source or data.source.startswith(("http://", "https://")):
        return None
    try:
        place = list_files(data if declared else dataclasses.replace(data, format=Format.csv), Path())
    except TreadleError:  # who reads them says it, and better
        return None
    stamps = _stamps(place)
    if _settle(stamps.values()):
        stamps = _stamps(place)
    return Watch(place=place, stamps=stamps)


def _stamps(place: Place) -> dict[str, Stamp]:
    """Of each file that is there."""
    found: dict[str, Stamp] = {}
    if isinstance(place.filesystem, fs.LocalFileSystem):
        for file in place.files:
            try:
                status = Path(file.path).stat()
            except OSError:
                continue
            found[file.name] = (status.st_mtime_ns, status.st_size, status.st_ctime_ns, status.st_ino)
        return found
    infos = place.filesystem.get_file_info([file.path for file in place.files])
    for file, info in zip(place.files, infos, strict=True):
        if info.type == fs.FileType.File:
            found[file.name] = (info.mtime_ns or 0, info.size)
    return found


def _settle(stamps: Collection[Stamp]) -> bool:
    """Whether it had to wait until another write to any of these files must give it another stamp."""
    newest = max((max(stamp[0], *stamp[2:3]) for stamp in stamps), default=0)
    tick = 2 * _SECOND_NS if newest % _SECOND_NS == 0 else _TICK_NS  # a store that counts in whole seconds
    age = int(dt.datetime.now(dt.UTC).timestamp() * _SECOND_NS) - newest
    if age >= tick:
        return False
    time.sleep(min(tick - age, tick) / _SECOND_NS)
    return True

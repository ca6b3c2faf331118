"""Whether rows that are in the store are those that a job's source holds now."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

from treadle.data import (
    Note,
    Watch,
    digests_of,
    find_note,
    find_rows,
    list_files,
    note_dataset,
    pinned_files,
    rows_recipe,
)
from treadle.spec import JobSpec
from treadle.store import Blobs

__all__ = ["find_same_rows"]

_logger = logging.getLogger(__name__)
_SHOWN = 3


def find_same_rows(spec: JobSpec, script: Path | None, blobs: Blobs, watch: Watch | None) -> str | None:
    """The digest of the rows in the store that the job would make again; None where it would make others, or any.

    Where `data.sha256` names all files, these are the rows of their digests, whether or not the source can be reached.
    Else the files must be as they were: by sizes and times, or, where a job declares its columns, by what they hold. Of
    a script whose source is a URL, or which finds its own, nobody can tell: it is not run again.

    Args:
        watch: on the files of the source; None where they cannot be looked at.

    Cost: reads files whose size or time is another, and what a URL gives that is not pinned.
    """
    data = spec.data
    by_place, by_pins = (rows_recipe(data, spec.columns, script, pinned=pinned) for pinned in (False, True))
    here = find_note(blobs, data.name, by_place)
    anywhere = find_note(blobs, data.name, by_pins) if data.sha256 else None
    if anywhere and (watch is None or _is_pinned(watch, data.sha256)):
        if here is None or here.digest != anywhere.digest:
            note_dataset(blobs, data.name, by_place, anywhere.digest, files=watch.digest if watch else "")
        return anywhere.digest
    if here is None:
        return None
    if watch is not None and watch.digest == here.files:
        return here.digest
    if script is not None:
        if watch is not None:
            _logger.warning("data.source: got other files than at %s: the script is run again", here.made_at)
        return None if watch else here.digest
    return here.digest if _hold_the_same(spec, blobs, here, by_place, watch) else None


def _is_pinned(watch: Watch, sha256: Mapping[str, str]) -> bool:
    names = [file.name for file in watch.place.files]
    return len(pinned_files(names, sha256)) == len(names)


def _hold_the_same(spec: JobSpec, blobs: Blobs, note: Note, recipe: str, watch: Watch | None) -> bool:
    """Whether the files hold what they held; if so, it is noted what they look like now."""
    data = spec.data
    rows = find_rows(blobs, data.name, note.digest)
    if rows is None:
        return False
    with tempfile.TemporaryDirectory(prefix="treadle-source-") as scratch:
        place = watch.place if watch else list_files(data, Path(scratch))
        seen = digests_of(place, pinned_files([file.name for file in place.files], data.sha256))
    before = rows.header.source
    if seen == before:
        if watch:
            watch.check(place)
            note_dataset(blobs, data.name, recipe, note.digest, files=watch.digest)
        return True
    changed = sorted(name for name in {*seen, *before} if seen.get(name) != before.get(name))
    words = [f"{name} ({_became(name, before, seen)})" for name in changed[:_SHOWN]]
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    _logger.warning(
        "data.source: got other files than at %s: %s%s; the rows are made again", note.made_at, ", ".join(words), more
    )
    return False


def _became(name: str, before: Mapping[str, str], seen: Mapping[str, str]) -> str:
    return "changed" if name in before and name in seen else "new" if name in seen else "gone"

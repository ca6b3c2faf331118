"""Whether a place keeps its promises about racing writers: found out by trying."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from treadle.errors import ConfigError, ConflictError
from treadle.store.blobs import Blobs

__all__ = ["probe_conditional_writes"]

_NUM_RACERS = 8


def probe_conditional_writes(blobs: Blobs) -> list[str]:
    """The names of the checks that fail; empty where leases, runs and the registry are safe.

    Some S3 servers ignore the conditions of a write without a word: every racer wins, and a
    counter that eighty writers raise ends at thirteen.

    Cost: about twenty small requests under `probe/<uuid>/`, which is removed again.

    Raises:
        ConfigError: the place refuses a plain write.
        TransientError: the place cannot be reached.
    """
    folder = f"probe/{uuid.uuid4().hex}"
    checks: dict[str, Callable[[Blobs, str], bool]] = {
        "create once": _creates_once,
        "create once under a race": _one_racer_wins,
        "replace only the version seen": _replaces_seen_version,
        "replace only what exists": _refuses_missing,
        "list after write": _lists_after_write,
    }
    blobs.put(f"{folder}/plain", b"")
    try:
        return [name for name, check in checks.items() if not check(blobs, f"{folder}/{name.replace(' ', '-')}")]
    finally:
        for entry in blobs.list(f"{folder}/"):
            blobs.delete(entry.key)


def _wins(write: Callable[[], object]) -> bool | None:
    """True: written. False: refused as a conflict. None: the place knows no conditional writes."""
    try:
        write()
    except ConflictError:
        return False
    except ConfigError:
        return None
    return True


def _creates_once(blobs: Blobs, key: str) -> bool:
    tries = [_wins(lambda: blobs.create(key, b"first")), _wins(lambda: blobs.create(key, b"second"))]
    return tries == [True, False] and blobs.get(key) == b"first"


def _one_racer_wins(blobs: Blobs, key: str) -> bool:
    with ThreadPoolExecutor(_NUM_RACERS) as pool:
        racers = range(_NUM_RACERS)
        won = list(pool.map(lambda i: _wins(lambda: blobs.create(key, b"%d" % i)), racers))
    return won.count(True) == 1 and won.count(False) == _NUM_RACERS - 1 and blobs.get(key) == b"%d" % won.index(True)


def _replaces_seen_version(blobs: Blobs, key: str) -> bool:
    seen = blobs.put(key, b"first").version
    good = _wins(lambda: blobs.replace(key, b"second", version=seen))
    stale = _wins(lambda: blobs.replace(key, b"third", version=seen))
    return (good, stale) == (True, False) and blobs.get(key) == b"second"


def _refuses_missing(blobs: Blobs, key: str) -> bool:
    seen = blobs.put(key, b"first").version
    blobs.delete(key)
    return _wins(lambda: blobs.replace(key, b"second", version=seen)) is False and blobs.head(key) is None


def _lists_after_write(blobs: Blobs, key: str) -> bool:
    blobs.put(key, b"x")
    return [entry.key for entry in blobs.list(key)] == [key]

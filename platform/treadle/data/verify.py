"""Every block of a data set read and checked against what was written.

Shape letters: R rows of a block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from treadle.data.blocks import BlockRows, decode_block
from treadle.data.manifest import Block, Manifest
from treadle.errors import ConfigError, IntegrityError, NotFoundError

__all__ = ["Damage", "verify_blocks"]

READS = 16
"""Blocks in flight: on a far store the time of a block is that of an answer."""


class Readable(Protocol):
    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes: ...
    def local_path(self, key: str) -> Path | None: ...


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One place that is not what was written.

    Args:
        block: its number; rows: first and last row number that it holds.
    """

    block: int
    key: str
    offset: int
    size: int
    rows: tuple[int, int]
    what: str


def verify_blocks(
    blobs: Readable, manifest: Manifest, *, progress: Callable[[str, int, int], None] = lambda *_: None
) -> list[Damage]:
    """Every damaged block of a data set, in order; none where all is as written.

    Cost: reads everything once, 16 blocks at a time.
    """
    blocks = manifest.header.blocks
    found: list[Damage] = []
    with ThreadPoolExecutor(READS) as pool:
        for number, what in enumerate(_ahead(pool, lambda n: _complaint(blobs, manifest, n), len(blocks))):
            if what:
                found.append(_damage(manifest, number, what))
            progress("verify", number + 1, len(blocks))
    return found


def _ahead(pool: ThreadPoolExecutor, work: Callable[[int], str], count: int) -> Iterator[str]:
    """`work` of 0 to count - 1 in order, at most twice READS of them begun and not yet taken."""
    numbers = iter(range(count))
    running = OrderedDict((n, pool.submit(work, n)) for n in islice(numbers, 2 * READS))
    while running:
        _, done = running.popitem(last=False)
        yield done.result()
        for n in islice(numbers, 1):
            running[n] = pool.submit(work, n)


def _complaint(blobs: Readable, manifest: Manifest, number: int) -> str:
    """What is wrong with a block, or ""."""
    block = manifest.header.blocks[number]
    try:
        rows = decode_block(_read(blobs, block), block, manifest.header.content)
    except NotFoundError:
        return "the shard is gone"
    except IntegrityError as error:
        return error.message.rpartition(": ")[2]
    except ConfigError as error:  # no plain file, such as a link
        return error.message
    except OSError as error:
        return error.strerror or str(error)
    return _mismatch(rows, manifest, number)


def _read(blobs: Readable, block: Block) -> bytes:
    path = blobs.local_path(block.key)
    if path is None:
        return blobs.get(block.key, offset=block.offset, size=block.size)
    try:
        with path.open("rb") as file:  # not mapped: a file that shrinks under a map kills the process
            file.seek(block.offset)
            return file.read(block.size)
    except FileNotFoundError:
        raise NotFoundError(f"{block.key}: not there") from None


def _mismatch(rows: BlockRows, manifest: Manifest, number: int) -> str:
    """Where a sound block and the columns of the manifest do not speak of the same rows."""
    start, stop = manifest.block_starts[number : number + 2]
    width = len(manifest.header.content.channels) or 1
    lengths_R = np.diff(rows.value_offsets) // width
    if not np.array_equal(lengths_R, manifest.columns["length"][start:stop]):
        return "rows of other lengths than the manifest says"
    return ""


def _damage(manifest: Manifest, number: int, what: str) -> Damage:
    block = manifest.header.blocks[number]
    start, stop = map(int, manifest.block_starts[number : number + 2])
    return Damage(block=number, key=block.key, offset=block.offset, size=block.size, rows=(start, stop - 1), what=what)

"""The blocks of a data set that are in memory: opened when first needed, each checked when it is opened."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from treadle.data.blocks import BlockRows, decode_block
from treadle.data.load.gather import Column
from treadle.data.load.near import BlockSource
from treadle.data.manifest import REBUILD, Manifest
from treadle.errors import IntegrityError
from treadle.spec import TargetKind, TargetPer

__all__ = ["OpenBlocks"]


class OpenBlocks:
    """Blocks and the columns that tell where their rows lie. Used under the lock of whoever owns it.

    Args:
        source: of the bytes. It says how many bytes may be held; those least recently opened go first.
        manifest: of the data set.
        labels_R: of rows that have one each.
    """

    def __init__(self, source: BlockSource, manifest: Manifest, labels_R: NDArray[np.int64] | None = None) -> None:
        self.source = source
        self.blocks = manifest.header.blocks
        self.content = content = manifest.header.content
        self.starts = starts = manifest.block_starts
        lengths_R = manifest.columns["length"]
        width = len(content.channels) or 1
        weights_R = manifest.columns["weight"]
        self.values = Column(starts, lengths_R, width, labels_R=labels_R, weights_R=weights_R)
        self.gaps = Column(starts, lengths_R, 1) if content.timed else None
        self.targets: Column | None = None
        if content.target is not TargetKind.none:
            width = len(content.value_names) if content.target is TargetKind.values else 1
            counts_R = {
                TargetPer.row: None,
                TargetPer.frame: lengths_R,
                TargetPer.sequence: manifest.columns["targets"],
            }[content.target_per]
            self.targets = Column(starts, counts_R, width)
        self.rows: OrderedDict[int, BlockRows] = OrderedDict()
        self.wanted: Counter[int] = Counter()
        self._num_bytes = 0

    def read(self, numbers: Sequence[int]) -> list[BlockRows]:
        """These blocks, checked; needs no lock.

        Raises:
            IntegrityError: a block is not what was written; the message names it.
            TransientError: a far store does not answer.
        """
        found: dict[int, BlockRows] = {}
        left, is_last = list(numbers), False
        while left:
            again = []
            for number, raw in zip(left, self.source.raw(left), strict=True):
                try:
                    found[number] = self._checked(number, decode_block(raw, self.blocks[number], self.content))
                except IntegrityError:
                    if not self.source.damaged(number) or is_last:
                        raise
                    again.append(number)
            left, is_last = again, True
        return [found[number] for number in numbers]

    def add(self, number: int, rows: BlockRows) -> None:
        """Keep a block, and let go of others where there are too many."""
        if number in self.rows:
            return
        self.rows[number] = rows
        self._num_bytes += self.blocks[number].size
        self.values.open(number, rows.values, rows.value_offsets)
        if self.targets is not None:
            self.targets.open(number, rows.targets, rows.target_offsets)
        if self.gaps is not None and rows.gaps_N is not None:
            self.gaps.open(number, rows.gaps_N, rows.value_offsets // self.values.width)
        most = self.source.max_bytes
        if most is not None and self._num_bytes > most:
            self._let_go(most)

    def blocks_of(self, rows_B: NDArray[np.int64]) -> list[int]:
        """The blocks that hold these rows."""
        return np.unique(np.searchsorted(self.starts, rows_B, side="right") - 1).tolist()

    def _checked(self, number: int, rows: BlockRows) -> BlockRows:
        """The block, if its rows are as long as the manifest says."""
        fits = self.values.fits(number, rows.value_offsets)
        if self.targets is not None:
            fits &= self.targets.fits(number, rows.target_offsets)
            fits &= len(rows.targets) == int(rows.target_offsets[-1])
        fits &= len(rows.values) == int(rows.value_offsets[-1])
        if self.gaps is not None:
            fits &= rows.gaps_N is not None and len(rows.gaps_N) * self.values.width == len(rows.values)
        if not fits:
            block = self.blocks[number]
            raise IntegrityError(
                f"{block.key}, bytes {block.offset} to {block.offset + block.size}: got rows of other lengths than the "
                "manifest's",
                hint=REBUILD,
            )
        return rows

    def _let_go(self, most: int) -> None:
        for number in list(self.rows):
            if self._num_bytes <= most:
                return
            if self.wanted[number]:
                continue
            for column in (self.values, self.targets, self.gaps):
                if column is not None:
                    column.close(number)
            del self.rows[number]
            self._num_bytes -= self.blocks[number].size

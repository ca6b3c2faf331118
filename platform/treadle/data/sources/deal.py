"""Files of a scratch folder that lines are dealt to by the hash of their entity, each small enough to be sorted.

Shape letters: R lines.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from treadle.data.chunk import CHUNK_BYTES
from treadle.data.sources.tables import damaged
from treadle.errors import TransientError

__all__ = ["Deal", "room"]

_MOST_FILES = 256
_GATHERED_BYTES = 8 * CHUNK_BYTES
_NO_HASH = np.iinfo(np.uint64).max


class Deal:
    """Lines dealt to files in the order of reading; gathered first, so that few batches are written.

    Args:
        folder: made here. size: bytes there will be, about. file_bytes: that a file should have.
        seed: of the hash of entities.
    """

    def __init__(self, folder: Path, *, size: int, file_bytes: int, seed: int = 0) -> None:
        num = min(_MOST_FILES, -(-size // file_bytes) or 1)
        self._folder, self._file_bytes, self._seed = folder, file_bytes, seed
        self._writers: list[pa.RecordBatchStreamWriter | None] = [None] * num
        # The least and the largest hash in each file: one entity cannot be dealt any further.
        self._least, self._most = np.full(num, _NO_HASH), np.zeros(num, np.uint64)
        self._gathered: list[pa.RecordBatch] = []
        self._held = 0
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Deal:
        with room(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with room(self._folder) if kind is None else contextlib.suppress(OSError), self._open:
            if kind is None:
                self._flush()

    def add(self, batch: pa.RecordBatch) -> None:
        """Deal the lines of a batch, by its column `entity`.

        Raises:
            TransientError: there is no room for them.
        """
        self._gathered.append(batch)
        self._held += batch.nbytes
        if self._held >= _GATHERED_BYTES:
            with room(self._folder):
                self._flush()

    def files(self) -> Iterator[Path]:
        """The files with lines, once all are closed; those that came out more than twice too large are dealt again.

        How large they become is not known before: sources are packed, and entities of many lengths.
        """
        for place in np.flatnonzero(self._least <= self._most).tolist():
            path = self._path(place)
            size = path.stat().st_size
            if size <= 2 * self._file_bytes or self._least[place] == self._most[place]:
                yield path
                continue
            again = Deal(path.with_suffix(""), size=size, file_bytes=self._file_bytes, seed=self._seed + 1)
            with again, damaged(path.name), pa.memory_map(str(path)) as file:
                for batch in pa.ipc.open_stream(file):
                    again.add(batch)
            path.unlink()
            yield from again.files()

    def _path(self, place: int) -> Path:
        return self._folder / f"{place:04}.arrows"

    def _flush(self) -> None:
        if not self._gathered:
            return
        table = pa.Table.from_batches(self._gathered).combine_chunks()
        self._gathered, self._held = [], 0
        for batch in table.to_batches():
            hash_R = _hashes(batch.column("entity"), self._seed)
            place_R = (hash_R % np.uint64(len(self._writers))).astype(np.uint16)
            order = np.argsort(place_R, kind="stable")  # in the order of reading within each file
            dealt, hash_R = batch.take(pa.array(order)), hash_R[order]
            bounds = np.searchsorted(place_R[order], np.arange(len(self._writers) + 1)).tolist()
            for place, (start, stop) in enumerate(itertools.pairwise(bounds)):
                if stop > start:
                    self._writer(place, table.schema).write_batch(dealt.slice(start, stop - start))
                    self._least[place] = min(self._least[place], hash_R[start:stop].min())
                    self._most[place] = max(self._most[place], hash_R[start:stop].max())

    def _writer(self, place: int, schema: pa.Schema) -> pa.RecordBatchStreamWriter:
        if (writer := self._writers[place]) is None:
            file = self._open.enter_context(pa.OSFile(str(self._path(place)), "wb"))
            writer = self._writers[place] = self._open.enter_context(pa.ipc.new_stream(file, schema))
        return writer


def _hashes(entity_R: pa.StringArray, seed: int) -> NDArray[np.uint64]:
    encoded = entity_R.dictionary_encode()
    names = encoded.dictionary.cast(pa.binary()).to_pylist()
    of_entity = np.fromiter((xxhash.xxh3_64_intdigest(name, seed) for name in names), np.uint64, len(names))
    return of_entity[encoded.indices.to_numpy()]


@contextlib.contextmanager
def room(path: Path) -> Iterator[None]:
    """What the system says of a file that cannot be written.

    Raises:
        TransientError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise TransientError(
            f"{path}: {error.strerror or error}, expected room for sorted events", hint="free some space"
        ) from error

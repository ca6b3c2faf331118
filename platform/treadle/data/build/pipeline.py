"""From a source to the shards and the manifest of a data set, in memory that does not grow with its values.

    source -> parts: sorted runs of 64 MB and facts of each row, on the scratch shelf        parts.py
           -> the order of all rows, without those that are too many or repeated             choose.py
           -> zones: 64 MB of that order, one shard each                                     zones.py
           -> a manifest of rows, then one of rows split, fitted and audited                 view.py

Parts and zones are independent pieces of work that `Means.run` carries out, here or on a cluster. Shards are named by
their content and written once, unless they are damaged, and each manifest comes last: a killed build leaves nothing
that reads as a data set. What is built follows from the rows and the order of the files alone: not from how a source
was cut, nor by whom.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from treadle import wire
from treadle.data.blocks import checksum
from treadle.data.build.choose import Columns, choose_rows, gather_facts
from treadle.data.build.inline import run_inline
from treadle.data.build.names import content_of, merge_names
from treadle.data.build.parts import PartJob, PartMeta, read_facts, write_part
from treadle.data.build.scratch import Scratch, Shelf, claim
from treadle.data.build.zones import Zone, ZoneJob, create_once, plan_zones, used_ids, write_zone
from treadle.data.chunk import Chunk, Part, Source
from treadle.data.draft import Draft, Labels
from treadle.data.load.fetch_blocks import Reading
from treadle.data.load.reader import RowReader
from treadle.data.manifest import COLUMNS, SCHEMA, Block, Header, Manifest
from treadle.data.sources.rows import DraftSource
from treadle.data.splits.view import make_view
from treadle.spec import DataSpec, OnBadRow, SplitSpec

__all__ = ["Means", "Origin", "build_dataset", "build_rows", "build_view"]

_MOST_BAD = {OnBadRow.fail: 1000, OnBadRow.quarantine: 1_000_000}
"""Bad rows of one part after which it is not read on: the build fails, and has enough to say."""
_READING = Reading(num_requests=8, held_bytes=128 << 20)
"""How rows are read for fitting and the audit."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """How a build is carried out.

    Args:
        run: carries out a function of each item, like `map`: anywhere, but with results in the order of the items.
        open_shelf: gives the store in another process, picklable; None where `run` stays in this one.
        progress: called with (stage, rows done, rows in all; 0 where that is not known yet).
        run_bytes: of rows sorted in memory at once; it changes nothing in what is built.
        shard_bytes, block_bytes: about, of what is written.
    """

    run: Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]] = run_inline
    open_shelf: Callable[[], Shelf] | None = None
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    run_bytes: int = 64 << 20
    shard_bytes: int = 64 << 20
    block_bytes: int = 2 << 20


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where rows come from.

    Args:
        licence: a line for people. source: sha256 by file name.
        is_here: whether only this process, on this machine, can read the source.
        files: what the files looked like before all of that; a killed build of others is not gone on with.
        check: called when all is read; raises if the files are no longer as they were.
    """

    licence: str
    source: Mapping[str, str] = field(default_factory=dict)
    is_here: bool = False
    files: str = ""
    check: Callable[[], None] = lambda: None


def build_dataset(
    draft: Draft,
    data: DataSpec,
    shelf: Shelf,
    *,
    recipe: str,
    split: SplitSpec | None = None,
    means: Means = Means(),
) -> tuple[str, Manifest]:
    """Write the rows of a draft below `data/<name>/`, split them, and give digest and manifest of the data set.

    Raises:
        DataError: rows that cannot be used, or what the audit found.
    """
    _, rows = build_rows(draft, data, shelf, recipe=recipe, means=means)
    return build_view(rows, data, split or SplitSpec(), shelf, recipe=recipe)


def build_rows(
    source: Source | Draft,
    data: DataSpec,
    shelf: Shelf,
    *,
    recipe: str,
    origin: Origin | None = None,
    means: Means = Means(),
) -> tuple[str, Manifest]:
    """Write the rows of a source to shards; gives digest and manifest of rows, which say nothing of a split yet.

    Args:
        recipe: digest of what the rows are made by, kept in the manifest.
        origin: of the rows; a draft says it itself.

    Raises:
        DataError: no rows, or more that break rules than `data` allows, the first 20 of them listed.
        ConflictError: another process builds the same in the same folder. IntegrityError: the source has changed since.

    Cost: time to write everything twice; memory of two runs or two zones (some 300 MB), and 150 bytes a row.
    """
    if is_draft := isinstance(source, Draft):
        origin = Origin(licence=source.licence, source=source.source, is_here=True)
        source = _Counted(DraftSource(source), means.progress)
    origin = origin or Origin(licence=data.licence)
    with claim(shelf, data.name, _build_id(source, recipe, origin), once=is_draft) as folder:
        build = _Build(source=source, data=data, shelf=shelf, folder=folder, means=means)
        columns, metas = build.sort(is_here=origin.is_here)
        origin.check()
        order, bad_lines, num_bad = choose_rows(data, columns, metas)
        job, blocks = build.write(columns, order, metas)
        header = Header(
            name=data.name,
            recipe=recipe,
            licence=origin.licence,
            source=dict(origin.source),
            max_length=data.max_length,
            content=job.content,
            blocks=tuple(blocks),
            set_aside=num_bad,
            quarantine=_set_aside(shelf, data.name, bad_lines),
        )
        columns["label"] = _global_labels(columns, metas, job)
        manifest = Manifest(header=header, columns={name: columns.pop(name)[order] for name in COLUMNS})
        return _keep(manifest, shelf, f"data/{data.name}/rows"), manifest


def build_view(rows: Manifest, data: DataSpec, split: SplitSpec, shelf: Shelf, *, recipe: str) -> tuple[str, Manifest]:
    """Split rows, fit and audit them; gives digest and manifest of the data set. No shard is written.

    Raises:
        DataError: a split that cannot be made, or what the audit found.
    """
    with RowReader(shelf, rows, reading=_READING, mapped=False) as reader:
        made = make_view(rows, reader, data, split)
    manifest = dataclasses.replace(made, header=dataclasses.replace(made.header, recipe=recipe))
    return _keep(manifest, shelf, f"data/{data.name}/manifests"), manifest


class _Counted:
    """The source of a draft, which tells how far it is read."""

    def __init__(self, source: DraftSource, progress: Callable[[str, int, int], None]) -> None:
        self._source, self._progress = source, progress
        self.schema, self.parts = source.schema, source.parts

    def read(self, part: Part) -> Iterator[Chunk]:
        done = 0
        for chunk in self._source.read(part):
            yield chunk
            done += chunk.num_rows
            self._progress("read", done, 0)


@dataclass(frozen=True, kw_only=True)
class _Build:
    """The two steps that take time."""

    source: Source
    data: DataSpec
    shelf: Shelf
    folder: str
    means: Means

    def sort(self, *, is_here: bool) -> tuple[Columns, list[PartMeta]]:
        """Sort all parts into runs; gives the facts of all rows, run by run."""
        parts = list(self.source.parts)
        job = PartJob(
            open_shelf=self._opener(is_here=is_here),
            folder=self.folder,
            source=self.source,
            max_length=self.data.max_length,
            limit=self.data.limit,
            most_bad=_MOST_BAD[self.data.on_bad_row],
            run_bytes=self.means.run_bytes,
        )
        run = self.means.run
        if is_here:  # a generator may hold what belongs to this thread, such as a connection to a database
            run = map if len(parts) == 1 else run_inline
        counts: list[int] = []
        for count in run(functools.partial(write_part, job), enumerate(parts)):
            counts.append(count)
            self.means.progress("read", sum(counts), sum(counts) if len(counts) == len(parts) else 0)
        scratch = Scratch(self.shelf, self.folder)
        return gather_facts(counts, (read_facts(scratch, number) for number in range(len(parts))))

    def write(self, columns: Columns, order: Any, metas: Sequence[PartMeta]) -> tuple[ZoneJob, list[Block]]:
        """Write all shards."""
        runs = [(number, run) for number, meta in enumerate(metas) for run in meta.runs]
        job = ZoneJob(
            open_shelf=self._opener(is_here=False),
            folder=self.folder,
            name=self.data.name,
            content=content_of(self.source.schema, (), ()),
            symbol_ids=(),
            label_ids=(),
            block_bytes=self.means.block_bytes,
        )

        def zones() -> Iterator[Zone]:
            return plan_zones(job.content, columns, order, runs, shard_bytes=self.means.shard_bytes)

        job = self._named(job, metas, None if len(order) == len(columns["length"]) else zones())
        blocks: list[Block] = []
        done = 0
        for some in self.means.run(functools.partial(write_zone, job), zones()):
            blocks += some
            done += sum(block.rows for block in some)
            self.means.progress("write", done, len(order))
        return job, blocks

    def _named(self, job: ZoneJob, metas: Sequence[PartMeta], zones: Iterator[Zone] | None) -> ZoneJob:
        """The job with symbols and labels of all parts; where rows were left out, of those that `zones` hold."""
        used: tuple[list[set[int]], list[set[int]]] | None = None
        if zones is not None:
            used = [set() for _ in metas], [set() for _ in metas]
            for found in self.means.run(functools.partial(used_ids, job), zones):
                for part, ids in found.items():
                    used[0][part].update(ids[0])
                    used[1][part].update(ids[1])
        target = self.source.schema.target
        declared = target.names if isinstance(target, Labels) else None
        symbols = merge_names([meta.symbols for meta in metas], None, used and used[0])
        labels = merge_names([meta.labels for meta in metas], declared, used and used[1])
        content = content_of(self.source.schema, symbols.names, labels.names)
        return dataclasses.replace(job, content=content, symbol_ids=symbols.ids, label_ids=labels.ids)

    def _opener(self, *, is_here: bool) -> Callable[[], Shelf]:
        return (lambda: self.shelf) if is_here or self.means.open_shelf is None else self.means.open_shelf


def _build_id(source: Source, recipe: str, origin: Origin) -> str:
    """What a rerun of a killed build has in common with it; paths may differ, as those of downloads do."""
    parts = [wire.encode(dataclasses.replace(part, path="")) for part in source.parts]
    read = {"source": dict(origin.source), "files": origin.files, "parts": parts}
    return wire.digest(read | {"recipe": recipe, "schema": SCHEMA})


def _global_labels(columns: Columns, metas: Sequence[PartMeta], job: ZoneJob) -> Any:
    """The column of labels by the ids of the data set."""
    labels_R, start = columns["label"], 0
    for meta, ids in zip(metas, job.label_ids, strict=True):
        stop = start + sum(run.rows for run in meta.runs)
        labels_R[start:stop] = ids[labels_R[start:stop]]
        start = stop
    return labels_R


def _set_aside(shelf: Shelf, name: str, lines: bytes) -> str:
    """The key of the file of rows set aside, or ""."""
    if not lines:
        return ""
    key = f"data/{name}/quarantine/{checksum(lines)}.jsonl"
    create_once(shelf, key, lines)
    return key


def _keep(manifest: Manifest, shelf: Shelf, folder: str) -> str:
    """Write a manifest under its digest, which is given back."""
    data = manifest.to_bytes()
    digest = wire.digest(data)
    create_once(shelf, f"{folder}/{digest}.arrow", data)
    return digest

"""Arrow in, batches out: sources and drafts, shards with a manifest, splits, and padded or packed batches.

A preparation script imports `Draft`, `Row`, what inputs and targets are (`Tokens` or `Frames`, `Labels` or `Values`),
and `fetch` from here.
"""

from treadle.data.build.pipeline import Means, Origin, build_dataset, build_rows, build_view
from treadle.data.draft import SPLITS, Draft, Frames, Labels, Row, Tokens, Values
from treadle.data.load.ahead import ahead
from treadle.data.load.batch import Batch, Form
from treadle.data.load.block_cache import BlockCache
from treadle.data.load.buffers import Buffers, Lease
from treadle.data.load.reader import RowReader
from treadle.data.load.streams import StreamBatch, read_pieces, read_streams
from treadle.data.manifest import Header, Manifest, Preprocessing
from treadle.data.shelf import (
    Note,
    find_dataset,
    find_note,
    find_rows,
    load_manifest,
    note_dataset,
    recipe_digest,
    rows_recipe,
    unprepared,
)
from treadle.data.sources.declared import open_source
from treadle.data.sources.fetch import fetch
from treadle.data.sources.files import digests_of, list_files, pinned_files
from treadle.data.sources.watch import Watch, watch_source

__all__ = [
    "SPLITS",
    "Batch",
    "BlockCache",
    "Buffers",
    "Draft",
    "Form",
    "Frames",
    "Header",
    "Labels",
    "Lease",
    "Manifest",
    "Means",
    "Note",
    "Origin",
    "Preprocessing",
    "Row",
    "RowReader",
    "StreamBatch",
    "Tokens",
    "Values",
    "Watch",
    "ahead",
    "build_dataset",
    "build_rows",
    "build_view",
    "digests_of",
    "fetch",
    "find_dataset",
    "find_note",
    "find_rows",
    "list_files",
    "load_manifest",
    "note_dataset",
    "open_source",
    "pinned_files",
    "read_pieces",
    "read_streams",
    "recipe_digest",
    "rows_recipe",
    "unprepared",
    "watch_source",
]

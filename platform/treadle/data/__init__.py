"""Arrow in, batches out: drafts, shards with a manifest, and padded batches.

A preparation script imports `Draft`, `Row`, `Tokens` or `Frames`, and `fetch` from here.
"""

from treadle.data.build import build_dataset
from treadle.data.draft import Draft, Frames, Row, Tokens
from treadle.data.fetch import fetch
from treadle.data.loader import Batch, RowReader, ahead
from treadle.data.manifest import Header, Manifest, Preprocessing
from treadle.data.shelf import find_dataset, load_manifest, note_dataset, recipe_digest

__all__ = [
    "Batch",
    "Draft",
    "Frames",
    "Header",
    "Manifest",
    "Preprocessing",
    "Row",
    "RowReader",
    "Tokens",
    "ahead",
    "build_dataset",
    "fetch",
    "find_dataset",
    "load_manifest",
    "note_dataset",
    "recipe_digest",
]

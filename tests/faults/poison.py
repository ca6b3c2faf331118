"""Reads one source in a process of its own, which damage may end: prints what came of it.

python poison.py FOLDER STORE MAX_LENGTH BAD_ROWS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from treadle.data.blocks import decode_block
from treadle.data.build.pipeline import Means, Origin, build_rows
from treadle.data.sources.declared import open_source
from treadle.errors import TreadleError
from treadle.spec import ColumnsSpec, DataSpec, OnBadRow
from treadle.store.local import LocalBlobs

COLUMNS = ColumnsSpec(entity="who", inputs=["frames"], target=["label"])
SMALL = Means(run_bytes=20_000, shard_bytes=30_000, block_bytes=5_000)


def build(folder: Path, store: Path, max_length: int, bad_rows: float) -> dict[str, Any]:
    """The rows of a data set in their order and what was set aside; or the error, and what it left behind.

    Args:
        folder: the source.
        store: a new folder.
        max_length: most frames of a row.
        bad_rows: as `data.bad_rows`; 0: a bad row fails the build.
    """
    rule = OnBadRow.quarantine if bad_rows else OnBadRow.fail
    data = DataSpec(name="toy", source=str(folder), max_length=max_length, on_bad_row=rule, bad_rows=bad_rows or 0.01)
    blobs = LocalBlobs(store)
    try:
        source = open_source(data, COLUMNS, scratch=store.parent / "scratch")
        _, manifest = build_rows(source, data, blobs, recipe="r", origin=Origin(licence="made up"), means=SMALL)
    except TreadleError as error:
        kept = [entry.key for entry in blobs.list("data/")]
        return {"error": type(error).__name__, "message": error.message, "kept": kept}
    rows = []
    for block in manifest.header.blocks:
        found = decode_block(blobs.get(block.key, offset=block.offset, size=block.size), block, manifest.header.content)
        rows += [entity.as_py() for entity in found.entities]
    lines = blobs.get(manifest.header.quarantine).splitlines() if manifest.header.quarantine else []
    return {"rows": rows, "set_aside": manifest.header.set_aside, "quarantine": [json.loads(line) for line in lines]}


if __name__ == "__main__":
    print(json.dumps(build(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))))

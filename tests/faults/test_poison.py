"""Source files and shards that are damaged, of another form, or hold rows that may not be (F16)."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import poison
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from treadle.data.build.pipeline import Means, build_rows
from treadle.data.draft import Draft, Labels, Row, Tokens
from treadle.data.verify import verify_blocks
from treadle.spec import DataSpec
from treadle.testing import MemoryBlobs

FRAME = pa.list_(pa.list_(pa.float32()))
SCHEMA = pa.schema([("who", pa.string()), ("frames", FRAME), ("label", pa.string())])
NUM_ROWS = 60
MAX_LENGTH = 50


def table_of(number: int, lengths: dict[int, int] | None = None) -> pa.Table:
    """Rows of a file; `lengths` of chosen rows are others."""
    rng = np.random.default_rng(number)
    sizes = [(lengths or {}).get(i, 1 + i % 40) for i in range(NUM_ROWS)]
    frames = [rng.normal(size=(size, 4)).astype(np.float32).tolist() for size in sizes]
    who = [f"p{number}-{i:03d}" for i in range(NUM_ROWS)]
    return pa.table({"who": who, "frames": frames, "label": ["xyz"[i % 3] for i in range(NUM_ROWS)]}, schema=SCHEMA)


def write(path: Path, table: pa.Table) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=20)


@pytest.fixture(params=["arrow", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path, choose) -> list[Path]:
    """Three sound files."""
    if request.param == "parquet" and choose(True, False):
        pytest.skip("in full runs only")
    (tmp_path / "source").mkdir()
    paths = [tmp_path / "source" / f"{number}.{request.param}" for number in range(3)]
    for number, path in enumerate(paths):
        write(path, table_of(number))
    return paths


def build(folder: Path, *, bad_rows: float = 0.0, apart: bool = False) -> dict[str, Any]:
    """What is made of the files in folder/source; in a process `apart`, which must end by itself, with an answer."""
    store = folder / f"store-{random.getrandbits(60):x}" / "store"
    store.parent.mkdir()
    if not apart:
        return poison.build(folder / "source", store, MAX_LENGTH, bad_rows)
    script = str(Path(__file__).with_name("poison.py"))
    command = [sys.executable, "-P", script, str(folder / "source"), str(store), str(MAX_LENGTH), str(bad_rows)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return json.loads(done.stdout)


def check_refused(answer: dict[str, Any], path: Path, damage: str) -> None:
    assert answer.get("error") == "DataError", (damage, answer)
    assert path.name in answer["message"], (damage, answer)
    assert answer["kept"] == []


@pytest.mark.fault(16, "a source file that is cut off, empty, of zeros, of another magic")
def test_a_file_that_is_not_whole_is_named(source: list[Path], tmp_path: Path, matrix, points) -> None:
    path = source[1]
    whole = path.read_bytes()
    damages = {
        "half": whole[: len(whole) // 2],
        **{f"cut at {i} tenths": whole[: len(whole) * i // 10] for i in (0, 1, 3, 7, 9)},
        "last byte": whole[:-1],
        "zeros": bytes(len(whole)),
        "magic": b"XXXX" + whole[4:],
        "length of the footer, Arrow": whole[:-10] + b"\xff\xff\xff\x7f" + whole[-6:],
        "length of the footer, Parquet": whole[:-8] + b"\xff\xff\xff\x7f" + whole[-4:],
    }
    tried = points(sorted(damages), 2)
    for name in tried:
        path.write_bytes(damages[name])
        answer = build(tmp_path, bad_rows=0.5)
        if (name, path.suffix) == ("magic", ".parquet"):  # its reader starts at the other end, and all is there
            assert len(answer["rows"]) == 3 * NUM_ROWS
            continue
        check_refused(answer, path, name)
    matrix.note(injected=len(tried), seen="not whole: DataError naming the file, nothing kept")


@pytest.mark.fault(16, "a source file of another form")
def test_a_file_of_another_form_is_named(source: list[Path], tmp_path: Path, matrix, points) -> None:
    table = table_of(1)
    others = {
        "column gone": table.drop_columns(["label"]),
        "frames of text": table.set_column(1, "frames", pa.array([["a", "b"]] * NUM_ROWS)),
        "other width": table.set_column(1, "frames", pa.array([[[1.0, 2.0]]] * NUM_ROWS, FRAME)),
    }
    tried = points(sorted(others), 1)
    for name in tried:
        write(source[1], others[name])
        check_refused(build(tmp_path), source[1], name)
    matrix.note(injected=len(tried), seen="another form: DataError naming the file")


@pytest.mark.fault(16, "offsets of lists that point nowhere")
def test_offsets_that_point_nowhere_end_no_process(source: list[Path], tmp_path: Path, matrix, points) -> None:
    if source[0].suffix != ".arrow":
        pytest.skip("parquet has no offsets")
    path = source[1]
    whole = path.read_bytes()
    batch = pa.ipc.open_file(whole).get_batch(0)
    offsets = batch["frames"].offsets.to_numpy()
    at = whole.index(offsets.tobytes())
    wrong = {"far": (5, 2**31 - 1), "negative": (5, -8), "falling": (7, 2), "last beyond": (len(offsets) - 1, 5000)}
    tried = points(sorted(wrong), 2)
    for name in tried:
        changed = offsets.copy()
        place, value = wrong[name]
        changed[place] = value
        path.write_bytes(whole[:at] + changed.tobytes() + whole[at + changed.nbytes :])
        check_refused(build(tmp_path, bad_rows=0.5, apart=True), path, name)
    matrix.note(injected=len(tried), seen="offsets: DataError, no process ended by it")


@pytest.mark.fault(16, "a flipped bit in each part of a source file")
def test_a_flipped_bit_ends_no_process(source: list[Path], tmp_path: Path, matrix, choose) -> None:
    rng = random.Random(0)
    path = source[1]
    whole = path.read_bytes()
    counts = {"refused": 0, "built": 0}
    num = choose(2, 60)
    for i in range(num):
        changed = bytearray(whole)
        # Heads and footers hold the lengths and offsets; half of the flips go there.
        at = rng.randrange(len(whole)) if i % 2 else (len(whole) - 1 - rng.randrange(600)) % len(whole)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(changed))
        answer = build(tmp_path, bad_rows=0.5, apart=True)
        if "error" in answer:
            assert answer["error"] in ("DataError", "ConfigError"), answer
            assert answer["kept"] == []
            counts["refused"] += 1
        else:  # a value is another one: nothing but a pinned checksum could tell
            assert len(answer["rows"]) + answer["set_aside"] == 3 * NUM_ROWS
            counts["built"] += 1
    matrix.note(
        injected=num, seen=f"flips in a source: {counts['refused']} refused, {counts['built']} of a value, 0 crashes"
    )


@pytest.mark.fault(16, "rows above the limit")
def test_rows_above_the_limit_are_set_aside_and_the_others_keep_their_order(
    source: list[Path], tmp_path: Path, matrix
) -> None:
    clean = build(tmp_path)
    assert clean["set_aside"] == 0
    write(source[1], table_of(1, {5: MAX_LENGTH + 1, 40: 100_000}))
    answer = build(tmp_path, bad_rows=2)
    poisoned = {"p1-005", "p1-040"}
    assert answer["rows"] == [who for who in clean["rows"] if who not in poisoned]
    assert answer["set_aside"] == 2
    assert [(line["file"], line["row"]) for line in answer["quarantine"]] == [(source[1].name, 6), (source[1].name, 41)]
    assert "100000" in json.dumps(answer["quarantine"][1])
    over = build(tmp_path, bad_rows=1)
    assert over["error"] == "DataError"
    assert "got 2 bad rows" in over["message"]
    assert over["kept"] == []
    assert build(tmp_path)["error"] == "DataError"
    matrix.note(injected=2, seen="too long: set aside and counted, others in order; over budget: DataError")


@pytest.mark.fault(16, "damage to the shards of a data set")
def test_every_damaged_block_of_a_shard_is_found(matrix, choose) -> None:
    rng = random.Random(0)
    blobs = MemoryBlobs()
    rows = [Row(entity=f"e{i}", inputs=list("abc" * (1 + i % 5)), target="xy"[i % 2]) for i in range(300)]
    draft = Draft(rows=rows, inputs=Tokens(), target=Labels(), licence="none")
    means = Means(run_bytes=4000, shard_bytes=3000, block_bytes=700)
    _, manifest = build_rows(draft, DataSpec(name="toy"), blobs, recipe="r", means=means)
    assert verify_blocks(blobs, manifest) == []
    num = 0
    for block in manifest.header.blocks:  # what lies between them nobody reads
        whole = blobs.get(block.key)
        for start in range(block.offset, block.offset + block.size, choose(256, 32)):
            changed = bytearray(whole)
            end = min(start + 32, block.offset + block.size)
            changed[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
            blobs.put(block.key, bytes(changed))
            (damage,) = verify_blocks(blobs, manifest)
            assert (damage.key, damage.offset) == (block.key, block.offset)
            num += 1
        for data in (whole[: block.offset + block.size // 2], b""):
            blobs.put(block.key, data)
            assert {damage.key for damage in verify_blocks(blobs, manifest)} == {block.key}
            num += 1
        blobs.put(block.key, whole)
    assert verify_blocks(blobs, manifest) == []
    matrix.note(injected=num, seen=f"shards: {num} of {num} damages found")

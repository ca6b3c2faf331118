"""Rows that were prepared are taken for those of a source only where its files are still the same."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.server
import os
import threading
import time
from pathlib import Path

import pytest

from treadle.data import find_note, load_manifest, rows_recipe
from treadle.data.sources.files import pinned_files
from treadle.data.sources.watch import watch_source
from treadle.errors import DataError, IntegrityError
from treadle.launch.datasets import find_data
from treadle.launch.submit import prepare_data
from treadle.spec import DataSpec, JobSpec
from treadle.spec.compose import compose_job
from treadle.store.local import LocalBlobs

JOB = """
defaults: [/base, override /task: classify, override /model: gru, override /cluster: inline, _self_]
name: toy
data: {name: toy, allow_leaks: [content]}
split: {valid: 2, test: 2}
"""
COLUMNS = ["columns.entity=e", "columns.inputs=[x]", "columns.target=[y]"]
SCRIPT = """
from pathlib import Path
from treadle.data import Draft, Labels, Row, Tokens

def prepare(spec):
    texts = [path.read_text() for path in sorted(Path(spec.source).glob("*.csv"))]
    lines = [line.split(",") for text in texts for line in text.splitlines()]
    rows = (Row(entity=e, inputs=x.split(), target=y) for e, x, y in lines if e != "e")
    return Draft(rows=rows, inputs=Tokens(), target=Labels(), licence="made up", source=SOURCE)
"""


def table(*entities: str) -> str:
    return "e,x,y\n" + "".join(f"{e},p{' q' * (i % 3)},{'AB'[i % 2]}\n" for i, e in enumerate(entities))


FIRST, SECOND, THIRD = (table(*(f"{word}{i}" for i in range(6))) for word in ("a", "b", "c"))


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Job:
    def __init__(self, folder: Path) -> None:
        self.folder, self.blobs = folder / "toy", LocalBlobs(folder / "store")
        self.folder.mkdir()
        (self.folder / "job.yaml").write_text(JOB)
        self.columns = COLUMNS
        self.composed: JobSpec | None = None
        self.progress = lambda stage, done, total: None

    def spec(self, source: object, pins: dict[str, str] | None = None, *, test: int = 2) -> JobSpec:
        if self.composed is None:
            self.composed = compose_job(str(self.folder), self.columns, default_store="/nowhere")
        data = dataclasses.replace(self.composed.data, source=str(source), sha256=pins or {})
        split = dataclasses.replace(self.composed.split, test=test)
        return dataclasses.replace(self.composed, data=data, split=split)

    def prepare(self, source: object, pins: dict[str, str] | None = None, **changes: int) -> tuple[str, bool]:
        spec = self.spec(source, pins, **changes)
        return prepare_data(spec, self.folder, self.blobs, again=False, progress=self.progress, on_ray=False)

    def find(self, source: object, pins: dict[str, str] | None = None, **changes: int) -> str:
        return find_data(self.spec(source, pins, **changes), self.folder, self.blobs, asked="toy")

    def words(self, digest: str) -> set[str]:
        """The first letters of the entities in a data set: of which files it is made."""
        manifest = load_manifest(self.blobs, "toy", digest)
        found: set[str] = set()
        for block in manifest.header.blocks:
            raw = self.blobs.get(block.key, offset=block.offset, size=block.size)
            found |= {text[:1].decode() for text in (b"a0", b"b0", b"c0") if text in raw}
        return found


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def folder_of(path: Path, **files: str) -> Path:
    path.mkdir(exist_ok=True)
    for name, text in files.items():
        (path / f"{name}.csv").write_text(text)
    return path


def pin(**files: str) -> dict[str, str]:
    return {f"{name}.csv": sha256(text) for name, text in files.items()}


def overwrite(path: Path, text: str) -> None:
    """In place, and so that size and time of writing are as before."""
    status = path.stat()
    assert status.st_size == len(text)
    path.write_text(text)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def dies(stage: str, done: int, total: int) -> None:
    if stage == "write":
        raise KeyboardInterrupt


def test_another_folder_with_the_pinned_files_and_others_is_another_source(job, tmp_path):
    one, two = folder_of(tmp_path / "1", a=FIRST, b=SECOND), folder_of(tmp_path / "2", a=FIRST, b=THIRD)
    pins = pin(a=FIRST)
    first, is_new = job.prepare(one, pins)
    assert is_new
    with pytest.raises(DataError, match="not prepared yet"):
        job.find(two, pins)
    second, is_new = job.prepare(two, pins)
    assert is_new
    assert (job.words(first), job.words(second)) == ({"a", "b"}, {"a", "c"})
    for folder, digest in ((one, first), (two, second)):
        assert job.prepare(folder, pins) == (digest, False)
        assert job.find(folder, pins) == digest
    header = load_manifest(job.blobs, "toy", first).header
    assert header.source == {"a.csv": sha256(FIRST), "b.csv": sha256(SECOND)}


@pytest.mark.parametrize("pins", [None, pin(a=FIRST)])
def test_a_file_that_changed_in_place_is_read_again(pins, job, tmp_path, caplog):
    source = folder_of(tmp_path / "1", a=FIRST, b=SECOND)
    first, _ = job.prepare(source, pins)
    other_split, _ = job.prepare(source, pins, test=3)
    overwrite(source / "b.csv", THIRD)
    second, is_new = job.prepare(source, pins)
    assert is_new
    assert job.words(second) == {"a", "c"}
    assert [record.getMessage().partition(": got ")[0] for record in caplog.records] == ["data.source"]
    assert "b.csv (changed); the rows are made again" in caplog.text
    assert job.prepare(source, pins) == (second, False)
    assert job.find(source, pins) == second
    with pytest.raises(DataError, match="not prepared yet"):  # not that of the old rows
        job.find(source, pins, test=3)
    assert job.prepare(source, pins, test=3)[0] != other_split
    overwrite(source / "b.csv", SECOND)
    assert job.prepare(source, pins) == (first, True)


def test_files_that_come_and_go_are_named(job, tmp_path, caplog):
    source = folder_of(tmp_path / "1", a=FIRST, b=SECOND)
    job.prepare(source)
    folder_of(source, c=THIRD)
    (source / "b.csv").unlink()
    digest, is_new = job.prepare(source)
    assert is_new
    assert job.words(digest) == {"a", "c"}
    assert "b.csv (gone), c.csv (new)" in caplog.text


def test_files_that_were_only_touched_are_read_once_and_not_sorted(job, tmp_path, caplog):
    source = folder_of(tmp_path / "1", a=FIRST)
    digest, _ = job.prepare(source)
    recipe = rows_recipe(job.spec(source).data, job.spec(source).columns, None)
    before = find_note(job.blobs, "toy", recipe)
    (source / "a.csv").write_text(FIRST)
    assert job.prepare(source) == (digest, False)
    after = find_note(job.blobs, "toy", recipe)
    assert before.files != after.files == watch_source(job.spec(source).data, declared=True).digest
    assert not caplog.records


def test_a_relative_place_is_where_one_stands(job, tmp_path, monkeypatch):
    one, two = folder_of(tmp_path / "1", a=FIRST), folder_of(tmp_path / "2", a=SECOND)
    monkeypatch.chdir(one)
    first, _ = job.prepare(".")
    monkeypatch.chdir(two)
    second, is_new = job.prepare(".")
    assert is_new
    assert (job.words(first), job.words(second)) == ({"a"}, {"b"})


def test_where_all_files_are_pinned_the_source_need_not_be_there(job, tmp_path):
    one, two = folder_of(tmp_path / "1", a=FIRST, b=SECOND), folder_of(tmp_path / "2", a=FIRST, b=SECOND)
    pins = pin(a=FIRST, b=SECOND)
    digest, _ = job.prepare(one, pins)
    assert job.prepare(two, pins) == (digest, False)
    (one / "a.csv").unlink()
    for place in (one, tmp_path / "nowhere", "https://nowhere.invalid/a.csv"):
        assert job.prepare(place, pins) == (digest, False)
        assert job.find(place, pins) == digest
    other, is_new = job.prepare("/nowhere", pins, test=3)
    assert (other != digest, is_new) == (True, True)
    folder_of(two, c=THIRD)
    third, is_new = job.prepare(two, pins)
    assert is_new
    assert job.words(third) == {"a", "b", "c"}
    assert job.find(two, pins) == third
    (two / "c.csv").unlink()
    assert job.prepare(two, pins) == (digest, False)
    assert job.find(two, pins) == digest


def test_where_not_all_files_are_pinned_the_source_must_be_there(job, tmp_path):
    source = folder_of(tmp_path / "1", a=FIRST, b=SECOND)
    digest, _ = job.prepare(source, pin(a=FIRST))
    source.rename(tmp_path / "2")
    with pytest.raises(DataError, match="no such file or folder"):
        job.prepare(source, pin(a=FIRST))
    assert job.find(source, pin(a=FIRST)) == digest  # to train, what was prepared is enough


def test_a_killed_build_of_other_files_is_not_gone_on_with(job, tmp_path):
    source = folder_of(tmp_path / "1", a=FIRST, b=SECOND)
    job.progress = dies
    with pytest.raises(KeyboardInterrupt):
        job.prepare(source, pin(a=FIRST))
    assert len(job.blobs.children("data/toy/building")) == 1
    overwrite(source / "b.csv", THIRD)
    job.progress = lambda stage, done, total: None
    digest, _ = job.prepare(source, pin(a=FIRST))
    assert job.words(digest) == {"a", "c"}


def test_nor_is_one_that_was_killed_before_it_saw_a_file_change(job, tmp_path):
    more = {f"m{i}": table(*(f"m{i}{k}" for k in range(3))) for i in range(6)}
    source = folder_of(tmp_path / "1", a=FIRST, **more, z=SECOND)

    def writes_and_dies(stage: str, done: int, total: int) -> None:
        if done == 6:  # of the first file; few of the others are begun
            overwrite(source / "z.csv", THIRD)
        if total:
            raise KeyboardInterrupt

    job.progress = writes_and_dies
    with pytest.raises(KeyboardInterrupt):
        job.prepare(source)
    assert len(job.blobs.children("data/toy/building")) == 1
    overwrite(source / "z.csv", SECOND)
    job.progress = lambda stage, done, total: None
    assert job.words(job.prepare(source)[0]) == {"a", "b"}


@pytest.mark.parametrize("layout", ["rows", "events"])
def test_a_file_that_changes_while_it_is_read_stops_the_build(layout, job, tmp_path):
    text = FIRST.replace("e,x,y", "e,x,y,t", 1).replace("A\n", "A,1\n").replace("B\n", "B,1\n")
    source = folder_of(tmp_path / "1", a=text, b=text.replace("a", "b"))
    pins = pin(a=text, b=text.replace("a", "b"))
    if layout == "events":
        job.columns = [*COLUMNS, "columns.layout=events", "columns.times=t"]

    def writes(stage: str, done: int, total: int) -> None:
        if stage == "read" and total == 0:
            overwrite(source / "b.csv", text.replace("a", "c"))

    job.progress = writes if layout == "rows" else lambda *_: overwrite(source / "b.csv", text.replace("a", "c"))
    with pytest.raises(IntegrityError, match=r"data\.source: b\.csv: got files that changed while they were read"):
        job.prepare(source, pins)
    assert job.blobs.children("data/toy") == []
    job.progress = lambda stage, done, total: None
    with pytest.raises(IntegrityError, match=r"b\.csv: got sha256"):
        job.prepare(source, pins)
    overwrite(source / "b.csv", text.replace("a", "b"))
    assert job.words(job.prepare(source, pins)[0]) == {"a", "b"}


def test_a_script_runs_again_when_its_files_changed(job, tmp_path, caplog):
    job.columns = []
    (job.folder / "prepare.py").write_text(SCRIPT.replace("SOURCE", "{}"))
    source = folder_of(tmp_path / "1", a=FIRST, b=SECOND)
    first, _ = job.prepare(source)
    assert job.prepare(source) == (first, False)
    overwrite(source / "b.csv", THIRD)
    second, is_new = job.prepare(source)
    assert is_new
    assert job.words(second) == {"a", "c"}
    assert "the script is run again" in caplog.text
    assert job.prepare(source) == (second, False)


def test_a_script_says_whether_all_that_it_read_is_pinned(job, tmp_path):
    job.columns = []
    one, two = folder_of(tmp_path / "1", a=FIRST), folder_of(tmp_path / "2", a=FIRST)
    script = job.folder / "prepare.py"
    script.write_text(SCRIPT.replace("SOURCE", "spec.sha256"))
    first, _ = job.prepare(one, pin(a=FIRST))
    assert job.prepare(two, pin(a=FIRST)) == (first, False)
    assert job.prepare("/nowhere", pin(a=FIRST)) == (first, False)
    folder_of(two, b=SECOND)
    assert job.words(job.prepare(two, pin(a=FIRST))[0]) == {"a", "b"}
    script.write_text(SCRIPT.replace("SOURCE", "spec.sha256 | {'b.csv': ''}"))
    job.prepare(one, pin(a=FIRST))
    with pytest.raises(DataError, match="got no rows"):
        job.prepare("/nowhere", pin(a=FIRST))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_what_a_url_gives_is_looked_at_unless_it_is_pinned(job, tmp_path):
    folder = folder_of(tmp_path / "web", a=FIRST)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/a.csv"
            first, _ = job.prepare(url)
            pinned, _ = job.prepare(url, pin(a=FIRST))
            assert job.prepare(url) == (first, False)
            overwrite(folder / "a.csv", THIRD)
            job.progress = dies
            with pytest.raises(KeyboardInterrupt):
                job.prepare(url)
            job.progress = lambda stage, done, total: None
            overwrite(folder / "a.csv", SECOND)
            second, is_new = job.prepare(url)
            assert is_new
            assert job.words(second) == {"b"}
            assert job.prepare(url, pin(a=FIRST)) == (pinned, False)
        finally:
            server.shutdown()
            thread.join()


def test_a_last_name_pins_a_file_that_no_other_shares_it_with():
    pins = {"a.csv": "1", "x/b.csv": "2"}
    assert pinned_files(["x/a.csv", "x/b.csv", "y/b.csv"], pins) == {"x/a.csv": "1", "x/b.csv": "2"}
    assert pinned_files(["x/a.csv", "y/a.csv"], pins) == {}
    assert pinned_files(["a.csv", "x/a.csv"], pins) == {"a.csv": "1"}


def test_a_write_just_after_a_look_is_seen(tmp_path):
    source = folder_of(tmp_path / "1", a=FIRST)
    data = DataSpec(name="d", source=str(source))
    for text in [SECOND, THIRD] * 20:
        watch = watch_source(data, declared=True)
        assert time.time_ns() - (source / "a.csv").stat().st_ctime_ns > 15_000_000  # clocks of kernels stand still
        overwrite(source / "a.csv", text)
        with pytest.raises(IntegrityError, match=r"a\.csv: got files that changed"):
            watch.check(watch.place)

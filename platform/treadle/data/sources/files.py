"""The files of a source: where they are, of which format, in which order, and whether they are the expected ones.

A source is a file, a folder (read through, names that start with "." or "_" left out), a pattern with `*` and `**`, a
folder as the Hugging Face library saves data sets, on this machine or below `s3://`; or one file at an http(s) URL.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.parse
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from treadle.data.draft import SPLITS
from treadle.data.sources.fetch import download
from treadle.errors import ConfigError, DataError, IntegrityError, did_you_mean
from treadle.spec import DataSpec, Format

__all__ = ["Place", "SourceFile", "digests_of", "find_files", "list_files", "pinned_files", "sha256_of"]

_ENDINGS = {
    "parquet": Format.parquet,
    "pq": Format.parquet,
    "arrow": Format.arrow,
    "feather": Format.arrow,
    "ipc": Format.arrow,
    "csv": Format.csv,
    "tsv": Format.csv,
    "jsonl": Format.jsonl,
    "ndjson": Format.jsonl,
}
_PACKED = ("gz", "zst", "bz2")
_HUGGINGFACE_SPLITS = {"validation": "valid", "dev": "valid", "val": "valid"}


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file.

    Args:
        name: below the source, for messages and checksums. path: in the filesystem.
        size: bytes, -1 for what is no file, as a link that leads nowhere.
        split: place in `SPLITS` where the folder says it, else -1.
    """

    name: str
    path: str
    size: int
    split: int = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Files, in order, and what they are read with; picklable."""

    filesystem: fs.FileSystem
    files: tuple[SourceFile, ...]
    format: Format


def find_files(data: DataSpec, scratch: Path) -> Place:
    """The files of `data.source`, sorted by name, those of `data.sha256` checked.

    Args:
        scratch: a folder that downloads may be put into.

    Raises:
        ConfigError: no source, a format that is not known or not one.
        DataError: no such file, one that cannot be named, or a folder that is there twice by a link.
        IntegrityError: a file has another digest than `data.sha256` says.
    """
    place = list_files(data, scratch)
    _check_digests(place, data.sha256)
    return place


def list_files(data: DataSpec, scratch: Path) -> Place:
    """The files of `data.source`, sorted by name, none of them read. Args and Raises: as `find_files`."""
    if not data.source:
        raise ConfigError("data.source: not given", hint="data.source=<a file, a folder, a pattern or s3://...>")
    if _is_no_utf8(data.source):
        raise ConfigError(f"data.source: got {os.fsencode(data.source)!r}, expected a name in UTF-8", hint="rename it")
    filesystem, path = _opened(data.source, scratch)
    try:
        files, format_ = _found(filesystem, path, data)
        _check_files(files, data.source, is_local=isinstance(filesystem, fs.LocalFileSystem))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"data.source: {data.source}: {_reason(error)}") from None
    return Place(filesystem=filesystem, files=tuple(files), format=format_)


def _opened(source: str, scratch: Path) -> tuple[fs.FileSystem, str]:
    scheme = source.partition("://")[0] if "://" in source else "file"
    if scheme in ("http", "https"):
        name = urllib.parse.unquote(urllib.parse.urlsplit(source).path).rsplit("/", 1)[-1]
        target = scratch / (name or "download")
        download(source, target)
        return fs.LocalFileSystem(), str(target)
    if scheme == "s3":
        bare, _, query = source.partition("?")
        bucket, _, key = bare.removeprefix("s3://").partition("/")
        try:
            filesystem, _ = fs.FileSystem.from_uri(f"s3://{bucket}" + (f"?{query}" if query else ""))
        except (OSError, pa.ArrowException, ValueError) as error:
            raise ConfigError(f"data.source: got {source!r}, expected s3://bucket/path ({_reason(error)})") from None
        return filesystem, f"{bucket}/{key}".rstrip("/")
    if scheme == "file":
        path = Path(source.removeprefix("file://")).expanduser()
        # Not mapped into memory: a file that someone cuts off while it is read would end the process (SIGBUS).
        return fs.LocalFileSystem(), str(path.absolute())
    raise ConfigError(
        f"data.source: got {source!r}, expected a path, or one of s3://, http://, https://, file://"
        f"{did_you_mean(scheme, ('s3', 'http', 'https', 'file'))}"
    )


def _found(filesystem: fs.FileSystem, path: str, data: DataSpec) -> tuple[list[SourceFile], Format]:
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.File:
        return _of_one_format([SourceFile(name=info.base_name, path=path, size=info.size)], data)
    if info.type == fs.FileType.NotFound and any(c in path for c in "*?["):
        return _of_one_format(_matching(filesystem, path, data), data)
    if info.type == fs.FileType.NotFound:
        raise DataError(f"data.source: {data.source}: no such file or folder", hint="data.source=<where the files are>")
    if info.type == fs.FileType.Unknown:
        raise DataError(f"data.source: {data.source}: got a pipe or a device, expected a file or a folder")
    if saved := _saved_dataset(filesystem, path):
        return saved, Format.huggingface
    if data.format is Format.huggingface:
        raise DataError(f"data.source: {data.source}: got no state.json or dataset_dict.json, expected one there")
    files = [file for file in _below(filesystem, path) if data.format is not Format.auto or _format_of(file.name)]
    if not files:
        raise DataError(f"data.source: {data.source}: got a folder without a file that can be read", hint=_endings())
    return _of_one_format(files, data)


def _below(filesystem: fs.FileSystem, folder: str) -> list[SourceFile]:
    """All files below a folder, hidden ones left out, by name."""
    if isinstance(filesystem, fs.LocalFileSystem):
        found: Iterable[tuple[str, int]] = _walked(folder, ())
    else:
        infos = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
        found = ((info.path, info.size) for info in infos if info.type == fs.FileType.File)
    files = (SourceFile(name=path[len(folder) :].lstrip("/"), path=path, size=size) for path, size in found)
    plain = (file for file in files if not any(_is_hidden(part) for part in file.name.split("/")))
    return sorted(plain, key=lambda file: file.name)


def _walked(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, int]]:
    """The path and the size of each file below a folder of this machine, through links, but round no loop of them.

    Args:
        above: device and inode of the folders that it is in.
    """
    status = Path(folder).stat()
    here = (status.st_dev, status.st_ino)
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if not entry.is_dir():
                yield entry.path, entry.stat().st_size if entry.is_file() else -1
            elif here not in above:
                yield from _walked(entry.path, (*above, here))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _check_files(files: Sequence[SourceFile], source: str, *, is_local: bool) -> None:
    """Nothing, if all of them are files with names that can be told, and no folder is there under two names."""
    for file in files:
        if _is_no_utf8(file.name):
            name = os.fsencode(file.name)
            raise DataError(f"data.source: {source}: got the file name {name!r}, expected UTF-8", hint="rename it")
        if file.size < 0:
            raise DataError(
                f"data.source: {source}: {file.name}: got a link that leads nowhere, or no plain file, expected a file",
                hint="remove it, or name the files that are meant with a pattern",
            )
    seen: dict[tuple[int, int], str] = {}
    for folder in dict.fromkeys(file.path.rpartition("/")[0] for file in files) if is_local else ():
        status = Path(folder or "/").stat()
        if (other := seen.setdefault((status.st_dev, status.st_ino), folder)) != folder:
            raise DataError(
                f"data.source: {folder}: got the folder {other} once more, by a link, expected each folder once",
                hint="remove the link, or name the files that are meant with a pattern",
            )


def _is_no_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # the bytes that are no UTF-8 are lone surrogates
        return True
    return False


def _matching(filesystem: fs.FileSystem, pattern: str, data: DataSpec) -> list[SourceFile]:
    folder = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    if filesystem.get_file_info(folder).type == fs.FileType.NotFound:
        raise DataError(f"data.source: {data.source}: no folder {folder}")
    wanted = re.compile(_as_regex(pattern[len(folder) :].lstrip("/")))
    files = [file for file in _below(filesystem, folder) if wanted.fullmatch(file.name)]
    if not files:
        raise DataError(f"data.source: {data.source}: no file fits the pattern")
    return files


def _as_regex(pattern: str) -> str:
    """`*` and `?` stay in one folder, `**/` goes through any number of them, `[ab]` is one of these."""
    tokens = {r"**/": "(?:.*/)?", r"**": ".*", r"*": "[^/]*", r"?": "[^/]"}
    found = re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]/]+\]|.", pattern)
    return "".join(
        tokens.get(t) or (t.replace("[!", "[^") if len(t) > 2 and t[0] == "[" else re.escape(t)) for t in found
    )


def _of_one_format(files: Sequence[SourceFile], data: DataSpec) -> tuple[list[SourceFile], Format]:
    if data.format is Format.huggingface:
        raise ConfigError("data.format: got huggingface, expected data.source to be a folder that was saved so")
    if data.format is not Format.auto:
        return list(files), data.format
    formats = {_format_of(file.name): file.name for file in files}
    if None in formats:
        raise ConfigError(f"data.format: got auto with the file {formats[None]!r}", hint=_endings())
    if len(formats) > 1:
        both = " and ".join(map(repr, formats.values()))
        raise ConfigError(f"data.source: got files of {len(formats)} formats ({both}), expected one", hint="a pattern")
    return list(files), next(f for f in formats if f is not None)


def _format_of(name: str) -> Format | None:
    parts = name.rsplit("/", 1)[-1].lower().split(".")
    if len(parts) > 2 and parts[-1] in _PACKED:
        format_ = _ENDINGS.get(parts[-2])
        return format_ if format_ in (Format.csv, Format.jsonl) else None
    return _ENDINGS.get(parts[-1]) if len(parts) > 1 else None


def _endings() -> str:
    return f"data.format=parquet|arrow|csv|jsonl, or names that end in {', '.join('.' + name for name in _ENDINGS)}"


def _saved_dataset(filesystem: fs.FileSystem, folder: str) -> list[SourceFile]:
    """The files of a data set, or of several splits, as the Hugging Face library saved them; [] if it did not."""
    splits = _json_of(filesystem, f"{folder}/dataset_dict.json")
    if splits is None:
        state = _json_of(filesystem, f"{folder}/state.json") or {}
        return _saved_split(filesystem, folder, state) if "_data_files" in state else []
    names = splits.get("splits")
    if not isinstance(names, list) or not names:
        raise DataError(f"{folder}/dataset_dict.json: got no list of splits, expected their names")
    files: list[SourceFile] = []
    for name in map(str, names):
        split = _HUGGINGFACE_SPLITS.get(name, name)
        if split not in SPLITS:
            raise DataError(
                f"{folder}/dataset_dict.json: got the split {name!r}, expected train, validation or test",
                hint=f"data.source={folder}/{name} for this one alone",
            )
        state = _json_of(filesystem, f"{folder}/{name}/state.json")
        if state is None:
            raise DataError(
                f"{folder}/{name}/state.json: got no such file, expected it for a split of dataset_dict.json",
                hint="copy the folder again, whole",
            )
        of_split = _saved_split(filesystem, f"{folder}/{name}", state)
        files += (replace(f, name=f"{name}/{f.name}", split=SPLITS.index(split)) for f in of_split)
    return files


def _saved_split(filesystem: fs.FileSystem, folder: str, state: Mapping[str, Any]) -> list[SourceFile]:
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        names = []
    if not names:
        raise DataError(f"{folder}/state.json: got no names of files, expected _data_files with at least one")
    infos = filesystem.get_file_info([f"{folder}/{name}" for name in names])
    for info in infos:
        if info.type != fs.FileType.File:
            raise DataError(f"{info.path}: got no such file, expected it as state.json names it")
    return [SourceFile(name=n, path=info.path, size=info.size) for n, info in zip(names, infos, strict=True)]


def _json_of(filesystem: fs.FileSystem, path: str) -> Mapping[str, Any] | None:
    if filesystem.get_file_info(path).type != fs.FileType.File:
        return None
    with filesystem.open_input_stream(path) as file:
        try:
            value = json.loads(file.read())
        except ValueError as error:
            raise DataError(f"{path}: got no JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: got no JSON object")
    return value


def pinned_files(names: Collection[str], sha256: Mapping[str, str]) -> dict[str, str]:
    """The expected digest of each file that `data.sha256` names, by its whole name or one that no other file has."""
    named = _by_name(names)
    found = {key: named.get(key, []) for key in sorted(sha256, key=len)}  # a whole name, longer, has the last word
    return {files[0]: sha256[key] for key, files in found.items() if len(files) == 1}


def _by_name(names: Collection[str]) -> dict[str, list[str]]:
    """The files that each whole name, and each last part of one, stands for."""
    named: dict[str, list[str]] = {}
    for name in names:
        named.setdefault(name.rpartition("/")[2], []).append(name)
    return named | {name: [name] for name in names}


def _check_digests(place: Place, expected: Mapping[str, str]) -> None:
    files = {file.name: file for file in place.files}
    named = _by_name(files)
    for name, digest in expected.items():
        found = named.get(name, [])
        if not found:
            raise DataError(
                f"data.sha256: got {name!r}, expected a file of the source{did_you_mean(name, tuple(named))}"
            )
        if len(found) > 1:
            several = f"{found[0]}, {found[1]}" + (", ..." if len(found) > 2 else "")
            raise ConfigError(
                f"data.sha256: got {name!r}, the name of {len(found)} files ({several}), expected that of one",
                hint="data.sha256={<folder>/<name>: <digest>}",
            )
        if (seen := sha256_of(place, files[found[0]])) != digest:
            raise IntegrityError(
                f"{found[0]}: got sha256 {seen}, expected {digest}",
                hint="another data.source, or the new data.sha256 if the file is meant to have changed",
            )


def digests_of(place: Place, known: Mapping[str, str]) -> dict[str, str]:
    """The sha256 of each file by name; those that are known are not read. Cost: 2 files at a time, 1.5 GB/s each."""
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda file: known.get(file.name) or sha256_of(place, file), place.files)
        return {file.name: digest for file, digest in zip(place.files, found, strict=True)}


def sha256_of(place: Place, file: SourceFile) -> str:
    """The digest of a file. Cost: reads it, about 1.5 GB/s."""
    hasher = hashlib.sha256()
    try:
        with place.filesystem.open_input_file(file.path) as stream:
            while block := stream.read_buffer(4 << 20):
                hasher.update(block)
    except OSError as error:
        raise DataError(f"{file.name}: {_reason(error)}") from None
    return hasher.hexdigest()


def _reason(error: BaseException) -> str:
    return str(error).partition(". Detail:")[0]

"""Source files of a data set, from a folder, a file, an archive or a URL, checked by sha256."""

from __future__ import annotations

import hashlib
import http.client
import io
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from treadle.errors import DataError, IntegrityError, TransientError
from treadle.units import format_bytes

__all__ = ["download", "fetch"]

_TIMEOUT_S = 60
_BLOCK_BYTES = 1 << 20


def fetch(source: str | None, sha256: Mapping[str, str], *, max_bytes: int = 2 << 30) -> dict[str, bytes]:
    """The bytes of each file named in `sha256`.

    Args:
        source: a folder, a .zip file, or an http(s) URL of a .zip or of a folder that holds the files.
        sha256: expected digest by file name.
        max_bytes: most of one file, unpacked or downloaded.

    Raises:
        DataError: no source, a file is not there or too large. IntegrityError: a file has another
            digest, or the archive is damaged. TransientError: the URL could not be read.
    """
    if not source:
        raise DataError("data.source: not given", hint="data.source=<a URL, or the folder that holds the files>")
    read = _opened(source, max_bytes)
    found: dict[str, bytes] = {}
    for name, expected in sha256.items():
        data = read(name)
        digest = hashlib.sha256(data).hexdigest()
        if digest != expected:
            raise IntegrityError(
                f"{source}: {name}: got sha256 {digest}, expected {expected}",
                hint="another data.source, or the new data.sha256 if the file is meant to have changed",
            )
        found[name] = data
    return found


def _opened(source: str, max_bytes: int) -> Callable[[str], bytes]:
    """How to read a file of `source` by its name; an archive is read once."""
    remote = urllib.parse.urlsplit(source) if source.startswith(("http://", "https://")) else None
    if (remote.path if remote else source).endswith(".zip"):
        archive = _download(source, max_bytes) if remote else _file(Path(source).expanduser())
        return lambda name: _member(archive, source, name, max_bytes)
    if remote:
        return lambda name: _download(f"{source.rstrip('/')}/{urllib.parse.quote(name)}", max_bytes)
    return lambda name: _file(Path(source).expanduser() / name)


def _file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"data.source: {path}: {error.strerror}", hint="data.source=<folder with the files>") from None


def _member(archive: bytes, source: str, name: str, max_bytes: int) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            info = next((i for i in files.infolist() if i.filename.rsplit("/", 1)[-1] == name), None)
            if info is None:
                raise DataError(f"{source}: holds no file {name}")
            _check_size(
                f"{source}: {name}", info.file_size, max_bytes
            )  # no more than this is unpacked, whatever follows
            return files.read(info)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise IntegrityError(f"{source}: not a zip archive that can be read ({error})") from None


def _download(url: str, max_bytes: int) -> bytes:
    sink = io.BytesIO()
    _copy(url, sink, max_bytes)
    return sink.getvalue()


def download(url: str, path: Path, *, max_bytes: int = 64 << 30) -> None:
    """Write what an http(s) URL gives to a file, block by block; `path` appears when it is whole.

    Raises:
        DataError: it is not there, or larger than `max_bytes`. TransientError: the URL could not be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as sink:
            _copy(url, sink, max_bytes)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _copy(url: str, sink: BinaryIO, max_bytes: int) -> None:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - scheme checked by the caller
            size = 0
            while block := answer.read(min(_BLOCK_BYTES, max_bytes + 1 - size)):
                size += len(block)
                _check_size(url, size, max_bytes)
                sink.write(block)
            # Reading a part does not notice a connection that ends early.
            missing = int(answer.headers.get("Content-Length") or size) - size
    except urllib.error.HTTPError as error:
        kind = TransientError if error.code in (408, 429) or error.code >= 500 else DataError
        raise kind(f"{url}: the server answers {error.code} {error.reason}") from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise TransientError(f"{url}: {error}", hint="download it elsewhere and give data.source=<folder>") from None
    if missing > 0:
        raise TransientError(f"{url}: the connection ended {missing} bytes early")


def _check_size(what: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise DataError(f"{what}: got {format_bytes(size)} or more, expected at most {format_bytes(max_bytes)}")

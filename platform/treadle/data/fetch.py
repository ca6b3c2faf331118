"""Source files of a data set, from a folder, a file, an archive or a URL, checked by sha256."""

from __future__ import annotations

import hashlib
import io
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path

from treadle.errors import DataError, IntegrityError, TransientError

__all__ = ["fetch"]

_TIMEOUT_S = 60
_MAX_MEMBER_BYTES = 2 << 30


def fetch(source: str | None, sha256: Mapping[str, str]) -> dict[str, bytes]:
    """The bytes of each file named in `sha256`.

    Args:
        source: a folder, a .zip file, or an http(s) URL of a .zip or of a folder that holds the files.
        sha256: expected digest by file name.

    Raises:
        DataError: no source, or a file is not there. IntegrityError: a file has another digest.
        TransientError: the URL could not be read.
    """
    if not source:
        raise DataError("data.source: not given", hint="data.source=<a URL, or the folder that holds the files>")
    found: dict[str, bytes] = {}
    for name, expected in sha256.items():
        data = _read(source, name)
        digest = hashlib.sha256(data).hexdigest()
        if digest != expected:
            raise IntegrityError(f"{source}: {name}: got sha256 {digest}, expected {expected}")
        found[name] = data
    return found


def _read(source: str, name: str) -> bytes:
    remote = source.startswith(("http://", "https://"))
    if source.endswith(".zip"):
        return _member(_download(source) if remote else _file(Path(source)), source, name)
    if remote:
        return _download(f"{source.rstrip('/')}/{urllib.parse.quote(name)}")
    return _file(Path(source).expanduser() / name)


def _file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"data.source: {path}: {error.strerror}", hint="data.source=<folder with the files>") from None


def _member(archive: bytes, source: str, name: str) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            info = next((i for i in files.infolist() if i.filename.rsplit("/", 1)[-1] == name), None)
            if info is None:
                raise DataError(f"{source}: holds no file {name}")
            if info.file_size > _MAX_MEMBER_BYTES:
                raise DataError(f"{source}: {name}: got {info.file_size} bytes, expected at most {_MAX_MEMBER_BYTES}")
            return files.read(info)
    except zipfile.BadZipFile as error:
        raise IntegrityError(f"{source}: not a zip archive ({error})") from None


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - scheme checked by the caller
            return answer.read()
    except urllib.error.HTTPError as error:
        raise DataError(f"{url}: the server answers {error.code} {error.reason}") from None
    except (urllib.error.URLError, OSError) as error:
        raise TransientError(f"{url}: {error}", hint="download it elsewhere and give data.source=<folder>") from None

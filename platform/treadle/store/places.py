"""From the address of a store to the store."""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path

from treadle.errors import ConfigError
from treadle.store.blobs import Blobs
from treadle.store.local import LocalBlobs

__all__ = ["open_blobs"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(.*)", re.DOTALL)
_EXPECTED = "expected a folder, file:///folder or s3://bucket/prefix"


def open_blobs(uri: str) -> Blobs:
    """The place of storage at `uri`: a folder, `file:///folder` or `s3://bucket/prefix`.

    Nothing is read or written yet. S3 takes its keys, region and endpoint from where boto3 looks
    for them: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL_S3, profiles, the role of the machine.

    Raises:
        ConfigError: none of these forms.
    """
    if not uri.strip() or "\0" in uri:
        raise ConfigError(f"store.uri: got {uri!r}, {_EXPECTED}")
    match = _SCHEME.fullmatch(uri)
    if match is None:
        return LocalBlobs(Path(uri))
    scheme, rest = match[1].lower(), match[2]
    if scheme == "file" and rest.startswith("///"):
        return LocalBlobs(Path(urllib.parse.unquote(rest[2:])))
    if scheme == "s3" and rest.startswith("//"):
        # A folder is what most stores are, and importing boto3 takes 0.3 s.
        from treadle.store.s3 import S3Blobs

        bucket, _, prefix = rest[2:].partition("/")
        return S3Blobs(bucket, prefix.strip("/"))
    raise ConfigError(
        f"store.uri: got {uri!r}, {_EXPECTED}", hint=f"a folder with a colon in its name is written './{uri}'"
    )

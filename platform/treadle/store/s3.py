"""An S3 bucket as a place of storage. The only importer of boto3.

Credentials, region and endpoint come from where boto3 looks for them. boto3's checksums stay on:
a CRC32 travels with every upload and is checked by the server, and whole reads of objects that
carry one are checked here; ranged reads are not, so what is read in ranges has its own digest.
`holds` asks the server for the checksum of what it stored. Some servers store the one they were
sent without looking at the bytes: one wrong upload tells, and those are read back instead.

Conditional writes carry a nonce as metadata of the object. Where the answer of a write that
succeeded is lost, its retry is refused (412); the nonce then tells the winner from a loser.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import re
import secrets
import time
import urllib.parse
import uuid
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import boto3.session
import botocore.loaders
import botocore.session
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as vendor
from botocore.config import Config
from botocore.parsers import ResponseParserError

from treadle.errors import ConfigError, ConflictError, IntegrityError, NotFoundError, TransientError, TreadleError
from treadle.store.blobs import Data, Entry, check_key, check_prefix, check_range, is_key
from treadle.store.sealed import checksum

# Where the root logger shows INFO (Ray Train's workers), botocore tells where it found each setting.
logging.getLogger("botocore").setLevel(logging.WARNING)

__all__ = ["S3Blobs", "S3Options"]

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_AWS_HOSTS = (".amazonaws.com", ".amazonaws.com.cn", ".api.aws")
_NONCE = "treadle-nonce"
_MODELS = botocore.loaders.create_loader(None)  # parsed once: a place opens in 0.04 s instead of 0.2 s
_NUM_READS = 4
_NUM_WRITES = 4
_NUM_PARTS_AT_ONCE = 4
_SMALL_BYTES = 64 << 10
_NUM_CONDITIONAL_WRITES = 5

_HINT_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_HINT_BUCKET = "create the bucket, or correct the address of the store"
_HINT_REGION = "set AWS_DEFAULT_REGION to the region of the bucket"
_HINT_RIGHTS = "the store needs s3:ListBucket on the bucket, s3:GetObject, s3:PutObject and s3:DeleteObject in it"
_HINT_CONDITIONS = "take an S3 server that honours If-Match and If-None-Match"
_HINT_REACH = "check AWS_ENDPOINT_URL_S3 and the network; the call may be repeated"

_REFUSED = {
    "NoSuchBucket": _HINT_BUCKET,
    "InvalidBucketName": _HINT_BUCKET,
    "AccessDenied": _HINT_RIGHTS,
    "AllAccessDisabled": _HINT_RIGHTS,
    "403": f"{_HINT_CREDENTIALS}; {_HINT_RIGHTS}",
    "InvalidAccessKeyId": _HINT_CREDENTIALS,
    "SignatureDoesNotMatch": _HINT_CREDENTIALS,
    "InvalidToken": _HINT_CREDENTIALS,
    "ExpiredToken": _HINT_CREDENTIALS,
    "RequestTimeTooSkewed": "set the clock of this machine",
    "PermanentRedirect": _HINT_REGION,
    "301": _HINT_REGION,
    "AuthorizationHeaderMalformed": _HINT_REGION,
    "IllegalLocationConstraintException": _HINT_REGION,
    "NotImplemented": _HINT_CONDITIONS,
    "501": _HINT_CONDITIONS,
}
# A digest that does not match was damaged on the way; the next try sends it again.
_DAMAGED_WRITE = {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
_TRANSIENT_CODES = _DAMAGED_WRITE | {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "429"}
_DAMAGED_READ = (
    vendor.ResponseStreamingError,
    vendor.IncompleteReadError,
    vendor.ReadTimeoutError,
    vendor.FlexibleChecksumError,
)
_UNREACHED = (
    vendor.HTTPClientError,
    vendor.ConnectionError,
    vendor.IncompleteReadError,
    vendor.CredentialRetrievalError,
    vendor.MetadataRetrievalError,
)


@dataclass(frozen=True, kw_only=True)
class S3Options:
    """How a bucket is reached; the defaults suit jobs, None leaves the choice to boto3."""

    endpoint: str | None = None
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    attempts: int = 9
    """Tries of one request. Of 20 writes to a server that answers 6 of 10 with 503, 9 adaptive tries lost none."""
    connect_timeout_s: float = 3.0
    read_timeout_s: float = 30.0
    part_bytes: int = 16 << 20
    """What is of this size and more goes up in parts of it: four at once, each of them copied in memory."""
    page_size: int = 1000
    """Keys asked for in one request of a listing."""


class S3Blobs:
    """The protocol `Blobs` in a bucket; threads may share it, processes open their own.

    Args:
        bucket: its name; it must exist.
        prefix: what all keys start with, without a "/" at the end.
        options: how it is reached.

    Raises:
        ConfigError: a name that S3 does not know, an unknown profile, a malformed endpoint.
    """

    def __init__(self, bucket: str, prefix: str = "", options: S3Options | None = None) -> None:
        if not _BUCKET.fullmatch(bucket):
            raise ConfigError(f"store.uri: got bucket {bucket!r}, expected 3 to 63 of a-z, 0-9, '-' and '.'")
        self._options = options or S3Options()
        self._bucket = bucket
        self._prefix = f"{check_prefix(prefix).removesuffix('/')}/" if prefix else ""
        self.uri = f"s3://{bucket}/{self._prefix}".removesuffix("/")
        try:
            session = _new_session()
            self._endpoint = str(self._client(session, "auto").meta.endpoint_url)
            is_aws = (urllib.parse.urlsplit(self._endpoint).hostname or "").endswith(_AWS_HOSTS)
            style = "auto" if is_aws else "path"  # other servers have no host name for each bucket
            self._small = self._client(session, style)
            # Throttled uploads slow their whole client down; leases must not wait for them.
            self._bulk = self._client(session, style)
        except (vendor.BotoCoreError, ValueError) as error:
            raise ConfigError(f"{self.uri}: got {error}, expected settings that boto3 takes") from error
        self._transfer = TransferConfig(
            multipart_threshold=self._options.part_bytes,
            multipart_chunksize=self._options.part_bytes,
            max_concurrency=_NUM_PARTS_AT_ONCE,
        )
        self._is_bucket_seen = False
        self._checks_uploads: bool | None = None

    def __repr__(self) -> str:
        return f"S3Blobs({self.uri!r}, endpoint={self._endpoint!r})"

    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes:
        where = self._where(key)
        check_range(key, offset, size)
        if size == 0:
            self._must_exist(key)
            return b""
        if offset or size is not None:
            where["Range"] = f"bytes={offset}-" if size is None else f"bytes={offset}-{offset + size - 1}"
        with self._calling("get", key):
            for trial in range(_NUM_READS):
                try:
                    body = self._small.get_object(**where)["Body"]
                except vendor.ClientError as error:
                    if _code(error) in ("InvalidRange", "416"):
                        return b""
                    raise
                try:
                    return body.read()
                except _DAMAGED_READ:
                    # boto3 tries again until the headers are there; the body is ours to ask for again.
                    if trial == _NUM_READS - 1:
                        raise
                    _back_off(trial)
        raise AssertionError("unreachable")

    def head(self, key: str) -> Entry | None:
        found = self._look(key)
        return None if found is None else found[0]

    def put(self, key: str, data: Data) -> Entry:
        where = self._where(key)
        client = self._small if len(data) <= _SMALL_BYTES else self._bulk
        with self._calling("put", key):
            if len(data) < self._options.part_bytes:
                answer = self._send(client.put_object, data, **where)
            else:
                answer = self._put_parts(where, memoryview(data))
        return Entry(key=key, size_bytes=len(data), version=answer["ETag"])

    def holds(self, key: str, data: Data) -> bool:
        answer = self._head(key, ChecksumMode="ENABLED")
        if answer is None or answer["ContentLength"] != len(data):
            return False
        stored = str(answer.get("ChecksumCRC32", ""))
        if not stored or "-" in stored or not self._refuses_damage():  # "-": of the parts' checksums, not of the bytes
            return self._reads_back(key, memoryview(data))
        return stored == _crc32(data)

    def create(self, key: str, data: bytes) -> Entry:
        return self._write_if("create", key, data, version=None)

    def replace(self, key: str, data: bytes, *, version: str) -> Entry:
        return self._write_if("replace", key, data, version=version)

    def upload(self, key: str, path: Path) -> Entry:
        where = self._where(key)
        if not path.is_file():
            raise NotFoundError(f"upload to {key}: got no file {path}, expected one")
        with self._calling("upload", key):
            self._bulk.upload_file(str(path), Bucket=where["Bucket"], Key=where["Key"], Config=self._transfer)
        return self._must_exist(key)

    def list(self, prefix: str) -> Iterator[Entry]:
        pages = self._pages("list", check_prefix(prefix))
        found = [
            Entry(key=key, size_bytes=item["Size"], version=item["ETag"])
            for page in pages
            for item in page.get("Contents", [])
            if is_key(key := item["Key"][len(self._prefix) :])
        ]
        # AWS lists in order of bytes, SeaweedFS folder by folder.
        yield from sorted(found, key=lambda entry: entry.key)

    def children(self, prefix: str) -> list[str]:
        folder = check_prefix(prefix).removesuffix("/")
        start = f"{folder}/" if folder else ""
        names: set[str] = set()
        for page in self._pages("children", start, Delimiter="/"):
            below = [item["Key"] for item in page.get("Contents", [])]
            folders = [item["Prefix"] for item in page.get("CommonPrefixes", [])]
            if "seaweedfs" in page["ResponseMetadata"]["HTTPHeaders"].get("server", "").lower():
                # It names folders for minutes after their last key went; others never do.
                folders = [folder for folder in folders if self._has_keys(folder)]
            names.update(key[len(self._prefix) + len(start) :].removesuffix("/") for key in below + folders)
        return sorted(name for name in names if is_key(name))

    def delete(self, key: str) -> None:
        where = self._where(key)
        with contextlib.suppress(NotFoundError), self._calling("delete", key):
            self._small.delete_object(**where)

    def local_path(self, key: str) -> None:
        check_key(key)

    def create_bucket(self) -> None:
        """Make the bucket, on a development server; one that is ours already is no error."""
        with self._calling("create bucket", ""):
            try:
                self._small.create_bucket(Bucket=self._bucket)
            except vendor.ClientError as error:
                if _code(error) != "BucketAlreadyOwnedByYou":
                    raise

    def _client(self, session: Any, addressing: str) -> Any:
        options = self._options
        config = Config(
            # "total_max_attempts" counts the first try, "max_attempts" would not.
            retries={"mode": "adaptive", "total_max_attempts": options.attempts},
            connect_timeout=options.connect_timeout_s,
            read_timeout=options.read_timeout_s,
            max_pool_connections=32,
            s3={"addressing_style": addressing},
        )
        return session.client(
            "s3",
            endpoint_url=options.endpoint,
            aws_access_key_id=options.access_key,
            aws_secret_access_key=options.secret_key,
            config=config,
        )

    def _where(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}

    def _write_if(self, operation: str, key: str, data: bytes, *, version: str | None) -> Entry:
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        nonce = uuid.uuid4().hex
        where = self._where(key)
        for trial in range(_NUM_CONDITIONAL_WRITES):
            with self._calling(operation, key):
                try:
                    answer = self._small.put_object(**where, Body=data, Metadata={_NONCE: nonce}, **condition)
                    return Entry(key=key, size_bytes=len(data), version=answer["ETag"])
                except vendor.ClientError as error:
                    if not _is_conflict(error):
                        raise
            # 409 and 412 alike: only what is stored now says who won.
            found = self._look(key)
            if found is not None and found[1] == nonce:
                return found[0]
            self._check_conflict(key, None if found is None else found[0].version, version)
            _back_off(trial)
        raise TransientError(
            f"{self.uri}/{key}: {operation}: got {_NUM_CONDITIONAL_WRITES} refusals at {self._endpoint} "
            "although nothing was changed, expected one writer to win",
            hint=_HINT_CONDITIONS,
        )

    def _check_conflict(self, key: str, found: str | None, expected: str | None) -> None:
        if expected is None and found is not None:
            raise ConflictError(f"{self.uri}/{key}: got a key that exists, expected to create it")
        if expected is not None and found != expected:
            seen = "no such key" if found is None else f"version {found}"
            raise ConflictError(f"{self.uri}/{key}: got {seen}, expected version {expected}")

    def _send(self, call: Any, data: Data, **request: Any) -> Any:
        """The answer to an upload; one that was damaged on the way, and refused for it, is sent again."""
        body = data if isinstance(data, bytes) else bytes(data)
        for trial in range(_NUM_WRITES):
            try:
                return call(**request, Body=body)
            except vendor.ClientError as error:
                if _code(error) not in _DAMAGED_WRITE or trial == _NUM_WRITES - 1:
                    raise
                _back_off(trial)
        raise AssertionError("unreachable")

    def _put_parts(self, where: dict[str, str], data: memoryview) -> Any:
        """Upload parts beside one another; the object appears with the last request, or not at all."""
        step = self._options.part_bytes
        begun = self._bulk.create_multipart_upload(**where, ChecksumAlgorithm="CRC32", ChecksumType="FULL_OBJECT")
        upload = where | {"UploadId": begun["UploadId"]}

        def send(index: int) -> dict[str, Any]:
            part = bytes(data[index * step : (index + 1) * step])
            crc, number = _crc32(part), index + 1
            answer = self._send(self._bulk.upload_part, part, PartNumber=number, ChecksumCRC32=crc, **upload)
            return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumCRC32": crc}

        try:
            with ThreadPoolExecutor(_NUM_PARTS_AT_ONCE, thread_name_prefix="treadle-parts") as pool:
                parts = list(pool.map(send, range(-(-len(data) // step))))
            return self._bulk.complete_multipart_upload(
                **upload, MultipartUpload={"Parts": parts}, ChecksumType="FULL_OBJECT"
            )
        except BaseException:
            with contextlib.suppress(vendor.ClientError, vendor.BotoCoreError):
                self._bulk.abort_multipart_upload(**upload)
            raise

    def _reads_back(self, key: str, data: memoryview) -> bool:
        step = self._options.part_bytes
        parts = (slice(start, start + step) for start in range(0, len(data), step))
        try:
            return all(checksum(self.get(key, offset=p.start, size=step)) == checksum(data[p]) for p in parts)
        except (IntegrityError, NotFoundError):  # boto3 has found it out, or somebody took it away
            return False

    def _refuses_damage(self) -> bool:
        """Whether this server compares uploads with their checksum: asked once, with an upload that does not fit."""
        if self._checks_uploads is None:
            where = self._where(f"probe/{uuid.uuid4().hex}")
            try:
                self._bulk.put_object(**where, Body=b"one", ChecksumCRC32=_crc32(b"another"))
            except vendor.ClientError as error:
                self._checks_uploads = _code(error) in _DAMAGED_WRITE or _status(error) == 400
            except vendor.BotoCoreError:
                return False
            else:
                self._checks_uploads = False
                with contextlib.suppress(vendor.ClientError, vendor.BotoCoreError):
                    self._bulk.delete_object(**where)
        return self._checks_uploads

    def _head(self, key: str, **more: str) -> dict[str, Any] | None:
        try:
            with self._calling("head", key):
                return self._small.head_object(**self._where(key), **more)
        except NotFoundError:
            self._check_bucket()
            return None

    def _look(self, key: str) -> tuple[Entry, str | None] | None:
        """The entry of `key` and the nonce it was written with, or None."""
        answer = self._head(key)
        if answer is None:
            return None
        entry = Entry(key=key, size_bytes=answer["ContentLength"], version=answer["ETag"])
        return entry, answer.get("Metadata", {}).get(_NONCE)

    def _check_bucket(self) -> None:
        """HEAD answers a bare 404 for a missing key and for a missing bucket; listing tells them apart."""
        if not self._is_bucket_seen:
            self._has_keys(self._prefix)
            self._is_bucket_seen = True

    def _has_keys(self, full_prefix: str) -> bool:
        with self._calling("list", ""):
            answer = self._small.list_objects_v2(Bucket=self._bucket, Prefix=full_prefix, MaxKeys=1)
        return bool(answer.get("Contents"))

    def _must_exist(self, key: str) -> Entry:
        entry = self.head(key)
        if entry is None:
            raise NotFoundError(f"{self.uri}/{key}: got no such key, expected one that was written")
        return entry

    def _pages(self, operation: str, prefix: str, **more: str) -> Iterator[dict[str, Any]]:
        paginator = self._small.get_paginator("list_objects_v2")
        size = {"PageSize": self._options.page_size}
        with self._calling(operation, prefix):
            yield from paginator.paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix, PaginationConfig=size, **more
            )

    @contextlib.contextmanager
    def _calling(self, operation: str, key: str) -> Iterator[None]:
        try:
            yield
        except (vendor.ClientError, vendor.BotoCoreError, Boto3Error) as error:
            self._raise(error, operation, f"{self.uri}/{key}" if key else self.uri)
        except (ResponseParserError, ValueError) as error:  # listings carry no checksum, and boto3 lets these through
            place = f"{self.uri}/{key}" if key else self.uri
            raise TransientError(
                f"{place}: {operation} at {self._endpoint}: got an answer that cannot be read ({error}), expected one",
                hint=_HINT_REACH,
            ) from error

    def _raise(self, error: Exception, operation: str, place: str) -> NoReturn:
        # boto3's transfers wrap the answer of the server in an error that only has its text.
        cause = error.__context__ if isinstance(error, Boto3Error) else error
        start = f"{place}: {operation} at {self._endpoint}: got"
        if isinstance(cause, vendor.ClientError):
            raise _answered(cause, start) from error
        raise _failed(cause or error, start) from error


def _new_session() -> Any:
    # Sessions are not safe to share, and keep the credentials they found first.
    inner = botocore.session.Session()
    inner.register_component("data_loader", _MODELS)
    return boto3.session.Session(botocore_session=inner)


def _back_off(trial: int) -> None:
    time.sleep(0.05 * 2**trial * (0.5 + secrets.randbelow(1000) / 1000))


def _crc32(data: Data) -> str:
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _is_conflict(error: Any) -> bool:
    return _status(error) in (409, 412) or (_status(error) == 404 and _code(error) != "NoSuchBucket")


def _answered(error: Any, start: str) -> TreadleError:
    """What an answer of the server means to us."""
    code, status = _code(error), _status(error)
    seen = f"{start} {code} ({error.response.get('Error', {}).get('Message', '')})"
    if code in _REFUSED or status in (401, 403):
        hint = _REFUSED.get(code, _HINT_RIGHTS)
        return ConfigError(f"{seen}, expected to be let in", hint=hint, code=code, status=status)
    if status == 404:
        return NotFoundError(f"{seen}, expected a key that was written", code=code, status=status)
    if code in _TRANSIENT_CODES or status == 429 or status >= 500:
        return TransientError(f"{seen}, expected success", hint=_HINT_REACH, code=code, status=status)
    return ConfigError(f"{seen}, expected a server that knows this request", code=code, status=status)


def _failed(error: BaseException, start: str) -> TreadleError:
    """What a failure without an answer of the server means to us."""
    seen = f"{start} {type(error).__name__} ({error})"
    if isinstance(error, vendor.FlexibleChecksumError):
        return IntegrityError(f"{seen} {_NUM_READS} times, expected the bytes that were written")
    if isinstance(error, vendor.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return ConfigError(f"{seen}, expected a trusted certificate", hint="set AWS_CA_BUNDLE")
    if isinstance(error, _UNREACHED):
        return TransientError(f"{seen}, expected an answer", hint=_HINT_REACH)
    if isinstance(error, vendor.NoCredentialsError | vendor.PartialCredentialsError):
        return ConfigError(f"{seen}, expected credentials", hint=_HINT_CREDENTIALS)
    return ConfigError(f"{seen}, expected settings that boto3 takes", hint=_HINT_CREDENTIALS)

"""S3 as a place of storage, against a real server."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from blob_contract import BlobContract

from treadle.errors import ConfigError, ConflictError, IntegrityError, TransientError
from treadle.store import open_blobs
from treadle.store.dev import DevServer
from treadle.store.s3 import S3Blobs, S3Options
from treadle.testing import Fault, Rule
from treadle.testing import FaultProxy as Network

pytestmark = pytest.mark.s3


@pytest.fixture
def blobs(s3_server: DevServer) -> S3Blobs:
    return S3Blobs(s3_server.bucket, f"test/{uuid.uuid4().hex}", s3_server.options())


class TestS3(BlobContract):
    num_rounds = 2


def test_no_key_has_a_local_path(blobs: S3Blobs) -> None:
    blobs.put("k", b"x")
    assert blobs.local_path("k") is None


def test_a_large_file_goes_up_in_parts(s3_server: DevServer, tmp_path: Path) -> None:
    data = b"".join(i.to_bytes(4, "big") for i in range(2_700_000))
    (tmp_path / "file").write_bytes(data)
    options = replace(s3_server.options(), part_bytes=5 << 20)
    blobs = S3Blobs(s3_server.bucket, f"test/{uuid.uuid4().hex}", options)
    entry = blobs.upload("k", tmp_path / "file")
    assert entry.version.endswith('-3"')  # the ETag of three parts
    assert entry.size_bytes == len(data)
    assert blobs.get("k") == data
    assert blobs.get("k", offset=5_242_876, size=8) == data[5_242_876:5_242_884]
    assert blobs.replace("k", b"small", version=entry.version) == blobs.head("k")


def test_a_listing_of_many_pages_is_whole(s3_server: DevServer) -> None:
    options = replace(s3_server.options(), page_size=3)
    blobs = S3Blobs(s3_server.bucket, f"test/{uuid.uuid4().hex}", options)
    keys = sorted(f"{folder}/{i}" for folder in ("a", "a-b", "a.b", "b") for i in range(5))
    for key in keys:
        blobs.put(key, b"x")
    assert [entry.key for entry in blobs.list("")] == keys
    assert [entry.key for entry in blobs.list("a")] == keys[:15]
    assert blobs.children("") == ["a", "a-b", "a.b", "b"]
    assert blobs.children("a") == ["0", "1", "2", "3", "4"]


def test_stores_in_one_bucket_do_not_see_one_another(s3_server: DevServer) -> None:
    name = uuid.uuid4().hex
    one, ten = (S3Blobs(s3_server.bucket, f"test/{name}{end}", s3_server.options()) for end in ("1", "10"))
    one.put("k", b"one")
    ten.put("k", b"ten")
    assert [entry.key for entry in one.list("")] == ["k"]
    assert one.get("k") == b"one"


def test_the_environment_leads_to_the_server(s3_server: DevServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    uri = f"{s3_server.environment()['TREADLE_STORE']}/test/{uuid.uuid4().hex}"
    blobs = open_blobs(uri + "/")
    assert blobs.uri == uri
    blobs.put("k", b"x")
    assert open_blobs(uri).get("k") == b"x"


def operations(blobs: S3Blobs, tmp_path: Path) -> dict[str, Callable[[], object]]:
    (tmp_path / "file").write_bytes(b"x")
    return {
        "get": lambda: blobs.get("k"),
        "get nothing": lambda: blobs.get("k", size=0),
        "head": lambda: blobs.head("k"),
        "put": lambda: blobs.put("k", b"x"),
        "create": lambda: blobs.create("k", b"x"),
        "replace": lambda: blobs.replace("k", b"x", version='"v"'),
        "upload": lambda: blobs.upload("k", tmp_path / "file"),
        "list": lambda: list(blobs.list("")),
        "children": lambda: blobs.children(""),
        "delete": lambda: blobs.delete("k"),
    }


@pytest.mark.parametrize(
    ("change", "hint"),
    [({"secret_key": "wrong"}, "AWS_SECRET_ACCESS_KEY"), ({"access_key": "unknown"}, "AWS_ACCESS_KEY_ID")],
)
def test_wrong_keys_are_refused(s3_server: DevServer, tmp_path: Path, change: dict[str, str], hint: str) -> None:
    blobs = S3Blobs(s3_server.bucket, "test", replace(s3_server.options(), **change))
    for name, call in operations(blobs, tmp_path).items():
        with pytest.raises(ConfigError) as caught:
            call()
        assert hint in caught.value.hint, name
        assert s3_server.endpoint in caught.value.message
        assert s3_server.secret_key not in str(caught.value)


def test_a_missing_bucket_is_refused(s3_server: DevServer, tmp_path: Path) -> None:
    blobs = S3Blobs("no-such-bucket", "test", s3_server.options())
    for name, call in operations(blobs, tmp_path).items():
        with pytest.raises(ConfigError) as caught:
            call()
        assert "create the bucket" in caught.value.hint, name
        assert caught.value.message.startswith("s3://no-such-bucket/test"), name


def test_no_keys_at_all_are_refused(s3_server: DevServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ConfigError) as caught:
        S3Blobs(s3_server.bucket, "test", S3Options(endpoint=s3_server.endpoint, attempts=1)).get("k")
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint


def test_an_endpoint_that_is_not_there_is_transient(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = S3Options(endpoint=f"http://127.0.0.1:{port}", access_key="a", secret_key="b", attempts=1)
    blobs = S3Blobs("treadle", "test", options)
    start_s = time.monotonic()
    for name, call in operations(blobs, tmp_path).items():
        with pytest.raises(TransientError) as caught:
            call()
        assert f"http://127.0.0.1:{port}" in caught.value.message, name
        assert caught.value.message.startswith("s3://treadle/test"), name
    assert time.monotonic() - start_s < 10


def test_an_endpoint_that_hangs_is_transient() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        options = S3Options(endpoint=endpoint, access_key="a", secret_key="b", attempts=2, read_timeout_s=0.3)
        start_s = time.monotonic()
        with pytest.raises(TransientError, match=endpoint):
            S3Blobs("treadle", "", options).get("k")
        assert time.monotonic() - start_s < 10


@pytest.mark.parametrize(
    "uri", ["s3://", "s3:///prefix", "s3://ab", "s3://UPPER/x", "s3://bucket/../x", "s3://bucket/a b"]
)
def test_an_address_that_cannot_be_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="got"):
        open_blobs(uri)


def test_a_malformed_endpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match="Invalid endpoint"):
        S3Blobs("treadle", "", S3Options(endpoint="localhost:9000"))


class FaultProxy:
    """Passes bytes between a client and the server, and does `fault` to the next `num_faults` requests that fit it.

    lose_reply: the server's answer to a conditional write is dropped, with the connection.
    refuse_409: a conditional write is answered 409 and does not reach the server.
    damage_body: one byte of the body of a read is flipped.
    cut_body: the body of a read breaks off.
    """

    def __init__(self, upstream: str, fault: str, num_faults: int) -> None:
        host, _, port = upstream.removeprefix("http://").partition(":")
        self.upstream = (host, int(port))
        self.fault = fault
        self.num_faults = num_faults
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.upstream) as server:
            request = {"head": b""}

            def answer() -> None:
                try:
                    while data := server.recv(1 << 20):
                        client.sendall(self.distort(request["head"], data, client))
                    client.shutdown(socket.SHUT_WR)
                except OSError:
                    pass

            back = threading.Thread(target=answer, daemon=True)
            back.start()
            try:
                while data := client.recv(1 << 20):
                    if data.startswith((b"GET ", b"PUT ", b"HEAD ")):
                        request["head"] = data.split(b"\r\n\r\n")[0].lower()
                    if self.fault == "refuse_409" and b"\r\nif-" in request["head"] and self.take():
                        code = b"<Error><Code>ConditionalRequestConflict</Code></Error>"
                        client.sendall(b"HTTP/1.1 409 Conflict\r\nContent-Length: %d\r\n\r\n%b" % (len(code), code))
                        return
                    server.sendall(data)
            except OSError:
                pass

    def distort(self, head: bytes, data: bytes, client: socket.socket) -> bytes:
        is_answer = data.startswith(b"HTTP/1.1 20")
        if self.fault == "lose_reply" and is_answer and b"\r\nif-" in head and self.take():
            client.shutdown(socket.SHUT_RDWR)
        if self.fault in ("damage_body", "cut_body") and head.startswith(b"get ") and b"xyz" in data and self.take():
            start, body, end = data.partition(b"xyz")
            if self.fault == "damage_body":
                return start + b"xYz" + end
            client.sendall(start + body[:1])
            client.shutdown(socket.SHUT_RDWR)
        return data

    def take(self) -> bool:
        self.num_faults -= 1
        return self.num_faults >= 0


@pytest.fixture
def through(s3_server: DevServer, blobs: S3Blobs) -> Iterator[Callable[[str, int], S3Blobs]]:
    """The same place behind a proxy with a fault."""
    proxies: list[FaultProxy] = []

    def connect(fault: str, num_faults: int) -> S3Blobs:
        proxies.append(FaultProxy(s3_server.endpoint, fault, num_faults))
        prefix = blobs.uri.removeprefix(f"s3://{s3_server.bucket}/")
        return S3Blobs(s3_server.bucket, prefix, replace(s3_server.options(), endpoint=proxies[-1].endpoint))

    yield connect
    for proxy in proxies:
        proxy.listener.close()
        assert proxy.num_faults <= 0, "the fault was never injected"


def test_a_winner_whose_answer_was_lost_has_won(blobs: S3Blobs, through: Callable[[str, int], S3Blobs]) -> None:
    first = through("lose_reply", 1).create("k", b"one")
    assert first == blobs.head("k")
    second = through("lose_reply", 1).replace("k", b"two", version=first.version)
    assert second == blobs.head("k")
    assert blobs.get("k") == b"two"


def test_a_409_is_decided_by_what_is_stored(blobs: S3Blobs, through: Callable[[str, int], S3Blobs]) -> None:
    first = through("refuse_409", 2).create("k", b"one")  # nothing there: it tries again
    assert first == blobs.head("k")
    second = through("refuse_409", 2).replace("k", b"two", version=first.version)  # unchanged: it tries again
    assert second == blobs.head("k")
    with pytest.raises(ConflictError):
        through("refuse_409", 1).create("k", b"three")
    with pytest.raises(ConflictError):
        through("refuse_409", 1).replace("k", b"three", version=first.version)
    assert blobs.get("k") == b"two"


def test_endless_409_is_transient(blobs: S3Blobs, through: Callable[[str, int], S3Blobs]) -> None:
    with pytest.raises(TransientError, match="refusals"):
        through("refuse_409", 5).create("k", b"one")
    assert blobs.head("k") is None


@pytest.mark.parametrize("fault", ["cut_body", "damage_body"])
def test_a_read_that_was_damaged_once_is_read_again(
    blobs: S3Blobs, through: Callable[[str, int], S3Blobs], fault: str
) -> None:
    blobs.put("k", b"." * 1000 + b"xyz" + b"." * 1000)
    assert through(fault, 2).get("k") == blobs.get("k")


@pytest.mark.parametrize(("fault", "error"), [("cut_body", TransientError), ("damage_body", IntegrityError)])
def test_a_read_that_is_always_damaged_is_never_returned(
    blobs: S3Blobs, through: Callable[[str, int], S3Blobs], fault: str, error: type[Exception]
) -> None:
    blobs.put("k", b"." * 1000 + b"xyz" + b"." * 1000)
    with pytest.raises(error):
        through(fault, 4).get("k")


# Uploads

PART_BYTES = 5 << 20
LARGE = b"".join(i.to_bytes(4, "big") for i in range(2_700_000))  # three parts


def near(server: DevServer, **changes: Any) -> S3Blobs:
    """A place of its own that sends in parts what has 5 MiB, the least that S3 takes."""
    options = replace(server.options(), part_bytes=PART_BYTES, **changes)
    return S3Blobs(server.bucket, f"test/{uuid.uuid4().hex}", options)


def unfinished(blobs: S3Blobs) -> list[Any]:
    return blobs._small.list_multipart_uploads(Bucket=blobs._bucket, Prefix=blobs._prefix).get("Uploads", [])


def test_large_bytes_go_up_in_parts(s3_server: DevServer) -> None:
    blobs = near(s3_server)
    padded = memoryview(b"x" + LARGE + b"x")
    entry = blobs.put("k", padded[1:-1])
    assert entry.version.endswith('-3"')
    assert entry == blobs.head("k")
    assert blobs.get("k") == LARGE
    assert blobs.holds("k", padded[1:-1])
    assert not blobs.holds("k", padded[:-2])  # as long, and other bytes


@pytest.mark.parametrize("data", [b"small" * 100, LARGE])
def test_an_upload_that_was_damaged_is_sent_again(s3_server: DevServer, data: bytes) -> None:
    rule = Rule(fault=Fault.flip_request, methods=frozenset({"PUT"}), path="test/", most=2)
    with Network(s3_server.endpoint, rule) as network:
        blobs = near(s3_server, endpoint=network.url)
        blobs.put("k", data)
        assert network.done[Fault.flip_request] == 2
        assert blobs.get("k") == data
        assert blobs.holds("k", data)


@pytest.mark.parametrize("data", [b"small" * 100, LARGE])
def test_an_upload_that_is_always_damaged_leaves_nothing(s3_server: DevServer, data: bytes) -> None:
    rule = Rule(fault=Fault.flip_request, methods=frozenset({"PUT"}), path="test/")
    with Network(s3_server.endpoint, rule) as network:
        blobs = near(s3_server, endpoint=network.url)
        with pytest.raises(TransientError):
            blobs.put("k", data)
        assert blobs.head("k") is None
        assert not unfinished(blobs)


class NoChecksums(S3Blobs):
    """A server that keeps no checksums."""

    def _head(self, key: str, **more: str) -> dict[str, Any] | None:
        answer = super()._head(key, **more)
        return answer and {name: value for name, value in answer.items() if not name.startswith("Checksum")}


def test_where_no_checksum_is_kept_the_bytes_are_read_back(s3_server: DevServer) -> None:
    options = replace(s3_server.options(), part_bytes=PART_BYTES)
    blobs = NoChecksums(s3_server.bucket, f"test/{uuid.uuid4().hex}", options)
    for data in (b"", b"small", LARGE):
        blobs.put("k", data)
        assert blobs.holds("k", data)
    other = bytearray(LARGE)
    other[6_000_000] ^= 1
    assert not blobs.holds("k", other)


def test_a_file_uploaded_in_parts_is_read_back(s3_server: DevServer, tmp_path: Path) -> None:
    blobs = near(s3_server)
    (tmp_path / "file").write_bytes(LARGE)
    blobs.upload("k", tmp_path / "file")  # its checksum is that of the checksums of its parts
    assert blobs.holds("k", LARGE)
    assert not blobs.holds("k", LARGE[::-1])


class Careless(BaseHTTPRequestHandler):
    """A server that keeps the checksum it is sent, and never looks at the bytes."""

    kept: dict[str, tuple[bytes, str]]

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["x-amz-decoded-content-length"]:  # one chunk and its trailer
            size, _, rest = body.partition(b"\r\n")
            body = rest[: int(size.split(b";")[0], 16)]
        self.kept[self.path.partition("?")[0]] = body, self.headers.get("x-amz-checksum-crc32", "")
        self.answer(b"")

    def do_HEAD(self) -> None:
        self.answer(None)

    def do_GET(self) -> None:
        self.answer(self.kept[self.path][0])

    def do_DELETE(self) -> None:
        self.kept.pop(self.path)
        self.answer(b"")

    def answer(self, body: bytes | None) -> None:
        kept, crc = self.kept.get(self.path.partition("?")[0], (b"", ""))
        self.send_response(200)
        self.send_header("ETag", '"v"')
        self.send_header("x-amz-checksum-crc32", crc)
        self.send_header("Content-Length", str(len(kept if body is None else body)))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *args: object) -> None: ...


def test_a_server_that_believes_every_checksum_is_read_back() -> None:
    kept: dict[str, tuple[bytes, str]] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Careless,), {"kept": kept}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        with Network(endpoint, Rule(fault=Fault.flip_request, path="test/", most=1)) as network:
            options = S3Options(endpoint=network.url, access_key="a", secret_key="b", attempts=1)
            blobs = S3Blobs("treadle", "test", options)
            blobs.put("k", b"as it was" * 50)
            assert network.done[Fault.flip_request] == 1
            assert not blobs.holds("k", b"as it was" * 50)
            blobs.put("k", b"as it was" * 50)
            assert blobs.holds("k", b"as it was" * 50)
        assert list(kept) == ["/treadle/test/k"]  # what was asked with is gone
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

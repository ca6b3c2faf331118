"""The HTTP face of an engine, as an ASGI app: routes, limits, and errors in one form.

Every error is `{"error": class, "message": ..., "hint": ...}` with a fitting status. No message
repeats more of a request than the one symbol or name it is about.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from treadle import wire
from treadle.errors import (
    IntegrityError,
    InternalError,
    NotFoundError,
    OverloadError,
    RequestError,
    TreadleError,
    did_you_mean,
)
from treadle.serve.client import VERSION_HEADER
from treadle.serve.engine import Engine

__all__ = ["build_app"]

_log = logging.getLogger(__name__)
_PATHS = ("/", "/predict", "/healthz", "/stats", "/v1/models/NAME", "/v1/models/NAME:predict")
_MAX_OPEN = 1024  # requests that hold a body; more of them are told to come back
_BODY_TIMEOUT_S = 30.0
_DRAINED = 16  # times the limit; what is larger is refused unread
_FORM = '{"inputs": [...]}'
_LONGEST_REASON = 120  # a longer one repeats a number of the body
_NO_CLIENT = 499  # what proxies write in their logs for it; nobody receives it

Endpoint = Callable[[Request], Awaitable[Response]]


def build_app(engine: Engine, *, body_timeout_s: float = _BODY_TIMEOUT_S) -> Starlette:
    """The app of an engine. It does not own the engine: whoever made it closes it.

    Args:
        body_timeout_s: time that a client has to send its body.
    """
    api = _Api(engine, body_timeout_s)
    routes = [
        Route("/", api.guarded(api.about), methods=["GET"]),
        Route("/predict", api.guarded(api.predict), methods=["POST"]),
        Route("/healthz", api.guarded(api.health), methods=["GET"]),
        Route("/stats", api.guarded(api.stats), methods=["GET"]),
        Route("/v1/models/{call}", api.guarded(api.model), methods=["GET", "POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: api.refused})
    app.router.redirect_slashes = False
    return app


class _Api:
    def __init__(self, engine: Engine, body_timeout_s: float) -> None:
        self._engine = engine
        self._body_timeout_s = body_timeout_s
        self._card = engine.predictor.card
        self._name = engine.predictor.version.name
        self._max_bytes = engine.predictor.serve.max_body_bytes
        self._headers = {VERSION_HEADER: str(engine.predictor.version), "X-Content-Type-Options": "nosniff"}
        self._num_open = 0

    # Endpoints

    async def predict(self, request: Request) -> Response:
        if self._num_open >= _MAX_OPEN:
            raise OverloadError(f"server: got more than {_MAX_OPEN} requests at a time, expected fewer")
        self._num_open += 1
        try:
            _check_media_type(request)
            body = await self._body(request)
            inputs = _inputs(body)
            outputs = await _while_connected(request, self._engine.answer(inputs))
        finally:
            self._num_open -= 1
        version = self._engine.predictor.version
        content = {
            "model": version.name,
            "version": version.version,
            "outputs": [output.to_json() for output in outputs],
        }
        return JSONResponse(content, headers=self._headers)

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME and POST /v1/models/NAME:predict."""
        name, _, verb = request.path_params["call"].partition(":")
        if name != self._name:
            raise _no_model(name, self._name)
        if verb not in ("", "predict"):
            raise _not_found()
        method = "POST" if verb else "GET"
        if request.method != method and not (method == "GET" and request.method == "HEAD"):
            raise HTTPException(405, headers={"Allow": method})
        return await self.predict(request) if verb else JSONResponse(self._card, headers=self._headers)

    async def health(self, request: Request) -> Response:
        del request
        if not self._engine.is_alive:
            raise OverloadError("engine: got stopped, expected it running")
        return JSONResponse({"status": "ok", "model": str(self._engine.predictor.version)}, headers=self._headers)

    async def stats(self, request: Request) -> Response:
        del request
        return JSONResponse(self._engine.stats(), headers=self._headers)

    async def about(self, request: Request) -> Response:
        at = f"{request.url.scheme}://{request.headers.get('host') or 'HOST:PORT'}"
        body = wire.canonical(self._card["example"]).decode()
        quoted = body.replace("'", "'\\''")
        lines = [
            f"{self._engine.predictor.version} answers here. An input is {self._card['input']}.",
            "",
            f"  curl {at}/predict -H 'Content-Type: application/json' -d '{quoted}'",
            "",
            f"GET {at}/v1/models/{self._name} shows its signature, labels and metrics.",
        ]
        return PlainTextResponse("\n".join(lines) + "\n", headers=self._headers)

    # Errors

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """`endpoint`, with every error as an answer."""

        async def answer(request: Request) -> Response:
            try:
                return await endpoint(request)
            except _GoneError:
                self._engine.count_error(_NO_CLIENT)
                return Response(status_code=_NO_CLIENT)
            except TreadleError as error:
                return self._error(error)
            except HTTPException:
                raise
            except Exception:
                _log.exception("%s %s failed", request.method, request.url.path)
                return self._error(InternalError("server: got an error of its own, expected none"))

        return answer

    async def refused(self, request: Request, error: Exception) -> Response:
        """What the router refuses: an unknown path, or a method that a path does not have."""
        del request
        assert isinstance(error, HTTPException)
        if error.status_code == HTTPStatus.NOT_FOUND:
            return self._error(_not_found())
        allowed = sorted((error.headers or {}).get("Allow", "").split(", "))
        message = f"method: got another, expected {' or '.join(allowed)}"
        return self._error(RequestError(message, status=error.status_code), headers=error.headers)

    def _error(self, error: TreadleError, *, headers: Any = None) -> Response:
        status = _status(error)
        self._engine.count_error(status)
        sent = dict(self._headers) | dict(headers or {})
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            sent["Retry-After"] = str(error.context.get("retry_after_s", 1))
        if status in (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_TIMEOUT):
            sent["Connection"] = "close"  # the rest of the body is not wanted
        content = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
        return JSONResponse(content, status_code=status, headers=sent)

    # The body

    async def _body(self, request: Request) -> bytes:
        """The body, if it is no larger than allowed; counted before anything of it is parsed."""
        declared = request.headers.get("content-length", "")
        announced = int(declared[:20]) if declared.isdecimal() else 0
        size, chunks = 0, []
        try:
            async with asyncio.timeout(self._body_timeout_s):
                # A body little over the limit is read and dropped, so that its sender sees the answer and not a reset.
                while max(announced, size) <= _DRAINED * self._max_bytes:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    size += len(message.get("body", b""))
                    if max(announced, size) <= self._max_bytes:
                        chunks.append(message.get("body", b""))
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise RequestError(
                f"body: got {size} bytes in {self._body_timeout_s:g} s, expected all of it", status=408
            ) from None
        if max(announced, size) > self._max_bytes:
            raise RequestError(
                f"body: got more than {self._max_bytes} bytes, expected at most that (serve.max_body)",
                hint="send fewer inputs at a time",
                status=413,
            )
        return b"".join(chunks)


class _GoneError(Exception):
    """The client closed its connection."""


def _check_media_type(request: Request) -> None:
    seen = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if seen != "application/json":
        raise RequestError(
            f"Content-Type: got {'another' if seen else 'none'}, expected application/json",
            hint="curl -H 'Content-Type: application/json'",
            status=415,
        )
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise RequestError("Content-Encoding: got a compressed body, expected a plain one", status=415)


def _inputs(body: bytes) -> Any:
    try:
        # As text first: json itself would also take UTF-16, UTF-32 and a byte order mark.
        value = wire.parse_json(body.decode("utf-8"), where="body")
    except UnicodeDecodeError:
        raise RequestError("body: not readable as UTF-8", hint=_FORM, status=400) from None
    except IntegrityError as error:
        reason = error.message if len(error.message) <= _LONGEST_REASON else "body: not readable as JSON"
        raise RequestError(reason, hint=_FORM, status=400) from None
    if not isinstance(value, dict) or set(value) != {"inputs"}:
        seen = f"an object of {len(value)} keys" if isinstance(value, dict) else "no object"
        raise RequestError(f"body: got {seen}, expected an object with the one key 'inputs'", hint=_FORM)
    return value["inputs"]


async def _while_connected(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _GoneError
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _no_model(name: str, known: str) -> TreadleError:
    shown = repr(name[:64])
    return NotFoundError(f"model: got {shown}, expected {known!r}{did_you_mean(name[:64], [known])}")


def _not_found() -> TreadleError:
    return NotFoundError(f"path: got an unknown one, expected one of {', '.join(_PATHS)}")


def _status(error: TreadleError) -> int:
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, OverloadError):
        return HTTPStatus.SERVICE_UNAVAILABLE
    return HTTPStatus.NOT_FOUND if isinstance(error, NotFoundError) else HTTPStatus.INTERNAL_SERVER_ERROR

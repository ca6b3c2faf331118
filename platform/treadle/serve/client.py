"""Asking an endpoint, with the standard library alone."""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

from treadle.errors import ConfigError, InternalError, OverloadError, RequestError, TransientError, TreadleError

__all__ = ["VERSION_HEADER", "ask", "is_answering"]

VERSION_HEADER = "X-Treadle-Version"
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def ask(url: str, inputs: Sequence[Any], *, timeout_s: float = 30.0) -> dict[str, Any]:
    """The answer of the endpoint at `url` to `inputs`: `{"model", "version", "outputs"}`.

    Args:
        url: `http://HOST:PORT`, with or without a path.
        inputs: texts, lists of symbols, or lists of time steps, as the model takes them.

    Raises:
        ConfigError: no such form of URL.
        RequestError: the endpoint cannot take the inputs.
        OverloadError: it is busy; `context["retry_after_s"]` says when to come back.
        TransientError: there is no endpoint at `url`, or it did not answer in time.
        InternalError: the model failed.
    """
    address = _address(url)
    try:
        body = json.dumps({"inputs": list(inputs)}, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"inputs: got what is not JSON ({error}), expected texts, lists and finite numbers"
        ) from None
    # Only http and https come through _address.
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})  # noqa: S310
    try:
        with _opener(address).open(request, timeout=timeout_s) as response:
            answer = json.load(response) if response.headers.get(VERSION_HEADER) else None
    except urllib.error.HTTPError as error:
        raise _refusal(error, url) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _unreachable(url, error, timeout_s) from None
    if not isinstance(answer, dict):
        raise TransientError(f"{url}: got an answer of another server, expected a treadle endpoint")
    return answer


def is_answering(url: str, *, timeout_s: float = 5.0) -> bool:
    """Whether a healthy endpoint is at `url`, `http://HOST:PORT`."""
    address = urllib.parse.urljoin(_address(url), "/healthz")
    try:
        with _opener(address).open(address, timeout=timeout_s) as answer:
            return answer.status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False


def _address(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, is_usable = urllib.parse.urlsplit(""), False
    if not is_usable:
        raise ConfigError(f"url: got {url!r}, expected http://HOST:PORT")
    return urllib.parse.urlunsplit(parts._replace(path=parts.path if parts.path.strip("/") else "/predict"))


def _opener(address: str) -> urllib.request.OpenerDirector:
    """Without the machine's HTTP proxy where it could not reach the endpoint anyway."""
    is_here = urllib.parse.urlsplit(address).hostname in _LOOPBACK
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_here else []))


def _refusal(error: urllib.error.HTTPError, url: str) -> TreadleError:
    with error:
        status, headers = error.code, error.headers
        told: Any = None
        with contextlib.suppress(ValueError, OSError, http.client.HTTPException):
            told = json.load(error)
    if not isinstance(told, dict) or "message" not in told:
        return TransientError(f"{url}: got HTTP {status} of another server, expected a treadle endpoint")
    message, hint = str(told["message"]), str(told.get("hint", ""))
    if status == http.HTTPStatus.SERVICE_UNAVAILABLE:
        wait = headers.get("Retry-After", "1")
        return OverloadError(message, hint=hint, retry_after_s=int(wait) if wait.isdecimal() else 1)
    if status < http.HTTPStatus.INTERNAL_SERVER_ERROR:
        return RequestError(message, hint=hint, status=status)
    return InternalError(message, hint=hint)


def _unreachable(url: str, error: Exception, timeout_s: float) -> TreadleError:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return TransientError(f"{url}: got no answer in {timeout_s:g} s, expected one")
    return TransientError(f"{url}: got no endpoint there ({reason}), expected one", hint="treadle serve MODEL@ALIAS")

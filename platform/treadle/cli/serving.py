"""Verbs that answer: serve and predict."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import click

from treadle.cli.options import answer, json_option, say, store_option, stored
from treadle.errors import ConflictError, NotFoundError, RequestError, TreadleError

__all__ = ["predict", "serve"]


@click.command()
@click.argument("model")
@click.option("--host", help="Interface to listen on. [default: as the model's job says, 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="HTTP port; 0 takes a free one. [default: the job's, 8000]")
@click.option("--replicas", type=click.IntRange(1), help="Processes that hold the model. [default: the job's, 1]")
@click.option("--address", help="Join this Ray cluster instead of starting one here.")
@store_option
@json_option
def serve(
    model: str,
    host: str | None,
    port: int | None,
    replicas: int | None,
    address: str | None,
    store_uri: str | None,
    as_json: bool,
) -> None:
    """Answer requests with MODEL (name@alias, name@3) on Ray Serve until Ctrl-C."""
    from treadle.serve.deploy import serve_model

    blobs = stored(store_uri)
    asked = {"host": host, "port": port, "replicas": replicas}
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    changes = {name: value for name, value in asked.items() if value is not None}
    made = serve_model(model, store_uri=blobs.uri, overrides=changes, address=address)
    with made as endpoint, _noted(blobs, endpoint):
        body = {"url": endpoint.url, "model": endpoint.model, "version": endpoint.version}
        example = f"treadle predict {model} INPUT   or   POST {endpoint.url}/predict"
        answer(as_json, body, f"{endpoint.model}@{endpoint.version} answers at {endpoint.url}")
        sys.stdout.flush()
        say(f"{example}; Ctrl-C stops it")
        with contextlib.suppress(KeyboardInterrupt):
            stop.wait()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave half of it running
        say("stopping the endpoint")


class _noted:  # noqa: N801 - reads as a verb: `with _noted(...)`
    """The endpoint's address in the store, where `predict` finds it, as long as it is up."""

    def __init__(self, blobs: Any, endpoint: Any) -> None:
        self._blobs, self._endpoint = blobs, endpoint
        self._key = f"endpoints/{endpoint.model}.json"

    def __enter__(self) -> None:
        body = {"url": self._endpoint.url, "version": self._endpoint.version}
        self._blobs.put(self._key, json.dumps(body).encode())

    def __exit__(self, *_: object) -> None:
        try:
            self._blobs.delete(self._key)
        except TreadleError as error:
            say(f"note: {error.message}")


@click.command()
@click.argument("model")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--url", help="Ask this endpoint.")
@click.option("--here", is_flag=True, help="Load the model into this process, whether or not it is served.")
@store_option
@json_option
def predict(
    model: str, inputs: tuple[str, ...], url: str | None, here: bool, store_uri: str | None, as_json: bool
) -> None:
    """Ask MODEL (name@alias, name@3) for each of INPUTS.

    An input is a text, or JSON (a list of symbols, or of time steps); @FILE reads JSON from a file,
    - from standard input. A served model is asked over HTTP, any other is loaded here.
    """
    from treadle.store import Registry

    given = [_read(text) for text in inputs]
    blobs = stored(store_uri)
    version = Registry(blobs).resolve(model)
    found = None if here else url or _endpoint(blobs, version)
    if found is not None:
        from treadle.serve import ask

        say(f"asking {found}")
        reply = ask(found, given)
        place = found
        if (reply["model"], reply["version"]) != (version.name, version.version):
            raise ConflictError(
                f"{found}: got an answer of {reply['model']}@{reply['version']}, expected {version}",
                hint=f"treadle serve {model}, or ask without --url",
            )
    else:
        from treadle.serve.predictor import Predictor

        say(f"loading {version} into this process")
        predictor = Predictor.load(blobs, str(version))
        outputs = [output.to_json() for output in predictor.predict(predictor.validate(given))]
        reply, place = {"model": version.name, "version": version.version, "outputs": outputs}, "here"
    answer(as_json, {**reply, "from": place}, lambda: _text(inputs, reply["outputs"]))


def _endpoint(blobs: Any, version: Any) -> str | None:
    """Where exactly this version is served, if it still is."""
    from treadle.serve.client import is_answering

    try:
        noted = json.loads(blobs.get(f"endpoints/{version.name}.json"))
    except (NotFoundError, ValueError):
        return None
    if noted.get("version") != version.version or not is_answering(noted["url"]):
        return None
    return str(noted["url"])


def _read(text: str) -> Any:
    if text == "-":
        return _json(sys.stdin.read(), "standard input")
    if text.startswith("@"):
        path = Path(text[1:])
        try:
            return _json(path.read_text(encoding="utf-8"), text[1:])
        except OSError as error:
            raise RequestError(f"{text[1:]}: {error.strerror}") from None
    return _json(text, "input") if text.lstrip().startswith("[") else text


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RequestError(f"{where}: not readable as JSON ({error})") from None


def _text(inputs: tuple[str, ...], outputs: list[dict[str, Any]]) -> str:
    from treadle.track import table

    shown = [text if len(text) <= 40 else f"{text[:37]}..." for text in inputs]
    rows = [
        (text, " ".join(output["labels"]), f"{output['confidence']:.2f}")
        for text, output in zip(shown, outputs, strict=True)
    ]
    return table(rows, ["input", "answer", "confidence"])

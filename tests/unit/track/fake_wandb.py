"""A W&B server as far as the released client needs one: what it was sent can be read back.

Operations it does not know are answered with nothing and kept in `unknown`, so that a client
upgrade shows itself.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["FakeWandb"]


class FakeWandb:
    """The server and its state; `is_down` makes it answer 503 to everything, `problems` should stay empty."""

    def __init__(self) -> None:
        self.is_down = False
        self.runs: dict[str, dict[str, Any]] = {}
        self.alerts: list[dict[str, Any]] = []
        self.unknown: set[str] = set()
        self.problems: list[str] = []
        self.keys: set[str] = set()
        self._http = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": self}))
        self._http.problems = self.problems
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> FakeWandb:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """The history of a run, in order."""
        return [json.loads(line) for line in self.runs[run_id]["history"]]

    def bucket(self, name: str) -> dict[str, Any]:
        run = self.runs[name]
        tail = json.dumps(run["history"][-1:])
        return {
            "id": f"id-{name}",
            "name": name,
            "displayName": run.get("displayName", name),
            "description": "",
            "sweepName": None,
            "config": run.get("config", "{}"),
            "wandbConfig": '{"t": 1}',
            "summaryMetrics": run.get("summary", "{}"),
            "historyLineCount": len(run["history"]),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": tail,
            "eventsTail": "[]",
            "tags": run.get("tags") or [],
            "notes": "",
            "project": {"id": "p", "name": "treadle", "entity": {"id": "e", "name": "tester"}},
        }

    def graphql(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        if name == "RunResumeStatus":
            run = variables["name"]
            bucket = self.bucket(run) if run in self.runs else None
            entity = {"id": "e", "name": "tester"}
            return {"model": {"id": "p", "name": "treadle", "entity": entity, "bucket": bucket}}
        if name == "UpsertBucket":
            run = variables.get("name") or variables["id"].removeprefix("id-")
            is_new = run not in self.runs
            state = self.runs.setdefault(run, {"history": [], "complete": False, "exitcode": None})
            state |= {key: value for key, value in variables.items() if value is not None}
            return {"upsertBucket": {"bucket": self.bucket(run), "inserted": is_new}}
        if name == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/put/{i}"} for i, f in enumerate(variables["files"])]
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
        if name == "NotifyScriptableRunAlert":
            self.alerts.append(variables)
            return {"notifyScriptableRunAlert": {"success": True}}
        if name == "RunStoppedStatus":
            return {"project": {"run": {"stopped": False}}}
        if name == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if name == "Viewer":
            teams: dict[str, list[Any]] = {"edges": []}
            return {"viewer": {"id": "u", "entity": "tester", "username": "tester", "flags": "{}", "teams": teams}}
        if name == "OrganizationCoreWeaveOrganizationID":
            return {"entity": None}
        self.unknown.add(name)
        return {}

    def stream(self, run_id: str, body: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[run_id]
        files = body.get("files") or {}
        if (part := files.get("wandb-history.jsonl")) is not None:
            assert part["offset"] == len(run["history"]), "a row was sent twice or left out"
            run["history"].extend(part["content"])
        if (part := files.get("wandb-summary.json")) is not None:
            run["summary"] = part["content"][-1]
        if body.get("complete"):
            run |= {"complete": True, "exitcode": body.get("exitcode")}
        return {"exitcode": None, "limits": {}, "stopped": False}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    problems: list[str]

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, ConnectionError):  # a client that was killed hangs up
            self.problems.append(repr(error))


class _Handler(BaseHTTPRequestHandler):
    fake: FakeWandb
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.fake.is_down:
            self._answer(503, {})
            return
        if self.headers.get("Content-Encoding") == "gzip":
            data = gzip.decompress(data)
        if auth := self.headers.get("Authorization"):
            self.fake.keys.add(base64.b64decode(auth.removeprefix("Basic ")).decode().removeprefix("api:"))
        body = json.loads(data) if data[:1] == b"{" else {}
        if self.path.startswith("/graphql"):
            found = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])
            name = body.get("operationName") or (found[1] if found else "?")
            self._answer(200, {"data": self.fake.graphql(name, body.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            self._answer(200, self.fake.stream(self.path.split("/")[4], body))
        else:
            self._answer(200, {})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(503 if self.fake.is_down else 200, {})

    do_GET = do_POST

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

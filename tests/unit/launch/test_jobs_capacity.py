"""What a cluster offers, as its dashboard tells it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from treadle.launch.jobs import RayCluster

GIB = 1 << 30


def node(state: str, **resources: float) -> dict[str, Any]:
    return {"raylet": {"state": state, "resourcesTotal": resources}}


NODES = [
    node("ALIVE", CPU=8.0, memory=16.0 * GIB),
    node("ALIVE", CPU=4.0, GPU=2.0, memory=64.0 * GIB),
    node("DEAD", CPU=64.0, memory=512.0 * GIB),
    {},
]


class Dashboard(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = {"ray_version": "2"} if self.path == "/api/version" else {"data": {"summary": NODES}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def address() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_memory_is_of_all_nodes_and_of_the_largest(address: str) -> None:
    found = RayCluster(address).capacity()
    assert (found.cpus, found.gpus) == (12, 2)
    assert (found.memory_bytes, found.node_bytes) == (80 * GIB, 64 * GIB)

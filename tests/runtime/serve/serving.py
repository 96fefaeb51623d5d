"""A server in a thread, over an engine of a test."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from stillgraph.engine import Engine
from stillgraph.pool import Pool
from stillgraph.serve.app import application

PATIENCE = 30  # seconds after which a test that hangs fails
JSON = {"content-type": "application/json"}


class Served:
    """Where a server listens, and what it is of."""

    def __init__(self, port: int, engine: Engine, pool: Pool) -> None:
        self.port, self.engine, self.pool, self.url = port, engine, pool, f"http://127.0.0.1:{port}"

    def begin(self, path: str, body: Any, headers: dict[str, str] = JSON) -> http.client.HTTPConnection:
        """A connection on which a request was sent. body: JSON, or bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, headers)
        return connection

    def post(self, path: str, body: Any, headers: dict[str, str] = JSON) -> tuple[int, Any, dict[str, str]]:
        """(status, JSON, headers) of an answer."""
        connection = self.begin(path, body, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, json.loads(content), dict(response.getheaders())

    def get(self, path: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
        """(status, content, headers) of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, content, {name.lower(): value for name, value in response.getheaders()}


@contextmanager
def serving(
    engine: Engine, limit: int = 1000, most_bytes: int = 1 << 20, more: tuple[Engine, ...] = ()
) -> Iterator[Served]:
    """A server of an engine, and of more; `tiny` is its name."""
    with Pool([engine, *more], limit) as pool:
        app = application(pool, engine, "tiny", ["127.0.0.1"], most_bytes)
        config = uvicorn.Config(app, port=0, http="h11", ws="none", log_level="error", backlog=2048)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        until(lambda: server.started)
        yield Served(server.servers[0].sockets[0].getsockname()[1], engine, pool)
        server.should_exit = True
        thread.join(PATIENCE)


def until(holds: Any) -> None:
    """Wait until something holds."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.005)

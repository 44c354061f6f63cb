"""A real service in a process of its own, a server that follows a script, and both clients behind one face."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from candlecast_client import AsyncCandlecast, Candlecast
from model_store.store import ModelStore
from tests.service.test_serve import PROGRAM

ROOT = Path(__file__).parents[2]
HOUR = 3_600_000
WATCH = "WATCHED-CANDLECAST:naive:3,WATCHED-AWAITED:naive:3"  # one for each client


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a service with a private Redis, a naive model and a watch list."""
    place = tmp_path_factory.mktemp("service")
    store = ModelStore(place / "store")
    manifest = {
        "model": "naive",
        "family": "naive",
        "origin": {"kind": "trained", "source": "test"},
        "limits": {"min_context": 2, "max_context": 4096, "max_horizon": 512},
        "created_at": "2025-01-01T00:00:00Z",
    }
    stored = store.put(manifest, {"family": "naive"}, {})
    store.promote(f"naive@{stored.version}", force="test")
    foreign = ("CANDLECAST_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "PYTHONPATH")
    own = {name: value for name, value in os.environ.items() if not name.upper().startswith(foreign)}
    settings = {
        "HOME": place / "home",
        "STORE_ROOT": store.root,
        "PORT": 0,
        "ADMIN_PORT": 0,
        "WATCH": WATCH,
    }
    environment = own | {f"CANDLECAST_{name}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    ) as service:
        assert service.stdout is not None
        line = service.stdout.readline()
        assert line, "the service ended before it was ready"
        yield json.loads(line)["url"]
        service.terminate()


class Awaited:
    """An AsyncCandlecast whose calls block."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncCandlecast(*arguments, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments, **options: self._runner.run(getattr(self._client, name)(*arguments, **options))

    def stream(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        stream = self._client.stream(*arguments, **options)
        try:
            while True:
                yield self._runner.run(anext(stream))
        finally:
            self._runner.run(stream.aclose())

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


@pytest.fixture(params=[Candlecast, Awaited], ids=["sync", "async"])
def client(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Either client, by its arguments."""
    clients: list[Any] = []

    def build(*arguments: Any, **options: Any) -> Any:
        clients.append(request.param(*arguments, **options))
        return clients[-1]

    yield build
    for each in clients:
        each.close()


@pytest.fixture
def service(client: Callable[..., Any], url: str) -> Any:
    """A client of the real service."""
    return client(url, timeout=300)


class Scripted:
    """A server that gives one answer after the other: (status, headers, content), or seconds of silence before it
    hangs up. Content in a list is sent in pieces, without an end if the last is None."""

    def __init__(self, *answers: Any) -> None:
        script: list[Any] = list(answers)
        self.asked: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.may_end = threading.Event()
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                scripted.asked.append((self.command, self.path, json.loads(self.rfile.read(length) or "null")))
                scripted.headers.append({name.lower(): value for name, value in self.headers.items()})
                answer = script.pop(0)
                if isinstance(answer, (int, float)):
                    scripted.may_end.wait(answer)
                    self.close_connection = True
                    return
                status, headers, content = answer
                pieces = content if isinstance(content, list) else None
                body = (content if isinstance(content, str) else json.dumps(content)).encode()
                length_or_not = {"Content-Length": str(len(body))} if pieces is None else {"Connection": "close"}
                self.send_response(status)
                for name, value in {**length_or_not, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in [body] if pieces is None else pieces:
                    if piece is None:
                        scripted.may_end.wait()
                    else:
                        self.wfile.write(piece if isinstance(piece, bytes) else piece.encode())

            do_GET = do_PUT = do_POST = answer

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def stop(self) -> None:
        self.may_end.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    servers: list[Scripted] = []

    def start(*answers: Any) -> Scripted:
        servers.append(Scripted(*answers))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def rows() -> Callable[..., list[list[float]]]:
    """ccxt rows of `count` hours, the last of which closed `ago` hours ago, not within the hour that may just end."""

    def make(count: int = 8, *, ago: int = 2) -> list[list[float]]:
        last = (int(1000 * time.time()) // HOUR - ago) * HOUR
        opens = [last - HOUR * back for back in range(count)][::-1]
        return [[at, 99.5 + k % 5, 102.0 + k % 5, 98.0 + k % 5, 100.0 + k % 5, 10.0 + k] for k, at in enumerate(opens)]

    return make

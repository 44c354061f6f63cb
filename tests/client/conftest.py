"""A real service in a process of its own, a server that follows a script, and both clients behind one face."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from bench.service import put_version, start_service
from candlecast_client import AsyncCandlecast, Candlecast
from model_store.store import ModelStore

HOUR = 3_600_000
WATCH = "WATCHED-CANDLECAST:naive:3,WATCHED-AWAITED:naive:3"  # one for each client


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a service with a private Redis, a naive model and a watch list."""
    place = tmp_path_factory.mktemp("service")
    store = ModelStore(place / "store")
    put_version(store, "naive", "naive", {"family": "naive"}, {})
    with start_service(store, place / "home", {"CANDLECAST_WATCH": WATCH}) as service:
        yield service.url


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

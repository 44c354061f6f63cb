"""A real service in a process of its own, a server that follows a script, and both clients behind one face."""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench.service import put_version, start_service
from candlecast_client import AsyncCandlecast, Candlecast
from model_store.store import ModelStore

HOUR = 3_600_000
WATCH = "WATCHED-CANDLECAST:naive:3,WATCHED-AWAITED:naive:3"  # one for each client


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a service with a private Redis, two naive models, of which only `kronos` was judged, and a watch list."""
    place = tmp_path_factory.mktemp("service")
    store = ModelStore(place / "store")
    limits = {"min_context": 2, "max_context": 4096, "max_horizon": 512}
    put_version(store, "naive", "naive", {"family": "naive"}, {}, limits=limits)
    judged = {"windows": "test", "symbols": ["BTC"], "interval": "1h", "horizon": 24, "origins": 9, "metrics": {}}
    judged |= {"start": "2012-01-01", "end": "2013-01-01"}
    put_version(store, "kronos-demo", "naive", {"family": "naive"}, {}, limits=limits, evaluations=[judged])
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


@pytest.fixture
def rows() -> Callable[..., list[list[float]]]:
    """ccxt rows of `count` hours, the last of which closed `ago` hours ago, not within the hour that may just end."""

    def make(count: int = 8, *, ago: int = 2) -> list[list[float]]:
        last = (int(1000 * time.time()) // HOUR - ago) * HOUR
        opens = [last - HOUR * back for back in range(count)][::-1]
        return [[at, 99.5 + k % 5, 102.0 + k % 5, 98.0 + k % 5, 100.0 + k % 5, 10.0 + k] for k, at in enumerate(opens)]

    return make

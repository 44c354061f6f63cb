"""The service under test: a store with published-size versions, `candlecast serve` over it, requests to send."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from redis.asyncio import Redis
from torch import Tensor

from bench.load import SEED
from bench.processes import LoadClient, ServerFailed, server
from bench.published import HOUR_MS, walk
from model_store.store import ModelStore
from models.families import build_forecaster
from service.state import PrivateRedis, connect

_WARM_UP_SECONDS: Final = 300.0
_SYMBOL: Final = "BENCH"
_SERVE: Final = ("-m", "candlecast", "serve", "--json")
WATCHED: Final = "WATCHED"  # on the watch list, where it costs the others next to nothing until candles are stored


@dataclass(frozen=True)
class Service:
    """A running service and the client that loads it."""

    url: str
    ready_seconds: float  # from the start of the process until it listens
    client: LoadClient
    program: subprocess.Popen[str]
    admin_url: str

    @property
    def process(self) -> int:
        """Its id."""
        return self.program.pid

    def end(self, by: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Its exit status, and how many seconds it took to end."""
        begun = time.monotonic()
        self.program.send_signal(by)
        return self.program.wait(_WARM_UP_SECONDS), time.monotonic() - begun

    def forecast_url(self, symbol: str = _SYMBOL) -> str:
        return f"{self.url}/forecast/{symbol}"

    def ask(self, body: bytes, seed: int = 0, symbol: str = _SYMBOL) -> bytes:
        """One answer, of status 200."""
        return self._send("POST", self.forecast_url(symbol), body.replace(SEED, b"%d" % seed))

    def latest_url(self) -> str:
        return f"{self.url}/forecast/{WATCHED}/latest"

    def wait_for_latest(self) -> bytes:
        """The watched forecast, as soon as it is there and nothing is about to refresh it."""
        end = time.monotonic() + _WARM_UP_SECONDS
        while True:
            with contextlib.suppress(HTTPError):  # 503 until the first
                content = self._send("GET", self.latest_url())
                if not json.loads(content)["meta"]["degraded"]:
                    return content
            if time.monotonic() > end:
                raise ServerFailed("no watched forecast came")
            time.sleep(0.2)

    def put_history(self, length: int, symbol: str = _SYMBOL) -> None:
        """Store the newest `length` hourly candles of a symbol."""
        self.put(symbol, _rows(length))

    def put(self, symbol: str, rows: Sequence[Sequence[float]], **fields: Any) -> dict[str, Any]:
        """Store ccxt rows; what became of them."""
        body = json.dumps({"candles": rows, **fields}).encode()
        answer: dict[str, Any] = json.loads(self._send("PUT", f"{self.url}/candles/{symbol}", body))
        return answer

    def warm_up(self, body: bytes) -> dict[str, Any]:
        """Ask until the answers come from the runtime that the service settles on; the last answer."""
        end = time.monotonic() + _WARM_UP_SECONDS
        while True:
            answer: dict[str, Any] = json.loads(self.ask(body, seed=time.monotonic_ns() % 2**40))
            models = json.loads(self.get("/models"))["models"]
            unsettled = [model["name"] for model in models if model["loaded"] and not model["runtime"]["settled"]]
            if not answer["meta"]["degraded"] and not unsettled:
                return answer
            if time.monotonic() > end:
                raise ServerFailed(f"after its warm-up: degraded {answer['meta']['degraded']}, unsettled {unsettled}")
            time.sleep(0.2)

    def get(self, path: str) -> bytes:
        """What lies at a path of the callers' port."""
        return self._send("GET", self.url + path)

    def _send(self, method: str, url: str, body: bytes | None = None) -> bytes:
        asked = Request(url, body, {"Content-Type": "application/json"}, method=method)
        with urlopen(asked, timeout=_WARM_UP_SECONDS) as answer:
            content: bytes = answer.read()
        return content


@contextlib.contextmanager
def start_service(
    store: ModelStore, home: Path, settings: Mapping[str, str], program: Sequence[str] = _SERVE
) -> Iterator[Service]:
    """`candlecast serve --json`, or a Python program that says as much, on free ports, its files under `home`."""
    home.mkdir(parents=True, exist_ok=True)
    environment = {
        "CANDLECAST_HOME": str(home),
        "CANDLECAST_STORE_ROOT": str(store.root),
        "CANDLECAST_PORT": "0",
        "CANDLECAST_ADMIN_PORT": "0",
        "CANDLECAST_REQUEST_TIMEOUT_MS": "600000",
        **settings,
    }
    log = home / "service.log"
    started = time.monotonic()
    with server([sys.executable, *program], log, environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        ready = time.monotonic() - started
        if not line:
            raise ServerFailed(f"the service ended before it was ready: {log.read_text()[-500:]}")
        at = json.loads(line)
        yield Service(at["url"], ready, LoadClient(home), process, at["admin_url"])


@contextlib.contextmanager
def start_naive_service(folder: Path, settings: Mapping[str, str]) -> Iterator[Service]:
    """A service whose models have no weights, with stored candles of BTC-USDT: for what lies around the models."""
    store = ModelStore(folder / "store")
    for name in ("naive", "toto-demo"):
        put_version(store, name, "naive", {"family": "naive"}, {})
    with start_service(store, folder / "home", settings) as service:
        service.put_history(200, "BTC-USDT")
        yield service


@contextlib.asynccontextmanager
async def redis_running(folder: Path) -> AsyncIterator[tuple[str, Redis]]:
    """The URL of a Redis in `folder`, and a client of it, for as long as the block lasts."""
    server = PrivateRedis(folder)
    client = connect(server.url)
    try:
        await server.start(client)
        yield server.url, client
    finally:
        await client.aclose()
        await server.stop()


def put_version(
    store: ModelStore, name: str, family: str, config: Mapping[str, Any], weights: Mapping[str, Tensor], **fields: Any
) -> str:
    """Store and promote a version of random weights; its name and version. Keywords add to its manifest."""
    manifest = {
        "model": name,
        "family": family,
        "origin": {"kind": "imported", "source": "random weights of the published size"},
        "limits": asdict(build_forecaster(family, config, weights).limits),
        "created_at": "2025-01-01T00:00:00Z",
        **fields,
    }
    complete = store.put(manifest, config, weights)
    store.promote(f"{name}@{complete.version}", force="random weights cannot be evaluated")
    return f"{name}@{complete.version}"


def forecast_body(model: str, candles: int | None, **fields: Any) -> bytes:
    """A request over `candles` candles in the body, or over the stored history; every seed of a run is its own."""
    given = {"candles": _rows(candles), "interval": "1h"} if candles else {}
    return json.dumps({"model": model, **given, "seed": SEED.decode().strip('"'), **fields}).encode()


def _rows(length: int) -> list[list[float]]:
    """ccxt rows; the last candle closed within the last hour."""
    return ccxt_rows(length, time.time_ns() // 1_000_000 // HOUR_MS * HOUR_MS - HOUR_MS, HOUR_MS)


def ccxt_rows(length: int, last: int, step: int) -> list[list[float]]:
    """Candles of `step` ms, the last of which opens at `last`, UTC ms."""
    times = [last - step * back for back in range(length)][::-1]
    return [[moment, *row[:5]] for moment, row in zip(times, walk(length, seed=1).round(4).tolist(), strict=True)]

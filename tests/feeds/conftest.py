"""A real service in a process of its own, and an exchange that speaks Binance's REST format on a free port."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import ccxt
import pytest

ROOT = Path(__file__).parents[2]
HOUR = 3_600_000
MAX_LIMIT = 1000

SERVE = """
import json
from service.main import serve
from service.settings import Settings
serve(Settings(), lambda at: print(json.dumps(at.url), flush=True))
"""


def wait_for_a_calm_hour() -> None:
    """Return when the hour has not just begun and is not about to end: a candle that closes then changes counts."""
    while not 5 < time.time() % 3600 < 3600 - 40:
        time.sleep(1)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Without this machine's proxies and settings."""
    foreign = ("CANDLECAST_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "PYTHONPATH")
    own = {name: value for name, value in os.environ.items() if not name.upper().startswith(foreign)}
    place = tmp_path_factory.mktemp("service")
    (place / "store").mkdir()
    return own | {
        "CANDLECAST_HOME": str(place / "home"),
        "CANDLECAST_STORE_ROOT": str(place / "store"),
        "CANDLECAST_PORT": "0",
        "CANDLECAST_ADMIN_PORT": "0",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="session")
def url(environment: dict[str, str]) -> Iterator[str]:
    """Of a service with a private Redis and an empty store of models."""
    command = [sys.executable, "-c", SERVE]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        line = service.stdout.readline()
        assert line, "the service ended before it was ready"
        yield json.loads(line)
        service.send_signal(signal.SIGTERM)


Stored = Callable[..., list[list[float]]]


@pytest.fixture
def stored(url: str) -> Stored:
    """The candles of a symbol that the service has, without their amounts."""

    def get(symbol: str, interval: str = "1h") -> list[list[float]]:
        address = f"{url}/candles/{symbol}?interval={interval}&limit=10000"
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                return [row[:6] for row in json.load(answer)["candles"]]
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in (404, 422):
                raise
            return []

    return get


def candle(opens: int) -> list[float]:
    """The candle that this exchange has at an hour."""
    hour = opens // HOUR
    price = 100.0 + hour % 7
    return [opens, price, price + 2.25, price - 1.5, price + 0.125, 10.0 + hour % 5]


def kline(opens: int) -> list[Any]:
    """The same in Binance's 12 columns."""
    _, *cells = candle(opens)
    ohlcv = [f"{cell:.8f}" for cell in cells]
    return [opens, *ohlcv, opens + HOUR - 1, f"{cells[0] * cells[4]:.8f}", 12, "5.00000000", "500.00000000", "0"]


@pytest.fixture
def expected() -> Callable[[list[int]], list[list[float]]]:
    """What the service should have of these hours."""
    return lambda opens: [candle(each) for each in opens]


@dataclass
class Answer:
    """What the exchange says once, instead of candles."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


class Exchange:
    """Hourly candles from `listed` on, but for `missing` ones; asks of klines are noted."""

    def __init__(self, now: Callable[[], int]) -> None:
        self.now = now
        self.listed = 0
        self.missing: set[int] = set()
        self.late = 0  # ms after which a candle appears
        self.page = MAX_LIMIT  # rows at most, whatever is asked for
        self.symbols = ["BTCUSDT", "ETHUSDT"]
        self.delisted: set[str] = set()
        self.troubles: list[Answer] = []
        self.asked: list[dict[str, str]] = []
        self.server: ThreadingHTTPServer | None = None
        self.port = 0

    def start(self) -> None:
        exchange = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                answer = exchange.answer(parts.path, dict(parse_qsl(parts.query)))
                self.send_response(answer.status)
                headers = {"Content-Type": "application/json", "Content-Length": str(len(answer.body))}
                for name, value in (headers | answer.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body)
                self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    def answer(self, path: str, query: dict[str, str]) -> Answer:
        if path == "/api/v3/exchangeInfo":
            return _said({"timezone": "UTC", "symbols": [_market(symbol) for symbol in self.symbols]})
        if path == "/api/v3/time":
            return _said({"serverTime": self.now()})
        if path != "/api/v3/klines":
            return _said({"code": -1, "msg": f"unknown path {path}"}, 404)
        self.asked.append(query)
        if self.troubles:
            return self.troubles.pop(0)
        if query["symbol"] in self.delisted:
            return _said({"code": -1121, "msg": "Invalid symbol."}, 400)
        return _said(self.klines(query))

    def klines(self, query: dict[str, str]) -> list[list[Any]]:
        """The oldest candles from startTime on, the open one included."""
        limit = min(int(query.get("limit", 500)), MAX_LIMIT, self.page)
        last = min((self.now() - self.late) // HOUR * HOUR, int(query.get("endTime", 2**53)))
        first = max(-(-int(query["startTime"]) // HOUR) * HOUR, self.listed)
        there = (opens for opens in range(first, last + 1, HOUR) if opens not in self.missing)
        return [kline(opens) for opens, _ in zip(there, range(limit), strict=False)]


def _said(content: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content).encode())


def _market(symbol: str) -> dict[str, Any]:
    return {
        "symbol": symbol,
        "status": "TRADING",
        "baseAsset": symbol.removesuffix("USDT"),
        "baseAssetPrecision": 8,
        "quoteAsset": "USDT",
        "quotePrecision": 8,
        "quoteAssetPrecision": 8,
        "orderTypes": ["LIMIT", "MARKET"],
        "isSpotTradingAllowed": True,
        "isMarginTradingAllowed": False,
        "filters": [],
        "permissions": ["SPOT"],
        "permissionSets": [["SPOT"]],
    }


@pytest.fixture
def trouble(exchange: Exchange) -> Callable[..., None]:
    """The exchange's next answer to an ask for klines."""

    def add(status: int, body: str, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        exchange.troubles.append(Answer(status, body.encode(), named))

    return add


class Moving:
    """A clock that sleeps in no time; what a test wants to happen meanwhile, it puts into `meanwhile`."""

    def __init__(self) -> None:
        self.elapsed = 0.0
        self.began = (time.time() // 3600 - 24 * 30) * 3600 + 1800  # a month ago, at half past
        self.slept: list[float] = []
        self.meanwhile: list[Callable[[], None]] = []

    def time(self) -> float:
        return self.began + self.elapsed

    def steady(self) -> float:
        return self.elapsed

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.slept.append(seconds)
            if self.meanwhile:
                self.meanwhile.pop(0)()
        self.elapsed += seconds

    def now(self) -> int:
        return int(self.time() * 1000)


@pytest.fixture
def clock() -> Moving:
    return Moving()


@pytest.fixture
def exchange(clock: Moving) -> Iterator[Exchange]:
    server = Exchange(clock.now)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def binance(exchange: Exchange) -> Any:
    """ccxt's own Binance, sent to that exchange."""
    at = ccxt.binance({"options": {"fetchMarkets": {"types": ["spot"]}}, "enableRateLimit": False})
    at.urls["api"] = {**at.urls["api"], "public": f"http://127.0.0.1:{exchange.port}/api/v3"}
    return at

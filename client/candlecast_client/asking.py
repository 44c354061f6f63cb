"""Everything about a call but the socket: what is sent, how often, until when, and what its answer means.

A call is a generator: it yields what to send, or how many seconds to wait, is sent what came of it, and returns the
result. Whoever has a socket runs it, blocking or not.
"""

import hashlib
import math
import random
import re
import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, TypeVar, cast
from urllib.parse import quote, urlencode

import httpx
import pandas as pd

from candlecast_client.candles import Candles, frame_of, payload, requests_of, to_json
from candlecast_client.errors import CandlecastError, DeadlineExceeded, NoAnswer, error_of
from candlecast_client.forecast import Forecast
from candlecast_client.schema import (
    AccuracyAnswer,
    ForecastAnswer,
    ForecastOptions,
    ModelAccuracyAnswer,
    ModelsAnswer,
    PutCandlesAnswer,
)

T = TypeVar("T")
Instant = int | str | datetime  # UTC milliseconds, RFC 3339, or a date and time with its zone

_LONGEST: Final = 600.0  # seconds: what the service takes for a deadline
_SHORTEST: Final = 0.001
_FIRST_WAIT: Final = 0.25
_PASSING: Final = frozenset({429, 502, 503})
_PAGE: Final = 10_000  # candles in one answer
_COUNTS: Final = ("received", "new", "duplicate", "restated", "quarantined", "scored", "rescored")


class Deadline:
    """What is left of a call's time.

    It takes the place of httpx's timeouts, which each begin anew: the transport asks it before each step of an
    exchange, by the step's name, how many seconds that may take.
    """

    def __init__(self, seconds: float) -> None:
        if not 0 < seconds <= _LONGEST:
            raise ValueError(f"a timeout lies between 0 and {_LONGEST:g} seconds")
        self.seconds = seconds
        self._ends = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, below 0 once it is over."""
        return self._ends - time.monotonic()

    def get(self, step: str, default: float | None = None) -> float:
        """Seconds that a step of an exchange may take."""
        return max(self.left, _SHORTEST)


@dataclass(frozen=True)
class Send:
    """One request."""

    method: str
    url: str
    deadline: Deadline
    headers: dict[str, str]
    content: bytes | None = None


Outcome = httpx.Response | httpx.TransportError | None  # of a Send; None of a wait
Call = Generator[Send | float, Outcome, T]


@dataclass
class Kept:
    """The answers that were used last, of `size` calls at most."""

    size: int
    _answers: dict[Any, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, key: Any) -> Any:
        with self._lock:
            found = self._answers.pop(key, None)
            if found is not None:
                self._answers[key] = found
            return found

    def put(self, key: Any, answer: Any) -> None:
        with self._lock:
            self._answers.pop(key, None)
            self._answers[key] = answer
            while len(self._answers) > self.size:
                del self._answers[next(iter(self._answers))]


class Asking:
    """The calls to one service.

    Every one may be made again without harm: reading changes nothing, a forecast is a pure computation that is noted
    once, and candles that come twice are stored once.
    """

    def __init__(self, url: str, key: str | None, timeout: float, retries: int, keep_forecasts: bool) -> None:
        if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
            raise ValueError(f"{url} is no URL of a service: write http://127.0.0.1:8000")
        Deadline(timeout)
        self.url = url.rstrip("/")
        self.headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._timeout = timeout
        self._retries = retries
        self._keep_forecasts = keep_forecasts
        self._kept = Kept(256)

    def forecast(
        self, candles: Candles | None, symbol: str, timeout: float | None, options: ForecastOptions
    ) -> Call[Forecast]:
        body: dict[str, Any] = {**options} | ({} if candles is None else {"candles": payload(candles)})
        path = f"/forecast/{_segment(symbol)}"
        keep = self._keep_forecasts and options.get("cache") != "bypass"
        key = (path, hashlib.sha256(to_json(body)).digest()) if keep else None
        known: tuple[float, Forecast] | None = self._kept.get(key) if keep else None
        asked_at = time.monotonic()
        if known and asked_at < known[0]:
            return known[1]
        answer: ForecastAnswer = _read((yield from self._answer("POST", path, body=body, timeout=timeout, limit=True)))
        forecast = Forecast(answer)
        if keep and not answer["meta"]["degraded"]:
            lifetime = (answer["valid_until"] - answer["issued_at"]) / 1000  # by the service's clock alone
            self._kept.put(key, (asked_at + lifetime, forecast))
        return forecast

    def latest(self, symbol: str, model: str | None, interval: str | None, timeout: float | None) -> Call[Forecast]:
        path = f"/forecast/{_segment(symbol)}/latest" + _query(model=model, interval=interval)
        known: tuple[httpx.Headers, Forecast] | None = self._kept.get(path)
        headers = {"If-None-Match": known[0]["ETag"]} if known else {}
        response = yield from self._answer("GET", path, headers=headers, timeout=timeout)
        if response.status_code == httpx.codes.NOT_MODIFIED and known:
            return _issued_again(*known, response.headers)
        forecast = Forecast(_read(response))
        if "ETag" in response.headers:
            self._kept.put(path, (response.headers, forecast))
        return forecast

    def put_candles(
        self, symbol: str, candles: Candles, interval: str | None, calendar: str | None, time_is: str, restate: bool
    ) -> Call[PutCandlesAnswer]:
        """Many candles go in parts, each with a deadline of its own."""
        path = f"/candles/{_segment(symbol)}" + _query(restate="true" if restate else None)
        total: PutCandlesAnswer | None = None
        for part in requests_of(candles):
            body = {"candles": part, "interval": interval, "calendar": calendar, "time_is": time_is}
            answer: PutCandlesAnswer = _read((yield from self._answer("PUT", path, body=body)))
            interval = answer["interval"]  # as found in the first part, which is longer than the last may be
            total = answer if total is None else _sum(total, answer)
        assert total is not None
        return total

    def candles(self, symbol: str, interval: str | None, limit: int, before: Instant | None) -> Call[pd.DataFrame]:
        """More than fit into one answer come page by page, the newest first."""
        rows: list[Any] = []
        while True:
            asked = min(limit - len(rows), _PAGE)
            query = _query(interval=interval, limit=asked, before=before)
            page = _read((yield from self._answer("GET", f"/candles/{_segment(symbol)}{query}")))
            rows = page["candles"] + rows
            if len(rows) >= limit or len(page["candles"]) < asked:
                return frame_of(rows)
            interval, before = page["interval"], rows[0][0]

    def symbols(self) -> Call[pd.DataFrame]:
        told = _read((yield from self._answer("GET", "/symbols")))
        columns = ("symbol", "interval", "calendar", "first", "last")
        return _with_times(pd.DataFrame(told["symbols"], columns=columns), "first", "last")

    def served(self, symbol: str, interval: str | None, as_of: Instant | None, limit: int) -> Call[pd.DataFrame]:
        query = _query(interval=interval, as_of=as_of, limit=limit)
        told = _read((yield from self._answer("GET", f"/forecasts/{_segment(symbol)}{query}")))
        table = pd.DataFrame(told["rows"], columns=told["columns"])
        return _with_times(table, "timestamp", "issued_at", "target_timestamp")

    def accuracy(self, symbol: str, interval: str | None) -> Call[AccuracyAnswer]:
        path = f"/accuracy/{_segment(symbol)}{_query(interval=interval)}"
        return cast(AccuracyAnswer, _read((yield from self._answer("GET", path))))

    def accuracy_of_models(self) -> Call[list[ModelAccuracyAnswer]]:
        return cast(list[ModelAccuracyAnswer], _read((yield from self._answer("GET", "/accuracy")))["models"])

    def models(self) -> Call[ModelsAnswer]:
        return cast(ModelsAnswer, _read((yield from self._answer("GET", "/models"))))

    def stream_url(self, symbol: str, model: str | None, interval: str | None) -> str:
        return f"{self.url}/forecast/{_segment(symbol)}/stream{_query(model=model, interval=interval)}"

    def _answer(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        limit: bool = False,
    ) -> Call[httpx.Response]:
        """The answer to one of several tries, none of which begins when it could not end in time.

        `limit` tells the service the deadline, so that it computes nothing that nobody waits for; equal requests in
        equal bytes, which it answers fastest.
        """
        deadline = Deadline(self._timeout if timeout is None else timeout)
        sent = {**self.headers, **(headers or {}), **({} if body is None else {"Content-Type": "application/json"})}
        wait, tries_left, left = _FIRST_WAIT, self._retries, deadline.seconds
        while True:
            told = {**body, "timeout_ms": math.ceil(1000 * left)} if body is not None and limit else body
            content = None if told is None else to_json(told)
            outcome = yield Send(method, self.url + path, deadline, sent, content)
            assert outcome is not None
            error = failure_of(outcome, self.url, deadline.seconds)
            if error is None:
                return cast(httpx.Response, outcome)
            pause = max(error.retry_after or 0.0, wait * random.uniform(0.5, 1))  # callers that were refused together
            if not passes(error) or not tries_left or pause >= deadline.left:
                raise error
            yield pause
            wait, tries_left, left = 2 * wait, tries_left - 1, max(deadline.left, _SHORTEST)


def failure_of(outcome: httpx.Response | httpx.TransportError, url: str, seconds: float) -> CandlecastError | None:
    """What went wrong, if anything did."""
    if isinstance(outcome, httpx.Response):
        fine = outcome.is_success or outcome.status_code == httpx.codes.NOT_MODIFIED
        return None if fine else error_of(outcome)
    error: CandlecastError
    if isinstance(outcome, httpx.TimeoutException):
        error = DeadlineExceeded(f"{url} did not answer within {seconds:g} s", code="deadline_exceeded")
    else:
        error = NoAnswer(f"{url} does not answer: {str(outcome) or type(outcome).__name__}", code="no_answer")
    error.__cause__ = outcome
    return error


def passes(error: CandlecastError) -> bool:
    """Whether the same request may be answered a little later."""
    return error.status in _PASSING or (error.status is None and not isinstance(error, DeadlineExceeded))


def _read(response: httpx.Response) -> Any:
    """The object that an answer holds."""
    try:
        told = response.json()
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise NoAnswer(f"{response.url} answers something else than Candlecast", code="unknown_answer")
    return told


def _issued_again(before: httpx.Headers, forecast: Forecast, now: httpx.Headers) -> Forecast:
    """A forecast that is still the newest, with what passes as the service tells it now."""
    passed = int(now.get("Age", 0)) - int(before.get("Age", 0))
    degraded = [name for name in now.get("Candlecast-Degraded", "").split(", ") if name]
    answer = forecast.answer
    again: ForecastAnswer = {
        **answer,
        "issued_at": answer["issued_at"] + 1000 * passed,
        "data_age_seconds": answer["data_age_seconds"] + passed,
        "meta": {**answer["meta"], "degraded": degraded},
    }
    return Forecast(again)


def _sum(total: PutCandlesAnswer, answer: PutCandlesAnswer) -> PutCandlesAnswer:
    counts = {name: total[name] + answer[name] for name in _COUNTS}
    warnings = list(dict.fromkeys([*total["warnings"], *answer["warnings"]]))
    return cast(PutCandlesAnswer, {**answer, **counts, "warnings": warnings})


def _with_times(table: pd.DataFrame, *names: str) -> pd.DataFrame:
    return table.assign(**{name: pd.to_datetime(table[name], unit="ms", utc=True) for name in names})


def _segment(symbol: str) -> str:
    """A symbol as one segment of a path: `BTC/USDT` too."""
    if not symbol.strip(". "):
        raise ValueError("name a symbol, such as AAPL or BTC/USDT")
    return quote(symbol, safe="")


def _query(**values: Instant | None) -> str:
    told = {
        name: value.isoformat() if isinstance(value, datetime) else str(value)
        for name, value in values.items()
        if value is not None
    }
    return f"?{urlencode(told)}" if told else ""

"""The two clients: the same calls, made by a blocking socket and by one that is awaited."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Literal, Self, TypeVar, Unpack, cast

import httpx
import pandas as pd

from candlecast_client.asking import Asking, Call, Instant, Outcome, Send
from candlecast_client.candles import Candles
from candlecast_client.events import Tail
from candlecast_client.forecast import Forecast
from candlecast_client.schema import (
    AccuracyAnswer,
    ForecastOptions,
    ModelAccuracyAnswer,
    ModelsAnswer,
    PutCandlesAnswer,
)

T = TypeVar("T")

URL = "http://127.0.0.1:8000"
TIMEOUT = 30.0  # seconds
RETRIES = 3
PATIENCE = 120.0  # seconds
TimeIs = Literal["open", "close"]


class Candlecast:
    """A service at `url`; `key` is sent as a bearer token. Threads may share it.

    A call ends after `timeout` seconds at the latest, all tries and waits together. What is busy (429, 502, 503) or
    hangs up is tried again up to `retries` times, after what Retry-After asks for; no call does harm twice.
    `keep_forecasts` answers equal requests from memory for as long as a forecast is valid, whatever candles the
    service's history has got meanwhile. `http` replaces the HTTP client, for proxies or certificates; it stays yours
    to close. Every call raises CandlecastError, and ValueError for what no service would take.
    """

    def __init__(
        self,
        url: str = URL,
        key: str | None = None,
        *,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
        keep_forecasts: bool = False,
        http: httpx.Client | None = None,
    ) -> None:
        self._asking = Asking(url, key, timeout, retries, keep_forecasts)
        self._http = http or httpx.Client()
        self._owned = http is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        if self._owned:
            self._http.close()

    def forecast(
        self,
        candles: Candles | None = None,
        *,
        symbol: str,
        timeout: float | None = None,
        **options: Unpack[ForecastOptions],
    ) -> Forecast:
        """What comes after these candles, by default those that the service has of the symbol.

        `candles` is a frame (`from_frame` says which), or rows as exchanges give them. An open last candle is left out
        by the service, with a warning.
        """
        return self._run(self._asking.forecast(candles, symbol, timeout, options))

    def latest(
        self, symbol: str, *, model: str | None = None, interval: str | None = None, timeout: float | None = None
    ) -> Forecast:
        """The newest forecast of a watched symbol, at once; the same one is not sent again."""
        return self._run(self._asking.latest(symbol, model, interval, timeout))

    def stream(
        self, symbol: str, *, model: str | None = None, interval: str | None = None, patience: float = PATIENCE
    ) -> Iterator[Forecast]:
        """The newest forecast of a watched symbol, then each later one as it is made, over lost connections too.

        CandlecastError once the service has given no sign of life for `patience` seconds.
        """
        tail = Tail(self._asking.stream_url(symbol, model, interval), self._asking.headers, patience)
        while True:
            try:
                with self._http.stream("GET", tail.url, headers=tail.headers(), timeout=tail.timeout) as response:
                    if response.is_success:
                        for line in response.iter_lines():
                            if (forecast := tail.read(line)) is not None:
                                yield forecast
                    else:
                        response.read()
                outcome: httpx.Response | httpx.TransportError = response
            except httpx.TransportError as error:
                outcome = error
            time.sleep(tail.ended(outcome))

    def put_candles(
        self,
        symbol: str,
        candles: Candles,
        *,
        interval: str | None = None,
        calendar: str | None = None,
        time_is: TimeIs = "open",
        restate: bool = False,
    ) -> PutCandlesAnswer:
        """Store closed candles, which scores the forecasts that they close; again and in any order, as you like."""
        return self._run(self._asking.put_candles(symbol, candles, interval, calendar, time_is, restate))

    def candles(
        self, symbol: str, *, interval: str | None = None, limit: int = 500, before: Instant | None = None
    ) -> pd.DataFrame:
        """The newest stored candles that open before an instant, oldest first, indexed by their opens."""
        return self._run(self._asking.candles(symbol, interval, limit, before))

    def symbols(self) -> pd.DataFrame:
        """Every stored series: symbol, interval, calendar, and the opens of its first and last candle."""
        return self._run(self._asking.symbols())

    def served(
        self, symbol: str, *, interval: str | None = None, as_of: Instant | None = None, limit: int = 10_000
    ) -> pd.DataFrame:
        """The steps of served forecasts, as they were issued by then; `target_timestamp` is the candle they are of."""
        return self._run(self._asking.served(symbol, interval, as_of, limit))

    def accuracy(self, symbol: str, *, interval: str | None = None) -> AccuracyAnswer:
        """What a symbol's forecasts were worth, beside the naive forecast's."""
        return self._run(self._asking.accuracy(symbol, interval))

    def accuracy_of_models(self) -> list[ModelAccuracyAnswer]:
        """What each model's forecasts were worth over all symbols."""
        return self._run(self._asking.accuracy_of_models())

    def models(self) -> ModelsAnswer:
        """What can be asked for, and what cannot and why."""
        return self._run(self._asking.models())

    def _run(self, call: Call[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = call.send(outcome)
            except StopIteration as end:
                return cast(T, end.value)
            if isinstance(step, Send):
                outcome = self._send(step)
            else:
                outcome = None
                time.sleep(step)

    def _send(self, send: Send) -> httpx.Response | httpx.TransportError:
        try:
            return self._http.send(_request(self._http, send))
        except httpx.TransportError as error:
            return error


class AsyncCandlecast:
    """Candlecast for asyncio: the same calls and arguments, awaited."""

    def __init__(
        self,
        url: str = URL,
        key: str | None = None,
        *,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
        keep_forecasts: bool = False,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        self._asking = Asking(url, key, timeout, retries, keep_forecasts)
        self._http = http or httpx.AsyncClient()
        self._owned = http is None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Hang up."""
        if self._owned:
            await self._http.aclose()

    async def forecast(
        self,
        candles: Candles | None = None,
        *,
        symbol: str,
        timeout: float | None = None,
        **options: Unpack[ForecastOptions],
    ) -> Forecast:
        """As Candlecast.forecast."""
        return await self._run(self._asking.forecast(candles, symbol, timeout, options))

    async def latest(
        self, symbol: str, *, model: str | None = None, interval: str | None = None, timeout: float | None = None
    ) -> Forecast:
        """As Candlecast.latest."""
        return await self._run(self._asking.latest(symbol, model, interval, timeout))

    async def stream(
        self, symbol: str, *, model: str | None = None, interval: str | None = None, patience: float = PATIENCE
    ) -> AsyncIterator[Forecast]:
        """As Candlecast.stream."""
        tail = Tail(self._asking.stream_url(symbol, model, interval), self._asking.headers, patience)
        while True:
            try:
                async with self._http.stream("GET", tail.url, headers=tail.headers(), timeout=tail.timeout) as response:
                    if response.is_success:
                        async for line in response.aiter_lines():
                            if (forecast := tail.read(line)) is not None:
                                yield forecast
                    else:
                        await response.aread()
                outcome: httpx.Response | httpx.TransportError = response
            except httpx.TransportError as error:
                outcome = error
            await asyncio.sleep(tail.ended(outcome))

    async def put_candles(
        self,
        symbol: str,
        candles: Candles,
        *,
        interval: str | None = None,
        calendar: str | None = None,
        time_is: TimeIs = "open",
        restate: bool = False,
    ) -> PutCandlesAnswer:
        """As Candlecast.put_candles."""
        return await self._run(self._asking.put_candles(symbol, candles, interval, calendar, time_is, restate))

    async def candles(
        self, symbol: str, *, interval: str | None = None, limit: int = 500, before: Instant | None = None
    ) -> pd.DataFrame:
        """As Candlecast.candles."""
        return await self._run(self._asking.candles(symbol, interval, limit, before))

    async def symbols(self) -> pd.DataFrame:
        """As Candlecast.symbols."""
        return await self._run(self._asking.symbols())

    async def served(
        self, symbol: str, *, interval: str | None = None, as_of: Instant | None = None, limit: int = 10_000
    ) -> pd.DataFrame:
        """As Candlecast.served."""
        return await self._run(self._asking.served(symbol, interval, as_of, limit))

    async def accuracy(self, symbol: str, *, interval: str | None = None) -> AccuracyAnswer:
        """As Candlecast.accuracy."""
        return await self._run(self._asking.accuracy(symbol, interval))

    async def accuracy_of_models(self) -> list[ModelAccuracyAnswer]:
        """As Candlecast.accuracy_of_models."""
        return await self._run(self._asking.accuracy_of_models())

    async def models(self) -> ModelsAnswer:
        """As Candlecast.models."""
        return await self._run(self._asking.models())

    async def _run(self, call: Call[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = call.send(outcome)
            except StopIteration as end:
                return cast(T, end.value)
            if isinstance(step, Send):
                outcome = await self._send(step)
            else:
                outcome = None
                await asyncio.sleep(step)

    async def _send(self, send: Send) -> httpx.Response | httpx.TransportError:
        try:
            return await self._http.send(_request(self._http, send))
        except httpx.TransportError as error:
            return error


def _request(http: httpx.Client | httpx.AsyncClient, send: Send) -> httpx.Request:
    step = {"timeout": send.deadline}
    return http.build_request(send.method, send.url, content=send.content, headers=send.headers, extensions=step)

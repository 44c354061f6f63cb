"""What is forecast before anybody asks: the entries of CANDLECAST_WATCH, each with its newest forecast."""

import asyncio
import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from pydantic import ValidationError

from service.api.answers import Found, whole_answer
from service.api.errors import NotWatched, TooManyStreams
from service.api.schemas import ForecastRequest, TimingsMs, normalise_symbol
from service.engine.repeats import Facts, Repeat
from service.metrics import Metrics

_GRAMMAR: Final = "SYMBOL[@INTERVAL][:MODEL[:HORIZON]], such as AAPL:kronos:30 or BTC-USDT@1h:auto"
_NO_TIME: Final = TimingsMs(queue=0, batch=0, prepare=0, run=0, finish=0, total=0)


@dataclass(frozen=True)
class WatchEntry:
    """One entry of CANDLECAST_WATCH: a symbol, and what a POST for its forecast would ask."""

    symbol: str
    request: ForecastRequest


def parse_watch(text: str) -> tuple[WatchEntry, ...]:
    """The entries of a list with commas; ValueError says which one is wrong, and what is right."""
    entries = tuple(_entry(part.strip()) for part in text.split(",") if part.strip())
    names = [(entry.symbol, entry.request.interval, entry.request.model) for entry in entries]
    for name in names:
        if names.count(name) > 1:  # a caller could not say which of them is meant
            raise ValueError(f"{name[0]} is listed twice with one interval and model")
    return entries


def _entry(text: str) -> WatchEntry:
    series, *asked = text.split(":")
    symbol, at, interval = series.partition("@")
    fields: dict[str, str | int | None] = dict(zip(("model", "horizon"), asked, strict=False))
    if at:
        fields["interval"] = interval
    if (horizon := str(fields.get("horizon", ""))).isdecimal():
        fields["horizon"] = int(horizon)
    try:
        if len(asked) > 2:
            raise ValueError("an entry has three parts at most")
        return WatchEntry(normalise_symbol(symbol), ForecastRequest.model_validate(fields))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{text!r}: {first['loc'][0]}: {first['msg']}; an entry is {_GRAMMAR}") from None
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}; an entry is {_GRAMMAR}") from None


@dataclass(frozen=True)
class Latest:
    """A watched forecast, ready to be answered for as long as `repeat` holds."""

    found: Found
    facts: Facts
    repeat: Repeat
    since: int  # UTC ms: it was the newest from then on

    @cached_property
    def name(self) -> str:
        """The same wherever and whenever the forecast is: what it knows, and a digest of what it says."""
        return f"{self.facts.as_of}-{hashlib.sha256(self.found.kept.body).hexdigest()[:16]}"

    def degraded(self, service: tuple[str, ...], stale: bool) -> tuple[str, ...]:
        """What is out of order now: with the service, with the runtime that computed this, and with its age."""
        own = [name for name in ("runtime",) if name in self.facts.degraded]
        return (*service, *own, *(["stale"] if stale else []))

    def body(self, now: int, degraded: tuple[str, ...]) -> bytes:
        """The JSON of a ForecastAnswer that is issued now."""
        return whole_answer(self.found, replace(self.facts, degraded=degraded), now, _NO_TIME)


class Watched:
    """One entry and what became of it; `touched` wakes whoever computes it."""

    def __init__(self, entry: WatchEntry) -> None:
        self.entry = entry
        self.latest: Latest | None = None
        self.outdated = False
        self.touched = asyncio.Event()
        self._published = asyncio.Event()
        self._drained = False

    @property
    def interval(self) -> str | None:
        """Of the entry, else of its forecast; None while it is not known."""
        return self.entry.request.interval or (self.latest.repeat.series[1] if self.latest else None)

    def is_stale(self, now: int) -> bool:
        """Candles came, or something else happened that the newest forecast does not know of."""
        fresh = self.latest is not None and self.latest.repeat.covers(now)
        return self.outdated or self.touched.is_set() or not fresh

    def publish(self, latest: Latest) -> bool:
        """Take the newest forecast; False if it is what there was already."""
        known, self.latest, self.outdated = self.latest, latest, False
        if known and known.name == latest.name:
            self.latest = replace(latest, since=known.since)
            return False
        self._wake()
        return True

    async def after(self, name: str | None) -> Latest | None:
        """The newest forecast as soon as it has another name, whatever came in between; None once drained."""
        while not self._drained:
            if self.latest and self.latest.name != name:
                return self.latest
            await self._published.wait()
        return None

    def drain(self) -> None:
        """Let nobody wait for another forecast."""
        self._drained = True
        self._wake()

    def _wake(self) -> None:
        self._published.set()
        self._published = asyncio.Event()


class WatchList:
    """Every watched entry, in the order of the setting, and how many callers stream them."""

    def __init__(self, entries: Sequence[WatchEntry], max_streams: int, metrics: Metrics) -> None:
        self.watched = tuple(Watched(entry) for entry in entries)
        self._max_streams = max_streams
        self._open = 0
        metrics.streams.set_function(lambda: self._open)

    def find(self, symbol: str, model: str | None, interval: str | None) -> Watched:
        """The first entry that fits; NotWatched if none does."""
        of_symbol = [each for each in self.watched if each.entry.symbol == symbol]
        for each in of_symbol:
            if model in (None, each.entry.request.model) and interval in (None, each.interval or interval):
                return each
        what = "with this model and interval" if of_symbol else "with any model"
        raise NotWatched(f"{symbol} is not on the watch list {what}")

    def touch(self, symbol: str, interval: str) -> None:
        """Candles came: what is forecast of them is out of date."""
        for each in self.watched:
            if each.entry.symbol == symbol and each.entry.request.interval in (None, interval):
                each.touched.set()

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """A place among the open streams; TooManyStreams if there is none."""
        if self._open >= self._max_streams:
            raise TooManyStreams("as many streams are open as may be")
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    def drain(self) -> None:
        """End every stream."""
        for each in self.watched:
            each.drain()

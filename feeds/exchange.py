"""An exchange, asked through ccxt -> the service: its history first, then every candle as soon as it has closed."""

import contextlib
import difflib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType
from typing import Any, Final

import numpy as np

from feeds.put import COUNTS, FOREVER, Put, Refused, Service
from models.candles import Floats, Millis, candle_faults, interval_ms, interval_name

try:
    import ccxt
except ImportError as error:
    raise RuntimeError("a feed asks exchanges through ccxt: pip install 'candlecast[feeds]'") from error

CLOSED_AFTER_MS: Final = 2_000  # an exchange goes on counting trades into a candle for a moment
_PAGE: Final = 500  # candles, where ccxt does not know the exchange's own limit
_LONGEST_PAGE: Final = 1000
_CLOCK_SECONDS: Final = 3600  # how long a comparison with the exchange's clock holds
_FIRST_WAIT: Final = 1.0
_LONGEST_WAIT: Final = 60.0
_TIMEOUT_MS: Final = 20_000
_UNREADABLE: Final = (ValueError, TypeError, LookupError, AttributeError)  # out of ccxt, over an answer cut short
_FINAL: Final = (  # nothing that time heals, where it comes at once; later it is one symbol's own misfortune
    ccxt.AuthenticationError,
    ccxt.BadRequest,
    ccxt.ArgumentsRequired,
    ccxt.NotSupported,
    ccxt.OperationRejected,
    Refused,
)


class FeedError(RuntimeError):
    """The feed cannot begin, or `once` cannot end; the message says what to do."""


class Stopped(BaseException):
    """Somebody wants the process to end. Past every `except Exception`, as KeyboardInterrupt is."""


class Clock:
    """The machine's clocks, in seconds."""

    def time(self) -> float:
        """Since 1970; it may jump."""
        return time.time()

    def steady(self) -> float:
        """Since some moment; it never jumps."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Return so much later."""
        time.sleep(seconds)


class Signals(Clock):
    """SIGTERM and SIGINT as Stopped, wherever the process is: what was being sent may be sent again."""

    def __init__(self) -> None:
        self.stopped = False

    def sleep(self, seconds: float) -> None:
        if self.stopped:  # the exception may have been raised where Python drops it, as in a destructor
            raise Stopped
        super().sleep(seconds)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Leaves the context quietly when a signal comes."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, self._stop) for number in numbers]
        try:
            yield
        except Stopped:
            pass
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self.stopped:
            self.stopped = True
            raise Stopped


@dataclass(frozen=True)
class Batch:
    """Candles of one series that the service has taken."""

    symbol: str
    interval: str
    first: int
    last: int
    put: Put

    def as_json(self) -> str:
        times = {"first": self.first, "last": self.last}
        counts = {name: self.put.counts[name] for name in COUNTS}
        return json.dumps({"symbol": self.symbol, "interval": self.interval, **times, **counts})

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name in COUNTS if (count := self.put.counts[name]))
        return f"{self.symbol} {self.interval} {_utc(self.first)} to {_utc(self.last)}: {counts}"


@dataclass
class _Series:
    """What a feed knows about one symbol. Instants are milliseconds, `due` and `failing` those of a steady clock."""

    symbol: str
    since: int | None = None  # the first candle that is wanted; None until the service was asked
    due: float = 0.0
    wait: float = _FIRST_WAIT
    failing: float | None = None
    answered: bool = False  # the exchange and the service both did, without fault
    filled: bool = False


class Feed:
    """Polls one exchange for the closed candles of some symbols and PUTs them, oldest first, none twice."""

    def __init__(
        self,
        exchange: Any,
        service: Service,
        symbols: Sequence[str],
        interval: str,
        *,
        history: int = 500,
        patience: float = FOREVER,
        log: Callable[[Batch], None],
        warn: Callable[[str], None],
        clock: Clock | None = None,
    ) -> None:
        self._exchange = exchange
        self._exchange.enableLastJsonResponse = True
        self._service = service
        self._series = [_Series(symbol) for symbol in dict.fromkeys(symbols)]
        self._timeframe = _timeframe(exchange, interval)
        self._interval = interval_name(interval_ms(interval))
        self._step = interval_ms(interval)
        self._history = history
        self._patience = patience
        self._log = log
        self._warn = warn
        self._clock = clock or Clock()
        self._ahead = 0  # ms that the exchange's clock is before ours
        self._compared = -math.inf

    def run(self, *, once: bool = False) -> None:
        """Fill and follow until Stopped; with `once` until every symbol is filled.

        FeedError at what waiting cannot mend, and where a symbol's `patience` seconds were not enough.
        """
        self._load_markets()
        waiting = list(self._series)
        while waiting:
            series = min(waiting, key=lambda each: each.due)
            self._clock.sleep(max(0.0, series.due - self._clock.steady()))
            self._visit(series)
            if once and series.filled:
                waiting.remove(series)

    def _load_markets(self) -> None:
        """What the exchange trades; an unknown symbol is an error that names its neighbours."""
        everything = _Series(self._exchange.id)
        while not self._attempt(everything, lambda: self._asked(self._exchange.load_markets)):
            self._clock.sleep(max(0.0, everything.due - self._clock.steady()))
        markets = self._exchange.markets or {}
        for series in self._series:
            if series.symbol not in markets:
                series.symbol = series.symbol.upper()
            if series.symbol not in markets:
                near = difflib.get_close_matches(series.symbol, markets, 3)
                hint = f"; it has {', '.join(near)}" if near else ""
                raise FeedError(f"{self._exchange.id} has no {series.symbol}{hint}")

    def _visit(self, series: _Series) -> None:
        """Everything that has closed since the last visit, and when the next one is due."""
        series.filled = False
        if self._attempt(series, lambda: self._fill(series)):
            series.filled = True
            series.due = self._clock.steady() + self._until_next(series)

    def _attempt(self, series: _Series, work: Callable[[], object]) -> bool:
        """Whether the work was done; where something failed that may pass, it is due again after a pause."""
        try:
            work()
        except (ccxt.RateLimitExceeded, ccxt.DDoSProtection) as error:
            self._postpone(series, _brief(error), everyone=True)
        except (ccxt.BaseError, Refused) as error:
            if isinstance(error, _FINAL) and not series.answered:
                raise FeedError(f"{series.symbol}: {_brief(error)}") from error
            self._postpone(series, _brief(error))
        else:
            series.failing = None
            return True
        return False

    def _postpone(self, series: _Series, why: str, *, everyone: bool = False) -> None:
        """Due again later, at every failure in a row twice as late; `everyone` waits where the exchange asks it."""
        now = self._clock.steady()
        pause = max(series.wait, self._retry_after() if everyone else 0.0)
        series.failing = now if series.failing is None else series.failing
        if now + pause - series.failing > self._patience:
            raise FeedError(f"{series.symbol}: {why}")
        self._warn(f"{series.symbol} {self._interval}: {why}; trying again in {pause:g} s")
        for each in (series, *self._series) if everyone else (series,):
            each.due = max(each.due, now + pause)
        series.wait = min(2 * series.wait, _LONGEST_WAIT)

    def _fill(self, series: _Series) -> None:
        """PUT page after page until the newest closed candle is stored."""
        self._compare_clocks()
        if series.since is None:
            stored = self._service.newest(series.symbol, self._interval)
            oldest = (self._now() // self._step - self._history) * self._step
            series.since = oldest if stored is None else stored + self._step
        limit = min(self._exchange.feature_value(series.symbol, "fetchOHLCV", "limit") or _PAGE, _LONGEST_PAGE)
        while (now := self._now()) >= self._closes(series.since):
            timestamps, candles, following = self._page(series, series.since, now, limit)
            if len(timestamps):
                put = self._service.put(series.symbol, timestamps, candles, self._interval)
                self._log(Batch(series.symbol, self._interval, int(timestamps[0]), int(timestamps[-1]), put))
            elif following == series.since:
                if self._closes(series.since + limit * self._step) > now:
                    break
                following += limit * self._step  # nothing was traded for a page, or it was not listed yet
            series.since, series.failing, series.wait = following, None, _FIRST_WAIT
        series.answered = True

    def _page(self, series: _Series, since: int, now: int, limit: int) -> tuple[Millis, Floats, int]:
        """The closed candles of one answer, `[T]` opens and `[T, 5]` rows, and where the next page begins."""
        table = self._asked(self._rows, series.symbol, since, limit)
        opens = table[:, 0].astype(np.int64)
        _, first = np.unique(opens, return_index=True)  # rising, none twice
        closed = first[(opens[first] >= since) & (self._closes(opens[first]) <= now)]
        candles = table[closed, 1:]
        good = ~np.any([broken for broken, _ in candle_faults(candles)], axis=0)
        if not good.all():
            self._warn(f"{series.symbol} {self._interval}: {int((~good).sum())} rows are no candles and are left out")
        following = int(opens[closed[-1]]) + self._step if len(closed) else since
        return opens[closed[good]], candles[good], following

    def _rows(self, symbol: str, since: int, limit: int) -> Floats:
        """`[T, 6]` opening instants and candles as the exchange sends them, the open one included."""
        rows = self._exchange.fetch_ohlcv(symbol, self._timeframe, since, limit)
        if not rows and self._exchange.last_json_response is None:
            raise ValueError("no JSON")  # which ccxt takes for no candles, and these would be left out for good
        table = np.array([row[:6] for row in rows], dtype=np.float64).reshape(-1, 6)
        if not np.isfinite(table[:, 0]).all():
            raise ValueError("a candle has no timestamp")
        return table

    def _asked(self, work: Callable[..., Any], *words: Any) -> Any:
        """The exchange's answer; one that ccxt trips over is a failure like any other."""
        try:
            return work(*words)
        except _UNREADABLE as error:
            raise ccxt.BadResponse(f"{self._exchange.id} sent something unreadable: {error}") from error

    def _compare_clocks(self) -> None:
        """Whether a candle has closed, the exchange's clock decides where it shows it."""
        if self._exchange.has.get("fetchTime") is not True or self._clock.steady() - self._compared < _CLOCK_SECONDS:
            return
        with contextlib.suppress(ccxt.BaseError):  # ours must do; what is wrong, the next request will say
            self._ahead = int(self._asked(self._exchange.fetch_time)) - int(self._clock.time() * 1000)
        self._compared = self._clock.steady()

    def _now(self) -> int:
        return int(self._clock.time() * 1000) + self._ahead

    def _closes(self, opens: Any) -> Any:
        """When candles that open then are complete."""
        return opens + self._step + CLOSED_AFTER_MS

    def _until_next(self, series: _Series) -> float:
        """Seconds until the next candle is complete; one that is late is asked for ever more seldom."""
        assert series.since is not None
        ahead = (self._closes(series.since) - self._now()) / 1000
        if ahead > 0:
            series.wait = _FIRST_WAIT
            return float(ahead)
        series.wait = min(2 * series.wait, _LONGEST_WAIT)
        return float(min(series.wait, ahead % (self._step / 1000) or series.wait))

    def _retry_after(self) -> float:
        headers = self._exchange.last_response_headers or {}
        seconds = str(headers.get("Retry-After", ""))
        return float(seconds) if seconds.isdigit() else 0.0


def connect(name: str) -> Any:
    """ccxt's exchange of that name, which needs no key: candles are public."""
    if name not in ccxt.exchanges:
        near = difflib.get_close_matches(name, ccxt.exchanges, 3)
        raise FeedError(f"ccxt knows no exchange {name}" + (f"; it knows {', '.join(near)}" if near else ""))
    exchange = getattr(ccxt, name)({"timeout": _TIMEOUT_MS, "requests_trust_env": True})  # HTTPS_PROXY counts
    if exchange.has.get("fetchOHLCV") is not True:
        raise FeedError(f"{name} publishes no candles")
    return exchange


def _timeframe(exchange: Any, interval: str) -> str:
    """What the exchange calls an interval."""
    offered: dict[int, str] = {}
    for name in exchange.timeframes or {}:
        with contextlib.suppress(ValueError):  # months and seconds
            offered[interval_ms(name)] = name
    if interval_ms(interval) not in offered:
        raise FeedError(f"{exchange.id} has no candles of {interval}; it has {', '.join(offered.values())}")
    return offered[interval_ms(interval)]


def _brief(error: BaseException) -> str:
    told = " ".join(f"{error}".split())[:200]
    return told if isinstance(error, Refused) else f"{type(error).__name__}: {told}"


def _utc(instant: int) -> str:
    return f"{datetime.fromtimestamp(instant / 1000, UTC):%Y-%m-%d %H:%M}"

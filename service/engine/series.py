"""Which candles count: on their calendar's grid, closed by the instant of knowledge, none from the future."""

import asyncio
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np

from models.calendars import Calendar, get_calendar, infer_calendar
from models.candles import Floats, InvalidCandles, Millis, interval_ms, interval_name
from service.engine.revisions import Revision

CLOCK_SKEW_MS: Final = 10_000  # an exchange's clock may run this far ahead of ours
AUTO: Final = "auto"
_NEW_YORK: Final = "XNYS"
_built: Final[set[str]] = set()  # calendars whose use takes microseconds


@dataclass(frozen=True)
class Series:
    """Valid candles of one symbol, `[T]` opens beside `[T, 6]`, with what a caller should know about them."""

    symbol: str
    interval: str
    calendar: Calendar
    timestamps: Millis
    candles: Floats
    source: Literal["body", "history"]
    warnings: tuple[str, ...] = field(default=())
    next_close: int | None = None  # of the first candle that was left out because it had not closed
    unclosed: int = 0  # candles left out for that
    revision: Revision | None = None  # of the history that it was read from

    @property
    def as_of(self) -> int:
        """When the last candle closed."""
        return int(self.calendar.closes(self.timestamps[-1:], self.interval)[0])


async def load_calendar(name: str) -> Calendar:
    """The calendar of that name; an exchange's first use takes a second, off the event loop."""
    if name not in _built:
        await asyncio.to_thread(get_calendar, name)
        _built.add(name)
    return get_calendar(name)


async def infer(timestamps: Millis, interval: str) -> str:
    """The name of the calendar that explains the candles."""
    if _NEW_YORK in _built:
        return infer_calendar(timestamps, interval)
    return await asyncio.to_thread(infer_calendar, timestamps, interval)


async def opens_from_closes(closes: Millis, interval: str, calendar: str) -> Millis:
    """Opening instants of candles that were labelled with their closes; 09:59:59.999 means 10:00."""
    closes = np.where(closes % 1000 == 999, closes + 1, closes)
    if calendar != AUTO:
        return (await load_calendar(calendar)).opens(closes, interval)
    shifted = closes - interval_ms(interval)
    if await infer(shifted, interval) != _NEW_YORK:
        at_sessions = (await load_calendar(_NEW_YORK)).opens(closes, interval)
        if (np.diff(at_sessions) > 0).all() and await infer(at_sessions, interval) == _NEW_YORK:
            return at_sessions
    return shifted


def infer_interval(timestamps: Millis) -> str | None:
    """The most common step between candles, None where there is none that has a name."""
    if len(timestamps) < 2:
        return None
    steps, counts = np.unique(np.diff(timestamps), return_counts=True)
    try:
        return interval_name(int(steps[counts.argmax()]))
    except ValueError:
        return None


def opens_in_future(timestamps: Millis, now: int) -> int | None:
    """The first row that has not opened yet, if there is one."""
    future = timestamps > now + CLOCK_SKEW_MS
    return int(future.argmax()) if future.any() else None


def closed_by(series: Series, instant: int) -> Series:
    """The series without the candles that had not closed at an instant."""
    closes = series.calendar.closes(series.timestamps, series.interval)
    known = int((closes <= instant).sum())
    if known == len(closes):
        return series
    return replace(
        series, timestamps=series.timestamps[:known], candles=series.candles[:known], next_close=int(closes[known])
    )


def stale_from(calendar: Calendar, interval: str, timestamps: Millis, intervals: int = 3) -> int:
    """The instant from which so many further candles have closed since the last one that a forecast is of the past."""
    try:
        later = calendar.following(timestamps, interval, intervals)
        return int(calendar.closes(later[-1:], interval)[0]) + 1
    except InvalidCandles:  # the calendar ends here
        return 0

"""The candles that a request means: those in its body, or the stored history of the symbol."""

from dataclasses import replace
from typing import Final

import numpy as np

from models.candles import InvalidCandles, Millis, check_timestamps
from service.api.candle_formats import ParsedCandles, parse_candles, parse_instant
from service.api.errors import InputError
from service.api.schemas import ForecastRequest, PutCandlesRequest
from service.engine.history import History, StoredCalendar, UnknownSymbol
from service.engine.series import (
    AUTO,
    Series,
    closed_by,
    infer,
    infer_interval,
    load_calendar,
    opens_from_closes,
    opens_in_future,
)

_LONGEST_INSTANT: Final = 16  # digits; int() itself refuses thousands of them with an error of its own
_EXAMINED: Final = 4096  # newest stored candles that fresh ones must agree with


def instant_of_knowledge(as_of: int | str | None, now: int) -> int:
    """The request's `as_of`, by default now."""
    if as_of is None:
        return now
    instant = parse_instant(as_of, "/as_of")
    if instant > now:
        raise InputError("as_of lies in the future", "/as_of", "future_timestamp")
    return instant


def instant_in_query(text: str, parameter: str) -> int:
    """Milliseconds, or a date and time, from a query string."""
    number = text.isascii() and text.isdecimal() and len(text) <= _LONGEST_INSTANT
    return parse_instant(int(text) if number else text, parameter)


async def candles_in_body(symbol: str, request: ForecastRequest, now: int) -> Series:
    """The request's own candles that had closed by its `as_of`."""
    assert request.candles is not None
    parsed = parse_candles(request.candles)
    interval, warnings = _interval(request.interval, parsed)
    parsed = await _opens(parsed, interval, request.calendar or AUTO, request.time_is, now)
    name = request.calendar
    if name is None or name == AUTO:
        name = await infer(parsed.timestamps, interval)
    calendar = await load_calendar(name)
    try:
        calendar.check(parsed.timestamps, interval)
    except InvalidCandles as error:
        raise InputError(str(error), parsed.at_timestamp(error.row or 0), error.code) from None
    sent = Series(symbol, interval, calendar, parsed.timestamps, parsed.candles, "body", tuple(warnings))
    return _known(sent, instant_of_knowledge(request.as_of, now), request.as_of is not None)


async def candles_in_history(symbol: str, request: ForecastRequest, history: History, count: int, now: int) -> Series:
    """The newest `count` stored candles that had closed by the request's `as_of`."""
    stored = await calendars_of(symbol, history)
    interval = stored_interval(request.interval, stored)
    name = stored[interval].name if request.calendar in (None, AUTO) else str(request.calendar)
    instant = instant_of_knowledge(request.as_of, now)
    revision = await history.revision(symbol, interval)  # before the candles, which may be newer than it but not older
    timestamps, candles = await history.read(symbol, interval, count + 1, before=instant)
    calendar = await load_calendar(name)
    found = Series(symbol, interval, calendar, timestamps, candles, "history", revision=revision)
    if len(timestamps) == 0:
        return found
    try:
        calendar.check(timestamps, interval)
    except InvalidCandles as error:
        raise InputError(f"the stored candles do not fit: {error}", "/calendar", error.code) from None
    known = closed_by(found, instant)
    return replace(known, timestamps=known.timestamps[-count:], candles=known.candles[-count:])


async def interval_meant(symbol: str, request: ForecastRequest, history: History) -> str:
    """The interval of a request that names none."""
    if request.candles is not None:
        return _interval(None, parse_candles(request.candles))[0]
    stored = await calendars_of(symbol, history)
    return stored_interval(None, stored)


async def calendars_of(symbol: str, history: History) -> dict[str, StoredCalendar]:
    """Interval to calendar of what is stored; UnknownSymbol if nothing is."""
    stored = await history.calendars(symbol)
    if not stored:
        raise UnknownSymbol(f"no candles of {symbol} are stored")
    return stored


def stored_interval(asked: str | None, stored: dict[str, StoredCalendar], where: str = "/interval") -> str:
    """The interval asked for, or the only one that is stored; `where` it is asked for, for InputError."""
    have = ", ".join(stored)
    if asked is None and len(stored) > 1:
        raise InputError(f"name one of the stored intervals: {have}", where, "unknown_interval")
    interval = asked or next(iter(stored))
    if interval not in stored:
        raise InputError(f"no candles of this interval are stored; stored: {have}", where, "unknown_interval")
    return interval


async def candles_to_store(
    symbol: str, request: PutCandlesRequest, history: History, now: int
) -> tuple[Series, StoredCalendar]:
    """The closed candles of a put and the calendar that explains them together with what is stored."""
    parsed = parse_candles(request.candles)
    interval, warnings = _interval(request.interval, parsed)
    remembered = await _remembered(symbol, interval, request.calendar, history)
    parsed = await _opens(parsed, interval, remembered or AUTO, request.time_is, now)
    stored, _ = await history.read(symbol, interval, _EXAMINED, damaged=True)
    union: Millis = np.union1d(stored, parsed.timestamps)
    name = remembered or await infer(union, interval)
    calendar = await load_calendar(name)
    try:
        calendar.check(union, interval)
    except InvalidCandles as error:
        raise _unlike_stored(error, union, parsed) from None
    sent = Series(symbol, interval, calendar, parsed.timestamps, parsed.candles, "body", tuple(warnings))
    return _known(sent, now, chosen=False), StoredCalendar(name, inferred=remembered is None)


async def _remembered(symbol: str, interval: str, asked: str | None, history: History) -> str | None:
    """The calendar that the caller gives now or gave before; None where it is to be inferred."""
    if asked is not None:
        return None if asked == AUTO else asked
    stored = (await history.calendars(symbol)).get(interval)
    return None if stored is None or stored.inferred else stored.name


def _unlike_stored(error: InvalidCandles, union: Millis, parsed: ParsedCandles) -> InputError:
    at = np.flatnonzero(parsed.timestamps == union[error.row or 0])
    if len(at):
        detail = "is not on the grid of the calendar and of what is stored"
        return InputError(detail, parsed.at_timestamp(int(at[0])), error.code)
    return InputError("these candles and the stored ones are not on one grid", "/candles", error.code)


def _interval(asked: str | None, parsed: ParsedCandles) -> tuple[str, list[str]]:
    """The interval asked for, or the candles' own with a warning that says so."""
    if asked is not None:
        return asked, []
    interval = infer_interval(parsed.timestamps)
    if interval is None:
        raise InputError("the candles' step is no interval: name it", "/interval", "unknown_interval")
    return interval, [f"interval was not given; {interval} is the candles' most common step"]


async def _opens(parsed: ParsedCandles, interval: str, calendar: str, time_is: str, now: int) -> ParsedCandles:
    """The candles with their opening instants, none of which lies in the future."""
    if time_is == "close":
        opens = await opens_from_closes(parsed.timestamps, interval, calendar)
        parsed = replace(parsed, timestamps=opens)
        try:
            check_timestamps(opens)
        except InvalidCandles as error:
            detail = "the opening that belongs to this close is not after the one before"
            raise InputError(detail, parsed.at_timestamp(error.row or 0), error.code) from None
    row = opens_in_future(parsed.timestamps, now)
    if row is not None:
        raise InputError(f"candle {row} opens in the future", parsed.at_timestamp(row), "future_timestamp")
    return parsed


def _known(sent: Series, instant: int, chosen: bool) -> Series:
    """What had closed at an instant, with a warning about what had not."""
    known = closed_by(sent, instant)
    left_out = len(sent.timestamps) - len(known.timestamps)
    if not left_out:
        return known
    why = "had not closed by as_of" if chosen else "has not closed yet"
    warning = f"{left_out} candle(s) left out: {why}"
    return replace(known, unclosed=left_out, warnings=(*known.warnings, warning))

"""When candles happen: grids, closing instants, the timestamps of a horizon, local wall clocks.

`24/7` never closes; `24/5` closes from Friday to Sunday 17:00 New York, as spot FX does; every other name is
an exchange of the `exchange_calendars` package. All times are UTC milliseconds.
"""

from functools import cache
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from models.candles import DAY_MS, InvalidCandles, Millis, interval_ms

HOUR_MS: Final = 3_600_000
_WEEK_MS: Final = 7 * DAY_MS
_MONDAY_MS: Final = 4 * DAY_MS  # 1970-01-05, the first Monday of the epoch
_SATURDAY_NOON_MS: Final = _MONDAY_MS + 5 * DAY_MS + 12 * HOUR_MS  # inside every weekend, wherever it begins
_SEARCHED: Final = 4096  # auto looks at this many of the newest candles


class UnknownCalendar(ValueError):
    """No calendar has this name."""


class Calendar(Protocol):
    """The grid on which a market's candles open."""

    name: str
    timezone: str

    def check(self, timestamps: Millis, interval: str) -> None:
        """Raise InvalidCandles naming the first of the rising `timestamps` that is no opening instant."""
        ...

    def following(self, timestamps: Millis, interval: str, count: int) -> Millis:
        """The `count` opening instants after the last of `timestamps`, on the same grid."""
        ...

    def slots(self, timestamps: Millis, interval: str) -> Millis:
        """Every opening instant from the first to the last of the rising `timestamps`, present among them or not."""
        ...

    def closes(self, timestamps: Millis, interval: str) -> Millis:
        """The instant each candle is complete."""
        ...

    def opens(self, closes: Millis, interval: str) -> Millis:
        """The opening instants of candles that close at rising instants; what fits no candle fails `check`."""
        ...

    def local(self, timestamps: Millis, interval: str) -> Millis:
        """Wall clock of the exchange, as milliseconds since 1970 without a zone; midnight for daily candles."""
        ...


def get_calendar(name: str) -> Calendar:
    """The calendar called `name` (built once per process); UnknownCalendar otherwise."""
    return _build(name)


def infer_calendar(timestamps: Millis, interval: str) -> str:
    """The calendar that explains the candles: `24/7` if any opens on a Saturday or they
    last longer than a day, else New York's if all of them are its slots, else `24/5` if a weekend passed between
    them and none opens in one, else `24/7`."""
    recent = timestamps[-_SEARCHED:]
    weekdays = (recent - _MONDAY_MS) // DAY_MS % 7
    if (weekdays == 5).any() or interval_ms(interval) > DAY_MS:
        return "24/7"
    try:
        get_calendar("XNYS").check(recent, interval)
        return "XNYS"
    except InvalidCandles:
        pass
    weeks = (recent - _SATURDAY_NOON_MS) // _WEEK_MS
    try:
        get_calendar("24/5").check(recent, interval)
        return "24/5" if weeks[-1] > weeks[0] else "24/7"
    except InvalidCandles:  # a Sunday before trading begins
        return "24/7"


def calendar_features(local: Millis) -> NDArray[np.int64]:
    """`[T, 5]` minute, hour, weekday (Monday 0), day of month, month of local wall clocks `[T]`."""
    dates = local.astype("datetime64[ms]")
    months = dates.astype("datetime64[M]")
    days = dates.astype("datetime64[D]")
    return np.column_stack(
        [
            local // 60_000 % 60,
            local // HOUR_MS % 24,
            (local - _MONDAY_MS) // DAY_MS % 7,
            (days - months).astype(np.int64) + 1,
            months.astype(np.int64) % 12 + 1,
        ]
    )


def _wall_clock(timestamps: Millis, timezone: str) -> Millis:
    if timezone == "UTC":
        return timestamps
    import pandas as pd

    index = pd.DatetimeIndex(timestamps.astype("datetime64[ms]"), tz="UTC")
    return np.asarray(index.tz_convert(timezone).tz_localize(None).as_unit("ms").asi8)


def _off_grid(row: int, timestamp: int, name: str, interval: str) -> InvalidCandles:
    when = np.datetime64(timestamp, "ms")
    return InvalidCandles(
        f"candle {row} opens at {when}Z, which is not on the {interval} grid of calendar {name}", row, "off_grid"
    )


class Continuous:
    """`24/7` and `24/5`: the grid is first + k x interval, less the weekend where there is one."""

    timezone = "UTC"

    def __init__(self, name: str) -> None:
        self.name = name
        self._weekend = name == "24/5"

    def _closed(self, timestamps: Millis, interval: str, slack: int = 0) -> NDArray[np.bool_]:
        if not self._weekend or interval_ms(interval) > DAY_MS:
            return np.zeros(len(timestamps), dtype=bool)
        if interval_ms(interval) == DAY_MS:
            weekday = (timestamps - _MONDAY_MS) // DAY_MS % 7
            return np.asarray((weekday == 5) | ((weekday == 6) & (slack == 0)))
        since_monday = (_wall_clock(timestamps, "America/New_York") - _MONDAY_MS) % _WEEK_MS
        friday, sunday = 4 * DAY_MS + 17 * HOUR_MS, 6 * DAY_MS + 17 * HOUR_MS
        return np.asarray((since_monday >= friday + slack) & (since_monday < sunday - slack))

    def check(self, timestamps: Millis, interval: str) -> None:
        off = (timestamps - timestamps[0]) % interval_ms(interval) != 0
        # Feeds change to summer time in different weeks: an hour at either edge of the weekend is not an error.
        off |= self._closed(timestamps, interval, slack=HOUR_MS)
        if off.any():
            row = int(off.argmax())
            raise _off_grid(row, int(timestamps[row]), self.name, interval)

    def following(self, timestamps: Millis, interval: str, count: int) -> Millis:
        step = interval_ms(interval)
        weekends = count * step // (5 * DAY_MS) + 1 if self._weekend else 0
        spare = weekends * ((2 * DAY_MS + HOUR_MS) // step + 1)  # 49 hours where summer time ends
        grid = timestamps[-1] + step * np.arange(1, count + spare + 1, dtype=np.int64)
        return np.asarray(grid[~self._closed(grid, interval)][:count])

    def slots(self, timestamps: Millis, interval: str) -> Millis:
        step = interval_ms(interval)
        grid = np.arange(timestamps[0], timestamps[-1] + 1, step, dtype=np.int64)
        edge = -HOUR_MS if step < DAY_MS else 0  # as in `check`: nobody must trade in the weekend's neighbouring hours
        return np.asarray(grid[~self._closed(grid, interval, slack=edge)])

    def closes(self, timestamps: Millis, interval: str) -> Millis:
        return timestamps + interval_ms(interval)

    def opens(self, closes: Millis, interval: str) -> Millis:
        return closes - interval_ms(interval)

    def local(self, timestamps: Millis, interval: str) -> Millis:
        return timestamps


class Exchange:
    """An exchange's sessions. Daily candles may be labelled by date (00:00 UTC), local midnight or the opening."""

    def __init__(self, name: str) -> None:
        import exchange_calendars
        import pandas as pd

        end = pd.Timestamp.now().normalize() + pd.DateOffset(years=3)
        try:
            try:
                schedule = exchange_calendars.get_calendar(name, start="1980-01-01", end=end)
            except ValueError:  # some exchanges' holidays are not known that far: their own default range
                schedule = exchange_calendars.get_calendar(name)
        except exchange_calendars.errors.InvalidCalendarName:
            raise UnknownCalendar(
                f"no calendar is called {name!r}: use 24/7, 24/5, auto or an exchange such as XNYS"
            ) from None
        self.name = name
        self.timezone = str(schedule.tz)
        self._dates: Millis = schedule.sessions.as_unit("ms").asi8
        self._opens = _instants(schedule.opens)
        self._closes = _instants(schedule.closes)
        # A lunch break cuts a session in two: within a day the grid starts anew after it.
        self._segment_opens = np.union1d(self._opens, _instants(schedule.break_ends.dropna()))
        self._segment_closes = np.union1d(self._closes, _instants(schedule.break_starts.dropna()))
        # Where the clock jumps over midnight the day begins after the jump, where it repeats midnight, at the first.
        twice = np.ones(len(schedule.sessions), dtype=bool)
        midnights = schedule.sessions.tz_localize(self.timezone, ambiguous=twice, nonexistent="shift_forward")
        self._midnights: Millis = midnights.tz_convert("UTC").as_unit("ms").asi8

    def check(self, timestamps: Millis, interval: str) -> None:
        step = interval_ms(interval)
        if step > DAY_MS:
            off = (timestamps - timestamps[0]) % step != 0
        elif step == DAY_MS:
            off = ~_is_in(timestamps, self._labels(timestamps))
        else:
            off = ~self._aligned(timestamps, step)[0]
        if off.any():
            row = int(off.argmax())
            raise _off_grid(row, int(timestamps[row]), self.name, interval)

    def following(self, timestamps: Millis, interval: str, count: int) -> Millis:
        step, last = interval_ms(interval), int(timestamps[-1])
        if step > DAY_MS:
            return last + step * np.arange(1, count + 1, dtype=np.int64)
        if step == DAY_MS:
            labels = self._labels(timestamps)
            found = labels[np.searchsorted(labels, last, "right") :][:count]
        else:
            found = self._slots(last, step, count, from_opening=self._aligned(timestamps, step)[1])
        if len(found) < count:
            raise InvalidCandles(f"calendar {self.name} ends before {count} more {interval} candles", code="off_grid")
        return found

    def slots(self, timestamps: Millis, interval: str) -> Millis:
        step, first, last = interval_ms(interval), int(timestamps[0]), int(timestamps[-1])
        if step > DAY_MS:
            return np.arange(first, last + 1, step, dtype=np.int64)
        if step == DAY_MS:
            found = self._labels(timestamps)
        else:
            most = (last - first) // step + 1
            found = self._slots(first - 1, step, most, from_opening=self._aligned(timestamps, step)[1])
        return found[np.searchsorted(found, first) : np.searchsorted(found, last, "right")]

    def closes(self, timestamps: Millis, interval: str) -> Millis:
        step = interval_ms(interval)
        if step > DAY_MS:
            return timestamps + step
        if step == DAY_MS:
            return self._closes[np.searchsorted(self._labels(timestamps), timestamps)]
        return np.minimum(timestamps + step, self._segment_closes[self._segment(timestamps)])

    def opens(self, closes: Millis, interval: str) -> Millis:
        step = interval_ms(interval)
        bells = self._closes if step == DAY_MS else self._segment_closes
        bell = np.minimum(np.searchsorted(bells, closes), len(bells) - 1)
        at_bell = bells[bell] == closes
        if step > DAY_MS or not at_bell.any():
            return closes - step
        if step == DAY_MS:
            return np.where(at_bell, self._dates[bell], closes - step)
        inside = closes[~at_bell] - step
        first = self._segment_opens[bell]
        # Where every candle ends with a bell, nothing tells the grids apart: it counts from the opening.
        if len(inside) and not self._aligned(inside, step)[1]:
            first = first - first % step
        last_slot = first + (closes - first - 1) // step * step  # the bell may cut it short
        return np.where(at_bell, last_slot, closes - step)

    def local(self, timestamps: Millis, interval: str) -> Millis:
        if interval_ms(interval) == DAY_MS:
            return self._dates[np.searchsorted(self._labels(timestamps), timestamps)]
        return _wall_clock(timestamps, self.timezone)

    def _labels(self, timestamps: Millis) -> Millis:
        """The daily labelling that most candles follow; in a London winter two of them coincide."""
        best = max((self._dates, self._midnights, self._opens), key=lambda labels: _is_in(timestamps, labels).sum())
        if not _is_in(timestamps, best).any():
            raise _off_grid(0, int(timestamps[0]), self.name, "1d")
        return best

    def _segment(self, timestamps: Millis) -> NDArray[np.int64]:
        """Index of the first stretch of trading that closes after each timestamp."""
        segment = np.searchsorted(self._segment_closes, timestamps, "right")
        if segment[-1] >= len(self._segment_closes):
            raise InvalidCandles(f"calendar {self.name} does not reach the last candle", code="off_grid")
        return segment

    def _aligned(self, timestamps: Millis, step: int) -> tuple[NDArray[np.bool_], bool]:
        """Which candles lie on the intraday grid, and whether it counts from the opening (else from the clock)."""
        opens = self._segment_opens[self._segment(timestamps)]
        trading = timestamps > opens - step
        from_opening = trading & ((timestamps - opens) % step == 0)
        from_clock = trading & (timestamps % step == 0)
        return (from_clock, False) if from_clock.sum() > from_opening.sum() else (from_opening, True)

    def _slots(self, last: int, step: int, count: int, *, from_opening: bool) -> Millis:
        """The `count` intraday slots after `last`."""
        segment = int(self._segment(np.array([last]))[0])
        slots: list[NDArray[np.int64]] = []
        found = 0
        while found < count and segment < len(self._segment_opens):
            first = int(self._segment_opens[segment])
            first -= 0 if from_opening else first % step
            grid = np.arange(first, self._segment_closes[segment], step, dtype=np.int64)
            slots.append(grid[grid > last])
            found += len(slots[-1])
            segment += 1
        return np.concatenate(slots)[:count]


def _instants(times: Any) -> Millis:
    """A pandas series of UTC times in milliseconds."""
    import pandas as pd

    return np.asarray(pd.DatetimeIndex(times).as_unit("ms").asi8)


def _is_in(timestamps: Millis, labels: Millis) -> NDArray[np.bool_]:
    position = np.minimum(np.searchsorted(labels, timestamps), len(labels) - 1)
    return np.asarray(labels[position] == timestamps)


@cache  # the library knows about a hundred names, and a calendar takes a second to build
def _build(name: str) -> Calendar:
    return Continuous(name) if name in ("24/7", "24/5") else Exchange(name)

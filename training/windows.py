"""Series -> windows: the split in time, the random windows of training, the rolling origins of evaluation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from models.calendars import Calendar, get_calendar, infer_calendar
from models.candles import Floats, InvalidCandles, Millis, check_timestamps
from models.forecaster import ForecastInput
from training.candle_files import Series

Part = Literal["train", "val", "test", "unseen"]
_LEAST_CONTEXT: Final = 2  # one return, or there is no volatility to compare with
_SPLIT_KEYS: Final = {"fractions", "val_from", "test_from", "unseen"}


@dataclass(frozen=True)
class Split:
    """Two instants, equal for all symbols: targets before `val_from` train, from `test_from` on test.

    `horizon` candles before each instant are left out, so that no target of one part overlaps the next.
    Symbols of `unseen` are never trained on; they are evaluated in the time of the test alone.
    """

    val_from: int  # UTC ms
    test_from: int  # UTC ms
    horizon: int
    unseen: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.val_from > self.test_from:
            raise ValueError("the split's val_from lies after its test_from")

    def targets(self, item: Series, part: Part) -> range:
        """Indices of the candles that targets of `part` may cover; a training window lies inside whole."""
        if (item.symbol in self.unseen) != (part == "unseen"):
            return range(0)
        val, test = (int(i) for i in np.searchsorted(item.timestamps, [self.val_from, self.test_from]))
        return {
            "train": range(max(0, val - self.horizon)),
            "val": range(val, max(val, test - self.horizon)),
            "test": range(test, len(item)),
            "unseen": range(test, len(item)),
        }[part]


def split_by_dates(val_from: date, test_from: date, *, horizon: int, unseen: Sequence[str] = ()) -> Split:
    """The split at 00:00 UTC of two days (an instant may be given as a datetime)."""
    return Split(_instant(val_from), _instant(test_from), horizon, frozenset(unseen))


def split_by_fractions(
    series: Sequence[Series], train: float, val: float, *, horizon: int, unseen: Sequence[str] = ()
) -> Split:
    """The split where the oldest `train` and the next `val` of all candles, pooled, have passed."""
    if train <= 0 or val < 0 or train + val >= 1:
        raise ValueError(f"the split's fractions {train} and {val} leave nothing to test: their sum must be below 1")
    pooled = np.sort(np.concatenate([item.timestamps for item in series]))
    first, second = (int(pooled[int(share * len(pooled))]) for share in (train, train + val))
    return Split(first, second, horizon, frozenset(unseen))


def split_from_recipe(table: Mapping[str, Any], series: Sequence[Series], horizon: int) -> Split:
    """The split of a recipe's table: `fractions = [train, val]`, or `val_from` and `test_from`; and `unseen`."""
    unknown = set(table) - _SPLIT_KEYS
    if unknown or ("fractions" in table) == ("val_from" in table) or ("val_from" in table) != ("test_from" in table):
        raise ValueError("a recipe's split has fractions = [train, val], or val_from and test_from, and maybe unseen")
    unseen = tuple(table.get("unseen", ()))
    _check_held_out(unseen, series)
    if "fractions" in table:
        train, val = table["fractions"]
        return split_by_fractions(series, train, val, horizon=horizon, unseen=unseen)
    return split_by_dates(table["val_from"], table["test_from"], horizon=horizon, unseen=unseen)


def _check_held_out(unseen: Sequence[str], series: Sequence[Series]) -> None:
    missing = set(unseen) - {item.symbol for item in series}
    if missing:
        raise ValueError(f"the split holds out {', '.join(sorted(missing))}, of which there are no candles")


def split_by_parts(parts: Sequence[Sequence[Series]], *, horizon: int, unseen: Sequence[str] = ()) -> Split:
    """The split of candles that come as train, val (maybe empty) and test; a symbol of the test alone is unseen too.

    ValueError unless each part ends before the next begins, all symbols together: they share their market's moves.
    """
    train, _, test = parts
    if not train or not test:
        raise ValueError("there are no candles to train on, or none to test with")
    _check_held_out(unseen, test)
    given = [part for part in parts if part]
    for earlier, later in pairwise(given):
        last = max(earlier, key=lambda item: int(item.timestamps[-1]))
        first = min(later, key=lambda item: int(item.timestamps[0]))
        if last.timestamps[-1] >= first.timestamps[0]:
            raise ValueError(
                f"{last.symbol} ends on {day(int(last.timestamps[-1]))} in one part, and {first.symbol} begins on"
                f" {day(int(first.timestamps[0]))} in the next: training would have seen what it is judged by"
            )
    begins = [min(int(item.timestamps[0]) for item in part) for part in given[1:]]
    before = {item.symbol for part in parts[:2] for item in part}
    late = {item.symbol for item in test} - before
    return Split(begins[0], begins[-1], horizon, frozenset({*unseen, *late}))


def joined(parts: Sequence[Sequence[Series]]) -> Iterator[Series]:
    """Each symbol's candles of parts that follow each other in time, by symbol; all are of one interval."""
    places = [{item.symbol: index for index, item in enumerate(part)} for part in parts]
    for symbol in sorted(set().union(*places)):
        found = [part[place[symbol]] for part, place in zip(parts, places, strict=True) if symbol in place]
        yield Series(
            symbol,
            found[0].interval,
            np.concatenate([item.timestamps for item in found]),
            np.concatenate([item.candles for item in found]),
        )


def day(millis: int) -> str:
    """The UTC day of an instant, as 2024-12-31."""
    return str(np.datetime64(millis, "ms").astype("datetime64[D]"))


def _instant(day: date) -> int:
    moment = day if isinstance(day, datetime) else datetime(day.year, day.month, day.day, tzinfo=UTC)
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


# -- evaluation ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origins:
    """Where forecasts are made: contexts end at candle `origin` of a series, targets are the next `horizon`."""

    part: Part
    horizon: int
    pairs: tuple[tuple[int, int], ...]  # (series index, origin index)

    def __len__(self) -> int:
        return len(self.pairs)


def rolling_origins(
    series: Sequence[Series],
    split: Split,
    part: Part,
    *,
    stride: int,
    min_context: int,
    horizon: int | None = None,
) -> Origins:
    """Every `stride`-th origin whose targets lie in `part` and whose context has `min_context` candles.

    Contexts may reach back into earlier parts, targets may not. `horizon` defaults to the split's.
    """
    steps = horizon or split.horizon
    if steps > split.horizon:
        raise ValueError(f"a horizon of {steps} overlaps parts that are {split.horizon} candles apart")
    pairs = []
    for index, item in enumerate(series):
        allowed = split.targets(item, part)
        first = max(allowed.start, min_context, _LEAST_CONTEXT) - 1
        pairs += [(index, origin) for origin in range(first, allowed.stop - steps, stride)]
    return Origins(part, steps, tuple(pairs))


def series_calendar(item: Series, name: str = "auto") -> Calendar:
    """The calendar called `name`, or the one that explains the candles; InvalidCandles if they are off its grid."""
    calendar = get_calendar(infer_calendar(item.timestamps, item.interval) if name == "auto" else name)
    try:
        check_timestamps(item.timestamps)
        calendar.check(item.timestamps, item.interval)
    except InvalidCandles as error:
        raise InvalidCandles(f"{item.symbol}: {error}", error.row, error.code) from error
    return calendar


def forecast_input(item: Series, origin: int, *, horizon: int, lookback: int, calendar: Calendar) -> ForecastInput:
    """What a model sees at `origin`: at most `lookback` candles up to and including it, and no later fact."""
    context = slice(max(0, origin + 1 - lookback), origin + 1)
    timestamps = item.timestamps[context]
    future = calendar.following(timestamps, item.interval, horizon)
    return ForecastInput(
        timestamps=timestamps,
        candles=item.candles[context],
        future_timestamps=future,
        local_times=calendar.local(np.concatenate([timestamps, future]), item.interval),
    )


# -- training --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """A batch of training windows."""

    candles: Floats  # [B, L, 6]
    timestamps: Millis  # [B, L]
    series: NDArray[np.int64]  # [B]
    clock: Callable[[], Millis]

    @cached_property
    def local_times(self) -> Millis:
        """`[B, L]` exchange-local wall clock, for calendar features."""
        return self.clock()


class WindowSampler:
    """Random windows of `length` candles that lie in the training part whole, all equally likely.

    Nothing but the windows drawn is copied: series that are mapped from a file stay there. Only the local times of
    series that were asked for them are kept.
    """

    def __init__(self, series: Sequence[Series], split: Split, length: int, *, calendar: str = "auto") -> None:
        """ValueError, which names the longest, if no series has `length` training candles."""
        self._series = series
        self._length = length
        rows = [len(split.targets(item, "train")) for item in series]
        counts = [max(0, there - length + 1) for there in rows]
        self._ends = np.cumsum(counts)
        if not sum(counts):
            longest = int(np.argmax(rows))
            raise ValueError(f"training needs {length} rows, {series[longest].symbol} has {rows[longest]} at most")
        self._calendars = {
            index: series_calendar(series[index], calendar) for index, count in enumerate(counts) if count
        }
        self._local_times: dict[int, Millis] = {}

    def __len__(self) -> int:
        """How many different windows there are."""
        return int(self._ends[-1])

    def draw(self, rows: int, rng: np.random.Generator) -> Windows:
        """`rows` windows, drawn with replacement."""
        picks = rng.integers(len(self), size=rows)
        which = np.searchsorted(self._ends, picks, side="right")
        starts = picks - np.concatenate([[0], self._ends])[which]
        items = [self._series[index] for index in which.tolist()]
        spans = [slice(start, start + self._length) for start in starts.tolist()]
        return Windows(
            candles=np.stack([item.candles[span] for item, span in zip(items, spans, strict=True)]),
            timestamps=np.stack([item.timestamps[span] for item, span in zip(items, spans, strict=True)]),
            series=which,
            clock=partial(self._clock, which.tolist(), spans),
        )

    def _clock(self, which: Sequence[int], spans: Sequence[slice]) -> Millis:
        return np.stack([self._local(index)[span] for index, span in zip(which, spans, strict=True)])

    def _local(self, index: int) -> Millis:
        if index not in self._local_times:
            item = self._series[index]
            self._local_times[index] = self._calendars[index].local(item.timestamps, item.interval)
        return self._local_times[index]

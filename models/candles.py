"""What a candle is: column order, validity, amounts, intervals.

A candle is one row of `COLUMNS`; a series is a `[T, 6]` float64 array beside a `[T]` int64 array of
timestamps (the candle's open, UTC milliseconds since 1970).
"""

import re
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Millis = NDArray[np.int64]

COLUMNS: Final = ("open", "high", "low", "close", "volume", "amount")
SYMBOL: Final = re.compile(r"[A-Z0-9^][A-Z0-9._^=-]{0,31}")
OPEN, HIGH, LOW, CLOSE, VOLUME, AMOUNT = range(6)
PRICES: Final = slice(OPEN, CLOSE + 1)
VARIATES: Final = COLUMNS[:AMOUNT]  # what a forecast holds: amount is an input only

EARLIEST_MS: Final = 315_532_800_000  # 1980: seconds taken for milliseconds land before it
LATEST_MS: Final = 4_102_444_800_000  # 2100: microseconds taken for milliseconds land after it

SMALLEST_PRICE: Final = 1e-12  # below and above these, single precision has nothing left to say
LARGEST_PRICE: Final = 1e15
LARGEST_VOLUME: Final = 1e30
_FORECAST_FLOOR: Final = 1e-6  # of the last close

DAY_MS: Final = 86_400_000
_MOST_UNITS: Final = 9999  # four digits, as interval_ms reads them
_UNIT_MS: Final[dict[str, int]] = {
    "m": 60_000,
    "h": 3_600_000,
    "d": DAY_MS,
    "w": 7 * DAY_MS,
}


class InvalidCandles(ValueError):
    """These are not candles; `row` is the first offending row, None when no single row is to blame."""

    def __init__(self, detail: str, row: int | None = None, code: str = "invalid_candles") -> None:
        super().__init__(detail)
        self.row = row
        self.code = code


class TooFewCandles(InvalidCandles):
    """The model needs more candles than it was given."""

    def __init__(self, needed: int, got: int) -> None:
        super().__init__(f"the model needs {needed} candles, got {got}", code="too_few_candles")
        self.needed = needed
        self.got = got


@lru_cache(maxsize=256)  # a request asks ten times
def interval_ms(interval: str) -> int:
    """Length of an interval such as `5m`, `1h`, `1d` or `1w` in milliseconds; ValueError if it is none."""
    match = re.fullmatch(r"([1-9][0-9]{0,3})([mhdw])", interval)
    if not match:
        raise ValueError(f"{interval!r} is not an interval: write 1m, 15m, 1h, 4h, 1d or 1w")
    return int(match[1]) * _UNIT_MS[match[2]]


def interval_name(milliseconds: int) -> str:
    """The one name of a length of time: `60m` and `1h` are both `1h`; ValueError if it has none."""
    for unit, length in reversed(_UNIT_MS.items()):
        if milliseconds % length == 0 and 0 < milliseconds // length <= _MOST_UNITS:
            return f"{milliseconds // length}{unit}"
    raise ValueError(f"{milliseconds} ms is not an interval")


def with_amount(candles: Floats) -> Floats:
    """`[T, 5]` candles with their amount, mean(open, high, low, close) x volume, as a sixth column.

    The definition is Kronos's own; a `[T, 6]` input is returned as it is, its missing amounts filled.
    """
    estimate = candles[:, PRICES].mean(axis=1) * candles[:, VOLUME]
    if candles.shape[1] == len(COLUMNS):
        return np.column_stack(
            [candles[:, :AMOUNT], np.where(np.isnan(candles[:, AMOUNT]), estimate, candles[:, AMOUNT])]
        )
    return np.column_stack([candles, estimate])


def candle_faults(candles: Floats) -> tuple[tuple[NDArray[np.bool_], str], ...]:
    """Every way a row can fail to be a candle: a mask `[T]` and its reason; `candles` is `[T, 5]` or `[T, 6]`."""
    prices = candles[:, PRICES]
    return (
        (np.asarray(~np.isfinite(candles).all(axis=1)), "holds a value that is not a finite number"),
        (np.asarray((prices <= 0).any(axis=1)), "has a price that is not above zero"),
        (np.asarray((candles[:, VOLUME:] < 0).any(axis=1)), "has a negative volume or amount"),
        (np.asarray((prices < SMALLEST_PRICE).any(axis=1)), f"has a price below {SMALLEST_PRICE:g}"),
        (np.asarray((prices > LARGEST_PRICE).any(axis=1)), f"has a price above {LARGEST_PRICE:g}"),
        (np.asarray((candles[:, VOLUME:] > LARGEST_VOLUME).any(axis=1)), f"has more volume than {LARGEST_VOLUME:g}"),
        (np.asarray(candles[:, HIGH] < prices.max(axis=1)), "has a high below its other prices"),
        (np.asarray(candles[:, LOW] > prices.min(axis=1)), "has a low above its other prices"),
    )


def check_candles(candles: Floats) -> None:
    """Raise InvalidCandles naming the first row that is not a candle; `candles` is `[T, 5]` or `[T, 6]`."""
    if candles.ndim != 2 or candles.shape[1] not in (5, 6):
        raise InvalidCandles(f"candles must have 5 or 6 columns, got shape {candles.shape}")
    if _are_candles(candles):
        return
    for broken, reason in candle_faults(candles):
        if broken.any():
            row = int(broken.argmax())
            raise InvalidCandles(f"candle {row} {reason}", row)


def _are_candles(candles: Floats) -> bool:
    """Whether `candle_faults` would find nothing, several times faster; a NaN fails every comparison."""
    opens, highs, lows, closes, *amounts = candles.T
    fine = (lows >= SMALLEST_PRICE) & (highs <= LARGEST_PRICE)
    for prices in (opens, closes):
        fine &= (lows <= prices) & (prices <= highs)
    for amount in amounts:
        fine &= (amount >= 0) & (amount <= LARGEST_VOLUME)
    return bool(fine.all())


def check_timestamps(timestamps: Millis) -> None:
    """Raise InvalidCandles unless `[T]` timestamps are milliseconds of this century, rising without repeats."""
    outside = (timestamps < EARLIEST_MS) | (timestamps > LATEST_MS)
    if outside.any():
        row = int(outside.argmax())
        raise InvalidCandles(
            f"candle {row} has timestamp {int(timestamps[row])}: not UTC milliseconds between 1980 and 2100",
            row,
            "invalid_timestamp",
        )
    steps = np.diff(timestamps)
    if (steps <= 0).any():
        row = int((steps <= 0).argmax()) + 1
        duplicate = steps[row - 1] == 0
        raise InvalidCandles(
            f"candle {row} {'repeats' if duplicate else 'is older than'} the timestamp before it",
            row,
            "duplicate_timestamp" if duplicate else "unsorted_timestamps",
        )


def floor_prices(rows: Floats, last_close: float) -> Floats:
    """Rows `[..., 5]` or `[..., 6]` with prices above zero: networks know no such limit."""
    floored = rows.copy()
    floored[..., PRICES] = np.maximum(rows[..., PRICES], _FORECAST_FLOOR * last_close)
    return floored


def repair_ohlc(rows: Floats) -> Floats:
    """Rows whose high is the largest and low the smallest price; open and close never move.

    `rows` is `[..., 5]` in the order of `VARIATES`; volume is floored at zero. Networks forecast the five
    variates separately, so a forecast row is a valid candle only after this.
    """
    repaired = rows.copy()
    repaired[..., HIGH] = rows[..., PRICES].max(axis=-1)
    repaired[..., LOW] = rows[..., PRICES].min(axis=-1)
    repaired[..., VOLUME] = np.maximum(rows[..., VOLUME], 0.0)
    return repaired

"""Candles as bots send them: ccxt rows, Binance kline rows, Alpaca objects, columns. One result for all four."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np

from models.candles import (
    AMOUNT,
    COLUMNS,
    HIGH,
    LOW,
    PRICES,
    Floats,
    InvalidCandles,
    Millis,
    check_candles,
    check_timestamps,
    with_amount,
)
from service.api.errors import InputError

_BINANCE_WIDTH: Final = 12  # openTime o h l c v closeTime quoteVolume trades takerBase takerQuote ignore
_ALPACA: Final = {"t", "o", "h", "l", "c", "v"}
_ALPACA_OPTIONAL: Final = {"n", "vw"}
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_RFC3339: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
_FORMS: Final = (
    "candles are rows [ms, open, high, low, close, volume(, amount)], Binance kline rows,"
    " objects {t, o, h, l, c, v} or columns {timestamp, open, high, low, close, volume(, amount)}"
)


@dataclass(frozen=True)
class Layout:
    """How the caller wrote the candles: what the timestamp and each column are called there."""

    timestamp: str
    columns: tuple[str, ...]
    by_column: bool = False
    text_numbers: bool = False

    def pointer(self, row: int, name: str | None = None) -> str:
        """JSON pointer to a cell, or to a row."""
        if name is None:
            return f"/candles/{self.timestamp}/{row}" if self.by_column else f"/candles/{row}"
        return f"/candles/{name}/{row}" if self.by_column else f"/candles/{row}/{name}"


@dataclass(frozen=True)
class ParsedCandles:
    """`[T]` timestamps as they were sent and `[T, 6]` valid candles, with the way back to the caller's cells."""

    timestamps: Millis
    candles: Floats
    layout: Layout

    def at_timestamp(self, row: int) -> str:
        return self.layout.pointer(row, self.layout.timestamp)


def parse_candles(payload: Any) -> ParsedCandles:
    """Candles in any of the four forms, checked; InputError points at the first cell that is wrong."""
    layout, times, columns = _take_apart(payload)
    timestamps = _timestamps(times, layout)
    values = [_numbers(column, name, layout) for column, name in zip(columns, layout.columns, strict=False)]
    candles = with_amount(np.column_stack(values)) + 0.0  # no negative zeros
    try:
        check_timestamps(timestamps)
    except InvalidCandles as error:
        raise InputError(str(error), layout.pointer(error.row or 0, layout.timestamp), error.code) from None
    try:
        check_candles(candles)
    except InvalidCandles as error:
        raise InputError(str(error), _blamed(candles, error.row or 0, layout), error.code) from None
    return ParsedCandles(timestamps, candles, layout)


def parse_instant(value: int | str, pointer: str) -> int:
    """UTC milliseconds of a number of milliseconds or an RFC 3339 text."""
    if isinstance(value, int):
        return value
    instant = _parse_rfc3339(value)
    if instant is None:
        raise InputError("must be UTC milliseconds or an RFC 3339 time with its offset", pointer, "invalid_timestamp")
    return instant


def _take_apart(payload: Any) -> tuple[Layout, Sequence[Any], list[Sequence[Any]]]:
    if isinstance(payload, dict):
        return _columns(payload)
    if not isinstance(payload, list):
        raise InputError(_FORMS, "/candles")
    if not payload:
        raise InputError("there are no candles", "/candles", "too_few_candles", needed=1, got=0)
    if isinstance(payload[0], dict):
        return _objects(payload)
    return _rows(payload)


def _rows(rows: list[Any]) -> tuple[Layout, Sequence[Any], list[Sequence[Any]]]:
    width = len(rows[0]) if isinstance(rows[0], list) else 0
    if width not in (6, 7, _BINANCE_WIDTH):
        raise InputError(_FORMS, "/candles/0")
    if set(map(type, rows)) != {list} or set(map(len, rows)) != {width}:
        row = next(row for row, cells in enumerate(rows) if type(cells) is not list or len(cells) != width)
        raise InputError(f"must be a row of {width} values, as the first is", f"/candles/{row}")
    columns = list(zip(*rows, strict=True))
    if width == _BINANCE_WIDTH:
        layout = Layout("0", ("1", "2", "3", "4", "5", "7"), text_numbers=True)
    else:
        layout = Layout("0", tuple(str(place) for place in range(1, width)))
    return layout, columns[0], [columns[int(name)] for name in layout.columns]


def _objects(rows: list[Any]) -> tuple[Layout, Sequence[Any], list[Sequence[Any]]]:
    for row, cells in enumerate(rows):
        if type(cells) is not dict or not cells.keys() >= _ALPACA or not cells.keys() <= _ALPACA | _ALPACA_OPTIONAL:
            raise InputError("must be an object with t, o, h, l, c, v and, if known, n and vw", f"/candles/{row}")
    layout = Layout("t", ("o", "h", "l", "c", "v", "vw"))
    columns: list[Sequence[Any]] = [[cells[name] for cells in rows] for name in layout.columns[:AMOUNT]]
    if all("vw" in cells for cells in rows):
        volumes = _numbers(columns[-1], "v", layout)
        averages = _numbers([cells["vw"] for cells in rows], "vw", layout)
        columns.append((volumes * averages).tolist())
    return layout, [cells["t"] for cells in rows], columns


def _columns(payload: dict[str, Any]) -> tuple[Layout, Sequence[Any], list[Sequence[Any]]]:
    names = ("timestamp", *COLUMNS[: AMOUNT + ("amount" in payload)])
    if payload.keys() != set(names):
        raise InputError(_FORMS, "/candles")
    times, *columns = (payload[name] for name in names)
    for name, column in zip(names, (times, *columns), strict=True):
        if not isinstance(column, list) or not isinstance(times, list) or len(column) != len(times):
            raise InputError("must be an array as long as timestamp's", f"/candles/{name}")
    if not times:
        raise InputError("there are no candles", "/candles", "too_few_candles", needed=1, got=0)
    return Layout("timestamp", names[1:], by_column=True), times, columns


def _numbers(values: Sequence[Any], name: str, layout: Layout) -> Floats:
    """A column as float64; only numbers are numbers, except where a format writes them as text."""
    allowed = {int, float, str} if layout.text_numbers else {int, float}
    if set(map(type, values)) <= allowed:
        try:
            return np.array([float(value) for value in values] if layout.text_numbers else values, dtype=np.float64)
        except (ValueError, OverflowError):
            pass
    row = next(row for row, value in enumerate(values) if not _is_number(value, allowed))
    raise InputError("must be a number", layout.pointer(row, name), "invalid_candles")


def _is_number(value: Any, allowed: set[type]) -> bool:
    if type(value) not in allowed:
        return False
    try:
        float(value)
    except (ValueError, OverflowError):
        return False
    return True


def _timestamps(values: Sequence[Any], layout: Layout) -> Millis:
    """A column of whole milliseconds or of RFC 3339 texts as int64."""
    kinds = set(map(type, values))
    if kinds == {int}:
        try:
            return np.array(values, dtype=np.int64)
        except OverflowError:
            pass
    elif kinds == {str}:
        parsed = [_parse_rfc3339(value) for value in values]
        if None not in parsed:
            return np.array(parsed, dtype=np.int64)
    elif kinds <= {int, float} and all(_is_whole(value) for value in values):
        return np.array([int(value) for value in values], dtype=np.int64)
    row = next((row for row, value in enumerate(values) if _as_instant(value) is None), 0)
    detail = "must be UTC milliseconds, or RFC 3339 with its offset in every candle"
    raise InputError(detail, layout.pointer(row, layout.timestamp), "invalid_timestamp")


def _as_instant(value: Any) -> int | None:
    if type(value) is str:
        return _parse_rfc3339(value)
    return int(value) if type(value) in (int, float) and _is_whole(value) else None


def _is_whole(value: float) -> bool:
    return abs(value) < 2**53 and value == int(value)


def _parse_rfc3339(text: str) -> int | None:
    if not _RFC3339.fullmatch(text):
        return None
    try:
        return (datetime.fromisoformat(text) - _EPOCH) // timedelta(milliseconds=1)
    except (ValueError, OverflowError):
        return None


def _blamed(candles: Floats, row: int, layout: Layout) -> str:
    """The cell that makes a row invalid, in the order in which rows are checked."""
    cells = candles[row]
    if not np.isfinite(cells).all():
        column = int((~np.isfinite(cells)).argmax())
    elif (cells[PRICES] <= 0).any():
        column = int((cells[PRICES] <= 0).argmax())
    elif (cells < 0).any():
        column = int((cells < 0).argmax())
    else:
        column = HIGH if cells[HIGH] < cells[PRICES].max() else LOW
    return layout.pointer(row, layout.columns[min(column, len(layout.columns) - 1)])

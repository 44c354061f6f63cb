"""Candles as exchanges, brokers and bots hand them out -> one frame: UTC opens; open, high, low, close, volume, amount.

`amount` is the money that changed hands; it is there only where the source knows it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, cast

import pandas as pd

Candles = pd.DataFrame | Sequence[Sequence[Any]] | Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]

_COLUMNS: Final = ("open", "high", "low", "close", "volume", "amount")
_ROW: Final = ("timestamp", *_COLUMNS)
_BINANCE: Final = {0: "timestamp", 1: "open", 2: "high", 3: "low", 4: "close", 5: "volume", 7: "amount"}
_ALPACA: Final = {"t": "timestamp", "o": "open", "h": "high", "l": "low", "c": "close", "v": "volume", "vw": "vwap"}
_TIMES: Final = ("timestamp", "date", "datetime", "time", "open_time")
_MOST_ROWS: Final = 20_000  # in one request: a third of the longest body that a service reads
_MICROSECONDS_FROM: Final = 10**14  # as milliseconds: in the year 5138


def from_frame(frame: pd.DataFrame, symbol: str | None = None) -> pd.DataFrame:
    """Any frame of candles: of freqtrade, yfinance, alpaca-py or backtesting.py.

    Opens are the index or a column `date`, `timestamp`, ...; without a time zone they are taken for UTC. Names may be
    capitalised. Columns or rows of several symbols need `symbol`. ValueError says what is missing.
    """
    table = _of_symbol(_of_symbol(frame, symbol, axis=1), symbol, axis=0)
    table = table.rename(columns=lambda name: str(name).strip().lower().replace(" ", "_"))
    opens = table.index if isinstance(table.index, pd.DatetimeIndex) else _column_of_opens(table)
    if missing := set(_COLUMNS[:-1]) - set(table.columns):
        raise ValueError(f"a frame of candles has no column {', '.join(sorted(missing))}; it has {list(frame.columns)}")
    if "amount" not in table.columns and "vwap" in table.columns:
        table = table.assign(amount=table["vwap"] * table["volume"])
    kept = table[[name for name in _COLUMNS if name in table.columns]]
    if kept.columns.has_duplicates:
        raise ValueError(f"a frame of candles has a column twice: {list(frame.columns)}")
    return kept.astype("float64").set_axis(_utc(opens), axis=0).rename_axis(columns=None)


def from_yfinance(frame: pd.DataFrame, symbol: str | None = None) -> pd.DataFrame:
    """What `yfinance.download` or `Ticker.history` gives; of several tickers, `symbol`'s, without days it has not.

    Prices are as they come: `Adj Close` is not used.
    """
    return from_frame(frame, symbol)


def from_ccxt(rows: Sequence[Sequence[Any]]) -> pd.DataFrame:
    """What `exchange.fetch_ohlcv` gives: [ms, open, high, low, close, volume], of which some append the amount."""
    return from_frame(pd.DataFrame(list(rows), columns=_ROW[: len(rows[0]) if rows else 6]))


def from_binance(klines: Sequence[Sequence[Any]]) -> pd.DataFrame:
    """What `GET /api/v3/klines` gives, or a row of its public files, whose times are microseconds since 2025."""
    table = pd.DataFrame(list(klines), columns=range(12))[list(_BINANCE)].rename(columns=_BINANCE)
    times = table["timestamp"].astype("int64")
    table["timestamp"] = times.where(times < _MICROSECONDS_FROM, times // 1000)
    return from_frame(table)


def from_alpaca(bars: Any, symbol: str | None = None) -> pd.DataFrame:
    """What `GET /v2/stocks/bars` gives, its list of bars, or alpaca-py's BarSet; of several symbols, `symbol`'s."""
    bars = getattr(bars, "df", bars)
    if isinstance(bars, pd.DataFrame):
        return from_frame(bars, symbol)
    if isinstance(bars, Mapping):
        bars = bars.get("bars", bars)
    if isinstance(bars, Mapping):
        bars = bars[_chosen(list(bars), symbol)]
    table = pd.DataFrame(list(bars), columns=list(_ALPACA)).rename(columns=_ALPACA)
    return from_frame(table.drop(columns="vwap") if table["vwap"].isna().any() else table)


def frame_of(rows: Sequence[Sequence[Any]]) -> pd.DataFrame:
    """Stored candles as the adapters give them."""
    return from_frame(pd.DataFrame(rows, columns=_ROW))


def payload(candles: Candles) -> list[Any] | dict[str, Any]:
    """Candles as a request holds them: a frame as columns, rows and columns as they are.

    ValueError names the first candle of a frame that lacks a value.
    """
    if not isinstance(candles, pd.DataFrame):
        return dict(candles) if isinstance(candles, Mapping) else list(candles)
    frame = from_frame(candles)
    missing = frame.isna().to_numpy()
    if missing.any():
        row, column = divmod(int(missing.argmax()), missing.shape[1])
        raise ValueError(f"the candle of {frame.index[row]} has no {frame.columns[column]}: fill it, or drop the row")
    opens = frame.index.astype("datetime64[ms, UTC]").astype("int64")
    return {"timestamp": opens.tolist(), **{str(name): frame[name].tolist() for name in frame.columns}}


def requests_of(candles: Candles) -> Iterator[list[Any] | dict[str, Any]]:
    """The payload in parts that fit into one request each, at least one."""
    whole = payload(candles)
    count = len(whole) if isinstance(whole, list) else max(map(len, whole.values()), default=0)
    for first in range(0, max(count, 1), _MOST_ROWS):
        part = slice(first, first + _MOST_ROWS)
        yield whole[part] if isinstance(whole, list) else {name: list(whole[name])[part] for name in whole}


def to_json(body: Mapping[str, Any]) -> bytes:
    """The body's JSON; ValueError if a number is none that JSON knows."""
    try:
        return json.dumps(body, allow_nan=False, default=_plain, separators=(",", ":")).encode()
    except ValueError as error:
        raise ValueError(f"the request holds a number that is not finite: {error}") from None


def _plain(value: Any) -> Any:
    """A date or a number of numpy's as JSON knows it."""
    if isinstance(value, datetime):
        return value.isoformat()
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be sent as JSON")


def _of_symbol(frame: pd.DataFrame, symbol: str | None, axis: int) -> pd.DataFrame:
    """One symbol's part of a frame whose columns (axis 1) or rows (axis 0) have a level of symbols."""
    labels = frame.axes[axis]
    if not isinstance(labels, pd.MultiIndex):
        return frame
    level = _level_of_symbols(labels, axis)
    chosen = _chosen(list(labels.unique(level)), symbol)
    part = frame.xs(chosen, axis="columns" if axis else "index", level=level)
    return cast(pd.DataFrame, part).dropna(how="all")  # days on which only the others have candles


def _level_of_symbols(labels: pd.MultiIndex, axis: int) -> int:
    """yfinance writes (price, ticker) or (ticker, price), alpaca-py (symbol, timestamp)."""
    for level in range(labels.nlevels):
        values = labels.unique(level)
        if isinstance(values, pd.DatetimeIndex) if axis == 0 else "close" in [str(name).lower() for name in values]:
            return 1 - level
    raise ValueError("the frame has two levels, of which none holds the times or prices of candles")


def _chosen(symbols: list[Any], symbol: str | None) -> Any:
    if symbol is None and len(symbols) == 1:
        return symbols[0]
    if symbol not in symbols:
        raise ValueError(f"name one of the symbols that are there: {', '.join(map(str, symbols))}")
    return symbol


def _column_of_opens(table: pd.DataFrame) -> "pd.Series[Any]":
    name = next((name for name in _TIMES if name in table.columns), None)
    if name is None:
        raise ValueError("a frame of candles needs their opens: a DatetimeIndex, or a column `date` or `timestamp`")
    return table[name]


def _utc(opens: "pd.DatetimeIndex | pd.Series[Any]") -> pd.DatetimeIndex:
    numbers = pd.api.types.is_numeric_dtype(opens)
    times = pd.DatetimeIndex(pd.to_datetime(opens, unit="ms" if numbers else None, utc=True))
    return times.as_unit("ns").rename("timestamp")

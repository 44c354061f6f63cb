"""CSV files -> series: one file per symbol, the usual column names, every dropped row counted."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.candles import (
    AMOUNT,
    CLOSE,
    COLUMNS,
    EARLIEST_MS,
    LATEST_MS,
    PRICES,
    SYMBOL,
    VOLUME,
    Floats,
    Millis,
    candle_faults,
    interval_name,
    with_amount,
)

_TIMESTAMP_NAMES: Final = ("timestamp", "timestamps", "datetime", "date", "ds", "open time", "time", "t", "unnamed: 0")
_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "open": ("open", "o"),
    "high": ("high", "h"),
    "low": ("low", "l"),
    "close": ("close", "c"),
    "volume": ("volume", "vol", "v"),
    "amount": ("amount", "turnover", "quote volume", "quote asset volume"),
    "adjusted": ("adj close", "adjclose", "adjusted close"),
}
_PER_MS: Final = (1e-3, 1.0, 1e3, 1e6)  # seconds, milliseconds, microseconds, nanoseconds
_DAY_ORDERS: Final = ("%m/%d/%Y", "%d/%m/%Y")
_ZONE: Final = r"(?:Z|:\d\d\S*[+-]\d\d(?::?\d\d)?)$"
_UNREADABLE: Final = -1


class CandleFileError(ValueError):
    """This file does not hold candles; the message names it and what was found."""


@dataclass(frozen=True, eq=False)
class Series:
    """All candles of one symbol, rising in time."""

    symbol: str
    interval: str
    timestamps: Millis  # [T] candle opens, UTC ms
    candles: Floats  # [T, 6] open high low close volume amount

    def __len__(self) -> int:
        return len(self.timestamps)


@dataclass(frozen=True)
class FileReport:
    """What became of a file's rows: `rows` = `kept` + `unreadable` + `invalid` + `duplicates`."""

    file: str
    symbol: str
    rows: int
    kept: int
    unreadable: int  # the timestamp is missing, or not one between 1980 and 2100
    invalid: int  # a value is missing, a price is not above zero, or the high or low contradicts the rest
    duplicates: int  # a later row has the same timestamp
    without_volume: bool
    adjusted: bool


def load(folder: Path, *, adjust: bool = False) -> tuple[list[Series], list[FileReport]]:
    """Every `*.csv` of `folder`, by symbol; `adjust` scales by the adjusted close where a file has one.

    CandleFileError if a file holds no candles, if two files name one symbol, or if there is no file.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".csv") if folder.is_dir() else []
    if not paths:
        raise CandleFileError(f"{folder} holds no .csv file")
    loaded = [read(path, adjust=adjust) for path in paths]
    symbols = [series.symbol for series, _ in loaded]
    for path, symbol in zip(paths, symbols, strict=True):
        if symbols.count(symbol) > 1:
            raise CandleFileError(f"{path}: another file of the folder is called {symbol} too")
    return [series for series, _ in loaded], [report for _, report in loaded]


@dataclass(frozen=True, eq=False)
class Rows:
    """A table's rows as candles, in its order; only those that are `candle` are any."""

    timestamps: Millis  # [T] UTC ms
    candles: Floats  # [T, 6]
    readable: NDArray[np.bool_]  # [T] whether there is a timestamp, between 1980 and 2100
    candle: NDArray[np.bool_]  # [T]
    adjusted: bool

    def in_order(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """These rows by time; of repeated timestamps the last."""
        order = rows[np.argsort(self.timestamps[rows], kind="stable")]
        return order[np.diff(self.timestamps[order], append=LATEST_MS + 1) > 0]


def read(path: Path, *, adjust: bool = False) -> tuple[Series, FileReport]:
    """The candles of one CSV file, sorted, of repeated timestamps the last; CandleFileError if it holds none."""
    table = read_table(path, str(path))
    rows = read_rows(table, str(path), adjust=adjust)
    candles = np.flatnonzero(rows.candle)
    kept = rows.in_order(candles)
    report = FileReport(
        file=path.name,
        symbol=_symbol(path),
        rows=len(table),
        kept=len(kept),
        unreadable=int((~rows.readable).sum()),
        invalid=int((rows.readable & ~rows.candle).sum()),
        duplicates=len(candles) - len(kept),
        without_volume=_column(str(path), table, "volume") is None,
        adjusted=rows.adjusted,
    )
    interval = _interval(path, rows.timestamps[kept], report)
    return Series(report.symbol, interval, rows.timestamps[kept], rows.candles[kept]), report


def read_table(source: Path | BytesIO, name: str) -> pd.DataFrame:
    """The cells of a CSV file as text under tidy names; CandleFileError, which calls it `name`, if it is none."""
    try:
        table = pd.read_csv(source, dtype=str, encoding="utf-8-sig")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise CandleFileError(f"{name} is not a CSV file: {error}") from error
    if not isinstance(table.index, pd.RangeIndex):  # pandas would shift every column by the surplus
        raise CandleFileError(f"{name}: its rows have more cells than its header has names")
    table.columns = [column_name(str(column)) for column in table.columns]
    if table.columns[0] == "price" and len(table) > 1 and table.iloc[0, 0] == "Ticker":
        table = _without_yfinance_header(name, table)
    return table


def column_name(text: str) -> str:
    """`<Open_Time>` as `open time`."""
    return text.strip().strip("<>").lower().replace("_", " ")


def read_rows(table: pd.DataFrame, name: str, *, adjust: bool = False) -> Rows:
    """What the cells of a table mean; CandleFileError, which calls it `name`, if it lacks a column."""
    timestamps = _timestamps(name, table)
    candles, adjusted = _candles(name, table, adjust)
    readable = (timestamps >= EARLIEST_MS) & (timestamps <= LATEST_MS)
    valid = ~np.any([broken for broken, _ in candle_faults(candles)], axis=0)
    return Rows(timestamps, candles, readable, readable & valid, adjusted)


def numbers(text: "pd.Series[str]") -> Floats:
    """`[T]` cells as numbers, NaN where there is none; pandas' own conversion is off in the last digit."""
    there = pd.to_numeric(text, errors="coerce").notna()
    return text.where(there).to_numpy(object).astype(np.float64)


def digest(series: Iterable[Series]) -> str:
    """SHA-256 of symbols, intervals, timestamps and candles, whatever the order of the series."""
    content = hashlib.sha256()
    for item in sorted(series, key=lambda item: (item.symbol, item.interval)):
        content.update(f"{item.symbol}\n{item.interval}\n{len(item)}\n".encode())
        content.update(np.ascontiguousarray(item.timestamps, dtype="<i8").tobytes())
        content.update(np.ascontiguousarray(item.candles, dtype="<f8").tobytes())
    return content.hexdigest()


def _without_yfinance_header(file: str, table: pd.DataFrame) -> pd.DataFrame:
    """yfinance writes two more header lines: the tickers, and `Date` above the first column."""
    tickers = sorted(set(table.iloc[0, 1:].dropna()))
    if len(tickers) != 1:
        raise CandleFileError(f"{file} holds several symbols ({', '.join(tickers)}): write one file for each")
    return table.iloc[2:].rename(columns={"price": "date"})


def _symbol(path: Path) -> str:
    symbol = path.stem.upper()
    if not SYMBOL.fullmatch(symbol):
        raise CandleFileError(f"{path}: {symbol!r} is not a symbol, which is up to 32 of A-Z 0-9 . _ ^ = -")
    return symbol


def _column(file: str, table: pd.DataFrame, name: str) -> "pd.Series[str] | None":
    found = [column for column in table.columns if column in _NAMES[name]]
    if len(found) > 1:
        raise CandleFileError(f"{file} has more than one {name} column: {', '.join(found)}")
    return table[found[0]] if found else None


def _candles(file: str, table: pd.DataFrame, adjust: bool) -> tuple[Floats, bool]:
    """`[T, 6]` with NaN where a cell holds no number, and whether the adjusted close was applied."""
    found = {name: _column(file, table, name) for name in _NAMES}
    missing = [name for name in COLUMNS[PRICES] if found[name] is None]
    if missing:
        raise CandleFileError(f"{file} has no column {', '.join(missing)}; it has {', '.join(table.columns)}")
    given = {name: numbers(text) for name, text in found.items() if text is not None}
    nothing = np.zeros(len(table))
    unknown = np.full(len(table), np.nan)
    candles = np.column_stack([given.get(name, unknown) for name in COLUMNS])
    candles[:, VOLUME] = given.get("volume", nothing)
    adjusted = adjust and "adjusted" in given
    if adjusted:
        candles = _adjusted(candles, given["adjusted"])
    return with_amount(candles), adjusted


def _adjusted(candles: Floats, adjusted_close: Floats) -> Floats:
    """Prices scaled by adjusted close / close, volume divided by it; what was traded in money stays."""
    with np.errstate(divide="ignore", invalid="ignore"):  # such rows are dropped as invalid
        factor = (adjusted_close / candles[:, CLOSE])[:, None]
        return np.column_stack([candles[:, PRICES] * factor, candles[:, VOLUME, None] / factor, candles[:, AMOUNT]])


def _timestamps(file: str, table: pd.DataFrame) -> Millis:
    """`[T]` UTC ms, _UNREADABLE where a cell holds no timestamp."""
    found = [name for name in _TIMESTAMP_NAMES if name in table.columns]
    if not found:
        raise CandleFileError(f"{file} has no timestamp column; it has {', '.join(table.columns)}")
    text = table[found[0]].str.strip()
    if found[0] == "date" and "time" in found:
        text = text + " " + table["time"].str.strip()
    numbers = pd.to_numeric(text, errors="coerce").to_numpy(np.float64)
    middle = np.nanmedian(numbers) if np.isfinite(numbers).any() else 0.0
    for per_ms in _PER_MS:
        if EARLIEST_MS <= middle / per_ms <= LATEST_MS:
            return np.where(np.isfinite(numbers), numbers / per_ms, _UNREADABLE).astype(np.int64)
    return _parsed(file, text.str.removesuffix(" UTC"))


def _parsed(file: str, text: "pd.Series[str]") -> Millis:
    """ISO 8601, or month/day/year in whichever order reads more cells; without a zone it is UTC."""
    text = text.where(text.str.len() >= len("20240131"))  # a row number such as 2004 is not a year
    if not text.str.contains("/", regex=False, na=False).any():
        zoned = text.str.contains(_ZONE, na=False)  # read apart: pandas lends a zone to the cells without one
        cells = (text.where(zoned), text.mask(zoned))
        with_zone, without = (pd.to_datetime(c, format="ISO8601", errors="coerce", utc=True) for c in cells)
        return _as_millis(with_zone.fillna(without))
    orders = [pd.to_datetime(text, format=order, errors="coerce", utc=True) for order in _DAY_ORDERS]
    readable = [int(times.notna().sum()) for times in orders]
    if readable[0] == readable[1] and (orders[0] != orders[1]).any():
        raise CandleFileError(f"{file}: {text.iloc[0]} could be month/day or day/month; write dates as 2024-12-31")
    return _as_millis(orders[int(np.argmax(readable))])


def _as_millis(times: "pd.Series[pd.Timestamp]") -> NDArray[np.int64]:
    millis = pd.DatetimeIndex(times).as_unit("ms").asi8
    return np.where(times.isna(), _UNREADABLE, millis)


def _interval(path: Path, timestamps: Millis, report: FileReport) -> str:
    if len(timestamps) < 2:
        raise CandleFileError(
            f"{path} holds {len(timestamps)} candles in {report.rows} rows"
            f" ({report.unreadable} without a timestamp, {report.invalid} that are not candles)"
        )
    step = int(np.quantile(np.diff(timestamps), 0.5, method="inverted_cdf"))
    try:
        return interval_name(step)
    except ValueError:
        detail = f"{path}: the median step between candles is {step} ms, not a whole number of minutes"
        raise CandleFileError(detail) from None

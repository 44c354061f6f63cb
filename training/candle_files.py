"""A folder of CSV files -> series: one file per symbol, the usual column names, every dropped row counted."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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

_TIMESTAMP_NAMES: Final = ("timestamp", "timestamps", "datetime", "date", "ds", "open time", "time", "unnamed: 0")
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


def read(path: Path, *, adjust: bool = False) -> tuple[Series, FileReport]:
    """The candles of one CSV file, sorted, of repeated timestamps the last; CandleFileError if it holds none."""
    table = _table(path)
    timestamps = _timestamps(path, table)
    candles, adjusted = _candles(path, table, adjust)
    readable = (timestamps >= EARLIEST_MS) & (timestamps <= LATEST_MS)
    invalid = readable & np.any([broken for broken, _ in candle_faults(candles)], axis=0)
    good = np.flatnonzero(readable & ~invalid)
    order = good[np.argsort(timestamps[good], kind="stable")]
    kept = order[np.diff(timestamps[order], append=LATEST_MS + 1) > 0]
    symbol = _symbol(path)
    report = FileReport(
        file=path.name,
        symbol=symbol,
        rows=len(table),
        kept=len(kept),
        unreadable=int((~readable).sum()),
        invalid=int(invalid.sum()),
        duplicates=len(order) - len(kept),
        without_volume=_column(path, table, "volume") is None,
        adjusted=adjusted,
    )
    interval = _interval(path, timestamps[kept], report)
    return Series(symbol, interval, timestamps[kept], candles[kept]), report


def digest(series: Iterable[Series]) -> str:
    """SHA-256 of symbols, intervals, timestamps and candles, whatever the order of the series."""
    content = hashlib.sha256()
    for item in sorted(series, key=lambda item: (item.symbol, item.interval)):
        content.update(f"{item.symbol}\n{item.interval}\n{len(item)}\n".encode())
        content.update(np.ascontiguousarray(item.timestamps, dtype="<i8").tobytes())
        content.update(np.ascontiguousarray(item.candles, dtype="<f8").tobytes())
    return content.hexdigest()


def _table(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str, encoding="utf-8-sig")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise CandleFileError(f"{path} is not a CSV file: {error}") from error
    if not isinstance(table.index, pd.RangeIndex):  # pandas would shift every column by the surplus
        raise CandleFileError(f"{path}: its rows have more cells than its header has names")
    table.columns = [str(name).strip().strip("<>").lower().replace("_", " ") for name in table.columns]
    if table.columns[0] == "price" and len(table) > 1 and table.iloc[0, 0] == "Ticker":
        table = _without_yfinance_header(path, table)
    return table


def _without_yfinance_header(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """yfinance writes two more header lines: the tickers, and `Date` above the first column."""
    tickers = sorted(set(table.iloc[0, 1:].dropna()))
    if len(tickers) != 1:
        raise CandleFileError(f"{path} holds several symbols ({', '.join(tickers)}): write one file for each")
    return table.iloc[2:].rename(columns={"price": "date"})


def _symbol(path: Path) -> str:
    symbol = path.stem.upper()
    if not SYMBOL.fullmatch(symbol):
        raise CandleFileError(f"{path}: {symbol!r} is not a symbol, which is up to 32 of A-Z 0-9 . _ ^ = -")
    return symbol


def _column(path: Path, table: pd.DataFrame, name: str) -> "pd.Series[str] | None":
    found = [column for column in table.columns if column in _NAMES[name]]
    if len(found) > 1:
        raise CandleFileError(f"{path} has more than one {name} column: {', '.join(found)}")
    return table[found[0]] if found else None


def _candles(path: Path, table: pd.DataFrame, adjust: bool) -> tuple[Floats, bool]:
    """`[T, 6]` with NaN where a cell holds no number, and whether the adjusted close was applied."""
    found = {name: _column(path, table, name) for name in _NAMES}
    missing = [name for name in COLUMNS[PRICES] if found[name] is None]
    if missing:
        raise CandleFileError(f"{path} has no column {', '.join(missing)}; it has {', '.join(table.columns)}")
    numbers = {
        name: pd.to_numeric(text, errors="coerce").to_numpy(np.float64)
        for name, text in found.items()
        if text is not None
    }
    nothing = np.zeros(len(table))
    unknown = np.full(len(table), np.nan)
    candles = np.column_stack([numbers.get(name, unknown) for name in COLUMNS])
    candles[:, VOLUME] = numbers.get("volume", nothing)
    adjusted = adjust and "adjusted" in numbers
    if adjusted:
        candles = _adjusted(candles, numbers["adjusted"])
    return with_amount(candles), adjusted


def _adjusted(candles: Floats, adjusted_close: Floats) -> Floats:
    """Prices scaled by adjusted close / close, volume divided by it; what was traded in money stays."""
    with np.errstate(divide="ignore", invalid="ignore"):  # such rows are dropped as invalid
        factor = (adjusted_close / candles[:, CLOSE])[:, None]
        return np.column_stack([candles[:, PRICES] * factor, candles[:, VOLUME, None] / factor, candles[:, AMOUNT]])


def _timestamps(path: Path, table: pd.DataFrame) -> Millis:
    """`[T]` UTC ms, _UNREADABLE where a cell holds no timestamp."""
    found = [name for name in _TIMESTAMP_NAMES if name in table.columns]
    if not found:
        raise CandleFileError(f"{path} has no timestamp column; it has {', '.join(table.columns)}")
    text = table[found[0]].str.strip()
    if found[0] == "date" and "time" in found:
        text = text + " " + table["time"].str.strip()
    numbers = pd.to_numeric(text, errors="coerce").to_numpy(np.float64)
    middle = np.nanmedian(numbers) if np.isfinite(numbers).any() else 0.0
    for per_ms in _PER_MS:
        if EARLIEST_MS <= middle / per_ms <= LATEST_MS:
            return np.where(np.isfinite(numbers), numbers / per_ms, _UNREADABLE).astype(np.int64)
    return _parsed(path, text.str.removesuffix(" UTC"))


def _parsed(path: Path, text: "pd.Series[str]") -> Millis:
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
        raise CandleFileError(f"{path}: {text.iloc[0]} could be month/day or day/month; write dates as 2024-12-31")
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

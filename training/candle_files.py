"""CSV and Parquet files -> series: the usual column names and layouts, every dropped row counted."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
_SYMBOL_NAMES: Final = ("symbol", "ticker")
_ENDINGS: Final = (".csv", ".parquet")
SUMMARY_NAME: Final = "data_summary.csv"  # what a check writes about candles is none of them
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
    """Every series of `folder`; `adjust` scales by the adjusted close where a file has one.

    CandleFileError if a file holds no candles, if two of them hold one symbol, or if there is no file.
    """
    series, reports = zip(*read_folder(folder, adjust=adjust), strict=True)
    return list(series), list(reports)


def read_folder(folder: Path, *, adjust: bool = False) -> Iterator[tuple[Series, FileReport]]:
    """What `load` gives, one file in memory at a time."""
    symbols: set[str] = set()
    for path in candle_paths(folder):
        for series, report in read_all(path, adjust=adjust):
            if series.symbol in symbols:
                raise CandleFileError(f"{path}: another file of the folder holds {series.symbol} too")
            symbols.add(series.symbol)
            yield series, report


def candle_paths(folder: Path) -> list[Path]:
    """The candle files of `folder`, sorted; CandleFileError if there is none."""
    found = folder.iterdir() if folder.is_dir() else ()
    paths = sorted(path for path in found if path.suffix.lower() in _ENDINGS and path.name != SUMMARY_NAME)
    if not paths:
        raise CandleFileError(f"{folder} holds no {' or '.join(_ENDINGS)} file")
    return paths


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
    """The candles of a file of one symbol, sorted, of repeated timestamps the last; CandleFileError if it is none."""
    found = read_all(path, adjust=adjust)
    if len(found) > 1:
        raise _several(str(path), [series.symbol for series, _ in found])
    return found[0]


def read_all(path: Path, *, adjust: bool = False) -> list[tuple[Series, FileReport]]:
    """The candles of every symbol of a file.

    Several of them are told apart by a column `symbol` or `ticker`, or by a second line of column names, as yfinance
    writes them; a file of one is called as that is. CandleFileError if it, or one of its symbols, holds no candles.
    """
    tables = _by_ticker(_parquet_cells(path) if path.suffix.lower() == ".parquet" else _csv_cells(path, str(path)))
    if len(tables) == 1:
        tables = _by_symbol_column(str(path), *tables.values())
    if len(tables) == 1:
        return [_read_series(path, str(path), _symbol(str(path), path.stem), *tables.values(), adjust=adjust)]
    return [
        _read_series(path, f"{path} ({name})", _symbol(str(path), name), tables[name], adjust=adjust)
        for name in sorted(tables)
    ]


def _read_series(path: Path, name: str, symbol: str, table: pd.DataFrame, *, adjust: bool) -> tuple[Series, FileReport]:
    rows = read_rows(table, name, adjust=adjust)
    candles = np.flatnonzero(rows.candle)
    kept = rows.in_order(candles)
    report = FileReport(
        file=path.name,
        symbol=symbol,
        rows=len(table),
        kept=len(kept),
        unreadable=int((~rows.readable).sum()),
        invalid=int((rows.readable & ~rows.candle).sum()),
        duplicates=len(candles) - len(kept),
        without_volume=_column(name, table, "volume") is None,
        adjusted=rows.adjusted,
    )
    interval = _interval(name, rows.timestamps[kept], report)
    return Series(symbol, interval, rows.timestamps[kept], rows.candles[kept]), report


def read_table(source: Path | BytesIO, name: str) -> pd.DataFrame:
    """The cells of a CSV file as text under tidy names; CandleFileError, which calls it `name`, if it is none.

    yfinance's two more lines of header are understood if they name one symbol.
    """
    tables = _by_ticker(_csv_cells(source, name))
    if len(tables) > 1:
        raise _several(name, sorted(tables))
    return next(iter(tables.values()))


def _csv_cells(source: Path | BytesIO, name: str) -> pd.DataFrame:
    """The cells of a CSV file as text; two levels of columns where its header has three lines."""
    try:
        table = pd.read_csv(source, dtype=str, encoding="utf-8-sig")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise CandleFileError(f"{name} is not a CSV file: {error}") from error
    if not isinstance(table.index, pd.RangeIndex):  # pandas would shift every column by the surplus
        raise CandleFileError(f"{name}: its rows have more cells than its header has names")
    if len(table) < 2 or not _is_timestamp_name(table.iloc[1, 0]) or table.iloc[1, 1:].notna().any():
        return table
    uppers = [_unnumbered(column, table.columns) for column in table.columns[1:]]
    pairs = [(str(table.iloc[1, 0]), ""), *zip(uppers, table.iloc[0, 1:].fillna(""), strict=True)]
    return table.iloc[2:].set_axis(pd.MultiIndex.from_tuples(pairs), axis=1)


def _parquet_cells(path: Path) -> pd.DataFrame:
    """The columns of a Parquet file, an index of timestamps among them: numbers, times, and all else as text."""
    try:
        table = pd.read_parquet(path, engine="pyarrow")
        if isinstance(table.index, pd.DatetimeIndex):
            table.index = table.index.rename(table.index.name or "timestamp")
        if any(_is_timestamp_name(name) for name in table.index.names):
            table = table.reset_index()
    except ImportError:
        raise CandleFileError(f"{path}: Parquet needs pyarrow: pip install 'candlecast[parquet]'") from None
    except (ValueError, OSError) as error:
        raise CandleFileError(f"{path} is not a Parquet file: {error}") from error
    kinds = (pd.api.types.is_numeric_dtype, pd.api.types.is_datetime64_any_dtype)
    cells = [
        column if any(is_kind(column) for is_kind in kinds) else column.astype(object).map(str, na_action="ignore")
        for _, column in table.items()
    ]
    return pd.concat(cells, axis=1)


def _by_ticker(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """A table under tidy names; if its columns have two levels, fields and tickers in either order, one per ticker.

    Tickers share their timestamps: rows where one of several has no cell at all are not its own.
    """
    if table.columns.nlevels == 1:
        return {"": table.set_axis([column_name(str(column)) for column in table.columns], axis=1)}
    upper, lower = ([str(name) for name in table.columns.get_level_values(level)] for level in (0, 1))
    fields, tickers = (lower, upper) if "close" in map(column_name, lower) else (upper, lower)
    parted = {}
    for ticker in dict.fromkeys(tickers[1:]):
        places = [place for place, name in enumerate(tickers) if place and name == ticker]
        own = table.iloc[:, places].set_axis([column_name(fields[place]) for place in places], axis=1)
        own.insert(0, "timestamp", table.iloc[:, 0])
        parted[ticker] = own
    if len(parted) > 1:
        parted = {ticker: own.dropna(how="all", subset=own.columns[1:]) for ticker, own in parted.items()}
    return parted


def _by_symbol_column(name: str, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The table, or one for each symbol where a column tells several apart."""
    column = next((column for column in _SYMBOL_NAMES if column in table.columns), None)
    if column is None or table[column].nunique() < 2:
        return {"": table}
    if table[column].isna().any():
        raise CandleFileError(f"{name} has rows without a {column}")
    return {str(symbol): rows for symbol, rows in table.groupby(column)}


def column_name(text: str) -> str:
    """`<Open_Time>` as `open time`."""
    return text.strip().strip("<>").lower().replace("_", " ")


def _is_timestamp_name(name: object) -> bool:
    return column_name(str(name)) in _TIMESTAMP_NAMES


def _unnumbered(column: str, columns: Iterable[str]) -> str:
    """The name as it was written: pandas counts repeated ones, `Close.1`."""
    written = re.sub(r"\.\d+$", "", column)
    return written if written in columns else column


def read_rows(table: pd.DataFrame, name: str, *, adjust: bool = False) -> Rows:
    """What the cells of a table mean; CandleFileError, which calls it `name`, if it lacks a column."""
    timestamps = _timestamps(name, table)
    candles, adjusted = _candles(name, table, adjust)
    readable = (timestamps >= EARLIEST_MS) & (timestamps <= LATEST_MS)
    valid = ~np.any([broken for broken, _ in candle_faults(candles)], axis=0)
    return Rows(timestamps, candles, readable, readable & valid, adjusted)


def numbers(text: "pd.Series[str]") -> Floats:
    """`[T]` cells as numbers, NaN where there is none; pandas' own conversion of text is off in the last digit."""
    if pd.api.types.is_numeric_dtype(text):
        return text.to_numpy(np.float64, na_value=np.nan)
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


def _several(file: str, symbols: Sequence[str]) -> CandleFileError:
    return CandleFileError(f"{file} holds several symbols ({', '.join(symbols)}): write one file for each")


def _symbol(file: str, name: str) -> str:
    symbol = re.sub("[/:]", "-", name).upper()
    if not SYMBOL.fullmatch(symbol):
        raise CandleFileError(f"{file}: {symbol!r} is not a symbol, which is up to 32 of A-Z 0-9 . _ ^ = -")
    return symbol


def _column(file: str, table: pd.DataFrame, name: str) -> "pd.Series[str] | None":
    found = [column for column in table.columns if _unnumbered(column, table.columns) in _NAMES[name]]
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
    if table.columns.tolist().count(found[0]) > 1:
        raise CandleFileError(f"{file} has more than one column {found[0]}")
    column = table[found[0]]
    if pd.api.types.is_datetime64_any_dtype(column):
        return _as_millis(pd.to_datetime(column, utc=True))
    text = column.map(str, na_action="ignore").str.strip()
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


def _interval(file: str, timestamps: Millis, report: FileReport) -> str:
    if len(timestamps) < 2:
        raise CandleFileError(
            f"{file} holds {len(timestamps)} candles in {report.rows} rows"
            f" ({report.unreadable} without a timestamp, {report.invalid} that are not candles)"
        )
    step = int(np.quantile(np.diff(timestamps), 0.5, method="inverted_cdf"))
    try:
        return interval_name(step)
    except ValueError:
        detail = f"{file}: the median step between candles is {step} ms, not a whole number of minutes"
        raise CandleFileError(detail) from None

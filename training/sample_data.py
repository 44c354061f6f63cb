"""Real daily candles as CSV files, from Python packages that ship them: no download, equal bytes everywhere."""

import csv
import gzip
import importlib.util
from collections.abc import Iterator
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Final

import numpy as np

from models.candles import VOLUME, Floats, check_candles

STOCKS: Final = ("AAPL", "FB", "GOOG", "IBM", "MSFT")
INDICES: Final = {"GSPC": "sp500", "IXIC": "nasdaq"}  # S&P 500 and NASDAQ Composite -> folder in arch
_HEADER: Final = "timestamp,open,high,low,close,volume"

Table = tuple[list[str], Floats]  # dates, [T, 5] candles


class MissingSamples(RuntimeError):
    """A package that ships sample candles is not installed."""


def write_samples(folder: Path) -> list[Path]:
    """Write `SYMBOL.csv` for every sample symbol into `folder` and return the paths.

    Prices and volumes are adjusted for splits and dividends. MissingSamples says what to install.
    """
    tables = dict(_stocks()) | {symbol: _index(name) for symbol, name in INDICES.items()}
    folder.mkdir(parents=True, exist_ok=True)
    return [_write(folder / f"{symbol}.csv", *tables[symbol]) for symbol in sorted(tables)]


def _stocks() -> Iterator[tuple[str, Table]]:
    rows = _rows(_packaged("bokeh_sampledata", "_data/stocks.csv.gz"))
    for symbol, group in groupby(rows, key=lambda row: row["Ticker"]):
        if symbol in STOCKS:
            yield symbol, _table(list(group), "%Y-%m-%d")


def _index(name: str) -> Table:
    return _table(_rows(_packaged("arch", f"data/{name}/{name}.csv.gz")), "%m/%d/%Y")


def _packaged(package: str, path: str) -> Path:
    """A file inside an installed package, found without importing it: arch alone takes seconds to import."""
    spec = importlib.util.find_spec(package)
    for home in (spec.submodule_search_locations or []) if spec else []:
        if (Path(home) / path).is_file():
            return Path(home) / path
    raise MissingSamples(f"the package {package} with {path} is not installed: pip install 'candlecast[samples]'")


def _rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _table(rows: list[dict[str, str]], date_format: str) -> Table:
    columns = ("Open", "High", "Low", "Close", "Volume")
    raw = np.array([[float(row[name]) for name in columns] for row in rows])
    factor = np.array([float(row["Adj Close"]) for row in rows]) / raw[:, 3]
    candles = raw * factor[:, None]
    candles[:, VOLUME] = raw[:, VOLUME] / factor
    check_candles(candles)  # one factor for a whole row rounds monotonically: no high ends below its open
    dates = [datetime.strptime(row["Date"], date_format).date().isoformat() for row in rows]  # noqa: DTZ007 a date
    return dates, candles


def _write(path: Path, dates: list[str], candles: Floats) -> Path:
    lines = [_HEADER]
    for date, (*prices, volume) in zip(dates, candles.tolist(), strict=True):
        lines.append(",".join([date, *(f"{price:.10g}" for price in prices), f"{volume:.0f}"]))
    path.write_bytes("\n".join([*lines, ""]).encode())
    return path

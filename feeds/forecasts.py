"""Forecasts as they were served -> one Parquet file, in the columns that bots of other makes read."""

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pandas as pd

from feeds.put import Service

COLUMNS: Final = (
    *("timestamp", "symbol", "issued_at", "target_timestamp", "horizon"),
    *("predicted_close_p10", "predicted_close_p50", "predicted_close_p90", "predicted_high_p50", "predicted_low_p50"),
    *("interval", "model"),
)
_TIMES: Final = ("timestamp", "issued_at", "target_timestamp")


def served_forecasts(service: Service, symbols: Sequence[str], as_of: datetime | None) -> pd.DataFrame:
    """One row for each step that had been issued by `as_of` (default: now), by symbol, issue and step.

    `timestamp` and `target_timestamp` are openings of candles, UTC; nothing in a row was known later than `issued_at`.
    Empty `symbols` means all; LookupError if one is not stored. Raises what Service does.
    """
    series = _chosen(service.stored(), symbols)
    table = pd.DataFrame(list(_rows(service, series, as_of)), columns=COLUMNS)
    for name in _TIMES:
        table[name] = pd.to_datetime(table[name].astype("int64"), unit="ms", utc=True)
    return table.astype({"horizon": "int32"})


def write_parquet(table: pd.DataFrame, path: Path) -> None:
    """Write the file whole or not at all; RuntimeError says what to install."""
    try:
        import pyarrow  # type: ignore[import-untyped] # noqa: F401
    except ImportError:
        raise RuntimeError("Parquet needs pyarrow: pip install 'candlecast[parquet]'") from None
    part = path.with_name(f".{path.name}.part")
    try:
        table.to_parquet(part, index=False)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _chosen(stored: Sequence[tuple[str, str]], symbols: Sequence[str]) -> Sequence[tuple[str, str]]:
    """The stored series of these symbols, which are written as the service takes them: `btc/usdt` is BTC-USDT."""
    wanted = {re.sub(r"[/:]", "-", symbol).upper() for symbol in symbols}
    if missing := wanted - {symbol for symbol, _ in stored}:
        raise LookupError(f"no candles of {', '.join(sorted(missing))} are stored; GET /symbols lists what is")
    return [(symbol, interval) for symbol, interval in stored if not wanted or symbol in wanted]


def _rows(service: Service, series: Sequence[tuple[str, str]], as_of: datetime | None) -> Iterator[list[Any]]:
    for symbol, interval in series:
        answer = service.forecasts(symbol, interval, as_of)
        for row in answer["rows"]:
            known = dict(zip(answer["columns"], row, strict=True), symbol=symbol, interval=interval)
            yield [known[name] for name in COLUMNS]

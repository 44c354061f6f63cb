"""CSV or JSON lines, as they arrive -> candles by symbol: in chunks, so that memory and waiting stay bounded."""

import csv
import json
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.candles import AMOUNT, COLUMNS, VOLUME, Floats, Millis, candle_faults
from training.candle_files import CandleFileError, Rows, column_name, numbers, read_rows, read_table

CHUNK_ROWS: Final = 10_000  # half of what one request takes: a chunk goes in whole or not at all
CHUNK_SECONDS: Final = 1.0  # the longest that a line waits for those after it
_BLOCK: Final = 64 * 1024
_BLOCKS: Final = 8  # that may wait to be split into lines
_LONGEST_LINE: Final = 64 * 1024
_BOM: Final = b"\xef\xbb\xbf"
_ROW_NAMES: Final[Mapping[int, tuple[str, ...]]] = {
    6: ("timestamp", *COLUMNS[:AMOUNT]),
    7: ("timestamp", *COLUMNS),
    12: ("timestamp", *COLUMNS[:AMOUNT], "closes", "amount", "trades", "bought", "paid", "ignored"),  # Binance's
}
_AVERAGE: Final = "vw"  # Alpaca's price per unit: volume times it is the amount
_NO_TIME: Final = "has no timestamp between 1980 and 2100"


class Line(NamedTuple):
    """One line and its place in the input, from 1."""

    number: int
    text: bytes


class Chunk(NamedTuple):
    """Lines that came together, none of them blank, and how many bytes were read so far."""

    lines: list[Line]
    read: int


class BadLine(NamedTuple):
    """A line that is no candle."""

    number: int
    reason: str


@dataclass(frozen=True, eq=False)
class Part:
    """Candles of one series, rising in time, with the line of each."""

    symbol: str
    interval: str | None
    timestamps: Millis  # [T]
    candles: Floats  # [T, 6]
    lines: NDArray[np.int64]  # [T]

    def __len__(self) -> int:
        return len(self.timestamps)

    def before(self, line: int) -> "Part":
        """The candles of earlier lines."""
        kept = self.lines < line
        return Part(self.symbol, self.interval, self.timestamps[kept], self.candles[kept], self.lines[kept])

    def with_later(self, other: "Part") -> "Part":
        """Both as one; of repeated timestamps the other's candle."""
        timestamps = np.concatenate([self.timestamps, other.timestamps])
        candles, lines = np.concatenate([self.candles, other.candles]), np.concatenate([self.lines, other.lines])
        everything = np.ones(len(timestamps), bool)
        kept = Rows(timestamps, candles, everything, everything, adjusted=False).in_order(np.flatnonzero(everything))
        return Part(other.symbol, other.interval, timestamps[kept], candles[kept], lines[kept])


def chunks(descriptor: int, *, rows: int = CHUNK_ROWS, seconds: float = CHUNK_SECONDS) -> Iterator[Chunk]:
    """The lines of an open file, at most `rows` at once and none later than `seconds` after it came."""
    blocks: queue.Queue[bytes | OSError] = queue.Queue(_BLOCKS)
    threading.Thread(target=_read_blocks, args=(os.dup(descriptor), blocks), daemon=True).start()
    rest, number, read, due = b"", 0, 0, 0.0
    lines: list[Line] = []
    while True:
        try:
            block = blocks.get(timeout=max(0.0, due - time.monotonic()) if lines else None)
        except queue.Empty:
            yield Chunk(lines, read)
            lines = []
            continue
        if isinstance(block, OSError):
            raise block
        read += len(block)
        *whole, rest = (rest + block).split(b"\n") if block else (rest, b"")
        if len(rest) > _LONGEST_LINE:
            raise CandleFileError(f"line {number + len(whole) + 1} is longer than {_LONGEST_LINE} bytes")
        due = due if lines else time.monotonic() + seconds
        lines += [Line(number + place, text) for place, text in enumerate(whole, 1) if text.strip()]
        number += len(whole)
        while len(lines) >= rows or (lines and (not block or time.monotonic() >= due)):
            yield Chunk(lines[:rows], read)
            lines = lines[rows:]
        if not block:
            return


def _read_blocks(descriptor: int, blocks: "queue.Queue[bytes | OSError]") -> None:
    """Past Python's buffers, whose lock a thread that is still reading would hold at the end of the process."""
    try:
        while block := os.read(descriptor, _BLOCK):
            blocks.put(block)
    except OSError as error:
        blocks.put(error)
    else:
        blocks.put(b"")
    finally:
        os.close(descriptor)


class Reader:
    """What the lines of one input mean; whether it is a CSV or JSON lines, its first byte tells."""

    def __init__(self, name: str, symbol: str | None = None, interval: str | None = None) -> None:
        self.name = name
        self._symbol = symbol
        self._interval = interval
        self._is_json: bool | None = None
        self._header: list[bytes] = []

    def read(self, lines: list[Line]) -> tuple[list[Part], list[BadLine]]:
        """The candles of the next lines, by series, and the lines that hold none.

        CandleFileError if the input is no list of candles at all, or if nobody named the symbol.
        """
        if self._is_json is None:
            lines = [Line(lines[0].number, lines[0].text.removeprefix(_BOM)), *lines[1:]]
            self._is_json = lines[0].text.lstrip()[:1] in (b"{", b"[")
        if not self._is_json:
            lines = self._after_header(lines)
        table, lines, bad = self._json_table(lines) if self._is_json else self._csv_table(lines)
        if not lines:
            return [], bad
        parts, worse = self._parts(table, lines)
        return parts, sorted(bad + worse)

    def _after_header(self, lines: list[Line]) -> list[Line]:
        """The lines without the header, which is one line, or the three that yfinance writes."""
        while lines and (not self._header or self._begins_as_yfinance(lines[0].text)):
            self._header.append(lines[0].text)
            lines = lines[1:]
        return lines

    def _begins_as_yfinance(self, text: bytes) -> bool:
        if len(self._header) == 1:
            return self._header[0].lower().startswith(b"price,") and text.startswith(b"Ticker,")
        return len(self._header) == 2

    def _csv_table(self, lines: list[Line]) -> tuple[pd.DataFrame, list[Line], list[BadLine]]:
        width = len(next(csv.reader([self._header[0].decode(errors="replace")])))
        good, bad = [], []
        for line in lines:
            fault = _fault_of_cells(line.text, width)
            if fault:
                bad.append(BadLine(line.number, fault))
            else:
                good.append(line)
        content = b"\n".join([*self._header, *(line.text for line in good)])
        table = read_table(BytesIO(content), self.name)
        if len(table) != len(good):
            raise CandleFileError(f"{self.name}: its rows are not one line each")
        return table, good, bad

    def _json_table(self, lines: list[Line]) -> tuple[pd.DataFrame, list[Line], list[BadLine]]:
        records, good, bad = [], [], []
        for line in lines:
            try:
                records.append(_record(line.text))
            except ValueError as error:
                bad.append(BadLine(line.number, str(error)))
            else:
                good.append(line)
        return pd.DataFrame(records, dtype=object), good, bad

    def _parts(self, table: pd.DataFrame, lines: list[Line]) -> tuple[list[Part], list[BadLine]]:
        """The rows of a table by symbol and interval."""
        rows = read_rows(table, self.name)
        if _AVERAGE in table.columns:
            amount = numbers(table[_AVERAGE]) * rows.candles[:, VOLUME]
            rows.candles[:, AMOUNT] = np.where(np.isfinite(amount), amount, rows.candles[:, AMOUNT])
        places = np.array([line.number for line in lines])
        bad = [BadLine(int(places[row]), _fault(rows, row)) for row in np.flatnonzero(~rows.candle).tolist()]
        parts = []
        for (symbol, interval), members in self._series(table).items():
            kept = rows.in_order(members[rows.candle[members]])
            if len(kept) and not symbol:
                raise CandleFileError(f"{self.name} line {places[kept[0]]} names no symbol: --symbol does")
            if len(kept):
                parts.append(Part(symbol, interval or None, rows.timestamps[kept], rows.candles[kept], places[kept]))
        return parts, bad

    def _series(self, table: pd.DataFrame) -> dict[Any, NDArray[np.intp]]:
        """Symbol and interval, empty where unknown -> the rows of that series."""
        keys = pd.DataFrame(index=table.index)
        for name, default in (("symbol", self._symbol or ""), ("interval", self._interval or "")):
            keys[name] = table[name].fillna(default).str.strip() if name in table.columns else default
        found: dict[Any, Any] = keys.groupby(["symbol", "interval"], sort=False).indices
        return {key: np.asarray(rows, np.intp) for key, rows in found.items()}


def _fault_of_cells(text: bytes, width: int) -> str | None:
    """Why a line of a CSV is no row of `width` cells."""
    try:
        line = text.decode()
    except UnicodeDecodeError:
        return "is not UTF-8"
    if line.count('"') % 2:
        return "has a quote that is not closed"
    if line.count(",") >= width and len(next(csv.reader([line]))) > width:
        return "has more cells than the header has names"
    return None


def _record(text: bytes) -> dict[str, str | None]:
    """The cells of one JSON line, as text; ValueError if it is no object and no row of candles."""
    try:
        found = json.loads(text, parse_float=str, parse_int=str)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if isinstance(found, list):
        if len(found) not in _ROW_NAMES:
            raise ValueError("is no row of 6, 7 or 12 values")
        found = dict(zip(_ROW_NAMES[len(found)], found, strict=True))
    if not isinstance(found, dict):
        raise ValueError("is no object and no row")
    return {column_name(name): None if value is None else str(value) for name, value in found.items()}


def _fault(rows: Rows, row: int) -> str:
    if not rows.readable[row]:
        return _NO_TIME
    return next(reason for broken, reason in candle_faults(rows.candles[row : row + 1]) if broken.any())

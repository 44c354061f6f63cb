"""Requests that no caller sends in good faith; each is to be refused, at once and in few words."""

import gzip
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from bench.service import ccxt_rows

MARKER: Final = "attack-at-dawn"  # in values that were sent, and never in an answer
_JSON: Final = {"Content-Type": "application/json"}
_HOUR: Final = 3_600_000
_LENGTH: Final = 4096  # candles of the longest context


class Hostile(NamedTuple):
    """A request to a route that takes candles."""

    name: str
    path: str
    body: bytes
    headers: Mapping[str, str] = _JSON

    @property
    def method(self) -> str:
        return "PUT" if self.path.startswith("/candles") else "POST"


def corpus() -> Iterator[Hostile]:
    """Every body for both routes that take candles, and those that only a forecast has a place for."""
    for name, body, *headers in (*_candles(), *_texts(), *_bombs()):
        for path in ("/forecast/BTC", "/candles/BTC"):
            yield Hostile(f"{name} to {path}", path, body, *headers)
    for name, fields in _FIELDS.items():
        yield Hostile(name, "/forecast/BTC-USDT", f'{{"model": "naive", {fields}}}'.encode())
    for kind in ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded", "application/xml", "json"):
        yield Hostile(f"type {kind}", "/forecast/BTC", b'{"model": "naive"}', {"Content-Type": kind})


_FIELDS: Final = {
    **{
        f"{field} {value}": f'"{field}": {value}'
        for field in ("temperature", "top_p")
        for value in ("NaN", "-Infinity")
    },
    **{f"{field} 1e999": f'"{field}": 1e999' for field in ("horizon", "samples", "seed", "as_of", "quantiles")},
    **{f"{field} 2^64": f'"{field}": {2**64}' for field in ("horizon", "lookback", "samples", "seed", "timeout_ms")},
    **{f"{field} text": f'"{field}": "{MARKER}"' for field in ("horizon", "interval", "calendar", "as_of", "cache")},
    "quantile NaN": '"quantiles": [NaN]',
    "path as a model": f'"model": "../{MARKER}"',
    "aggregate of nothing": f'"aggregate": "{MARKER}"',
    "a model that is none": f'"model": "{MARKER}"',
}

_CELLS: Final = {
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "1e999": "1e999",
    "-1": "-1",
    "boolean": "true",
    "text": f'"{MARKER}"',
    "null": "null",
    "list": "[1]",
    "object": '{"a": 1}',
    "400 digits": "9" * 400,
}
_TIMES: Final = {
    "seconds": "1700000000",
    "microseconds": "1700006400000000",
    "nanoseconds": "1700006400000000000",
    "2^63": str(2**63),
    "negative": "-1",
    "before 2000": "915148800000",
    "far future": "7258118400000",
    "fraction": "1700006400000.5",
    "without offset": '"2025-06-15T00:00:00"',
    "February 30": '"2025-02-30T00:00:00Z"',
}


def _candles() -> Iterator[tuple[str, bytes]]:
    """Of eight candles one cell, one row or one time is wrong."""
    for column in range(1, 6):
        for name, cell in _CELLS.items():
            yield f"{name} in column {column}", _rows((3, column, cell))
    for name, cell in {"0": "0", **_TIMES}.items():
        yield f"{name} as a time", _rows((3, 0, cell))
    hour = time.time_ns() // 1_000_000 // _HOUR * _HOUR
    yield "high below low", _rows((3, 2, "0.001"))
    yield "zero price", _rows((3, 4, "0"))
    yield "off the grid", _rows((3, 0, str(hour - 5 * _HOUR + 60_000)))
    yield "repeated", _rows((3, 0, str(hour - 6 * _HOUR)))
    yield "unsorted", _rows((3, 0, str(hour - 2 * _HOUR)), (6, 0, str(hour - 5 * _HOUR)))
    yield "no rows", b'{"candles": 1}'
    yield "rows of unequal width", b'{"candles": [[1700006400000, 1, 1, 1, 1, 1], [1700010000000, 1, 1, 1, 1]]}'
    yield (
        "unequal columns",
        b'{"candles": {"timestamp": [1], "open": [], "high": [], "low": [], "close": []}}',
    )


def _rows(*changes: tuple[int, int, str]) -> bytes:
    last = time.time_ns() // 1_000_000 // _HOUR * _HOUR - _HOUR
    cells = [[json.dumps(cell) for cell in row] for row in ccxt_rows(8, last, _HOUR)]
    for row, column, cell in changes:
        cells[row][column] = cell
    rows = ", ".join(f"[{', '.join(row)}]" for row in cells)
    return f'{{"candles": [{rows}], "interval": "1h"}}'.encode()


def _texts() -> Iterator[tuple[Any, ...]]:
    """What is no JSON, or JSON of two meanings."""
    good = _rows()
    yield "a key twice", b'{"candles": [], ' + good[1:]
    yield "a key twice, once escaped", b'{"\\u0063andles": [], ' + good[1:]
    yield "a key twice in a candle", b'{"candles": [{"t": 1, "t": 2}]}'
    yield "byte order mark", b"\xef\xbb\xbf" + good
    yield "UTF-16", good.decode().encode("utf-16")
    yield "UTF-32", good.decode().encode("utf-32")
    yield "invalid UTF-8", b'{"candles": "\xff\xfe"}'
    yield "overlong UTF-8", b'{"candles": "\xc0\xaf"}'
    yield "surrogate bytes", b'{"candles": "\xed\xa0\x80"}'
    yield "lone surrogate", b'{"calendar": "\\ud800", ' + good[1:]
    yield "lone surrogate as a key", b'{"\\ud800": 1}'
    yield "zero bytes", b"\0" * 64
    yield "zero byte in a text", b'{"interval": "1h\\u0000", ' + good[1:]
    yield "half", good[: len(good) // 2]
    yield "two", good + good
    yield "trailing comma", good[:-1] + b",}"
    yield "comment", b"/**/" + good
    yield "single quotes", good.replace(b'"', b"'")
    yield "leading zero", b'{"candles": [[01, 1, 1, 1, 1, 1]]}'
    yield "a list", b"[1]"
    yield "a text", b'"%s"' % MARKER.encode()
    yield "unknown member", b'{"x": "%s", ' % MARKER.encode() + good[1:]
    for coding in ("gzip", "deflate", "br", "identity, gzip"):
        yield (
            f"coded as {coding}",
            gzip.compress(good),
            {**_JSON, "Content-Encoding": coding},
        )


def _bombs() -> Iterator[tuple[str, bytes]]:
    """Much work in few bytes: none is longer than an honest request of the longest context."""
    size = len(json.dumps({"candles": ccxt_rows(_LENGTH, 0, _HOUR)}))
    yield "deep list", b'{"candles": ' + b"[" * size
    yield "deep object", b'{"a":' * (size // 5)
    yield "empty lists", b'{"candles": [' + b"[]," * (size // 3) + b"[]]}"
    yield "empty objects", b'{"candles": [' + b"{}," * (size // 3) + b"{}]}"
    yield "ones", b'{"candles": [' + b"1," * (size // 2) + b"1]}"
    yield "a wide row", b'{"candles": [[' + b"1," * (size // 2) + b"1]]}"
    yield "one candle many times", b'{"candles": [' + b"[1700006400000,1,1,1,1,1]," * (size // 26) + b"[]]}"
    yield "many members", b"{" + b",".join(b'"%d":1' % key for key in range(size // 10)) + b"}"
    yield "many members in a candle", b'{"candles": [{' + b",".join(b'"%d":1' % k for k in range(size // 10)) + b"}]}"
    yield "many digits", b'{"candles": ' + b"9" * size + b"}"
    yield "many decimals", b'{"candles": 0.' + b"9" * size + b"}"
    yield "long text", b'{"candles": "' + b"a" * size + b'"}'
    yield "escapes", b'{"candles": "' + b"\\u0061" * (size // 6) + b'"}'
    yield "blanks", b" " * size
    yield "compressed bomb", gzip.compress(b"[" * 50_000_000)

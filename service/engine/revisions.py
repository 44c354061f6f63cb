"""What is stored of a series, in a few bytes: while they are the same, reading its candles again finds the same.

`cc:1:{SYMBOL:interval}:r` changes with every block that is written, in the same step; no value of it comes back.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Revision:
    """The stored intervals of a symbol with their calendars, and the mark of the last write to one of them."""

    calendars: dict[bytes, bytes]
    mark: bytes


def series_key(symbol: str) -> str:
    """Where the calendars of a symbol's intervals lie."""
    return f"cc:1:{{{symbol}}}:s"


def revision_key(symbol: str, interval: str) -> str:
    """Where the mark of a series lies."""
    return series_stem(symbol, interval) + "r"


def series_stem(symbol: str, interval: str) -> str:
    """What every key of a series begins with."""
    return f"cc:1:{{{symbol}:{interval}}}:"

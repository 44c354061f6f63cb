"""Share splits that nobody adjusted for: found by what they do to prices, and undone where that is asked for."""

from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np

from models.candles import AMOUNT, CLOSE, OPEN, PRICES, VOLUME, Floats
from training.candle_files import Series

_WHOLE: Final = (2, 3, 4, 5, 6, 7, 8, 10, 15, 20, 25, 30, 40, 50, 100)
_RATIOS: Final = (1.5, *_WHOLE, 1 / 1.5, *(1 / many for many in _WHOLE))  # new shares for an old one
_NAMES: Final = ("3:2", *(f"{many}:1" for many in _WHOLE), "2:3", *(f"1:{many}" for many in _WHOLE))
_BEFORE: Final = 60  # candles that tell what is usual
_MOVE: Final = 4.0  # standard deviations by which the market itself may move on the day of a split,
_NEAREST, _FURTHEST = 0.02, 0.12  # between these logarithms
_MONEY: Final = 4.0  # a split trades more shares but the usual amount, up to this factor; news trades more of both


class SuspectedSplit(NamedTuple):
    """From candle `row` on prices are as if each share had become `ratio` shares."""

    row: int
    ratio: float
    name: str  # such as 2:1


def suspected_splits(candles: Floats) -> list[SuspectedSplit]:
    """Where open and close of `[T, 6]` candles moved by very nearly a usual ratio while the amount traded did not.

    A crash that halves a price seldom both opens and closes at a half, and trades many times the usual amount.
    """
    logs, closes = np.log(_RATIOS), np.log(candles[:, CLOSE])
    falls, gaps = closes[:-1] - closes[1:], closes[:-1] - np.log(candles[1:, OPEN])
    nearest = np.abs(falls[:, None] - logs).argmin(axis=1)
    distance = np.maximum(np.abs(falls - logs[nearest]), np.abs(gaps - logs[nearest]))
    return [
        SuspectedSplit(row + 1, _RATIOS[nearest[row]], _NAMES[nearest[row]])
        for row in np.flatnonzero(distance < _FURTHEST).tolist()
        if distance[row] < _usual_move(falls[max(0, row - _BEFORE) : row])
        and _is_usual(candles[max(0, row + 1 - _BEFORE) : row + 2, AMOUNT])
    ]


def without_splits(item: Series) -> Series:
    """The series in shares of its last candle: earlier prices divided by every later suspected split's ratio."""
    shares = np.ones((len(item), 1))
    for row, ratio, _ in suspected_splits(item.candles):
        shares[:row] *= ratio
    prices, volume = item.candles[:, PRICES] / shares, item.candles[:, VOLUME, None] * shares
    return replace(item, candles=np.column_stack([prices, volume, item.candles[:, AMOUNT]]))


def _usual_move(moves: Floats) -> float:
    deviation = float(np.median(np.abs(moves))) / 0.6745 if len(moves) else 0.0  # of a Gaussian
    return float(np.clip(_MOVE * deviation, _NEAREST, _FURTHEST))


def _is_usual(amounts: Floats) -> bool:
    """Whether the last amount is like those before; where none are known nothing speaks against it."""
    usual, last = float(np.median(amounts[:-1])), float(amounts[-1])
    return usual <= 0 or last <= 0 or 1 / _MONEY <= last / usual <= _MONEY

"""Candles that could have been: mirrored prices, coarser bars. Training only."""

import numpy as np

from models.candles import CLOSE, HIGH, LOW, OPEN, VOLUME, Floats


def mirror(candles: Floats, rows: np.ndarray) -> Floats:
    """Where `rows` `[B]` is true, every log price of `[B, L, 6]` is reflected at the window's first close.

    A rise becomes an equal fall, so highs and lows change places; volumes stay.
    """
    out = candles.copy()
    origin = candles[:, :1, CLOSE] ** 2
    for column, source in ((OPEN, OPEN), (HIGH, LOW), (LOW, HIGH), (CLOSE, CLOSE)):
        out[rows, :, column] = (origin / candles[..., source])[rows]
    return out


def mirror_bars(candles: Floats, bars: np.ndarray) -> Floats:
    """Where `bars` `[B, L]` is true, that bar alone is reflected at the close before it; later bars follow on."""
    logs = np.log(candles[..., OPEN : CLOSE + 1])
    before = np.concatenate([logs[:, :1, OPEN], logs[:, :-1, CLOSE]], axis=1)[..., None]
    moves = logs - before
    flipped = -moves[..., [OPEN, LOW, HIGH, CLOSE]]
    moves = np.where(bars[..., None], flipped, moves)
    closes = np.cumsum(moves[..., CLOSE], axis=1)
    start = before[:, :1, 0]
    anchor = np.concatenate([start, start + closes[:, :-1]], axis=1)[..., None]
    out = candles.copy()
    out[..., OPEN : CLOSE + 1] = np.exp(anchor + moves)
    return out


def aggregate(candles: Floats, bars: int) -> Floats:
    """`[B, L * bars, 6]` candles merged into `[B, L, 6]`."""
    grouped = candles.reshape(candles.shape[0], -1, bars, candles.shape[2])
    return np.concatenate(
        [
            grouped[:, :, 0, OPEN : OPEN + 1],
            grouped[..., HIGH].max(axis=2)[..., None],
            grouped[..., LOW].min(axis=2)[..., None],
            grouped[:, :, -1, CLOSE : CLOSE + 1],
            grouped[..., VOLUME:].sum(axis=2),
        ],
        axis=-1,
    )

"""Candles that could have been: mirrored prices, coarser bars. Training only."""

import numpy as np

from models.candles import AMOUNT, CLOSE, HIGH, LOW, OPEN, PRICES, VOLUME, Floats


def mirror(candles: Floats, rows: np.ndarray) -> Floats:
    """Where `rows` `[B]` is true, every log price of `[B, L, 6]` is reflected at the window's first close.

    A rise becomes an equal fall, so highs and lows change places; volumes stay.
    """
    out = candles.copy()
    origin = candles[:, :1, CLOSE] ** 2
    for column, source in ((OPEN, OPEN), (HIGH, LOW), (LOW, HIGH), (CLOSE, CLOSE)):
        out[rows, :, column] = (origin / candles[..., source])[rows]
    return with_own_amounts(out)


def scale_moves(candles: Floats, factors: Floats) -> Floats:
    """Every bar's log distances from the close before it, times `factors` `[B, L]`; later bars follow on.

    -1 reflects a bar, so that highs and lows change places; other factors make it livelier or calmer.
    """
    logs = np.log(candles[..., OPEN : CLOSE + 1])
    before = np.concatenate([logs[:, :1, OPEN], logs[:, :-1, CLOSE]], axis=1)
    moves = (logs - before[..., None]) * factors[..., None]
    moves = np.where(factors[..., None] < 0, moves[..., [OPEN, LOW, HIGH, CLOSE]], moves)
    closes = before[:, :1] + np.cumsum(moves[..., CLOSE], axis=1)
    anchors = np.concatenate([before[:, :1], closes[:, :-1]], axis=1)
    out = candles.copy()
    out[..., PRICES] = np.exp(anchors[..., None] + moves)
    return with_own_amounts(out)


def mirrored_bars(candles: Floats) -> Floats:
    """What each bar of `[B, L, 6]` would be had it moved the other way from the close before it; others as they are."""
    before = np.concatenate([candles[:, :1, OPEN], candles[:, :-1, CLOSE]], axis=1)[..., None]
    out = candles.copy()
    out[..., PRICES] = before**2 / candles[..., [OPEN, LOW, HIGH, CLOSE]]
    return with_own_amounts(out)


def with_own_amounts(candles: Floats) -> Floats:
    """Amounts of the new prices: the old ones would tell the network what the prices had been."""
    out = candles.copy()
    out[..., AMOUNT] = candles[..., PRICES].mean(axis=-1) * candles[..., VOLUME]
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

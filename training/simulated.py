"""Candles of markets that never were: a network cannot learn them by heart, only how volatility behaves."""

from typing import Final

import numpy as np

from models.candles import HIGH, LOW, Floats
from training.augment import with_own_amounts

_SPREAD: Final = (-6.0, -3.2)  # natural logarithm of a bar's usual volatility: 0.25 % to 4 %


def simulate(rows: int, length: int, rng: np.random.Generator) -> Floats:
    """`[rows, length, 6]` valid candles from stochastic volatility; every row draws its own market.

    The logarithm of the volatility is the sum of a slow and a fast mean-reverting factor (Chernov, Gallant, Ghysels
    and Tauchen 2003, "Alternative models for stock price dynamics"), which falls in price tend to raise. Returns are
    Student-T given it, without drift. A part of each falls between two bars; highs and lows are those of a Brownian
    bridge from open to close. Volumes follow the volatility.
    """

    def market(low: float, high: float) -> Floats:
        return rng.uniform(low, high, (rows, 1))

    usual, freedom, overnight = market(*_SPREAD), market(4, 20), market(0, 0.45)
    leverage = market(-0.7, 0.1)
    slow_life, fast_life = np.exp(market(3.5, 5.5)), np.exp(market(0.5, 2.5))  # 33 to 245 bars and 2 to 12
    noise = rng.standard_normal((2, rows, length))  # of the move between two bars and of the one within
    shocks = leverage * noise[1] + np.sqrt(1 - leverage**2) * rng.standard_normal((rows, length))
    slow = market(0.2, 0.5) * _reverting(rng.standard_normal((rows, length)), slow_life)
    fast = market(0.1, 0.4) * _reverting(shocks, fast_life)
    heavy = np.sqrt((freedom - 2) / (2 * rng.standard_gamma(np.broadcast_to(freedom / 2, (rows, length)))))
    volatility = np.exp(usual + slow + fast) * heavy
    gaps, moves = np.sqrt([overnight, 1 - overnight]) * volatility * noise
    closes = np.cumsum(gaps + moves, axis=1)
    opens = closes - moves
    reach = np.sqrt(moves**2 - 2 * (1 - overnight) * volatility**2 * np.log1p(-rng.random((2, rows, length))))
    highs, lows = opens + (moves + reach[0]) / 2, opens + (moves - reach[1]) / 2
    busy = 0.5 * np.log(volatility) + market(0.1, 0.4) * _reverting(rng.standard_normal((rows, length)), fast_life)
    prices = np.exp(np.stack([opens, highs, lows, closes], axis=-1) + np.log(market(1, 500))[..., None])
    prices[..., HIGH], prices[..., LOW] = prices.max(axis=-1), prices.min(axis=-1)  # whatever the rounding
    volumes = np.exp(busy + market(8, 18))[..., None]
    return with_own_amounts(np.concatenate([prices, volumes, np.zeros_like(volumes)], axis=-1))


def _reverting(shocks: Floats, life: Floats) -> Floats:
    """AR(1) `[B, L]` with variance 1 and a mean life of `life` `[B, 1]` bars; the shock of a bar shows in the next."""
    keep = np.exp(-1 / life[:, 0])
    gain = np.sqrt(1 - keep**2)
    out = np.empty_like(shocks)
    out[:, 0] = shocks[:, -1]  # a shock that no bar would see: the start is stationary
    for bar in range(1, shocks.shape[1]):
        out[:, bar] = keep * out[:, bar - 1] + gain * shocks[:, bar - 1]
    return out


def partly_simulated(candles: Floats, share: float, rng: np.random.Generator) -> Floats:
    """`[B, L, 6]` whose first `share` of rows, rounded, are simulated."""
    rows = round(share * len(candles))
    return np.concatenate([simulate(rows, candles.shape[1], rng), candles[rows:]])

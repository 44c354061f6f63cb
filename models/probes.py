"""Requests that need no market: for timing runtimes, warming buckets, and testing that a batch changes no bits."""

from collections.abc import Hashable
from typing import Any

import numpy as np

from models.candles import Floats, with_amount
from models.forecaster import DEFAULT_HORIZON, DEFAULT_LOOKBACK, Forecast, Forecaster, ForecastInput, Sampling, forecast

_HOUR_MS = 3_600_000
_START_MS = 1_704_067_200_000  # 2024-01-01 00:00 UTC


def usual_size(forecaster: Forecaster) -> tuple[int, int]:
    """Context and horizon of a request that asks for nothing special."""
    limits, family = forecaster.limits, forecaster.family
    horizon = min(DEFAULT_HORIZON[family], limits.max_horizon)
    return min(DEFAULT_LOOKBACK.get(family, limits.max_context), limits.room(horizon)), horizon


def usual_contexts(forecaster: Forecaster) -> list[int]:
    """The lengths that callers' own candles may have, one per bucket, the longest first."""
    _, horizon = usual_size(forecaster)
    length = forecaster.limits.room(horizon)
    found: dict[Hashable, int] = {}
    while length >= forecaster.limits.min_context:
        found.setdefault(forecaster.bucket(probe(forecaster, 0, context=length)), length)
        length //= 2
    return list(found.values())


def probe(forecaster: Forecaster, seed: int, *, context: int | None = None, **settings: Any) -> ForecastInput:
    """The request of a caller who asks for nothing special, over a random walk; `settings` are ForecastInput's.

    `context` is its number of candles, by default that of a request without candles.
    """
    usual, horizon = usual_size(forecaster)
    context = context or usual
    times = _START_MS + _HOUR_MS * np.arange(context + horizon, dtype=np.int64)
    return ForecastInput(
        timestamps=times[:context],
        candles=_walk(context, seed),
        future_timestamps=times[context:],
        local_times=times,
        seed=seed,
        **settings,
    )


def is_batch_invariant(forecaster: Forecaster, company: int = 4) -> bool:
    """Whether a forecast has the same bits alone as among `company` others, in every place of the batch.

    With the usual number of paths, and with one.
    """
    return all(_same_alone(forecaster, company, Sampling(samples=samples)) for samples in (Sampling().samples, 1))


def _same_alone(forecaster: Forecaster, company: int, sampling: Sampling) -> bool:
    items = [probe(forecaster, seed, sampling=sampling) for seed in range(company + 1)]
    items = items[: forecaster.max_rows(items[0])]
    together = forecast(forecaster, items)
    alone = [forecast(forecaster, [item])[0] for item in items]
    return all(_same_bits(one, other) for one, other in zip(alone, together, strict=True))


def _same_bits(one: Forecast, other: Forecast) -> bool:
    pairs = [(one.point, other.point), (one.prob_up, other.prob_up)]
    pairs += [(one.quantiles[name], other.quantiles[name]) for name in one.quantiles]
    return all(np.array_equal(a, b) for a, b in pairs)


def _walk(length: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, length)))
    opened = np.concatenate([[100.0], close[:-1]])
    high, low = np.maximum(opened, close) * 1.002, np.minimum(opened, close) * 0.998
    return with_amount(np.column_stack([opened, high, low, close, rng.lognormal(10, 0.5, length)]))

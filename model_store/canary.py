"""A small forecast that a version carries: weights that load but forecast something else are noticed by it."""

from dataclasses import replace

import numpy as np

from model_store.manifest import Canary
from models.candles import CLOSE
from models.forecaster import Forecaster, InvalidModelOutput, Sampling, forecast
from models.probes import probe

_CONTEXT, _HORIZON, _SAMPLES = 64, 8, 16
# Of the mean width of the 80 % band. Other processors round otherwise, and so may draw another token now and then: of
# 16 paths one that differs moves a quantile by less than this.
TOLERANCE = 0.1
_ROUNDING = 1e-5  # of the close, for forecasts without a band


def canary_of(forecaster: Forecaster) -> Canary:
    """What `forecaster`, in float32, says about candles that follow from the seed alone (models/probes.py)."""
    limits = forecaster.limits
    return _forecast(forecaster, max(limits.min_context, min(_CONTEXT, limits.max_context)), seed=0)


def check_canary(canary: Canary, forecaster: Forecaster) -> float:
    """How far `forecaster` moved from what was said then, over the band; ValueError beyond a tenth of it."""
    try:
        now = _forecast(forecaster, canary.context, canary.seed)
    except InvalidModelOutput as error:
        raise ValueError(f"{error}") from error
    then, found = (np.array([each.low, each.close, each.high]) for each in (canary, now))
    band = float((then[2] - then[0]).mean())
    allowed = max(TOLERANCE * band, _ROUNDING * float(np.abs(then[1]).mean()))
    moved = float(np.abs(found - then).max())
    if moved > allowed:
        raise ValueError(f"its forecast moved by {moved:.3g} where {allowed:.3g} is allowed, in a band of {band:.3g}")
    return moved / band if band else 0.0


def _forecast(forecaster: Forecaster, context: int, seed: int) -> Canary:
    item = probe(forecaster, seed, context=context, sampling=Sampling(samples=_SAMPLES), levels=(0.1, 0.5, 0.9))
    horizon = min(_HORIZON, item.horizon)
    item = replace(
        item, future_timestamps=item.future_timestamps[:horizon], local_times=item.local_times[: context + horizon]
    )
    (found,) = forecast(forecaster, [item])
    low, _, high = found.quantiles["close"]
    close = found.point[:, CLOSE]
    return Canary(
        seed=seed, context=context, low=tuple(low.tolist()), close=tuple(close.tolist()), high=tuple(high.tolist())
    )

"""What a forecast was worth: one definition for training and for the live score. numpy only.

Log-returns are dimensionless and relative to the last close known at the origin, so symbols pool; `actual`
and `forecast` are prices only where a function says so. `T` times, `S` paths, `Q` levels, `H` steps.
"""

import math
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.candles import Floats

WALK_DECAY: Final = 0.94  # of the random walk that every table shows
SCALE_DECAY: Final = 0.97  # of the volatility that divides the paired loss
MARGIN: Final = 1.03  # the paired loss forgives 3 %, which absorbs the baseline's own noise
SCALE_FLOOR: Final = 1e-6  # log-return: a market that did not move is not infinitely easy
GROUPS: Final = (8, 30, 64, 512)  # last steps of the groups of horizons that are scored apart
MIN_BLOCK: Final = 24  # targets in a block, at least
MIN_BLOCKS: Final = 4  # fewer blocks than these say nothing about the spread

_NORMAL: Final = NormalDist()
_erf = np.vectorize(math.erf, otypes=[np.float64])


def group_of(step: int) -> int:
    """Which group of horizons a step (from 1) belongs to; ValueError beyond the last."""
    for group, last in enumerate(GROUPS):
        if step <= last:
            return group
    raise ValueError(f"no forecast has a step {step}")


def steps_of(group: int, horizon: int) -> slice:
    """Where the steps of a group stand among `[H]` steps."""
    return slice(GROUPS[group - 1] if group else 0, min(GROUPS[group], horizon))


def group_name(group: int) -> str:
    """`1-8`, `9-30`, `31-64` or `65-512`."""
    return f"{GROUPS[group - 1] + 1 if group else 1}-{GROUPS[group]}"


def block_length(group: int) -> int:
    """Candles in a block of the group: targets that are further apart share no forecast."""
    return max(GROUPS[group], MIN_BLOCK)


# -- points ----------------------------------------------------------------------------------------


def mae_log_return(actual: Floats, forecast: Floats) -> float:
    """mean |ln(actual / forecast)| of prices; log-return."""
    return float(np.abs(np.log(actual / forecast)).mean())


def mae_price(actual: Floats, forecast: Floats) -> float:
    """mean |actual − forecast|; in the currency of the prices."""
    return float(np.abs(actual - forecast).mean())


def mae_pct_of_price(actual: Floats, forecast: Floats, last_close: Floats) -> float:
    """100 · mean(|actual − forecast| / last close); percent of the price that was known at the origin."""
    return float(100 * np.mean(np.abs(actual - forecast) / last_close))


def bias(actual: Floats, forecast: Floats) -> float:
    """mean ln(actual / forecast) of prices; log-return, positive where the forecasts were too low."""
    return float(np.log(actual / forecast).mean())


def skill_vs_naive(errors: Floats, naive_errors: Floats) -> float:
    """1 − Σ|errors| / Σ|naive errors|; dimensionless, exactly 0 for the naive forecast.

    NaN where the naive forecast was never wrong: there is nothing to compare with.
    """
    naive = float(np.abs(naive_errors).sum())
    return 1.0 - float(np.abs(errors).sum()) / naive if naive > 0 else math.nan


# -- distributions ---------------------------------------------------------------------------------


def covered(actual: Floats, low: Floats, high: Floats) -> NDArray[np.bool_]:
    """low ≤ actual ≤ high, element by element; a band without width covers nothing."""
    return (low <= actual) & (actual <= high) & (low < high)


def coverage(actual: Floats, low: Floats, high: Floats) -> float:
    """Share of actual values inside their band; between 0 and 1."""
    return float(covered(actual, low, high).mean())


def pinball(actual: Floats, quantiles: Floats, levels: tuple[float, ...]) -> Floats:
    """max(q · e, (q − 1) · e) with e = actual − quantile, `[Q, ...]` of quantiles `[Q, ...]`; unit of `actual`."""
    level = np.reshape(levels, (-1, *[1] * actual.ndim))
    error = actual - quantiles
    return np.maximum(level * error, (level - 1) * error)


def crps_quantiles(actual: Floats, quantiles: Floats, levels: tuple[float, ...]) -> Floats:
    """2 · mean over levels of the pinball loss, `[...]` of quantiles `[Q, ...]` at even levels; unit of `actual`.

    A grid leaves the tails out: compare it only with scores on the same levels.
    """
    return np.asarray(2 * pinball(actual, quantiles, levels).mean(axis=0))


def crps_ensemble(actual: Floats, paths: Floats) -> Floats:
    """mean |x − y| − Σᵢⱼ|xᵢ − xⱼ| / (2 S (S − 1)), `[...]` of paths `[S, ...]`; unit of `actual`.

    The fair estimator: its expectation does not depend on how many paths were drawn. ValueError for one path.
    """
    count = len(paths)
    if count < 2:
        raise ValueError(f"the fair CRPS needs two paths or more, got {count}")
    ranks = np.reshape(2 * np.arange(1, count + 1) - count - 1, (-1, *[1] * actual.ndim))
    spread = (ranks * np.sort(paths, axis=0)).sum(axis=0) / (count * (count - 1))  # half the mean |xᵢ − xⱼ|
    return np.asarray(np.abs(paths - actual).mean(axis=0) - spread)


def crps_gaussian(actual: Floats, sigma: Floats) -> Floats:
    """σ · (z (2Φ(z) − 1) + 2φ(z) − 1/√π) with z = actual / σ: N(0, σ²) in closed form; unit of `actual`.

    Where σ is 0 it is |actual|.
    """
    safe = np.where(sigma > 0, sigma, 1.0)
    z = actual / safe
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    score = safe * (z * _erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))
    return np.where(sigma > 0, score, np.abs(actual))


# -- volatility and the random walk ----------------------------------------------------------------


def log_returns(closes: Floats) -> Floats:
    """`[T - 1]` ln(close[t + 1] / close[t])."""
    return np.diff(np.log(closes))


def ewma_volatility(returns: Floats, decay: float) -> Floats:
    """`[T]` √(Σ λⁱ r²[t−i] / Σ λⁱ), i from 0 to t: what was known once return t was; log-return per step."""
    variances = np.empty(len(returns))
    total = weight = 0.0
    for t, square in enumerate((returns**2).tolist()):
        total, weight = decay * total + square, decay * weight + 1
        variances[t] = total / weight
    return np.sqrt(variances)


def walk_sigma(volatility: Floats, horizon: int) -> Floats:
    """`[..., H]` σ√h: the zero-drift Gaussian walk has ln(close[h] / last close) ~ N(0, h σ²)."""
    return np.asarray(volatility[..., None] * np.sqrt(np.arange(1, horizon + 1)))


def walk_quantiles(sigma: Floats, levels: tuple[float, ...]) -> Floats:
    """`[Q, ...]` log-returns Φ⁻¹(q) · σ of a walk with `sigma` `[...]`."""
    return np.asarray(np.multiply.outer([_NORMAL.inv_cdf(level) for level in levels], sigma))


# -- comparisons -----------------------------------------------------------------------------------


def paired_loss(errors: Floats, naive_errors: Floats, rho0: float, scale: Floats) -> Floats:
    """(|e| − 1.03 · ρ₀ · |naive e|) / max(scale, 1e-6), element by element; in volatilities.

    `scale` is the EWMA(0.97) volatility known at the origin times √k at step k, ρ₀ the relative MAE of the
    baseline. It rises above zero where the model has become worse, relative to naive, than its baseline.
    """
    return (np.abs(errors) - MARGIN * rho0 * np.abs(naive_errors)) / np.maximum(scale, SCALE_FLOOR)


def block_bootstrap(
    numerators: Floats, denominators: Floats, *, block: int, seed: int, draws: int = 2000, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Interval of Σ numerators / Σ denominators, both `[T]` in time order, by the circular block bootstrap.

    Whole blocks of `block` times are redrawn, so what overlaps in time, and all symbols that share it, stays
    together. None where the times make fewer than four blocks.
    """
    times = len(numerators)
    if times < MIN_BLOCKS * block:
        return None
    starts = np.random.default_rng(seed).integers(times, size=(draws, -(-times // block)))
    top, bottom = (_circular_sums(values, block)[starts].sum(axis=1) for values in (numerators, denominators))
    ratios = top[bottom > 0] / bottom[bottom > 0]
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _circular_sums(values: Floats, block: int) -> Floats:
    """`[T]` sums of the `block` values from each place on, the end followed by the beginning."""
    circle = np.concatenate([values, values[: block - 1]])
    return np.asarray(np.lib.stride_tricks.sliding_window_view(circle, block).sum(axis=1))

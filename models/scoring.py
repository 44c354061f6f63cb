"""What a forecast was worth: one definition for training and for the live score. numpy only.

Log-returns are dimensionless and relative to the last close known at the origin, so symbols pool; `actual`
and `forecast` are prices only where a function says so. `T` times, `S` paths, `Q` levels, `H` steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
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
EQUAL: Final = 1e-4  # relative difference of errors: a network whose median is the last close differs by its rounding
MASE_WINDOW: Final = 512  # candles up to the origin whose moves scale an error
MIN_RANKED: Final = 5  # a rank correlation of fewer says nothing
_ROUNDING: Final = 1e-6  # log-return: forecasts this close share a rank
_AT_ONCE: Final = 4_000_000  # numbers in the memory of the bootstrap

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


def _as_it_is(ratio: Floats) -> Floats:
    return ratio


@dataclass(frozen=True)
class Ratio:
    """A metric as `read`(Σ tops / Σ bottoms): it can be summed over windows, steps or symbols, and bootstrapped.

    Both are `[N, H]`, or `[N, 1]` of what is said of whole windows.
    """

    tops: Floats
    bottoms: Floats
    read: Callable[[Floats], Floats] = _as_it_is

    @property
    def value(self) -> float:
        """Over all windows and steps; NaN where there is nothing to divide by."""
        bottom = self.bottoms.sum()
        return float(self.read(self.tops.sum() / bottom)) if bottom > 0 else math.nan


def _mean(values: Floats, read: Callable[[Floats], Floats] = _as_it_is) -> Ratio:
    return Ratio(values, np.ones_like(values), read)


def mae_log_return(actual: Floats, forecast: Floats) -> Ratio:
    """mean |ln(actual / forecast)| of prices; log-return."""
    return _mean(np.abs(np.log(actual / forecast)))


def mae_price(actual: Floats, forecast: Floats) -> Ratio:
    """mean |actual − forecast|; in the currency of the prices."""
    return _mean(np.abs(actual - forecast))


def rmse_log_return(actual: Floats, forecast: Floats) -> Ratio:
    """√ mean ln(actual / forecast)² of prices; log-return."""
    return _mean(np.log(actual / forecast) ** 2, np.sqrt)


def rmse_price(actual: Floats, forecast: Floats) -> Ratio:
    """√ mean (actual − forecast)²; in the currency of the prices."""
    return _mean((actual - forecast) ** 2, np.sqrt)


def mae_pct_of_price(actual: Floats, forecast: Floats, last_close: Floats) -> Ratio:
    """100 · mean(|actual − forecast| / last close); percent of the price that was known at the origin."""
    return _mean(100 * np.abs(actual - forecast) / last_close)


def mase(actual: Floats, forecast: Floats, scale: Floats) -> Ratio:
    """mean(|actual − forecast| / scale), dimensionless: Hyndman and Koehler (2006), "Another look at measures of
    forecast accuracy".

    `scale` is what the forecast of one step by the last close was wrong by before the origin: `one_step_naive`.
    Where it is 0, an error has no size and is left out.
    """
    moved = np.broadcast_to(scale > 0, actual.shape).astype(np.float64)
    return Ratio(moved * np.abs(actual - forecast) / np.where(scale > 0, scale, 1.0), moved)


def one_step_naive(closes: Floats) -> Floats:
    """`[T]` mean |close[i] − close[i − 1]| over the last 512 candles up to each; in the currency of the prices.

    NaN for the first, which has no predecessor.
    """
    moved = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(closes)))])
    last = np.arange(len(closes))
    first = np.maximum(0, last - MASE_WINDOW + 1)
    with np.errstate(invalid="ignore"):
        return np.asarray((moved - moved[first]) / (last - first))


def bias(actual: Floats, forecast: Floats) -> Ratio:
    """mean ln(actual / forecast) of prices; log-return, positive where the forecasts were too low."""
    return _mean(np.log(actual / forecast))


def skill_vs_naive(errors: Floats, naive_errors: Floats) -> Ratio:
    """1 − Σ|errors| / Σ|naive errors|; dimensionless, exactly 0 for the naive forecast.

    NaN where the naive forecast was never wrong: there is nothing to compare with. ValueError unless both are errors
    of the same targets.
    """
    _check_same_targets(errors, naive_errors)
    return Ratio(np.abs(errors), np.abs(naive_errors), lambda relative_mae: 1 - relative_mae)


def win_rate(errors: Floats, naive_errors: Floats) -> Ratio:
    """Share of windows, `[N, H]`, whose MAE is below naive's; a window in which rounding decides is half won.

    ½ for the naive forecast itself.
    """
    _check_same_targets(errors, naive_errors)
    mae, naive = np.abs(errors).mean(axis=1, keepdims=True), np.abs(naive_errors).mean(axis=1, keepdims=True)
    return _mean((1 - np.sign(_beyond_rounding(mae, naive))) / 2)


def _beyond_rounding(losses: Floats, rival_losses: Floats) -> Floats:
    differences = losses - rival_losses
    return np.where(np.abs(differences) > EQUAL * np.abs(rival_losses), differences, 0.0)


def _check_same_targets(errors: Floats, others: Floats) -> None:
    if errors.shape != others.shape:
        raise ValueError(f"errors of other targets: {errors.shape} beside {others.shape}; compare equal horizons")


# -- ranks -----------------------------------------------------------------------------------------


def rank_ic(forecast: Floats, actual: Floats, groups: NDArray[np.int64]) -> Ratio:
    """The mean over `groups` `[N]` of Spearman's correlation between forecast and actual log-returns `[N, H]`.

    It is Grinold and Kahn's information coefficient, measured on ranks. Where the groups are dates it ranks symbols,
    which is the usual one; where they are symbols it ranks times. A group of fewer than five, or whose forecasts do
    not differ, ranks nothing and has no weight. The ranks are those of the whole group in every draw of a bootstrap.
    """
    _check_same_targets(forecast, actual)
    rounded = np.round(forecast / _ROUNDING)
    products, weights = np.zeros(forecast.shape), np.zeros(forecast.shape)
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        if len(rows) < MIN_RANKED:
            continue
        first, second = _standard_ranks(rounded[rows]), _standard_ranks(actual[rows])
        ranked = first.any(axis=0) & second.any(axis=0)
        products[rows] = first * second / len(rows)
        weights[rows] = ranked / len(rows)
    return Ratio(products, weights)


def _standard_ranks(values: Floats) -> Floats:
    """`[N, H]` ranks of each column, equals sharing their mean, with mean 0 and variance 1; 0 where all are equal."""
    ranks = np.apply_along_axis(_ranks, 0, values)
    centred = ranks - ranks.mean(axis=0)
    spread = centred.std(axis=0)
    return np.asarray(centred / np.where(spread > 0, spread, 1.0))


def _ranks(values: Floats) -> Floats:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])


# -- distributions ---------------------------------------------------------------------------------


def covered(actual: Floats, low: Floats, high: Floats) -> NDArray[np.bool_]:
    """low ≤ actual ≤ high, element by element; a band without width covers nothing."""
    return (low <= actual) & (actual <= high) & (low < high)


def coverage(actual: Floats, low: Floats, high: Floats) -> Ratio:
    """Share of actual values inside their band; between 0 and 1."""
    return _mean(covered(actual, low, high).astype(np.float64))


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
    together (Politis and Romano 1992). None where the times make fewer than four blocks.
    """
    columns = (numerators[:, None], denominators[:, None])
    found = block_bootstraps(*columns, block=block, seed=seed, draws=draws, confidence=confidence)
    return None if found is None else (float(found[0, 0]), float(found[1, 0]))


def block_bootstraps(
    numerators: Floats, denominators: Floats, *, block: int, seed: int, draws: int = 2000, confidence: float = 0.95
) -> Floats | None:
    """`[2, K]` such intervals of `[T, K]`, all from the same blocks; NaN where the denominators are 0 all along."""
    times = len(numerators)
    if times < MIN_BLOCKS * block:
        return None
    starts = np.random.default_rng(seed).integers(times, size=(draws, -(-times // block)))
    sums = _circular_sums(np.concatenate([numerators, denominators], axis=1), block)
    chunks = np.array_split(starts, min(draws, 1 + sums.shape[1] * starts.size // _AT_ONCE))
    tops, bottoms = np.hsplit(np.concatenate([sums[chunk].sum(axis=1) for chunk in chunks]), 2)
    ratios = np.divide(tops, bottoms, out=np.full_like(tops, np.nan), where=bottoms > 0)
    found = np.full((2, ratios.shape[1]), np.nan)
    known = ~np.isnan(ratios).all(axis=0)
    found[:, known] = np.nanquantile(ratios[:, known], [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return found


def _circular_sums(values: Floats, block: int) -> Floats:
    """`[T, K]` sums of the `block` values from each place on, the end followed by the beginning."""
    circle = np.concatenate([values, values[: block - 1]])
    return np.asarray(np.lib.stride_tricks.sliding_window_view(circle, block, axis=0).sum(axis=-1))


@dataclass(frozen=True)
class DieboldMariano:
    """Whether one forecast's losses differ from a rival's beyond chance; `statistic` is positive if greater."""

    statistic: float
    p_value: float  # two-sided
    times: int
    degrees: int  # of freedom of the statistic's t distribution; 0 where the losses are equal

    def sentence(self, rival: str = "naive") -> str:
        """Such as `worse than naive, p = 0.003`; what is undecided without a name is so beside naive."""
        if not self.degrees:
            return f"equal to {rival}"
        p = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.3f}"
        if self.p_value >= 0.05:
            return f"undecided{'' if rival == 'naive' else f' beside {rival}'}, {p}"
        return f"{'worse' if self.statistic > 0 else 'better'} than {rival}, {p}"


def diebold_mariano(losses: Floats, rival_losses: Floats, *, overlap: int) -> DieboldMariano | None:
    """The test of Diebold and Mariano (1995) on mean losses `[T]` of the same forecast origins, in time order.

    `overlap` is how many origins in a row share targets. The long-run variance is the equal-weighted cosine estimate
    of Lazarus, Lewis, Stock and Watson (2018): a mean of B squares, so it is never negative, and the statistic is
    referred to a t distribution with B degrees of freedom, which keeps the size where horizons overlap (Coroneo and
    Iacone 2020 show it of such statistics). B is their 0.4 T^⅔, or half the number of spans without overlap if that
    is less. The small-sample factor of Harvey, Leybourne and Newbold (1997) corrects another variance, that of a
    truncated kernel, and has no place here. Differences that rounding explains are none. None where fewer than four
    spans do not overlap, or the differences never vary; ValueError unless both losses are of the same origins.
    """
    _check_same_targets(losses, rival_losses)
    times = len(losses)
    if times < MIN_BLOCKS * overlap:
        return None
    differences = _beyond_rounding(losses, rival_losses)
    if not differences.any():
        return DieboldMariano(0.0, 1.0, times, 0)
    degrees = max(1, min(int(0.4 * times ** (2 / 3)), times // (2 * overlap)))
    frequencies = np.pi * np.arange(1, degrees + 1)[:, None] / times
    cosines = math.sqrt(2 / times) * np.cos(frequencies * (np.arange(times) + 0.5))  # [B, T]
    mean = float(differences.mean())
    variance = float(np.mean((cosines @ (differences - mean)) ** 2))
    if variance == 0:
        return None
    statistic = mean * math.sqrt(times / variance)
    return DieboldMariano(statistic, max(0.0, 1 - _t_within(abs(statistic), degrees)), times, degrees)


def _t_within(bound: float, degrees: int) -> float:
    """P(|t| ≤ bound) with a whole number of degrees of freedom: Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(bound / math.sqrt(degrees))
    square = math.cos(angle) ** 2
    odd = degrees % 2
    term = math.sin(angle) * (math.cos(angle) if odd else 1.0)
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= square * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + total) if odd else total

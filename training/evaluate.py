"""Rolling-origin scores of any forecaster, beside the naive forecast and a random walk on the same origins."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from model_store.manifest import Baseline, Evaluation, Metric
from models import scoring
from models.candles import CLOSE, Floats, interval_ms
from models.forecaster import Forecast, Forecaster, ForecastInput, Sampling, batches, forecast
from models.uniforms import derive_seed
from training.candle_files import Series
from training.outcomes import Outcomes, outcomes
from training.windows import Origins, forecast_input, series_calendar

Estimator = Literal["ensemble", "quantiles"]

LEVELS: Final = tuple(round(k / 20, 2) for k in range(1, 20))  # even, as the mean of pinball losses needs
BAND: Final = (0.1, 0.9)
BASELINE_LEVELS: Final = (0.1, 0.25, 0.5, 0.75, 0.9)
_PATH_FLOOR: Final = 1e-6  # of the last close: a path at zero or below has no logarithm


@dataclass(frozen=True, eq=False)
class Scores:
    """N forecasts of H closes, judged. Errors, CRPS and pinball losses are log-returns."""

    outcomes: Outcomes
    estimator: Estimator  # of the CRPS, the walk's included: fair over paths, or 2 x mean pinball over LEVELS
    samples: int | None  # paths per forecast; None where the model gives quantiles only
    point: Floats  # [N, H] closes
    crps: Floats  # [N, H]
    walk_crps: Floats  # [N, H]
    pinball: Floats  # [N, Q, H] at LEVELS
    covered: NDArray[np.bool_]  # [N, H] by the band from 0.1 to 0.9
    walk_covered: NDArray[np.bool_]  # [N, H]

    @cached_property
    def errors(self) -> Floats:
        """`[N, H]` ln(actual / point)."""
        return np.asarray(np.log(self.outcomes.actual / self.point))

    @property
    def naive_errors(self) -> Floats:
        """`[N, H]` ln(actual / last close)."""
        return self.outcomes.moves


# -- forecasting -----------------------------------------------------------------------------------


def evaluate(
    forecaster: Forecaster,
    series: Sequence[Series],
    origins: Origins,
    *,
    sampling: Sampling | None = None,
    lookback: int,
    calendar: str = "auto",
    batch_rows: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Forecast every origin, in batches of one bucket, and score the close; `progress` hears of finished origins.

    The seed of a forecast is a function of symbol, interval and origin alone. Paths are drawn independently of each
    other, as the fair CRPS assumes, whatever `sampling` says. ValueError without origins.
    """
    facts = outcomes(series, origins)
    tally = _Tally(facts)
    independent = replace(sampling or Sampling(), stratified=False)
    inputs = _inputs(series, origins, independent, lookback, calendar)
    for rows, batch in batches(forecaster, inputs, batch_rows):
        for row, result in zip(rows, forecast(forecaster, batch), strict=True):
            tally.add(row, result)
        if progress:
            progress(len(rows))
    return tally.scores()


def side_by_side(
    entrants: Mapping[str, tuple[Forecaster, int, Sampling]],
    series: Sequence[Series],
    origins: Origins,
    *,
    calendar: str = "auto",
    batch_rows: int = 64,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Scores]:
    """Scores of several (forecaster, lookback, sampling) on identical origins."""
    return {
        name: evaluate(
            forecaster,
            series,
            origins,
            sampling=sampling,
            lookback=lookback,
            calendar=calendar,
            batch_rows=batch_rows,
            progress=progress,
        )
        for name, (forecaster, lookback, sampling) in entrants.items()
    }


def _inputs(
    series: Sequence[Series], origins: Origins, sampling: Sampling, lookback: int, calendar: str
) -> Iterator[ForecastInput]:
    calendars = {index: series_calendar(series[index], calendar) for index, _ in origins.pairs}
    for index, origin in origins.pairs:
        item = series[index]
        plain = forecast_input(item, origin, horizon=origins.horizon, lookback=lookback, calendar=calendars[index])
        seed = derive_seed(item.symbol, item.interval, int(item.timestamps[origin]))
        yield replace(plain, levels=LEVELS, sampling=sampling, seed=seed, with_paths=True)


class _Tally:
    """Forecasts arrive in any order; scores leave in the order of the origins."""

    def __init__(self, facts: Outcomes) -> None:
        self._facts = facts
        origins, horizon = shape = facts.actual.shape
        self._point, self._crps = np.empty(shape), np.empty(shape)
        self._pinball = np.empty((origins, len(LEVELS), horizon))
        self._covered = np.empty(shape, dtype=bool)
        self._samples: int | None = None

    def add(self, row: int, result: Forecast) -> None:
        last_close, actual = self._facts.last_close[row], self._facts.moves[row]
        quantiles = np.log(result.quantiles["close"] / last_close)
        self._point[row] = result.point[:, CLOSE]
        self._pinball[row] = scoring.pinball(actual, quantiles, LEVELS)
        self._covered[row] = _in_band(actual, quantiles)
        if result.paths is None:
            self._crps[row] = scoring.crps_quantiles(actual, quantiles, LEVELS)
        else:
            closes = np.maximum(result.paths[:, :, CLOSE], _PATH_FLOOR * last_close)
            self._crps[row] = scoring.crps_ensemble(actual, np.log(closes / last_close))
            self._samples = len(closes)

    def scores(self) -> Scores:
        facts = self._facts
        walk = scoring.walk_quantiles(facts.walk_sigma, LEVELS)
        if self._samples:  # both are free of the paths' number, so the ratio is fair
            walk_crps = scoring.crps_gaussian(facts.moves, facts.walk_sigma)
        else:
            walk_crps = scoring.crps_quantiles(facts.moves, walk, LEVELS)
        return Scores(
            outcomes=facts,
            estimator="ensemble" if self._samples else "quantiles",
            samples=self._samples,
            point=self._point,
            crps=self._crps,
            walk_crps=walk_crps,
            pinball=self._pinball,
            covered=self._covered,
            walk_covered=_in_band(facts.moves, walk),
        )


def _in_band(actual: Floats, quantiles: Floats) -> NDArray[np.bool_]:
    low, high = (quantiles[LEVELS.index(level)] for level in BAND)
    return scoring.covered(actual, low, high)


# -- summing up ------------------------------------------------------------------------------------


def summary(scores: Scores, *, seed: int = 0) -> Evaluation:
    """Every metric with its naive and walk columns and a 95 % interval (circular blocks of one horizon).

    ValueError if the naive forecast was never wrong: there is nothing to compare with.
    """
    facts = scores.outcomes
    return Evaluation(
        windows=facts.part,
        symbols=tuple(sorted(set(facts.symbols.tolist()))),
        start=_iso(facts.target_times.min()),
        end=_iso(facts.target_times.max()),
        interval=facts.interval,
        horizon=facts.horizon,
        origins=len(facts.symbols),
        samples=scores.samples,
        crps_estimator=scores.estimator,
        metrics=_metrics(scores, seed),
    )


def _metrics(scores: Scores, seed: int) -> dict[str, Metric]:
    facts = scores.outcomes
    naive = np.abs(scores.naive_errors)
    if not naive.any():
        raise ValueError("the close never moves on these windows: there is nothing to compare with")
    count = np.ones_like(naive)
    mae = scoring.mae_log_return(facts.actual, facts.last_close[:, None])
    mae_price = scoring.mae_price(facts.actual, facts.last_close[:, None])
    relative = _ratio(scores, np.abs(scores.errors), naive, seed)
    walk_crps = float(scores.walk_crps.mean())
    walk_coverage = float(scores.walk_covered.mean())

    def metric(top: Floats, bottom: Floats, naive: float, walk: float) -> Metric:
        return _ratio(scores, top, bottom, seed).model_copy(update={"naive": naive, "walk": walk})

    return {
        "mae_log_return": metric(np.abs(scores.errors), count, mae, mae),
        "mae_price": metric(np.abs(facts.actual - scores.point), count, mae_price, mae_price),
        "skill_vs_naive": _one_minus(relative).model_copy(update={"naive": 0.0, "walk": 0.0}),
        "coverage_80": metric(scores.covered.astype(np.float64), count, 0.0, walk_coverage),
        "crps": metric(scores.crps, count, mae, walk_crps),  # a point's CRPS is its absolute error
        "crps_ratio_walk": metric(scores.crps, scores.walk_crps, mae / walk_crps, 1.0),
    }


def _ratio(scores: Scores, top: Floats, bottom: Floats, seed: int) -> Metric:
    """Σ top / Σ bottom of `[N, H]`, with its interval over times of origin."""
    facts = scores.outcomes
    tops, bottoms = (np.zeros(len(facts.grid)) for _ in range(2))
    np.add.at(tops, facts.positions, top.sum(axis=1))
    np.add.at(bottoms, facts.positions, bottom.sum(axis=1))
    interval = scoring.block_bootstrap(tops, bottoms, block=facts.horizon, seed=seed)
    low, high = interval or (None, None)
    return Metric(value=float(top.sum() / bottom.sum()), low=low, high=high)


def _one_minus(metric: Metric) -> Metric:
    low = None if metric.high is None else 1 - metric.high
    high = None if metric.low is None else 1 - metric.low
    return Metric(value=1 - metric.value, low=low, high=high)


def by_step(scores: Scores) -> dict[str, Floats]:
    """The metrics of each step, `[H]`."""
    errors, naive = np.abs(scores.errors).mean(axis=0), np.abs(scores.naive_errors).mean(axis=0)
    return {
        "mae_log_return": errors,
        "naive_mae_log_return": naive,
        "skill_vs_naive": 1 - errors / naive,
        "coverage_80": scores.covered.mean(axis=0),
        "walk_coverage_80": scores.walk_covered.mean(axis=0),
        "crps": scores.crps.mean(axis=0),
        "walk_crps": scores.walk_crps.mean(axis=0),
    }


def _iso(millis: np.int64) -> str:
    return f"{np.datetime64(int(millis), 'ms').astype('datetime64[s]')}Z"


# -- the drift baseline ----------------------------------------------------------------------------


def baselines(scores: Scores) -> tuple[Baseline, ...]:
    """What the live score compares with, by group of horizons: `*` over all symbols, then each symbol.

    A symbol with fewer than two blocks, or whose close never moved, has none. The `*` baseline's blocks
    are still those of single symbols: it stands in for a symbol that has none of its own.
    """
    symbols = scores.outcomes.symbols
    chosen = {"*": np.ones(len(symbols), dtype=bool)}
    chosen |= {str(symbol): symbols == symbol for symbol in np.unique(symbols)}
    groups = range(scoring.group_of(scores.outcomes.horizon) + 1)
    found = (_baseline(scores, name, rows, group) for group in groups for name, rows in chosen.items())
    return tuple(baseline for baseline in found if baseline)


def _baseline(scores: Scores, symbol: str, rows: NDArray[np.bool_], group: int) -> Baseline | None:
    facts = scores.outcomes
    steps = scoring.steps_of(group, facts.horizon)
    errors, naive = np.abs(scores.errors[rows, steps]), np.abs(scores.naive_errors[rows, steps])
    if not naive.any():
        return None
    rho0 = float(errors.mean() / naive.mean())
    losses = scoring.paired_loss(errors, naive, rho0, facts.scale[rows, steps])
    blocks = _block_means(facts, rows, steps, group, losses)
    if len(blocks.means) < 2:
        return None
    pinball = scores.pinball[rows, :, steps].mean(axis=(0, 2))
    return Baseline(
        symbol=symbol,
        interval=facts.interval,
        group=group,
        horizon=steps.stop,
        n_blocks=len(blocks.means),
        mae_log_return=float(errors.mean()),
        naive_mae_log_return=float(naive.mean()),
        rho0=rho0,
        sd_block=float(blocks.means.std(ddof=1)),
        correlation=blocks.correlation(),
        coverage_80=float(scores.covered[rows, steps].mean()),
        pinball={str(level): float(pinball[LEVELS.index(level)]) for level in BASELINE_LEVELS},
    )


@dataclass(frozen=True)
class _BlockMeans:
    """Mean losses, each of one symbol's targets in one block of time, `[N]`."""

    owners: NDArray[np.int64]
    blocks: NDArray[np.int64]
    means: Floats

    def correlation(self) -> float:
        """Mean correlation of two symbols' losses in the same block, between 0 and 1."""
        together = products = 0.0
        z = self._standardised()
        for block in np.unique(self.blocks):
            found = z[self.blocks == block]
            together += len(found) * (len(found) - 1)
            products += found.sum() ** 2 - (found**2).sum()
        return float(np.clip(products / together, 0, 1)) if together else 0.0

    def _standardised(self) -> Floats:
        z = np.zeros(len(self.means))
        for owner in np.unique(self.owners):
            own = self.means[self.owners == owner]
            if own.std() > 0:
                z[self.owners == owner] = (own - own.mean()) / own.std()
        return z


def _block_means(facts: Outcomes, rows: NDArray[np.bool_], steps: slice, group: int, losses: Floats) -> _BlockMeans:
    """Mean loss of each symbol's targets in blocks of the group's length, on a grid fixed in time.

    A block with less than half the targets of the median block, as at either end, is too noisy to count.
    """
    span = scoring.block_length(group) * interval_ms(facts.interval)
    block = facts.target_times[rows, steps] // span
    first = block.min()
    width = int(block.max() - first) + 1
    owner = np.unique(facts.symbols[rows], return_inverse=True)[1]
    cell = (owner[:, None] * width + block - first).ravel()
    counts, sums = np.bincount(cell), np.bincount(cell, losses.ravel())
    cells = np.flatnonzero(counts)
    kept = cells[counts[cells] >= np.median(counts[cells]) / 2]
    return _BlockMeans(kept // width, kept % width + first, np.asarray(sums[kept] / counts[kept]))

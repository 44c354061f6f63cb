"""Rolling-origin scores of any forecaster, beside the naive forecast and a random walk on the same origins."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model_store.gate import window_scores
from model_store.manifest import Baseline, Evaluation
from models import scoring
from models.calendars import Calendar
from models.candles import CLOSE, Floats, interval_ms
from models.forecaster import Forecast, Forecaster, ForecastInput, Sampling, batches, forecast
from models.uniforms import derive_seed
from training import metrics
from training.candle_files import Series
from training.outcomes import Outcomes, outcomes
from training.scores import KEPT, LEVELS, Estimator, Scores
from training.windows import Origins, forecast_input, series_calendar

BATCH_ROWS: Final = 64  # windows that are forecast at once, and of a piece
BASELINE_LEVELS: Final = (0.1, 0.25, 0.5, 0.75, 0.9)
_PATH_FLOOR: Final = 1e-6  # of the last close: a path at zero or below has no logarithm


# -- forecasting -----------------------------------------------------------------------------------


def evaluate(
    forecaster: Forecaster,
    series: Sequence[Series],
    origins: Origins,
    *,
    sampling: Sampling | None = None,
    lookback: int,
    aggregate: str = "median",
    calendar: str = "auto",
    batch_rows: int = BATCH_ROWS,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Forecast every origin, piece by piece, and score the close; `progress` hears of finished origins.

    The seed of a forecast is a function of symbol, interval and origin alone, so the pieces may also be forecast
    elsewhere and in any order. ValueError without origins.
    """
    facts = outcomes(series, origins)
    calendars = calendars_of(series, origins, calendar)
    return gathered(
        facts,
        [
            predict(forecaster, series, calendars, piece, lookback, sampling or Sampling(), aggregate, progress)
            for piece in pieces(origins, batch_rows)
        ],
    )


def side_by_side(
    entrants: Mapping[str, tuple[Forecaster, int, Sampling, str]],
    series: Sequence[Series],
    origins: Origins,
    *,
    calendar: str = "auto",
    batch_rows: int = BATCH_ROWS,
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, Scores]:
    """Scores of several (forecaster, lookback, sampling, aggregate) on identical origins.

    `progress` hears whose are finished.
    """
    return {
        name: evaluate(
            forecaster,
            series,
            origins,
            sampling=sampling,
            lookback=lookback,
            aggregate=aggregate,
            calendar=calendar,
            batch_rows=batch_rows,
            progress=progress and partial(progress, name),
        )
        for name, (forecaster, lookback, sampling, aggregate) in entrants.items()
    }


@dataclass(frozen=True, eq=False)
class Predictions:
    """What N forecasts of H closes come to; quantiles and CRPS are log-returns from the last close."""

    point: Floats  # [N, H] closes
    quantiles: Floats  # [N, Q, H] at KEPT
    crps: Floats  # [N, H]
    samples: int | None


def pieces(origins: Origins, rows: int = BATCH_ROWS) -> list[Origins]:
    """The origins in their order, `rows` of them at a time."""
    return [replace(origins, pairs=origins.pairs[at : at + rows]) for at in range(0, len(origins), rows)]


def calendars_of(series: Sequence[Series], origins: Origins, name: str = "auto") -> dict[int, Calendar]:
    """By its index, the calendar of every series that has an origin."""
    return {index: series_calendar(series[index], name) for index in {index for index, _ in origins.pairs}}


def predict(
    forecaster: Forecaster,
    series: Sequence[Series] | Mapping[int, Series],
    calendars: Mapping[int, Calendar],
    piece: Origins,
    lookback: int,
    sampling: Sampling,
    aggregate: str = "median",
    progress: Callable[[int], None] | None = None,
) -> Predictions:
    """Forecast the origins of one piece, in batches of one bucket.

    Paths are drawn independently of each other, as the fair CRPS assumes, whatever `sampling` says.
    """
    steps = np.arange(piece.horizon + 1)
    closes = np.stack([series[index].candles[origin + steps, CLOSE] for index, origin in piece.pairs])
    tally = _Tally(closes[:, 0], np.log(closes[:, 1:] / closes[:, :1]))
    asked = inputs(series, calendars, piece, lookback, replace(sampling, stratified=False), aggregate)
    for rows, batch in batches(forecaster, asked, len(piece)):
        for row, result in zip(rows, forecast(forecaster, batch), strict=True):
            tally.add(row, result)
        if progress:
            progress(len(rows))
    return tally.predictions()


def gathered(facts: Outcomes, found: Sequence[Predictions]) -> Scores:
    """The scores of all origins from the predictions of their pieces, in order."""
    samples = found[0].samples
    estimator: Estimator = "ensemble" if samples else "quantiles"
    point, quantiles, crps = (
        np.concatenate([getattr(each, name) for each in found]) for name in ("point", "quantiles", "crps")
    )
    return Scores(facts, estimator, samples, point, quantiles, crps)


def inputs(
    series: Sequence[Series] | Mapping[int, Series],
    calendars: Mapping[int, Calendar],
    piece: Origins,
    lookback: int,
    sampling: Sampling,
    aggregate: str = "median",
) -> Iterator[ForecastInput]:
    """What a forecaster is asked at each origin; its seed is a function of symbol, interval and origin alone."""
    for index, origin in piece.pairs:
        item = series[index]
        plain = forecast_input(item, origin, horizon=piece.horizon, lookback=lookback, calendar=calendars[index])
        seed = derive_seed(item.symbol, item.interval, int(item.timestamps[origin]))
        yield replace(plain, levels=KEPT, sampling=sampling, aggregate=aggregate, seed=seed, with_paths=True)


class _Tally:
    """Forecasts arrive in any order; predictions leave in the order of the origins."""

    def __init__(self, last_close: Floats, moves: Floats) -> None:
        """`[N]` closes and `[N, H]` log-returns from them."""
        self._last_close, self._moves = last_close, moves
        origins, horizon = shape = moves.shape
        self._point, self._crps = np.empty(shape), np.empty(shape)
        self._quantiles = np.empty((origins, len(KEPT), horizon))
        self._samples: int | None = None

    def add(self, row: int, result: Forecast) -> None:
        last_close, actual = self._last_close[row], self._moves[row]
        quantiles = np.log(result.quantiles["close"] / last_close)
        self._point[row] = result.point[:, CLOSE]
        self._quantiles[row] = quantiles
        if result.paths is None:
            self._crps[row] = scoring.crps_quantiles(actual, quantiles[1:-1], LEVELS)
        else:
            closes = np.maximum(result.paths[:, :, CLOSE], _PATH_FLOOR * last_close)
            self._crps[row] = scoring.crps_ensemble(actual, np.log(closes / last_close))
            self._samples = len(closes)

    def predictions(self) -> Predictions:
        return Predictions(self._point, self._quantiles, self._crps, self._samples)


# -- summing up ------------------------------------------------------------------------------------


def summary(scores: Scores, base: Scores | None = None, *, seed: int = 0) -> Evaluation:
    """Every metric with its naive and walk columns and a 95 % interval (circular blocks of one horizon).

    `base` are the scores on the same windows of what was tuned. ValueError if the naive forecast was never wrong:
    there is nothing to compare with.
    """
    facts = scores.outcomes
    if not facts.moves.any():
        raise ValueError("the close never moves on these windows: there is nothing to compare with")
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
        metrics=metrics.pooled(scores, seed, base),
        versus_naive=metrics.versus_naive(scores),
        versus_base=metrics.versus_base(scores, base) if base else None,
        ranked=metrics.ranked(facts),
    )


def windows(parts: Iterable[Scores]) -> dict[str, Tensor]:
    """What a version keeps of each window, for comparing it with another on the same."""
    kept: dict[str, Tensor] = {}
    for scores in parts:
        facts = scores.outcomes
        kept |= window_scores(
            facts.part,
            times=facts.origin_times,
            symbols=np.unique(facts.symbols, return_inverse=True)[1],
            positions=facts.positions,
            errors=scores.errors,
            naive_errors=scores.naive_errors,
        )
    return kept


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
        coverage_80=float(scores.covered(80)[rows, steps].mean()),
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

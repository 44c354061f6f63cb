"""Every metric as a ratio of two sums over windows, so that one bootstrap gives all of them their intervals."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model_store.manifest import Comparison, Metric
from models import scoring
from models.candles import Floats
from models.quantiles import unreachable_levels
from models.scoring import Ratio
from training.outcomes import Outcomes
from training.scores import BANDS, Scores, naive_scores, walk_scores

Ranked = Literal["symbols", "times"]


def terms(scores: Scores) -> dict[str, Ratio]:
    """Every metric; without `rank_ic` where forecasts or symbols cannot be ranked."""
    facts = scores.outcomes
    actual, point, last_close = facts.actual, scores.point, facts.last_close[:, None]
    count = np.ones_like(actual)
    found = {
        "skill_vs_naive": scoring.skill_vs_naive(scores.errors, scores.naive_errors),
        "win_rate": scoring.win_rate(scores.errors, scores.naive_errors),
        "mae_log_return": scoring.mae_log_return(actual, point),
        "mae_pct_of_price": scoring.mae_pct_of_price(actual, point, last_close),
        "mae_price": scoring.mae_price(actual, point),
        "rmse_log_return": scoring.rmse_log_return(actual, point),
        "rmse_price": scoring.rmse_price(actual, point),
        "mase": scoring.mase(actual, point, facts.one_step[:, None]),
        "bias": scoring.bias(actual, point),
        "crps": Ratio(scores.crps, count),
        "crps_ratio_walk": Ratio(scores.crps, walk_scores(facts, scores.estimator).crps),
        "pinball": Ratio(scores.pinball.mean(axis=1), count),
        "rank_ic": scoring.rank_ic(np.log(point / last_close), facts.moves, _ranked_in(facts)),
    }
    for percent, (low, high) in BANDS.items():
        if not (percent == 95 and scores.samples and unreachable_levels((low, high), scores.samples)):
            found[f"coverage_{percent}"] = scoring.coverage(facts.moves, scores.quantile(low), scores.quantile(high))
    return {name: ratio for name, ratio in found.items() if ratio.bottoms.any()}


def ranked(facts: Outcomes) -> Ranked:
    """What the RankIC ranks: symbols wherever five or more share an origin's time, else the times of each symbol."""
    together = np.unique(facts.origin_times, return_counts=True)[1].max()
    return "symbols" if together >= scoring.MIN_RANKED else "times"


def _ranked_in(facts: Outcomes) -> NDArray[np.int64]:
    key = facts.origin_times if ranked(facts) == "symbols" else facts.symbols
    return np.unique(key, return_inverse=True)[1]


# -- summing up ------------------------------------------------------------------------------------


def pooled(scores: Scores, seed: int = 0, base: Scores | None = None) -> dict[str, Metric]:
    """Every metric over all windows and steps, beside the naive forecast's and the walk's.

    With the scores of the `base` that was tuned, beside its too, with `skill_vs_base` and `crps_ratio_base`, whose
    intervals are of both on the same windows; ValueError where they are of others.
    """
    return _Columns(scores, base).metrics(np.arange(len(scores.point)), seed)


def by_symbol(scores: Scores, seed: int = 0) -> dict[str, dict[str, Metric]]:
    """The same for each symbol's windows alone, but no `rank_ic` where that ranks symbols.

    A symbol that never moved has none.
    """
    symbols, columns = scores.outcomes.symbols, _Columns(scores)
    found = {str(symbol): columns.metrics(np.flatnonzero(symbols == symbol), seed) for symbol in np.unique(symbols)}
    if ranked(scores.outcomes) == "symbols":
        for metrics in found.values():
            metrics.pop("rank_ic", None)
    return {symbol: metrics for symbol, metrics in found.items() if "skill_vs_naive" in metrics}


@dataclass(frozen=True)
class Curve:
    """A metric by step, `[H]` each; NaN where it is not known."""

    value: Floats
    low: Floats
    high: Floats


def by_step(scores: Scores, seed: int = 0) -> dict[str, Curve]:
    """The metrics of each step, with intervals; all but `win_rate`, which is one of whole windows."""
    facts = scores.outcomes
    found = {name: term for name, term in terms(scores).items() if term.tops.shape[1] == facts.horizon}
    tops, bottoms = (
        np.concatenate(each, axis=1) for each in zip(*((t.tops, t.bottoms) for t in found.values()), strict=True)
    )
    values, intervals = _ratios(facts, tops, bottoms, np.arange(len(tops)), seed)
    curves = np.split(np.vstack([values, intervals]), len(found), axis=1)
    return {name: Curve(*_read(found[name], curve)) for name, curve in zip(found, curves, strict=True)}


def versus_naive(scores: Scores, rows: NDArray[np.intp] | None = None) -> Comparison | None:
    """Whether the windows' MAE differs from naive's beyond chance; None where there are too few to tell."""
    return _versus("naive", scores.naive_errors, scores, rows)


def versus_base(scores: Scores, base: Scores) -> Comparison | None:
    """Whether it differs from that of the `base` that was tuned; ValueError where that has other windows."""
    _refuse_other_windows(scores, base)
    return _versus("base", base.errors, scores)


def _refuse_other_windows(scores: Scores, rival: Scores) -> None:
    ours, theirs = scores.outcomes, rival.outcomes
    if not (np.array_equal(ours.symbols, theirs.symbols) and np.array_equal(ours.target_times, theirs.target_times)):
        raise ValueError("scores compare only on the same windows: these have other origins, symbols or horizons")


def _versus(
    rival: str, rival_errors: Floats, scores: Scores, rows: NDArray[np.intp] | None = None
) -> Comparison | None:
    facts = scores.outcomes
    chosen = np.arange(len(facts.symbols)) if rows is None else rows
    times, place = np.unique(facts.positions[chosen], return_inverse=True)
    losses, rival_losses = (
        np.bincount(place, np.abs(errors[chosen]).mean(axis=1)) / np.bincount(place)
        for errors in (scores.errors, rival_errors)
    )
    within = np.searchsorted(times, times + facts.horizon) - np.arange(len(times))
    found = scoring.diebold_mariano(losses, rival_losses, overlap=int(within.max()))
    if found is None:
        return None
    return Comparison(
        sentence=found.sentence(rival),
        statistic=found.statistic,
        p_value=found.p_value,
        degrees=found.degrees,
        times=found.times,
    )


class _Columns:
    """The sums over steps of a forecast's terms, and of what stands beside it, `[N, M]` each."""

    def __init__(self, scores: Scores, base: Scores | None = None) -> None:
        facts, kind = scores.outcomes, scores.estimator
        self._facts = facts
        self._own = terms(scores)
        self._beside = {"naive": terms(naive_scores(facts, kind)), "walk": terms(walk_scores(facts, kind))}
        if base:
            _refuse_other_windows(scores, base)
            self._own["skill_vs_base"] = scoring.skill_vs_naive(scores.errors, base.errors)
            self._own["crps_ratio_base"] = Ratio(scores.crps, base.crps)
            self._beside["base"] = terms(base)

    def metrics(self, rows: NDArray[np.intp], seed: int) -> dict[str, Metric]:
        """Of some windows; a metric without any sum to divide by is left out."""
        sums = [(term.tops.sum(axis=1), term.bottoms.sum(axis=1)) for term in self._own.values()]
        tops, bottoms = (np.stack(each, axis=1) for each in zip(*sums, strict=True))
        values, intervals = _ratios(self._facts, tops[rows], bottoms[rows], rows, seed)
        table = zip(self._own.items(), np.vstack([values, intervals]).T, strict=True)
        return {
            name: self._metric(name, _read(own, found), rows) for (name, own), found in table if np.isfinite(found[0])
        }

    def _metric(self, name: str, column: Floats, rows: NDArray[np.intp]) -> Metric:
        value, low, high = column.tolist()
        beside = {other: _of_rows(found.get(name), rows) for other, found in self._beside.items()}
        if np.isnan(low):
            return Metric(value=value, **beside)
        return Metric(value=value, low=low, high=high, **beside)


def _of_rows(ratio: Ratio | None, rows: NDArray[np.intp]) -> float | None:
    if ratio is None or not ratio.bottoms[rows].any():
        return None
    return replace(ratio, tops=ratio.tops[rows], bottoms=ratio.bottoms[rows]).value


def _ratios(facts: Outcomes, tops: Floats, bottoms: Floats, rows: NDArray[np.intp], seed: int) -> tuple[Floats, Floats]:
    """`[K]` Σ tops / Σ bottoms of `[R, K]`, and their `[2, K]` intervals over times of origin; NaN where unknown.

    The windows are those of `rows`: blocks are cut from the times between the first of them and the last.
    """
    totals = bottoms.sum(axis=0)
    values = np.divide(tops.sum(axis=0), totals, out=np.full_like(totals, np.nan), where=totals > 0)
    places = facts.positions[rows] - facts.positions[rows].min()
    by_time = np.zeros((2, int(places.max()) + 1, len(totals)))
    for sums, windows in zip(by_time, (tops, bottoms), strict=True):
        np.add.at(sums, places, windows)
    intervals = scoring.block_bootstraps(*by_time, block=facts.horizon, seed=seed)
    return values, np.full((2, len(totals)), np.nan) if intervals is None else intervals


def _read(ratio: Ratio, column: Floats) -> Floats:
    """A metric's value, low and high from those of its ratio, `[3, ...]`."""
    value, *interval = ratio.read(column)
    return np.stack([value, np.minimum(*interval), np.maximum(*interval)])

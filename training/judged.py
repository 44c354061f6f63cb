"""Everything that is said about one model or baseline on one set of windows."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from model_store.manifest import Comparison, Evaluation, Metric
from training import metrics
from training.baselines import BASELINES
from training.candle_files import Series
from training.evaluate import summary
from training.scores import Scores


@dataclass(frozen=True, eq=False)
class Judged:
    """Scores summed up: pooled, by step and by symbol; and the candles that they are of, for the pictures."""

    name: str
    series: Mapping[str, Series]
    scores: Scores
    evaluation: Evaluation
    by_step: Mapping[str, metrics.Curve]
    by_symbol: Mapping[str, tuple[Mapping[str, Metric], Comparison | None]]

    @property
    def is_baseline(self) -> bool:
        return self.name in BASELINES


def judge(name: str, scores: Scores, series: Mapping[str, Series]) -> Judged:
    """ValueError where the close never moves."""
    symbols = scores.outcomes.symbols
    by_symbol = {
        symbol: (found, metrics.versus_naive(scores, np.flatnonzero(symbols == symbol)))
        for symbol, found in metrics.by_symbol(scores).items()
    }
    return Judged(name, series, scores, summary(scores), metrics.by_step(scores), by_symbol)


def windows(evaluation: Evaluation) -> str:
    """Which windows were evaluated: two evaluations compare only where this is the same."""
    return (
        f"{evaluation.windows}: {evaluation.origins} origins of {', '.join(evaluation.symbols)},"
        f" {evaluation.horizon} steps of {evaluation.interval}, {evaluation.start[:10]} to {evaluation.end[:10]}"
    )

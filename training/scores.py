"""Forecasts of one set of windows, judged: what every metric, table and picture is made from."""

from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from models import scoring
from models.candles import Floats
from training.outcomes import Outcomes

Estimator = Literal["ensemble", "quantiles"]

LEVELS: Final = tuple(round(k / 20, 2) for k in range(1, 20))  # even, as the mean of pinball losses needs
KEPT: Final = (0.025, *LEVELS, 0.975)
BANDS: Final = {50: (0.25, 0.75), 80: (0.1, 0.9), 95: (0.025, 0.975)}  # percent -> levels


@dataclass(frozen=True, eq=False)
class Scores:
    """N forecasts of H closes. Errors, quantiles, CRPS and pinball losses are log-returns from the last close."""

    outcomes: Outcomes
    estimator: Estimator  # of the CRPS, the walk's included: fair over paths, or 2 x mean pinball over LEVELS
    samples: int | None  # paths per forecast; None where the model gives quantiles only
    point: Floats  # [N, H] closes
    quantiles: Floats  # [N, Q, H] at KEPT
    crps: Floats  # [N, H]

    @cached_property
    def errors(self) -> Floats:
        """`[N, H]` ln(actual / point)."""
        return np.asarray(np.log(self.outcomes.actual / self.point))

    @property
    def naive_errors(self) -> Floats:
        """`[N, H]` ln(actual / last close)."""
        return self.outcomes.moves

    @cached_property
    def pinball(self) -> Floats:
        """`[N, Q, H]` at LEVELS."""
        losses = scoring.pinball(self.outcomes.moves, self._at_levels(), LEVELS)
        return np.moveaxis(losses, 0, 1)

    def quantile(self, level: float) -> Floats:
        """`[N, H]` at one of KEPT."""
        return np.asarray(self.quantiles[:, KEPT.index(level)])

    def covered(self, percent: int) -> NDArray[np.bool_]:
        """`[N, H]` whether the close lies in the band of BANDS."""
        low, high = BANDS[percent]
        return scoring.covered(self.outcomes.moves, self.quantile(low), self.quantile(high))

    @property
    def has_spread(self) -> bool:
        """Whether the forecasts are distributions: a point has no calibration to look at."""
        return bool((self.quantile(0.9) > self.quantile(0.1)).any())

    def below(self) -> Floats:
        """`[Q]` share of closes at or below the quantile of each of LEVELS: calibrated forecasts have the level."""
        return np.asarray((self.outcomes.moves <= self._at_levels()).mean(axis=(1, 2)))

    def _at_levels(self) -> Floats:
        """`[Q, N, H]` quantiles at LEVELS."""
        return np.moveaxis(self.quantiles[:, 1:-1], 1, 0)


def naive_scores(facts: Outcomes, estimator: Estimator) -> Scores:
    """Of the last close for ever, without spread: its CRPS by either estimator is its absolute error."""
    point = np.repeat(facts.last_close[:, None], facts.horizon, axis=1)
    flat = np.zeros((len(point), len(KEPT), facts.horizon))
    return Scores(facts, estimator, None, point, flat, np.abs(facts.moves))


def walk_scores(facts: Outcomes, estimator: Estimator) -> Scores:
    """Of the zero-drift Gaussian random walk with the outcomes' EWMA volatility.

    Its closed form has the expectation of the fair estimator with any number of paths, so their ratio is fair.
    """
    quantiles = scoring.walk_quantiles(facts.walk_sigma, KEPT)
    if estimator == "ensemble":
        crps = scoring.crps_gaussian(facts.moves, facts.walk_sigma)
    else:
        crps = scoring.crps_quantiles(facts.moves, quantiles[1:-1], LEVELS)
    naive = naive_scores(facts, estimator)
    return Scores(facts, estimator, None, naive.point, np.moveaxis(quantiles, 0, 1), crps)

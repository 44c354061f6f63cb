"""What a model's served forecasts of a series were worth so far: scores of a window of blocks, and its drift."""

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.candles import DAY_MS, interval_ms
from models.scoring import EQUAL, GROUPS, block_bootstrap, block_length
from service.score.drift import Drift

RECENT_BLOCKS: Final = 20
_DRAWS: Final = 500
_SESSION: Final = 6.5  # hours of trading on an exchange's day


@dataclass(frozen=True)
class Scores:
    """Means over the scored steps of some blocks. Errors, bias, pinball losses and scores of bands are log-returns.

    `relative_mae` is the model's over the naive forecast's on the same targets, with a 95 % block-bootstrap interval
    where there are blocks enough; skill is one minus it. `*_of_price` are parts of the close at the origin.
    """

    steps: int
    blocks: int
    mae_log_return: float
    naive_mae_log_return: float
    mae_of_price: float
    naive_mae_of_price: float
    relative_mae: float | None  # None: the close never moved
    low: float | None
    high: float | None
    bias: float
    pinball: tuple[float, float, float]  # at 0.1, 0.5, 0.9
    coverage_80: float
    interval_score: float  # of the 80 % band: its width and 10 times what lies outside
    coverage_80_calibrated: float
    interval_score_calibrated: float

    @property
    def is_worse_than_naive(self) -> bool:
        """Beyond doubt: the whole interval of the skill lies below zero, by more than rounding can do."""
        return self.low is not None and self.low > 1 + EQUAL

    @property
    def crps(self) -> float:
        """Twice the mean pinball loss over the three levels: for comparing models on the same targets."""
        return 2 * sum(self.pinball) / len(self.pinball)


@dataclass(frozen=True)
class Standing:
    """One model and version, one group of horizons, one series."""

    model: str  # name@version
    group: int
    all: Scores
    recent: Scores
    drift: Drift


@dataclass(frozen=True)
class Compared:
    """Two versions over the series and blocks of time in which both were scored.

    `relative_mae` is the rival's error over the version's, each in units of the naive forecast's on its own targets,
    which a rival that forecasts a share of the requests has fewer of; with a 95 % block-bootstrap interval where there
    are blocks enough.
    """

    interval: str
    group: int
    symbols: int
    version: Scores
    rival: Scores
    relative_mae: float | None  # None: nothing to divide by
    low: float | None
    high: float | None


def related_blocks(calendar: str, interval: str, group: int) -> int:
    """In how many blocks in a row targets of one forecast may lie: blocks are spans of time, and markets pause."""
    open_hours = 24.0 if calendar in ("24/7", "24/5") or interval_ms(interval) >= DAY_MS else _SESSION
    share = open_hours / 24 * (1 if calendar == "24/7" else 5 / 7)
    return 1 + math.ceil(GROUPS[group] / share / block_length(group))


def compared(
    sums: NDArray[Any], rival: NDArray[Any], related: int, *, interval: str, group: int, symbols: int
) -> Compared | None:
    """Of sums `[N]` of the same blocks, so many of which in a row share forecasts; None where nothing was scored."""
    own, others = scores(sums, related), scores(rival, related)
    if own is None or others is None:
        return None
    naive = sums["naive_error"]
    share = np.divide(
        rival["naive_error"], naive, out=np.zeros_like(naive), where=naive > 0
    )  # 1 where targets are equal
    errors = sums["error"] * share
    total = errors.sum()
    bounds = block_bootstrap(rival["error"], errors, block=related, seed=0, draws=_DRAWS) if total > 0 else None
    low, high = bounds or (None, None)
    relative = float(rival["error"].sum() / total) if total > 0 else None
    return Compared(interval, group, symbols, own, others, relative, low, high)


def scores(sums: NDArray[Any], related: int, seed: int = 0) -> Scores | None:
    """Of the blocks' sums `[N]`, so many of which in a row share forecasts; None where nothing was scored."""
    total = {name: float(sums[name].sum()) for name in sums.dtype.names or ()}
    count = total["count"]
    if not count:
        return None
    mean = {name: value / count for name, value in total.items()}
    interval = None
    if total["naive_error"] > 0:
        interval = block_bootstrap(sums["error"], sums["naive_error"], block=related, seed=seed, draws=_DRAWS)
    low, high = interval or (None, None)
    return Scores(
        steps=int(count),
        blocks=len(sums),
        mae_log_return=mean["error"],
        naive_mae_log_return=mean["naive_error"],
        mae_of_price=mean["relative_error"],
        naive_mae_of_price=mean["relative_naive_error"],
        relative_mae=total["error"] / total["naive_error"] if total["naive_error"] > 0 else None,
        low=low,
        high=high,
        bias=mean["bias"],
        pinball=(mean["pinball_low"], mean["error"] / 2, mean["pinball_high"]),
        coverage_80=mean["covered"],
        interval_score=10 * (mean["pinball_low"] + mean["pinball_high"]),
        coverage_80_calibrated=mean["covered_calibrated"],
        interval_score_calibrated=10 * (mean["pinball_low_calibrated"] + mean["pinball_high_calibrated"]),
    )

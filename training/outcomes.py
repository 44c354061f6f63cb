"""What the market did after each origin, and what was known of its volatility before."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from models import scoring
from models.candles import CLOSE, Floats, Millis
from training.candle_files import Series
from training.windows import Origins


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Facts of N origins with H targets each; none depends on a model."""

    part: str
    interval: str
    horizon: int
    symbols: NDArray[np.str_]  # [N]
    origin_times: Millis  # [N]
    target_times: Millis  # [N, H]
    positions: NDArray[np.int64]  # [N] the origin's place in the time grid
    grid: Millis  # [T] every candle time of the evaluated spans
    last_close: Floats  # [N]
    actual: Floats  # [N, H] closes
    walk_sigma: Floats  # [N, H] of the random walk, log-return
    scale: Floats  # [N, H] what divides the paired loss, log-return
    one_step: Floats  # [N] what divides the errors of the MASE, price

    @cached_property
    def moves(self) -> Floats:
        """`[N, H]` ln(actual / last close): the naive forecast's errors, and those of the walk's median."""
        return np.asarray(np.log(self.actual / self.last_close[:, None]))


def outcomes(series: Sequence[Series], origins: Origins) -> Outcomes:
    """The outcomes at `origins`; ValueError if there are none, or series of several intervals."""
    if not len(origins):
        raise ValueError(f"the {origins.part} part has no origin: too few candles for context and horizon")
    intervals = {series[index].interval for index, _ in origins.pairs}
    if len(intervals) > 1:
        raise ValueError(f"one evaluation has one interval, not {', '.join(sorted(intervals))}")
    if any(origin < 1 for _, origin in origins.pairs):
        raise ValueError("an origin needs a candle before it: there is no volatility without a return")
    steps = np.arange(1, origins.horizon + 1)
    at = [(series[index], origin) for index, origin in origins.pairs]
    origin_times = np.array([item.timestamps[origin] for item, origin in at])
    grid = _time_grid(series, origins)
    return Outcomes(
        part=origins.part,
        interval=intervals.pop(),
        horizon=origins.horizon,
        symbols=np.array([item.symbol for item, _ in at]),
        origin_times=origin_times,
        target_times=np.stack([item.timestamps[origin + steps] for item, origin in at]),
        positions=np.searchsorted(grid, origin_times),
        grid=grid,
        last_close=np.array([item.candles[origin, CLOSE] for item, origin in at]),
        actual=np.stack([item.candles[origin + steps, CLOSE] for item, origin in at]),
        walk_sigma=_sigma(series, origins, scoring.WALK_DECAY),
        scale=_sigma(series, origins, scoring.SCALE_DECAY),
        one_step=_known(series, origins, scoring.one_step_naive),
    )


def _time_grid(series: Sequence[Series], origins: Origins) -> Millis:
    """Every candle time between a symbol's first and last origin: what the bootstrap cuts into blocks.

    Counted in candles and not in origins, a block is as long as the horizon whatever the stride, and spans
    in which no symbol is evaluated vanish.
    """
    spans: dict[int, list[int]] = defaultdict(list)
    for index, origin in origins.pairs:
        spans[index].append(origin)
    return np.unique(np.concatenate([series[i].timestamps[min(at) : max(at) + 1] for i, at in spans.items()]))


def _sigma(series: Sequence[Series], origins: Origins, decay: float) -> Floats:
    """`[N, H]` EWMA volatility x √k from all candles up to each origin: no model's lookback changes it."""

    def volatility(closes: Floats) -> Floats:
        return np.concatenate([[np.nan], scoring.ewma_volatility(scoring.log_returns(closes), decay)])

    return scoring.walk_sigma(_known(series, origins, volatility), origins.horizon)


def _known(series: Sequence[Series], origins: Origins, running: Callable[[Floats], Floats]) -> Floats:
    """`[N]` at each origin, what `running` makes of all closes `[T]` of its series up to each."""
    values = {index: running(series[index].candles[:, CLOSE]) for index in {index for index, _ in origins.pairs}}
    return np.array([values[index][origin] for index, origin in origins.pairs])

"""Whether a model has become worse than its baseline: a cumulative sum over blocks of scored targets.

A block's loss is the mean of (|error| - 1.03 rho0 |naive error|) / sigma over its targets (models/scoring.py), divided
by the deviation that such means had in the baseline. Paired with the naive forecast and scaled by volatility, it stays
where it is when markets become wilder; in blocks as long as the horizon, it is nearly free of the dependence between
forecasts that overlap, less so where an exchange's sessions leave few candles in a block's span of time. Page's (1954)
one-sided cumulative sum, S = max(0, S + z - 1/2), then waits for evidence to add up. It is computed anew from stored
sums each time: there is no detector whose state could be lost, and a restatement corrects it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from model_store.manifest import Baseline
from models.candles import DAY_MS, Floats, interval_ms
from models.scoring import MARGIN, block_length
from service.score.ledger import Blocks

State = Literal["ok", "warn", "alarm", "insufficient", "no_baseline"]
STATES: Final[tuple[State, ...]] = get_args(State)

SLACK: Final = 0.5
WARN: Final = 5.0
ALARM: Final = 10.0  # of all symbols of a model together
SYMBOL_ALARM: Final = 12.0  # of one symbol: there are many of them
_CLEAR: Final = 2.0
_CLEAR_BLOCKS: Final = 5  # whose losses must all lie below zero before an alarm ends
_CLIP: Final = 4.0
_FEWEST_BASELINE_BLOCKS: Final = 30
_FEWEST_BLOCKS: Final = 3
_WORSE: Final = 1.25  # the rise of the error whose delay is predicted


@dataclass(frozen=True)
class Drift:
    """What the blocks say. `delay_days` is how long an error that rises by a quarter takes to raise the alarm."""

    state: State
    score: float = 0.0  # the cumulative sum
    blocks: int = 0
    delay_days: float | None = None  # None: it never would, or nothing is known


@dataclass(frozen=True)
class Losses:
    """Standardised losses of one symbol, by block of time; about zero on average where nothing has changed."""

    numbers: NDArray[np.int64]  # [N]
    z: Floats  # [N]
    naive: float  # mean |naive error| / sigma of a target


def baseline_for(baselines: Sequence[Baseline], symbol: str, interval: str, group: int) -> Baseline | None:
    """The symbol's own baseline of a group of horizons if it has blocks enough, else that of all symbols."""
    fitting = [each for each in baselines if each.interval == interval and each.group == group]
    for wanted in (symbol, "*"):
        for each in fitting:
            if each.symbol == wanted and each.n_blocks >= _FEWEST_BASELINE_BLOCKS and each.sd_block > 0:
                return each
    return None


def losses(blocks: Blocks, baseline: Baseline, sealed: int) -> Losses:
    """Of the blocks before number `sealed`, less those with under half the usual targets, which are too noisy."""
    sums, numbers = blocks.sums, blocks.numbers
    kept = numbers < sealed
    if kept.any():
        kept &= sums["count"] >= np.median(sums["count"][kept]) / 2
    sums, numbers = sums[kept], numbers[kept]
    mean = (sums["scaled_error"] - MARGIN * baseline.rho0 * sums["scaled_naive_error"]) / sums["count"]
    naive = float(sums["scaled_naive_error"].sum() / max(1.0, sums["count"].sum()))
    # The margin pulls a model that has not changed below zero: that is the patience it buys.
    return Losses(numbers, np.clip(mean / baseline.sd_block, -_CLIP, _CLIP), naive)


def drift_of_symbol(found: Losses | None, baseline: Baseline | None, interval: str, group: int) -> Drift:
    """The state of one symbol."""
    if found is None or baseline is None:
        return Drift("no_baseline")
    per_block = baseline.rho0 * (_WORSE - MARGIN) * found.naive / baseline.sd_block
    return _judged(found.z, SYMBOL_ALARM, per_block, interval, group)


def drift_of_model(symbols: Sequence[Losses], baseline: Baseline | None, interval: str, group: int) -> Drift:
    """The state of a model over all its symbols, whose losses are averaged block by block.

    `baseline` is that of all symbols: it knows how far they move together, and so how much an average is worth.
    """
    if baseline is None:
        return Drift("no_baseline")
    symbols = [each for each in symbols if len(each.numbers)]
    if not symbols:
        return Drift("insufficient")
    numbers = np.unique(np.concatenate([each.numbers for each in symbols]))
    total, count = np.zeros(len(numbers)), np.zeros(len(numbers))
    for each in symbols:
        places = np.searchsorted(numbers, each.numbers)
        total[places] += each.z
        count[places] += 1
    spread = np.sqrt(baseline.correlation + (1 - baseline.correlation) / count)
    naive = float(np.mean([each.naive for each in symbols]))
    per_block = baseline.rho0 * (_WORSE - MARGIN) * naive / baseline.sd_block / float(np.median(spread))
    return _judged(np.clip(total / count / spread, -_CLIP, _CLIP), ALARM, per_block, interval, group)


def cumulative(z: Floats) -> Floats:
    """`[N]` S = max(0, S + z - 1/2)."""
    score, found = 0.0, np.empty(len(z))
    for index, value in enumerate(z.tolist()):
        score = max(0.0, score + value - SLACK)
        found[index] = score
    return found


def _judged(z: Floats, alarm: float, per_block: float, interval: str, group: int) -> Drift:
    days = interval_ms(interval) * block_length(group) / DAY_MS
    delay = alarm / (min(per_block, _CLIP) - SLACK) * days if per_block > SLACK else None
    if len(z) < _FEWEST_BLOCKS:
        return Drift("insufficient", blocks=len(z), delay_days=delay)
    scores = cumulative(z)
    return Drift(_state(z, scores, alarm), float(scores[-1]), len(z), delay)


def _state(z: Floats, scores: Floats, alarm: float) -> State:
    """An alarm lasts until the sum is small again and several blocks in a row were better than the baseline."""
    raised = False
    for index, score in enumerate(scores.tolist()):
        if score > alarm:
            raised = True
        elif raised and score < _CLEAR and (z[max(0, index + 1 - _CLEAR_BLOCKS) : index + 1] < 0).all():
            raised = False
    if raised:
        return "alarm"
    return "warn" if scores[-1] > WARN else "ok"

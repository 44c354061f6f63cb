"""Fair comparisons: the sides take turns in one process, and every round gives one ratio.

A machine that slows down in the middle of a run slows both sides of a round alike, so the ratio of a round is worth
more than the ratio of two medians taken minutes apart.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

Work = Callable[[], object]
Stopwatch = Callable[[Work], float]
Clock = Callable[[], float]

_RESAMPLES: Final = 2000
_MOST_REPEATS: Final = 8
_MOST_ROUNDS: Final = 200
_SHORT: Final = 1.0


@dataclass(frozen=True)
class Estimate:
    """A median with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Race:
    """Seconds per call, one entry per round for each side."""

    seconds: Mapping[str, tuple[float, ...]]

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def median(self, side: str) -> float:
        """Seconds of a typical call."""
        return float(np.median(self.seconds[side]))

    def ratio(self, slower: str, faster: str) -> Estimate:
        """How many times longer `slower` takes: the median of the rounds' ratios."""
        return median_of(np.divide(self.seconds[slower], self.seconds[faster]))

    def fastest(self) -> str:
        """The side with the smallest median."""
        return min(self.seconds, key=self.median)


def median_of(values: np.ndarray, seed: int = 0) -> Estimate:
    """The median of `values` with a percentile-bootstrap interval; the interval is the value where it is alone."""
    rng = np.random.default_rng(seed)
    drawn = np.median(rng.choice(values, (_RESAMPLES, len(values))), axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(float(np.median(values)), float(low), float(high))


def race(
    sides: Mapping[str, Work],
    *,
    seconds: float,
    stopwatch: Stopwatch,
    warm_up: Mapping[str, Work] | None = None,
    at_least: int = 3,
    clock: Clock = time.monotonic,
) -> Race:
    """Let the sides take turns, in alternating order, until `seconds` are over or `at_least` rounds are done.

    A side that is much faster than the slowest runs several times in its turn and reports the median. `warm_up`
    replaces the untimed first call of a side, for work that is too long to do for nothing; a side warmed up that way
    counts as the slowest.
    """
    replaced = warm_up or {}
    first = {name: _warm(replaced.get(name, work), stopwatch) for name, work in sides.items()}
    slowest = max(first.values())
    repeats = {
        name: 1 if name in replaced else int(min(_MOST_REPEATS, max(1, slowest // max(taken, 1e-9))))
        for name, taken in first.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    end = clock() + seconds
    for turn in range(_MOST_ROUNDS):
        if turn >= at_least and clock() >= end:
            break
        for name in order if turn % 2 == 0 else reversed(order):
            taken[name].append(float(np.median([stopwatch(sides[name]) for _ in range(repeats[name])])))
    return Race({name: tuple(values) for name, values in taken.items()})


def _warm(work: Work, stopwatch: Stopwatch) -> float:
    """Seconds of a call; of a second one where the first was so short that compiling may have been most of it."""
    taken = stopwatch(work)
    return stopwatch(work) if taken < _SHORT else taken


def wall_time(work: Work) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cuda_time(work: Work) -> float:
    """Seconds between two events around `work`, its host part included: the stream is idle when it begins."""
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def stopwatch_for(device: str) -> Stopwatch:
    """The clock of a torch device."""
    return cuda_time if torch.device(device).type == "cuda" else wall_time

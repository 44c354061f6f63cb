"""What a batch takes: measured seconds, by bucket and rows. Admission predicts with them."""

import time
from collections.abc import Hashable
from typing import Final

import numpy as np

_SMOOTHING: Final = 0.2  # weight of the newest batch
_WARM_UP: Final = 0.5  # a batch that takes less than this share of what was expected: the past was a warm-up
_REMEMBERED_SECONDS: Final = 30.0


class Costs:
    """Running means of the seconds of batches. Where little is known the prediction errs towards too little."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, dict[int, float]] = {}
        self._measured: dict[Hashable, float] = {}

    def record(self, bucket: Hashable, rows: int, seconds: float, *, ended: bool = True) -> None:
        """A batch of so many rows, padding included, took so long, or at least so long if it never ended."""
        known = self._seconds.setdefault(bucket, {})
        before = known.get(rows, seconds)
        if not ended:
            seconds = max(seconds, before)
        known[rows] = seconds if seconds < _WARM_UP * before else before + _SMOOTHING * (seconds - before)
        self._measured[bucket] = time.monotonic()

    def predict(self, bucket: Hashable, rows: int) -> float:
        """Seconds of a batch of `rows`; between measured sizes linear, beyond the largest constant.

        0 where nothing is known or all of it is old: what is refused for its cost is never measured again, so
        one slow batch would otherwise be held against its bucket for ever.
        """
        known = self._seconds.get(bucket)
        if not known or not rows or time.monotonic() - self._measured[bucket] > _REMEMBERED_SECONDS:
            return 0.0
        if rows in known:
            return known[rows]
        sizes = sorted(known)
        return float(np.interp(rows, [0, *sizes], [0.0, *(known[size] for size in sizes)]))

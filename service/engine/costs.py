"""What a batch takes: measured seconds, by bucket and rows. Admission predicts with them."""

import time
from collections.abc import Hashable
from typing import Final

import numpy as np

# Weight of the newest batch where it took longer than expected, and where it did not.
_RISING: Final = 0.4
_FALLING: Final = 0.1
_WARM_UP: Final = 0.5  # a batch that takes less than this share of what was expected: the past was a warm-up
_REMEMBERED_SECONDS: Final = 30.0


class Costs:
    """The seconds that batches take, and rarely more: their 0.8-expectile (Newey and Powell, Econometrica 1987),
    followed batch by batch. Were it their mean, half of what is just admitted would be late.
    """

    def __init__(self) -> None:
        self._seconds: dict[Hashable, dict[int, float]] = {}
        self._measured: dict[Hashable, float] = {}

    def record(self, bucket: Hashable, rows: int, seconds: float, *, ended: bool = True) -> None:
        """A batch of so many rows, padding included, took so long, or at least so long if it never ended."""
        known = self._seconds.setdefault(bucket, {})
        before = known.get(rows, seconds)
        if not ended:
            seconds = max(seconds, before)
        weight = _RISING if seconds > before else _FALLING
        known[rows] = seconds if seconds < _WARM_UP * before else before + weight * (seconds - before)
        if ended:  # no fewer rows take longer, nor more rows longer than so many of these: nobody may try them again
            for size, its in known.items():
                known[size] = min(its, known[rows] * max(1.0, size / rows))
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

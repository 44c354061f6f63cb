"""Quotas: how much a client may ask for, in candles, counted in Redis for all processes together.

A forecast costs a candle for each that the model reads and one for each that it draws: lookback + horizon x paths. So
much the networks have to do, for all paths share one reading of the candles; the product of the three would charge one
pass over 4,096 candles like an hour of sampling. Candles that are stored cost one each, and everything else costs 1:
a forecast too that is repeated from memory.

The count is a sliding window's: what was spent in the window before fades out while this one passes.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Final, NamedTuple

from service.keys import Quota
from service.metrics import Metrics
from service.state import REDIS_ERRORS, State

_SCRIPT: Final = resources.files("service").joinpath("scripts", "spend.lua").read_bytes()


@dataclass(frozen=True)
class Count:
    """What was spent in window number `window` since the epoch, and in the one before."""

    window: int
    spent: int = 0
    before: int = 0

    def at(self, window: int) -> "Count":
        """The same when another window has begun; a clock that is behind sees the newest."""
        if window <= self.window:
            return self
        return Count(window, before=self.spent if window == self.window + 1 else 0)

    def used(self, quota: Quota, now: int) -> float:
        """Candles that count at an instant, UTC ms."""
        return self.spent + self.before * (1 - self._passed(quota, now))

    def headers(self, quota: Quota, now: int) -> list[tuple[bytes, bytes]]:
        """The fields of draft-ietf-httpapi-ratelimit-headers."""
        remaining = max(0, math.floor(quota.candles - self.used(quota, now)))
        ends = math.ceil(quota.seconds * (1 - self._passed(quota, now)))
        return [
            (b"ratelimit-policy", b'"candles";q=%d;qu="candles";w=%d' % (quota.candles, quota.seconds)),
            (b"ratelimit", b'"candles";r=%d;t=%d' % (remaining, ends)),
        ]

    def wait(self, quota: Quota, cost: int, now: int) -> int:
        """Whole seconds after which `cost` fits, if nothing else is spent; it is no more than the quota."""
        room, passed = quota.candles - cost, self._passed(quota, now)
        if self.spent <= room:  # as soon as enough of the window before has faded out
            share = 1 - (room - self.spent) / self.before if self.before else 0.0
        else:
            share = 2 - room / self.spent
        return max(1, math.ceil(quota.seconds * (share - passed)))

    def _passed(self, quota: Quota, now: int) -> float:
        """The share of the window that is over."""
        return min(1.0, max(0.0, now / (1000 * quota.seconds) - self.window))


class Standing(NamedTuple):
    """Whether a cost fitted, else in how many seconds it will (None: never), and the headers that say what is left."""

    fits: bool
    wait: int | None
    headers: Sequence[tuple[bytes, bytes]]


class Quotas:
    """Counts by client; in this process alone while Redis does not answer."""

    def __init__(self, state: State, now: Callable[[], int], metrics: Metrics) -> None:
        self._state = state
        self._now = now
        self._metrics = metrics
        self._own: dict[str, Count] = {}
        self._questions = itertools.count()

    async def spend(self, client: str, quota: Quota, cost: int) -> Standing:
        """Spend `cost` candles if they are there, and nothing if they are not."""
        now = self._now()
        fits, count = await self._spent(client, quota, cost, now)
        wait = None if fits or cost > quota.candles else count.wait(quota, cost, now)
        return Standing(fits, wait, count.headers(quota, now))

    async def _spent(self, client: str, quota: Quota, cost: int, now: int) -> tuple[bool, Count]:
        if self._state.up:
            # The last word makes questions differ: equal ones would be asked once.
            asked = (quota.candles, 1000 * quota.seconds, cost, now, next(self._questions))
            try:
                with self._metrics.redis_operation("quota_spend"):
                    (found,) = await self._state.line.ask(("EVAL", _SCRIPT, 1, f"cc:1:quota:{client}", *asked))
                self._own[client] = Count(*map(int, found[1:]))  # where this process goes on from without Redis
                return bool(found[0]), self._own[client]
            except REDIS_ERRORS:
                pass
        count = self._own.get(client, Count(0)).at(now // (1000 * quota.seconds))
        if fits := count.used(quota, now) + cost <= quota.candles:
            count = self._own[client] = Count(count.window, count.spent + cost, count.before)
        return fits, count

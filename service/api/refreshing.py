"""The watch list's workers: each entry's forecast is computed anew whenever a POST for it would be.

That is when candles were stored, here or by another process on the same Redis, when time has passed it, and when its
model, runtime or scores have changed. One worker for each entry, one refresh at a time: of the candles that come while
it runs, the newest win.
"""

import asyncio
import contextlib
import logging
import time
from typing import Final

from service.api.answers import Found
from service.api.forecasting import Noted, found_for, settled
from service.api.repeated import holds, repeat_of
from service.api.watchlist import Latest, Watched
from service.engine.history import UnknownSymbol
from service.services import Services

_log = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 1.0  # between two looks at what other processes have stored
_LONGEST_PAUSE: Final = 60.0  # after failures, unless candles come
_PATIENCE_SECONDS: Final = 120.0  # a late deadline is a low priority: batches are formed by deadline
_SCORES_SECONDS: Final = 0.5  # for what candles say of earlier forecasts: an answer shows it beside the next one
_AT_ONCE: Final = 8  # so that a caller never waits for a larger batch of nobody's


class Refresher:
    """Keeps every watched forecast fresh; what went wrong is logged, counted and tried again."""

    def __init__(self, parts: Services) -> None:
        self._parts = parts
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._workers: list[asyncio.Task[None]] = []
        self._stopped = False

    def start(self) -> None:
        """Begin with what is stored already."""
        self._workers = [
            asyncio.create_task(self._tend(each), name=f"watch {each.entry.symbol}")
            for each in self._parts.watch.watched
        ]

    async def stop(self) -> None:
        """Give up what is being computed."""
        self._stopped = True  # the client of Redis can swallow a cancellation
        for watched, worker in zip(self._parts.watch.watched, self._workers, strict=True):
            watched.touched.set()
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    async def _tend(self, watched: Watched) -> None:
        failures, said = 0, ""
        while not self._stopped:
            watched.outdated |= watched.touched.is_set()  # in this order it is stale without a gap
            watched.touched.clear()
            try:
                await self._look(watched)
                failures, said = 0, ""
            except Exception as error:  # noqa: BLE001 - the next candles may be better
                failures += 1
                said = self._note(watched, error, said)
            await _touched_within(watched, min(_LOOK_SECONDS * 2 ** min(failures, 10), _LONGEST_PAUSE))

    async def _look(self, watched: Watched) -> None:
        latest = watched.latest
        now = self._parts.now()
        if latest and latest.repeat.covers(now) and await holds(latest.repeat, self._parts):
            watched.outdated = False
            return
        watched.outdated = True
        await self._scored(watched)
        with contextlib.suppress(UnknownSymbol):  # its candles may come
            async with self._places:
                latest = await self._computed(watched)
            outcome = "refreshed" if watched.publish(latest) else "unchanged"
            self._parts.metrics.watch_refreshes.labels(outcome).inc()

    async def _scored(self, watched: Watched) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SCORES_SECONDS):
                await self._parts.evaluator.caught_up(watched.entry.symbol, watched.interval or "")

    async def _computed(self, watched: Watched) -> Latest:
        """The forecast that a POST would be answered with, by the same steps."""
        parts = self._parts
        asked = await settled(watched.entry.symbol, watched.entry.request, parts, Noted())
        found = await found_for(asked, True, parts, time.monotonic() + _PATIENCE_SECONDS)
        return Latest(Found(found.kept, "hit"), asked.facts, repeat_of(asked, found.kept), asked.issued_at)

    def _note(self, watched: Watched, error: Exception, said: str) -> str:
        """Count a failure, and log it unless it is the last one again."""
        self._parts.metrics.watch_refreshes.labels("failed").inc()
        what = f"{type(error).__name__}: {error}"
        if what != said:
            foreseen = isinstance(error, (ValueError, LookupError, RuntimeError))
            asked = watched.entry.symbol, watched.entry.request.model
            _log.warning("the watched forecast of %s by %s is stale: %s", *asked, what, exc_info=not foreseen)
        return what


async def _touched_within(watched: Watched, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await watched.touched.wait()

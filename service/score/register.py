"""From a computed forecast to the ledger, off the response's path; kept for later where Redis does not take it."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Final

from service.metrics import Metrics
from service.score.ledger import Ledger, Registered, Served
from service.state import REDIS_ERRORS, is_lasting

_log = logging.getLogger(__name__)

_MOST_WAITING: Final = 10_000
_PAUSE_SECONDS: Final = 1.0
_STOP_SECONDS: Final = 3.0

Noted = Callable[[], Served]


class Register:
    """Writes forecasts into the ledger one after the other, in the order in which they were served."""

    def __init__(self, ledger: Ledger, metrics: Metrics, now: Callable[[], int]) -> None:
        self.waits = False  # for Redis: the last forecast could not be written, and is tried again
        self._ledger = ledger
        self._metrics = metrics
        self._now = now
        self._waiting: deque[Noted] = deque()
        self._writer: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._last_try = 0.0  # of a stop, in time.monotonic() seconds
        metrics.ledger_waiting.set_function(lambda: len(self._waiting))
        metrics.degraded.labels("ledger").set_function(lambda: self.waits)

    def note(self, served: Noted) -> None:
        """Write a forecast soon, and make it then.

        Beyond ten thousand the oldest is given up: its candles are the first to come.
        """
        if len(self._waiting) == _MOST_WAITING:
            self._waiting.popleft()
            self._metrics.ledger_dropped.inc()
        if self.waits:  # a closure holds candles and paths, of which thousands would fill the memory
            with contextlib.suppress(Exception):  # what cannot be made now will be found out when it is written
                made = served()
                served = lambda: made  # noqa: E731
        self._waiting.append(served)
        if self._writer is None:
            # In a context of its own: it goes on for others, whose lines in the log would have this request's id.
            self._writer = asyncio.create_task(self._write(), name="ledger", context=Context())

    async def flush(self) -> None:
        """Wait until everything noted so far is written, or Redis does not answer."""
        while (writer := self._writer) and not writer.done() and self._waiting:
            await asyncio.wait({writer}, timeout=0.01)

    async def stop(self) -> None:
        """Write what can be written in a few seconds, and nothing again that fails."""
        self._last_try = time.monotonic() + _STOP_SECONDS
        self._stopping.set()
        if self._writer:
            await self._writer

    async def _write(self) -> None:
        while self._waiting and not (self._stopping.is_set() and time.monotonic() > self._last_try):
            served = self._waiting[0]
            try:
                found = await self._ledger.register(served(), self._now())
            except Exception as error:  # noqa: BLE001 - one forecast must not keep the others waiting
                if isinstance(error, REDIS_ERRORS) and not is_lasting(error):
                    if await self._paused(error):
                        continue
                    break
                _log.exception("a forecast was not noted in the ledger")
                self._metrics.ledger_dropped.inc()
                found = Registered()
            self._done(served, found)
        if self._waiting:
            _log.error("%d forecasts were not noted in the ledger", len(self._waiting))
        self._writer = None

    def _done(self, served: Noted, found: Registered) -> None:
        self.waits = False
        if self._waiting and self._waiting[0] is served:  # not given up meanwhile
            self._waiting.popleft()
        for outcome, count in vars(found).items():
            self._metrics.ledger_steps.labels(outcome).inc(count)

    async def _paused(self, error: Exception) -> bool:
        """Wait a moment for Redis; False where the service stops, and this was the last try."""
        if not self.waits:
            _log.warning("the ledger waits for Redis: %s", str(error) or type(error).__name__)
        self.waits = True
        if self._stopping.is_set():
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PAUSE_SECONDS):
                await self._stopping.wait()
        return True

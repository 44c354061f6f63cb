"""What is stored of a series, in a few bytes: while they are the same, reading its candles again finds the same.

`cc:1:{SYMBOL:interval}:r` changes with every block that is written, in the same step; no value of it comes back.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from redis.asyncio import Redis

from service.metrics import Metrics
from service.state import REDIS_ERRORS

_PATIENCE_SECONDS: Final = 0.05  # for an answer of Redis


@dataclass(frozen=True)
class Revision:
    """The stored intervals of a symbol with their calendars, and the mark of the last write to one of them."""

    calendars: dict[bytes, bytes]
    mark: bytes


class Revisions:
    """Reads for everybody who has asked since the last read began: one command at a time, however many ask."""

    def __init__(self, redis: Redis, metrics: Metrics) -> None:
        self._redis = redis
        self._metrics = metrics
        self._waiting: dict[tuple[str, str], list[asyncio.Future[Revision | None]]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._under_way: set[asyncio.Task[Any]] = set()

    async def of(self, symbol: str, interval: str) -> Revision | None:
        """The revision at some instant after this call; None where nothing is stored or Redis does not answer soon."""
        answer: asyncio.Future[Revision | None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault((symbol, interval), []).append(answer)
        if self._reader is None:
            self._reader = asyncio.create_task(self._read_all())
        return await answer

    async def _read_all(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, {}
            reading = asyncio.create_task(self._read(list(waiting)))
            self._under_way.add(reading)  # a late one is left to itself: the client can swallow a cancellation
            reading.add_done_callback(self._under_way.discard)
            await asyncio.wait({reading}, timeout=_PATIENCE_SECONDS)
            found = reading.result() if reading.done() else [None] * len(waiting)
            for revision, answers in zip(found, waiting.values(), strict=True):
                for answer in answers:
                    if not answer.done():
                        answer.set_result(revision)
        self._reader = None

    async def _read(self, series: Sequence[tuple[str, str]]) -> Sequence[Revision | None]:
        # Whatever goes wrong, those who wait hear of it: RuntimeError is the event loop's, for a closed transport.
        with contextlib.suppress(RuntimeError, *REDIS_ERRORS), self._metrics.redis_operation("history_revision"):
            pipeline = self._redis.pipeline(transaction=False)
            for symbol, interval in series:
                pipeline.hgetall(series_key(symbol))
                pipeline.get(revision_key(symbol, interval))
            replies: list[Any] = await pipeline.execute()
            pairs = zip(replies[::2], replies[1::2], strict=True)
            return [Revision(calendars, mark) if mark else None for calendars, mark in pairs]
        return [None] * len(series)


def series_key(symbol: str) -> str:
    """Where the calendars of a symbol's intervals lie."""
    return f"cc:1:{{{symbol}}}:s"


def revision_key(symbol: str, interval: str) -> str:
    """Where the mark of a series lies."""
    return f"cc:1:{{{symbol}:{interval}}}:r"

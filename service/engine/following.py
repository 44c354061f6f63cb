"""Following the store: its aliases are looked at every few seconds, and at once where Redis says that one has moved."""

import asyncio
import contextlib
import logging
from typing import Final

from service.engine.registry import Registry
from service.state import REDIS_ERRORS, State

_log = logging.getLogger(__name__)

CHANNEL: Final = "cc:1:promoted"  # the name of a model whose alias has moved
_LISTEN_SECONDS: Final = 15.0  # until the line is tried whether it still holds
_PAUSE_SECONDS: Final = 1.0  # without Redis


class Follower:
    """Has the registry look. Without Redis a promotion is noticed at the next look instead."""

    def __init__(self, registry: Registry, state: State, every_seconds: float) -> None:
        self._registry = registry
        self._state = state
        self._every_seconds = every_seconds
        self._moved = asyncio.Event()
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Follow until stopped."""
        self._tasks = [
            asyncio.create_task(self._look(), name="store looks"),
            asyncio.create_task(self._listen(), name="store notices"),
        ]

    async def stop(self) -> None:
        """Follow no longer; what is being loaded goes on."""
        self._stopping.set()
        while waiting := [task for task in self._tasks if not task.done()]:
            for task in waiting:
                task.cancel()  # again, since the Redis client can swallow one while it reconnects
            await asyncio.wait(waiting, timeout=0.1)

    async def announce(self, model: str) -> None:
        """Tell every process on this Redis, this one first, that an alias of `model` has moved."""
        self._moved.set()
        with contextlib.suppress(*REDIS_ERRORS):
            await self._state.redis.publish(CHANNEL, model)

    async def _look(self) -> None:
        while not self._stopping.is_set():
            self._moved.clear()
            try:
                await self._registry.look()
            except Exception:  # noqa: BLE001 - what is served goes on, and the next look may see more
                _log.exception("the store's aliases cannot be followed")
            await _set_within(self._moved, self._every_seconds)

    async def _listen(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(*REDIS_ERRORS):
                async with self._state.redis.pubsub(ignore_subscribe_messages=True) as notices:
                    await notices.subscribe(CHANNEL)
                    while not self._stopping.is_set():
                        if await notices.get_message(timeout=_LISTEN_SECONDS):
                            self._moved.set()
            await _set_within(self._stopping, _PAUSE_SECONDS)


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()

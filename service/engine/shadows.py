"""Shadow forecasts: computed after what callers wait for, a few at a time, and dropped rather than queued."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from service.engine.batcher import DeadlineExceeded, EngineStopped, Overloaded
from service.engine.registry import LoadedModel
from service.metrics import Metrics

_log = logging.getLogger(__name__)

_AT_ONCE: Final = 4  # so that a caller never waits for a larger batch of nobody's


def is_of_share(digest: bytes, share: float) -> bool:
    """Whether a request is among those that a shadow forecasts too: the same for equal digests, wherever they are."""
    return int.from_bytes(digest[:8], "big") < share * 2**64


class Shadows:
    """What is under way, and how it ended."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._under_way: dict[bytes, asyncio.Task[None]] = {}
        self._noted: set[str] = set()

    def begin(self, model: LoadedModel, digest: bytes, forecast: Callable[[], Awaitable[None]]) -> None:
        """Have a request forecast by a shadow, unless it is already or too many are."""
        if digest in self._under_way:
            return
        if len(self._under_way) >= _AT_ONCE:
            self._count(model, "dropped")
            return
        task = asyncio.create_task(self._run(model, forecast), name=f"shadow {model.exact}")
        self._under_way[digest] = task
        task.add_done_callback(lambda _: self._under_way.pop(digest))

    async def idle(self) -> None:
        """Wait for what is under way."""
        while self._under_way:
            await asyncio.wait(self._under_way.values())

    async def stop(self) -> None:
        """Give up what is under way."""
        for task in self._under_way.values():
            task.cancel()
        await self.idle()

    async def _run(self, model: LoadedModel, forecast: Callable[[], Awaitable[None]]) -> None:
        try:
            await forecast()
        except (DeadlineExceeded, EngineStopped, Overloaded):
            self._count(model, "dropped")
        except Exception as error:  # noqa: BLE001 - nobody waits for it
            self._count(model, "failed")
            if model.exact not in self._noted:
                self._noted.add(model.exact)
                _log.warning("the shadow %s does not forecast what %s is asked for: %s", model.exact, model.name, error)
        else:
            self._count(model, "noted")

    def _count(self, model: LoadedModel, outcome: str) -> None:
        self._metrics.shadow_forecasts.labels(model.name, outcome).inc()

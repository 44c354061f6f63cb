"""The door: a request takes a permit before its body is read, or is turned away at once."""

import contextlib
from collections.abc import Iterator

from service.engine.batcher import Batcher, Overloaded
from service.metrics import UNKNOWN_MODEL, Metrics


class Door:
    """Bounds how many requests are inside: read, waiting or being computed."""

    def __init__(self, permits: int, batcher: Batcher, metrics: Metrics) -> None:
        self._permits = permits
        self._batcher = batcher
        self._metrics = metrics
        self._inside = 0
        metrics.queue_capacity.set(permits)

    @contextlib.contextmanager
    def permit(self) -> Iterator[None]:
        """A place inside for as long as the context lasts; Overloaded if there is none."""
        if self._inside >= self._permits:
            self._metrics.refusals.labels("full").inc()
            self._metrics.forecasts.labels(UNKNOWN_MODEL, "overloaded").inc()
            raise Overloaded("as many requests as may wait are waiting already", self._batcher.drain_seconds())
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

"""The door: a request takes a permit before its body is read, or is turned away at once."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Final

from service.engine.batcher import Batcher, Overloaded
from service.metrics import UNKNOWN_MODEL, Metrics

_MOST_OF_FREE: Final = 4  # a client alone may hold four fifths, two together eight ninths: never all of them


class Door:
    """Bounds how many requests are inside: read, waiting or being computed.

    A client may hold so many times what is free, a dynamic threshold (Choudhury and Hahne, IEEE/ACM ToN 1998): there is
    always room for one who comes, and nothing is kept back for those who do not. Who shows no key may hold everything.
    """

    def __init__(self, permits: int, batcher: Batcher, metrics: Metrics) -> None:
        self._permits = permits
        self._batcher = batcher
        self._metrics = metrics
        self._inside = 0
        self._held: Counter[str] = Counter()
        metrics.queue_capacity.set(permits)

    @contextlib.contextmanager
    def permit(self, client: str | None = None) -> Iterator[None]:
        """A place inside for as long as the context lasts; Overloaded if there is none for this client."""
        free = self._permits - self._inside
        if free <= 0:
            raise self._refusal("full", "as many requests as may wait are waiting already")
        if client is not None and self._held[client] >= _MOST_OF_FREE * free:
            raise self._refusal("share", "as many requests of this client as may wait are waiting already")
        self._inside += 1
        if client is not None:
            self._held[client] += 1
        try:
            yield
        finally:
            self._inside -= 1
            if client is not None:
                self._held[client] -= 1

    def _refusal(self, reason: str, detail: str) -> Overloaded:
        self._metrics.refusals.labels(reason).inc()
        self._metrics.forecasts.labels(UNKNOWN_MODEL, "overloaded").inc()
        return Overloaded(detail, self._batcher.drain_seconds())

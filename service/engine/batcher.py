"""Requests waiting for the engine. A batch is formed when the engine asks for one, never by a timer."""

import asyncio
import heapq
import itertools
import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass, field

from models.forecaster import Forecast, ForecastInput
from service.engine.registry import LoadedModel


class QueueFull(RuntimeError):
    """No room for another request; `retry_after` is the predicted time to drain, in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("as many requests as may wait are waiting already")
        self.retry_after = retry_after


class EngineStopped(RuntimeError):
    """The engine takes no requests: it has not started, or is shutting down."""

    def __init__(self) -> None:
        super().__init__("the engine takes no requests")


@dataclass(frozen=True)
class Timings:
    """Milliseconds that one request spent in each stage of the engine."""

    queue: float
    batch: float
    prepare: float
    run: float
    finish: float


@dataclass(frozen=True)
class Computed:
    """A forecast, with the size of the batch it was computed in."""

    forecast: Forecast
    batch_rows: int
    timings: Timings


@dataclass(order=True)
class Job:
    """One waiting request, ordered by deadline; times are `time.monotonic()` seconds."""

    deadline: float
    order: int
    model: LoadedModel = field(compare=False)
    item: ForecastInput = field(compare=False)
    future: asyncio.Future[Computed] = field(compare=False)
    enqueued: float = field(compare=False, default_factory=time.monotonic)

    @property
    def wanted(self) -> bool:
        """Somebody still waits for it and it can still be in time."""
        return not self.future.done() and time.monotonic() < self.deadline


class Batcher:
    """One queue per bucket, filled by the event loop and emptied by the engine's thread."""

    def __init__(self, max_queue: int, max_rows: int) -> None:
        self.max_queue = max_queue
        self.max_rows = max_rows
        self._buckets: dict[Hashable, list[Job]] = {}
        self._orders = itertools.count()
        self._changed = threading.Condition()
        self._closed = False

    @property
    def depth(self) -> int:
        """Requests waiting."""
        with self._changed:
            return self._depth()

    def put(self, model: LoadedModel, item: ForecastInput, deadline: float, batch_seconds: float) -> Job:
        """Queue a request; QueueFull if there is no room, EngineStopped once the batcher is closed.

        `batch_seconds` is what a batch takes these days.
        """
        bucket = (model.name, model.version, model.forecaster.bucket(item))
        future = asyncio.get_running_loop().create_future()
        with self._changed:
            if self._closed:
                raise EngineStopped
            if self._depth() >= self.max_queue:
                self._forget_unwanted()
            if (depth := self._depth()) >= self.max_queue:
                raise QueueFull(max(1, round(batch_seconds * depth / self.max_rows)))
            job = Job(deadline, next(self._orders), model, item, future)
            heapq.heappush(self._buckets.setdefault(bucket, []), job)
            self._changed.notify()
        return job

    def take(self) -> list[Job] | None:
        """Block until requests wait; then up to `max_rows` of the bucket with the oldest deadline.

        None once the batcher is closed.
        """
        with self._changed:
            while not self._closed:
                self._forget_unwanted()
                if self._buckets:
                    return self._take_oldest()
                self._changed.wait()
        return None

    def close(self) -> list[Job]:
        """Wake the engine for the last time and hand back whatever waits."""
        with self._changed:
            self._closed = True
            left = [job for waiting in self._buckets.values() for job in waiting]
            self._buckets.clear()
            self._changed.notify_all()
        return left

    def _take_oldest(self) -> list[Job]:
        bucket = min(self._buckets, key=lambda key: self._buckets[key][0])
        waiting = self._buckets[bucket]
        first = waiting[0]
        rows = min(self.max_rows, first.model.forecaster.max_rows(first.item), len(waiting))
        jobs = [heapq.heappop(waiting) for _ in range(rows)]
        if not waiting:
            del self._buckets[bucket]
        return jobs

    def _forget_unwanted(self) -> None:
        """Drop requests that were cancelled or are late: their rows are never computed."""
        for bucket, waiting in list(self._buckets.items()):
            wanted = [job for job in waiting if job.wanted]
            if len(wanted) == len(waiting):
                continue
            if wanted:
                heapq.heapify(wanted)
                self._buckets[bucket] = wanted
            else:
                del self._buckets[bucket]

    def _depth(self) -> int:
        return sum(len(waiting) for waiting in self._buckets.values())

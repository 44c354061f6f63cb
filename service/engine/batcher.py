"""Requests waiting for the engine. A batch is formed when the engine asks for one, never by a timer."""

import asyncio
import math
import threading
import time
from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from models.forecaster import Forecast, ForecastInput, Row, pad_rows
from service.engine.costs import Costs
from service.engine.registry import LoadedModel


class Overloaded(RuntimeError):
    """Too much waits already; `retry_after` is the predicted time until it has drained, in whole seconds."""

    def __init__(self, detail: str, drain_seconds: float) -> None:
        super().__init__(detail)
        self.retry_after = max(1, math.ceil(drain_seconds))


class OutOfMemory(RuntimeError):
    """Memory ran out under a batch, and under a smaller one that was tried instead."""

    def __init__(self) -> None:
        super().__init__("there is not enough memory for this forecast now")


class DeadlineExceeded(RuntimeError):
    """The request's time is up before its forecast is ready, or would be however little waited before it."""

    def __init__(self, detail: str = "the deadline passed before the forecast was ready") -> None:
        super().__init__(detail)


class EngineStopped(RuntimeError):
    """The engine takes no requests: it has not started, is stuck, or is shutting down."""

    def __init__(self) -> None:
        super().__init__("the engine takes no requests")


@dataclass(frozen=True)
class Timings:
    """Milliseconds that one request spent in each stage of the engine."""

    queue: float = 0.0
    batch: float = 0.0
    prepare: float = 0.0
    run: float = 0.0
    finish: float = 0.0


class Retry(NamedTuple):
    """Why and how a row whose batch failed is computed once more: in a batch of rows that are, no larger than this."""

    reason: str  # of RELEASES
    rows: int


@dataclass(frozen=True)
class MemberForecast:
    """What a member of an ensemble forecast, and of what."""

    model: LoadedModel
    item: ForecastInput
    forecast: Forecast


@dataclass(frozen=True)
class Computed:
    """A forecast, with the size of the batch it was computed in."""

    forecast: Forecast
    batch_rows: int
    timings: Timings
    degraded: tuple[str, ...] = ()
    members: tuple[MemberForecast, ...] = ()  # of an ensemble


@dataclass(eq=False)
class Job:
    """One computation and how long somebody waits for it; times are `time.monotonic()` seconds."""

    model: LoadedModel
    item: ForecastInput
    future: asyncio.Future[Computed]
    deadline: float  # of the waiter whose time is up first: the order in which batches are formed
    until: float  # the deadline of the most patient waiter
    bucket: Hashable = None
    waiters: int = 0
    encoded: Future[Row] | None = None
    retry: Retry | None = None
    enqueued: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.bucket = (self.model.batched_by, self.model.forecaster.bucket(self.item))

    @property
    def wanted(self) -> bool:
        """Somebody still waits for it and it can still be in time."""
        return not self.future.done() and time.monotonic() < self.until

    def row(self) -> Row:
        """The encoded item: encoded here unless that has begun elsewhere."""
        if self.encoded is None or self.encoded.cancel():
            return self.model.forecaster.encode(self.item)
        return self.encoded.result()


@dataclass(frozen=True)
class Bound:
    """The jobs of one batch, and why they are no more and no others."""

    jobs: list[Job]
    reason: str


class Batcher:
    """One queue per bucket, filled by the event loop and emptied by the engine's thread."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._costs = Costs()
        self._waiting: dict[Hashable, list[Job]] = {}
        self._running: Job | None = None  # the first of its batch
        self._running_rows = 0
        self._running_since = 0.0
        self._changed = threading.Condition()
        self._closed = False

    @property
    def depth(self) -> int:
        """Jobs waiting."""
        with self._changed:
            return sum(len(waiting) for waiting in self._waiting.values())

    @property
    def busy(self) -> bool:
        """The engine has taken a batch and has not come back yet."""
        return self._running is not None

    @property
    def waiting_since(self) -> float | None:
        """When the oldest job came that nothing keeps the engine from taking; None if there is none."""
        with self._changed:
            if self._running is not None:
                return None
            return min((job.enqueued for waiting in self._waiting.values() for job in waiting), default=None)

    def put(self, job: Job) -> None:
        """Queue a job; Overloaded or DeadlineExceeded if it cannot be in time, EngineStopped once closed."""
        with self._changed:
            if self._closed:
                raise EngineStopped
            self._forget_unwanted()
            self._admit(job)
            self._waiting.setdefault(job.bucket, []).append(job)
            self._changed.notify()

    def put_back(self, jobs: list[Job], retry: Retry) -> bool:
        """Queue `jobs` again, for batches of their own; False once closed."""
        with self._changed:
            if self._closed:
                return False
            for job in jobs:
                job.retry = retry
                self._waiting.setdefault(job.bucket, []).append(job)
            self._changed.notify()
            return True

    def join(self, job: Job, deadline: float) -> bool:
        """Wait for `job` too, in time for another deadline; False if it is being given up."""
        with self._changed:
            if not job.wanted:
                return False
            job.deadline, job.until = min(job.deadline, deadline), max(job.until, deadline)
            return True

    def take(self) -> Bound | None:
        """Block until jobs wait; then those of the bucket with the oldest deadline. None once closed."""
        idle = False
        with self._changed:
            self._running = None
            while not self._closed:
                self._forget_unwanted()
                if self._waiting:
                    bound = self._bind(idle)
                    self._running, self._running_rows = bound.jobs[0], len(bound.jobs)
                    self._running_since = time.monotonic()
                    return bound
                idle = True
                self._changed.wait()
        return None

    def record(self, bucket: Hashable, rows: int, seconds: float, *, ended: bool = True) -> None:
        """Remember what a batch took, or how long it ran before it was given up; predictions rest on it."""
        with self._changed:
            self._costs.record(bucket, rows, seconds, ended=ended)

    def drain_seconds(self) -> float:
        """Predicted time until everything that waits and runs now is done."""
        with self._changed:
            return self._left_to_run() + sum(
                self._seconds_of(bucket, len(waiting)) for bucket, waiting in self._waiting.items()
            )

    def has_full_batch(self) -> bool:
        """As many jobs wait in one bucket as fit in a batch."""
        with self._changed:
            return any(len(waiting) >= self._rows_of(waiting[0]) for waiting in self._waiting.values())

    def close(self) -> list[Job]:
        """Wake the engine for the last time and hand back whatever waits."""
        with self._changed:
            self._closed = True
            left = [job for waiting in self._waiting.values() for job in waiting]
            self._waiting.clear()
            self._changed.notify_all()
        return left

    def _bind(self, idle: bool) -> Bound:
        bucket = min(self._waiting, key=lambda key: min(job.deadline for job in self._waiting[key]))
        several = len(self._waiting) > 1
        waiting = sorted(self._waiting.pop(bucket), key=lambda job: job.deadline)
        retry = waiting[0].retry
        rows = retry.rows if retry else self._rows_of(waiting[0])
        jobs = [job for job in waiting if job.retry == retry][:rows]
        if left := [job for job in waiting if job not in jobs]:
            self._waiting[bucket] = left
        if retry:
            return Bound(jobs, retry.reason)
        if len(jobs) == rows:
            return Bound(jobs, "full")
        return Bound(jobs, "idle" if idle else "oldest_deadline" if several else "freed")

    def _rows_of(self, job: Job) -> int:
        return min(self._max_rows, job.model.forecaster.max_rows(job.item))

    def _admit(self, job: Job) -> None:
        """Refuse what is predicted to be late: at once, while the caller can still ask elsewhere."""
        left = job.deadline - time.monotonic()
        own = self._costs.predict(job.bucket, pad_rows(1))
        if own > left:
            raise DeadlineExceeded(f"the forecast takes about {1e3 * own:.0f} ms, more than the deadline leaves")
        before = self._left_to_run()
        for bucket, waiting in self._waiting.items():
            earlier = sum(other.deadline <= job.deadline for other in waiting)
            if bucket == job.bucket:
                earlier -= earlier % self._rows_of(job)  # the rest share its batch
            before += self._seconds_of(bucket, earlier)
        if before + own > left:
            raise Overloaded(f"what waits takes about {1e3 * before:.0f} ms, more than the deadline leaves", before)

    def _seconds_of(self, bucket: Hashable, count: int) -> float:
        """Predicted time of `count` waiting jobs of a bucket."""
        rows = self._rows_of(self._waiting[bucket][0])
        batches, rest = divmod(count, rows)
        return batches * self._costs.predict(bucket, pad_rows(rows)) + self._costs.predict(
            bucket, pad_rows(rest) if rest else 0
        )

    def _left_to_run(self) -> float:
        if self._running is None:
            return 0.0
        predicted = self._costs.predict(self._running.bucket, pad_rows(self._running_rows))
        return max(0.0, predicted - (time.monotonic() - self._running_since))

    def _forget_unwanted(self) -> None:
        """Drop jobs that were cancelled or are late: their rows are never computed."""
        for bucket, waiting in list(self._waiting.items()):
            wanted = [job for job in waiting if job.wanted]
            if wanted:
                self._waiting[bucket] = wanted
            else:
                del self._waiting[bucket]

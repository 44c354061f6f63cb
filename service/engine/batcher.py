"""Requests waiting for the engine. A batch is formed when the engine asks for one, never by a timer."""

import asyncio
import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

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
    client: str | None = None  # whose turn it takes; None: nobody's in particular, such as the service's own
    asked: bytes | None = None  # as in its place
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


@dataclass(eq=False, frozen=True)
class Place:
    """In line, of a request that is no job yet: who comes after it counts it, though it is still being read."""

    deadline: float
    client: str | None
    asked: bytes | None = None  # how it names its model, unread


_Due = TypeVar("_Due", Job, Job | Place)


@dataclass(frozen=True)
class Bound:
    """The jobs of one batch, and why they are no more and no others."""

    jobs: list[Job]
    reason: str


class Batcher:
    """One queue per bucket, filled by the event loop and emptied by the engine's thread.

    Clients take turns, and of each the job with the earliest deadline comes first: start-time fair queueing (Goyal, Vin
    and Cheng, IEEE/ACM ToN 1997), counted in jobs. What is nobody's in particular waits for no turn: it goes by its
    deadline, behind everything that is due before it. So does everything where there is one client or none.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._costs = Costs()
        self._waiting: dict[Hashable, list[Job]] = {}
        self._coming: set[Place] = set()
        self._turn = 0  # of the first job that was taken last
        self._turns: dict[str, int] = {}  # of each client, its next one: it has had those before
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
            return min((job.enqueued for job in self._all()), default=None)

    def put(self, job: Job, place: Place | None = None) -> None:
        """Queue a job; Overloaded or DeadlineExceeded if it cannot be in time, EngineStopped once closed."""
        with self._changed:
            if self._closed:
                raise EngineStopped
            self._leave(place)
            self._forget_unwanted()
            self._admit(job)
            self._waiting.setdefault(job.bucket, []).append(job)
            self._changed.notify()

    def expect(self, place: Place) -> None:
        """Keep a place until `put` or `leave`; Overloaded if no job here that names its model so could be in time."""
        with self._changed:
            self._forget_unwanted()
            left = place.deadline - time.monotonic()
            here = [waiting[0] for waiting in self._waiting.values()] or ([self._running] if self._running else [])
            like = [job for job in here if job.asked == place.asked]
            waits = [self._wait(job, self._earlier(place, job.bucket)) for job in like]
            if waits and all(before + own > left for before, own in waits):
                raise _overloaded(min(before for before, _ in waits))
            self._coming.add(place)

    def leave(self, place: Place | None) -> None:
        """Give a place up; again, it changes nothing."""
        with self._changed:
            self._leave(place)

    def _leave(self, place: Place | None) -> None:
        if place:
            self._coming.discard(place)

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

    def join(self, job: Job, deadline: float, client: str | None = None) -> bool:
        """Wait for `job` too, in time for another deadline and in the shorter line; False if it is being given up."""
        with self._changed:
            if not job.wanted:
                return False
            job.deadline, job.until = min(job.deadline, deadline), max(job.until, deadline)
            if client is not None:
                lines = Counter(other.client for other in self._all())
                if job.client is None or lines[client] < lines[job.client]:
                    job.client = client
            return True

    def take(self) -> Bound | None:
        """Block until jobs wait; then those of the bucket of the first in turn. None once closed."""
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
                self._seconds_of(waiting[0], len(waiting)) for waiting in self._waiting.values()
            )

    def has_full_batch(self) -> bool:
        """As many jobs wait in one bucket as fit in a batch."""
        with self._changed:
            return any(len(waiting) >= self._rows_of(waiting[0]) for waiting in self._waiting.values())

    def close(self) -> list[Job]:
        """Wake the engine for the last time and hand back whatever waits."""
        with self._changed:
            self._closed = True
            left = list(self._all())
            self._waiting.clear()
            self._changed.notify_all()
        return left

    def _all(self) -> Iterable[Job]:
        return itertools.chain.from_iterable(self._waiting.values())

    def _in_turn(self, jobs: Iterable[_Due]) -> list[tuple[int, _Due]]:
        """The jobs in the order in which they are due, each with its turn."""
        turns: dict[str, int] = {}
        last = self._turn
        found = []
        for job in sorted(jobs, key=lambda job: job.deadline):
            turn = last
            if job.client is not None:
                turn = turns.get(job.client) or max(self._turn, self._turns.get(job.client, 0))
                turns[job.client] = turn + 1
                last = max(last, turn + 1)
            found.append((turn, job))
        return sorted(found, key=lambda each: each[0])  # stable: those of one turn by their deadline

    def _bind(self, idle: bool) -> Bound:
        ordered = self._in_turn(self._all())
        self._turn, first = ordered[0]
        several = len(self._waiting) > 1
        waiting = [job for _, job in ordered if job.bucket == first.bucket]
        del self._waiting[first.bucket]
        retry = first.retry
        rows = retry.rows if retry else self._rows_of(first)
        mates = [job for job in waiting if job.retry == retry]
        jobs = mates[:rows] if retry else self._in_time(mates, rows)
        if left := [job for job in waiting if job not in jobs]:
            self._waiting[first.bucket] = left
        self._take_turns(jobs)
        if retry:
            return Bound(jobs, retry.reason)
        if len(jobs) == rows:
            return Bound(jobs, "full")
        return Bound(jobs, "idle" if idle else "oldest_deadline" if several else "freed")

    def _in_time(self, waiting: list[Job], rows: int) -> list[Job]:
        """The largest batch that is predicted to be in time for all of its jobs, else the first of them.

        What would be late is left out: computed all the same, it would make those behind it late, and they others.
        """
        now, size = time.monotonic(), min(rows, len(waiting))
        while size:
            seconds = self._costs.predict(waiting[0].bucket, pad_rows(size))
            jobs = [job for job in waiting if now + seconds <= job.until][:size]
            if len(jobs) == size:
                return jobs
            size = len(jobs) or size // 2
        return waiting[:1]

    def _take_turns(self, jobs: Iterable[Job]) -> None:
        if not self._waiting:  # nobody had to wait for these
            self._turns.clear()
            return
        for job in jobs:
            if job.client is not None:
                self._turns[job.client] = max(self._turn, self._turns.get(job.client, 0)) + 1

    def _rows_of(self, job: Job) -> int:
        """Rows of a batch: so many that whoever comes while it runs can be in time with the next one."""
        rows = min(self._max_rows, job.model.forecaster.max_rows(job.item))
        while rows > 1 and self._costs.predict(job.bucket, pad_rows(rows)) > (job.deadline - job.enqueued) / 2:
            rows //= 2
        return rows

    def _admit(self, job: Job) -> None:
        """Refuse what is predicted to be late: at once, while the caller can still ask elsewhere."""
        left = job.deadline - time.monotonic()
        alone = self._costs.predict(job.bucket, pad_rows(1))
        if alone > left:
            raise DeadlineExceeded(f"the forecast takes about {1e3 * alone:.0f} ms, more than the deadline leaves")
        before, own = self._wait(job, self._earlier(job, job.bucket))
        if before + own > left:
            raise _overloaded(before)

    def _earlier(self, comer: Job | Place, bucket: Hashable) -> Counter[Hashable]:
        """How many of each bucket come before what does not wait yet; those being read are taken for its own."""
        ordered = (due for _, due in self._in_turn([*self._all(), *self._coming, comer]))
        before = itertools.takewhile(lambda due: due is not comer, ordered)
        return Counter(due.bucket if isinstance(due, Job) else bucket for due in before)

    def _wait(self, job: Job, earlier: Counter[Hashable]) -> tuple[float, float]:
        """Predicted seconds until the batch of a job begins before which so many come, and of that batch."""
        rows = self._rows_of(job)
        batches, mates = divmod(earlier[job.bucket], rows)
        before = self._left_to_run() + self._seconds_of(job, batches * rows)
        for bucket, count in earlier.items():
            if bucket != job.bucket:
                before += self._seconds_of(self._waiting[bucket][0], count)
        # Where a whole batch waits already, this one will be whole too.
        return before, self._costs.predict(job.bucket, pad_rows(rows if batches else mates + 1))

    def _seconds_of(self, job: Job, count: int) -> float:
        """Predicted time of `count` jobs like this one."""
        rows = self._rows_of(job)
        batches, rest = divmod(count, rows)
        whole = batches * self._costs.predict(job.bucket, pad_rows(rows))
        return whole + self._costs.predict(job.bucket, pad_rows(rest) if rest else 0)

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


def _overloaded(seconds: float) -> Overloaded:
    return Overloaded(f"what waits takes about {1e3 * seconds:.0f} ms, more than the deadline leaves", seconds)

"""The engine: one thread binds and runs batches, two others encode ahead of it and finish behind it."""

import asyncio
import contextlib
import itertools
import logging
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from models.ensemble import EnsembleForecaster
from models.forecaster import Abandoned, Batch, Forecast, ForecastInput, InvalidModelOutput, Raw, pad_rows
from models.layers import ran_out_of_memory
from models.probes import probe, usual_contexts
from service.engine.batcher import (
    Batcher,
    Bound,
    Computed,
    DeadlineExceeded,
    EngineStopped,
    Job,
    MemberForecast,
    OutOfMemory,
    Overloaded,
    Place,
    Retry,
    Timings,
)
from service.engine.cache import forecast_key
from service.engine.registry import LoadedModel
from service.metrics import Metrics

_log = logging.getLogger(__name__)

Outcome = Computed | Exception


@dataclass(eq=False)
class _Running:
    """One batch on its way, with the instants between its stages."""

    bound: Bound
    marks: list[float] = field(default_factory=lambda: [time.monotonic()])
    stepped: float = field(default_factory=time.monotonic)  # when it last showed that it goes on

    @property
    def jobs(self) -> list[Job]:
        return self.bound.jobs

    @property
    def model(self) -> LoadedModel:
        return self.jobs[0].model

    def wanted(self) -> bool:
        self.stepped = time.monotonic()
        return any(job.wanted for job in self.jobs)

    def mark(self) -> None:
        self.stepped = time.monotonic()
        self.marks.append(self.stepped)

    def seconds(self) -> float:
        """How long ago the batch was bound."""
        return time.monotonic() - self.marks[0]


class Engine:
    """Late binding: a batch is whatever waits in one bucket at the moment the thread is free.

    A lone request passes through one thread. While a batch runs, requests are encoded as they come, and while
    another whole batch waits, it is finished beside that one's run.
    """

    def __init__(self, batcher: Batcher, metrics: Metrics, watchdog_seconds: float) -> None:
        self._batcher = batcher
        self._metrics = metrics
        self._watchdog_seconds = watchdog_seconds
        self._flights: dict[bytes, Job] = {}  # by what is computed
        self._running: set[_Running] = set()
        self._thread: threading.Thread | None = None
        self._encoder = ThreadPoolExecutor(1, "engine-encode", torch.get_num_threads)
        self._finisher = ThreadPoolExecutor(1, "engine-finish", torch.get_num_threads)
        self._finishing: Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        metrics.queue_depth.set_function(lambda: batcher.depth)

    @property
    def alive(self) -> bool:
        """The thread runs, and no stage or step of a batch has taken longer than any does."""
        if self._thread is None or not self._thread.is_alive():
            return False
        begun = [running.stepped for running in list(self._running)]
        if not begun and (waiting := self._batcher.waiting_since) is not None:
            begun = [waiting]
        return not begun or time.monotonic() - min(begun) < self._watchdog_seconds

    def start(self) -> None:
        """Start the thread; its answers come back to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Refuse whatever still waits, finish the batches that run, end the threads."""
        for job in self._batcher.close():
            _resolve(job, EngineStopped())
        if self._thread:
            await asyncio.to_thread(self._thread.join)
            self._thread = None
        for pool in (self._encoder, self._finisher):
            await asyncio.to_thread(pool.shutdown)

    async def submit(
        self,
        model: LoadedModel,
        item: ForecastInput,
        deadline: float,
        key: bytes | None = None,
        place: Place | None = None,
    ) -> tuple[Computed, bool]:
        """The forecast of `item`, and whether it is shared with a request that came earlier.

        Requests with equal keys share one computation, which goes on while any of them waits. `deadline` is in
        `time.monotonic()` seconds; `place` says whose turn it takes. Raises Overloaded, DeadlineExceeded,
        EngineStopped, or whatever the model raised for the batch.
        """
        if model.members:
            return await self._blend(model, item, deadline, place, shares=key is not None)
        while True:
            if not self.alive:
                raise EngineStopped
            if time.monotonic() >= deadline:
                raise DeadlineExceeded
            flight = self._flights.get(key) if key else None
            shared = flight is not None and self._batcher.join(flight, deadline, place.client if place else None)
            job = flight if flight and shared else self._enqueue(model, item, deadline, key, place)
            with contextlib.suppress(Abandoned):  # given up in the moment in which this request joined
                return await _wait(job, deadline), shared

    def expect(self, place: Place) -> None:
        """Keep the place of a request that is to be read; Overloaded if one like it would be refused."""
        try:
            self._batcher.expect(place)
        except Overloaded:
            self._metrics.refusals.labels("queue").inc()
            raise

    def leave(self, place: Place | None) -> None:
        """The request with this place was answered, whether or not a job came of it."""
        self._batcher.leave(place)

    async def _blend(
        self, model: LoadedModel, item: ForecastInput, deadline: float, place: Place | None, *, shares: bool
    ) -> tuple[Computed, bool]:
        """Each member's forecast from that member's own queue, combined; the first that fails fails all."""
        ensemble = model.forecaster
        assert isinstance(ensemble, EnsembleForecaster)
        asked = [(each, member.asked(item)) for each, member in zip(model.members, ensemble.members, strict=True)]
        tasks = [
            asyncio.create_task(self.submit(*pair, deadline, forecast_key(*pair) if shares else None, place))
            for pair in asked
        ]
        try:
            found = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # those beside one that failed are given up
        answers = [computed for computed, _ in found]
        last = max(answers, key=lambda each: sum(vars(each.timings).values()))  # they run one after the other
        blend = ensemble.combined([each.forecast for each in answers])
        members = tuple(MemberForecast(*pair, each.forecast) for pair, each in zip(asked, answers, strict=True))
        degraded = tuple({reason for each in answers for reason in each.degraded})
        return Computed(blend, last.batch_rows, last.timings, degraded, members), all(shared for _, shared in found)

    async def rehearse(self, model: LoadedModel, seconds: float) -> None:
        """Compute a usual request of every bucket, each within so many seconds; raises what a caller would get."""
        for context in usual_contexts(model.forecaster):
            item = probe(model.forecaster, 0, context=context)
            await self.submit(model, item, time.monotonic() + seconds)

    def _enqueue(
        self, model: LoadedModel, item: ForecastInput, deadline: float, key: bytes | None, place: Place | None
    ) -> Job:
        job = Job(model, item, asyncio.get_running_loop().create_future(), deadline, deadline)
        if place:
            job.client, job.asked = place.client, place.asked
        try:
            self._batcher.put(job, place)
        except (Overloaded, DeadlineExceeded) as refusal:
            self._metrics.refusals.labels("queue" if isinstance(refusal, Overloaded) else "deadline").inc()
            raise
        if self._batcher.busy:
            job.encoded = self._encoder.submit(model.forecaster.encode, item)
        if key:
            self._flights[key] = job
            job.future.add_done_callback(lambda _: self._land(key, job))
        return job

    def _land(self, key: bytes, job: Job) -> None:
        if self._flights.get(key) is job:
            del self._flights[key]

    def _work(self) -> None:
        torch.get_num_threads()  # a thread has OpenMP's own number of threads until it asks for torch's
        while self._computed_next():
            pass

    def _computed_next(self) -> bool:
        """Wait for a batch and compute it, False once closed; while the next is awaited, nothing holds its model."""
        bound = self._batcher.take()
        if bound is None:
            return False
        running = _Running(bound)
        self._running.add(running)
        self._compute(running)
        self._metrics.busy_seconds.labels(running.model.name).inc(running.seconds())
        return True

    def _compute(self, running: _Running) -> None:
        """Run a batch, and finish it too unless a whole batch waits for this thread.

        Finished beside the next run, a smaller queue would only be run before the callers of this batch are back.
        """
        try:
            batch, raw = self._run(running)
        except Exception as error:  # noqa: BLE001 - it fails this batch and must not end the thread
            self._fail(running, error)
            return
        if not self._batcher.has_full_batch():
            self._finish(running, batch, raw)
            return
        if self._finishing:
            self._finishing.result()
        self._finishing = self._finisher.submit(self._finish, running, batch, raw)

    def _run(self, running: _Running) -> tuple[Batch, Raw]:
        rows = [job.row() for job in running.jobs]
        running.mark()
        batch = running.model.forecaster.prepare([job.item for job in running.jobs], rows)
        running.mark()
        raw = running.model.forecaster.run(batch, running.wanted)
        running.mark()
        return batch, raw

    def _finish(self, running: _Running, batch: Batch, raw: Raw) -> None:
        try:
            forecasts = running.model.forecaster.finish(raw, batch)
            running.mark()
            self._note(running, batch)
            self._deliver(
                running, [self._computed(*pair, running) for pair in zip(running.jobs, forecasts, strict=True)]
            )
        except Exception as error:  # noqa: BLE001 - it fails this batch and must not end the thread
            self._fail(running, error)

    def _fail(self, running: _Running, error: Exception) -> None:
        """Every row fails with the error, unless it has another chance, with the same bits: alone, where one of several
        gave no forecast; once in a smaller batch, where memory ran out.
        """
        jobs, name = running.jobs, running.model.name
        if isinstance(error, Abandoned):
            self._metrics.batches_abandoned.labels(name).inc()
            self._batcher.record(jobs[0].bucket, pad_rows(len(jobs)), running.seconds(), ended=False)
            self._deliver(running, [error] * len(jobs))
            return
        reason = _reason(error)
        self._metrics.inference_failures.labels(name, reason).inc()
        trace = error if reason == "error" else None  # the others say all there is
        _log.error("a batch of %d for %s failed: %r", len(jobs), name, error, exc_info=trace)
        if reason == "out_of_memory":
            _let_go(error)
            error = OutOfMemory()
        if not self._put_back(running, reason):
            self._deliver(running, [error] * len(jobs))

    def _put_back(self, running: _Running, reason: str) -> bool:
        """Whether the rows of a batch that failed are tried once more."""
        jobs = running.jobs
        if reason == "invalid_output" and len(jobs) > 1:
            retry = Retry("alone", 1)
        elif reason == "out_of_memory" and not jobs[0].retry:
            retry = Retry("memory", (len(jobs) + 1) // 2)
        else:
            return False
        self._running.discard(running)
        return self._batcher.put_back(jobs, retry)

    def _note(self, running: _Running, batch: Batch) -> None:
        name, jobs = running.model.name, running.jobs
        self._batcher.record(jobs[0].bucket, batch.rows, running.seconds())
        self._metrics.batch_rows.labels(name).observe(len(jobs))
        self._metrics.batches_released.labels(name, running.bound.reason).inc()
        for each, asked in Counter(job.model.name for job in jobs).items():  # adapters of one base may have other names
            self._metrics.computed_rows.labels(each, "asked").inc(asked)
        self._metrics.computed_rows.labels(name, "padding").inc(batch.rows - len(jobs))

    def _computed(self, job: Job, forecast: Forecast, running: _Running) -> Computed:
        """The forecast with its stage times, which also go to the metrics."""
        seconds = [end - begin for begin, end in itertools.pairwise([job.enqueued, *running.marks])]
        for stage, value in zip(("queue", "batch", "prepare", "run", "finish"), seconds, strict=True):
            self._metrics.stage_seconds.labels(job.model.name, stage).observe(value)
        degraded = ("memory",) if job.retry and job.retry.reason == "memory" else ()
        return Computed(forecast, len(running.jobs), Timings(*(1e3 * value for value in seconds)), degraded)

    def _deliver(self, running: _Running, outcomes: list[Outcome]) -> None:
        self._running.discard(running)
        assert self._loop is not None
        self._loop.call_soon_threadsafe(_resolve_all, running.jobs, outcomes)


def _reason(error: Exception) -> str:
    """Of FAILURES."""
    if isinstance(error, InvalidModelOutput):
        return "invalid_output"
    return "out_of_memory" if ran_out_of_memory(error) else "error"


def _let_go(error: Exception) -> None:
    """Free what the batch held that ended with `error`, which would keep it through its frames."""
    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


async def _wait(job: Job, deadline: float) -> Computed:
    """What becomes of the job; without a last waiter it is given up."""
    job.waiters += 1
    try:
        async with asyncio.timeout(deadline - time.monotonic()) as limit:
            return await asyncio.shield(job.future)
    except TimeoutError:
        if limit.expired():
            raise DeadlineExceeded from None
        raise
    finally:
        job.waiters -= 1
        if not job.waiters:
            job.future.cancel()


def _resolve_all(jobs: list[Job], outcomes: list[Outcome]) -> None:
    for job, outcome in zip(jobs, outcomes, strict=True):
        _resolve(job, outcome)


def _resolve(job: Job, outcome: Outcome) -> None:
    if job.future.done():  # cancelled or late while it was computed
        return
    if isinstance(outcome, Exception):
        job.future.set_exception(outcome)
    else:
        job.future.set_result(outcome)

"""The engine: one thread that turns whatever waits into forecasts, batch by batch."""

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Sequence
from typing import Final

from models.forecaster import Forecast, ForecastInput, InvalidModelOutput
from service.engine.batcher import Batcher, Computed, EngineStopped, Job, Timings
from service.engine.registry import LoadedModel
from service.metrics import Metrics

_log = logging.getLogger(__name__)

_SMOOTHING: Final = 0.2  # weight of the newest batch in the running mean of batch times


class DeadlineExceeded(RuntimeError):
    """The request's time was up before its forecast was ready."""

    def __init__(self) -> None:
        super().__init__("the deadline passed before the forecast was ready")


class Engine:
    """Late binding: a batch is whatever waits in one bucket at the moment the thread is free."""

    def __init__(self, batcher: Batcher, metrics: Metrics) -> None:
        self._batcher = batcher
        self._metrics = metrics
        self._batch_seconds = 0.1
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        metrics.queue_capacity.set(batcher.max_queue)
        metrics.queue_depth.set_function(lambda: batcher.depth)

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread; its answers come back to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Refuse whatever still waits, finish the batch that runs, end the thread."""
        for job in self._batcher.close():
            _resolve(job, EngineStopped())
        if self._thread:
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    async def submit(self, model: LoadedModel, item: ForecastInput, deadline: float) -> Computed:
        """The forecast of `item`; cancelling the caller takes its row out of the queue.

        `deadline` is in `time.monotonic()` seconds. Raises QueueFull, DeadlineExceeded, EngineStopped, or
        whatever the model raised for the batch.
        """
        if not self.alive:
            raise EngineStopped
        if time.monotonic() >= deadline:
            raise DeadlineExceeded
        job = self._batcher.put(model, item, deadline, self._batch_seconds)
        try:
            async with asyncio.timeout(deadline - time.monotonic()) as limit:
                return await job.future
        except TimeoutError:
            if limit.expired():
                raise DeadlineExceeded from None
            raise

    def _work(self) -> None:
        while (jobs := self._batcher.take()) is not None:
            outcomes = self._outcomes(jobs)
            assert self._loop is not None
            self._loop.call_soon_threadsafe(_deliver, jobs, outcomes)

    def _outcomes(self, jobs: list[Job]) -> Sequence[Computed | Exception]:
        """What became of each row; rows beside one without a forecast are computed alone, to the same bits."""
        failure: Exception
        try:
            return self._compute(jobs)
        except InvalidModelOutput as error:
            _log.error("a batch of %d for %s: %s", len(jobs), jobs[0].model.name, error)
            if len(jobs) > 1:
                return [self._outcomes([job])[0] if job.wanted else DeadlineExceeded() for job in jobs]
            failure = error
        except Exception as error:  # noqa: BLE001 - it fails this batch and must not end the thread
            _log.exception("a batch of %d for %s failed", len(jobs), jobs[0].model.name)
            failure = error
        return [failure] * len(jobs)

    def _compute(self, jobs: list[Job]) -> list[Computed]:
        taken = time.monotonic()
        model = jobs[0].model
        items = [job.item for job in jobs]
        begun = time.monotonic()
        batch = model.forecaster.prepare(items)
        prepared = time.monotonic()
        raw = model.forecaster.run(batch)
        ran = time.monotonic()
        forecasts = model.forecaster.finish(raw, batch)
        finished = time.monotonic()
        self._batch_seconds += _SMOOTHING * (finished - taken - self._batch_seconds)
        self._metrics.batch_rows.labels(model.name).observe(len(jobs))
        marks = (taken, begun, prepared, ran, finished)
        return [self._computed(job, forecast, len(jobs), marks) for job, forecast in zip(jobs, forecasts, strict=True)]

    def _computed(self, job: Job, forecast: Forecast, rows: int, marks: tuple[float, ...]) -> Computed:
        """The forecast with its stage times, which also go to the metrics."""
        marks = (job.enqueued, *marks)
        seconds = [end - begin for begin, end in itertools.pairwise(marks)]
        for stage, value in zip(("queue", "batch", "prepare", "run", "finish"), seconds, strict=True):
            self._metrics.stage_seconds.labels(job.model.name, stage).observe(value)
        return Computed(forecast, rows, Timings(*(1e3 * value for value in seconds)))


def _deliver(jobs: list[Job], outcomes: Sequence[Computed | Exception]) -> None:
    for job, outcome in zip(jobs, outcomes, strict=True):
        _resolve(job, outcome)


def _resolve(job: Job, outcome: Computed | Exception) -> None:
    if job.future.done():  # cancelled or late while it was computed
        return
    if isinstance(outcome, Exception):
        job.future.set_exception(outcome)
    else:
        job.future.set_result(outcome)

"""Every Prometheus series of the service, in one registry that is handed in.

None here carries a symbol, which a caller may invent: those that do are the evaluator's (service/score/published.py).
"""

import asyncio
import contextlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import Final

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    Metric,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

STAGES: Final = ("queue", "batch", "prepare", "run", "finish", "total")
OUTCOMES: Final = ("ok", "degraded", "invalid", "overloaded", "timeout", "cancelled", "error")
RELEASES: Final = ("idle", "freed", "oldest_deadline", "full", "alone", "memory")
ROW_KINDS: Final = ("asked", "padding")
CACHE_RESULTS: Final = ("hit", "miss", "coalesced", "bypass")
REFUSALS: Final = ("full", "share", "queue", "deadline")
DENIALS: Final = (
    *("key_required", "malformed_key", "unknown_key", "expired_key"),
    *("scope_missing", "symbol_not_allowed", "quota_too_small", "quota_exceeded"),
)
FAILURES: Final = ("invalid_output", "out_of_memory", "error")
LOAD_FAILURES: Final = ("verification", "memory", "rehearsal", "error")
SWAPS: Final = ("first", "done", "failed")
SHADOWED: Final = ("noted", "dropped", "failed")
REDIS_OPS: Final = (
    *("history_put", "history_read", "history_calendars", "history_symbols", "history_revision"),
    *("history_restate", "history_split", "history_events", "cache_read", "cache_write"),
    *("ledger_register", "ledger_read", "ledger_scales", "ledger_steps", "ledger_sweep"),
    "quota_spend",
)
PUT_RESULTS: Final = ("new", "duplicate", "restated", "quarantined", "unclosed")
LEDGER_OUTCOMES: Final = ("new", "duplicate", "late", "foreign", "scored", "rescored", "expired", "unreadable")
WATCH_OUTCOMES: Final = ("refreshed", "unchanged", "failed")
UNKNOWN_MODEL: Final = "_unknown"

_HTTP_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 3, 5, 10, 30)
_STAGE_SECONDS: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
    *(0.2, 0.3, 0.5, 1, 2, 5, 10, 30),
)
_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
_REDIS_SECONDS: Final = (0.0002, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)
_LAG_SECONDS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1)
_LOOP_EVERY: Final = 0.5  # seconds from one look at the event loop to the next


class Snapshot(Collector):
    """Series made anew at every scrape, in a thread, so that those of what has gone are gone."""

    def __init__(self, make: Callable[[], Iterable[Metric]]) -> None:
        self._make = make

    def collect(self) -> Iterable[Metric]:
        return self._make()


class Metrics:
    """The series, by name; label values are bounded by the routes and the model store."""

    def __init__(self, registry: CollectorRegistry, *, role: str = "all", device: str = "cpu") -> None:
        # `_created` gauges double the number of series and nobody reads them
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry
        self._http(registry)
        self._engine(registry)
        self._cache(registry)
        self._state(registry)
        self._ledger(registry)
        self._watch(registry)
        self._evaluator(registry)
        self._process(registry, role, device)

    def _http(self, to: CollectorRegistry) -> None:
        self.http_requests = Counter(
            "candlecast_http_requests_total", "Answers given.", ["route", "method", "code"], registry=to
        )
        self.http_seconds = Histogram(
            "candlecast_http_request_duration_seconds",
            "From the request's head to the answer's last byte.",
            ["route", "method"],
            buckets=_HTTP_SECONDS,
            registry=to,
        )
        self.http_in_flight = Gauge(
            "candlecast_http_requests_in_flight", "Requests that are being answered, and open streams.", registry=to
        )
        self.forecasts = Counter(
            "candlecast_forecast_requests_total", "Forecast requests by outcome.", ["model", "outcome"], registry=to
        )
        self.denials = Counter(
            "candlecast_denials_total",
            "Requests denied for want of a key, a scope or a quota.",
            ["reason"],
            registry=to,
        )
        for reason in DENIALS:
            self.denials.labels(reason)
        self.rejections = Counter(
            "candlecast_candle_rejections_total", "Bodies refused for their candles.", ["reason"], registry=to
        )

    def _engine(self, to: CollectorRegistry) -> None:
        self.stage_seconds = Histogram(
            "candlecast_forecast_stage_duration_seconds",
            "Time of one forecast in each stage.",
            ["model", "stage"],
            buckets=_STAGE_SECONDS,
            registry=to,
        )
        self.batch_rows = Histogram(
            "candlecast_batch_size", "Requests computed together.", ["model"], buckets=_ROWS, registry=to
        )
        self.computed_rows = Counter(
            "candlecast_computed_rows_total", "Rows computed: asked for, or padding.", ["model", "kind"], registry=to
        )
        self.batches_released = Counter(
            "candlecast_batch_released_total",
            "Batches by why they were no larger: the engine was idle, had been freed and took what waited, chose this"
            " bucket for its deadline, had no room for more, or tried rows again after a failure, each alone, or fewer"
            " for want of memory.",
            ["model", "reason"],
            registry=to,
        )
        self.batches_abandoned = Counter(
            "candlecast_batches_abandoned_total", "Batches given up half-way: nobody waited.", ["model"], registry=to
        )
        self.busy_seconds = Counter(
            "candlecast_inference_busy_seconds_total",
            "Time in which the engine's thread could take no other batch.",
            ["model"],
            registry=to,
        )
        self.inference_failures = Counter(
            "candlecast_inference_failures_total",
            "Batches that failed: their output was no forecast, memory ran out, or anything else.",
            ["model", "reason"],
            registry=to,
        )
        self.refusals = Counter(
            "candlecast_refusals_total",
            "Requests refused early: no slot was free or their client held its share, the queue is too long for their"
            " deadline, or any would be.",
            ["reason"],
            registry=to,
        )
        for reason in REFUSALS:
            self.refusals.labels(reason)
        self.queue_depth = Gauge("candlecast_queue_depth", "Requests waiting for the engine.", registry=to)
        self.queue_capacity = Gauge("candlecast_queue_capacity", "Most requests inside at a time.", registry=to)
        self.model_ready = Gauge(
            "candlecast_model_ready", "1 while a version of the model is loaded.", ["model"], registry=to
        )
        self.model_load_seconds = Gauge(
            "candlecast_model_load_seconds", "Time the newest load of the model took.", ["model"], registry=to
        )
        self.model_load_failures = Counter(
            "candlecast_model_load_failures_total",
            "Versions that were not served: their bytes are not those of the manifest, they do not fit into memory,"
            " they did not forecast before their turn, or anything else.",
            ["model", "reason"],
            registry=to,
        )
        self.model_swaps = Counter(
            "candlecast_model_swaps_total",
            "Times another version was to answer for an alias: the first to do so, in another's place, or not at all.",
            ["model", "outcome"],
            registry=to,
        )
        self.model_memory = Gauge(
            "candlecast_model_memory_bytes",
            "Size of the versions in memory, and what it may be.",
            ["kind"],
            registry=to,
        )
        self.shadow_forecasts = Counter(
            "candlecast_shadow_forecasts_total",
            "Forecasts by a shadow version: noted in the ledger, dropped since callers come first, or failed.",
            ["model", "outcome"],
            registry=to,
        )

    def _cache(self, to: CollectorRegistry) -> None:
        self.cache_requests = Counter(
            "candlecast_cache_requests_total", "Forecasts by where they came from.", ["result"], registry=to
        )
        for result in CACHE_RESULTS:
            self.cache_requests.labels(result)
        self.cache_bytes = Gauge("candlecast_cache_bytes", "Size of the forecasts kept in memory.", registry=to)

    def _state(self, to: CollectorRegistry) -> None:
        self.degraded = Gauge("candlecast_degraded", "1 while something is out of order.", ["reason"], registry=to)
        for reason in ("redis_state", "store", "keys"):
            self.degraded.labels(reason).set(0)
        self.redis_seconds = Histogram(
            "candlecast_redis_command_duration_seconds",
            "Time of one operation on Redis, however many commands it takes.",
            ["op"],
            buckets=_REDIS_SECONDS,
            registry=to,
        )
        for op in REDIS_OPS:
            self.redis_seconds.labels(op)
        self.redis_errors = Counter(
            "candlecast_redis_errors_total", "Operations on Redis that failed.", ["op", "kind"], registry=to
        )
        self.candles_ingested = Counter(
            "candlecast_candles_ingested_total", "Candles put, by what they were.", ["result"], registry=to
        )
        for result in PUT_RESULTS:
            self.candles_ingested.labels(result)

    def _ledger(self, to: CollectorRegistry) -> None:
        self.ledger_steps = Counter(
            "candlecast_ledger_steps_total",
            "Steps of served forecasts: waiting for their candle, or too late for it, or scored; and what lay in the"
            " ledger and was no part of it.",
            ["outcome"],
            registry=to,
        )
        for outcome in LEDGER_OUTCOMES:
            self.ledger_steps.labels(outcome)
        self.ledger_waiting = Gauge(
            "candlecast_ledger_spool_entries", "Forecasts that wait until Redis takes them.", registry=to
        )
        self.ledger_dropped = Counter(
            "candlecast_ledger_spool_dropped_total",
            "Forecasts given up: too many waited, or Redis will never take it.",
            registry=to,
        )

    def _watch(self, to: CollectorRegistry) -> None:
        self.watch_refreshes = Counter(
            "candlecast_watch_refreshes_total",
            "Refreshes of watched forecasts: to another forecast, to the same one, or failed.",
            ["outcome"],
            registry=to,
        )
        for outcome in WATCH_OUTCOMES:
            self.watch_refreshes.labels(outcome)
        self.streams = Gauge("candlecast_streams_open", "Callers who stream forecasts.", registry=to)

    def _evaluator(self, to: CollectorRegistry) -> None:
        self.evaluator_success = Gauge(
            "candlecast_evaluator_last_success_timestamp_seconds",
            "When what candles have scored was last in the standings, as far as it had been announced; or the start.",
            registry=to,
        )
        self.evaluator_seconds = Gauge(
            "candlecast_evaluator_duration_seconds", "Time of the newest round over all series.", registry=to
        )
        self.evaluator_failures = Counter(
            "candlecast_evaluator_failures_total", "Rounds, or series in a round, that were not evaluated.", registry=to
        )

    def _process(self, to: CollectorRegistry, role: str, device: str) -> None:
        build = Info("candlecast_build", "What runs here.", registry=to)
        build.info(
            {
                "version": version("candlecast"),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "role": role,
                "device": device,
            }
        )
        self.loop_lag = Histogram(
            "candlecast_event_loop_lag_seconds",
            "How much later than due the event loop came to a task.",
            buckets=_LAG_SECONDS,
            registry=to,
        )
        self.loop_tasks = Gauge(
            "candlecast_event_loop_tasks", "Tasks of the event loop, done ones left out.", registry=to
        )
        to.register(Snapshot(lambda: _gpu_memory(device)))
        ProcessCollector(registry=to)
        GCCollector(registry=to)

    async def watch_loop(self) -> None:
        """Note, until cancelled, how late the event loop is, and how much it has to do."""
        while True:
            started = time.monotonic()
            await asyncio.sleep(_LOOP_EVERY)
            self.loop_lag.observe(max(0.0, time.monotonic() - started - _LOOP_EVERY))
            self.loop_tasks.set(len(asyncio.all_tasks()))

    def expect_model(self, model: str) -> None:
        """Start the model's series at zero, so that a rate exists before the first event."""
        for outcome in OUTCOMES:
            self.forecasts.labels(model, outcome)
        for stage in STAGES:
            self.stage_seconds.labels(model, stage)
        for reason in RELEASES:
            self.batches_released.labels(model, reason)
        for kind in ROW_KINDS:
            self.computed_rows.labels(model, kind)
        for reason in FAILURES:
            self.inference_failures.labels(model, reason)
        self.expect_load(model)
        for outcome in SHADOWED:
            self.shadow_forecasts.labels(model, outcome)
        self.batches_abandoned.labels(model)
        self.busy_seconds.labels(model)

    def expect_load(self, model: str) -> None:
        """The same of what can go wrong with its first load, or nobody would be told of a single failure."""
        for reason in LOAD_FAILURES:
            self.model_load_failures.labels(model, reason)
        for outcome in SWAPS:
            self.model_swaps.labels(model, outcome)

    @contextlib.contextmanager
    def redis_operation(self, op: str) -> Iterator[None]:
        """Time one operation on Redis and count it if it fails."""
        started = time.monotonic()
        try:
            yield
        except Exception as error:
            self.redis_errors.labels(op, type(error).__name__).inc()
            raise
        finally:
            self.redis_seconds.labels(op).observe(time.monotonic() - started)


def _gpu_memory(device: str) -> Iterator[Metric]:
    """No series on a CPU, or before the first model is on the GPU."""
    found = GaugeMetricFamily("candlecast_gpu_memory_bytes", "Memory of the models' GPU.", labels=("device", "kind"))
    if device.startswith("cuda") and torch.cuda.is_initialized():
        found.add_metric((device, "allocated"), torch.cuda.memory_allocated(device))
        found.add_metric((device, "reserved"), torch.cuda.memory_reserved(device))
        found.add_metric((device, "total"), torch.cuda.get_device_properties(device).total_memory)
    yield found

"""The application: parts made from settings, started and stopped by its lifespan."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse

from model_store.store import LoadedVersion
from service.api import errors
from service.api.quotas import Quotas
from service.api.refreshing import Refresher
from service.api.routes import (
    accuracy,
    candles,
    config,
    elsewhere,
    forecast,
    health,
    inference,
    latest,
    models,
    page,
    promotion,
)
from service.api.security import PUBLIC, Access, GuardedRoute, SafeAnswers, describe_keys, is_loopback
from service.api.tensors import HEADER_LENGTH
from service.api.watchlist import WatchList
from service.api.wire import BodyLimit, ClosedConnections, CountedAnswers, SymbolPaths
from service.engine.batcher import Batcher
from service.engine.cache import Cache
from service.engine.door import Door
from service.engine.engine import Engine
from service.engine.following import Follower
from service.engine.history import History
from service.engine.leases import announce
from service.engine.memory import default_budget
from service.engine.registry import Build, Registry
from service.engine.selection import Selection
from service.engine.series import load_calendar
from service.engine.shadows import Shadows
from service.keys import KEYS_FILE
from service.logs import KnownRequests
from service.metrics import Metrics
from service.score.evaluator import Evaluator
from service.score.ledger import Ledger
from service.score.published import Published
from service.score.register import Register
from service.score.weights import LiveWeights
from service.services import Clock, Services, store_of, wall_clock
from service.settings import Settings
from service.state import State
from service.traces import TracedRequests, begin_traces


class _Api(FastAPI):
    def __init__(self, **described: Any) -> None:
        # Spans are made in service/traces.py: FastAPI's own would be a second one of each request.
        super().__init__(telemetry={"tracing": False, "metrics": False, "logs": False}, **described)

    def openapi(self) -> dict[str, Any]:
        return describe_keys(errors.describe_problems(super().openapi()))


def shows_docs(settings: Settings) -> bool:
    """Whether /docs and /openapi.json are there."""
    return is_loopback(settings.host) if settings.docs is None else settings.docs


def create_app(settings: Settings, *, build: Build = LoadedVersion.build, now: Clock = wall_clock) -> FastAPI:
    """The API for callers; its parts are `app.state.services`. `build` makes a version's forecaster."""
    services = build_services(settings, build=build, now=now)
    app = _Api(
        title="Candlecast",
        summary="Candles in, forecasts out.",
        lifespan=_lifespan,
        openapi_url="/openapi.json" if shows_docs(settings) else None,
        redoc_url=None,
    )
    app.state.services = services
    # Included after the documentation's routes, they would be looked for twice in every request, and behind those.
    forecasting = (elsewhere,) if settings.role == "evaluator" else (forecast, latest)
    ours = (*forecasting, candles, accuracy, models, health, inference, page)
    app.router.routes[:0] = [route for module in ours for route in module.router.routes]
    errors.install(app)
    app.add_middleware(SymbolPaths)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(ClosedConnections, draining=lambda: services.draining)
    app.add_middleware(SafeAnswers)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT"],
            allow_headers=[
                *("Authorization", "Content-Type", "If-None-Match", "Last-Event-ID", "X-Request-ID"),
                *("Traceparent", "Tracestate"),
                HEADER_LENGTH,
            ],
            expose_headers=[
                *("ETag", "RateLimit", "RateLimit-Policy", "Retry-After", "Server-Timing", "X-Request-ID"),
                *("Candlecast-Degraded", "Candlecast-Stale", HEADER_LENGTH),
            ],
        )
    app.add_middleware(CountedAnswers, metrics=services.metrics)
    if services.traces:
        app.add_middleware(TracedRequests, tracer=services.traces.tracer)
    app.add_middleware(KnownRequests)
    return app


def create_admin_app(services: Services) -> FastAPI:
    """`/metrics` and what changes the service, for the admin port."""
    app = _Api(title="Candlecast admin", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.services = services
    app.router.route_class = GuardedRoute
    app.include_router(promotion.router)
    app.include_router(config.router)
    errors.install(app)
    app.add_middleware(BodyLimit, limit=services.settings.max_body_bytes)
    app.add_middleware(SafeAnswers)
    app.add_middleware(KnownRequests)

    @app.get("/metrics", response_class=PlainTextResponse, summary="Every metric", openapi_extra=PUBLIC)
    async def get_metrics(request: Request) -> Response:
        """Every series, in the text format or in OpenMetrics."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        text = await asyncio.to_thread(encode, services.metrics.registry)  # of a hundred symbols: a tenth of a second
        return Response(text, headers={"Content-Type": content_type})

    return app


def build_services(settings: Settings, *, build: Build = LoadedVersion.build, now: Clock = wall_clock) -> Services:
    """The parts, of which nothing runs yet."""
    metrics = Metrics(CollectorRegistry(), role=settings.role, device=settings.device)
    state = State(settings.redis_url, settings.home, metrics)
    store = store_of(settings)
    selection = Selection(store, settings.home, settings.device, settings.runtime)
    batcher = Batcher(settings.max_batch_rows)
    engine = Engine(batcher, metrics, settings.watchdog_seconds)
    registry = Registry(
        store,
        build,
        {"toto": settings.toto, "kronos": settings.kronos, "ensemble": settings.ensemble},
        settings.device,
        selection,
        partial(engine.rehearse, seconds=settings.request_timeout_ms / 1000),
        lambda: int(1e9 * settings.memory_budget_gb) if settings.memory_budget_gb else default_budget(settings.device),
        metrics,
    )
    history, ledger = History(state, metrics), Ledger(state, metrics)
    weights = LiveWeights(state, store, now, live=settings.ensemble_live)
    evaluator = Evaluator(ledger, history, store, now, metrics, weights.follow)
    if settings.role != "api":
        metrics.registry.register(Published(evaluator, settings.metric_symbols))
    return Services(
        settings=settings,
        metrics=metrics,
        state=state,
        access=Access(settings.auth, settings.host, settings.keys_file or settings.home / KEYS_FILE, now, metrics),
        quotas=Quotas(state, now, metrics),
        history=history,
        registry=registry,
        follower=Follower(registry, state, settings.store_poll_seconds),
        shadows=Shadows(metrics),
        door=Door(settings.max_queue + settings.max_batch_rows, batcher, metrics),
        cache=Cache(state, settings.cache_bytes, metrics),
        engine=engine,
        ledger=ledger,
        register=Register(ledger, metrics, now),
        weights=weights,
        evaluator=evaluator,
        watch=WatchList(() if settings.role == "evaluator" else settings.watch, settings.max_streams, metrics),
        traces=begin_traces(required=bool(settings.traces)) if settings.traced else None,
        now=now,
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    if services.settings.threads:
        torch.set_num_threads(services.settings.threads)
    await services.state.start()
    services.engine.start()
    services.evaluator.start()
    lag = asyncio.create_task(services.metrics.watch_loop(), name="event loop lag")
    leases = asyncio.create_task(announce(services.registry), name="leases")
    calendar = asyncio.create_task(load_calendar("XNYS"))  # takes a second; nobody waits for it here
    refresher = Refresher(services)
    refresher.start()
    services.follower.start()
    services.started = True
    try:
        yield
    finally:
        services.drain()
        lag.cancel()
        leases.cancel()
        await services.follower.stop()
        await refresher.stop()
        await services.shadows.stop()
        await services.engine.stop()
        await services.evaluator.stop()
        await services.register.stop()
        await services.cache.stop()
        await calendar
        await services.registry.stop()
        await services.state.stop()
        if services.traces:
            await services.traces.stop()

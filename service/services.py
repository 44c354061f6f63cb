"""What the routes work with: built once per app, reached through one dependency."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from model_store.store import ModelStore
from service.api.quotas import Quotas
from service.api.security import Access
from service.api.watchlist import WatchList
from service.engine.cache import Cache
from service.engine.door import Door
from service.engine.engine import Engine
from service.engine.following import Follower
from service.engine.history import History, PutCounts
from service.engine.registry import Registry
from service.engine.repeats import Repeats
from service.engine.shadows import Shadows
from service.metrics import Metrics
from service.score.evaluator import Evaluator
from service.score.ledger import Ledger
from service.score.register import Register
from service.score.weights import LiveWeights
from service.settings import Settings
from service.state import State
from service.traces import Traces

Clock = Callable[[], int]


def wall_clock() -> int:
    """Now, in UTC milliseconds."""
    return time.time_ns() // 1_000_000


def store_of(settings: Settings) -> ModelStore:
    """The model store that a service with these settings reads; a remote one through a mirror in its home."""
    return ModelStore(settings.store_root, settings.home / "store-cache", settings.store_public_key)


@dataclass
class Services:
    """The parts of a running service. `now` is the only clock that forecasts know."""

    settings: Settings
    metrics: Metrics
    state: State
    access: Access
    quotas: Quotas
    history: History
    registry: Registry
    follower: Follower
    shadows: Shadows
    door: Door
    cache: Cache
    engine: Engine
    ledger: Ledger
    register: Register
    weights: LiveWeights
    evaluator: Evaluator
    watch: WatchList
    traces: Traces | None = None
    repeats: Repeats = field(default_factory=Repeats)
    under_way: set[bytes] = field(default_factory=set)  # digests of requests that are being answered
    now: Clock = field(default=wall_clock)
    started: bool = False
    draining: bool = False

    def ingested(self, symbol: str, interval: str, counts: PutCounts) -> None:
        """Candles came: count them, and have what they change computed anew."""
        for result in ("new", "duplicate", "restated", "quarantined"):
            self.metrics.candles_ingested.labels(result).inc(getattr(counts, result))
        for outcome in ("scored", "rescored"):
            self.metrics.ledger_steps.labels(outcome).inc(getattr(counts, outcome))
        if counts.scored or counts.rescored:
            self.evaluator.touch(symbol, interval)
        if counts.new or counts.restated:
            self.watch.touch(symbol, interval)

    def drain(self) -> None:
        """Finish: probes say so, streams end, open requests are answered."""
        self.draining = True
        self.watch.drain()

    @property
    def degraded(self) -> tuple[str, ...]:
        """What callers must know about the state of the service, empty when all is well."""
        return ("ledger",) if self.register.waits or not self.state.up else ()


async def _of(request: Request) -> Services:  # async, or FastAPI takes a thread for it
    services: Services = request.app.state.services
    return services


Parts = Annotated[Services, Depends(_of)]

"""What the routes work with: built once per app, reached through one dependency."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from service.engine.cache import Cache
from service.engine.door import Door
from service.engine.engine import Engine
from service.engine.history import History
from service.engine.registry import Registry
from service.engine.repeats import Repeats
from service.metrics import Metrics
from service.settings import Settings
from service.state import State

Clock = Callable[[], int]


def wall_clock() -> int:
    """Now, in UTC milliseconds."""
    return time.time_ns() // 1_000_000


@dataclass
class Services:
    """The parts of a running service. `now` is the only clock that forecasts know."""

    settings: Settings
    metrics: Metrics
    state: State
    history: History
    registry: Registry
    door: Door
    cache: Cache
    engine: Engine
    repeats: Repeats = field(default_factory=Repeats)
    now: Clock = field(default=wall_clock)
    started: bool = False
    draining: bool = False

    @property
    def degraded(self) -> tuple[str, ...]:
        """What callers must know about the state of the service, empty when all is well."""
        return () if self.state.up else ("history",)


async def _of(request: Request) -> Services:  # async, or FastAPI takes a thread for it
    services: Services = request.app.state.services
    return services


Parts = Annotated[Services, Depends(_of)]

"""Probes. Redis is in none of them: a shared dependency would take every replica out at once."""

from typing import Any

from fastapi import APIRouter, Response

from service.api.errors import problem, problems
from service.api.schemas import Health
from service.api.security import PUBLIC, GuardedRoute
from service.services import Parts

router = APIRouter(route_class=GuardedRoute)


@router.get(
    "/livez", response_model=Health, responses=problems(503), summary="Is the process alive", openapi_extra=PUBLIC
)
async def livez(parts: Parts) -> Any:
    """503 once the engine's thread has ended or hangs: only a restart helps then."""
    return _health(parts.engine.alive or not parts.started, parts.degraded)


@router.get(
    "/readyz",
    response_model=Health,
    responses=problems(503),
    summary="Should callers be sent here",
    openapi_extra=PUBLIC,
)
async def readyz(parts: Parts) -> Any:
    """200 from start-up until SIGTERM, then 503 `draining` while the others still answer; without Redis too."""
    if parts.draining:
        return problem(503, "draining", "about to stop", headers={"Retry-After": "2"})
    return _health(parts.engine.alive and parts.started, parts.degraded)


@router.get(
    "/startupz", response_model=Health, responses=problems(503), summary="Has start-up finished", openapi_extra=PUBLIC
)
async def startupz(parts: Parts) -> Any:
    """200 once the service has started."""
    return _health(parts.started, parts.degraded)


def _health(well: bool, degraded: tuple[str, ...]) -> Response | Health:
    if not well:
        return problem(503, "not_ready", "not ready", headers={"Retry-After": "2"})
    return Health(status="ok", degraded=list(degraded))

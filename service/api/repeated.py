"""The straight line's short cut: a request whose bytes were answered before is answered without being read."""

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from fastapi import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from service.api.answers import Asked, Found, whole_answer
from service.api.forecasting import WITHOUT_WEIGHTS
from service.api.schemas import ForecastRequest, TimingsMs
from service.api.security import Caller, GuardedRoute, caller_of
from service.api.wire import StrictRequest, read_body
from service.engine.batcher import DeadlineExceeded, Overloaded, Place
from service.engine.cache import Kept
from service.engine.repeats import Facts, Repeat, StoredAs, request_digest
from service.metrics import UNKNOWN_MODEL
from service.services import Services
from service.traces import tell

_MODEL: Final = re.compile(rb'"model"\s*:\s*"([^"]{0,100})"')
_TIMEOUT: Final = re.compile(rb'"timeout_ms"\s*:\s*(\d{1,9})')


@dataclass(frozen=True)
class Admitted:
    """What is known of a request before it is read."""

    digest: bytes | None = None
    place: Place | None = None


class AdmittedRoute(GuardedRoute):
    """Takes a permit before it reads a body, and the short cut where there is one.

    FastAPI finds and describes the route and hands over there: its own way to an endpoint is long beside a repeated
    request.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **described: Any) -> None:
        super().__init__(path, endpoint, **described)
        self.app = self._serve

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        services: Services = scope["app"].state.services
        request = StrictRequest(scope, receive)
        with services.door.permit(caller_of(request).client):
            response = await self._answered(request, services)
        await response(scope, receive, send)

    async def _answered(self, request: StrictRequest, services: Services) -> Response:
        try:
            async with asyncio.timeout(services.settings.request_timeout_ms / 1000):
                sent = await request.body()  # a caller who never ends sending it must not keep the permit
        except TimeoutError:
            raise DeadlineExceeded from None
        except ClientDisconnect:
            return Response(status_code=499)  # never read
        return await self.respond(request, sent, services)

    async def respond(self, request: StrictRequest, sent: bytes, services: Services) -> Response:
        """The answer to a request whose body is `sent`."""
        symbol = request.path_params["symbol"]
        digest = request_digest(symbol, request.headers.get("content-type", ""), sent)
        if (recalled := await _recalled(digest, caller_of(request), services)) is not None:
            return recalled
        place = None
        if digest not in services.under_way:  # what is will share one computation
            place = _place(sent, caller_of(request), services)
        request.state.admitted = Admitted(digest, place)
        services.under_way.add(digest)
        try:
            body = await read_body(request, ForecastRequest)
            response: Response = await self.endpoint(symbol, services, request, body)
        finally:
            services.under_way.discard(digest)
            services.engine.leave(place)
        return response


def _place(sent: bytes, caller: Caller, parts: Services) -> Place:
    """In line; Overloaded where a request cannot be in time: known from a glance, before the work of reading it."""
    found, model = _TIMEOUT.search(sent), _MODEL.search(sent)
    milliseconds = int(found[1]) if found else parts.settings.request_timeout_ms
    place = Place(time.monotonic() + milliseconds / 1000, caller.client, model and model[1])
    try:
        parts.engine.expect(place)
    except Overloaded:
        parts.metrics.forecasts.labels(UNKNOWN_MODEL, "overloaded").inc()
        raise
    return place


async def _recalled(digest: bytes, caller: Caller, parts: Services) -> Response | None:
    """The answer to a request that was answered before, None where reading it could lead to another one."""
    started, now = time.monotonic(), parts.now()
    repeat = parts.repeats.get(digest, now)
    if repeat is None or not await holds(repeat, parts):
        return None
    kept = parts.cache.at_hand(repeat.key, now)
    if kept is None:
        return None
    await parts.access.charge(caller, 1, parts.quotas)
    facts = repeat.facts
    if facts.degraded != (degraded := parts.degraded):
        facts = replace(facts, degraded=degraded)
    parts.metrics.forecasts.labels(facts.model, "degraded" if degraded else "ok").inc()
    return answer(Found(kept, "hit"), facts, now, started, parts)


async def holds(repeat: Repeat, parts: Services) -> bool:
    """Whether a request would be settled as it was, while the clock has not passed it."""
    if repeat.model != WITHOUT_WEIGHTS.executed:
        model = parts.registry.at_hand(repeat.reference, repeat.series[0])
        if model is None:
            return False
        if (*model.executed[:-1], parts.weights.number(model, repeat.series[1])) != repeat.model:
            return False
    if parts.evaluator.of(*repeat.series) is not repeat.standings:
        return False
    stored = repeat.stored
    if stored is None:
        return True
    revision = await parts.history.revision(stored.symbol, stored.interval)
    return revision is not None and revision == stored.revision


def remember(digest: bytes, asked: Asked, kept: Kept, parts: Services) -> None:
    """Let the short cut answer this request from now on, if it can."""
    series = asked.series
    if not (asked.is_repeatable and asked.model.settled) or (series.source == "history" and series.revision is None):
        return
    parts.repeats.put(digest, repeat_of(asked, kept))


def repeat_of(asked: Asked, kept: Kept) -> Repeat:
    """What a request was answered with, and for how long it would be again."""
    series = asked.series
    stored = StoredAs(series.symbol, series.interval, series.revision) if series.source == "history" else None
    until = min(kept.valid_until, asked.settled_until)
    return Repeat(
        asked.reference,
        asked.model.executed,
        stored,
        asked.key,
        asked.facts,
        asked.standings,
        (series.symbol, series.interval),
        since=asked.issued_at,
        until=until,
    )


def answer(found: Found, facts: Facts, issued_at: int, started: float, parts: Services) -> Response:
    """The response with a forecast; `started` is when its request was read, in `time.monotonic()` seconds."""
    total = time.monotonic() - started
    parts.metrics.stage_seconds.labels(facts.model, "total").observe(total)
    parts.metrics.cache_requests.labels(found.cache).inc()
    tell(model=facts.model, cache=found.cache)
    timings = {**vars(found.stages), "total": 1e3 * total}
    headers = {"Server-Timing": ", ".join(f"{stage};dur={value:.3f}" for stage, value in timings.items())}
    if degraded := (*facts.degraded, *found.degraded):
        headers["Candlecast-Degraded"] = ", ".join(degraded)
    return Response(
        whole_answer(found, facts, issued_at, TimingsMs(**timings)),
        media_type="application/json",
        headers=headers,
    )

"""GET /forecast/{symbol}/latest and /stream: forecasts that were computed before anybody asked."""

from collections.abc import AsyncIterator
from email.utils import formatdate
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from service.api.errors import NoForecastYet, problems
from service.api.schemas import ForecastAnswer, Interval, Symbol, WatchAnswer, WatchEntryAnswer, normalise_symbol
from service.api.security import Asking, GuardedRoute, open_to
from service.api.watchlist import Latest, Watched
from service.api.wire import names_tag
from service.services import Parts

router = APIRouter(route_class=GuardedRoute)

_STALE: Final = "Candlecast-Stale"


async def _watched(
    symbol: Symbol,
    parts: Parts,
    model: Annotated[str | None, Query(description="As on the watch list; default: the first listed.")] = None,
    interval: Annotated[Interval | None, Query(description="Default: the first listed.")] = None,
) -> Watched:
    return parts.watch.find(normalise_symbol(symbol), model, interval)


Listed = Annotated[Watched, Depends(_watched)]


async def _streamed(watched: Listed, parts: Parts) -> AsyncIterator[Watched]:
    """The watched entry with a place among the streams, both before the answer begins."""
    with parts.watch.stream():
        yield watched


@router.get(
    "/watch",
    response_model=WatchAnswer,
    summary="What is forecast before anybody asks",
    openapi_extra=open_to("forecast"),
)
async def get_watch(parts: Parts, caller: Asking) -> Any:
    """The watch list, in the order of CANDLECAST_WATCH; each of its entries can be read at `latest` and `stream`."""
    return WatchAnswer(
        entries=[
            WatchEntryAnswer(
                symbol=each.entry.symbol,
                interval=each.interval,
                model=each.entry.request.model,
                horizon=each.entry.request.horizon,
            )
            for each in parts.watch.watched
            if caller.may_ask(each.entry.symbol)
        ]
    )


@router.get(
    "/forecast/{symbol}/latest",
    response_model=ForecastAnswer,
    responses={304: {"description": "If-None-Match names the newest forecast."}, **problems(404, 422, 503)},
    summary="The newest forecast of a watched symbol",
    openapi_extra=open_to("forecast"),
)
async def get_latest(watched: Listed, parts: Parts, if_none_match: Annotated[str | None, Header()] = None) -> Response:
    """Waits for nothing. While a refresh runs or fails it is the one before, with `stale` in `meta.degraded`."""
    now = parts.now()
    latest = watched.latest
    if latest is None:
        raise NoForecastYet("the first forecast is not there yet")
    stale = watched.is_stale(now)
    degraded = latest.degraded(parts.degraded, stale)
    headers = _headers(latest, now, degraded)
    if names_tag(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(latest.body(now, degraded), media_type="application/json", headers=headers)


@router.get(
    "/forecast/{symbol}/stream",
    response_class=EventSourceResponse,
    responses=problems(404, 422, 503),
    summary="Every new forecast of a watched symbol, as server-sent events",
    openapi_extra=open_to("forecast"),
)
async def stream_forecasts(
    watched: Annotated[Watched, Depends(_streamed)],
    parts: Parts,
    caller: Asking,
    last_event_id: Annotated[str | None, Header()] = None,
) -> AsyncIterator[ServerSentEvent]:
    """The newest forecast unless `Last-Event-ID` names it, then each later one; a slow caller gets only the newest.

    It ends when the caller's key counts no more.
    """
    seen = last_event_id
    while (latest := await watched.after(seen)) is not None and parts.access.holds(caller):
        now = parts.now()
        body = latest.body(now, latest.degraded(parts.degraded, watched.is_stale(now)))
        seen = latest.name
        yield ServerSentEvent(event="forecast", id=seen, raw_data=body.decode())


def _headers(latest: Latest, now: int, degraded: tuple[str, ...]) -> dict[str, str]:
    """The tag is weak: `issued_at` and what else passes differ between answers with one forecast."""
    return {
        "ETag": f'W/"{latest.name}"',
        "Last-Modified": formatdate(latest.since / 1000, usegmt=True),
        "Age": str(max(0, now - latest.since) // 1000),
        "Cache-Control": "no-cache",
        **({"Candlecast-Degraded": ", ".join(degraded)} if degraded else {}),
        **({_STALE: "true"} if "stale" in degraded else {}),
    }

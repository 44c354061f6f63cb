"""POST /forecast/{symbol}: one request, a straight line."""

import asyncio
import time

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from model_store.files import VersionNotFound
from service.api.errors import problems
from service.api.forecasting import Noted, found_for, settled
from service.api.repeated import Admitted, AdmittedRoute, answer, remember
from service.api.schemas import ForecastAnswer, ForecastRequest, Symbol, normalise_symbol
from service.api.security import Caller, caller_of, open_to
from service.api.wire import ClientGone, unless_gone
from service.engine.batcher import DeadlineExceeded, Overloaded, Place
from service.engine.history import UnknownSymbol
from service.services import Parts, Services

router = APIRouter(route_class=AdmittedRoute)


@router.post(
    "/forecast/{symbol}",
    response_model=ForecastAnswer,
    responses=problems(400, 404, 413, 422, 500, 503, 504),
    summary="Forecast a symbol's next candles",
    openapi_extra=open_to("forecast", cost="lookback + horizon x paths"),
)
async def post_forecast(
    symbol: Symbol, parts: Parts, request: Request, body: ForecastRequest | None = None
) -> Response:
    """Forecast from the candles in the body, or from the stored history of the symbol."""
    asked = body or ForecastRequest.model_validate({})
    noted = Noted()
    try:
        name, caller = normalise_symbol(symbol), caller_of(request)
        admitted: Admitted = getattr(request.state, "admitted", Admitted())
        return await unless_gone(request, _answer(name, asked, admitted, caller, parts, noted))
    except ClientGone:
        noted.outcome = "cancelled"
        return Response(status_code=499)  # never read
    except Exception as error:
        noted.outcome = _outcome(error)
        raise
    finally:
        parts.metrics.forecasts.labels(noted.model, noted.outcome).inc()


async def _answer(
    symbol: str, request: ForecastRequest, admitted: Admitted, caller: Caller, parts: Services, noted: Noted
) -> Response:
    started = time.monotonic()
    deadline = started + (request.timeout_ms or parts.settings.request_timeout_ms) / 1000
    try:
        async with asyncio.timeout(deadline - started) as limit:
            asked = await settled(symbol, request, parts, noted)
    except TimeoutError:
        if limit.expired():
            raise DeadlineExceeded from None
        raise
    await parts.access.charge(caller, asked.cost, parts.quotas)
    place = admitted.place or Place(deadline, caller.client)
    found = await found_for(asked, request.cache == "use", parts, deadline, place)
    noted.outcome = "degraded" if asked.degraded or found.degraded else "ok"
    if admitted.digest and found.cache != "bypass":
        remember(admitted.digest, asked, found.kept, parts)
    return answer(found, asked.facts, asked.issued_at, started, parts)


def _outcome(error: Exception) -> str:
    if isinstance(error, Overloaded):
        return "overloaded"
    if isinstance(error, DeadlineExceeded):
        return "timeout"
    return "invalid" if isinstance(error, (ValueError, UnknownSymbol, VersionNotFound, HTTPException)) else "error"

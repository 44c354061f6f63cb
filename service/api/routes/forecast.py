"""POST /forecast/{symbol}: one request, a straight line."""

import asyncio
import time
from dataclasses import dataclass

import numpy as np
from fastapi import APIRouter, Request, Response

from models.forecaster import ForecastInput, ModelError
from models.uniforms import derive_seed
from service.api.answers import Asked, Found, lasting_part, reasons_not_to_act
from service.api.errors import InputError
from service.api.parameters import Parameters, require_enough, settle
from service.api.repeated import AdmittedRoute, answer, remember
from service.api.schemas import ForecastAnswer, ForecastRequest, normalise_symbol
from service.api.sources import candles_in_body, candles_in_history, instant_of_knowledge
from service.api.wire import ClientGone, unless_gone
from service.engine.batcher import DeadlineExceeded, Overloaded
from service.engine.history import UnknownSymbol
from service.engine.registry import LoadedModel
from service.engine.series import Series
from service.metrics import UNKNOWN_MODEL
from service.services import Parts, Services

router = APIRouter(route_class=AdmittedRoute)

_EXACT_SEEDS = 2**53  # larger integers lose digits in callers whose only number is a double
_LATER = ("auto", "ensemble")


@dataclass
class _Noted:
    """What the metrics say about a request, as far as it is known."""

    model: str = UNKNOWN_MODEL
    outcome: str = "error"


@router.post("/forecast/{symbol}", response_model=ForecastAnswer, summary="Forecast a symbol's next candles")
async def post_forecast(symbol: str, parts: Parts, request: Request, body: ForecastRequest | None = None) -> Response:
    """Forecast from the candles in the body, or from the stored history of the symbol."""
    asked = body or ForecastRequest.model_validate({})
    noted = _Noted()
    try:
        return await unless_gone(request, _answer(normalise_symbol(symbol), asked, request.state.digest, parts, noted))
    except ClientGone:
        noted.outcome = "cancelled"
        return Response(status_code=499)  # never read
    except Exception as error:
        noted.outcome = _outcome(error)
        raise
    finally:
        parts.metrics.forecasts.labels(noted.model, noted.outcome).inc()


async def _answer(symbol: str, request: ForecastRequest, digest: bytes, parts: Services, noted: _Noted) -> Response:
    started = time.monotonic()
    deadline = started + (request.timeout_ms or parts.settings.request_timeout_ms) / 1000
    try:
        async with asyncio.timeout(deadline - started) as limit:
            asked = await _settle(symbol, request, parts, noted)
    except TimeoutError:
        if limit.expired():
            raise DeadlineExceeded from None
        raise
    found = await _forecast(asked, request.cache == "use", parts, deadline)
    noted.outcome = "degraded" if asked.degraded else "ok"
    if found.cache != "bypass":
        remember(digest, request.model, asked, found.kept, parts)
    return answer(found, asked.facts, asked.issued_at, started, parts)


async def _settle(symbol: str, request: ForecastRequest, parts: Services, noted: _Noted) -> Asked:
    """Everything that the request leaves open, decided."""
    issued_at = parts.now()
    model = await _model(request.model, parts)
    noted.model = model.name
    parameters = settle(request, model)
    series = await _series(symbol, request, parameters, parts, issued_at)
    require_enough(len(series.timestamps), parameters, model.manifest.limits)
    item = _forecast_input(series, parameters, request.seed, model)
    _check(model, item)
    reasons = reasons_not_to_act(model, series, instant_of_knowledge(request.as_of, issued_at))
    degraded = parts.degraded if model.settled else (*parts.degraded, "runtime")
    return Asked(model, series, parameters, item, issued_at, reasons, degraded, request.as_of)


async def _forecast(asked: Asked, may_share: bool, parts: Services, deadline: float) -> Found:
    if not may_share:
        computed, _ = await parts.engine.submit(asked.model, asked.item, deadline)
        return Found(lasting_part(asked, computed), "bypass", computed.timings)
    key = asked.key
    if asked.model.settled and (kept := await parts.cache.get(key, asked.issued_at)):
        return Found(kept, "hit")
    computed, shared = await parts.engine.submit(asked.model, asked.item, deadline, key)
    kept = lasting_part(asked, computed)
    if not asked.degraded:
        parts.cache.put(key, kept, asked.issued_at)
    return Found(kept, "coalesced" if shared else "miss", computed.timings)


async def _model(reference: str, parts: Services) -> LoadedModel:
    if reference in _LATER:
        raise ModelError("this way of choosing a model is not available", "model", "model_not_available")
    return await parts.registry.get(reference)


async def _series(symbol: str, request: ForecastRequest, parameters: Parameters, parts: Services, now: int) -> Series:
    if request.candles is None:
        return await candles_in_history(symbol, request, parts.history, parameters.lookback, now)
    try:
        return await candles_in_body(symbol, request, now)
    except InputError as error:
        parts.metrics.rejections.labels(error.code).inc()
        raise


def _forecast_input(series: Series, parameters: Parameters, seed: int | None, model: LoadedModel) -> ForecastInput:
    """The newest `lookback` candles with the horizon's timestamps and the seed."""
    timestamps = series.timestamps[-parameters.lookback :]
    future = series.calendar.following(timestamps, series.interval, parameters.horizon)
    if seed is None:
        seed = derive_seed(series.symbol, series.interval, series.as_of, model.version) % _EXACT_SEEDS
    return ForecastInput(
        timestamps=timestamps,
        candles=series.candles[-parameters.lookback :],
        future_timestamps=future,
        local_times=series.calendar.local(np.concatenate([timestamps, future]), series.interval),
        levels=parameters.levels,
        sampling=parameters.sampling,
        aggregate=parameters.aggregate,
        seed=seed,
        with_paths=parameters.paths,
    )


def _check(model: LoadedModel, item: ForecastInput) -> None:
    """ModelError if the item does not fit the model, without the caller's own text."""
    try:
        model.forecaster.check(item)
    except ModelError as error:
        raise ModelError(str(error).replace(f" {item.aggregate!r}", ""), error.field, error.code) from None


def _outcome(error: Exception) -> str:
    if isinstance(error, Overloaded):
        return "overloaded"
    if isinstance(error, DeadlineExceeded):
        return "timeout"
    return "invalid" if isinstance(error, (ValueError, UnknownSymbol)) else "error"

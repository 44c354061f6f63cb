"""POST /forecast/{symbol}: one request, a straight line."""

import asyncio
import time
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from models.forecaster import ForecastInput, ModelError
from models.uniforms import derive_seed
from service.api.answers import Asked, build_answer
from service.api.errors import InputError
from service.api.parameters import Parameters, require_enough, settle
from service.api.schemas import ForecastAnswer, ForecastRequest, normalise_symbol
from service.api.sources import candles_in_body, candles_in_history, instant_of_knowledge
from service.api.wire import ClientGone, StrictRoute, unless_gone
from service.engine.batcher import EngineStopped, QueueFull
from service.engine.engine import DeadlineExceeded
from service.engine.history import HistoryUnavailable, UnknownSymbol
from service.engine.registry import LoadedModel
from service.engine.series import Series
from service.metrics import UNKNOWN_MODEL
from service.services import Parts, Services

router = APIRouter(route_class=StrictRoute)

_EXACT_SEEDS = 2**53  # larger integers lose digits in callers whose only number is a double
_LATER = ("auto", "ensemble")


@router.post("/forecast/{symbol}", response_model=ForecastAnswer, summary="Forecast a symbol's next candles")
async def post_forecast(symbol: str, parts: Parts, request: Request, body: ForecastRequest | None = None) -> Any:
    """Forecast from the candles in the body, or from the stored history of the symbol."""
    asked = body or ForecastRequest.model_validate({})
    label = [UNKNOWN_MODEL]
    outcome = "error"
    try:
        answer = await unless_gone(request, _answer(normalise_symbol(symbol), asked, parts, label))
        outcome = "degraded" if answer.meta.degraded else "ok"
        return answer
    except ClientGone:
        outcome = "cancelled"
        return Response(status_code=499)  # never read
    except Exception as error:
        outcome = _outcome(error)
        raise
    finally:
        parts.metrics.forecasts.labels(label[0], outcome).inc()


async def _answer(symbol: str, request: ForecastRequest, parts: Services, label: list[str]) -> ForecastAnswer:
    """The answer; `label[0]` becomes the model's name as soon as it is known."""
    started = time.monotonic()
    deadline = started + (request.timeout_ms or parts.settings.request_timeout_ms) / 1000
    issued_at = parts.now()
    try:
        async with asyncio.timeout(deadline - started) as limit:
            model = await _model(request.model, parts)
            label[0] = model.name
            parameters = settle(request, model)
            series = await _series(symbol, request, parameters, parts, issued_at)
    except TimeoutError:
        if limit.expired():
            raise DeadlineExceeded from None
        raise
    require_enough(len(series.timestamps), parameters, model.manifest.limits)
    item = _forecast_input(series, parameters, request.seed, model)
    _check(model, item)
    computed = await parts.engine.submit(model, item, deadline)
    knowledge = instant_of_knowledge(request.as_of, issued_at)
    asked = Asked(model, series, parameters, item, issued_at, knowledge, parts.degraded)
    total = time.monotonic() - started
    parts.metrics.stage_seconds.labels(model.name, "total").observe(total)
    return build_answer(asked, computed, 1e3 * total)


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
    if isinstance(error, (QueueFull, EngineStopped, HistoryUnavailable)):
        return "overloaded" if isinstance(error, QueueFull) else "error"
    if isinstance(error, DeadlineExceeded):
        return "timeout"
    return "invalid" if isinstance(error, (ValueError, UnknownSymbol)) else "error"

"""A request to the forecast that answers it: what the POST and the watch list have in common."""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np

from model_store.manifest import Manifest, ModelLimits, Origin
from models.forecaster import Forecast, ForecastInput, ModelError
from models.naive import NaiveForecaster
from models.scoring import GROUPS, group_of
from models.uniforms import derive_seed
from service.api.answers import Asked, Found, lasting_part, reasons_not_to_act
from service.api.errors import InputError
from service.api.parameters import SAMPLING, Parameters, require_enough, settle
from service.api.schemas import ForecastRequest
from service.api.sources import candles_in_body, candles_in_history, instant_of_knowledge, interval_meant
from service.engine.batcher import Computed, DeadlineExceeded, Place
from service.engine.registry import LoadedModel
from service.engine.series import Series
from service.engine.shadows import is_of_share
from service.metrics import UNKNOWN_MODEL
from service.score.auto import NAIVE
from service.score.evaluator import SeriesStandings
from service.score.ledger import BAND, Served, served_from
from service.score.recalibration import calibration_for
from service.services import Services
from service.traces import tell_computed

AUTO: Final = "auto"
AUTO_HORIZON: Final = 30
WITHOUT_WEIGHTS: Final = LoadedModel(
    Manifest(
        model=NAIVE,
        version="builtin",
        family="naive",
        origin=Origin(kind="trained", source="last close for ever"),
        limits=ModelLimits(min_context=1, max_context=4096, max_horizon=512),
        files={},
        created_at="2026-01-01T00:00:00Z",
    ),
    NaiveForecaster(),
)
_SHADOW_SECONDS: Final = 60.0  # a late deadline is a low priority: batches are formed by deadline
_EXACT_SEEDS: Final = 2**53  # larger integers lose digits in callers whose only number is a double


@dataclass
class Noted:
    """What the metrics say about a request, as far as it is known."""

    model: str = UNKNOWN_MODEL
    outcome: str = "error"


async def settled(symbol: str, request: ForecastRequest, parts: Services, noted: Noted) -> Asked:
    """Everything that the request leaves open, decided."""
    issued_at = parts.now()
    model = await _model(symbol, request, parts)
    if request.model == AUTO:
        request = _for_any_model(request)
    noted.model = model.name
    parameters = settle(request, model)
    series = await _series(symbol, request, parameters, parts, issued_at)
    if request.as_of is None:  # what scores say now was not known at an instant that the caller chose
        model = await parts.weights.weighted(model, series.interval)
    require_enough(len(series.timestamps), parameters, model.manifest.limits)
    item = forecast_input(series, parameters, request.seed, model)
    _check(model, item)
    standings = parts.evaluator.of(symbol, series.interval)
    known = standings if request.as_of is None else SeriesStandings()
    standing = known.of(model.exact, parameters.horizon)
    reasons = reasons_not_to_act(model, standing, series, instant_of_knowledge(request.as_of, issued_at))
    if model is WITHOUT_WEIGHTS:
        reasons = ("worse_than_naive", *(reason for reason in reasons if reason != "no_baseline"))
    calibration = calibration_for(parts.settings.recalibrate, known.scales, model.exact, parameters.horizon)
    degraded = parts.degraded if model.settled else (*parts.degraded, "runtime")
    return Asked(
        request=request,
        model=model,
        series=series,
        parameters=parameters,
        item=item,
        issued_at=issued_at,
        reasons=reasons,
        degraded=degraded,
        reference=model.name if request.model == AUTO else request.model,
        standings=standings,
        is_repeatable=request.model != AUTO or group_of(parameters.horizon) in known.best,
        standing=standing,
        calibration=calibration,
    )


async def found_for(
    asked: Asked, may_share: bool, parts: Services, deadline: float, place: Place | None = None
) -> Found:
    """The forecast, kept or computed in its turn; a computed one goes to the ledger."""
    key = asked.key
    if not may_share:
        computed, _ = await parts.engine.submit(asked.model, asked.item, deadline, place=place)
        tell_computed(computed.timings)
        _note(asked, computed, parts)
        return Found(lasting_part(asked, computed), "bypass", computed.timings, computed.degraded)
    if asked.model.settled and (kept := await parts.cache.get(key, asked.issued_at)):
        return Found(kept, "hit")
    computed, shared = await parts.engine.submit(asked.model, asked.item, deadline, key, place)
    tell_computed(computed.timings)
    kept = lasting_part(asked, computed)
    if asked.model.settled:
        parts.cache.put(key, kept, asked.issued_at)
    _note(asked, computed, parts)  # again changes nothing: the first who asked may have left
    return Found(kept, "coalesced" if shared else "miss", computed.timings, computed.degraded)


def _note(asked: Asked, computed: Computed, parts: Services) -> None:
    """Have the forecast noted in the ledger, and the shadow's beside it where this request is of its share."""
    _register(asked, computed, parts)
    request = asked.request
    if "@" in request.model or request.model == AUTO or request.as_of is not None:
        return
    shadow = parts.registry.shadow_of(asked.model)
    if shadow and is_of_share(asked.computation, shadow[1]):
        parts.shadows.begin(shadow[0], asked.computation, partial(_forecast_in_shadow, asked, shadow[0], parts))


async def _forecast_in_shadow(asked: Asked, shadow: LoadedModel, parts: Services) -> None:
    """The same request to another version, from the same last candle; noted in the ledger and shown to nobody."""
    request, series, symbol = asked.request, asked.series, asked.series.symbol
    parameters = settle(request, shadow)
    if series.source == "history" and parameters.lookback > asked.parameters.lookback:
        series = await candles_in_history(symbol, request, parts.history, parameters.lookback, asked.issued_at)
        if series.as_of != asked.series.as_of:  # a candle came meanwhile that had closed by then
            raise DeadlineExceeded
    require_enough(len(series.timestamps), parameters, shadow.manifest.limits)
    shadow = await parts.weights.weighted(shadow, series.interval)
    item = forecast_input(series, parameters, request.seed, shadow)
    _check(shadow, item)
    computed, _ = await parts.engine.submit(shadow, item, time.monotonic() + _SHADOW_SECONDS)
    scales = asked.standings.scales
    calibration = calibration_for(parts.settings.recalibrate, scales, shadow.exact, parameters.horizon)
    noted = replace(asked, model=shadow, series=series, parameters=parameters, item=item, calibration=calibration)
    _register(noted, computed, parts)


def _register(asked: Asked, computed: Computed, parts: Services) -> None:
    """Note a forecast, and those that it was blended of: members are scored though nobody asks them alone."""
    parts.register.note(partial(_served, asked, computed.forecast))
    scales, horizon = asked.standings.scales, asked.parameters.horizon
    for member in computed.members:
        calibration = calibration_for(parts.settings.recalibrate, scales, member.model.exact, horizon)
        noted = replace(asked, model=member.model, item=member.item, calibration=calibration)
        parts.register.note(partial(_served, noted, member.forecast))


def _served(asked: Asked, forecast: Forecast) -> Served:
    series, item = asked.series, asked.item
    return served_from(
        forecast,
        item,
        symbol=series.symbol,
        interval=series.interval,
        model=asked.model.exact,
        key=asked.computation,  # or it would be scored again whenever its scores have changed
        issued_at=asked.issued_at,
        closes=series.calendar.closes(item.future_timestamps, series.interval),
        scale=asked.calibration.scale,
    )


async def _model(symbol: str, request: ForecastRequest, parts: Services) -> LoadedModel:
    if request.model != AUTO:
        return await parts.registry.get(request.model, symbol)
    if request.as_of is not None:
        raise ModelError("`auto` chooses by today's scores: name a model", "as_of", "unsupported_parameter")
    if (request.horizon or 0) > GROUPS[-1]:
        raise ModelError(f"no model forecasts more than {GROUPS[-1]} steps", "horizon", "horizon_too_long")
    interval = request.interval or await interval_meant(symbol, request, parts.history)
    best = parts.evaluator.best(symbol, interval, request.horizon or AUTO_HORIZON)
    if best == NAIVE:
        return WITHOUT_WEIGHTS
    name = best.partition("@")[0] if best else parts.settings.toto  # whichever of its versions answers by now
    return await parts.registry.get(name, symbol)


def _for_any_model(request: ForecastRequest) -> ForecastRequest:
    """ModelError if the request asks for what only some models have: who chooses a model knows which one it is."""
    for name in (*SAMPLING, "aggregate"):
        if getattr(request, name) is not None:
            raise ModelError("name a model to set this parameter", name)
    if request.paths:
        raise ModelError("name a model that draws paths", "paths")
    return request.model_copy(update={"horizon": request.horizon or AUTO_HORIZON})


async def _series(symbol: str, request: ForecastRequest, parameters: Parameters, parts: Services, now: int) -> Series:
    if request.candles is None:
        return await candles_in_history(symbol, request, parts.history, parameters.lookback, now)
    try:
        return await candles_in_body(symbol, request, now)
    except InputError as error:
        parts.metrics.rejections.labels(error.code).inc()
        raise


def forecast_input(series: Series, parameters: Parameters, seed: int | None, model: LoadedModel) -> ForecastInput:
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
        also=BAND,
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

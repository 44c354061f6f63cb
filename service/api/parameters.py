"""What a request asks of a version: its own words, else the version's serving defaults, else the built-in ones."""

from dataclasses import dataclass, replace
from typing import Final

from model_store.manifest import ModelLimits
from models.forecaster import (
    DEFAULT_HORIZON,
    ModelError,
    Sampling,
    served_aggregate,
    served_sampling,
    usual_lookback,
)
from service.api.errors import InputError
from service.api.schemas import ForecastRequest
from service.engine.registry import LoadedModel

_TOTO_PASS: Final = 64  # steps that Toto answers in one pass, without drawing anything
SAMPLING: Final = ("samples", "temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Parameters:
    """Everything but the candles, settled. `lookback` is the most candles that the model will see."""

    horizon: int
    lookback: int
    exact_lookback: bool
    levels: tuple[float, ...]
    sampling: Sampling
    draws: bool
    aggregate: str
    paths: bool


def settle(request: ForecastRequest, model: LoadedModel) -> Parameters:
    """The parameters of a request to one version; ModelError names the field that does not fit it."""
    limits, serving = model.manifest.limits, model.manifest.serving
    horizon = request.horizon or min(serving.get("horizon", DEFAULT_HORIZON[model.family]), limits.max_horizon)
    if horizon > limits.max_horizon:
        raise ModelError(f"the model forecasts {limits.max_horizon} steps at most", "horizon", "horizon_too_long")
    used = sampling_used(model.family, horizon)
    _refuse_unused(request, model.family, used)
    given = {name: value for name in SAMPLING if (value := getattr(request, name)) is not None}
    return Parameters(
        horizon=horizon,
        lookback=_lookback(request, model, horizon),
        exact_lookback=request.lookback is not None,
        levels=tuple(request.quantiles),
        sampling=replace(served_sampling(serving), **given),
        draws=bool(used),
        aggregate=request.aggregate or served_aggregate(serving),
        paths=request.paths,
    )


def require_enough(got: int, parameters: Parameters, limits: ModelLimits) -> None:
    """InputError unless the model can work with so many candles."""
    needed = parameters.lookback if parameters.exact_lookback else limits.min_context
    if got < needed:
        pointer = "/lookback" if parameters.exact_lookback else "/candles"
        detail = f"{needed} closed candles are needed, {got} are there"
        raise InputError(detail, pointer, "too_few_candles", needed=needed, got=got)


def sampling_used(family: str, horizon: int) -> tuple[str, ...]:
    """The sampling settings that have a meaning: Toto draws beyond one pass, from its mixtures as they are."""
    if family == "toto":
        return ("samples",) if horizon > _TOTO_PASS else ()
    return SAMPLING if family == "kronos" else ()


def _refuse_unused(request: ForecastRequest, family: str, used: tuple[str, ...]) -> None:
    unused = [name for name in SAMPLING if name not in used and getattr(request, name) is not None]
    if request.paths and not used:
        unused.append("paths")
    if request.aggregate is not None and family == "naive":
        unused.append("aggregate")
    if unused:
        raise ModelError(f"{family} does not use this parameter for this horizon: leave it out", unused[0])


def _lookback(request: ForecastRequest, model: LoadedModel, horizon: int) -> int:
    limits = model.manifest.limits
    room = limits.room(horizon)
    if room < limits.min_context:
        raise ModelError("the horizon leaves the model no room for candles", "horizon", "horizon_too_long")
    if request.lookback is None:
        return min(room, _default_lookback(request, model))
    if not limits.min_context <= request.lookback <= room:
        detail = f"with {horizon} steps ahead the model sees {limits.min_context} to {room} candles"
        raise ModelError(detail, "lookback", "lookback_out_of_range")
    return request.lookback


def _default_lookback(request: ForecastRequest, model: LoadedModel) -> int:
    """All candles that were sent; from history what the version prefers."""
    most = model.manifest.limits.max_context
    if request.candles is not None:
        return most
    return usual_lookback(model.family, model.manifest.serving, most)

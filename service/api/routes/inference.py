"""The Open Inference Protocol, version 2: the forecasts of POST /forecast for clients of KServe and of Triton.

Each path of a model is there for a version too, at /v2/models/{name}/versions/{version}.
"""

import asyncio
import json
from importlib.metadata import version
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Request, Response
from starlette.responses import JSONResponse

from service.api.repeated import AdmittedRoute
from service.api.routes.forecast import post_forecast
from service.api.routes.health import livez, readyz
from service.api.routes.models import exact_of
from service.api.schemas import (
    Health,
    InferAnswer,
    InferModelAnswer,
    InferRefusal,
    InferRequest,
    InferServerAnswer,
    normalise_symbol,
)
from service.api.security import PUBLIC, GuardedRoute, caller_of, open_to
from service.api.tensors import (
    HEADER_LENGTH,
    INPUTS,
    OUTPUTS,
    forecast_asked,
    forecast_tensors,
    read_inference,
    written,
)
from service.api.wire import StrictRequest
from service.services import Parts, Services
from service.traces import tell

_REPEATED: Final = ("server-timing", "candlecast-degraded")
_TOLD: Final = ("symbol", "interval", "as_of", "do_predict")


class InferenceRoute(AdmittedRoute):
    """Reads tensors where a POST /forecast reads candles."""

    async def respond(self, request: StrictRequest, sent: bytes, services: Services) -> Response:
        body, request.state.raw = read_inference(sent, request.headers.get(HEADER_LENGTH))
        reference = await _reference(request, request.path_params["name"])
        response: Response = await self.endpoint(reference, services, request, body)
        return response


async def _reference(request: Request, name: str) -> str:
    """The model that a path names, with its version if it names one."""
    its_version = request.path_params.get("version")
    return f"{name}@{its_version}" if its_version else name


Reference = Annotated[str, Depends(_reference)]

router = APIRouter(route_class=GuardedRoute)
_inferences = APIRouter(route_class=InferenceRoute)


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": InferRefusal} for status in statuses}


@router.get("/v2/health/live", summary="Is the process alive, for clients of KServe", openapi_extra=PUBLIC)
async def live(parts: Parts) -> Response:
    """As /livez."""
    return _state("live", isinstance(await livez(parts), Health))


@router.get("/v2/health/ready", summary="Should callers be sent here, for clients of KServe", openapi_extra=PUBLIC)
async def ready(parts: Parts) -> Response:
    """As /readyz."""
    return _state("ready", isinstance(await readyz(parts), Health))


@router.get(
    "/v2",
    response_model=InferServerAnswer,
    summary="The server, for clients of KServe",
    openapi_extra=open_to("forecast"),
)
async def describe_server() -> Any:
    """Name, version and extensions."""
    return InferServerAnswer(name="candlecast", version=version("candlecast"), extensions=["binary_tensor_data"])


@router.get("/v2/models/{name}/versions/{version}", include_in_schema=False, openapi_extra=open_to("forecast"))
@router.get(
    "/v2/models/{name}",
    response_model=InferModelAnswer,
    responses=_refusals(404, 422, 503),
    summary="What a model takes and gives, for clients of KServe",
    openapi_extra=open_to("forecast"),
)
async def describe_model(name: str, reference: Reference, parts: Parts) -> Any:
    """Candles of `[T, 5]` or `[T, 6]`: open, high, low, close, volume and perhaps the amount; timestamps are opens in
    UTC milliseconds."""
    model, _ = await _exact(reference, parts)
    store = parts.registry.store
    return InferModelAnswer(
        name=name,
        versions=await asyncio.to_thread(store.versions, model),
        platform="candlecast",
        inputs=list(INPUTS),
        outputs=list(OUTPUTS),
    )


@router.get("/v2/models/{name}/versions/{version}/ready", include_in_schema=False, openapi_extra=open_to("forecast"))
@router.get(
    "/v2/models/{name}/ready",
    responses=_refusals(404, 422, 503),
    summary="Can a model be asked, for clients of KServe",
    openapi_extra=open_to("forecast"),
)
async def model_ready(name: str, reference: Reference, parts: Parts) -> Response:
    """503 once it has failed to load; one that nobody has asked yet is loaded by the first who does."""
    model, its_version = await _exact(reference, parts)
    return _state("ready", f"{model}@{its_version}" not in parts.registry.failures, name=name)


@_inferences.post(
    "/v2/models/{name}/versions/{version}/infer",
    include_in_schema=False,
    openapi_extra=open_to("forecast", cost="lookback + horizon x paths"),
)
@_inferences.post(
    "/v2/models/{name}/infer",
    response_model=InferAnswer,
    responses=_refusals(400, 404, 413, 422, 500, 503, 504),
    summary="A forecast in tensors, for clients of KServe",
    openapi_extra=open_to("forecast", cost="lookback + horizon x paths"),
)
async def infer(reference: Reference, parts: Parts, request: Request, body: InferRequest) -> Response:
    """The forecast that a POST to /forecast/{symbol} would be answered. Tensors may follow the JSON raw, in both
    directions."""
    symbol, asked = forecast_asked(body, request.state.raw, reference)
    parts.access.require(caller_of(request), normalise_symbol(symbol))
    tell(symbol=normalise_symbol(symbol))
    answered = await post_forecast(symbol, parts, request, asked)
    if answered.status_code != 200:
        return answered
    forecast = json.loads(bytes(answered.body))
    told = {
        "model_name": forecast["model"]["name"],
        "model_version": forecast["model"]["version"],
        "id": body.id,
        "parameters": {
            **{name: forecast[name] for name in _TOLD},
            "seed": forecast["meta"]["seed"],
            "reasons": ", ".join(forecast["reasons"]),
            "warnings": "; ".join(forecast["warnings"]),
        },
    }
    content, head = written(told, body, forecast_tensors(forecast))
    headers = {name: answered.headers[name] for name in _REPEATED if name in answered.headers}
    if head == len(content):
        return Response(content, headers=headers, media_type="application/json")
    return Response(content, headers={**headers, HEADER_LENGTH: str(head)}, media_type="application/octet-stream")


router.routes.extend(_inferences.routes)


async def _exact(reference: str, parts: Services) -> tuple[str, str]:
    """Model and version in the store; VersionNotFound if there is none."""
    name, *its_version = reference.split("@", 1)
    return await exact_of("@".join([parts.registry.nicknames.get(name, name), *its_version]), parts)


def _state(word: str, well: bool, **also: str) -> Response:
    return JSONResponse({**also, word: well}, 200 if well else 503)

"""On the admin port: POST /models/{name}/promote, through the store's gate, and /models/{name}/weights."""

import asyncio
from typing import Any

from fastapi import APIRouter

from model_store.files import VerificationFailed
from model_store.gate import PromotionRefused
from model_store.manifest import Manifest
from service.api.errors import InputError, problems
from service.api.routes.models import exact_of, shadow_of, weights_of
from service.api.schemas import PromoteAnswer, PromoteRequest, SetWeightsRequest, WeightsAnswer, normalise_symbol
from service.api.security import open_to
from service.api.wire import StrictRoute
from service.services import Parts

router = APIRouter(route_class=StrictRoute)


@router.post(
    "/models/{name}/promote",
    response_model=PromoteAnswer,
    responses=problems(400, 404, 409, 413, 422, 503),
    summary="Have another version answer",
    openapi_extra=open_to("admin"),
)
async def promote(name: str, parts: Parts, body: PromoteRequest) -> Any:
    """409 where the gate refuses it. What answers now does so until each process has loaded the other beside it."""
    name = parts.registry.nicknames.get(name, name)
    symbol = normalise_symbol(body.symbol) if body.symbol else None

    def through_the_gate() -> Manifest:
        try:
            return parts.registry.store.promote(f"{name}@{body.version}", symbol=symbol, force=body.force)[0]
        except VerificationFailed as error:
            raise PromotionRefused(str(error)) from error
        except OSError as error:
            raise PromotionRefused(f"this process cannot write to the store: {error.strerror}") from error

    worth = await shadow_of(name, parts)
    manifest = await asyncio.to_thread(through_the_gate)
    await parts.follower.announce(name)
    shadow = worth if worth and worth.shadow == manifest.version else None
    return PromoteAnswer(model=name, version=manifest.version, symbol=symbol, shadow=shadow)


@router.post(
    "/models/{name}/weights",
    response_model=WeightsAnswer,
    responses=problems(400, 404, 413, 422, 503),
    summary="Take an ensemble's live weights back",
    openapi_extra=open_to("admin"),
)
async def set_weights(name: str, parts: Parts, body: SetWeightsRequest) -> Any:
    """Former weights are in use at once here, and within a minute in other processes; scores leave them alone until
    `rollback` is false."""
    if not parts.weights.live:
        raise InputError("weights are the published ones: CANDLECAST_ENSEMBLE_LIVE is false", "/rollback", "conflict")
    model, version = await exact_of(name, parts)
    exact = f"{model}@{version}"
    try:
        await (parts.weights.go_back(exact, body.to) if body.rollback else parts.weights.release(exact))
    except LookupError as error:
        raise InputError(f"{error}", "/to", "unknown_weights") from error
    return await weights_of(model, version, parts)

"""What answers in place of the forecasts where the role is evaluator."""

from fastapi import APIRouter

from service.api.errors import ForecastsElsewhere
from service.api.security import GuardedRoute, open_to

router = APIRouter(route_class=GuardedRoute)


@router.post("/forecast/{symbol}", include_in_schema=False, openapi_extra=open_to("forecast"))
@router.post("/v2/models/{name}/infer", include_in_schema=False, openapi_extra=open_to("forecast"))
@router.post("/v2/models/{name}/versions/{version}/infer", include_in_schema=False, openapi_extra=open_to("forecast"))
@router.get("/forecast/{symbol}/latest", include_in_schema=False, openapi_extra=open_to("forecast"))
@router.get("/forecast/{symbol}/stream", include_in_schema=False, openapi_extra=open_to("forecast"))
@router.get("/watch", include_in_schema=False, openapi_extra=open_to("forecast"))
async def refuse() -> None:
    """404, with what to do instead."""
    raise ForecastsElsewhere

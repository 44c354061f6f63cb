"""What answers in place of the forecasts where the role is evaluator."""

from fastapi import APIRouter

from service.api.errors import ForecastsElsewhere

router = APIRouter()


@router.post("/forecast/{symbol}", include_in_schema=False)
@router.get("/forecast/{symbol}/latest", include_in_schema=False)
@router.get("/forecast/{symbol}/stream", include_in_schema=False)
async def refuse() -> None:
    """404, with what to do instead."""
    raise ForecastsElsewhere

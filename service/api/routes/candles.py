"""PUT and GET /candles/{symbol}, GET /symbols: the stored history."""

from dataclasses import asdict
from typing import Annotated, Any, Final

import numpy as np
from fastapi import APIRouter, Query

from service.api.errors import InputError
from service.api.schemas import (
    CandlesAnswer,
    Interval,
    PutCandlesAnswer,
    PutCandlesRequest,
    SymbolsAnswer,
    normalise_symbol,
)
from service.api.sources import candles_to_store, stored_interval
from service.api.wire import StrictRoute
from service.engine.history import PutCounts, UnknownSymbol
from service.services import Parts

router = APIRouter(route_class=StrictRoute)

_MOST_CANDLES: Final = 10_000


@router.put("/candles/{symbol}", response_model=PutCandlesAnswer, summary="Store closed candles")
async def put_candles(symbol: str, body: PutCandlesRequest, parts: Parts) -> Any:
    """Idempotent and free of order between requests; a restated candle replaces the stored one."""
    name = normalise_symbol(symbol)
    try:
        sent, calendar = await candles_to_store(name, body, parts.history, parts.now())
    except InputError as error:
        parts.metrics.rejections.labels(error.code).inc()
        raise
    counts = PutCounts(0, 0, 0)
    if len(sent.timestamps):
        counts = await parts.history.put(name, sent.interval, sent.timestamps, sent.candles, calendar)
    for result, count in asdict(counts).items():
        parts.metrics.candles_ingested.labels(result).inc(count)
    return PutCandlesAnswer(
        symbol=name,
        interval=sent.interval,
        calendar=calendar.name,
        received=len(sent.timestamps),
        warnings=list(sent.warnings),
        **asdict(counts),
    )


@router.get("/candles/{symbol}", response_model=CandlesAnswer, summary="Stored candles")
async def get_candles(
    symbol: str,
    parts: Parts,
    interval: Annotated[Interval | None, Query(description="Default: the only one stored.")] = None,
    limit: Annotated[int, Query(ge=1, le=_MOST_CANDLES, description="How many of the newest.")] = 500,
    before: Annotated[int | None, Query(ge=0, lt=2**62, description="Only candles that open before, ms.")] = None,
) -> Any:
    """The newest stored candles, oldest first."""
    name = normalise_symbol(symbol)
    stored = await parts.history.calendars(name)
    if not stored:
        raise UnknownSymbol(f"no candles of {name} are stored")
    chosen = stored_interval(interval, stored)
    timestamps, candles = await parts.history.read(name, chosen, limit, before)
    rows = [(time, *row) for time, row in zip(timestamps.tolist(), np.asarray(candles).tolist(), strict=True)]
    return CandlesAnswer(symbol=name, interval=chosen, calendar=stored[chosen].name, candles=rows)


@router.get("/symbols", response_model=SymbolsAnswer, summary="Stored symbols")
async def get_symbols(parts: Parts) -> Any:
    """Every stored series with its interval, calendar, first and last candle."""
    return {"symbols": [asdict(series) for series in await parts.history.symbols()]}

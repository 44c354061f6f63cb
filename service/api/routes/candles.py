"""PUT and GET /candles/{symbol}, GET /symbols: the stored history."""

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Final

import numpy as np
from fastapi import APIRouter, Query

from service.api.errors import InputError, problems
from service.api.schemas import (
    CandlesAnswer,
    Instant,
    Interval,
    PutCandlesAnswer,
    PutCandlesRequest,
    Symbol,
    SymbolsAnswer,
    normalise_symbol,
)
from service.api.security import Asking, Caller, open_to
from service.api.sources import calendars_of, candles_to_store, instant_in_query, stored_interval
from service.api.wire import StrictRoute
from service.engine.history import PutCounts
from service.services import Parts, Services

router = APIRouter(route_class=StrictRoute)

_MOST_CANDLES: Final = 10_000


@router.put(
    "/candles/{symbol}",
    response_model=PutCandlesAnswer,
    responses=problems(400, 404, 413, 422, 503),
    summary="Store closed candles",
    openapi_extra=open_to("ingest", cost="candles"),
)
async def put_candles(
    symbol: Symbol,
    parts: Parts,
    caller: Asking,
    body: PutCandlesRequest | None = None,
    restate: Annotated[bool, Query(description="Replace history, in one step; open forecasts follow it.")] = False,
    split: Annotated[float | None, Query(gt=0, le=1e4, description="New shares for one: 4, or 0.1.")] = None,
    before: Annotated[Instant | None, Query(description="Candles that open before are from before the split.")] = None,
    interval: Annotated[Interval | None, Query(description="Of a split; default: the only one stored.")] = None,
) -> Any:
    """Idempotent and free of order between requests; a restated candle replaces the stored one.

    A close that would move a stored one by more than a factor of 1.2 is left out, unless `restate` says that it is
    meant. A split brings no candles: it divides the stored prices, and those of the forecasts that wait for candles.
    """
    name = normalise_symbol(symbol)
    if split is not None:
        instant = _instant_of_split(body, before, restate, parts.now())
        await parts.access.charge(caller, 1, parts.quotas)
        return await _split(name, split, instant, interval, parts)
    if before is not None or interval is not None:
        raise InputError("this belongs to a split", "interval" if before is None else "before", "conflict")
    if body is None:
        raise InputError("send candles, or `split` and `before`", "/candles", "missing")
    return await _stored(name, body, restate, caller, parts)


async def _stored(
    name: str, body: PutCandlesRequest, restate: bool, caller: Caller, parts: Services
) -> PutCandlesAnswer:
    history, now = parts.history, parts.now()
    try:
        sent, calendar = await candles_to_store(name, body, history, now)
    except InputError as error:
        parts.metrics.rejections.labels(error.code).inc()
        raise
    await parts.access.charge(caller, max(1, len(sent.timestamps)), parts.quotas)
    parts.metrics.candles_ingested.labels("unclosed").inc(sent.unclosed)
    counts = PutCounts()
    if len(sent.timestamps):
        put = partial(history.restate, now=now) if restate else history.put
        counts = await put(name, sent.interval, sent.timestamps, sent.candles, calendar)
        parts.ingested(name, sent.interval, counts)
    return PutCandlesAnswer(
        symbol=name,
        interval=sent.interval,
        calendar=calendar.name,
        received=len(sent.timestamps),
        warnings=list(sent.warnings),
        **asdict(counts),
    )


def _instant_of_split(body: PutCandlesRequest | None, before: str | None, restate: bool, now: int) -> int:
    """When the first candle after the split opens."""
    if body is not None or restate:
        raise InputError("a split takes no candles: send it alone", "split", "conflict")
    if before is None:
        raise InputError("name the opening of the first candle after the split", "before", "missing")
    instant = instant_in_query(before, "before")
    if instant > now:
        raise InputError("before lies in the future", "before", "future_timestamp")
    return instant


async def _split(name: str, factor: float, before: int, interval: str | None, parts: Services) -> PutCandlesAnswer:
    stored = await calendars_of(name, parts.history)
    chosen = stored_interval(interval, stored, "interval")
    counts = await parts.history.split(name, chosen, factor, before, now=parts.now())
    parts.ingested(name, chosen, counts)
    nothing = ["no candle changed: this split had been made, or nothing is older"] if counts == PutCounts() else []
    return PutCandlesAnswer(
        symbol=name,
        interval=chosen,
        calendar=stored[chosen].name,
        received=0,
        warnings=nothing,
        **asdict(counts),
    )


@router.get(
    "/candles/{symbol}",
    response_model=CandlesAnswer,
    responses=problems(404, 422, 503),
    summary="Stored candles",
    openapi_extra=open_to("forecast", "ingest"),
)
async def get_candles(
    symbol: Symbol,
    parts: Parts,
    interval: Annotated[Interval | None, Query(description="Default: the only one stored.")] = None,
    limit: Annotated[int, Query(ge=1, le=_MOST_CANDLES, description="How many of the newest.")] = 500,
    before: Annotated[Instant | None, Query(description="Only candles that open before: ms, or a time.")] = None,
) -> Any:
    """The newest stored candles, oldest first."""
    name = normalise_symbol(symbol)
    instant = None if before is None else _instant_of_page(before)
    stored = await calendars_of(name, parts.history)
    chosen = stored_interval(interval, stored, "interval")
    timestamps, candles = await parts.history.read(name, chosen, limit, instant)
    rows = [(time, *row) for time, row in zip(timestamps.tolist(), np.asarray(candles).tolist(), strict=True)]
    return CandlesAnswer(symbol=name, interval=chosen, calendar=stored[chosen].name, candles=rows)


def _instant_of_page(before: str) -> int:
    instant = instant_in_query(before, "before")
    if instant < 0:
        raise InputError("must not lie before 1970", "before", "invalid_timestamp")
    return instant


@router.get(
    "/symbols",
    response_model=SymbolsAnswer,
    responses=problems(503),
    summary="Stored symbols",
    openapi_extra=open_to("forecast", "ingest"),
)
async def get_symbols(parts: Parts, caller: Asking) -> Any:
    """Every stored series that the key is for, with its interval, calendar, first and last candle."""
    return {"symbols": [asdict(series) for series in await parts.history.symbols() if caller.may_ask(series.symbol)]}

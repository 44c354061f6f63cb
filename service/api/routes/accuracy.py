"""GET /accuracy and /accuracy/{symbol}, GET /forecasts/{symbol}: what served forecasts were worth, and themselves."""

from typing import Annotated, Any, Final

from fastapi import APIRouter, Query

from models.candles import CLOSE
from models.scoring import group_name
from service.api.errors import problems
from service.api.schemas import (
    AccuracyAnswer,
    DriftAnswer,
    Instant,
    Interval,
    ModelAccuracyAnswer,
    ModelsAccuracyAnswer,
    ScoresAnswer,
    SeriesAccuracyAnswer,
    ServedStepsAnswer,
    StandingAnswer,
    Symbol,
    normalise_symbol,
)
from service.api.security import GuardedRoute, open_to
from service.api.sources import calendars_of, instant_in_query, stored_interval
from service.score.evaluator import ModelStanding
from service.score.standings import Scores, Standing
from service.services import Parts, Services

router = APIRouter(route_class=GuardedRoute)

_MOST_STEPS: Final = 1_000_000
_COLUMNS: Final = (
    *("timestamp", "issued_at", "target_timestamp", "horizon", "model"),
    *("predicted_close_p10", "predicted_close_p50", "predicted_close_p90", "predicted_high_p50", "predicted_low_p50"),
)


@router.get(
    "/accuracy",
    response_model=ModelsAccuracyAnswer,
    summary="What all forecasts were worth",
    openapi_extra=open_to("forecast"),
)
async def get_accuracy(parts: Parts) -> Any:
    """Every model and version over all symbols of an interval, by group of steps."""
    return ModelsAccuracyAnswer(models=accuracy_of_models(parts))


@router.get(
    "/accuracy/{symbol}",
    response_model=AccuracyAnswer,
    responses=problems(404, 422, 503),
    summary="What a symbol's forecasts were worth",
    openapi_extra=open_to("forecast"),
)
async def get_accuracy_of(
    symbol: Symbol,
    parts: Parts,
    interval: Annotated[Interval | None, Query(description="Default: every one that is stored.")] = None,
) -> Any:
    """Every model and version that was asked about the symbol, by group of steps, with restatements and splits."""
    name = normalise_symbol(symbol)
    stored = await calendars_of(name, parts.history)
    chosen = [stored_interval(interval, stored, "interval")] if interval else sorted(stored)
    return AccuracyAnswer(symbol=name, series=[await accuracy_of_series(name, each, parts) for each in chosen])


@router.get(
    "/forecasts/{symbol}",
    response_model=ServedStepsAnswer,
    responses=problems(404, 422, 503),
    summary="Forecasts as they were served",
    openapi_extra=open_to("forecast"),
)
async def get_forecasts(
    symbol: Symbol,
    parts: Parts,
    interval: Annotated[Interval | None, Query(description="Default: the only one stored.")] = None,
    as_of: Annotated[Instant | None, Query(description="Only what had been issued by then; default: now.")] = None,
    model: Annotated[str | None, Query(description="Only this version's, as NAME@VERSION; default: all.")] = None,
    limit: Annotated[int, Query(ge=1, le=_MOST_STEPS, description="How many of the newest.")] = 10_000,
) -> Any:
    """Steps of the forecasts whose candles came within the last week, or have not come yet, in order of issue."""
    name = normalise_symbol(symbol)
    stored = await calendars_of(name, parts.history)
    chosen = stored_interval(interval, stored, "interval")
    known = parts.now() if as_of is None else instant_in_query(as_of, "as_of")
    steps = [s for s in await parts.ledger.steps(name, chosen, known) if model in (None, s.model)][-limit:]
    rows = [
        (s.origin, s.issued_at, s.target, s.step, s.model, s.low_quantile, s.median, s.high_quantile, s.high, s.low)
        for s in steps
    ]
    return ServedStepsAnswer(symbol=name, interval=chosen, columns=list(_COLUMNS), rows=rows)


def accuracy_of_models(parts: Services) -> list[ModelAccuracyAnswer]:
    """What the evaluator knows of every model over all symbols."""
    return [_model(each) for each in parts.evaluator.models()]


async def accuracy_of_series(symbol: str, interval: str, parts: Services) -> SeriesAccuracyAnswer:
    """What the evaluator knows of one series."""
    _, candles = await parts.history.read(symbol, interval, 1)
    price = float(candles[-1, CLOSE]) if len(candles) else None
    known = parts.evaluator.of(symbol, interval)
    return SeriesAccuracyAnswer(
        interval=interval,
        last_close=price,
        standings=[_standing(each, price) for _, each in sorted(known.standings.items())],
        calibration={f"{model} {group_name(group)}": scale for (model, group), scale in sorted(known.scales.items())},
        auto={group_name(group): model for group, model in sorted(known.best.items())},
        events=await parts.history.events(symbol, interval),
    )


def _standing(standing: Standing | ModelStanding, price: float | None) -> StandingAnswer:
    name, _, version = standing.model.partition("@")
    return StandingAnswer(
        model=name,
        version=version,
        steps=group_name(standing.group),
        all=scores_answer(standing.all, price),
        recent=scores_answer(standing.recent, price),
        drift=DriftAnswer(**vars(standing.drift)),
    )


def _model(standing: ModelStanding) -> ModelAccuracyAnswer:
    shared = vars(_standing(standing, None))
    return ModelAccuracyAnswer(interval=standing.interval, symbols=standing.symbols, **shared)


def scores_answer(found: Scores, price: float | None) -> ScoresAnswer:
    """`price` turns errors per price into errors; skill is one minus the relative MAE, ends changing places."""
    return ScoresAnswer(
        steps=found.steps,
        blocks=found.blocks,
        mae_log_return=found.mae_log_return,
        naive_mae_log_return=found.naive_mae_log_return,
        mae_price=_times(found.mae_of_price, price),
        naive_mae_price=_times(found.naive_mae_of_price, price),
        relative_mae=found.relative_mae,
        relative_mae_interval=None if found.low is None or found.high is None else (found.low, found.high),
        skill_vs_naive=_one_minus(found.relative_mae),
        skill_interval=None if found.low is None or found.high is None else (1 - found.high, 1 - found.low),
        bias_log_return=found.bias,
        pinball=dict(zip(("0.1", "0.5", "0.9"), found.pinball, strict=True)),
        coverage_80=found.coverage_80,
        interval_score=found.interval_score,
        coverage_80_calibrated=found.coverage_80_calibrated,
        interval_score_calibrated=found.interval_score_calibrated,
    )


def _times(part: float, price: float | None) -> float | None:
    return None if price is None else part * price


def _one_minus(value: float | None) -> float | None:
    return None if value is None else 1 - value

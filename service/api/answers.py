"""A computed forecast as the answer that the documentation promises."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

import numpy as np
from pydantic import ValidationError

from model_store.manifest import Evaluation
from models.candles import CLOSE, Floats
from models.ensemble import EnsembleForecaster
from models.forecaster import Forecast, ForecastInput, InvalidModelOutput
from models.scoring import EQUAL, group_name
from service.api.parameters import Parameters, sampling_used
from service.api.schemas import (
    CacheResult,
    CalibrationAnswer,
    ForecastRequest,
    LastingAnswer,
    Meta,
    ModelName,
    Naive,
    PassingAnswer,
    ReturnForecast,
    Returns,
    Skill,
    TimingsMs,
)
from service.engine.batcher import Computed, Timings
from service.engine.cache import Kept, forecast_key
from service.engine.registry import LoadedModel
from service.engine.repeats import Facts
from service.engine.series import Series, stale_from
from service.score.evaluator import SeriesStandings
from service.score.recalibration import Calibration
from service.score.standings import Standing

_HOUR_MS: Final = 3_600_000


@dataclass(frozen=True)
class Asked:
    """One request, settled: what is computed, from what, when."""

    request: ForecastRequest
    model: LoadedModel
    series: Series
    parameters: Parameters
    item: ForecastInput
    issued_at: int
    reasons: tuple[str, ...]
    degraded: tuple[str, ...]
    reference: str  # what means this model for as long as the standings are these
    standings: SeriesStandings  # of the series
    is_repeatable: bool  # whether these alone decided on the model, if anything but the request did
    standing: Standing | None  # of the model at this horizon
    calibration: Calibration

    @property
    def facts(self) -> Facts:
        samples = self.parameters.sampling.samples if self.parameters.draws else None
        context = len(self.item.timestamps)
        return Facts(self.model.name, self.series.as_of, self.item.seed, samples, context, self.degraded)

    @property
    def cost(self) -> int:
        """Candles that the model, or all members of an ensemble, read and draw."""
        forecaster = self.model.forecaster
        if not isinstance(forecaster, EnsembleForecaster):
            return _cost(self.model.family, self.item)
        members = zip(self.model.members, forecaster.members, strict=True)
        return sum(_cost(each.family, member.asked(self.item)) for each, member in members)

    @property
    def settled_until(self) -> float:
        """When the same request with the same candles may be settled otherwise, because time has passed."""
        if self.request.as_of is not None:
            return math.inf
        changes = [self.series.next_close] if self.series.next_close is not None else []
        if self.series.source == "history":
            changes.append(stale_from(self.series.calendar, self.series.interval, self.series.timestamps))
        return min((instant for instant in changes if instant > self.issued_at), default=math.inf)

    @cached_property
    def key(self) -> bytes:
        """Equal for requests that one forecast answers."""
        series = self.series
        shown = (self.standing, self.calibration.mode, self.calibration.by_group)
        facts = (series.symbol, series.interval, series.calendar.name, series.warnings, self.reasons, shown)
        return forecast_key(self.model, self.item, *facts)

    @property
    def computation(self) -> bytes:
        """Equal for requests whose forecasts are equal, whatever the scores beside them are by then."""
        series = self.series
        model = LoadedModel(self.model.manifest, self.model.forecaster, weights=self.model.weights)  # by any runtime
        item = replace(self.item, levels=(), also=(), with_paths=False)
        return forecast_key(model, item, series.symbol, series.interval, series.calendar.name)


@dataclass(frozen=True)
class Found:
    """The forecast for a request, where it came from and how long each stage of the engine took."""

    kept: Kept
    cache: CacheResult
    stages: Timings = field(default_factory=Timings)
    degraded: tuple[str, ...] = ()  # what was out of order while it was computed


def _cost(family: str, item: ForecastInput) -> int:
    paths = item.sampling.samples if sampling_used(family, item.horizon) else 1
    return len(item.timestamps) + item.horizon * paths


def lasting_part(asked: Asked, computed: Computed) -> Kept:
    """What is the same in every answer with this forecast; InvalidModelOutput if it holds a number that is none."""
    valid_until = _valid_until(asked)
    try:
        part = _lasting(asked, computed.forecast, valid_until)
    except ValidationError as error:
        raise InvalidModelOutput("the forecast holds a value that is no finite number") from error
    return Kept(valid_until, computed.batch_rows, _json(part))


def whole_answer(found: Found, facts: Facts, issued_at: int, timings: TimingsMs) -> bytes:
    """The JSON of a ForecastAnswer: the part that lasts, then what is true of this answer alone."""
    passing = PassingAnswer(
        issued_at=issued_at,
        data_age_seconds=(issued_at - facts.as_of) / 1000,
        meta=Meta(
            seed=facts.seed,
            samples=facts.samples,
            context=facts.context,
            cache=found.cache,
            batch_rows=found.kept.batch_rows,
            degraded=[*facts.degraded, *found.degraded],
            timings_ms=timings,
        ),
    )
    return found.kept.body[:-1] + b"," + _json(passing)[1:]


def _json(part: LastingAnswer | PassingAnswer) -> bytes:
    return part.__pydantic_serializer__.to_json(part)


def _lasting(asked: Asked, computed: Forecast, valid_until: int) -> LastingAnswer:
    series, item = asked.series, asked.item
    forecast = _at_levels(computed, item.levels)
    calibration, shown = _calibration(asked.calibration, computed, forecast)
    return LastingAnswer(
        symbol=series.symbol,
        model=_model_name(asked.model),
        interval=series.interval,
        calendar=series.calendar.name,
        as_of=series.as_of,
        last_close=item.last_close,
        valid_until=valid_until,
        horizon=item.horizon,
        forecast=[
            (time, *row) for time, row in zip(item.future_timestamps.tolist(), forecast.point.tolist(), strict=True)
        ],
        quantiles={name: _by_level(forecast.levels, values) for name, values in shown.items()},
        calibration=calibration,
        returns=_returns(forecast, shown["close"], item.last_close),
        naive=Naive(close=item.last_close),
        skill=_realised_skill(asked.standing) or _skill(asked.model.manifest.evaluation("test")),
        do_predict=0 if asked.reasons else 1,
        reasons=list(asked.reasons),
        warnings=[*series.warnings, *forecast.warnings],
        paths=None if forecast.paths is None else forecast.paths.tolist(),
    )


def _model_name(model: LoadedModel) -> ModelName:
    return ModelName(
        family=model.family,
        name=model.name,
        version=model.version,
        runtime=model.runtime,
        dtype=model.dtype,
        weights=model.weights if model.members else None,
    )


def _valid_until(asked: Asked) -> int:
    first = asked.item.future_timestamps[:1]
    closes = int(asked.series.calendar.closes(first, asked.series.interval)[0])
    return closes if closes > asked.issued_at else asked.issued_at + _HOUR_MS


def _by_level(levels: Sequence[float], values: Floats) -> dict[str, list[float]]:
    return {repr(level): row.tolist() for level, row in zip(levels, values, strict=True)}


def _at_levels(forecast: Forecast, levels: tuple[float, ...]) -> Forecast:
    """The forecast with these of its levels alone."""
    rows = [forecast.levels.index(level) for level in levels]
    step = forecast.step_return_quantiles
    return replace(
        forecast,
        levels=levels,
        quantiles={name: values[rows] for name, values in forecast.quantiles.items()},
        step_return_quantiles=None if step is None else step[rows],
    )


def _calibration(
    calibration: Calibration, computed: Forecast, forecast: Forecast
) -> tuple[CalibrationAnswer | None, Mapping[str, Floats]]:
    """What the answer says of recalibration, and the quantiles that it gives."""
    if calibration.mode == "off":
        return None, forecast.quantiles
    middle = computed.levels.index(0.5)
    applied = {
        name: calibration.applied(values, computed.quantiles[name][middle])
        for name, values in forecast.quantiles.items()
    }
    told = CalibrationAnswer(
        mode=calibration.mode,
        scale=dict(calibration.by_group),
        raw={name: _by_level(forecast.levels, values) for name, values in forecast.quantiles.items()},
        calibrated={name: _by_level(forecast.levels, values) for name, values in applied.items()},
    )
    return told, applied if calibration.mode == "on" else forecast.quantiles


def _returns(forecast: Forecast, closes: Floats, last_close: float) -> ReturnForecast:
    """Log-returns; those of one step have quantiles only where the model has a joint distribution."""
    cumulative = np.log(forecast.point[:, CLOSE] / last_close)
    step = forecast.step_return_quantiles
    return ReturnForecast(
        cumulative=Returns(
            point=cumulative.tolist(),
            quantiles=_by_level(forecast.levels, np.log(closes / last_close)),
        ),
        step=Returns(
            point=np.diff(cumulative, prepend=0.0).tolist(),
            quantiles=None if step is None else _by_level(forecast.levels, step),
        ),
        prob_up=forecast.prob_up.tolist(),
    )


def _skill(evaluation: Evaluation | None) -> Skill | None:
    error = evaluation.metrics.get("mae_log_return") if evaluation else None
    if evaluation is None or error is None or not error.naive:
        return None
    skill, coverage = (evaluation.metrics.get(name) for name in ("skill_vs_naive", "coverage_80"))
    return Skill(
        source="evaluation",
        window=f"{evaluation.start}/{evaluation.end}",
        relative_mae=error.value / error.naive,
        low=None if skill is None or skill.high is None else 1 - skill.high,
        high=None if skill is None or skill.low is None else 1 - skill.low,
        coverage_80=coverage.value if coverage else None,
        n=evaluation.origins,
    )


def _realised_skill(standing: Standing | None) -> Skill | None:
    """Of the forecasts that were served, once there are enough of them for an interval."""
    if standing is None or standing.recent.low is None or standing.recent.relative_mae is None:
        return None
    recent = standing.recent
    return Skill(
        source="realised",
        window=f"the last {recent.blocks} blocks of steps {group_name(standing.group)}",
        relative_mae=standing.recent.relative_mae,
        low=recent.low,
        high=recent.high,
        coverage_80=recent.coverage_80,
        n=recent.steps,
    )


def reasons_not_to_act(
    model: LoadedModel, standing: Standing | None, series: Series, knowledge: int
) -> tuple[str, ...]:
    """Why a bot should not act on the forecast; none of them keeps it from being answered.

    `knowledge` is the request's `as_of`, by default now.
    """
    evaluation = model.manifest.evaluation("test")
    reasons = []
    stale = series.source == "history" and stale_from(series.calendar, series.interval, series.timestamps) <= knowledge
    if stale:
        reasons.append("stale_history")
    if standing and standing.recent.low is not None:
        if standing.recent.is_worse_than_naive:
            reasons.append("worse_than_naive")
    elif evaluation is None:
        reasons.append("no_baseline")
    elif _is_worse_than_naive(evaluation):
        reasons.append("worse_than_naive")
    if standing and standing.drift.state == "alarm":
        reasons.append("drift_alarm")
    return tuple(reasons)


def _is_worse_than_naive(evaluation: Evaluation) -> bool:
    """Beyond doubt: the whole interval of its skill lies below zero, by more than rounding can do."""
    skill = evaluation.metrics.get("skill_vs_naive")
    return skill is not None and skill.high is not None and skill.high < -EQUAL

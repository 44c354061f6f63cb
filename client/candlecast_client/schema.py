"""The JSON of the service, under the names that its documentation gives it. All times are UTC milliseconds."""

from datetime import datetime
from typing import Any, Literal, TypedDict


class ModelName(TypedDict):
    """Which version answered, and how it was run."""

    family: str
    name: str
    version: str
    runtime: str
    dtype: str
    weights: int | None  # of an ensemble; 0: the published


class CalibrationAnswer(TypedDict):
    """The bands as the model gives them and as its misses so far would have them; `mode` on: `quantiles` are these."""

    mode: Literal["shadow", "on"]
    scale: dict[str, float]
    raw: dict[str, dict[str, list[float]]]
    calibrated: dict[str, dict[str, list[float]]]


class Returns(TypedDict):
    """Log-returns."""

    point: list[float]
    quantiles: dict[str, list[float]] | None


class ReturnForecast(TypedDict):
    """Log-returns since the last close, step by step, and the probability of a rise."""

    cumulative: Returns
    step: Returns
    prob_up: list[float]


class Naive(TypedDict):
    """The forecast to beat."""

    close: float


class Skill(TypedDict):
    """How the version did against the naive forecast; `relative_mae` below 1 is better than naive."""

    source: Literal["evaluation", "realised"]
    window: str
    relative_mae: float
    low: float | None
    high: float | None
    coverage_80: float | None
    n: int


class TimingsMs(TypedDict):
    """Milliseconds; `total` runs from the parsed request to the built answer. Zero where nothing was computed."""

    queue: float
    batch: float
    prepare: float
    run: float
    finish: float
    total: float


class Meta(TypedDict):
    """How the answer came about."""

    seed: int
    samples: int | None
    context: int
    cache: Literal["hit", "miss", "coalesced", "bypass"]
    batch_rows: int
    degraded: list[str]
    timings_ms: TimingsMs


class ForecastAnswer(TypedDict):
    """A forecast. All times are UTC milliseconds."""

    symbol: str
    model: ModelName
    interval: str
    calendar: str
    as_of: int
    last_close: float
    valid_until: int
    horizon: int
    forecast: list[tuple[int, float, float, float, float, float]]
    quantiles: dict[str, dict[str, list[float]]]
    calibration: CalibrationAnswer | None
    returns: ReturnForecast
    naive: Naive
    skill: Skill | None
    do_predict: Literal[0, 1]
    reasons: list[str]
    warnings: list[str]
    paths: list[list[list[float]]] | None
    issued_at: int
    data_age_seconds: float
    meta: Meta


class PutCandlesAnswer(TypedDict):
    """What the candles of the request were."""

    symbol: str
    interval: str
    calendar: str
    received: int
    new: int
    duplicate: int
    restated: int
    quarantined: int
    scored: int
    rescored: int
    warnings: list[str]


class CandlesAnswer(TypedDict):
    """Stored candles, oldest first: [ms, open, high, low, close, volume, amount]."""

    symbol: str
    interval: str
    calendar: str
    candles: list[tuple[int, float, float, float, float, float, float]]


class SymbolAnswer(TypedDict):
    """One stored series; `first` and `last` are candle opens."""

    symbol: str
    interval: str
    calendar: str
    first: int
    last: int


class SymbolsAnswer(TypedDict):
    """Everything that is stored."""

    symbols: list[SymbolAnswer]


class ScoresAnswer(TypedDict):
    """Means over the scored steps of some blocks of time; the naive forecast's errors are of the same targets."""

    steps: int
    blocks: int
    mae_log_return: float
    naive_mae_log_return: float
    mae_price: float | None
    naive_mae_price: float | None
    relative_mae: float | None
    relative_mae_interval: tuple[float, float] | None
    skill_vs_naive: float | None
    skill_interval: tuple[float, float] | None
    bias_log_return: float
    pinball: dict[str, float]
    coverage_80: float
    interval_score: float
    coverage_80_calibrated: float
    interval_score_calibrated: float


class DriftAnswer(TypedDict):
    """Whether the errors have risen above the version's baseline."""

    state: Literal["ok", "warn", "alarm", "insufficient", "no_baseline"]
    score: float
    blocks: int
    delay_days: float | None


class StandingAnswer(TypedDict):
    """One version and group of steps."""

    model: str
    version: str
    steps: str
    all: ScoresAnswer
    recent: ScoresAnswer
    drift: DriftAnswer


class SeriesAccuracyAnswer(TypedDict):
    """What the forecasts of one stored series were worth."""

    interval: str
    last_close: float | None
    standings: list[StandingAnswer]
    calibration: dict[str, float]
    auto: dict[str, str]
    events: list[dict[str, int | float | str]]


class AccuracyAnswer(TypedDict):
    """What a symbol's forecasts were worth."""

    symbol: str
    series: list[SeriesAccuracyAnswer]


class ModelAccuracyAnswer(TypedDict):
    """One version and group of steps over all symbols of an interval."""

    model: str
    version: str
    steps: str
    all: ScoresAnswer
    recent: ScoresAnswer
    drift: DriftAnswer
    interval: str
    symbols: int


class ModelsAccuracyAnswer(TypedDict):
    """Everything that was scored."""

    models: list[ModelAccuracyAnswer]


class ServedStepsAnswer(TypedDict):
    """Steps of served forecasts: timestamps are openings of candles, UTC ms; prices."""

    symbol: str
    interval: str
    columns: list[str]
    rows: list[tuple[int, int, int, int, str, float, float, float, float, float]]


class RuntimeAnswer(TypedDict):
    """Which runtime answers for a version on this machine, and why."""

    name: str
    dtype: str
    settled: bool
    forced: bool
    times_ms: dict[str, tuple[float, float]]
    batch_invariant: bool | None
    base: str | None
    canary_moved: float | None


class LimitsAnswer(TypedDict):
    """What a version can take, in candles."""

    min_context: int
    max_context: int
    max_horizon: int
    max_total: int | None


class EvaluationAnswer(TypedDict):
    """Scores of one set of windows, each beside the naive forecast's where it has one."""

    windows: str
    start: str
    end: str
    interval: str
    horizon: int
    origins: int
    metrics: dict[str, dict[str, float | None]]


class ModelAnswer(TypedDict):
    """One version of the store."""

    name: str
    version: str
    family: str
    aliases: list[str]
    answers_for: list[str]
    asked_for_as: list[str]
    loaded: bool
    runtime: RuntimeAnswer | None
    limits: LimitsAnswer
    licence: str | None
    created_at: str
    evaluations: list[EvaluationAnswer]


class FailureAnswer(TypedDict):
    """Why a version that was asked for or promoted is not served."""

    model: str
    version: str
    reason: str
    detail: str
    at: int
    tries: int


class ModelsAnswer(TypedDict):
    """The model store."""

    models: list[ModelAnswer]
    broken: list[str]
    failures: list[FailureAnswer]


class ForecastOptions(TypedDict, total=False):
    """What a forecast may be asked for; what the chosen model does not use is refused."""

    model: str
    interval: str | None
    horizon: int | None
    lookback: int | None
    calendar: str | None
    time_is: Literal["open", "close"]
    quantiles: list[float]
    samples: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    aggregate: str | None
    seed: int | None
    paths: bool
    as_of: int | str | datetime | None
    cache: Literal["use", "bypass"]


class ForecastRequest(ForecastOptions, total=False):
    """The body of a forecast's request."""

    candles: list[Any] | dict[str, Any] | None
    timeout_ms: int | None

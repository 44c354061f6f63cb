"""Requests and answers as they stand in the documentation. Nothing behind the routes sees pydantic."""

import re
from typing import Annotated, Any, Final, Literal

from fastapi import Path
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from models.candles import SYMBOL, interval_ms, interval_name
from models.forecaster import DEFAULT_LEVELS
from models.uniforms import MAX_SEED
from service.api.errors import InputError

_LEVELS: Final = (0.001, 0.999)  # further out no sample and no head of a model tells anything
_REFERENCE: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}(@[A-Za-z0-9._-]{1,64})?$"


def normalise_symbol(text: str) -> str:
    """`btc/usdt:usdt` as `BTC-USDT-USDT`; InputError if it is no symbol."""
    symbol = re.sub(r"[/:]", "-", text).upper() if text.isascii() else ""
    if not SYMBOL.fullmatch(symbol):
        raise InputError(
            "a symbol has 1 to 32 letters, digits or any of . _ ^ = - and starts with a letter, digit or ^",
            "symbol",
            "invalid_symbol",
        )
    return symbol


def normalise_interval(text: str) -> str:
    """`60m` as `1h`; ValueError if it is no interval."""
    try:
        return interval_name(interval_ms(text))
    except ValueError:  # its words repeat the text
        raise ValueError("an interval is a number of m, h, d or w, such as 15m, 4h or 1d") from None


def _normalise_levels(levels: list[float]) -> list[float]:
    if not all(_LEVELS[0] <= level <= _LEVELS[1] for level in levels):
        raise ValueError(f"each quantile lies between {_LEVELS[0]} and {_LEVELS[1]}")
    return sorted(set(levels))


Symbol = Annotated[
    str, Path(json_schema_extra={"pattern": r"^[A-Za-z0-9^][A-Za-z0-9._^=/:-]{0,31}$"}, examples=["BTC-USDT"])
]
Interval = Annotated[
    str,
    Field(max_length=8, json_schema_extra={"pattern": "^[1-9][0-9]{0,3}[mhdw]$"}),
    AfterValidator(normalise_interval),
]
Instant = Annotated[
    str,
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "format": "date-time"}]}),
]
Levels = Annotated[list[float], Field(min_length=1, max_length=20), AfterValidator(_normalise_levels)]
Candles = Annotated[
    list[Any] | dict[str, Any],
    Field(
        description="ccxt rows [ms, open, high, low, close, volume(, amount)], Binance kline rows, Alpaca objects"
        " {t, o, h, l, c, v, n, vw} or columns {timestamp, open, high, low, close, volume(, amount)}, oldest first.",
        examples=[[[1700006400000, 1.0, 1.1, 0.9, 1.05, 120.0], [1700010000000, 1.05, 1.2, 1.0, 1.15, 80.0]]],
    ),
]
CalendarName = Annotated[str, Field(max_length=16, pattern=r"^[A-Za-z0-9/_]+$")]
TimeIs = Literal["open", "close"]
CacheResult = Literal["hit", "miss", "coalesced", "bypass"]
CandleRow = tuple[int, float, float, float, float, float]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Answer(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class ForecastRequest(_Request):
    """What to forecast. Everything is optional; what the chosen model does not use is refused."""

    model: str = Field(
        "toto", pattern=_REFERENCE, description="toto, kronos, ensemble, auto, or NAME[@VERSION or @ALIAS]."
    )
    interval: Interval | None = Field(None, description="Default: the only one stored, or the candles' own step.")
    horizon: int | None = Field(None, ge=1, description="Steps ahead; default 64 for Toto, 30 otherwise.")
    candles: Candles | None = Field(None, description="Default: the stored history of the symbol.")
    lookback: int | None = Field(None, ge=1, description="How many of the newest candles the model sees.")
    calendar: CalendarName | None = Field(None, description="24/7, 24/5, an exchange such as XNYS, or auto.")
    time_is: TimeIs = Field("open", description="What the timestamps of the candles are.")
    quantiles: Levels = list(DEFAULT_LEVELS)
    samples: int | None = Field(None, ge=1, le=512, description="Paths drawn.")
    temperature: float | None = Field(None, ge=0.01, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**20, description="0 switches the filter off.")
    aggregate: str | None = Field(None, max_length=64, description="How paths become the point; default median.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Default: hash of symbol, interval, as_of, version.")
    paths: bool = Field(False, description="Whether the answer holds every drawn path.")
    as_of: int | str | None = Field(None, description="Only candles closed by then count; default: now.")
    cache: Literal["use", "bypass"] = Field("use", description="bypass: computed anew, shared with nobody, not kept.")
    timeout_ms: int | None = Field(None, ge=1, le=600_000, description="Deadline, counted from the request's arrival.")


class PutCandlesRequest(_Request):
    """Candles to store; sending them again changes nothing, a restated candle replaces the old one."""

    candles: Candles
    interval: Interval | None = Field(None, description="Default: the candles' own step.")
    calendar: CalendarName | None = Field(None, description="Remembered with the symbol; default: as it was, or auto.")
    time_is: TimeIs = "open"


class ModelName(_Answer):
    """Which version answered, and how it was run."""

    family: str
    name: str
    version: str
    runtime: str = Field(description="Of an ensemble: of each member, such as compiled+eager.")
    dtype: str
    weights: int | None = Field(
        None, description="Of an ensemble: which of its weights, as in GET /models/{name}/weights; 0: the published."
    )


class Returns(_Answer):
    """Log-returns."""

    point: list[float]
    quantiles: dict[str, list[float]] | None = Field(None, description="None where no joint distribution is known.")


class ReturnForecast(_Answer):
    """Log-returns since the last close, step by step, and the probability of a rise."""

    cumulative: Returns
    step: Returns
    prob_up: list[float]


class Naive(_Answer):
    """The forecast to beat."""

    close: float


class Skill(_Answer):
    """How the version did against the naive forecast; `relative_mae` below 1 is better than naive."""

    source: Literal["evaluation", "realised"] = Field(description="Held-out windows, or the forecasts served here.")
    window: str
    relative_mae: float
    low: float | None = Field(description="95 % interval of the relative MAE.")
    high: float | None
    coverage_80: float | None
    n: int


class CalibrationAnswer(_Answer):
    """The bands as the model gives them and as its misses so far would have them; `mode` on: `quantiles` are these."""

    mode: Literal["shadow", "on"]
    scale: dict[str, float] = Field(description="Width of the calibrated band over the raw one, by steps.")
    raw: dict[str, dict[str, list[float]]]
    calibrated: dict[str, dict[str, list[float]]]


class TimingsMs(_Answer):
    """Milliseconds; `total` runs from the parsed request to the built answer. Zero where nothing was computed."""

    queue: float
    batch: float
    prepare: float
    run: float
    finish: float
    total: float


class Meta(_Answer):
    """How the answer came about."""

    seed: int
    samples: int | None = Field(description="Paths drawn; None where the model draws none.")
    context: int = Field(description="Candles the model saw.")
    cache: CacheResult = Field(description="coalesced: shared with an identical request that came a little earlier.")
    batch_rows: int
    degraded: list[str] = Field(
        description="What was out of order, as in the header Candlecast-Degraded: `ledger`, which cannot be written"
        " now and notes the forecast later; `runtime`, which is not yet the model's own; `memory`, which ran out, so"
        " that the same numbers come from a smaller batch; `stale`, in what was computed before it was asked for:"
        " candles or time have passed this forecast, and the next one is not there."
    )
    timings_ms: TimingsMs


class LastingAnswer(_Answer):
    """The part of an answer that is the same whenever the forecast is asked for. All times are UTC milliseconds."""

    symbol: str
    model: ModelName
    interval: str
    calendar: str
    as_of: int = Field(description="When the last candle used closed.")
    last_close: float
    valid_until: int = Field(description="When the first forecast candle closes, or an hour on where that is past.")
    horizon: int
    forecast: list[CandleRow]
    quantiles: dict[str, dict[str, list[float]]]
    calibration: CalibrationAnswer | None = Field(description="Null where CANDLECAST_RECALIBRATE is off.")
    returns: ReturnForecast
    naive: Naive
    skill: Skill | None
    do_predict: Literal[0, 1]
    reasons: list[str]
    warnings: list[str]
    paths: list[list[list[float]]] | None = None


class PassingAnswer(_Answer):
    """The part of an answer that belongs to this answer alone."""

    issued_at: int
    data_age_seconds: float
    meta: Meta


class ForecastAnswer(PassingAnswer, LastingAnswer):
    """A forecast. All times are UTC milliseconds."""


class WatchEntryAnswer(_Answer):
    """One entry of the watch list, and what a POST for its forecast would ask."""

    symbol: str
    interval: str | None = Field(description="Null until candles have come, where the entry names none.")
    model: str
    horizon: int | None = Field(description="Null: the model's own.")


class WatchAnswer(_Answer):
    """The watch list."""

    entries: list[WatchEntryAnswer]


class PutCandlesAnswer(_Answer):
    """What the candles of the request were."""

    symbol: str
    interval: str
    calendar: str
    received: int
    new: int
    duplicate: int
    restated: int
    quarantined: int = Field(description="Left out: they would move a stored close by a factor of 1.2; see `restate`.")
    scored: int = Field(description="Steps of served forecasts that these candles closed.")
    rescored: int = Field(description="Steps scored anew, because their candle was restated.")
    warnings: list[str]


class CandlesAnswer(_Answer):
    """Stored candles, oldest first: [ms, open, high, low, close, volume, amount]."""

    symbol: str
    interval: str
    calendar: str
    candles: list[tuple[int, float, float, float, float, float, float]]


class SymbolAnswer(_Answer):
    """One stored series; `first` and `last` are candle opens."""

    symbol: str
    interval: str
    calendar: str
    first: int
    last: int


class SymbolsAnswer(_Answer):
    """Everything that is stored."""

    symbols: list[SymbolAnswer]


class ScoresAnswer(_Answer):
    """Means over the scored steps of some blocks of time; the naive forecast's errors are of the same targets."""

    steps: int = Field(description="Scored steps of served forecasts.")
    blocks: int
    mae_log_return: float
    naive_mae_log_return: float
    mae_price: float | None = Field(description="Mean error relative to the close at the origin, at today's price.")
    naive_mae_price: float | None
    relative_mae: float | None = Field(description="Null where the close never moved.")
    relative_mae_interval: tuple[float, float] | None = Field(description="95 %; null where blocks are few.")
    skill_vs_naive: float | None
    skill_interval: tuple[float, float] | None
    bias_log_return: float = Field(description="Positive where the forecasts were too low.")
    pinball: dict[str, float]
    coverage_80: float
    interval_score: float = Field(description="Width of the 80 % band and ten times what lies outside; log-return.")
    coverage_80_calibrated: float
    interval_score_calibrated: float


class DriftAnswer(_Answer):
    """Whether the errors have risen above the version's baseline."""

    state: Literal["ok", "warn", "alarm", "insufficient", "no_baseline"]
    score: float = Field(description="Cumulative sum over blocks; warn above 5, alarm above 10 (a symbol: 12).")
    blocks: int
    delay_days: float | None = Field(description="How long errors that rise by a quarter take to raise the alarm.")


class StandingAnswer(_Answer):
    """One version and group of steps."""

    model: str
    version: str
    steps: str
    all: ScoresAnswer
    recent: ScoresAnswer = Field(description="The last 20 blocks.")
    drift: DriftAnswer


class ModelAccuracyAnswer(StandingAnswer):
    """One version and group of steps over all symbols of an interval."""

    interval: str
    symbols: int


class ModelsAccuracyAnswer(_Answer):
    """Everything that was scored."""

    models: list[ModelAccuracyAnswer]


class SeriesAccuracyAnswer(_Answer):
    """What the forecasts of one stored series were worth."""

    interval: str
    last_close: float | None
    standings: list[StandingAnswer]
    calibration: dict[str, float] = Field(description="Scale of the calibrated band, by version and steps.")
    auto: dict[str, str] = Field(description="What `auto` means, by steps.")
    events: list[dict[str, int | float | str]] = Field(description="Restatements and splits, oldest first.")


class AccuracyAnswer(_Answer):
    """What a symbol's forecasts were worth."""

    symbol: str
    series: list[SeriesAccuracyAnswer]


class ServedStepsAnswer(_Answer):
    """Steps of served forecasts: timestamps are openings of candles, UTC ms; prices."""

    symbol: str
    interval: str
    columns: list[str]
    rows: list[tuple[int, int, int, int, str, float, float, float, float, float]]


class LimitsAnswer(_Answer):
    """What a version can take, in candles."""

    min_context: int
    max_context: int
    max_horizon: int
    max_total: int | None


class EvaluationAnswer(_Answer):
    """Scores of one set of windows, each beside the naive forecast's where it has one."""

    windows: str
    start: str
    end: str
    interval: str
    horizon: int
    origins: int
    metrics: dict[str, dict[str, float | None]]


class RuntimeAnswer(_Answer):
    """Which runtime answers for a version on this machine, and why."""

    name: str = Field(
        description="eager, compiled, onnx, cuda_graph; adapter: the eager network of `base`, to which this version"
        " adds what its training changed."
    )
    dtype: str
    settled: bool = Field(description="False while the eager runtime answers until the choice is ready.")
    forced: bool = Field(description="By CANDLECAST_RUNTIME; otherwise the fastest whose parity passed.")
    times_ms: dict[str, tuple[float, float]] = Field(description="Milliseconds of a batch of 1 and of 8 requests.")
    batch_invariant: bool | None = Field(description="Whether a forecast has the same bits alone and in a batch.")
    base: str | None = Field(description="The version beside which an adapter is computed, in batches of both.")
    canary_moved: float | None = Field(
        description="How far an adapter's forecast is from that of its merged weights, over the width of its 80 % band."
    )


class FailureAnswer(_Answer):
    """Why a version that was asked for or promoted is not served."""

    model: str
    version: str
    reason: str = Field(
        description="verification: its bytes are not those of its manifest; memory: it does not fit beside what is"
        " needed; rehearsal: it was loaded and does not forecast; error: anything else."
    )
    detail: str
    at: int = Field(description="UTC milliseconds, of the newest try.")
    tries: int = Field(description="It is tried again, less and less often, and at once when an alias moves.")


class ModelAnswer(_Answer):
    """One version of the store."""

    name: str
    version: str
    family: str
    aliases: list[str]
    answers_for: list[str] = Field(
        description="Aliases that this process answers by this version: another than `aliases` says while the version"
        " that is to follow is loaded, or cannot be."
    )
    asked_for_as: list[str] = Field(description="References that mean this version.")
    loaded: bool
    runtime: RuntimeAnswer | None = Field(description="Null until the version is loaded.")
    limits: LimitsAnswer
    licence: str | None
    created_at: str
    evaluations: list[EvaluationAnswer]


class ModelsAnswer(_Answer):
    """The model store."""

    models: list[ModelAnswer]
    broken: list[str] = Field(description="What cannot be read and is never served; the service's log says why.")
    failures: list[FailureAnswer]


class ComparedAnswer(_Answer):
    """Production and its shadow over the series and blocks of time in which both were scored."""

    interval: str
    steps: str
    symbols: int
    production: ScoresAnswer
    shadow: ScoresAnswer
    relative_mae: float | None = Field(
        description="The shadow's error over production's, each in units of the naive forecast's on its own targets;"
        " below 1 the shadow is better. Null where the close never moved."
    )
    relative_mae_interval: tuple[float, float] | None = Field(description="95 %; null where blocks are few.")


class ShadowAnswer(_Answer):
    """What a shadow is worth so far beside production."""

    model: str
    production: str | None
    shadow: str
    share: float = Field(description="Of the requests that name the model alone.")
    loaded: bool = Field(description="By this process.")
    compared: list[ComparedAnswer] = Field(description="By interval and steps; empty until both were scored.")


class PromoteRequest(_Request):
    """Which version is to answer."""

    version: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Or an alias, such as candidate.")
    symbol: str | None = Field(None, description="For this symbol alone, in production's place.")
    force: str | None = Field(None, max_length=500, description="Why, where the gate refuses it.")


class PromoteAnswer(_Answer):
    """What answers from now on, as soon as each process has loaded it beside what answers now."""

    model: str
    version: str
    symbol: str | None
    shadow: ShadowAnswer | None = Field(description="What its shadow forecasts were worth, if it has been the shadow.")


class SetWeightsRequest(_Request):
    """Former weights, or live ones again."""

    rollback: bool = Field(description="true: former weights, which stay; false: scores may move them again.")
    to: int | None = Field(None, ge=0, description="Which: a number, 0 being the published; default: those before.")


class WeightsInUse(_Answer):
    """Weights that an ensemble had from some instant on."""

    number: int = Field(description="As `model.weights` of a forecast names them.")
    at: int = Field(description="UTC milliseconds.")
    why: Literal["scores", "rollback", "released"]
    held: bool = Field(description="Scores did not move them.")
    weights: dict[str, dict[str, list[float]]] = Field(
        description="By interval and steps, in the order of the members; intervals that are missing have the published."
    )
    scores: dict[str, dict[str, list[float]]] = Field(
        description="Mean CRPS of each member in the blocks that decided, over the naive forecast's absolute error."
    )


class WeightsAnswer(_Answer):
    """The weights of an ensemble."""

    model: str
    version: str
    members: list[str]
    live: bool = Field(description="Whether scores move them: CANDLECAST_ENSEMBLE_LIVE.")
    half_life_blocks: int = Field(description="After so many blocks of time a score has half its say.")
    published: dict[str, list[float]] = Field(description="By steps: number 0.")
    in_use: list[WeightsInUse] = Field(description="Newest first; empty while the published ones are in use.")


class SettingAnswer(_Answer):
    """A setting in force."""

    variable: str
    value: Any = Field(description="Credentials in a URL as ***.")
    source: Literal["default", "environment", "secret file", "argument"]


class ConfigAnswer(_Answer):
    """Every setting."""

    settings: list[SettingAnswer]


class InferInput(_Request):
    """A tensor that is sent: `data`, flat or nested, or raw bytes after the JSON as `binary_data_size` says."""

    name: Literal["candles", "timestamp"]
    datatype: Literal["FP64", "INT64"]
    shape: list[int] = Field(max_length=2)
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class InferOutput(_Request):
    """A tensor that is asked for."""

    name: Literal["forecast", "timestamp", "levels", "quantiles", "prob_up"]
    parameters: dict[str, Any] = Field({}, description="`binary_data`: raw bytes after the JSON.")


class InferRequest(_Request):
    """A forecast asked for in tensors; none are needed where the candles of the symbol are stored."""

    id: str | None = Field(None, max_length=256)
    parameters: dict[str, Any] = Field(
        {},
        description="`symbol`, and what a POST to /forecast/{symbol} takes but for model, candles and paths;"
        " `quantiles` may be a text with commas; `timeout` are microseconds.",
        examples=[{"symbol": "BTC-USDT", "horizon": 24}],
    )
    inputs: list[InferInput] = Field([], max_length=2)
    outputs: list[InferOutput] | None = Field(None, max_length=5, description="Default: all.")


class TensorAnswer(_Answer):
    """A tensor of a model; -1 in its shape is any length."""

    name: str
    datatype: str
    shape: list[int]


class FilledTensorAnswer(TensorAnswer):
    """A tensor with its values: flat, the last index changing fastest, or raw as `binary_data_size` says."""

    data: list[float] | None = None
    parameters: dict[str, int] | None = None


class InferAnswer(_Answer):
    """A forecast in tensors."""

    model_name: str
    model_version: str
    id: str | None
    parameters: dict[str, Any] = Field(description="symbol, interval, seed, as_of, do_predict, reasons and warnings.")
    outputs: list[FilledTensorAnswer]


class InferModelAnswer(_Answer):
    """What a model takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorAnswer]
    outputs: list[TensorAnswer]


class InferServerAnswer(_Answer):
    """Whom one talks to."""

    name: str
    version: str
    extensions: list[str]


class InferRefusal(_Answer):
    """What is wrong."""

    error: str


class Health(_Answer):
    """The answer to a probe."""

    status: str
    degraded: list[str]

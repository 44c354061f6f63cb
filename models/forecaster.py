"""The contract between the engine and a model: inputs, one batch, forecasts, and prepare / run / finish."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import numpy as np

from models.adapters import NO_ADAPTERS, Adapters
from models.candles import CLOSE, Floats, Millis, TooFewCandles, repair_ohlc

DEFAULT_LEVELS: Final = (0.1, 0.5, 0.9)
QUANTILE_COLUMNS: Final = ("high", "low", "close")


class ModelError(ValueError):
    """The request does not fit the model; `field` is the request field to blame."""

    def __init__(self, detail: str, field: str, code: str = "unsupported_parameter") -> None:
        super().__init__(detail)
        self.field = field
        self.code = code


class InvalidModelOutput(RuntimeError):
    """The network produced something that is not a forecast (NaN, infinity)."""


class Abandoned(RuntimeError):
    """Nobody waits for the batch any more: `run` stopped between two steps."""


@dataclass(frozen=True)
class Sampling:
    """How paths are drawn. `top_k` 0 and `top_p` 1 switch the filters off; both given, they compose.

    `stratified` paths share out each draw's distribution among them (models/uniforms.py): fewer are needed for the
    same error, but they are not independent of each other.
    """

    samples: int = 32
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 0
    stratified: bool = True


@dataclass(frozen=True)
class ForecastInput:
    """One symbol's candles and what is asked of them, already validated."""

    timestamps: Millis  # [T] candle opens, UTC ms
    candles: Floats  # [T, 6] open high low close volume amount
    future_timestamps: Millis  # [H]
    local_times: Millis  # [T + H] exchange-local wall clock in ms, for calendar features
    levels: tuple[float, ...] = DEFAULT_LEVELS
    also: tuple[float, ...] = ()  # levels that nobody asked for, which the forecast must have
    sampling: Sampling = field(default_factory=Sampling)
    aggregate: str = "median"
    seed: int = 0
    with_paths: bool = False

    @property
    def horizon(self) -> int:
        return len(self.future_timestamps)

    @property
    def all_levels(self) -> tuple[float, ...]:
        """The levels of the forecast, rising."""
        return tuple(sorted({*self.levels, *self.also}))

    @property
    def last_close(self) -> float:
        return float(self.candles[-1, CLOSE])


# What a request gets that asks for nothing, by family: steps, and candles taken from a history.
DEFAULT_HORIZON: Final = {"toto": 64, "kronos": 30, "naive": 30, "ensemble": 30}
DEFAULT_LOOKBACK: Final = {"kronos": 64}  # others: all that the version can take


def served_sampling(serving: Mapping[str, Any]) -> Sampling:
    """The sampling of a version whose manifest has these serving defaults."""
    return Sampling(**{name: serving[name] for name in Sampling.__dataclass_fields__ if name in serving})


def usual_lookback(family: str, serving: Mapping[str, Any], most: int) -> int:
    """Candles that a version sees of a history, by its serving defaults; `most` is all that it can."""
    return int(serving.get("lookback", DEFAULT_LOOKBACK.get(family, most)))


def served_aggregate(serving: Mapping[str, Any]) -> str:
    """How a version makes a point of its paths, by its serving defaults."""
    return str(serving.get("aggregate", "median"))


@dataclass(frozen=True)
class Forecast:
    """What a model says about one symbol. Prices and volumes in the units of the candles."""

    point: Floats  # [H, 5] valid candles
    levels: tuple[float, ...]  # Q of them, rising
    quantiles: Mapping[str, Floats]  # high, low, close -> [Q, H]
    prob_up: Floats  # [H] probability that the close lies above the last known close
    step_return_quantiles: Floats | None = None  # [Q, H]; None where the model has no joint distribution
    paths: Floats | None = None  # [S, H, 5]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Limits:
    """What a version can take, in candles."""

    min_context: int
    max_context: int
    max_horizon: int
    max_total: int | None = None  # context + horizon, where positions are shared (Kronos)

    def room(self, horizon: int) -> int:
        """The longest context before `horizon` steps."""
        return self.max_context if self.max_total is None else min(self.max_context, self.max_total - horizon)

    def check(self, item: ForecastInput) -> None:
        """TooFewCandles or ModelError unless `item` fits."""
        context = len(item.candles)
        if context < self.min_context:
            raise TooFewCandles(self.min_context, context)
        if item.horizon > self.max_horizon:
            raise ModelError(f"the model forecasts {self.max_horizon} steps at most", "horizon", "horizon_too_long")
        room = self.room(item.horizon)
        if context > room:
            detail = f"with {item.horizon} steps ahead the model sees {room} candles at most, not {context}"
            raise ModelError(detail, "lookback", "lookback_out_of_range")


@dataclass
class Batch:
    """Padded, static-shape tensors of one bucket, with the inputs they came from (rows beyond them are padding)."""

    inputs: Sequence[ForecastInput]
    tensors: Mapping[str, Any]
    rows: int
    adapters: Adapters = NO_ADAPTERS


Raw = Mapping[str, Any]
Row = Mapping[str, Any]  # arrays, and the adapter of the version that encoded it
Wanted = Callable[[], bool]


def always() -> bool:
    """Somebody waits for the batch."""
    return True


class Forecaster(Protocol):
    """One loaded version. `run` is the only device code; `encode`, `prepare` and `finish` work on the host."""

    family: str
    limits: Limits

    def check(self, item: ForecastInput) -> None:
        """Raise ModelError or TooFewCandles if this version cannot answer `item`: it must not fail in a batch."""
        ...

    def max_rows(self, item: ForecastInput) -> int:
        """How many requests like `item` fit in one batch, whatever the engine would like."""
        ...

    def bucket(self, item: ForecastInput) -> Hashable:
        """Requests with equal buckets may share a batch; a function of the request alone."""
        ...

    def encode(self, item: ForecastInput) -> Row:
        """What `prepare` needs of one request: the part of its work that can be done before the batch is known."""
        ...

    def prepare(self, inputs: Sequence[ForecastInput], rows: Sequence[Row] | None = None) -> Batch:
        """The tensors of one batch; `rows` are the encoded `inputs` where that has been done already."""
        ...

    def run(self, batch: Batch, wanted: Wanted = always) -> Raw:
        """Tensors to tensors. Where it takes several steps it raises Abandoned as soon as `wanted` is false."""
        ...

    def finish(self, raw: Raw, batch: Batch) -> list[Forecast]: ...


def forecast(forecaster: Forecaster, inputs: Sequence[ForecastInput]) -> list[Forecast]:
    """Check, prepare, run and finish `inputs` of one bucket."""
    for item in inputs:
        forecaster.check(item)
    batch = forecaster.prepare(inputs)
    return forecaster.finish(forecaster.run(batch), batch)


def batches(
    forecaster: Forecaster, inputs: Iterable[ForecastInput], rows: int
) -> Iterator[tuple[list[int], list[ForecastInput]]]:
    """Places among `inputs` and the inputs themselves, at most `rows` of one bucket at a time."""
    waiting: dict[Hashable, dict[int, ForecastInput]] = defaultdict(dict)
    for place, item in enumerate(inputs):
        bucket = forecaster.bucket(item)
        waiting[bucket][place] = item
        if len(waiting[bucket]) == rows:
            batch = waiting.pop(bucket)
            yield list(batch), list(batch.values())
    for batch in waiting.values():
        yield list(batch), list(batch.values())


def pad_rows(count: int) -> int:
    """The batch size that holds `count` rows: the next power of two."""
    return 1 << max(0, count - 1).bit_length()


def whole_power(rows: int) -> int:
    """The largest batch size that padding does not push beyond `rows`."""
    return 1 << max(0, rows.bit_length() - 1)


def bucket_of(value: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `value`; ValueError beyond the largest."""
    for bucket in buckets:
        if value <= bucket:
            return bucket
    raise ValueError(f"{value} exceeds the largest bucket, {buckets[-1]}")


def checked(result: Forecast) -> Forecast:
    """`result` with valid candles as its point and rising quantiles; InvalidModelOutput if it is not finite."""
    optional = (result.step_return_quantiles, result.paths)
    arrays = [result.point, result.prob_up, *result.quantiles.values(), *optional]
    if not all(np.isfinite(values).all() for values in arrays if values is not None):
        raise InvalidModelOutput("the model's forecast is not finite")
    return replace(
        result,
        point=repair_ohlc(result.point),
        quantiles={name: np.sort(values, axis=0) for name, values in result.quantiles.items()},
    )

"""The ledger: every served forecast waits for its candles, and each of its steps is scored once.

All keys of a series begin with `cc:1:{SYMBOL:interval}:`. Beside those of the history (service/engine/history.py) are

- `t:<timestamp>`  hash forecast -> step, of the forecasts that wait for the candle that opens then (the target),
- `o`              sorted set of the targets,
- `n`              hash model@version -> its number in this series,
- `b`              hash `<model>:<group>:<block>` -> sums over the scored steps whose targets lie in the block,
- `q`              hash `<model>:<group>` -> logarithm of the band's scale, and the target it was fitted to last.

Exactly once is a matter of state, not of messages: a candle equal to the stored one changes nothing, one that was not
there is scored, another one takes its old scores back and gives new ones. Sums are whole numbers of 1e-9, so the order
of candles and forecasts does not matter. A step is 52 bytes, which keeps the hash of a target in Redis' compact form;
its logarithms are relative to the close at the origin, so a split or an adjusted history moves that one number alone.
The scripts that write all this are service/scripts/*.lua.
"""

import asyncio
import contextlib
import logging
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models import scoring
from models.candles import CLOSE, DAY_MS, Floats, Millis, interval_ms
from models.forecaster import Forecast, ForecastInput
from service.engine.history import slot_ms
from service.engine.revisions import series_stem
from service.metrics import Metrics
from service.state import State, is_lasting, raw

_log = logging.getLogger(__name__)

BAND: Final = (0.1, 0.5, 0.9)  # the quantiles that are scored
_KEPT_MS: Final = 7 * DAY_MS  # how long after it closed a target can still be restated
_SWEPT_MS: Final = DAY_MS  # and how much longer it lies there for a sweep to count it
_STEP: Final = np.dtype(  # as it is sent, behind its target; close and other prices relative to the last close, in logs
    [("target", "<i8"), ("step", "<u2"), ("origin", "<i8"), ("anchor", "<f8"), ("issued", "<u4"), ("values", "<f4", 7)]
)
_ENTRY: Final = struct.Struct("<HHqdI7f")  # as it is kept: the model's number, which Redis gives, in the target's place
_LEVEL: Final = struct.Struct("<dq")
_FARTHEST_LEVEL: Final = math.log(8) + 1e-9
SUMS: Final = np.dtype(
    [
        (name, "<f8")
        for name in (
            *("count", "error", "naive_error", "scaled_error", "scaled_naive_error", "bias"),
            *("covered", "covered_calibrated", "pinball_low", "pinball_high"),
            *("pinball_low_calibrated", "pinball_high_calibrated", "relative_error", "relative_naive_error"),
        )
    ]
)
COUNTS: Final = ("count", "covered", "covered_calibrated")
UNIT: Final = 1e-9  # of every other sum
_FIELD: Final = re.compile(rb"(\d{1,5}):([1-4]):(\d{1,15})")  # of a block's sums: model, group, block


@dataclass(frozen=True)
class Served:
    """A forecast as it was served: closes at BAND, and what scoring needs beside them. `H` steps."""

    symbol: str
    interval: str
    model: str  # name@version
    key: bytes  # equal for answers with one forecast
    origin: int  # opening of the last candle that the model saw, UTC ms
    last_close: float
    issued_at: int
    targets: Millis  # [H] openings of the candles to come
    closes: Millis  # [H] when they close
    band: Floats  # [3, H]
    high: Floats  # [H] medians
    low: Floats  # [H]
    sigma: Floats  # [H] volatility known at the origin times sqrt(step), log-return
    scale: Floats  # [H] of the calibrated band


@dataclass(frozen=True)
class Registered:
    """What became of the steps of a forecast. `foreign`: the history holds another close at the origin."""

    new: int = 0
    duplicate: int = 0
    late: int = 0
    foreign: int = 0


@dataclass(frozen=True)
class Step:
    """One step of a served forecast, as the ledger keeps it; prices."""

    model: str  # name@version
    origin: int  # opening of the last candle that the model saw, UTC ms
    issued_at: int  # the next whole second
    target: int  # opening of the candle that it is about
    step: int
    last_close: float
    low_quantile: float  # of the close, at 0.1
    median: float
    high_quantile: float  # at 0.9
    high: float  # median of the high
    low: float  # median of the low
    scale: float  # of the calibrated band


@dataclass(frozen=True)
class Blocks:
    """Scored steps of one model and group of horizons, by block of time, oldest first."""

    numbers: NDArray[np.int64]  # [N] block = target // (length of a block)
    sums: NDArray[Any]  # [N] of SUMS; errors in log-return, pinball losses too, relative ones per last close


def served_from(
    forecast: Forecast,
    item: ForecastInput,
    *,
    symbol: str,
    interval: str,
    model: str,
    key: bytes,
    issued_at: int,
    closes: Millis,
    scale: Floats,
) -> Served:
    """The ledger's view of a computed forecast; its levels hold BAND."""
    returns = scoring.log_returns(item.candles[:, CLOSE])
    volatility = scoring.ewma_volatility(returns, scoring.SCALE_DECAY)[-1] if len(returns) else 0.0
    rows = [forecast.levels.index(level) for level in BAND]
    middle = forecast.levels.index(0.5)
    return Served(
        symbol=symbol,
        interval=interval,
        model=model,
        key=key,
        origin=int(item.timestamps[-1]),
        last_close=item.last_close,
        issued_at=issued_at,
        targets=item.future_timestamps,
        closes=closes,
        band=forecast.quantiles["close"][rows],
        high=forecast.quantiles["high"][middle],
        low=forecast.quantiles["low"][middle],
        sigma=np.maximum(volatility, scoring.SCALE_FLOOR) * np.sqrt(np.arange(1, item.horizon + 1)),
        scale=scale,
    )


class Ledger:
    """What is waiting and what was scored. Methods raise one of REDIS_ERRORS where Redis fails."""

    def __init__(self, state: State, metrics: Metrics) -> None:
        self._redis = state.redis
        self._metrics = metrics
        self._register = state.script("register")
        self._sweep = state.script("sweep")
        self._known_unreadable: set[str] = set()

    async def register(self, served: Served, now: int) -> Registered:
        """Note every step whose candle has not closed; again, it changes nothing."""
        stem = series_stem(served.symbol, served.interval)
        steps = _steps(served)
        late = len(served.targets) - len(steps)
        arguments: list[Any] = [slot_ms(served.interval), served.model, served.key[:16]]
        arguments += [
            served.origin,
            repr(served.last_close),
            now,
            kept_ms(served.interval) + _SWEPT_MS,
            steps.tobytes(),
        ]
        with self._metrics.redis_operation("ledger_register"):
            reply = await self._register(keys=[stem + "o", stem + "n"], args=arguments)
        if reply is None:
            return Registered(foreign=len(served.targets))
        new, duplicate, stored, unreadable = reply
        self._dropped(stem, unreadable)
        return Registered(new, duplicate, late + stored)

    async def blocks(self, symbol: str, interval: str) -> dict[tuple[str, int], Blocks]:
        """Everything that was scored of a series, by model@version and group of horizons (models/scoring.py)."""
        stem = series_stem(symbol, interval)
        with self._metrics.redis_operation("ledger_read"):
            models, fields = await self._of_models(stem, "b")
        rows: dict[tuple[bytes, bytes], list[tuple[int, bytes]]] = {}
        for field, packed in fields.items():
            match = _FIELD.fullmatch(field)
            if match and len(packed) == SUMS.itemsize:
                rows.setdefault((match[1], match[2]), []).append((int(match[3]), packed))
            else:
                self._unreadable(f"{stem}b {field!r}")
        found = {}
        for (number, group), each in rows.items():
            with self._readable(stem + "b", number):
                found[models[int(number)], int(group) - 1] = self._blocks(stem, sorted(each))
        return found

    async def scales(self, symbol: str, interval: str) -> dict[tuple[str, int], float]:
        """Scales of the calibrated bands of a series, by model@version and group."""
        stem = series_stem(symbol, interval)
        with self._metrics.redis_operation("ledger_scales"):
            models, fields = await self._of_models(stem, "q")
        found = {}
        for owner, packed in fields.items():
            with self._readable(stem + "q", owner):
                number, group = (int(part) for part in owner.split(b":"))
                level, _ = _LEVEL.unpack(packed)
                if not abs(level) <= _FARTHEST_LEVEL:
                    raise ValueError("the scale is none")
                found[models[number], _group(group)] = math.exp(level)
        return found

    async def steps(self, symbol: str, interval: str, as_of: int) -> list[Step]:
        """Every kept step of the forecasts that had been issued by an instant, in order of issue and step."""
        stem = series_stem(symbol, interval)
        with self._metrics.redis_operation("ledger_steps"):
            members = raw(await self._redis.zrange(stem + "o", 0, -1))
            targets = [int(member) for member in members if member.isdigit()]
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.hgetall(stem + "n")
            for target in targets:
                pipeline.hvals(f"{stem}t:{target}")
            names, *waiting = await pipeline.execute(raise_on_error=False)
        return await asyncio.to_thread(self._known_steps, stem, targets, names, waiting, as_of)

    async def sweep(self, symbol: str, interval: str, now: int) -> tuple[int, int]:
        """Forget targets too old to be restated: how many, and how many of their steps never had a candle."""
        keys = [series_stem(symbol, interval) + "o"]
        with self._metrics.redis_operation("ledger_sweep"):
            forgotten, expired = await self._sweep(keys=keys, args=[slot_ms(interval), now - kept_ms(interval)])
        self._metrics.ledger_steps.labels("expired").inc(expired)
        return forgotten, expired

    def _blocks(self, stem: str, rows: list[tuple[int, bytes]]) -> Blocks:
        sums = np.frombuffer(b"".join(packed for _, packed in rows), SUMS).copy()
        finite = np.isfinite(sums.view(np.float64).reshape(len(rows), -1)).all(axis=1)
        for row in np.flatnonzero(~finite):
            self._unreadable(f"{stem}b block {rows[row][0]}")
        for name in SUMS.names or ():
            if name not in COUNTS:
                sums[name] *= UNIT
        return Blocks(np.array([number for number, _ in rows], dtype=np.int64)[finite], sums[finite])

    def _known_steps(
        self, stem: str, targets: Sequence[int], names: Any, waiting: Sequence[Any], as_of: int
    ) -> list[Step]:
        models = self._names(stem, names)
        found = []
        for target, packed in self._flat(stem, targets, waiting):
            with self._readable(stem + "t", b"%d" % target):
                found.append(_step(models, target, packed))
        known = [step for step in found if step.issued_at <= as_of]
        return sorted(known, key=lambda step: (step.issued_at, step.model, step.origin, step.step))

    # -- damage: what is no part of a ledger is left out, counted and logged once --------------------

    async def _of_models(self, stem: str, kind: str) -> tuple[dict[int, str], dict[bytes, bytes]]:
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.hgetall(stem + "n")
        pipeline.hgetall(stem + kind)
        names, fields = await pipeline.execute(raise_on_error=False)
        return self._names(stem, names), dict(self._reply(stem + kind, fields, {}))

    def _names(self, stem: str, reply: Any) -> dict[int, str]:
        found = {}
        for name, number in self._reply(stem + "n", reply, {}).items():
            with self._readable(stem + "n", name):
                found[int(number)] = name.decode()
        return found

    def _flat(self, stem: str, targets: Sequence[int], replies: Sequence[Any]) -> Iterator[tuple[int, bytes]]:
        for target, reply in zip(targets, replies, strict=True):
            for packed in self._reply(f"{stem}t:{target}", reply, ()):
                yield target, packed

    def _reply(self, key: str, reply: Any, nothing: Any) -> Any:
        """A reply of a pipeline, `nothing` where the key holds something of another kind."""
        if not isinstance(reply, Exception):
            return reply
        if not is_lasting(reply):
            raise reply
        self._unreadable(key)
        return nothing

    @contextlib.contextmanager
    def _readable(self, key: str, field: bytes) -> Iterator[None]:
        try:
            yield
        except (ValueError, LookupError, OverflowError, struct.error):
            self._unreadable(f"{key} {field!r}")

    def _unreadable(self, place: str) -> None:
        if place not in self._known_unreadable:
            self._known_unreadable.add(place)
            self._dropped(place, 1)

    def _dropped(self, place: str, count: int) -> None:
        if count:
            _log.error("%d unreadable entries of the ledger were dropped: %s", count, place)
            self._metrics.ledger_steps.labels("unreadable").inc(count)


def kept_ms(interval: str) -> int:
    """How long after its candle opened a target is kept: a week from when the latest candle of the interval closes."""
    return _KEPT_MS + 2 * interval_ms(interval)


def _steps(served: Served) -> NDArray[Any]:
    """Those whose candle had not closed when the forecast was issued, packed."""
    anchor = math.log(served.last_close)
    steps = np.empty(len(served.targets), _STEP)
    steps["target"] = served.targets
    steps["step"] = np.arange(1, len(steps) + 1)
    steps["origin"], steps["anchor"], steps["issued"] = served.origin, anchor, -(-served.issued_at // 1000)
    prices = np.vstack([served.band[[1, 0, 2]], served.high, served.low])
    steps["values"] = np.vstack([np.log(prices) - anchor, 1 / served.sigma, served.scale]).T
    return steps[served.closes > served.issued_at]


def _step(models: Mapping[int, str], target: int, packed: bytes) -> Step:
    number, step, origin, anchor, issued, middle, low, high, top, bottom, _, scale = _ENTRY.unpack(packed)
    middle, low, high, top, bottom = (math.exp(anchor + each) for each in (middle, low, high, top, bottom))
    return Step(
        model=models[number],
        origin=origin,
        issued_at=1000 * issued,
        target=target,
        step=step,
        last_close=math.exp(anchor),
        low_quantile=low,
        median=middle,
        high_quantile=high,
        high=top,
        low=bottom,
        scale=scale,
    )


def _group(stored: int) -> int:
    """As models/scoring.py counts them; scripts count from one."""
    if not 1 <= stored <= len(scoring.GROUPS):
        raise ValueError("there is no such group")
    return stored - 1

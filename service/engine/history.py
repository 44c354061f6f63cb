"""Candle history in Redis: blocks of 500 fixed slots, so that a candle has one place whenever it arrives.

`cc:1:{SYMBOL:interval}:c:<block>` holds 56-byte records (timestamp, then the six columns, little-endian); the
slot of a candle is `timestamp // unit`, whatever its calendar: closed hours cost empty slots, and blocks
without candles do not exist. The unit is the interval, or for intraday candles what the interval and an hour have
in common, since a session or the hours after a lunch break may begin a new grid. A zero timestamp is an empty
slot. Beside the blocks lie

- `cc:1:{SYMBOL:interval}:i`  sorted set of the blocks that exist,
- `cc:1:{SYMBOL:interval}:r`  the revision (revisions.py): the mark of the last write, whatever it wrote,
- `cc:1:{SYMBOL:interval}:e`  list of restatements and splits, as JSON,
- the forecasts that wait for candles, and what they were worth (service/score/ledger.py),
- `cc:1:{SYMBOL}:s`           hash interval -> calendar, prefixed `auto:` where it was inferred,
- `cc:1:first`, `cc:1:last`   sorted sets `SYMBOL:interval` -> its oldest and newest timestamp.

A candle is written, and the forecasts that it closes are scored, in one step (service/scripts/put.lua). Every write is
idempotent. Writes of different candles commute; of two restatements of one candle the later holds.
"""

import contextlib
import json
import logging
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from models.candles import CLOSE, DAY_MS, PRICES, VOLUME, Floats, Millis, interval_ms
from service.engine.revisions import Revision, revision_key, series_key, series_stem
from service.metrics import Metrics
from service.state import REDIS_ERRORS, State, raw

_log = logging.getLogger(__name__)

SLOTS: Final = 500
RECORD: Final = np.dtype([("timestamp", "<i8"), ("candle", "<f8", (6,))])
_HOUR_MS: Final = 3_600_000
_TRIES: Final = 5  # of a split, between which somebody wrote
_AUTO: Final = "auto:"
_AT_ONCE: Final = 2000  # candles in one step of a put


class HistoryUnavailable(RuntimeError):
    """Redis does not answer, or what it holds is damaged."""


class UnknownSymbol(LookupError):
    """No candles of the symbol are stored."""


@dataclass(frozen=True)
class PutCounts:
    """What the candles of one put were, and how many steps of forecasts they scored, or scored anew.

    `quarantined` ones, which would move a stored close by more than a factor of 1.2, were left out.
    """

    new: int = 0
    duplicate: int = 0
    restated: int = 0
    quarantined: int = 0
    scored: int = 0
    rescored: int = 0


@dataclass(frozen=True)
class StoredCalendar:
    """The calendar of a stored series; `inferred` ones are inferred anew at every put."""

    name: str
    inferred: bool


@dataclass(frozen=True)
class StoredSeries:
    """One line of the list of symbols; `first` and `last` are candle opens."""

    symbol: str
    interval: str
    calendar: str
    first: int
    last: int


class History:
    """Stored candles by symbol and interval. Every method raises HistoryUnavailable when Redis fails."""

    def __init__(self, state: State, metrics: Metrics) -> None:
        self._redis = state.redis
        self._line = state.line
        self._metrics = metrics
        self._put = state.script("put")
        self._put_whole = state.script("put", takes_long=True)

    async def put(
        self, symbol: str, interval: str, timestamps: Millis, candles: Floats, calendar: StoredCalendar
    ) -> PutCounts:
        """Store `[T]` timestamps with `[T, 6]` candles; one that is stored already is overwritten in place."""
        records = _records(timestamps, candles)
        counts = PutCounts()
        with self._operation("history_put"):
            for first in range(0, len(records), _AT_ONCE):
                part = await self._write(symbol, interval, records[first : first + _AT_ONCE], "ingest")
                counts = PutCounts(*np.add(astuple(counts), astuple(part or PutCounts())).tolist())
            await self._describe(symbol, interval, int(timestamps[0]), int(timestamps[-1]), calendar)
        return counts

    async def restate(
        self, symbol: str, interval: str, timestamps: Millis, candles: Floats, calendar: StoredCalendar, *, now: int
    ) -> PutCounts:
        """As `put`, in one step and without quarantine: forecasts follow the closes at their origins."""
        span = {"first": int(timestamps[0]), "last": int(timestamps[-1]), "candles": len(timestamps)}
        event = json.dumps({"at": now, "kind": "restated", **span})
        with self._operation("history_restate"):
            counts = await self._write(symbol, interval, _records(timestamps, candles), "restate", event=event)
            await self._describe(symbol, interval, int(timestamps[0]), int(timestamps[-1]), calendar)
        return counts or PutCounts()

    async def split(self, symbol: str, interval: str, factor: float, before: int, *, now: int) -> PutCounts:
        """Divide the prices of all candles that open before an instant, and multiply their volumes; in one step.

        A split that is among the series' events was made before and changes nothing.
        """
        split = {"kind": "split", "factor": factor, "before": before}
        event = json.dumps({"at": now, **split})
        with self._operation("history_split"):
            for _ in range(_TRIES):
                mark = raw(await self._redis.get(revision_key(symbol, interval)))
                if any(split.items() <= each.items() for each in await self.events(symbol, interval)):
                    return PutCounts()
                records = await self._stored_before(symbol, interval, before)
                records["candle"][:, PRICES] /= factor
                records["candle"][:, VOLUME] *= factor  # the amount, price times volume, stays
                counts = await self._write(symbol, interval, records, "restate", mark, event)
                if counts is not None:
                    return counts
        raise HistoryUnavailable("the candles were written to, again and again, while they were split")

    async def read(
        self, symbol: str, interval: str, count: int, before: int | None = None, *, damaged: bool = False
    ) -> tuple[Millis, Floats]:
        """The newest `count` candles that open before an instant: `[T]` timestamps, `[T, 6]` candles, T <= count.

        HistoryUnavailable if one is damaged, unless `damaged` ones are to be left out.
        """
        newest = "+inf" if before is None else str(before // slot_ms(interval) // SLOTS)
        found: list[NDArray[Any]] = []
        total, skip, wanted = 0, 0, count // SLOTS + 2
        with self._operation("history_read"):
            while total < count:
                index = await self._redis.zrevrangebyscore(_index_key(symbol, interval), newest, "-inf", skip, wanted)
                if index:
                    blocks = [int(block) for block in reversed(raw(index))]
                    packed = await self._packed(symbol, interval, blocks)
                    found.insert(0, _decode(packed, slot_ms(interval), before, damaged))
                    total += len(found[0])
                if len(index) < wanted:
                    break
                skip, wanted = skip + wanted, 2 * wanted
        records = np.concatenate(found)[-count:] if found else np.empty(0, RECORD)
        return records["timestamp"].astype(np.int64), records["candle"].astype(np.float64)

    async def calendars(self, symbol: str) -> dict[str, StoredCalendar]:
        """Interval to calendar of what is stored for the symbol, empty if nothing is."""
        with self._operation("history_calendars"):
            stored = await self._redis.hgetall(series_key(symbol))
            return {interval.decode(): _calendar(name.decode()) for interval, name in raw(stored.items())}

    async def revision(self, symbol: str, interval: str) -> Revision | None:
        """What changes with every write to the series; None where nothing is stored or Redis does not answer soon."""
        with contextlib.suppress(*REDIS_ERRORS), self._metrics.redis_operation("history_revision"):
            calendars, mark = await self._line.ask(
                ("HGETALL", series_key(symbol)), ("GET", revision_key(symbol, interval))
            )
            return Revision(calendars, mark) if mark else None
        return None

    async def symbols(self) -> list[StoredSeries]:
        """Everything that is stored, by symbol and interval."""
        with self._operation("history_symbols"):
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.zrange("cc:1:first", 0, -1, withscores=True)
            pipeline.zrange("cc:1:last", 0, -1, withscores=True)
            oldest, newest = (dict(pairs) for pairs in await pipeline.execute())
            members = sorted(newest)
            pipeline = self._redis.pipeline(transaction=False)
            for member in members:
                symbol, _, interval = member.decode(errors="replace").rpartition(":")
                pipeline.hget(series_key(symbol), interval)
            names = await pipeline.execute(raise_on_error=False) if members else []
        return [
            _stored_series(member, name, oldest, newest)
            for member, name in zip(members, names, strict=True)
            if isinstance(name, bytes)  # not None or an error: one damaged entry must not hide the others
        ]

    async def events(self, symbol: str, interval: str) -> list[dict[str, Any]]:
        """Restatements and splits of a series, the newest thousand, oldest first."""
        with self._operation("history_events"):
            found = raw(await self._redis.lrange(series_stem(symbol, interval) + "e", 0, -1))
            return [json.loads(each) for each in found]

    async def _write(
        self,
        symbol: str,
        interval: str,
        records: NDArray[Any],
        mode: Literal["ingest", "restate"],
        expected: bytes = b"",
        event: str = "",
    ) -> PutCounts | None:
        """One run of the script; None where the revision is not the expected one."""
        stem = series_stem(symbol, interval)
        mark = secrets.token_bytes(8)  # with the instant, or an attempt sent twice would mark twice
        keys = [stem + kind for kind in ("i", "r", "b", "q", "o")]
        settings = [mode, expected, mark, interval_ms(interval), slot_ms(interval), event]
        script = self._put_whole if mode == "restate" else self._put
        reply = await script(keys=keys, args=[*settings, records.tobytes()])
        if reply is None:
            return None
        *counts, unreadable = reply
        if unreadable:
            _log.error("%d unreadable entries of the ledger were dropped: %s", unreadable, stem)
            self._metrics.ledger_steps.labels("unreadable").inc(unreadable)
        return PutCounts(*counts)

    async def _stored_before(self, symbol: str, interval: str, instant: int) -> NDArray[Any]:
        """Every record that opens before an instant."""
        blocks = [int(block) for block in raw(await self._redis.zrange(_index_key(symbol, interval), 0, -1))]
        packed = await self._packed(symbol, interval, blocks) if blocks else {}
        return _decode(packed, slot_ms(interval), instant).copy()

    async def _packed(self, symbol: str, interval: str, blocks: Sequence[int]) -> dict[int, bytes]:
        """Those of some blocks that exist."""
        found = raw(await self._redis.mget([_block_key(symbol, interval, block) for block in blocks]))
        return {block: packed for block, packed in zip(blocks, found, strict=True) if packed}

    @contextlib.contextmanager
    def _operation(self, op: str) -> Iterator[None]:
        with self._metrics.redis_operation(op):
            try:
                yield
            except REDIS_ERRORS as error:
                raise HistoryUnavailable("the candle history does not answer") from error
            except ValueError as error:
                raise HistoryUnavailable("what is stored of the symbol is damaged") from error

    async def _describe(self, symbol: str, interval: str, first: int, last: int, calendar: StoredCalendar) -> None:
        member = f"{symbol}:{interval}"
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.hset(series_key(symbol), interval, (_AUTO if calendar.inferred else "") + calendar.name)
        pipeline.zadd("cc:1:first", {member: first}, lt=True)
        pipeline.zadd("cc:1:last", {member: last}, gt=True)
        await pipeline.execute()


def _block_key(symbol: str, interval: str, block: int) -> str:
    return f"{series_stem(symbol, interval)}c:{block}"


def _index_key(symbol: str, interval: str) -> str:
    return series_stem(symbol, interval) + "i"


def _calendar(stored: str) -> StoredCalendar:
    return StoredCalendar(stored.removeprefix(_AUTO), stored.startswith(_AUTO))


def _stored_series(member: bytes, name: bytes, oldest: dict[bytes, float], newest: dict[bytes, float]) -> StoredSeries:
    symbol, _, interval = member.decode().rpartition(":")
    calendar = _calendar(name.decode(errors="replace")).name
    return StoredSeries(symbol, interval, calendar, int(oldest.get(member, newest[member])), int(newest[member]))


def slot_ms(interval: str) -> int:
    """No two candles of one calendar share a slot so long: where a market pauses, it does so for an hour at least."""
    step = interval_ms(interval)
    return step if step >= DAY_MS else math.gcd(step, _HOUR_MS)


def _records(timestamps: Millis, candles: Floats) -> NDArray[Any]:
    records = np.empty(len(timestamps), RECORD)
    records["timestamp"] = timestamps
    records["candle"] = candles
    return records


def _decode(blocks: Mapping[int, bytes], unit: int, before: int | None, damaged: bool = False) -> NDArray[Any]:
    """The candles in some blocks, oldest first; without `damaged` ones, or HistoryUnavailable if there are any."""
    whole = {block: min(len(packed) // RECORD.itemsize, SLOTS) for block, packed in blocks.items()}
    records = np.frombuffer(b"".join(blocks[block][: RECORD.itemsize * whole[block]] for block in blocks), RECORD)
    slots = [np.arange(SLOTS * block, SLOTS * block + count) for block, count in whole.items()]
    filled = records["timestamp"] != 0
    candles = records["candle"]
    valid = filled & np.isfinite(candles).all(axis=1) & (candles[:, CLOSE] > 0)
    if slots:
        valid &= records["timestamp"] // unit == np.concatenate(slots)
    complete = all(len(packed) == RECORD.itemsize * whole[block] for block, packed in blocks.items())
    if not (damaged or (complete and (valid == filled).all())):
        raise HistoryUnavailable("stored candles are damaged: put them again")
    if before is not None:
        valid &= records["timestamp"] < before
    kept: NDArray[Any] = records[valid]
    return kept

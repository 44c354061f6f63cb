"""Candle history in Redis: blocks of 500 fixed slots, so that a candle has one place whenever it arrives.

`cc:1:{SYMBOL:interval}:c:<block>` holds 56-byte records (timestamp, then the six columns, little-endian); the
slot of a candle is `timestamp // unit`, whatever its calendar: closed hours cost empty slots, and blocks
without candles do not exist. The unit is the interval, or for intraday candles what the interval and an hour have
in common, since a session or the hours after a lunch break may begin a new grid. A zero timestamp is an empty
slot. Beside the blocks lie

- `cc:1:{SYMBOL:interval}:i`  sorted set of the blocks that exist,
- `cc:1:{SYMBOL:interval}:r`  the revision (revisions.py): the mark of the last write, whatever it wrote,
- `cc:1:{SYMBOL}:s`           hash interval -> calendar, prefixed `auto:` where it was inferred,
- `cc:1:first`, `cc:1:last`   sorted sets `SYMBOL:interval` -> its oldest and newest timestamp.

Every write is idempotent. Writes of different candles commute; of two restatements of one candle the later holds.
"""

import contextlib
import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.candles import DAY_MS, Floats, Millis, interval_ms
from service.engine.revisions import Revision, revision_key, series_key
from service.metrics import Metrics
from service.state import REDIS_ERRORS, State

SLOTS: Final = 500
RECORD: Final = np.dtype([("timestamp", "<i8"), ("candle", "<f8", (6,))])
_HOUR_MS: Final = 3_600_000
_AUTO: Final = "auto:"

# Atomic per block, so that concurrent writers of one block neither lose a candle nor count it twice.
_PUT_BLOCK: Final = """
local mark = table.remove(ARGV)
local empty = string.rep('\\0', 8)
local new, duplicate, restated = 0, 0, 0
for i = 1, #ARGV - 1, 2 do
  local offset, record = tonumber(ARGV[i]), ARGV[i + 1]
  local old = redis.call('GETRANGE', KEYS[1], offset, offset + #record - 1)
  if old == record then
    duplicate = duplicate + 1
  else
    if old == '' or string.sub(old, 1, 8) == empty then new = new + 1 else restated = restated + 1 end
    redis.call('SETRANGE', KEYS[1], offset, record)
  end
end
redis.call('ZADD', KEYS[2], ARGV[#ARGV], ARGV[#ARGV])
local now = redis.call('TIME')
redis.call('SET', KEYS[3], mark .. now[1] .. '.' .. now[2])
return {new, duplicate, restated}
"""


class HistoryUnavailable(RuntimeError):
    """Redis does not answer, or what it holds is damaged."""


class UnknownSymbol(LookupError):
    """No candles of the symbol are stored."""


@dataclass(frozen=True)
class PutCounts:
    """What the candles of one put were."""

    new: int
    duplicate: int
    restated: int


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
        self._put_block = state.redis.register_script(_PUT_BLOCK)

    async def put(
        self, symbol: str, interval: str, timestamps: Millis, candles: Floats, calendar: StoredCalendar
    ) -> PutCounts:
        """Store `[T]` timestamps with `[T, 6]` candles; one that is stored already is overwritten in place."""
        records = np.empty(len(timestamps), RECORD)
        records["timestamp"] = timestamps
        records["candle"] = candles
        mark = revision_key(symbol, interval)
        with self._operation("history_put"):
            counts = [
                await self._put_block(
                    keys=[_block_key(symbol, interval, block), _index_key(symbol, interval), mark],
                    args=[*a, secrets.token_bytes(8)],  # with the instant, or an attempt sent twice would mark twice
                )
                for block, a in _block_arguments(records, _slot_ms(interval))
            ]
            await self._describe(symbol, interval, int(timestamps[0]), int(timestamps[-1]), calendar)
        return PutCounts(*(int(total) for total in np.sum(counts, axis=0)))

    async def read(self, symbol: str, interval: str, count: int, before: int | None = None) -> tuple[Millis, Floats]:
        """The newest `count` candles that open before an instant: `[T]` timestamps, `[T, 6]` candles, T <= count."""
        newest = "+inf" if before is None else str(before // _slot_ms(interval) // SLOTS)
        found: list[NDArray[Any]] = []
        total, skip, wanted = 0, 0, count // SLOTS + 2
        with self._operation("history_read"):
            while total < count:
                index = await self._redis.zrevrangebyscore(_index_key(symbol, interval), newest, "-inf", skip, wanted)
                if index:
                    keys = [_block_key(symbol, interval, int(block)) for block in reversed(_raw(index))]
                    found.insert(0, _decode(_raw(await self._redis.mget(keys)), before))
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
        return {interval.decode(): _calendar(name.decode()) for interval, name in _raw(stored.items())}

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
            members = sorted(member.decode() for member in newest)
            pipeline = self._redis.pipeline(transaction=False)
            for member in members:
                symbol, _, interval = member.rpartition(":")
                pipeline.hget(series_key(symbol), interval)
            names = await pipeline.execute() if members else []
        return [
            _stored_series(member, name, oldest, newest) for member, name in zip(members, names, strict=True) if name
        ]

    @contextlib.contextmanager
    def _operation(self, op: str) -> Iterator[None]:
        with self._metrics.redis_operation(op):
            try:
                yield
            except REDIS_ERRORS as error:
                raise HistoryUnavailable("the candle history does not answer") from error

    async def _describe(self, symbol: str, interval: str, first: int, last: int, calendar: StoredCalendar) -> None:
        member = f"{symbol}:{interval}"
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.hset(series_key(symbol), interval, (_AUTO if calendar.inferred else "") + calendar.name)
        pipeline.zadd("cc:1:first", {member: first}, lt=True)
        pipeline.zadd("cc:1:last", {member: last}, gt=True)
        await pipeline.execute()


def _raw(reply: Any) -> Any:
    """A reply of a client that decodes nothing: bytes, which redis-py's types do not say."""
    return reply


def _block_key(symbol: str, interval: str, block: int) -> str:
    return f"cc:1:{{{symbol}:{interval}}}:c:{block}"


def _index_key(symbol: str, interval: str) -> str:
    return f"cc:1:{{{symbol}:{interval}}}:i"


def _calendar(stored: str) -> StoredCalendar:
    return StoredCalendar(stored.removeprefix(_AUTO), stored.startswith(_AUTO))


def _stored_series(member: str, name: bytes, oldest: dict[bytes, float], newest: dict[bytes, float]) -> StoredSeries:
    symbol, _, interval = member.rpartition(":")
    key = member.encode()
    first = int(oldest.get(key, newest[key]))
    return StoredSeries(symbol, interval, _calendar(name.decode()).name, first, int(newest[key]))


def _slot_ms(interval: str) -> int:
    """No two candles of one calendar share a slot so long: where a market pauses, it does so for an hour at least."""
    step = interval_ms(interval)
    return step if step >= DAY_MS else math.gcd(step, _HOUR_MS)


def _block_arguments(records: NDArray[Any], unit: int) -> list[tuple[int, list[int | bytes]]]:
    """Per block the script's arguments: offset and record of each candle, then the block's number."""
    slots = records["timestamp"] // unit
    blocks, starts = np.unique(slots // SLOTS, return_index=True)
    arguments = []
    for block, rows in zip(blocks, np.split(np.arange(len(records)), starts[1:]), strict=True):
        pairs: list[int | bytes] = []
        for row in rows:
            pairs += [int(slots[row] % SLOTS) * RECORD.itemsize, records[row].tobytes()]
        arguments.append((int(block), [*pairs, int(block)]))
    return arguments


def _decode(blocks: Sequence[bytes | None], before: int | None) -> NDArray[Any]:
    """The candles in some blocks, oldest first."""
    packed = b"".join(block for block in blocks if block)
    if any(block and len(block) % RECORD.itemsize for block in blocks):
        raise HistoryUnavailable("a stored block of candles is damaged")
    records = np.frombuffer(packed, RECORD)
    wanted = records["timestamp"] > 0
    if before is not None:
        wanted &= records["timestamp"] < before
    return records[wanted]

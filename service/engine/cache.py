"""Forecasts that still hold: in memory, and behind that in Redis, where they outlive a restart and are shared.

`cc:1:f:<slot>` holds one forecast: digest of what it is a forecast of, when it expires, rows of its batch, a
checksum, the JSON of its answer. The slot is the beginning of the digest, so that Redis never holds more than SLOTS of
them, whatever it does when its memory is full; where two meet, the newer stays.
"""

import asyncio
import contextlib
import hashlib
import struct
import time
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import numpy as np

from models.forecaster import ForecastInput
from service.engine.registry import LoadedModel
from service.metrics import Metrics
from service.state import REDIS_ERRORS, State

SLOTS: Final = 4096
_HEADER: Final = struct.Struct("<32sqiI")
_LARGEST_IN_REDIS: Final = 64 * 1024
_LARGEST_SHARE: Final = 1 / 16  # of the memory, for one forecast
_PAUSE_SECONDS: Final = 1.0  # without Redis after it failed
_AFTER_SECONDS: Final = 0.02  # until a write begins, so that the answer goes first, and the next request of its caller
_MOST_WRITES: Final = 64  # under way at a time


@dataclass(frozen=True)
class Kept:
    """What every answer with one forecast has in common."""

    valid_until: int  # UTC ms
    batch_rows: int
    body: bytes  # JSON


def forecast_key(model: LoadedModel, item: ForecastInput, *facts: object) -> bytes:
    """A digest of all that a forecast depends on; `facts` are those that `item` does not hold."""
    digest = hashlib.sha256()  # processors have instructions for it
    values = vars(item).values()
    arrays = [np.ascontiguousarray(value) for value in values if isinstance(value, np.ndarray)]
    rest = [value for value in values if not isinstance(value, np.ndarray)]
    shapes = [(array.shape, array.dtype.str) for array in arrays]
    digest.update(repr((*model.executed, rest, shapes, facts)).encode())
    for array in arrays:
        digest.update(array.data)
    return digest.digest()


class Cache:
    """Least recently used first out, bounded by bytes. Redis is asked only where memory does not know."""

    def __init__(self, state: State, max_bytes: int, metrics: Metrics) -> None:
        self._state = state
        self._metrics = metrics
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()
        self._bytes = 0
        self._paused_until = 0.0
        self._under_way: set[asyncio.Task[None]] = set()

    async def get(self, key: bytes, now: int) -> Kept | None:
        """The forecast of that key unless it has expired. Redis costs milliseconds at worst, never an error."""
        if kept := self.at_hand(key, now):
            return kept
        kept = await self._ask_redis(key) if self._max_bytes and self._redis_answers else None
        if kept is None or kept.valid_until <= now:
            return None
        self._remember(key, kept)
        return kept

    def at_hand(self, key: bytes, now: int) -> Kept | None:
        """The forecast of that key if it is in memory and has not expired."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        if kept.valid_until <= now:
            self._forget(key)
            return None
        self._kept.move_to_end(key)
        return kept

    def put(self, key: bytes, kept: Kept, now: int) -> None:
        """Keep a forecast; Redis gets it while the caller goes on."""
        known = self._kept.get(key)  # requests that shared one computation all come with it
        if known is not None and known.valid_until > now:
            return
        if len(kept.body) > self._max_bytes * _LARGEST_SHARE:
            return
        self._remember(key, kept)
        if len(kept.body) <= _LARGEST_IN_REDIS and self._redis_answers and len(self._under_way) < _MOST_WRITES:
            writing = asyncio.create_task(self._write(key, kept, kept.valid_until - now))
            self._under_way.add(writing)
            writing.add_done_callback(self._under_way.discard)

    async def stop(self) -> None:
        """Wait for what is on its way to Redis."""
        if self._under_way:
            await asyncio.wait(self._under_way)

    def _remember(self, key: bytes, kept: Kept) -> None:
        self._forget(key)
        self._kept[key] = kept
        self._bytes += len(kept.body)
        while self._bytes > self._max_bytes:
            self._forget(next(iter(self._kept)))
        self._metrics.cache_bytes.set(self._bytes)

    def _forget(self, key: bytes) -> None:
        if (kept := self._kept.pop(key, None)) is not None:
            self._bytes -= len(kept.body)

    @property
    def _redis_answers(self) -> bool:
        return self._state.up and time.monotonic() >= self._paused_until

    async def _ask_redis(self, key: bytes) -> Kept | None:
        with contextlib.suppress(*REDIS_ERRORS):
            with self._metrics.redis_operation("cache_read"):
                (packed,) = await self._state.line.ask(("GET", _slot(key)))
            return _unpack(packed, key)
        self._pause()
        return None

    async def _write(self, key: bytes, kept: Kept, milliseconds: int) -> None:
        await asyncio.sleep(_AFTER_SECONDS)
        with contextlib.suppress(*REDIS_ERRORS):
            with self._metrics.redis_operation("cache_write"):
                await self._state.redis.set(_slot(key), _pack(key, kept), px=milliseconds)
            return
        self._pause()

    def _pause(self) -> None:
        self._paused_until = time.monotonic() + _PAUSE_SECONDS


def _slot(key: bytes) -> str:
    return f"cc:1:f:{int.from_bytes(key[:4], 'big') % SLOTS}"


def _pack(key: bytes, kept: Kept) -> bytes:
    return _HEADER.pack(key, kept.valid_until, kept.batch_rows, zlib.crc32(kept.body)) + kept.body


def _unpack(packed: bytes | None, key: bytes) -> Kept | None:
    """What `_pack` packed, None if it was for another key or is damaged."""
    if packed is None or len(packed) <= _HEADER.size:
        return None
    owner, valid_until, batch_rows, checksum = _HEADER.unpack_from(packed)
    body = packed[_HEADER.size :]
    return Kept(valid_until, batch_rows, body) if owner == key and checksum == zlib.crc32(body) else None

"""Candle history: every candle has one place, whenever and however often it arrives."""

import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from models.calendars import get_calendar
from service.engine.history import History, HistoryUnavailable, PutCounts, StoredCalendar
from service.metrics import Metrics
from service.state import State

pytestmark = pytest.mark.anyio

HOUR = 3_600_000
DAILY = StoredCalendar("24/7", inferred=True)


@pytest.fixture
async def state(tmp_path: Path) -> AsyncIterator[State]:
    running = State(None, tmp_path, Metrics(CollectorRegistry()))
    await running.start()
    yield running
    await running.stop()


@pytest.fixture
def history(state: State) -> History:
    return History(state, Metrics(CollectorRegistry()))


def series(count: int, first: int = 1_700_000_000_000 // HOUR) -> tuple[Any, Any]:
    timestamps = (first + np.arange(count, dtype=np.int64)) * HOUR
    return timestamps, np.random.default_rng(count).uniform(1, 2, (count, 6))


async def put(history: History, timestamps: Any, candles: Any) -> PutCounts:
    return await history.put("BTC", "1h", timestamps, candles, DAILY)


async def test_candles_come_back_bit_for_bit(history: History) -> None:
    timestamps, candles = series(4096)
    assert await put(history, timestamps, candles) == PutCounts(4096, 0, 0)
    stored = await history.read("BTC", "1h", 4096)
    assert (stored[0] == timestamps).all()
    assert (stored[1] == candles).all()


async def test_sending_again_changes_nothing(history: History) -> None:
    timestamps, candles = series(700)
    await put(history, timestamps, candles)
    assert await put(history, timestamps, candles) == PutCounts(0, 700, 0)
    assert len((await history.read("BTC", "1h", 5000))[0]) == 700


async def test_a_restated_candle_is_replaced_in_place(history: History) -> None:
    timestamps, candles = series(700)
    await put(history, timestamps, candles)
    restated = candles.copy()
    restated[[3, 650]] *= 1.1
    assert await put(history, timestamps, restated) == PutCounts(0, 698, 2)
    stored = await history.read("BTC", "1h", 700)
    assert (stored[0] == timestamps).all()
    assert (stored[1] == restated).all()


async def test_the_order_of_arrival_does_not_matter(history: History) -> None:
    timestamps, candles = series(1500)
    for part in np.array_split(np.random.default_rng(5).permutation(1500), 7):
        rows = np.sort(part)
        assert await put(history, timestamps[rows], candles[rows]) == PutCounts(len(rows), 0, 0)
    stored = await history.read("BTC", "1h", 1500)
    assert (stored[0] == timestamps).all()
    assert (stored[1] == candles).all()


async def test_the_newest_before_an_instant_are_read(history: History) -> None:
    timestamps, candles = series(1500)
    await put(history, timestamps, candles)
    stored = await history.read("BTC", "1h", 10, before=int(timestamps[777]))
    assert (stored[0] == timestamps[767:777]).all()
    assert (stored[1] == candles[767:777]).all()
    assert len((await history.read("BTC", "1h", 10, before=int(timestamps[0])))[0]) == 0


async def test_a_sparse_history_is_read_across_its_holes(history: History) -> None:
    hours, candles = series(4000)
    sparse = hours * 9
    await put(history, sparse, candles)
    stored = await history.read("BTC", "1h", 3000)
    assert (stored[0] == sparse[-3000:]).all()
    assert (stored[1] == candles[-3000:]).all()


@pytest.mark.parametrize(("calendar", "interval"), [("CMES", "50m"), ("XHKG", "90m"), ("XTKS", "4h"), ("XNYS", "1d")])
async def test_every_candle_of_a_calendar_has_its_own_slot(history: History, calendar: str, interval: str) -> None:
    first = np.array([int(np.datetime64("2012-03-08", "ms").astype(np.int64))])
    timestamps = get_calendar(calendar).following(first, interval, 2500)
    candles = np.random.default_rng(1).uniform(1, 2, (2500, 6))
    assert await history.put("X", interval, timestamps, candles, DAILY) == PutCounts(2500, 0, 0)
    stored = await history.read("X", interval, 2000)
    assert (stored[0] == timestamps[-2000:]).all()
    assert (stored[1] == candles[-2000:]).all()


async def test_the_stored_format_never_changes_unnoticed(history: History, state: State) -> None:
    timestamps = np.array([500 * HOUR * 1000 + 2 * HOUR])
    await put(history, timestamps, np.array([[1.5, 2.5, 0.5, 2.0, 10.0, 20.0]]))
    block = await state.redis.get("cc:1:{BTC:1h}:c:1000")
    assert block == b"\0" * 112 + struct.pack("<q6d", int(timestamps[0]), 1.5, 2.5, 0.5, 2.0, 10.0, 20.0)


async def test_symbols_are_listed_with_their_first_and_last_candle(history: History) -> None:
    timestamps, candles = series(10)
    await history.put("BTC", "1h", timestamps[5:], candles[5:], DAILY)
    await history.put("BTC", "1h", timestamps[:3], candles[:3], DAILY)
    await history.put("AAPL", "1d", timestamps[:1] // 24 * 24, candles[:1], StoredCalendar("XNYS", inferred=False))
    listed = await history.symbols()
    assert [(one.symbol, one.interval, one.calendar) for one in listed] == [
        ("AAPL", "1d", "XNYS"),
        ("BTC", "1h", "24/7"),
    ]
    assert (listed[1].first, listed[1].last) == (timestamps[0], timestamps[-1])
    assert await history.calendars("AAPL") == {"1d": StoredCalendar("XNYS", inferred=False)}


async def test_nothing_stored_is_empty(history: History) -> None:
    assert await history.symbols() == []
    assert await history.calendars("BTC") == {}
    assert len((await history.read("BTC", "1h", 10))[0]) == 0


@pytest.mark.parametrize("damage", ["garbage", "type"])
async def test_a_damaged_block_is_unavailable_not_a_crash(history: History, state: State, damage: str) -> None:
    timestamps, candles = series(1)
    await put(history, timestamps, candles)
    key = f"cc:1:{{BTC:1h}}:c:{int(timestamps[0]) // HOUR // 500}"
    if damage == "garbage":
        await state.redis.set(key, b"not a block")
    else:
        await state.redis.delete("cc:1:{BTC:1h}:i")
        await state.redis.set("cc:1:{BTC:1h}:i", "not an index")
    with pytest.raises(HistoryUnavailable):
        await history.read("BTC", "1h", 10)

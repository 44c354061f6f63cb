"""Every step is scored once, whatever happens: sums equal those of a brute force, to the last unit."""

import asyncio
import contextlib
import math
import os
import random
import signal
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

import service
from models.scoring import GROUPS, MIN_BLOCK, block_length, group_of
from service.engine.history import History, PutCounts, StoredCalendar
from service.engine.revisions import series_stem
from service.metrics import Metrics
from service.score.ledger import COUNTS, SUMS, UNIT, Ledger, Registered, Served, kept_ms
from service.state import REDIS_ERRORS, State

pytestmark = pytest.mark.anyio

HOUR = 3_600_000
START = 1_700_006_400_000
CALENDAR = StoredCalendar("24/7", inferred=True)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def state(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[State]:
    running = State(None, tmp_path_factory.mktemp("home"), Metrics(CollectorRegistry()))
    await running.start()
    yield running
    await running.stop()


# -- brute force --------------------------------------------------------------------------------------


FIELDS = 14
_JUMP = math.log(1.2)


@dataclass
class Step:
    """As it is packed: logarithms relative to the close at the origin, in single precision."""

    model: str
    step: int
    origin: int
    naive: float
    point: float
    low: float
    high: float
    inverse: float
    scale: float


@dataclass
class Oracle:
    """A ledger by brute force: it keeps every step and every candle, and adds everything up when it is asked."""

    interval: int
    closes: dict[int, float] = field(default_factory=dict)
    steps: dict[tuple[bytes, int], Step] = field(default_factory=dict)

    def register(self, key: bytes, target: int, step: Step) -> None:
        """Wait for a candle, unless it is there or the step is known."""
        if target not in self.closes:
            self.steps.setdefault((key, target), step)

    def put(self, candles: dict[int, float], *, restate: bool) -> None:
        """Candles in the order in which they were sent."""
        for time, close in candles.items():
            old = self.closes.get(time)
            moved = math.log(close / old) if old else 0.0
            if not restate and abs(moved) > _JUMP:
                continue
            self.closes[time] = close
            if restate and moved:
                for step in self.steps.values():
                    if step.origin == time:
                        step.naive += moved

    def sums(self) -> dict[tuple[str, int, int], list[int]]:
        """By model, group and block; blocks in which everything is zero are left out."""
        found: dict[tuple[str, int, int], list[int]] = {}
        for (_, target), step in self.steps.items():
            if target not in self.closes:
                continue
            group = group_of(step.step)
            block = target // (block_length(group) * self.interval)
            total = found.setdefault((step.model, group, block), [0] * FIELDS)
            for place, amount in enumerate(score(step, self.closes[target])):
                total[place] += amount
        return found


def single(value: float) -> float:
    """As a number in single precision."""
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    return float(rounded)


def score(step: Step, close: float) -> list[int]:
    """What one step adds to the sums of its block, in units of 1e-9."""
    y, naive = math.log(close), step.naive
    point, low, high = naive + step.point, naive + step.low, naive + step.high
    wide_low, wide_high = point + (low - point) * step.scale, point + (high - point) * step.scale
    wrong, naively, anchor = abs(y - point), abs(y - naive), math.exp(naive)
    return [
        1,
        _units(wrong),
        _units(naively),
        _units(wrong * step.inverse),
        _units(naively * step.inverse),
        _units(y - point) if y >= point else -_units(point - y),
        int(low <= y <= high and low < high),
        int(wide_low <= y <= wide_high and wide_low < wide_high),
        _units(_pinball(0.1, y - low)),
        _units(_pinball(0.9, y - high)),
        _units(_pinball(0.1, y - wide_low)),
        _units(_pinball(0.9, y - wide_high)),
        _units(abs(close - math.exp(point)) / anchor),
        _units(abs(close - anchor) / anchor),
    ]


def _units(value: float) -> int:
    return math.floor(min(value, 100.0) * 1e9 + 0.5)


def _pinball(level: float, error: float) -> float:
    return max(level * error, (level - 1) * error)


# -- the ledger beside it ---------------------------------------------------------------------------


class Pair:
    """A series in Redis and in the oracle, told the same."""

    def __init__(self, state: State, symbol: str) -> None:
        metrics = Metrics(CollectorRegistry())
        self.history, self.ledger = History(state, metrics), Ledger(state, metrics)
        self.symbol, self.oracle = symbol, Oracle(HOUR)

    async def register(self, served: Served) -> Registered:
        """Both are told of a forecast."""
        result = await self.ledger.register(served, served.issued_at)
        if not result.foreign:
            for k in np.flatnonzero(served.closes > served.issued_at).tolist():
                self.oracle.register(served.key, int(served.targets[k]), step_of(served, k))
        return result

    async def put(self, closes: dict[int, float], *, restate: bool = False) -> PutCounts:
        """Both are told of candles, in the order of `closes`."""
        counts = await self.write(closes, restate=restate)
        self.oracle.put(closes, restate=restate)
        return counts

    async def write(self, closes: dict[int, float], *, restate: bool = False) -> PutCounts:
        """Redis alone is told."""
        times = np.array(list(closes), dtype=np.int64)
        candles = np.repeat(np.array(list(closes.values()))[:, None], 6, axis=1)
        if restate:
            return await self.history.restate(self.symbol, "1h", times, candles, CALENDAR, now=START)
        return await self.history.put(self.symbol, "1h", times, candles, CALENDAR)

    async def sums(self) -> dict[tuple[str, int, int], list[int]]:
        """What Redis holds."""
        return await sums_of(self.ledger, self.symbol)

    async def assert_equal(self) -> None:
        assert await self.sums() == self.oracle.sums()


async def sums_of(ledger: Ledger, symbol: str) -> dict[tuple[str, int, int], list[int]]:
    """What the ledger holds of a symbol, as whole numbers."""
    found = {}
    for (model, group), blocks in (await ledger.blocks(symbol, "1h")).items():
        for number, row in zip(blocks.numbers.tolist(), blocks.sums, strict=True):
            whole = [float(row[name]) / (1 if name in COUNTS else UNIT) for name in SUMS.names or ()]
            found[model, group, number] = [round(value) for value in whole]
    return found


def step_of(served: Served, k: int) -> Step:
    """What the ledger packs of a step."""
    anchor = math.log(served.last_close)
    low, middle, high = (single(math.log(value) - anchor) for value in served.band[:, k].tolist())
    inverse, scale = single(1 / float(served.sigma[k])), single(float(served.scale[k]))
    return Step(served.model, k + 1, served.origin, anchor, middle, low, high, inverse, scale)


def forecast(symbol: str, origin: int, close: float, *, steps: int = 4, model: str = "toto@1", seed: int = 0) -> Served:
    """A forecast issued when the candle at `origin` closed; another one for every seed."""
    rng = np.random.default_rng(seed)
    targets = origin + HOUR * np.arange(1, steps + 1, dtype=np.int64)
    middle = close * np.exp(rng.normal(0, 0.02, steps))
    width = np.exp(rng.uniform(0.001, 0.05, steps))
    return Served(
        symbol=symbol,
        interval="1h",
        model=model,
        key=struct.pack("<qq", origin, seed) + model.encode(),
        origin=origin,
        last_close=close,
        issued_at=origin + HOUR,
        targets=targets,
        closes=targets + HOUR,
        band=np.vstack([middle / width, middle, middle * width]),
        high=middle * 1.01,
        low=middle * 0.99,
        sigma=0.01 * np.sqrt(np.arange(1, steps + 1)),
        scale=rng.uniform(0.5, 2, steps),
    )


def walk(draw: random.Random, count: int) -> dict[int, float]:
    """Closes of hourly candles."""
    close, found = 100.0, {}
    for k in range(count):
        close *= math.exp(draw.gauss(0, 0.01))
        found[START + HOUR * k] = close
    return found


# -- tests --------------------------------------------------------------------------------------------


async def test_a_step_is_scored_by_the_candle_that_opens_then(state: State) -> None:
    pair = Pair(state, "PLAIN")
    assert await pair.register(forecast("PLAIN", START, 100.0)) == Registered(new=4)
    counts = await pair.put({START + HOUR: 101.0, START + 2 * HOUR: 99.0})
    assert (counts.new, counts.scored) == (2, 2)
    await pair.assert_equal()
    blocks = (await pair.ledger.blocks("PLAIN", "1h"))["toto@1", 0]
    assert blocks.sums["count"].sum() == 2
    assert blocks.sums["naive_error"].sum() == pytest.approx(math.log(1.01) - math.log(0.99), abs=2e-9)


async def test_registering_again_changes_nothing(state: State) -> None:
    pair = Pair(state, "AGAIN")
    served = forecast("AGAIN", START, 100.0)
    await pair.register(served)
    await pair.put({START + HOUR: 101.0})
    assert await pair.register(served) == Registered(duplicate=4)
    assert (await pair.put({START + HOUR: 101.0})).scored == 0
    await pair.assert_equal()


async def test_what_is_registered_after_its_candle_is_never_scored(state: State) -> None:
    pair = Pair(state, "LATE")
    await pair.put({START: 100.0, START + HOUR: 101.0})
    assert await pair.register(forecast("LATE", START, 100.0)) == Registered(new=3, late=1)
    assert (await pair.put({START + HOUR: 102.0})).rescored == 0
    await pair.assert_equal()


async def test_a_step_whose_candle_had_closed_before_the_forecast_was_issued_does_not_wait(state: State) -> None:
    served = forecast("SLOW", START, 100.0)
    slow = replace(served, issued_at=START + 3 * HOUR)
    assert await Ledger(state, Metrics(CollectorRegistry())).register(slow, slow.issued_at) == Registered(new=2, late=2)


async def test_a_forecast_of_other_candles_than_the_stored_ones_is_not_registered(state: State) -> None:
    pair = Pair(state, "FOREIGN")
    await pair.put({START: 100.0})
    assert await pair.register(forecast("FOREIGN", START, 55.0)) == Registered(foreign=4)
    await pair.put({START + HOUR: 101.0})
    assert await pair.sums() == {}


async def test_a_restated_candle_takes_its_scores_back(state: State) -> None:
    pair = Pair(state, "RESTATED")
    await pair.register(forecast("RESTATED", START, 100.0))
    await pair.put({START + HOUR: 101.0})
    counts = await pair.put({START + HOUR: 103.0})
    assert (counts.restated, counts.scored, counts.rescored) == (1, 0, 1)
    await pair.assert_equal()


async def test_a_close_restated_by_more_than_a_fifth_waits_for_an_explicit_restatement(state: State) -> None:
    pair = Pair(state, "JUMP")
    await pair.register(forecast("JUMP", START, 100.0))
    await pair.put({START + HOUR: 101.0})
    before = await pair.sums()
    assert (await pair.put({START + HOUR: 50.0})).quarantined == 1
    assert await pair.sums() == before
    assert (await pair.put({START + HOUR: 50.0}, restate=True)).rescored == 1
    await pair.assert_equal()


async def test_a_split_changes_no_score(state: State) -> None:
    pair = Pair(state, "SPLIT")
    closes = {START + HOUR * k: close for k, close in enumerate((100.0, 102.0, 101.0, 99.0, 100.0))}
    await pair.put({START: 100.0})
    await pair.register(forecast("SPLIT", START, 100.0))
    await pair.put(dict(list(closes.items())[1:3]))
    before = await pair.sums()
    counts = await pair.history.split("SPLIT", "1h", 4.0, before=START + 3 * HOUR, now=START)
    assert counts.restated == 3
    after = await pair.sums()
    assert after.keys() == before.keys()
    for owner, sums in after.items():
        assert sums == pytest.approx(before[owner], abs=2 * sums[0])  # a unit for each rounding
    await pair.write({START + 3 * HOUR: 99.0 / 4, START + 4 * HOUR: 100.0 / 4})
    [blocks] = (await pair.ledger.blocks("SPLIT", "1h")).values()
    assert blocks.sums["count"].sum() == 4
    assert blocks.sums["naive_error"].sum() == pytest.approx(sum(abs(math.log(c / 100)) for c in closes.values()))
    [event] = await pair.history.events("SPLIT", "1h")
    assert event == {"at": START, "kind": "split", "factor": 4.0, "before": START + 3 * HOUR}
    stored = await pair.history.read("SPLIT", "1h", 10)
    assert stored[1][:, 3] == pytest.approx([25.0, 25.5, 25.25, 24.75, 25.0])


def test_the_script_knows_the_same_groups_of_horizons() -> None:
    script = (Path(service.__file__).parent / "scripts" / "put.lua").read_text()
    assert f"= {{{', '.join(map(str, GROUPS))}}}, {MIN_BLOCK}, " in script


async def test_the_scale_of_bands_follows_the_misses_once_per_candle_and_group(state: State) -> None:
    pair = Pair(state, "TRACK")
    for seed in range(3):
        await pair.register(forecast("TRACK", START, 100.0, seed=seed))
    await pair.put({START + HOUR: 115.0})  # outside every band
    [scale] = (await pair.ledger.scales("TRACK", "1h")).values()
    assert scale == pytest.approx(math.exp(0.25 / 8 * 0.8))
    await pair.put({START + HOUR: 114.0})
    assert await pair.ledger.scales("TRACK", "1h") == {("toto@1", 0): scale}


async def test_targets_are_forgotten_when_they_can_no_longer_be_restated(state: State) -> None:
    pair = Pair(state, "SWEPT")
    await pair.register(forecast("SWEPT", START, 100.0))
    await pair.put({START + HOUR: 101.0})
    kept = kept_ms("1h")
    assert await pair.ledger.sweep("SWEPT", "1h", START + kept) == (0, 0)
    assert await pair.ledger.sweep("SWEPT", "1h", START + kept + 3 * HOUR) == (2, 1)
    assert await state.redis.zcard(series_stem("SWEPT", "1h") + "o") == 2
    await pair.assert_equal()


async def test_weekly_candles_find_their_forecasts(state: State) -> None:
    metrics, week = Metrics(CollectorRegistry()), 7 * 24 * HOUR
    history, ledger = History(state, metrics), Ledger(state, metrics)
    served = forecast("WEEKLY", START, 100.0, steps=2)
    served = replace(
        served,
        interval="1w",
        targets=START + week * np.arange(1, 3),
        closes=START + week * np.arange(2, 4),
        issued_at=START + week,
    )
    await ledger.register(served, served.issued_at)
    assert await ledger.sweep("WEEKLY", "1w", START + 2 * week + HOUR) == (0, 0)
    key = f"{series_stem('WEEKLY', '1w')}t:{START + week}"
    assert await state.redis.pttl(key) > 14 * 24 * HOUR  # it opens as it is issued, and closes a week later
    counts = await history.put("WEEKLY", "1w", np.array([START + week]), np.full((1, 6), 101.0), CALENDAR)
    assert counts.scored == 1


async def test_forecasts_of_other_prices_are_dropped_when_the_series_turns_out_to_be_another(state: State) -> None:
    pair = Pair(state, "OTHER")
    await pair.ledger.register(forecast("OTHER", START, 37.0), START + HOUR)
    counts = await pair.write({START: 60_000.0, START + HOUR: 60_100.0})
    assert (counts.new, counts.scored) == (2, 0)
    assert await pair.sums() == {}


async def test_a_series_that_never_gets_candles_is_forgotten(state: State) -> None:
    pair = Pair(state, "INVENTED")
    await pair.register(forecast("INVENTED", START, 100.0))
    stem = series_stem("INVENTED", "1h")
    assert await state.redis.pttl(stem + "o") > 0
    assert await state.redis.pttl(stem + "n") > 0
    await pair.put({START: 100.0})
    assert await state.redis.pttl(stem + "o") == -1
    assert await state.redis.pttl(stem + "n") == -1


@dataclass
class Message:
    """One thing that happens, and may happen again."""

    send: Callable[[], Awaitable[Any]]


async def random_history(pair: Pair, draw: random.Random, messages: int = 14) -> list[Message]:
    """Forecasts and candles in any order, some sent twice, restated, adjusted or misquoted; those that were sent."""
    closes = walk(draw, 40)
    times = list(closes)
    sent: list[Message] = []
    for number in range(messages):
        kind = draw.choice(("forecast", "forecast", "candles", "candles", "candles", "restate", "jump", "adjust"))
        known = [time for time in times if time in pair.oracle.closes]
        if kind == "forecast":
            origin = draw.choice(times)
            close = pair.oracle.closes.get(origin, closes[origin])
            steps, model = draw.choice((1, 4, 12, 35)), draw.choice(("toto@1", "kronos@2"))
            served = forecast(pair.symbol, origin, close, steps=steps, model=model, seed=number)
            sent.append(Message(partial(pair.register, served)))
        elif kind == "candles":
            chosen = draw.sample(times, draw.randint(1, 12))
            sent.append(Message(partial(pair.put, {time: closes[time] for time in chosen})))
        elif known:
            chosen = draw.sample(known, min(len(known), draw.randint(1, 5)))
            factor = {"restate": draw.uniform(0.97, 1.03), "jump": 2.0, "adjust": draw.choice((0.25, 0.9, 3.0))}[kind]
            other = {time: pair.oracle.closes[time] * factor for time in chosen}
            sent.append(Message(partial(pair.put, other, restate=kind == "adjust")))
        else:
            continue
        await sent[-1].send()
        if draw.random() < 0.3:  # the reply was lost
            await sent[-1].send()
    return sent


@pytest.mark.parametrize("seeds", [range(100), pytest.param(range(100, 1000), marks=pytest.mark.long)], ids=len)
async def test_random_histories_equal_a_brute_force_to_the_last_unit(state: State, seeds: range) -> None:
    scored = 0
    for seed in seeds:
        pair = Pair(state, f"R{seed}")
        await random_history(pair, random.Random(seed))
        await pair.assert_equal()
        scored += sum(sums[0] for sums in pair.oracle.sums().values())
    assert scored > 5 * len(seeds)


@pytest.mark.long
async def test_the_server_may_be_killed_between_any_two_messages(tmp_path: Path) -> None:
    state = State(None, tmp_path, Metrics(CollectorRegistry()))
    await state.start()
    draw = random.Random(1)
    try:
        for seed in range(20):
            pair = Pair(state, f"K{seed}")
            sent = await random_history(pair, draw, messages=6)
            before = await pair.sums()
            assert state._server
            assert state._server._process
            os.kill(state._server._process.pid, signal.SIGKILL)
            await until_up(state)
            assert await pair.sums() == before
            last = sent[-1]
            await last.send()  # its sender cannot know whether it arrived
            await pair.assert_equal()
    finally:
        await state.stop()


async def until_up(state: State) -> None:
    """The watcher has noticed the death and started the server again."""
    assert state._server
    async with asyncio.timeout(20):
        while True:
            await asyncio.sleep(0.05)
            with contextlib.suppress(*REDIS_ERRORS):
                if not state._server.died and await state.redis.ping():
                    return

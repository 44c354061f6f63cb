"""Two processes on one Redis are one service: what one knows the other knows, and each may be replaced or killed.

Real processes, real networks, a real Redis; only the clock is the test's own, a file that every process reads.
"""

import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from bench.death import DRAIN_SECONDS, roll
from bench.service import redis_running
from model_store.store import ModelStore
from service.engine.revisions import series_stem
from service.metrics import Metrics
from service.score.ledger import _ENTRY, Ledger
from service.state import State, connect, raw
from tests.service.conftest import put_version_without_weights
from tests.service.score.test_ledger import Oracle, Step, sums_of

pytestmark = pytest.mark.anyio

HOUR = 3_600_000
START = 1_749_600_000_000  # a whole hour, in UTC ms
FIRST = 64  # candles that are there before anybody asks
STEPS = 4
TOTO = {"model": "toto", "horizon": STEPS}
KRONOS = {"model": "kronos", "horizon": STEPS, "samples": 4, "seed": 7}
PATIENCE = 60.0  # for machines with other things to do
ROUNDS = 6
CANDLES_PER_KILL = 4  # of twenty kills a few days: after a week the ledger forgets single steps
KILLED_STEPS = 12  # so many that none is noted too late for all of its candles
LEVELS = ("0.1", "0.5", "0.9")
CANCELLED = 'candlecast_forecast_requests_total{model="toto-demo",outcome="cancelled"}'
PROGRAM = """
import json, sys
from functools import partial
from pathlib import Path
from service import line, main, state
from service.score import evaluator
from service.settings import Settings

line._PATIENCE_SECONDS = state._SOCKET_SECONDS = 30.0  # a busy machine is not a Redis that is down
state.connect.__defaults__ = (30.0,)
evaluator._EVERY_SECONDS = 1.0  # not a minute until one process looks at what another has scored
clock = Path(sys.argv[1])
main.create_app = partial(main.create_app, now=lambda: int(clock.read_text()))
main.serve(Settings(), lambda at: print(json.dumps({"url": at.url, "admin_url": at.admin_url}), flush=True))
"""


class Replica:
    """One process, with a client for each of its ports."""

    def __init__(self, home: Path, process: asyncio.subprocess.Process, url: str, admin_url: str) -> None:
        self.home = home
        self.process = process
        self.client = httpx.AsyncClient(base_url=url, timeout=PATIENCE)
        self._admin = httpx.AsyncClient(base_url=admin_url, timeout=PATIENCE)

    @property
    def port(self) -> int:
        return self.client.base_url.port or 0

    async def put(self, symbol: str, rows: list[list[float]]) -> Any:
        return await self._json("PUT", f"/candles/{symbol}", json={"interval": "1h", "candles": rows})

    async def forecast(self, symbol: str, body: Any) -> Any:
        return await self._json("POST", f"/forecast/{symbol}", json=body)

    async def get(self, path: str) -> Any:
        return await self._json("GET", path)

    async def counted(self, series: str) -> float:
        """The sum of a series of its metrics, `name{labels` or the beginning of it."""
        text = (await self._admin.get("/metrics")).text
        return sum(map(float, re.findall(rf"^{re.escape(series)}.* (\S+)$", text, re.MULTILINE)))

    async def _json(self, method: str, path: str, **sent: Any) -> Any:
        answer = await self.client.request(method, path, **sent)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def stop(self, by: signal.Signals = signal.SIGTERM) -> int:
        """Its exit status."""
        await self.client.aclose()
        await self._admin.aclose()
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            self.process.send_signal(by)
        return await self.process.wait()


@dataclass
class Site:
    """Replicas on one Redis and one store."""

    folder: Path
    redis_url: str
    store: ModelStore
    numbers: Iterator[int] = field(default_factory=itertools.count)
    replicas: list[Replica] = field(default_factory=list)
    now: int = 0

    def set_clock(self, now: int) -> None:
        """It is `now` for all of them, UTC ms."""
        self.now = now
        written = self.folder / "written"
        written.write_text(str(now))
        written.replace(self.folder / "clock")

    async def start_replica(self) -> Replica:
        replica = await self.start_in(self.folder / f"home-{next(self.numbers)}")
        self.replicas.append(replica)
        return replica

    async def start_in(self, home: Path) -> Replica:
        """Not one of the site's yet; what it logs lies in its home."""
        settings = {
            "CANDLECAST_HOME": str(home),
            "CANDLECAST_STORE_ROOT": str(self.store.root),
            "CANDLECAST_REDIS_URL": self.redis_url,
            "CANDLECAST_PORT": "0",
            "CANDLECAST_ADMIN_PORT": "0",
            "CANDLECAST_THREADS": "1",
            "CANDLECAST_DRAIN_SECONDS": str(DRAIN_SECONDS),
        }
        home.mkdir(exist_ok=True)
        with (home / "log").open("w") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", PROGRAM, str(self.folder / "clock")),
                env=os.environ | settings,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert process.stdout
        line = await process.stdout.readline()
        assert line, "a replica ended before it was ready"
        return Replica(home, process, **json.loads(line))


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory, put_tiny: Any) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    store = ModelStore(folder / "store")
    for family in ("toto", "kronos"):
        put_tiny(store, family)
    put_version_without_weights(store)
    async with redis_running(folder / "redis") as (url, _):
        site = Site(folder, url, store)
        site.set_clock(START + FIRST * HOUR)
        await asyncio.gather(site.start_replica(), site.start_replica())
        yield site
        await asyncio.gather(*(replica.stop(signal.SIGKILL) for replica in site.replicas))


@pytest.fixture(scope="module")
def candles() -> list[list[float]]:
    """Hourly ccxt rows from START on."""
    closes = 100 * np.exp(np.cumsum(np.random.default_rng(5).normal(0, 0.01, FIRST + 40)))
    return [
        [START + HOUR * k, close, close * 1.01, close * 0.99, close, 5.0] for k, close in enumerate(closes.tolist())
    ]


async def until(condition: Callable[..., Awaitable[bool]], *given: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not await condition(*given):
        assert time.monotonic() < end, "it never happened"
        await asyncio.sleep(0.05)


async def test_what_is_put_at_one_is_known_to_the_other(site: Site, candles: Any) -> None:
    one, other = site.replicas
    put = await one.put("SHARED", candles[:FIRST])
    assert put["new"] == FIRST
    assert await other.get("/candles/SHARED") == await one.get("/candles/SHARED")
    assert await other.get("/symbols") == await one.get("/symbols")
    answer = await other.forecast("SHARED", TOTO)
    assert answer["as_of"] == START + FIRST * HOUR
    assert answer["last_close"] == candles[FIRST - 1][4]
    assert (await other.put("SHARED", candles[:FIRST]))["duplicate"] == FIRST


@pytest.mark.parametrize("asked", [TOTO, KRONOS], ids=["toto", "kronos"])
async def test_what_one_has_computed_the_other_answers_bit_by_bit(site: Site, candles: Any, asked: Any) -> None:
    one, other = site.replicas
    await one.put("CACHED", candles[1:FIRST])  # or its rows would be those of SHARED
    for replica in site.replicas:
        await until(settled, replica, asked)
    computed = await one.forecast("CACHED", asked)
    assert computed["meta"]["cache"] == "miss"
    async with connect(site.redis_url) as redis:  # it is written behind the answer
        await until(written, redis, computed)
    hit = await other.forecast("CACHED", asked)
    assert hit["meta"]["cache"] == "hit"
    anew = await other.forecast("CACHED", asked | {"cache": "bypass"})
    assert anew["meta"]["cache"] == "bypass"
    for told in ("forecast", "quantiles", "returns", "model", "valid_until"):
        assert hit[told] == computed[told]
        assert anew[told] == computed[told]


async def settled(replica: Replica, asked: Any) -> bool:
    """Whether it answers with the runtime that it has chosen: what comes before is kept nowhere."""
    answer = await replica.forecast("CACHED", asked | {"cache": "bypass"})
    return "runtime" not in answer["meta"]["degraded"]


async def written(redis: Any, answer: Any) -> bool:
    """Whether the forecast of an answer is in the shared cache."""
    row = json.dumps(answer["forecast"][0], separators=(",", ":")).encode()
    kept = [await redis.get(key) async for key in redis.scan_iter("cc:1:f:*")]
    return any(row in each for each in kept if each)


async def test_steps_are_scored_once_whichever_replica_candles_and_forecasts_go_through(
    site: Site, candles: Any
) -> None:
    """ALONE has one replica and nothing twice; BOTH has everything twice at each, all at a time."""
    one, other = site.replicas
    everywhere = [one, one, other, other]
    before = await counted(site, "scored")

    async def noted(symbol: str, forecasts: int) -> bool:
        return len((await one.get(f"/forecasts/{symbol}"))["rows"]) == forecasts * STEPS

    for turn in range(ROUNDS + 1):
        closed = candles[FIRST + turn - 1 : FIRST + turn] if turn else candles[:FIRST]
        site.set_clock(START + (FIRST + turn) * HOUR)
        await asyncio.gather(one.put("ALONE", closed), *(each.put("BOTH", closed) for each in everywhere))
        if turn == ROUNDS:
            break
        for asked in (TOTO, KRONOS):
            both = [each.forecast("BOTH", asked | {"cache": use}) for each in everywhere for use in ("use", "bypass")]
            await asyncio.gather(one.forecast("ALONE", asked), *both)
        for symbol in ("ALONE", "BOTH"):  # later they would be too late
            await until(noted, symbol, 2 * (turn + 1))

    expected = sum(min(STEPS, ROUNDS - turn) for turn in range(ROUNDS))

    async def complete(replica: Replica, symbol: str) -> bool:
        return [each["all"]["steps"] for each in await standings(replica, symbol)] == [expected] * 2

    places = list(itertools.product((one, other), ("ALONE", "BOTH")))
    for place in places:
        await until(complete, *place)
    told = [await standings(*place) for place in places]
    assert told[1:] == told[:1] * 3
    assert await counted(site, "scored") - before == 2 * 2 * expected  # symbols, models
    assert await counted(site, "rescored") == 0


async def standings(replica: Replica, symbol: str) -> Any:
    """What /accuracy says of it, but for what depends on how fast a replica hears how wide bands should be."""
    [series] = (await replica.get(f"/accuracy/{symbol}"))["series"]
    for each, part in itertools.product(series["standings"], ("all", "recent")):
        each[part] = {name: value for name, value in each[part].items() if not name.endswith("_calibrated")}
    return series["standings"]


async def counted(site: Site, outcome: str) -> float:
    """Steps of the ledger, by what all replicas have counted."""
    series = f'candlecast_ledger_steps_total{{outcome="{outcome}"}}'
    return sum([await replica.counted(series) for replica in site.replicas])


@pytest.mark.long
async def test_replicas_are_replaced_in_turn_under_load_without_a_failed_request(site: Site, candles: Any) -> None:
    old = list(site.replicas)
    asked = {"model": "naive", "horizon": STEPS, "interval": "1h", "seed": "@seed@", "timeout_ms": 60_000}
    body = json.dumps(asked | {"candles": candles[:FIRST]}).encode()
    rolled = await roll(old, site.start_replica, "/forecast/ROLLING", body)
    assert rolled.failed == Counter()
    assert len(rolled.records) >= 1000
    assert rolled.exits == (0, 0)
    for replica in old:
        site.replicas.remove(replica)
    for replica in site.replicas:
        assert await replica.counted('candlecast_http_requests_total{code="200",method="POST"') > 0


# -- SIGKILL -------------------------------------------------------------------------------------------


@dataclass
class Market:
    """A series whose candles come while forecasts of it are asked for, and what was put and answered."""

    site: Site
    symbol: str
    candles: list[list[float]]  # all that will come
    stored: int = FIRST
    asked: Iterator[int] = field(default_factory=itertools.count)
    answered: int = 0
    answers: dict[tuple[int, int], tuple[Replica, Any]] = field(default_factory=dict)  # by origin and context
    killed: list[Replica] = field(default_factory=list)
    over: bool = False

    async def keep_asking(self, place: int) -> None:
        """One caller: at a replica of its own, and where that was killed, at the other."""
        while not self.over:
            context = 24 + next(self.asked) % 40
            sent = self.candles[self.stored - context : self.stored]
            body = TOTO | {"horizon": KILLED_STEPS, "interval": "1h", "candles": sent, "timeout_ms": 60_000}
            answer = await self.send(place, "POST", f"/forecast/{self.symbol}", body)
            self.answers.setdefault((int(sent[-1][0]), context), answer)
            self.answered += 1
            await asyncio.sleep(0.02)

    async def put_some(self) -> None:
        """Candles, at one replica and the other."""
        for place in range(CANDLES_PER_KILL):
            await self.put_next(place % 2)
            await asyncio.sleep(0.1)

    async def put_next(self, place: int) -> None:
        """The candle that closes now."""
        self.stored += 1
        self.site.set_clock(self.site.now + HOUR)
        body = {"interval": "1h", "candles": [self.candles[self.stored - 1]]}
        await self.send(place, "PUT", f"/candles/{self.symbol}", body)

    async def send(self, place: int, method: str, path: str, body: Any) -> tuple[Replica, Any]:
        """Who answered, and what; only one that was killed may fail to."""
        while True:
            replica = self.site.replicas[place]
            try:
                answer = await replica.client.request(method, path, json=body)
            except httpx.TransportError:
                assert replica in self.killed
                place = 1 - place
            else:
                assert answer.status_code == 200, answer.text
                return replica, answer.json()

    async def kill(self, place: int) -> None:
        """SIGKILL to a replica, and its restart in the same home."""
        killed = self.site.replicas[place]
        self.killed.append(killed)
        killed.process.kill()
        await killed.process.wait()
        self.site.replicas[place] = started = await self.site.start_in(killed.home)
        assert (await started.client.get("/readyz")).json() == {"status": "ok", "degraded": []}

    def from_survivors(self) -> set[tuple[int, int]]:
        """The answers that processes have computed that still run."""
        return {
            asked
            for asked, (replica, answer) in self.answers.items()
            if replica in self.site.replicas and answer["meta"]["cache"] != "hit"
        }

    async def noted(self, state: State) -> dict[tuple[bytes, int], tuple[tuple[int, int], Step]]:
        """Every step in the ledger, by forecast and target, with the answer that it is of."""
        found = {}
        stem = series_stem(self.symbol, "1h")
        models = {int(number): name.decode() for name, number in raw(await state.redis.hgetall(stem + "n")).items()}
        for member in raw(await state.redis.zrange(stem + "o", 0, -1)):
            for key, packed in raw(await state.redis.hgetall(f"{stem}t:{int(member)}")).items():
                number, k, origin, naive, _, point, low, high, _, _, inverse, scale = _ENTRY.unpack(packed)
                step = Step(models[number], k, origin, naive, point, low, high, inverse, scale)
                found[key, int(member)] = self.answer_of(step), step
        return found

    def answer_of(self, step: Step) -> tuple[int, int]:
        """The one answer that said what a step says."""
        [asked] = [
            (origin, context)
            for (origin, context), (_, answer) in self.answers.items()
            if origin == step.origin and says(answer, step)
        ]
        return asked


def says(answer: Any, step: Step) -> bool:
    """Whether an answer has the band of a step."""
    band = answer["quantiles"]["close"]
    told = (math.log(band[level][step.step - 1]) - step.naive for level in LEVELS)
    return all(abs(one - other) < 1e-5 for one, other in zip(told, (step.low, step.point, step.high), strict=True))


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.long)])
async def test_a_killed_replica_leaves_a_ledger_that_adds_up_and_another_that_answers(site: Site, kills: int) -> None:
    closes = 100 * np.exp(np.cumsum(np.random.default_rng(kills).normal(0, 0.01, 500)))
    first, draw = site.now - FIRST * HOUR, random.Random(kills)
    candles = [
        [first + HOUR * k, close, close * 1.01, close * 0.99, close, 5.0] for k, close in enumerate(closes.tolist())
    ]
    market = Market(site, f"KILLED{kills}", candles)
    await site.replicas[0].put(market.symbol, candles[:FIRST])
    async with asyncio.TaskGroup() as callers:
        for place in (0, 1, 0, 1):
            callers.create_task(market.keep_asking(place))
        for _ in range(kills):
            await until(has_answered, market, market.answered + 8)
            candles_come = callers.create_task(market.put_some())
            await asyncio.sleep(draw.uniform(0, 0.4))
            await market.kill(draw.randrange(2))
            await candles_come
        market.over = True
    for replica in market.killed:
        await replica.stop()
    await market.put_next(0)
    state = State(site.redis_url, site.folder, Metrics(CollectorRegistry()))
    await until(all_noted, market, state)
    noted = await market.noted(state)
    assert max(Counter((asked, target) for (_, target), (asked, _) in noted.items()).values()) == 1
    oracle = Oracle(HOUR, {int(row[0]): row[4] for row in candles[: market.stored]})
    oracle.steps = {place: step for place, (_, step) in noted.items()}
    assert oracle.sums()
    assert await sums_of(Ledger(state, Metrics(CollectorRegistry())), market.symbol) == oracle.sums()
    await state.stop()
    for replica in site.replicas:
        assert "ERROR" not in (replica.home / "log").read_text()


async def has_answered(market: Market, count: int) -> bool:
    return market.answered >= count


async def all_noted(market: Market, state: State) -> bool:
    """What a process was killed with is lost; what a living one has answered never is."""
    return market.from_survivors() <= {asked for asked, _ in (await market.noted(state)).values()}


# -- callers who hang up -------------------------------------------------------------------------------


@pytest.mark.long
async def test_a_thousand_callers_who_hang_up_leave_nothing_behind(site: Site, candles: Any) -> None:
    replica, draw, symbols = site.replicas[0], random.Random(18), [f"GONE{number}" for number in range(5)]
    for number, symbol in enumerate(symbols):
        await replica.put(symbol, candles[number:FIRST])
    expected = [await replica.get(f"/candles/{symbol}") for symbol in symbols]
    before = await replica.counted(CANCELLED)

    async def hang_up(number: int) -> None:
        body = json.dumps(TOTO | {"cache": "bypass"}).encode()
        head = "POST /forecast/%s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        request = (head % (symbols[number % 5], len(body))).encode() + body
        _, writer = await asyncio.open_connection("127.0.0.1", replica.port)
        writer.write(request if number % 4 else request[:-5])
        await asyncio.sleep(draw.uniform(0, 0.05))
        writer.transport.abort()

    for first in range(0, 1000, 50):
        leaving = asyncio.gather(*(hang_up(number) for number in range(first, first + 50)))
        assert await asyncio.gather(*(replica.get(f"/candles/{symbol}") for symbol in symbols)) == expected
        await leaving

    async def nobody_waits() -> bool:
        return await replica.counted("candlecast_http_requests_in_flight") == 0

    await until(nobody_waits)
    assert await replica.counted(CANCELLED) > before
    assert (await replica.forecast(symbols[0], KRONOS))["meta"]["seed"] == KRONOS["seed"]

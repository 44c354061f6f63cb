"""Two processes on one Redis are one service: what one knows the other knows, and each may be replaced under load.

Real processes, real networks, a real Redis; only the clock is the test's own, a file that every process reads.
"""

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from bench.connection import Connection
from model_store.store import ModelStore
from service.state import PrivateRedis, connect

pytestmark = pytest.mark.anyio

HOUR = 3_600_000
START = 1_749_600_000_000  # a whole hour, in UTC ms
FIRST = 64  # candles that are there before anybody asks
STEPS = 4
TOTO = {"model": "toto", "horizon": STEPS}
KRONOS = {"model": "kronos", "horizon": STEPS, "samples": 4, "seed": 7}
PATIENCE = 30.0  # for machines with other things to do
DRAIN_SECONDS = 4
CALLERS = 6
FEWEST_REQUESTS = 500
ROUNDS = 6
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

    def __init__(self, process: asyncio.subprocess.Process, url: str, admin_url: str) -> None:
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

    def set_clock(self, now: int) -> None:
        """It is `now` for all of them, UTC ms."""
        written = self.folder / "written"
        written.write_text(str(now))
        written.replace(self.folder / "clock")

    async def start_replica(self) -> Replica:
        settings = {
            "CANDLECAST_HOME": str(self.folder / f"home-{next(self.numbers)}"),
            "CANDLECAST_STORE_ROOT": str(self.store.root),
            "CANDLECAST_REDIS_URL": self.redis_url,
            "CANDLECAST_PORT": "0",
            "CANDLECAST_ADMIN_PORT": "0",
            "CANDLECAST_THREADS": "1",
            "CANDLECAST_DRAIN_SECONDS": str(DRAIN_SECONDS),
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROGRAM, str(self.folder / "clock")),
            env=os.environ | settings,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout
        line = await process.stdout.readline()
        assert line, "a replica ended before it was ready"
        replica = Replica(process, **json.loads(line))
        self.replicas.append(replica)
        return replica


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory, put_tiny: Any) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    store = ModelStore(folder / "store")
    for family in ("toto", "kronos"):
        put_tiny(store, family)
    url = f"unix://{folder / 'redis' / PrivateRedis.SOCKET}"
    async with AsyncExitStack() as stack:
        server, client = PrivateRedis(folder / "redis"), connect(url)
        stack.push_async_callback(client.aclose)
        await server.start(client)
        stack.push_async_callback(server.stop)
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


class Balancer:
    """Leads each new connection to the next replica whose /readyz answered 200 when it was last asked."""

    def __init__(self) -> None:
        self.ready: dict[int, bool] = {}  # by port
        self._turn = itertools.count()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Its port, for as long as the block lasts."""
        server = await asyncio.start_server(self._lead, "127.0.0.1")
        asking = asyncio.create_task(self._ask())
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            asking.cancel()
            await asyncio.wait({asking})

    async def _ask(self) -> None:
        while True:
            for port in list(self.ready):
                self.ready[port] = await _is_ready(port)
            await asyncio.sleep(0.1)

    async def _lead(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        ready = [port for port, ready in self.ready.items() if ready]
        try:
            replica, to_replica = await asyncio.open_connection("127.0.0.1", ready[next(self._turn) % len(ready)])
        except (OSError, ZeroDivisionError):
            to_client.close()
            return
        await asyncio.gather(_pass_on(client, to_replica), _pass_on(replica, to_client))


async def _is_ready(port: int) -> bool:
    connection = Connection("127.0.0.1", port)
    try:
        return (await connection.get("/readyz")).status == 200
    except OSError:
        return False
    finally:
        connection.close()


async def _pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65_536):
            sink.write(data)
            await sink.drain()
    with contextlib.suppress(OSError):
        sink.close()
        await sink.wait_closed()


async def test_replicas_are_replaced_in_turn_under_load_without_a_failed_request(site: Site, candles: Any) -> None:
    balancer, seen, enough = Balancer(), Counter[str](), asyncio.Event()
    old = list(site.replicas)
    await old[0].put("ROLLING", candles[:FIRST])

    async def in_rotation(replica: Replica) -> bool:
        return balancer.ready[replica.port]

    async def asked_enough() -> bool:
        return seen.total() >= FEWEST_REQUESTS

    async with balancer.listening() as port:
        for replica in old:
            balancer.ready[replica.port] = False
            await until(in_rotation, replica)
        seeds = itertools.count()
        load = [asyncio.create_task(keep_asking(port, seeds, seen, enough)) for _ in range(CALLERS)]
        for replica in old:
            stopping = asyncio.create_task(replica.stop())
            new = await site.start_replica()
            balancer.ready[new.port] = False
            await until(in_rotation, new)
            assert await stopping == 0
            del balancer.ready[replica.port]
            site.replicas.remove(replica)
        await until(asked_enough)
        enough.set()
        await asyncio.gather(*load)
    assert set(seen) == {"200"}, seen
    assert await site.replicas[0].counted('candlecast_http_requests_total{code="200",method="POST"') > 0


async def keep_asking(port: int, seeds: Iterator[int], seen: Counter[str], enough: asyncio.Event) -> None:
    """One caller over one connection while it is kept alive: what must be computed, what is cached, what is stored."""
    connection = Connection("127.0.0.1", port)
    for turn in itertools.cycle(range(3)):
        try:
            if turn == 2:
                answer = await connection.get("/candles/ROLLING")
            else:
                asked = TOTO if turn else KRONOS | {"seed": next(seeds)}
                answer = await connection.post("/forecast/ROLLING", json.dumps(asked).encode())
            seen[str(answer.status)] += 1
        except OSError as error:
            seen[type(error).__name__] += 1
        if enough.is_set():
            break
        await asyncio.sleep(0.02)
    connection.close()

"""Redis fails in every way there is: forecasts of sent candles go on, and the ledger is in the end as if nothing was.

Each fault lies between the real service and a real server, or in that server.
"""

import asyncio
import math
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from fastapi import FastAPI
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError, ResponseError

from bench.fault_proxy import Fault, FaultProxy
from service.engine.history import SLOTS
from service.score.ledger import Registered, Served
from service.services import Services
from service.state import PrivateRedis, connect, is_lasting
from tests.service.conftest import NOW, Clock

pytestmark = pytest.mark.anyio

HOUR = 3_600_000
LAST = NOW // HOUR - 1  # hour of the newest candle that has closed
STEPS = 3
NAIVE = {"model": "naive", "interval": "1h", "horizon": STEPS}
SERIES = "cc:1:{BTC:1h}:"
PATIENCE = 15.0  # of tests, for machines with other things to do
UNREACHABLE = ("down", "timeout", "latency", "limit_data", "garbage", "stopped", "wrong password")
UNWRITABLE = ("oom", "readonly")


@dataclass
class Server:
    """A Redis of the test's own, with a client that no fault touches."""

    private: PrivateRedis
    redis: Redis
    folder: Path

    @property
    def pid(self) -> int:
        assert self.private._process
        return self.private._process.pid

    async def kill(self) -> None:
        process = self.private._process
        assert process
        process.kill()
        await asyncio.to_thread(process.wait)

    async def inflict(self, fault: str) -> None:
        if fault == "oom":
            await self.redis.config_set("maxmemory", 1)
        elif fault == "readonly":
            await self.redis.execute_command("REPLICAOF", "127.0.0.1", 1)  # type: ignore[no-untyped-call]
        elif fault == "wrong password":
            await self.redis.config_set("requirepass", "another")
            await self.redis.client_kill_filter(_type="normal", skipme=True)  # who is connected stays welcome
        elif fault == "stopped":
            os.kill(self.pid, signal.SIGSTOP)
        elif fault == "forgets scripts":
            await self.redis.script_flush()
        elif fault == "killed":
            await self.kill()
            await self.private.restart(self.redis)

    async def heal(self, fault: str) -> None:
        if fault == "oom":
            await self.redis.config_set("maxmemory", 0)
        elif fault == "readonly":
            await self.redis.execute_command("REPLICAOF", "NO", "ONE")  # type: ignore[no-untyped-call]
        elif fault == "wrong password":
            await self.redis.config_set("requirepass", "")
        elif fault == "stopped":
            os.kill(self.pid, signal.SIGCONT)


@dataclass
class Rig:
    """A service, a fault proxy, a server."""

    client: httpx.AsyncClient
    app: FastAPI
    proxy: FaultProxy
    server: Server
    clock: Clock

    @property
    def parts(self) -> Services:
        services: Services = self.app.state.services
        return services

    async def inflict(self, fault: str) -> None:
        if fault in get_args(Fault):
            await self.proxy.become(fault)  # type: ignore[arg-type]
        else:
            await self.server.inflict(fault)

    async def heal(self, fault: str) -> None:
        await self.server.heal(fault)
        await self.proxy.become("none")

    async def put(self, first: int, last: int, symbol: str = "BTC") -> httpx.Response:
        """Candles of these hours, both included."""
        return await self.client.put(f"/candles/{symbol}", json={"candles": candles(first, last), "interval": "1h"})

    async def forecast(self, context: int, symbol: str = "BTC") -> httpx.Response:
        """Of as many sent candles; another context is another forecast."""
        sent = candles(LAST - context + 1, LAST)
        return await self.client.post(f"/forecast/{symbol}", json=NAIVE | {"candles": sent})

    async def degraded(self) -> list[str]:
        ready = await self.client.get("/readyz")
        assert ready.status_code == 200
        told: list[str] = ready.json()["degraded"]
        return told

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.02)

    async def until_degraded(self, told: list[str]) -> None:
        async with asyncio.timeout(PATIENCE):
            while await self.degraded() != told:
                await asyncio.sleep(0.02)

    async def until_written(self) -> None:
        await self.until(lambda: self.sample("candlecast_ledger_spool_entries") == 0)

    def sample(self, name: str, **labels: str) -> float:
        return self.parts.metrics.registry.get_sample_value(name, labels) or 0.0

    async def ledger(self) -> tuple[Any, Any]:
        """Every step that waits or was scored, and all sums."""
        steps = await self.parts.ledger.steps("BTC", "1h", self.clock.now)
        blocks = await self.parts.ledger.blocks("BTC", "1h")
        sums = {owner: (each.numbers.tolist(), each.sums.tolist()) for owner, each in blocks.items()}
        return sorted(steps, key=repr), sums

    async def scored(self) -> tuple[Any, Any]:
        """The ledger after the candles of all forecasts have come."""
        self.clock.now += (STEPS + 1) * HOUR
        answer = await self.put(LAST + 1, LAST + STEPS)
        assert answer.status_code == 200, answer.text
        return await self.ledger()


def candles(first: int, last: int) -> list[list[float]]:
    """ccxt rows of some hours since 1970; what they say depends on the hour alone."""
    closes = {hour: 100 + 3 * math.sin(hour) for hour in range(first, last + 1)}
    return [[hour * HOUR, close - 0.5, close + 1, close - 1, close, 10.0] for hour, close in closes.items()]


@pytest.fixture
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    folder = tmp_path_factory.mktemp("redis")
    private = PrivateRedis(folder)
    redis = connect(f"unix://{folder / PrivateRedis.SOCKET}")
    await private.start(redis)
    server = Server(private, redis, folder)
    yield server
    if not private.died:
        await server.heal("stopped")  # a test that failed may have left it so, and it could not end
    await redis.aclose()
    await private.stop()


@pytest.fixture
async def rig(running: Any, server: Server) -> AsyncIterator[Rig]:
    async with started(running, server) as rig:
        yield rig


@asynccontextmanager
async def started(running: Any, server: Server) -> AsyncIterator[Rig]:
    proxy, clock = FaultProxy(server.folder / PrivateRedis.SOCKET), Clock(NOW)
    await proxy.become("none")
    async with AsyncExitStack() as stack:
        stack.push_async_callback(proxy.stop)
        client, app = await stack.enter_async_context(running(redis_url=proxy.url, now=clock))
        rig = Rig(client, app, proxy, server, clock)
        await rig.until_degraded([])
        for symbol in ("BTC", "ETH"):
            assert (await rig.put(LAST - 9, LAST, symbol)).status_code == 200
        yield rig


@pytest.fixture(scope="module")
def expected() -> list[tuple[Any, Any]]:
    """What `undisturbed` has found for all tests."""
    return []


@pytest.fixture
async def undisturbed(rig: Rig, expected: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """The ledger of BTC after the forecasts that every test makes, had nothing gone wrong; it is empty again."""
    if expected:
        return expected[0]
    for context in range(10, 17):
        await rig.forecast(context)
    await rig.until_written()
    expected.append(await rig.scored())
    await rig.server.redis.flushall()
    rig.clock.now = NOW
    rig.parts.cache._kept.clear()
    for symbol in ("BTC", "ETH"):
        await rig.put(LAST - 9, LAST, symbol)
    return expected[0]


# -- faults that pass ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [*UNREACHABLE, *UNWRITABLE])
async def test_what_was_answered_while_redis_failed_is_in_the_ledger_afterwards(
    rig: Rig, undisturbed: tuple[Any, Any], fault: str
) -> None:
    before = [await timed(rig.forecast(context)) for context in (10, 11)]
    await rig.until_written()
    await rig.inflict(fault)
    first = await timed(rig.forecast(12))
    await rig.until_degraded(["ledger"])
    during = [await timed(rig.forecast(context)) for context in (13, 14)]
    for answer, _ in during:
        assert answer.json()["meta"]["degraded"] == ["ledger"]
        assert answer.headers["candlecast-degraded"] == "ledger"
    from_history = await rig.client.post("/forecast/ETH", json=NAIVE)
    put = await rig.put(LAST - 19, LAST, "SOL")
    for refused in (put, from_history) if fault in UNREACHABLE else (put,):
        assert refused.status_code == 503
        assert refused.json()["code"] == "history_unavailable"
        assert int(refused.headers["retry-after"]) > 0
    if fault in UNWRITABLE:
        assert from_history.status_code == 200
        assert from_history.json()["meta"]["degraded"] == ["ledger"]
    await rig.heal(fault)
    await rig.until_written()
    await rig.until_degraded([])
    after = [await timed(rig.forecast(context)) for context in (15, 16)]
    assert [answer.status_code for answer, _ in (*before, first, *during, *after)] == [200] * 7
    assert (await rig.put(LAST - 19, LAST, "SOL")).status_code == 200
    await rig.until_written()
    assert await rig.scored() == undisturbed
    assert rig.sample("candlecast_ledger_spool_dropped_total") == 0
    in_use = rig.parts.state.redis.connection_pool._in_use_connections
    await rig.until(lambda: len(in_use) <= 1)  # the one on which promotions are heard
    assert max(seconds for _, seconds in (first, *during)) < 5


async def timed(asked: Any) -> tuple[httpx.Response, float]:
    begun = time.monotonic()
    return await asked, time.monotonic() - begun


@pytest.mark.parametrize("fault", ["slicer", "forgets scripts", "killed"])
async def test_what_loses_no_state_is_not_noticed_for_long(rig: Rig, undisturbed: tuple[Any, Any], fault: str) -> None:
    for context in (10, 11, 12):
        assert (await rig.forecast(context)).status_code == 200
    await rig.until_written()
    await rig.inflict(fault)
    await rig.until_degraded([])
    for context in (13, 14, 15, 16):
        assert (await rig.forecast(context)).status_code == 200
    await rig.until_written()
    assert await rig.scored() == undisturbed


@pytest.mark.parametrize("loss", ["flushed", "killed without its data"])
async def test_a_server_that_lost_everything_is_filled_again(rig: Rig, undisturbed: tuple[Any, Any], loss: str) -> None:
    await rig.forecast(20)
    await rig.until_written()
    if loss == "flushed":
        await rig.server.redis.flushall()
    else:
        await rig.server.kill()
        for path in rig.server.folder.glob("appendonly*"):  # a file, or from Redis 7 on a folder
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        await rig.server.private.restart(rig.server.redis)
        await rig.until_degraded([])
    unknown = await rig.client.post("/forecast/BTC", json=NAIVE)
    assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_symbol")
    for context in range(10, 17):
        assert (await rig.forecast(context)).status_code == 200
    assert (await rig.put(LAST - 9, LAST)).json()["new"] == 10
    await rig.until_written()
    assert await rig.scored() == undisturbed


# -- damage -------------------------------------------------------------------------------------------


async def damage(rig: Rig, kind: str) -> None:
    """Spoil something of the ledger of BTC, beside what is good in it."""
    redis, target = rig.server.redis, f"{SERIES}t:{(LAST + 1) * HOUR}"
    entry = next(iter((await redis.hgetall(target)).values()))
    [owner] = {int(number) for number in (await redis.hgetall(SERIES + "n")).values()}
    if kind == "bytes":
        await redis.hset(target, mapping={"short": entry[:-1], "long": entry + b"x", "none": ""})
        await redis.hset(target, mapping={"nan": entry[:4] + b"\xff" * 48, "step": b"\xff" * 4 + entry[4:]})
        await redis.hset(SERIES + "b", mapping={f"{owner}:1:7": "x", "x": "y", "9:1:3": bytes(112)})
        await redis.hset(SERIES + "b", f"{owner}:1:9", b"\xff" * 112)
        await redis.hset(SERIES + "q", mapping={"x": "y", f"{owner}:2": "x", f"{owner}:1": b"\xff" * 16})
        await redis.hset(SERIES + "n", mapping={"toto@1": "x", b"\xff": 77})
        await redis.zadd(SERIES + "o", {"x": 1})
    elif kind == "types":
        for key in (f"{SERIES}t:{(LAST + STEPS + 5) * HOUR}", SERIES + "q", SERIES + "e", SERIES + "r"):
            await redis.delete(key)
            await redis.sadd(key, "x")
        await redis.zadd(SERIES + "o", {str((LAST + STEPS + 5) * HOUR): (LAST + STEPS + 5) * HOUR})
        await redis.set(SERIES + "b", "x")


@pytest.mark.parametrize("kind", ["bytes", "types"])
async def test_what_is_no_part_of_the_ledger_is_dropped_and_counted(
    rig: Rig, undisturbed: tuple[Any, Any], kind: str
) -> None:
    for context in range(10, 17):
        await rig.forecast(context)
    await rig.until_written()
    await damage(rig, kind)
    evaluated = rig.parts.evaluator.last_success
    steps, sums = await rig.scored()
    assert (steps, sums) == undisturbed
    assert rig.sample("candlecast_ledger_steps_total", outcome="unreadable") > 0
    rig.parts.evaluator.touch("BTC", "1h")
    await rig.until(lambda: rig.parts.evaluator.last_success > evaluated)
    assert rig.parts.evaluator.of("BTC", "1h").standings
    for path in ("/accuracy/BTC", "/forecasts/BTC", "/symbols", "/accuracy", "/candles/BTC"):
        assert (await rig.client.get(path)).status_code == 200, path


async def test_a_ledger_without_the_names_of_its_models_begins_anew(rig: Rig, undisturbed: tuple[Any, Any]) -> None:
    await rig.forecast(20)
    await rig.until_written()
    await rig.server.redis.set(SERIES + "n", "x")
    assert await rig.ledger() == ([], {})
    for context in range(10, 17):
        await rig.forecast(context)
    await rig.until_written()
    assert await rig.scored() == undisturbed


@pytest.mark.parametrize("key", ["n", "b", "q", "o", "e", "r", "i", "s", "first"])
async def test_a_key_of_another_kind_is_no_internal_error(rig: Rig, key: str) -> None:
    await rig.forecast(10)
    await rig.until_written()
    name = {"s": "cc:1:{BTC}:s", "first": "cc:1:first"}.get(key, SERIES + key)
    await rig.server.redis.delete(name)
    await (rig.server.redis.set if key != "r" else rig.server.redis.sadd)(name, "x")
    rig.clock.now += HOUR
    answers = [
        await rig.forecast(11),
        await rig.client.post("/forecast/BTC", json=NAIVE),
        await rig.put(LAST + 1, LAST + 1),
        *[await rig.client.get(path) for path in ("/accuracy/BTC", "/forecasts/BTC", "/symbols", "/candles/BTC")],
    ]
    assert answers[0].status_code == 200
    assert {answer.status_code for answer in answers} <= {200, 503}
    if key in "nbqo":
        assert {answer.status_code for answer in answers} == {200}
    await rig.until_written()
    assert (await rig.put(LAST - 9, LAST + 1, "ETH")).status_code == (503 if key == "first" else 200)


@pytest.mark.parametrize("spoiled", [b"x" * 100, b"x" * 56 * 500, b"\xff" * 56 * 501])
async def test_damaged_candles_are_never_forecast_from(rig: Rig, spoiled: bytes) -> None:
    for block in await rig.server.redis.zrange(SERIES + "i", 0, -1):
        await rig.server.redis.setrange(f"{SERIES}c:{block.decode()}", 0, spoiled)
    for refused in (await rig.client.post("/forecast/BTC", json=NAIVE), await rig.client.get("/candles/BTC")):
        assert (refused.status_code, refused.json()["code"]) == (503, "history_unavailable")
    assert (await rig.forecast(10)).status_code == 200


async def test_a_damaged_candle_that_is_put_again_is_not_scored_again(rig: Rig, undisturbed: tuple[Any, Any]) -> None:
    for context in range(10, 17):
        await rig.forecast(context)
    await rig.until_written()
    assert await rig.scored() == undisturbed
    block, slot = divmod(LAST + 1, SLOTS)
    await rig.server.redis.setrange(f"{SERIES}c:{block}", 56 * slot, b"x" * 56)
    assert (await rig.client.post("/forecast/BTC", json=NAIVE)).status_code == 503
    again = (await rig.put(LAST + 1, LAST + STEPS)).json()
    assert (again["new"], again["duplicate"], again["scored"]) == (1, STEPS - 1, 0)
    assert (await rig.client.post("/forecast/BTC", json=NAIVE)).status_code == 200
    await rig.until_written()
    assert (await rig.ledger())[1] == undisturbed[1]


async def test_a_kept_forecast_that_is_damaged_is_computed_anew(rig: Rig) -> None:
    whole = (await rig.forecast(10)).json()
    keys: list[bytes] = []
    async with asyncio.timeout(PATIENCE):
        while not keys:
            keys = await rig.server.redis.keys("cc:1:f:*")
    await rig.server.redis.setrange(keys[0], 200, b"\0")
    rig.parts.cache._kept.clear()
    answer = (await rig.forecast(10)).json()
    assert answer["meta"]["cache"] == "miss"
    assert answer["forecast"] == whole["forecast"]


# -- the spool ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "lasting"),
    [
        ("WRONGTYPE Operation against a key holding the wrong kind of value", True),
        ("user_script:1: bad argument #2 to 'unpack' (data string too short)", True),
        ("Error running script (call to f_9b53): @user_script:1: user_script:1: attempt to index a nil value", True),
        ("Error running script (call to f_9b53): @user_script: 1: -OOM command not allowed when used memory", False),
        ("Error running script (call to f_9b53): @user_script: 1: -READONLY You can't write against a replica", False),
        ("MISCONF Errors writing to the AOF file: No space left on device", False),
    ],
)
def test_a_refusal_lasts_unless_the_server_is_in_some_state(words: str, lasting: bool) -> None:
    assert is_lasting(ResponseError(words)) is lasting
    assert not is_lasting(OutOfMemoryError(words))


async def test_a_forecast_that_redis_will_never_take_keeps_no_other_waiting(
    rig: Rig, undisturbed: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    register, refused = rig.parts.ledger.register, 0

    async def sometimes(served: Served, now: int) -> Registered:
        nonlocal refused
        if served.symbol == "ETH":
            refused += 1
            raise ResponseError("WRONGTYPE")
        return await register(served, now)

    monkeypatch.setattr(rig.parts.ledger, "register", sometimes)
    await rig.forecast(10, "ETH")
    for context in range(10, 17):
        await rig.forecast(context)
    await rig.until_written()
    assert refused == 1
    assert rig.sample("candlecast_ledger_spool_dropped_total") == 1
    assert await rig.degraded() == []
    assert await rig.scored() == undisturbed


async def test_ten_thousand_forecasts_wait_and_the_oldest_goes_first(
    rig: Rig, undisturbed: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.score.register._MOST_WAITING", 7)
    await rig.inflict("down")
    for context in range(20, 23):
        await rig.forecast(context)
    await rig.until_degraded(["ledger"])
    for context in range(10, 17):
        await rig.forecast(context)
    assert rig.sample("candlecast_ledger_spool_entries") == 7
    assert rig.sample("candlecast_ledger_spool_dropped_total") == 3
    assert rig.sample("candlecast_degraded", reason="ledger") == 1
    await rig.heal("down")
    await rig.until_written()
    assert await rig.scored() == undisturbed


@pytest.mark.parametrize("fault", ["down", "timeout", "latency"])
async def test_the_service_stops_soon_whatever_waits(
    running: Any, server: Server, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(running, server) as rig:
        await rig.inflict(fault)
        for context in range(10, 14):
            assert (await rig.forecast(context)).status_code == 200
        await rig.until_degraded(["ledger"])
        stopping = time.monotonic()
    assert time.monotonic() - stopping < PATIENCE
    assert "4 forecasts were not noted in the ledger" in caplog.text

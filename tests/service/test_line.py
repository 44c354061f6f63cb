"""The line to Redis: questions go together, and a bad connection costs little and is never mistaken for an answer."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from redis.exceptions import ResponseError

from service.line import Command, Line
from service.metrics import Metrics
from service.state import REDIS_ERRORS, State
from tests.service.test_state import server_pid, until

pytestmark = pytest.mark.anyio


class Gated(Line):
    """A line that notes what it sends, and sends nothing before `open` is set."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.open = asyncio.Event()
        self.sent: list[Sequence[Command]] = []

    async def _exchange(self, commands: Sequence[Command]) -> list[Any]:
        self.sent.append(commands)
        await self.open.wait()
        return await super()._exchange(commands)


@pytest.fixture
async def state(tmp_path: Path) -> AsyncIterator[State]:
    state = State(None, tmp_path, Metrics(CollectorRegistry()))
    await state.start()
    for key in ("a", "b"):
        await state.redis.set(key, key)
    yield state
    await state.stop()


@pytest.fixture
async def line(state: State) -> AsyncIterator[Gated]:
    line = Gated(f"unix://{state.redis.connection_pool.connection_kwargs['path']}")
    yield line
    await line.close()


async def test_whoever_asks_while_a_question_is_under_way_waits_for_a_later_one(line: Gated) -> None:
    early = asyncio.gather(*(line.ask(("GET", "a")) for _ in range(3)))
    await until(lambda: line.sent)
    late = asyncio.gather(line.ask(("GET", "a")), line.ask(("GET", "b"), ("GET", "a")))
    await asyncio.sleep(0)
    line.open.set()
    assert await early == [[b"a"]] * 3
    assert await late == [[b"a"], [b"b", b"a"]]
    assert line.sent == [[("GET", "a")], [("GET", "a"), ("GET", "b"), ("GET", "a")]]


async def test_a_late_reply_is_not_taken_for_another_question_s(line: Gated) -> None:
    line.open.set()
    with pytest.raises(TimeoutError):
        await line.ask(("BLPOP", "empty", "0.1"))
    assert await line.ask(("GET", "a")) == [b"a"]
    await asyncio.sleep(0.15)
    assert await line.ask(("GET", "b")) == [b"b"]


async def test_a_question_that_redis_refuses_spoils_no_later_one(line: Gated) -> None:
    line.open.set()
    with pytest.raises(REDIS_ERRORS):
        await line.ask(("HGETALL", "a"), ("GET", "a"))
    assert await line.ask(("GET", "b")) == [b"b"]


async def test_whoever_stops_waiting_disturbs_nobody(line: Gated) -> None:
    gone, stays = (asyncio.create_task(line.ask(("GET", "a"))) for _ in range(2))
    await until(lambda: line.sent)
    gone.cancel()
    line.open.set()
    assert await stays == [b"a"]


async def test_a_refused_question_is_refused_to_its_asker_alone(state: State, line: Gated) -> None:
    await state.redis.hset("hash", "field", "value")
    refused, other = (asyncio.create_task(line.ask(("GET", key), ("GET", "a"))) for key in ("hash", "b"))
    await until(lambda: line.sent)
    line.open.set()
    assert await other == [b"b", b"a"]
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await refused
    assert await line.ask(("GET", "a")) == [b"a"]


async def test_a_restarted_server_is_asked_over_a_new_connection(state: State) -> None:
    assert await state.line.ask(("PING",)) == [b"PONG"]
    first = server_pid(state)
    os.kill(first, signal.SIGKILL)
    await until(lambda: server_pid(state) != first and state.up)
    assert await state.line.ask(("PING",)) == [b"PONG"]


async def test_without_a_server_the_answer_is_an_error() -> None:
    with pytest.raises(REDIS_ERRORS):
        await Line("unix:///nowhere/redis.sock").ask(("GET", "a"))

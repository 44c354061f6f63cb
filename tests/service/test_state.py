"""Redis comes and goes; forecasts with candles in the body do not notice."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service.metrics import Metrics
from service.state import PrivateRedis, State, StateError, connect

pytestmark = pytest.mark.anyio

NAIVE = {"model": "naive", "interval": "1h", "horizon": 3}


def new_state(home: Path, url: str | None = None) -> State:
    return State(url, home, Metrics(CollectorRegistry()))


def server_pid(state: State) -> int:
    assert state._server
    assert state._server._process
    return state._server._process.pid


async def until(condition: Any) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.02)


async def test_the_private_server_keeps_its_data_across_a_restart(tmp_path: Path) -> None:
    first = new_state(tmp_path)
    await first.start()
    assert first.up
    await first.redis.set("key", "kept")
    pid = server_pid(first)
    await first.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    second = new_state(tmp_path)
    await second.start()
    assert await second.redis.get("key") == b"kept"
    await second.stop()


async def test_one_home_serves_one_service(tmp_path: Path) -> None:
    first, second = new_state(tmp_path), new_state(tmp_path)
    await first.start()
    with pytest.raises(StateError, match="CANDLECAST_HOME"):
        await second.start()
    assert await first.redis.ping()
    await second.stop()
    await first.stop()


async def test_a_server_that_outlived_its_service_is_replaced_with_its_data(tmp_path: Path) -> None:
    killed = new_state(tmp_path)
    await killed.start()
    await killed.redis.set("key", "kept")
    assert killed._server
    assert killed._server._lock
    killed._server._lock.close()  # what the system does to a process that was killed
    orphan = server_pid(killed)
    survivor = new_state(tmp_path)
    await survivor.start()
    assert await survivor.redis.get("key") == b"kept"
    assert server_pid(survivor) != orphan
    await until(lambda: killed._server is not None and killed._server.died)
    await survivor.stop()
    await killed.stop()


async def test_a_private_server_that_dies_is_started_again(tmp_path: Path) -> None:
    state = new_state(tmp_path)
    await state.start()
    await state.redis.set("key", "kept")
    await asyncio.sleep(1.1)  # appendfsync everysec
    first = server_pid(state)
    os.kill(first, signal.SIGKILL)
    await until(lambda: server_pid(state) != first and state.up)
    assert await state.redis.get("key") == b"kept"
    await state.stop()


@pytest.mark.parametrize("script", ["#!/nowhere\n", "#!/bin/sh\nexit 1\n"])
async def test_a_restart_that_fails_is_tried_again_and_keeps_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    home, broken = tmp_path / "home", tmp_path / "redis-server"
    state = new_state(home)
    await state.start()
    await state.redis.set("key", "kept")
    await asyncio.sleep(1.1)  # appendfsync everysec
    broken.write_text(script)
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    os.kill(server_pid(state), signal.SIGKILL)
    await until(lambda: state._restart_failed and not state.up)
    with pytest.raises(StateError, match="CANDLECAST_HOME"):
        await new_state(home).start()
    broken.unlink()
    await until(lambda: state.up)
    assert await state.redis.get("key") == b"kept"
    await state.stop()


async def test_a_home_too_long_for_a_socket_says_so(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="too long"):
        await new_state(tmp_path / ("x" * 100)).start()


async def test_without_redis_bodies_are_forecast_and_labelled_degraded(running: Any, rows: Any) -> None:
    async with running(redis_url="redis://127.0.0.1:1/0") as (client, app):
        answer = await client.post("/forecast/BTC", json=NAIVE | {"candles": rows()})
        assert answer.status_code == 200
        assert answer.json()["meta"]["degraded"] == ["ledger"]
        for method, path in (("POST", "/forecast/BTC"), ("GET", "/candles/BTC"), ("GET", "/symbols")):
            refused = await client.request(method, path)
            assert refused.status_code == 503
            assert refused.json()["code"] == "history_unavailable"
            assert refused.headers["retry-after"] == "2"
        put = await client.put("/candles/BTC", json={"candles": rows()})
        assert put.status_code == 503
        ready = await client.get("/readyz")
        assert ready.status_code == 200
        assert ready.json()["degraded"] == ["ledger"]
        metrics = app.state.services.metrics.registry
        assert metrics.get_sample_value("candlecast_degraded", {"reason": "redis_state"}) == 1


async def test_history_is_back_when_redis_is(running: Any, rows: Any, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    url = f"unix://{folder / PrivateRedis.SOCKET}"
    async with running(redis_url=url) as (client, app):
        assert (await client.put("/candles/BTC", json={"candles": rows()})).status_code == 503
        server, waiting = PrivateRedis(folder), connect(url)
        await server.start(waiting)
        assert (await client.put("/candles/BTC", json={"candles": rows()})).json()["new"] == 8
        await until(lambda: app.state.services.state.up)
        assert (await client.post("/forecast/BTC", json=NAIVE)).json()["meta"]["degraded"] == []
        await waiting.aclose()
        await server.stop()

"""Requests are turned away before their body is read, and every permit comes back."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service.engine.batcher import Batcher, Overloaded
from service.engine.door import Door
from service.keys import KeyFile, grant
from service.metrics import Metrics
from tests.service.test_engine import NAIVE, ask, body_of, caller, counted, held, over_asgi, until, waiting

pytestmark = pytest.mark.anyio

ONE_INSIDE = {"max_queue": 1, "max_batch_rows": 1}  # beside the one that waits


async def test_a_full_house_answers_503_with_retry_after(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build, **ONE_INSIDE) as (client, app):
        inside = [await held(client, rows, faulty), ask(client, rows, seed=1)]
        await until(lambda: waiting(app) == 1)
        refused = await ask(client, rows)
        assert refused.status_code == 503
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.json()["code"] == "overloaded"
        assert refused.json()["next_steps"]
        assert int(refused.headers["retry-after"]) >= 1
        assert counted(app, "refusals_total", reason="full") == 1
        assert counted(app, "forecast_requests_total", model="_unknown", outcome="overloaded") == 1
        stored = await client.put("/candles/BTC", json={"candles": rows(8), "interval": "1h"})
        assert stored.status_code == 200
        faulty.open.set()
        assert {answer.status_code for answer in await asyncio.gather(*inside)} == {200}
        assert (await ask(client, rows)).status_code == 200


def cut_short(ending: Any) -> Any:
    """The beginning of a body, and then whatever `ending` does."""
    begun = False

    async def receive() -> Any:
        nonlocal begun
        if begun:
            return await ending()
        begun = True
        return {"type": "http.request", "body": b"{", "more_body": True}

    return receive


async def test_uploads_that_stall_give_their_permits_back(running: Any, rows: Any) -> None:
    async with running(**ONE_INSIDE, request_timeout_ms=100) as (client, app):
        stalled = [over_asgi(app, cut_short(asyncio.Event().wait)) for _ in range(2)]  # all the permits there are
        assert [sent[0]["status"] for sent in await asyncio.gather(*stalled)] == [504, 504]
        assert (await ask(client, rows)).status_code == 200


async def test_a_caller_who_hangs_up_while_sending_is_no_error(running: Any) -> None:
    async def gone() -> Any:
        return {"type": "http.disconnect"}

    async with running(**ONE_INSIDE) as (_, app):
        assert [(await over_asgi(app, cut_short(gone)))[0]["status"] for _ in range(3)] == [499] * 3


async def test_a_body_is_not_read_without_a_permit(running: Any, rows: Any, faulty: Any, faulty_build: Any) -> None:
    async with running(build=faulty_build, **ONE_INSIDE) as (client, app):
        inside = [await held(client, rows, faulty), ask(client, rows, seed=1)]
        await until(lambda: waiting(app) == 1)
        read = False

        async def receive() -> Any:
            nonlocal read
            read = True
            return {"type": "http.request", "body": b"{", "more_body": False}

        sent = await over_asgi(app, receive)
        assert sent[0]["status"] == 503
        assert not read
        faulty.open.set()
        await asyncio.gather(*inside)


async def test_every_way_out_gives_the_permit_back(running: Any, rows: Any, faulty: Any, faulty_build: Any) -> None:
    async with running(build=faulty_build, **ONE_INSIDE) as (client, app):
        for _ in range(3):
            json = {"content-type": "application/json"}
            assert (await client.post("/forecast/BTC", content=b"{", headers=json)).status_code == 400
            assert (await client.post("/forecast/BTC", json=NAIVE | {"candles": [1]})).status_code == 422
            assert (await client.post("/forecast/NOBODY", json=NAIVE)).status_code == 404
            faulty.failure = RuntimeError()
            assert (await ask(client, rows)).status_code == 500
            faulty.open.clear()
            assert (await ask(client, rows, timeout_ms=20)).status_code == 504
            cancelled = ask(client, rows, seed=1)
            await until(lambda: waiting(app) == 1)
            cancelled.cancel()
            hang_up = asyncio.Event()
            call = asyncio.create_task(over_asgi(app, caller(body_of(rows, seed=2), hang_up)))
            await until(lambda: 2 in faulty.encoded)
            hang_up.set()
            await call
            faulty.encoded.clear()
            faulty.open.set()
            assert (await ask(client, rows, cache="bypass")).status_code == 200


# -- clients -------------------------------------------------------------------------------------


def entered(door: Door, client: str | None, inside: contextlib.ExitStack, most: int = 100) -> int:
    """How many permits a client gets who takes all that it can."""
    for count in range(most):
        try:
            inside.enter_context(door.permit(client))
        except Overloaded:
            return count
    return most


def test_a_client_leaves_room_for_the_next_and_takes_it_back_when_that_has_gone() -> None:
    door = Door(100, Batcher(1), Metrics(CollectorRegistry()))
    with contextlib.ExitStack() as first:
        assert entered(door, "a", first) == 80
        with contextlib.ExitStack() as second:
            assert entered(door, "b", second) == 16
            assert entered(door, "c", first, most=3) == 3
        assert entered(door, "a", first) == 0
    with contextlib.ExitStack() as again:
        assert entered(door, "b", again) == 80


def test_without_keys_everybody_together_may_take_every_permit() -> None:
    door = Door(100, Batcher(1), Metrics(CollectorRegistry()))
    with contextlib.ExitStack() as inside:
        assert entered(door, None, inside, most=200) == 100


@pytest.fixture
def keys(tmp_path: Path) -> Any:
    """The header with a new key of a client."""
    file = KeyFile(tmp_path / "home" / "keys.json")

    def make(client: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {file.make(grant(name=client, scopes=['forecast']))[0]}"}

    return make


async def test_a_client_that_floods_neither_keeps_another_out_nor_makes_it_wait(
    running: Any, rows: Any, faulty: Any, faulty_build: Any, keys: Any
) -> None:
    flood, other = keys("flood"), keys("other")

    def send(key: Any, seed: int) -> asyncio.Task[Any]:
        body = NAIVE | {"candles": rows(8), "seed": seed, "timeout_ms": 60_000 if key is other else 20_000}
        return asyncio.create_task(client.post("/forecast/BTC", json=body, headers=key))

    async with running(build=faulty_build, max_queue=16, max_batch_rows=4) as (client, app):
        faulty.open.clear()
        many = [send(flood, 0)]
        await until(faulty.entered.is_set)
        many += [send(flood, seed) for seed in range(1, 200)]
        await until(lambda: sum(task.done() for task in many) == 200 - 16 and waiting(app) == 15)
        few = [send(other, seed) for seed in (1000, 1001)]
        await until(lambda: waiting(app) == 17)
        faulty.open.set()
        answers, others = await asyncio.gather(*many), await asyncio.gather(*few)
        refused = [answer for answer in answers if answer.status_code != 200]
        assert {answer.status_code for answer in refused} == {503}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert len(refused) == 200 - 16 == counted(app, "refusals_total", reason="share")
    assert {answer.status_code for answer in others} == {200}
    assert set(faulty.batches[1]) > {1000, 1001}


async def test_what_cannot_be_in_time_is_refused_unread_unless_it_is_being_computed(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build, max_batch_rows=1) as (client, app):
        first = await held(client, rows, faulty)
        inside = [ask(client, rows, seed=seed) for seed in (1, 2)]
        await until(lambda: waiting(app) == 2)
        batcher = app.state.services.engine._batcher
        [[job, other]] = batcher._waiting.values()
        batcher.record(job.bucket, 1, 9.0)  # each: the second ends before the 20 seconds are over, a third would not
        json = {"content-type": "application/json"}
        refused = await client.post("/forecast/BTC", content=b'{"model": "naive"', headers=json)
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 18
        patient = await client.post("/forecast/BTC", content=b'{"model": "naive", "timeout_ms": 60000', headers=json)
        assert patient.status_code == 400
        again = ask(client, rows, seed=2)
        await until(lambda: 2 in (job.waiters, other.waiters))
        faulty.open.set()
        assert {answer.status_code for answer in await asyncio.gather(first, *inside, again)} == {200}
        assert counted(app, "refusals_total", reason="queue") == 1

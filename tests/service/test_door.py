"""Requests are turned away before their body is read, and every permit comes back."""

import asyncio
from typing import Any

import pytest

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

"""A request whose bytes were answered before is answered without being read, and never otherwise than if it were."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service.api.wire import StrictRequest
from service.engine.history import History
from service.engine.repeats import _MOST, Facts, Repeat, Repeats
from service.line import Line
from service.metrics import Metrics
from service.state import connect
from tests.service.test_cache import Clock, forecast
from tests.service.test_engine import NAIVE, ask, counted

pytestmark = pytest.mark.anyio

HOUR = 3_600_000


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bodies that were read as JSON."""
    bodies: list[bytes] = []
    read_json = StrictRequest.json

    async def noted(request: StrictRequest) -> Any:
        bodies.append(await request.body())
        return await read_json(request)

    monkeypatch.setattr(StrictRequest, "json", noted)
    return bodies


async def settled(client: Any, app: Any, rows: Any, read: list[bytes]) -> None:
    """Return when the model's runtime is chosen: what answered before that is not what answers after."""
    await forecast(client, rows, cache="bypass")
    await app.state.services.registry.idle()
    read.clear()


async def stored(client: Any, **body: Any) -> Any:
    """A forecast from the stored history."""
    answer = await client.post("/forecast/BTC", json=NAIVE | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def put(client: Any, candles: Any, **body: Any) -> None:
    answer = await client.put("/candles/BTC", json={"candles": candles, "interval": "1h"} | body)
    assert answer.status_code == 200, answer.text


async def test_a_repeated_body_is_not_read_again(running: Any, rows: Any, read: list[bytes]) -> None:
    async with running() as (client, app):
        await settled(client, app, rows, read)
        first, *others = [await ask(client, rows) for _ in range(3)]
        assert len(read) == 1
        lasting = first.content.partition(b',"issued_at"')[0]
        for other in others:
            assert other.content.startswith(lasting)
            assert other.json()["meta"]["cache"] == "hit"
            assert other.headers["Server-Timing"].startswith("queue;dur=0.000")
        assert counted(app, "forecast_requests_total", model="naive", outcome="ok") == 4
        assert counted(app, "cache_requests_total", result="hit") == 2


async def test_unchanged_history_is_not_read_again(running: Any, rows: Any, read: list[bytes]) -> None:
    async with running() as (client, app):
        await put(client, rows(8))
        await settled(client, app, rows, read)
        first, *others = [await stored(client) for _ in range(3)]
        assert len(read) == 1
        assert counted(app, "redis_command_duration_seconds_count", op="history_read") == 2, "the put reads once"
        assert [other["forecast"] == first["forecast"] for other in others] == [True, True]


@pytest.mark.parametrize("fields", [{"cache": "bypass"}, {"seed": None, "cache": "bypass"}])
async def test_what_bypasses_the_cache_is_computed_every_time(client: Any, rows: Any, fields: Any) -> None:
    for _ in range(3):
        assert (await forecast(client, rows, **fields))["meta"]["cache"] == "bypass"


async def test_a_forecast_that_is_not_kept_is_computed_again(running: Any, rows: Any) -> None:
    async with running(cache_bytes=0) as (client, _):
        for _ in range(2):
            assert (await forecast(client, rows))["meta"]["cache"] == "miss"


async def test_a_moved_alias_is_followed(running: Any, rows: Any, put_naive: Any) -> None:
    async with running() as (client, app):
        before = [await forecast(client, rows) for _ in range(2)][-1]
        moved = put_naive(created_at="2025-02-02T00:00:00Z")
        await app.state.services.registry.look()
        await app.state.services.registry.idle()
        after = await forecast(client, rows)
        assert before["model"]["version"] != moved.version
        assert after["model"]["version"] == moved.version


async def test_a_runtime_that_takes_over_answers(running: Any, rows: Any) -> None:
    async with running() as (client, app):
        await settled(client, app, rows, [])
        await forecast(client, rows)
        registry = app.state.services.registry
        ((exact, model),) = registry.loaded().items()
        registry._held[exact].model = replace(model, runtime="other")
        assert (await forecast(client, rows))["model"]["runtime"] == "other"


async def test_a_candle_that_has_closed_meanwhile_counts(running: Any, rows: Any, now: int) -> None:
    clock, opened = Clock(now), now // HOUR * HOUR
    sent = [*rows(8, end=opened - 48 * HOUR), *rows(1, end=opened + HOUR)]
    async with running(now=clock) as (client, _):
        first = [await forecast(client, rows, candles=sent) for _ in range(3)][-1]
        assert first["valid_until"] > opened + HOUR > now
        clock.now = opened + HOUR - 1
        assert (await forecast(client, rows, candles=sent))["as_of"] == first["as_of"]
        clock.now = opened + HOUR
        later = await forecast(client, rows, candles=sent)
        assert later["as_of"] == opened + HOUR
        assert later["warnings"] == []


async def test_a_candle_left_out_by_as_of_stays_out(running: Any, rows: Any, now: int, read: list[bytes]) -> None:
    clock, opened = Clock(now), now // HOUR * HOUR
    sent = [*rows(8, end=opened - 48 * HOUR), *rows(1, end=opened + HOUR)]
    async with running(now=clock) as (client, app):
        await settled(client, app, rows, read)
        first = await forecast(client, rows, candles=sent, as_of=opened)
        clock.now = opened + HOUR
        assert (await forecast(client, rows, candles=sent, as_of=opened))["as_of"] == first["as_of"]
        assert len(read) == 1


async def test_a_clock_set_back_makes_the_future_future_again(running: Any, rows: Any, now: int) -> None:
    clock = Clock(now)
    async with running(now=clock) as (client, _):
        await forecast(client, rows)
        clock.now -= 2 * HOUR
        refused = await ask(client, rows)
        assert refused.status_code == 422
        assert refused.json()["code"] == "future_timestamp"


async def test_a_degraded_service_says_so(running: Any, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as (client, app):
        for _ in range(2):
            assert (await forecast(client, rows))["meta"]["degraded"] == []
        monkeypatch.setattr(type(app.state.services), "degraded", ("ledger",))
        assert (await forecast(client, rows))["meta"]["degraded"] == ["ledger"]


async def test_the_same_bytes_that_are_not_json_are_refused(client: Any, rows: Any) -> None:
    accepted = await ask(client, rows)
    headers = {"Content-Type": "text/plain"}
    refused = await client.post("/forecast/BTC", content=accepted.request.content, headers=headers)
    assert refused.status_code == 422


async def test_a_new_candle_of_the_history_counts(client: Any, rows: Any) -> None:
    *older, newest = rows(9)
    await put(client, older)
    before = [await stored(client) for _ in range(2)][-1]
    await put(client, [newest])
    assert (await stored(client))["as_of"] == before["as_of"] + HOUR


async def test_a_restated_candle_counts_whoever_restates_it(running: Any, rows: Any) -> None:
    async with running() as (client, app):
        candles = rows(8)
        await put(client, candles)
        for _ in range(2):
            await stored(client)
        parts = app.state.services
        elsewhere = History(parts.state, Metrics(CollectorRegistry()))
        times, values = await elsewhere.read("BTC", "1h", 1)
        calendar = (await elsewhere.calendars("BTC"))["1h"]
        await elsewhere.put("BTC", "1h", times, values * 1.1, calendar)
        assert (await stored(client))["last_close"] == candles[-1][4] * 1.1


async def test_a_second_interval_makes_the_question_ambiguous(client: Any, rows: Any) -> None:
    body = {"model": "naive", "horizon": 3}
    await put(client, rows(8))
    for _ in range(2):
        assert (await client.post("/forecast/BTC", json=body)).status_code == 200
    await put(client, rows(8, step=24 * HOUR), interval="1d")
    refused = await client.post("/forecast/BTC", json=body)
    assert refused.json()["code"] == "unknown_interval"


async def test_history_becomes_stale_while_its_forecast_holds(running: Any, rows: Any, now: int) -> None:
    clock, closed = Clock(now), now // HOUR * HOUR
    async with running(now=clock) as (client, _):
        await put(client, rows(8))
        clock.now = closed + 3 * HOUR - HOUR // 2
        fresh = await stored(client)
        clock.now = closed + 3 * HOUR
        assert (await stored(client))["reasons"] == fresh["reasons"]
        clock.now += 1
        assert clock.now < fresh["valid_until"]
        assert (await stored(client))["reasons"] == ["stale_history", *fresh["reasons"]]


def repeat(since: int = 0, until: int = 10) -> Repeat:
    facts = Facts("naive", 0, 0, None, 8, ())
    return Repeat("naive", None, None, b"", facts, None, ("BTC", "1h"), since, until)  # type: ignore[arg-type]


def test_repeats_hold_from_their_first_answer_until_they_expire() -> None:
    repeats = Repeats()
    repeats.put(b"a", repeat(since=5, until=10))
    assert [repeats.get(b"a", now) is not None for now in (4, 5, 9, 10)] == [False, True, True, False]


def test_the_least_recently_repeated_request_is_forgotten() -> None:
    repeats = Repeats()
    for number in range(_MOST):
        repeats.put(b"%d" % number, repeat())
    assert repeats.get(b"0", 1)
    repeats.put(b"new", repeat())
    assert [repeats.get(name, 1) is not None for name in (b"0", b"1", b"new")] == [True, False, True]


async def test_a_redis_that_fails_is_no_revision() -> None:
    nowhere = "unix:///nowhere/redis.sock"
    state: Any = SimpleNamespace(redis=connect(nowhere), line=Line(nowhere), script=lambda name, **_: None)
    assert await History(state, Metrics(CollectorRegistry())).revision("BTC", "1h") is None

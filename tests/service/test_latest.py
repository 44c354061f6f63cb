"""Watched forecasts: fresh before anybody asks, the same as a POST's, and said to be stale while they are not."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastapi.routing
import httpx
import pytest
from pydantic import ValidationError

from service.api.schemas import ForecastAnswer
from service.settings import Settings
from tests.service.test_cache import PASSING, Clock
from tests.service.test_engine import caller, counted, until, waiting
from tests.service.test_serve import PROGRAM, listening

pytestmark = pytest.mark.anyio

HOUR = 3_600_000
WATCH = "BTC:naive:3"
LATEST = "/forecast/BTC/latest"
SAME = {"model": "naive", "horizon": 3}  # what the entry asks


async def put(client: Any, candles: Any, symbol: str = "BTC", interval: str = "1h") -> None:
    answer = await client.put(f"/candles/{symbol}", json={"candles": candles, "interval": interval})
    assert answer.status_code == 200, answer.text


async def settled(app: Any) -> None:
    """Return when the model's runtime is chosen: what answered before that is computed again after."""
    registry = app.state.services.registry
    await registry.get("naive")
    await registry.idle()


def watched(app: Any, index: int = 0) -> Any:
    return app.state.services.watch.watched[index]


async def fresh(app: Any, candles: Any) -> Any:
    """The watched forecast, once it is of the last of these candles."""
    parts, each = app.state.services, watched(app)
    await until(lambda: each.latest and each.latest.facts.as_of == candles[-1][0] + HOUR)
    await until(lambda: not each.is_stale(parts.now()))
    return each.latest


async def latest(client: Any, **query: str) -> Any:
    answer = await client.get(LATEST, params=query)
    assert answer.status_code == 200, answer.text
    return answer


class Stream:
    """A caller of the stream over ASGI itself, who reads only while `reading` is set."""

    def __init__(self, app: Any, **headers: str) -> None:
        self.reading, self.hung_up = asyncio.Event(), asyncio.Event()
        self.reading.set()
        self.messages: list[Any] = []
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "path": "/forecast/BTC/stream",
            "raw_path": b"/forecast/BTC/stream",
            "query_string": b"",
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        }
        self.task = asyncio.create_task(app(scope, caller(b"", self.hung_up), self._send))

    async def _send(self, message: Any) -> None:
        await self.reading.wait()
        self.messages.append(message)

    @property
    def sent(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def events(self) -> list[dict[str, str]]:
        """What has been read, without comments."""
        blocks = [block.split("\n") for block in self.sent.decode().split("\n\n") if block and block[0] != ":"]
        return [dict(line.split(": ", 1) for line in block) for block in blocks]  # type: ignore[misc]

    async def hang_up(self) -> None:
        self.hung_up.set()
        await self.task


async def test_a_put_is_forecast_at_once_by_the_steps_of_a_post(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build, watch=WATCH) as (client, app):
        await settled(app)
        candles = rows(8)
        await put(client, candles)
        await fresh(app, candles)
        found = await latest(client)
        assert ForecastAnswer.model_validate_json(found.content, strict=True)
        posted = (await client.post("/forecast/BTC", json=SAME)).json()
        assert posted["meta"]["cache"] == "hit"
        ours = found.json()
        assert [ours.pop("meta")["degraded"], posted.pop("meta")["degraded"]] == [[], []]
        assert ours == posted, "the clock stands still"
        await app.state.services.register.flush()
        assert counted(app, "ledger_steps_total", outcome="new") == 3
        assert counted(app, "ledger_steps_total", outcome="duplicate") == 0
        assert counted(app, "watch_refreshes_total", outcome="refreshed") == 1
    assert len(faulty.batches) == 1


async def test_candles_that_score_a_forecast_come_to_its_standing_before_the_next_one(
    running: Any, rows: Any, faulty: Any, faulty_build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.api.refreshing._SCORES_SECONDS", 60.0)  # however slow the machine is
    candles = rows(12)
    clock = Clock(candles[0][0])
    async with running(now=clock, build=faulty_build, watch=WATCH) as (client, app):
        await settled(app)
        for count in range(8, 13):
            clock.now = candles[count - 1][0] + HOUR
            await put(client, candles[:count])
            await fresh(app, candles[:count])
            assert (await client.post("/forecast/BTC", json=SAME)).json()["meta"]["cache"] == "hit"
            await app.state.services.register.flush()
        assert counted(app, "ledger_steps_total", outcome="scored") > 0
        assert counted(app, "ledger_steps_total", outcome="new") == 5 * 3
    assert len(faulty.batches) == 5


async def test_one_forecast_is_scored_once_whatever_is_shown_beside_it(running: Any, rows: Any) -> None:
    for mode, outcome in (("off", "new"), ("shadow", "duplicate")):
        async with running(recalibrate=mode) as (client, app):
            await settled(app)
            await put(client, rows(8))
            assert (await client.post("/forecast/BTC", json=SAME)).json()["meta"]["cache"] == "miss"
            await app.state.services.register.flush()
            assert counted(app, "ledger_steps_total", outcome=outcome) == 3


async def test_what_passes_is_true_of_each_answer(running: Any, rows: Any, now: int) -> None:
    clock, candles = Clock(now), rows(8)
    async with running(now=clock, watch=WATCH) as (client, app):
        await put(client, candles)
        await fresh(app, candles)
        first = await latest(client)
        clock.now += 61_500
        second = await latest(client)
    assert [first.headers["Age"], second.headers["Age"]] == ["0", "61"]
    assert first.headers["Last-Modified"] == second.headers["Last-Modified"] == "Sun, 15 Jun 2025 15:06:40 GMT"
    one, other = first.json(), second.json()
    assert other["issued_at"] - one["issued_at"] == 61_500
    assert other["data_age_seconds"] - one["data_age_seconds"] == pytest.approx(61.5)
    assert {name for name in one if one[name] != other[name]} <= set(PASSING)


async def test_stored_history_is_forecast_at_start(running: Any, rows: Any) -> None:
    candles = rows(8)
    async with running() as (client, _):
        await put(client, candles)
    async with running(watch=WATCH) as (client, app):
        await fresh(app, candles)
        assert (await latest(client)).json()["as_of"] == candles[-1][0] + HOUR


async def test_of_candles_that_come_during_a_refresh_the_newest_win(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    candles = rows(12)
    async with running(build=faulty_build, watch=WATCH) as (client, app):
        await settled(app)
        faulty.open.clear()
        await put(client, candles[:8])
        await until(faulty.entered.is_set)
        for count in (9, 10, 11, 12):
            await put(client, candles[:count])
        faulty.open.set()
        await fresh(app, candles)
    assert len(faulty.batches) == 2


async def test_while_a_refresh_runs_the_one_before_is_called_stale(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    candles = rows(9)
    async with running(build=faulty_build, watch=WATCH) as (client, app):
        await settled(app)
        await put(client, candles[:8])
        await fresh(app, candles[:8])
        before = await latest(client)
        assert "Candlecast-Stale" not in before.headers
        faulty.open.clear()
        await put(client, candles)
        during = await latest(client)
        assert during.json()["forecast"] == before.json()["forecast"]
        assert during.json()["meta"]["degraded"] == ["stale"]
        assert during.headers["Candlecast-Stale"] == "true"
        assert during.headers["ETag"] == before.headers["ETag"]
        faulty.open.set()
        await fresh(app, candles)
        after = await latest(client)
    assert after.json()["meta"]["degraded"] == []
    assert after.headers["ETag"] != before.headers["ETag"]


async def test_what_is_out_of_order_is_said_while_it_is_so(
    running: Any, rows: Any, faulty: Any, faulty_build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    candles = rows(9)
    async with running(build=faulty_build, watch=WATCH) as (client, app):
        await settled(app)
        await put(client, candles[:8])
        before = (await fresh(app, candles[:8])).name
        assert "Candlecast-Degraded" not in (await latest(client)).headers
        with monkeypatch.context() as patch:
            patch.setattr(type(app.state.services), "degraded", ("ledger",))
            during = await latest(client)
            assert during.json()["meta"]["degraded"] == ["ledger"]
            assert during.headers["Candlecast-Degraded"] == "ledger"
            stream = Stream(app)
            await until(lambda: stream.events)
            await stream.hang_up()
            assert json.loads(stream.events[0]["data"])["meta"]["degraded"] == ["ledger"]
            faulty.open.clear()
            await put(client, candles)
            both = await latest(client)
            assert both.json()["meta"]["degraded"] == ["ledger", "stale"]
            assert both.headers["Candlecast-Degraded"] == "ledger, stale"
            faulty.open.set()
            await fresh(app, candles)
        after = await latest(client)
    assert watched(app).latest.name != before, "computed while the ledger waited"
    assert after.json()["meta"]["degraded"] == []
    assert "Candlecast-Degraded" not in after.headers


async def test_a_runtime_that_is_not_yet_the_models_own_is_said_of_what_it_computed(running: Any, rows: Any) -> None:
    candles = rows(8)
    async with running(watch=WATCH) as (client, app):
        await settled(app)
        await put(client, candles)
        known = await fresh(app, candles)
        watched(app).latest = replace(known, facts=replace(known.facts, degraded=("ledger", "runtime")))
        found = await latest(client)
    assert found.json()["meta"]["degraded"] == ["runtime"]
    assert found.headers["Candlecast-Degraded"] == "runtime"


async def test_a_failed_refresh_leaves_the_one_before_until_candles_come(
    running: Any,
    rows: Any,
    faulty: Any,
    faulty_build: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.api.refreshing._LOOK_SECONDS", 60.0)  # nothing but candles wakes the worker
    candles = rows(10)
    async with running(build=faulty_build, watch=WATCH) as (client, app):
        await settled(app)
        await put(client, candles[:8])
        await fresh(app, candles[:8])
        faulty.failure = RuntimeError("out of order")
        await put(client, candles[:9])
        await until(lambda: counted(app, "watch_refreshes_total", outcome="failed") == 1)
        stale = await latest(client)
        assert stale.headers["Candlecast-Stale"] == "true"
        assert stale.json()["as_of"] == candles[7][0] + HOUR
        await put(client, candles)
        await fresh(app, candles)
    assert "the watched forecast of BTC by naive is stale: RuntimeError: out of order" in caplog.text


async def test_time_alone_makes_it_stale_and_then_computes_it_anew(running: Any, rows: Any, now: int) -> None:
    clock, candles = Clock(now), rows(8)
    async with running(now=clock, watch=WATCH) as (client, app):
        await put(client, candles)
        await fresh(app, candles)
        first = (await latest(client)).json()
        assert "stale_history" not in first["reasons"]
        clock.now = first["valid_until"] + 3 * HOUR
        assert watched(app).is_stale(clock.now)
        await fresh(app, candles)
        second = (await latest(client)).json()
    assert "stale_history" in second["reasons"]
    assert second["valid_until"] > clock.now


async def test_callers_go_before_what_is_watched(running: Any, rows: Any, faulty: Any, faulty_build: Any) -> None:
    candles, own = rows(8), {"model": "naive", "candles": rows(8), "interval": "1h"}
    async with running(build=faulty_build, watch=WATCH) as (client, app):
        await settled(app)
        faulty.open.clear()
        first = asyncio.create_task(client.post("/forecast/X", json=own | {"seed": 1, "horizon": 4}))
        await until(faulty.entered.is_set)
        await put(client, candles)
        await until(lambda: waiting(app) == 1)
        second = asyncio.create_task(client.post("/forecast/X", json=own | {"seed": 2, "horizon": 5}))
        await until(lambda: waiting(app) == 2)
        faulty.open.set()
        await asyncio.gather(first, second)
        found = await fresh(app, candles)
    assert faulty.batches == [[1], [2], [found.facts.seed]]


async def test_the_newest_forecast_is_not_sent_twice(running: Any, rows: Any) -> None:
    candles = rows(9)
    async with running(watch=WATCH) as (client, app):
        await put(client, candles[:8])
        await fresh(app, candles[:8])
        tag = (await latest(client)).headers["ETag"]
        for named in (tag, tag.removeprefix("W/"), f'"other", {tag}', "*"):
            again = await client.get(LATEST, headers={"If-None-Match": named})
            assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", tag)
        await put(client, candles)
        await fresh(app, candles)
        assert (await client.get(LATEST, headers={"If-None-Match": tag})).status_code == 200


async def test_model_and_interval_choose_among_the_entries(running: Any, rows: Any) -> None:
    async with running(watch="BTC@2h:naive,BTC@1h:naive:3,BTC@1h:toto:3") as (client, app):
        await put(client, rows(8))
        await put(client, rows(8, step=2 * HOUR), interval="2h")
        for index in range(3):
            await until(lambda index=index: watched(app, index).latest)
        chosen = [{}, {"interval": "60m"}, {"model": "toto"}]
        answers = [(await latest(client, **query)).json() for query in chosen]
        found = [(answer["interval"], answer["model"]["name"]) for answer in answers]
        assert found == [("2h", "naive"), ("1h", "naive"), ("1h", "toto-demo")]
        assert (await client.get(LATEST, params={"model": "kronos"})).status_code == 404


async def test_what_is_not_there_says_what_to_do(running: Any) -> None:
    async with running(watch=WATCH) as (client, _):
        for path in ("/forecast/ETH/latest", "/forecast/ETH/stream"):
            unknown = await client.get(path)
            assert (unknown.status_code, unknown.json()["code"]) == (404, "not_watched")
            assert "CANDLECAST_WATCH" in unknown.json()["next_steps"][0]
            assert unknown.headers["Content-Type"] == "application/problem+json"
        early = await client.get(LATEST)
        assert (early.status_code, early.json()["code"]) == (503, "no_forecast_yet")
        assert int(early.headers["Retry-After"]) > 0


async def test_candles_put_to_another_process_are_seen(running: Any, rows: Any, tmp_path: Path) -> None:
    candles, socket = rows(8), tmp_path / "home" / "redis" / "redis.sock"
    async with (
        running(watch=WATCH) as (client, app),
        running(redis_url=f"unix://{socket}") as (other, _),
    ):
        await put(other, candles)
        await fresh(app, candles)
        assert (await latest(client)).json()["as_of"] == candles[-1][0] + HOUR


async def test_a_stream_gets_the_newest_forecast_and_each_later_one(running: Any, rows: Any) -> None:
    candles = rows(10)
    async with running(watch=WATCH) as (client, app):
        await settled(app)
        early = Stream(app)
        for count in (8, 9, 10):
            await put(client, candles[:count])
            name = (await fresh(app, candles[:count])).name
            await until(lambda name=name: early.events and early.events[-1]["id"] == name)
        late, returning = Stream(app), Stream(app, last_event_id=name)
        await until(lambda: late.events)
        await until(lambda: returning.messages)
        for stream in (early, late, returning):
            await stream.hang_up()
    assert early.messages[0]["status"] == 200
    assert dict(early.messages[0]["headers"])[b"content-type"].startswith(b"text/event-stream")
    assert {event["event"] for event in early.events} == {"forecast"}
    answers = [ForecastAnswer.model_validate_json(event["data"], strict=True) for event in early.events]
    assert [row[0] + HOUR for row in candles[7:]] == sorted({answer.as_of for answer in answers})
    assert [event["id"] for event in late.events] == [name]
    assert returning.events == []


async def test_a_stream_that_is_not_read_gets_the_newest_of_what_it_missed(running: Any, rows: Any) -> None:
    candles = rows(30)
    async with running(watch=WATCH) as (client, app):
        await settled(app)
        slow = Stream(app)
        slow.reading.clear()
        for count in range(8, 31):
            await put(client, candles[:count])
            newest = await fresh(app, candles[:count])
        slow.reading.set()
        await until(lambda: slow.events and slow.events[-1]["id"] == newest.name)
        await slow.hang_up()
    assert len(slow.events) < 8, "a few were on their way"


async def test_a_stream_that_has_nothing_to_say_shows_that_it_lives(
    running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastapi.routing, "_PING_INTERVAL", 0.01)
    async with running(watch=WATCH) as (_, app):
        stream = Stream(app)
        await until(lambda: stream.sent.count(b": ping\n\n") > 1)
        await stream.hang_up()


async def test_streams_are_counted_limited_and_freed(running: Any) -> None:
    async with running(watch=WATCH, max_streams=2) as (client, app):
        streams = [Stream(app), Stream(app)]
        await until(lambda: counted(app, "streams_open") == 2)
        refused = await client.get("/forecast/BTC/stream")
        assert (refused.status_code, refused.json()["code"]) == (503, "too_many_streams")
        assert int(refused.headers["Retry-After"]) > 0
        await streams[0].hang_up()
        assert counted(app, "streams_open") == 1
        third = Stream(app)
        await until(lambda: third.messages)
        for stream in (streams[1], third):
            await stream.hang_up()
        assert counted(app, "streams_open") == 0


async def test_streams_end_whole_when_the_service_does(running: Any) -> None:
    async with running(watch=WATCH) as (_, app):
        stream = Stream(app)
        await until(lambda: stream.messages)
    await stream.task
    assert stream.messages[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.fixture
def process(tmp_path: Path, store: Any, put_naive: Any) -> Iterator[Any]:
    put_naive()
    settings = {"HOME": tmp_path / "home", "STORE_ROOT": store.root, "PORT": 0, "ADMIN_PORT": 0, "WATCH": WATCH}
    patient = {"SHUTDOWN_SECONDS": 600}
    environment = {f"CANDLECAST_{name}": str(value) for name, value in (settings | patient).items()}
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True) as child:
        yield child
        child.kill()


def test_sigterm_ends_open_streams(process: Any, rows: Any) -> None:
    url = listening(process)["url"]
    sent = {"candles": rows(8), "interval": "1h"}
    assert httpx.put(f"{url}/candles/BTC", json=sent, timeout=60).status_code == 200
    with httpx.stream("GET", f"{url}/forecast/BTC/stream", timeout=60) as stream:
        lines = stream.iter_lines()
        data = next(line for line in lines if line.startswith("data: "))
        assert json.loads(data.removeprefix("data: "))["symbol"] == "BTC"
        process.send_signal(signal.SIGTERM)
        for _ in lines:
            pass  # to the end, which is a clean one
    assert process.wait(60) == 0  # of the ten minutes that it may


def test_the_watch_list_reads_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANDLECAST_WATCH", "aapl, BTC/USDT@60m:auto:24,BTC-USDT:toto-demo@ab12, ")
    found = [
        (entry.symbol, entry.request.interval, entry.request.model, entry.request.horizon) for entry in Settings().watch
    ]
    assert found == [
        ("AAPL", None, "toto", None),
        ("BTC-USDT", "1h", "auto", 24),
        ("BTC-USDT", None, "toto-demo@ab12", None),
    ]
    monkeypatch.delenv("CANDLECAST_WATCH")
    assert Settings().watch == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("AAPL:kronos:soon", "horizon"),
        ("AAPL:kronos:0", "horizon"),
        ("AAPL:", "model"),
        ("AAPL@:toto", "interval"),
        ("AAPL@1fortnight", "interval"),
        ("AAPL:toto:30:1h", "three parts"),
        ("A B", "a symbol has"),
        ("AAPL:toto:30,aapl:toto:64", "listed twice"),
    ],
)
def test_a_watch_list_that_is_none_is_refused_at_start(monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    monkeypatch.setenv("CANDLECAST_WATCH", text)
    with pytest.raises(ValidationError, match=said):
        Settings()

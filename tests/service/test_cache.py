"""Identical requests cost one computation, while it runs and for as long as its forecast holds."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from models.forecaster import ForecastInput, Sampling
from service.api.schemas import ForecastAnswer
from service.engine.cache import SLOTS, Cache, Kept, forecast_key
from service.engine.registry import LoadedModel
from service.metrics import Metrics
from service.state import State
from tests.service.conftest import Clock
from tests.service.test_engine import NAIVE, ask, counted, held, until, waiting

pytestmark = pytest.mark.anyio

HOUR = 3_600_000
PASSING = ("issued_at", "data_age_seconds", "meta")


def sharing(app: Any) -> int:
    """Requests that wait for computations which others may join."""
    return sum(job.waiters for job in app.state.services.engine._flights.values())


async def forecast(client: Any, rows: Any, **body: Any) -> Any:
    answer = await ask(client, rows, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_hit_differs_from_what_was_computed_in_its_instant_alone(running: Any, rows: Any, clock: Clock) -> None:
    async with running(now=clock) as (client, app):
        computed = await ask(client, rows, quantiles=[0.05, 0.5])
        clock.now += 61_500
        hit = await ask(client, rows, quantiles=[0.05, 0.5])
        first, second = computed.json(), hit.json()
        lasting = computed.content.partition(b',"issued_at"')[0]
        assert hit.content.startswith(lasting)
        assert [first["meta"]["cache"], second["meta"]["cache"]] == ["miss", "hit"]
        assert second["issued_at"] - first["issued_at"] == 61_500
        assert second["data_age_seconds"] - first["data_age_seconds"] == pytest.approx(61.5)
        stages = second["meta"]["timings_ms"]
        assert stages.pop("total") > 0
        assert set(stages.values()) == {0}
        for name in ("seed", "samples", "context", "batch_rows", "degraded"):
            assert second["meta"][name] == first["meta"][name]
        assert counted(app, "cache_requests_total", result="hit") == 1
        assert counted(app, "cache_requests_total", result="miss") == 1
        assert counted(app, "cache_bytes") == len(lasting) + 1


async def test_every_answer_is_as_the_documentation_says(client: Any, rows: Any) -> None:
    fields = set(ForecastAnswer.model_fields)
    for body in ({}, {}, {"cache": "bypass"}):
        answer = await ask(client, rows, **body)
        assert ForecastAnswer.model_validate_json(answer.content, strict=True)
        assert answer.json().keys() == fields


def other_cell(body: dict[str, Any]) -> None:
    body["candles"][3][5] += 1


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "candle": other_cell,
    "seed": lambda body: body.update(seed=1),
    "horizon": lambda body: body.update(horizon=4),
    "quantiles": lambda body: body.update(quantiles=[0.2]),
    "lookback": lambda body: body.update(lookback=7),
    "calendar": lambda body: body.update(calendar="24/5"),
    "version": lambda body: body.update(model="toto-demo"),
}


@pytest.mark.parametrize("name", CHANGES)
async def test_another_question_is_computed(client: Any, rows: Any, name: str) -> None:
    week = 1_749_700_800_000  # 2025-06-12, a Thursday: any calendar will do
    body = NAIVE | {"candles": rows(8, end=week), "seed": 0}
    assert (await client.post("/forecast/BTC", json=body)).json()["meta"]["cache"] == "miss"
    CHANGES[name](body)
    assert (await client.post("/forecast/BTC", json=body)).json()["meta"]["cache"] == "miss"
    assert (await client.post("/forecast/ETH", json=body)).json()["meta"]["cache"] == "miss"
    assert (await client.post("/forecast/BTC", json=body)).json()["meta"]["cache"] == "hit"


async def test_a_forecast_expires_when_the_next_candle_closes(running: Any, rows: Any, clock: Clock) -> None:
    sent = rows(8)
    async with running(now=clock) as (client, _):
        first = await forecast(client, rows, candles=sent)
        clock.now = first["valid_until"] - 1
        assert (await forecast(client, rows, candles=sent))["meta"]["cache"] == "hit"
        clock.now = first["valid_until"]
        assert (await forecast(client, rows, candles=sent))["meta"]["cache"] == "miss"


async def test_a_restated_candle_of_the_history_is_noticed(client: Any, rows: Any) -> None:
    sent = rows(8)
    for close in (100.0, 100.0, 100.1):
        sent[-2][4] = close
        await client.put("/candles/BTC", json={"candles": sent, "interval": "1h"})
        last = (await client.post("/forecast/BTC", json=NAIVE)).json()["meta"]["cache"]
    assert last == "miss"
    assert (await client.post("/forecast/BTC", json=NAIVE)).json()["meta"]["cache"] == "hit"


async def test_bypass_neither_reads_nor_writes(running: Any, rows: Any, faulty: Any, faulty_build: Any) -> None:
    async with running(build=faulty_build) as (client, app):
        for cache, expected in (("bypass", "bypass"), ("use", "miss"), ("bypass", "bypass"), ("use", "hit")):
            assert (await forecast(client, rows, cache=cache))["meta"]["cache"] == expected
        assert counted(app, "cache_requests_total", result="bypass") == 2
    assert len(faulty.batches) == 3


async def test_a_stand_in_for_the_chosen_runtime_is_not_remembered(
    running: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running() as (client, app):
        registry = app.state.services.registry
        settled = await registry.get("naive")

        async def unsettled(*_: str) -> LoadedModel:
            return replace(settled, settled=False)

        with monkeypatch.context() as patched:
            patched.setattr(registry, "get", unsettled)
            for _ in range(2):
                assert (await forecast(client, rows))["meta"]["cache"] == "miss"
        assert (await forecast(client, rows))["meta"]["cache"] == "miss"


async def test_without_redis_forecasts_are_remembered_in_memory(running: Any, rows: Any) -> None:
    async with running(redis_url="redis://127.0.0.1:1/") as (client, _):
        for cache in ("miss", "hit"):
            answer = await forecast(client, rows)
            assert answer["meta"]["degraded"] == ["ledger"]
            assert answer["meta"]["cache"] == cache


async def test_a_forecast_that_is_none_is_not_remembered(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build) as (client, _):
        faulty.spoil = True
        assert (await ask(client, rows)).status_code == 500
        faulty.spoil = False
        assert (await forecast(client, rows))["meta"]["cache"] == "miss"


async def test_without_memory_nothing_is_remembered(running: Any, rows: Any) -> None:
    async with running(cache_bytes=0) as (client, _):
        for _ in range(2):
            assert (await forecast(client, rows))["meta"]["cache"] == "miss"


async def test_forecasts_outlive_a_restart(running: Any, rows: Any) -> None:
    async with running() as (client, _):
        before = await ask(client, rows)
    async with running() as (client, _):
        after = await ask(client, rows)
    assert after.json()["meta"]["cache"] == "hit"
    assert after.content.partition(b',"issued_at"')[0] == before.content.partition(b',"issued_at"')[0]


async def test_identical_requests_in_flight_are_computed_once(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build) as (client, app):
        first = await held(client, rows, faulty)
        same = [ask(client, rows, seed=1) for _ in range(5)]
        await until(lambda: sharing(app) == 6)
        other = ask(client, rows, seed=1, cache="bypass")
        await until(lambda: waiting(app) == 2)
        faulty.open.set()
        answers = [answer.json() for answer in await asyncio.gather(first, *same)]
        assert sorted(answer["meta"]["cache"] for answer in answers) == [*["coalesced"] * 4, "miss", "miss"]
        assert len({json.dumps({**answer, **dict.fromkeys(PASSING)}) for answer in answers[1:]}) == 1
        assert (await other).json()["meta"]["cache"] == "bypass"
        assert counted(app, "cache_requests_total", result="coalesced") == 4
    assert faulty.batches == [[0], [1, 1]]


@pytest.mark.parametrize("way", ["cancelled", "late"])
async def test_what_is_shared_is_computed_without_whoever_asked_first(
    running: Any, rows: Any, faulty: Any, faulty_build: Any, way: str
) -> None:
    async with running(build=faulty_build) as (client, app):
        faulty.steps = True
        first = await held(client, rows, faulty)
        leader = ask(client, rows, seed=1, timeout_ms=200 if way == "late" else 9000)
        await until(lambda: waiting(app) == 1)
        follower = ask(client, rows, seed=1)
        await until(lambda: sharing(app) == 3)
        if way == "late":
            assert (await leader).status_code == 504
        else:
            leader.cancel()
            await until(lambda: sharing(app) == 2)
        faulty.open.set()
        assert (await follower).json()["meta"]["cache"] == "coalesced"
        await first
    assert faulty.batches == [[0], [1]]


async def test_the_last_to_leave_takes_the_row_along(running: Any, rows: Any, faulty: Any, faulty_build: Any) -> None:
    async with running(build=faulty_build) as (client, app):
        first = await held(client, rows, faulty)
        same = [ask(client, rows, seed=1) for _ in range(3)]
        await until(lambda: sharing(app) == 4)
        for each in same:
            each.cancel()
        await until(lambda: sharing(app) == 1)
        again = ask(client, rows, seed=1)
        await until(lambda: sharing(app) == 2)
        faulty.open.set()
        assert (await again).json()["meta"]["cache"] == "miss"
        await first
    assert faulty.batches == [[0], [1]]


async def test_a_failure_is_shared_but_not_kept(running: Any, rows: Any, faulty: Any, faulty_build: Any) -> None:
    async with running(build=faulty_build) as (client, app):
        first = await held(client, rows, faulty)
        same = [ask(client, rows, seed=1) for _ in range(2)]
        await until(lambda: sharing(app) == 3)
        faulty.guilty = 1
        faulty.open.set()
        assert [answer.status_code for answer in await asyncio.gather(first, *same)] == [200, 500, 500]
        faulty.guilty = None
        assert (await forecast(client, rows, seed=1))["meta"]["cache"] == "miss"


def test_the_key_holds_every_field_of_the_input(forecast_input: Callable[..., ForecastInput], put_naive: Any) -> None:
    model = LoadedModel(put_naive(), None)  # type: ignore[arg-type]
    item = forecast_input()
    changed = {
        "timestamps": item.timestamps + 1,
        "candles": item.candles * 2,
        "future_timestamps": item.future_timestamps + 1,
        "local_times": item.local_times + 1,
        "levels": (0.5,),
        "also": (0.9,),
        "sampling": Sampling(samples=8),
        "aggregate": "mean",
        "seed": 1,
        "with_paths": True,
    }
    assert changed.keys() == ForecastInput.__dataclass_fields__.keys()
    keys = {forecast_key(model, replace(item, **{name: value})) for name, value in changed.items()}
    for other in (replace(model, runtime="onnx"), replace(model, dtype="int8")):
        keys.add(forecast_key(other, item))
    keys |= {forecast_key(model, item), forecast_key(model, item, "BTC")}
    assert len(keys) == len(changed) + 4
    assert forecast_key(model, item) == forecast_key(model, replace(item, candles=item.candles.copy()))


def cache_of(state: Any, max_bytes: int = 1 << 20) -> Cache:
    return Cache(state, max_bytes, Metrics(CollectorRegistry()))


class Down:
    """State without a Redis."""

    up = False


async def test_memory_forgets_what_was_not_used_for_longest() -> None:
    cache = cache_of(Down(), max_bytes=1600)
    one, two, three = (bytes([number] * 32) for number in (1, 2, 3))
    for filler in range(16):
        cache.put(bytes([100 + filler] * 32), Kept(10, 1, b"x" * 100), 0)
    cache.put(one, Kept(10, 1, b"1" * 100), 0)
    assert await cache.get(bytes([100] * 32), 0) is None
    assert await cache.get(bytes([101] * 32), 0) is not None
    cache.put(two, Kept(10, 1, b"2" * 100), 0)
    assert await cache.get(bytes([101] * 32), 0) is not None
    assert await cache.get(bytes([102] * 32), 0) is None
    cache.put(three, Kept(10, 1, b"3" * 101), 0)
    assert await cache.get(three, 0) is None, "one forecast may not take more than its share"


@pytest.fixture
async def state(tmp_path: Path) -> Any:
    state = State(None, tmp_path / "home", Metrics(CollectorRegistry()))
    await state.start()
    yield state
    await state.stop()


async def test_redis_answers_for_another_process(state: State) -> None:
    key, kept = b"k" * 32, Kept(20_000, 3, b'{"a":1}')
    one, other = cache_of(state), cache_of(state)
    one.put(key, kept, 10_000)
    await one.stop()
    assert await other.get(key, 10_000) == kept
    assert await cache_of(state).get(key, 20_000) is None


async def test_two_forecasts_of_one_slot_are_never_mistaken(state: State) -> None:
    key, rival = bytes(32), SLOTS.to_bytes(4, "big") + bytes(28)
    cache = cache_of(state)
    cache.put(key, Kept(20_000, 1, b"{}"), 0)
    await cache.stop()
    assert await cache_of(state).get(rival, 0) is None
    assert await cache_of(state).get(key, 0) is not None


async def test_garbage_in_redis_is_a_miss(state: State) -> None:
    await state.redis.set("cc:1:f:0", b"\x00" * 5)
    assert await cache_of(state).get(bytes(32), 0) is None


class Hanging:
    """A Redis that is up and does not answer."""

    up = True

    def __init__(self) -> None:
        self.line = self
        self.asked = 0

    async def ask(self, *_: Any) -> None:
        self.asked += 1
        raise TimeoutError


async def test_a_redis_that_hangs_is_not_asked_again_at_once() -> None:
    state = Hanging()
    cache = cache_of(state)
    for _ in range(3):
        assert await cache.get(b"k" * 32, 0) is None
    assert state.asked == 1

"""`model: ensemble`: blended from its members' own queues, to the bits of the blend without a service."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import pytest

from model_store.manifest import Manifest
from model_store.store import LoadedVersion, ModelStore
from models.forecaster import InvalidModelOutput, forecast
from service.api.forecasting import Noted, settled
from service.api.schemas import ForecastRequest
from service.app import create_admin_app
from service.engine import selection
from service.score.weights import HALF_LIFE_BLOCKS, LiveWeights, live_shares
from tests.service.conftest import NOW, Running
from tests.service.test_accuracy import Market, walk
from tests.service.test_cache import Clock
from tests.service.test_engine import until
from tests.service.test_hot_swap import followed
from tests.walk import WalkForecaster

pytestmark = pytest.mark.anyio

WEIGHTS = [[0.25, 0.75], [0.6, 0.4]]
Put = Callable[..., Manifest]


@pytest.fixture
def networks(store: ModelStore, put_tiny: Any, put_ensemble: Put, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """Tiny Toto and Kronos in the store, and an ensemble of them; the self-test of batches has tests of its own."""
    monkeypatch.setattr(selection, "is_batch_invariant", lambda _: True)
    for family in ("toto", "kronos"):
        put_tiny(store, family)
    return put_ensemble(store, ["toto-demo", "kronos-demo"], WEIGHTS)


def really(version: LoadedVersion, device: str) -> Any:
    return version.build(device)


async def ask(client: Any, rows: Any, count: int = 100, symbol: str = "BTC", **body: Any) -> Any:
    asked = {"model": "ensemble", "interval": "1h", "candles": rows(count), **body}
    return await client.post(f"/forecast/{symbol}", json=asked)


async def test_a_served_blend_is_the_one_without_a_service_to_the_bit(
    running: Running, store: ModelStore, networks: Manifest, rows: Any
) -> None:
    async with running(build=really, runtime="eager-float32") as (client, app):
        answer = await ask(client, rows, seed=7, quantiles=[0.2, 0.5], horizon=10)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        parts = app.state.services
        request = ForecastRequest.model_validate(
            {"model": "ensemble", "interval": "1h", "candles": rows(100), "seed": 7, "quantiles": [0.2, 0.5]}
            | {"horizon": 10}
        )
        asked = await settled("BTC", request, parts, Noted())
        assert asked.cost == 100 + 10 + 64 + 10 * 32  # both members read, and Kronos draws
        [offline] = forecast(store.load("ensemble").build(), [asked.item])
        assert np.array_equal([row[1:] for row in told["forecast"]], offline.point)
        for name, quantiles in offline.quantiles.items():
            for level in (0.2, 0.5):
                row = quantiles[offline.levels.index(level)]
                assert np.array_equal(told["quantiles"][name][str(level)], row)
        assert told["returns"]["prob_up"] == offline.prob_up.tolist()
        name = {"family": "ensemble", "name": "ensemble", "version": networks.version, "weights": 0}
        assert told["model"] == name | {"runtime": "eager+eager", "dtype": "float32+float32"}
        assert (told["horizon"], told["meta"]["samples"], told["meta"]["context"]) == (10, None, 100)
        company = [
            ask(client, rows, seed=seed, cache="bypass", quantiles=[0.2, 0.5], horizon=10) for seed in range(4, 8)
        ]
        among = (await asyncio.gather(*company))[3].json()
        assert (among["forecast"], among["quantiles"]) == (told["forecast"], told["quantiles"])
        direct = await ask(client, rows, model="toto", horizon=10)
        assert direct.status_code == 200
        assert sorted(parts.registry.loaded()) == sorted(
            [f"ensemble@{networks.version}", *(store.config(networks)["members"])]
        ), "no network lies in memory twice"


REFUSED = {
    "samples": {"samples": 8},
    "temperature": {"temperature": 0.5},
    "top_p": {"top_p": 0.5},
    "top_k": {"top_k": 5},
    "paths": {"paths": True},
    "aggregate": {"aggregate": "mean"},
    "horizon": {"horizon": 31},
    "lookback": {"lookback": 513},
}


@pytest.mark.usefixtures("plain")
async def test_what_a_blend_does_not_use_is_refused(running: Running, rows: Any) -> None:
    async with running() as (client, _):
        for name, fields in REFUSED.items():
            answer = await ask(client, rows, **fields)
            assert answer.status_code == 422, name
            assert answer.json()["errors"][0]["pointer"] == f"/{name}"
        assert (await ask(client, rows, lookback=50, aggregate="median", horizon=8)).status_code == 200


async def test_without_an_ensemble_there_is_none(client: Any, rows: Any) -> None:
    answer = await ask(client, rows)
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_model")
    answer = await client.get("/models/naive/weights")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_model")


# -- members that a test can spoil ---------------------------------------------------------------------


@pytest.fixture
def plain(store: ModelStore, put_naive: Put, put_ensemble: Put) -> Manifest:
    """An ensemble of two weightless versions."""
    for name in ("first", "second"):
        put_naive(name)
    return put_ensemble(store, ["first", "second"], [[0.5, 0.5], [0.5, 0.5]])


def spreads(**by_name: float) -> Any:
    """Builds walks, those of `by_name` with so many times the market's spread."""
    return lambda version, device: WalkForecaster(spread=by_name.get(version.manifest.model, 1.0))


@pytest.mark.usefixtures("plain")
async def test_a_member_that_fails_fails_the_request_and_not_the_other_members(
    running: Running, faulty: Any, rows: Any
) -> None:
    def build(version: LoadedVersion, _: str) -> Any:
        return faulty if version.manifest.model == "second" else WalkForecaster()

    async with running(build=build) as (client, app):
        faulty.failure = InvalidModelOutput("no numbers")
        answer = await ask(client, rows)
        assert (answer.status_code, answer.json()["code"]) == (500, "model_output_invalid")
        assert (await ask(client, rows)).status_code == 200
        assert (await ask(client, rows, model="first")).status_code == 200
        faulty.open.clear()
        late = await ask(client, rows, timeout_ms=100, seed=1)
        assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
        faulty.open.set()
        await until(lambda: app.state.services.engine._batcher.depth == 0)


async def test_a_member_that_does_not_load_is_named(
    running: Running, store: ModelStore, plain: Manifest, rows: Any
) -> None:
    member = store.config(plain)["members"][1]
    (store.root / member.replace("@", "/") / "config.json").write_text("{}")
    async with running() as (client, _):
        answer = await ask(client, rows)
        assert (answer.status_code, answer.json()["code"]) == (503, "model_unavailable")
        assert member in answer.json()["detail"]


async def test_a_member_that_does_not_forecast_is_not_tried_at_every_look(
    running: Running, store: ModelStore, plain: Manifest, put_ensemble: Put, rows: Any, monkeypatch: Any
) -> None:
    rehearsed: list[str] = []

    async def rehearse(model: Any) -> None:
        rehearsed.append(model.exact)
        raise InvalidModelOutput("nothing")

    async with running(store_poll_seconds=3600.0) as (client, app):
        assert (await ask(client, rows)).status_code == 200
        registry = app.state.services.registry
        monkeypatch.setattr(registry, "_rehearse", rehearse)
        monkeypatch.setattr("service.engine.failures._FIRST_PAUSE", 300.0)  # however slow the looks are
        other = put_ensemble(store, ["first", "second"], [[0.9, 0.1], [0.9, 0.1]])
        for _ in range(5):
            await followed(app)
        assert rehearsed == store.config(plain)["members"][:1] * 2  # the first failure may have been bad luck
        assert f"ensemble@{other.version}" in registry.failures
        assert (await ask(client, rows)).json()["model"]["version"] == plain.version


async def test_a_new_production_version_of_a_member_changes_no_ensemble(
    running: Running, store: ModelStore, plain: Manifest, put_naive: Put, rows: Any
) -> None:
    async with running(build=spreads(), store_poll_seconds=3600.0) as (client, app):
        before = (await ask(client, rows, seed=1)).json()
        assert before["horizon"] == 30
        assert (await ask(client, rows, model="first")).status_code == 200
        newer = put_naive("first", created_at="2025-05-05T00:00:00Z")
        await followed(app)
        registry = app.state.services.registry
        assert registry.serving()["first", "production"] == f"first@{newer.version}"
        after = (await ask(client, rows, seed=1, cache="bypass")).json()
        assert (after["forecast"], after["model"]) == (before["forecast"], before["model"])
        assert {*store.config(plain)["members"]} < {*registry.loaded()}


@pytest.mark.usefixtures("plain")
async def test_members_go_when_the_ensemble_does(
    running: Running, store: ModelStore, put_naive: Put, put_ensemble: Put, rows: Any
) -> None:
    async with running(build=spreads(), store_poll_seconds=3600.0) as (client, app):
        assert (await ask(client, rows)).status_code == 200
        for name in ("third", "fourth"):
            put_naive(name)
        other = put_ensemble(store, ["third", "fourth"], [[0.5, 0.5], [0.5, 0.5]])
        await followed(app)
        assert (await ask(client, rows, seed=1)).json()["model"]["version"] == other.version
        await until(lambda: len(app.state.services.registry.loaded()) == 3)
        assert {*app.state.services.registry.loaded()} == {f"ensemble@{other.version}", *store.config(other)["members"]}


# -- live weights --------------------------------------------------------------------------------------


def test_live_weights_move_slowly_towards_the_better_member_and_back() -> None:
    numbers = np.arange(60)
    better = np.stack([np.full(60, 0.6), np.full(60, 0.7)])
    shares = [live_shares((0.5, 0.5), better[:, :count], numbers[:count])[0] for count in (1, 10, 60)]
    assert 0.5 < shares[0] < 0.53, "one block says little"
    assert shares[0] < shares[1] < shares[2] < 0.99
    equal = np.stack([np.full(200, 0.6)] * 2)
    gone = np.concatenate([better, equal], axis=1)
    assert live_shares((0.5, 0.5), gone, np.arange(260))[0] == pytest.approx(0.5, abs=0.01)
    assert live_shares((0.2, 0.8), equal, np.arange(200)) == pytest.approx((0.2, 0.8))


def test_a_wild_block_moves_weights_by_no_more_than_half_a_unit() -> None:
    wild = np.array([[0.1], [50.0]])
    first, second = live_shares((0.5, 0.5), wild, np.arange(1))
    assert np.log(first / second) == pytest.approx(1.0)
    later = live_shares((0.5, 0.5), np.hstack([wild, np.full((2, 1), 0.6)]), np.array([0, HALF_LIFE_BLOCKS]))
    assert np.log(later[0] / later[1]) == pytest.approx(0.5), "half its say after the half-life"


async def weights_at(client: Any, name: str = "ensemble") -> Any:
    answer = await client.get(f"/models/{name}/weights")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def heard(app: Any) -> None:
    """Have the weights follow what the evaluator knows by now, as it does itself a moment later."""
    parts = app.state.services
    await parts.weights.follow({series: each.blocks for series, each in parts.evaluator._known.items()})


async def play(market: Market, first: int, stop: int) -> list[Any]:
    """Candles come one by one, and after each somebody asks the ensemble; scores are heard of now and then."""
    answers = []
    for place in range(first, stop):
        await market.candle(place)
        if place % 8 == 0 or place + 1 == stop:
            await market.app.state.services.evaluator.caught_up("BTC", "1h")
            await heard(market.app)
        answers.append(await market.forecast(model="ensemble"))
    return answers


@pytest.fixture
async def admin(running: Running, plain: Manifest) -> AsyncIterator[tuple[Market, httpx.AsyncClient]]:  # noqa: ARG001
    clock = Clock(NOW)
    async with running(now=clock, build=spreads(second=3.0)) as (client, app):
        market = Market(client, app, clock, walk(400))
        await market.begin()
        transport = httpx.ASGITransport(create_admin_app(app.state.services))
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as admin:
            yield market, admin


async def test_weights_follow_the_scores_once_a_block_and_go_back_when_told(
    admin: tuple[Market, httpx.AsyncClient],
) -> None:
    market, port = admin
    client = market.client
    body = {"model": "ensemble", "interval": "1h", "horizon": 4, "candles": market.candles[:64], "seed": 1}
    before = (await client.post("/forecast/ETH", json=body)).json()
    assert before["model"]["weights"] == 0
    assert (await weights_at(client))["in_use"] == []

    answers = await play(market, 64, 120)
    told = await weights_at(client)
    numbers = [each["number"] for each in told["in_use"]]
    assert numbers == [*range(len(numbers), 0, -1)]
    assert 2 <= len(numbers) <= 56 // 24 + 1, "at most one change for each block"
    firsts = [each["weights"]["1h"]["1-8"][0] for each in reversed(told["in_use"])]
    assert 0.5 < firsts[0] < firsts[-1] < 0.95
    assert firsts == sorted(firsts)
    first, second = told["in_use"][0]["scores"]["1h"]["1-8"]
    assert first < second
    assert told["in_use"][0]["weights"]["1h"]["9-30"] == told["published"]["9-30"], "nobody asked for such steps"
    assert sorted({answer["model"]["weights"] for answer in answers}) == [0, *reversed(numbers)]
    standings = (await market.accuracy())["standings"]
    assert {each["model"] for each in standings} == {"ensemble", "first", "second"}, "members are scored beside it"

    after = (await client.post("/forecast/ETH", json=body)).json()
    assert (after["meta"]["cache"], after["model"]["weights"]) == ("miss", numbers[0])
    assert after["quantiles"] != before["quantiles"]
    assert (await client.post("/forecast/ETH", json=body)).json()["meta"]["cache"] == "hit"

    earlier = (await client.post("/forecast/ETH", json=body | {"as_of": int(market.candles[64][0])})).json()
    assert (earlier["model"]["weights"], earlier["quantiles"]) == (0, before["quantiles"]), "scores were not known then"

    published = await port.post("/models/ensemble/weights", json={"rollback": True, "to": 0})
    assert published.status_code == 200, published.text
    newest = published.json()["in_use"][0]
    assert (newest["number"], newest["why"], newest["held"], newest["weights"]) == (
        numbers[0] + 1,
        "rollback",
        True,
        {},
    )
    again = (await client.post("/forecast/ETH", json=body)).json()
    assert (again["forecast"], again["quantiles"]) == (before["forecast"], before["quantiles"])
    await play(market, 120, 146)
    assert (await weights_at(client))["in_use"][0]["number"] == numbers[0] + 1, "they stay until they are released"
    released = await port.post("/models/ensemble/weights", json={"rollback": False})
    assert released.json()["in_use"][0]["why"] == "released"
    await play(market, 146, 172)
    told = await weights_at(client)
    assert told["in_use"][0]["why"] == "scores"
    assert told["in_use"][0]["weights"]["1h"]["1-8"][0] > 0.6
    undone = await port.post("/models/ensemble/weights", json={"rollback": True})
    assert undone.json()["in_use"][0]["weights"] == told["in_use"][1]["weights"], "those before"
    assert len(undone.json()["in_use"]) == told["in_use"][0]["number"] + 1, "nothing is written over"


async def test_weights_that_never_were_cannot_come_back(admin: tuple[Market, httpx.AsyncClient]) -> None:
    _, port = admin
    for body in ({"rollback": True}, {"rollback": True, "to": 3}):
        answer = await port.post("/models/ensemble/weights", json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, "unknown_weights")
    answer = await port.post("/models/first/weights", json={"rollback": True})
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_model")


async def test_two_processes_number_their_weights_together(
    admin: tuple[Market, httpx.AsyncClient], plain: Manifest
) -> None:
    market, _ = admin
    parts = market.app.state.services
    other = LiveWeights(parts.state, parts.registry.store, parts.now, live=True)
    exact = f"ensemble@{plain.version}"
    await other.release(exact)
    await parts.weights.release(exact)
    await other.go_back(exact, 1)
    assert [each.number for each in await parts.weights.former(exact)] == [1, 2, 3]


async def test_damaged_weights_are_left_out(admin: tuple[Market, httpx.AsyncClient], plain: Manifest) -> None:
    market, port = admin
    redis = market.app.state.services.state.redis
    key = f"cc:1:w:ensemble@{plain.version}"
    await redis.rpush(key, b"\xff", b'{"number": 1, "weights": {"1h": [[9, 9]]}}')
    assert (await market.forecast(model="ensemble"))["model"]["weights"] == 0
    assert (await weights_at(market.client))["in_use"] == []
    answer = await port.post("/models/ensemble/weights", json={"rollback": False})
    assert [each["number"] for each in answer.json()["in_use"]] == [1]
    await redis.rpush(key, b"[]")
    answer = await port.post("/models/ensemble/weights", json={"rollback": True, "to": 1})
    assert [each["number"] for each in answer.json()["in_use"]] == [2, 1]


async def test_weights_that_are_not_live_stay_the_published(running: Running, plain: Manifest) -> None:
    clock = Clock(NOW)
    async with running(now=clock, build=spreads(second=3.0), ensemble_live=False) as (client, app):
        market = Market(client, app, clock, walk(200))
        await market.begin()
        answers = await play(market, 64, 92)
        assert {answer["model"]["weights"] for answer in answers} == {0}
        told = await weights_at(client, f"ensemble@{plain.version}")
        assert (told["live"], told["in_use"]) == (False, [])

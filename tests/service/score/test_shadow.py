"""A shadow forecasts what production is asked for: it is scored, and nobody but the ledger sees it."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from model_store.manifest import Manifest
from model_store.store import LoadedVersion, ModelStore
from models.forecaster import Forecast, ForecastInput
from models.scoring import log_returns
from service.app import create_admin_app
from service.engine.shadows import is_of_share
from service.score.ledger import SUMS
from service.score.standings import compared
from tests.service.conftest import NOW
from tests.service.test_accuracy import Market, walk
from tests.service.test_cache import Clock
from tests.service.test_engine import counted, until
from tests.service.test_hot_swap import followed
from tests.walk import WalkForecaster

pytestmark = pytest.mark.anyio


class Drifting(WalkForecaster):
    """The walk, its point moved by a part of the close with every step."""

    def __init__(self, drift: float) -> None:
        super().__init__()
        self._drift = drift

    def _forecast(self, item: ForecastInput) -> Forecast:
        forecast = super()._forecast(item)
        factor = np.exp(self._drift * np.arange(1, item.horizon + 1))
        forecast.point[:, :4] *= factor[:, None]
        for values in forecast.quantiles.values():
            values *= factor
        return forecast


def build(loaded: LoadedVersion, _: str) -> Drifting:
    return Drifting(loaded.config.get("drift", 0.0))


@pytest.fixture
def put_drifting(store: ModelStore) -> Callable[[float], str]:
    """Store a version that drifts, in nobody's way."""

    def put(drift: float) -> str:
        manifest: dict[str, Any] = {
            "model": "naive",
            "family": "naive",
            "origin": {"kind": "trained", "source": "test"},
            "limits": {"min_context": 2, "max_context": 4096, "max_horizon": 512},
            "created_at": "2025-03-01T00:00:00Z",
        }
        complete: Manifest = store.put(manifest, {"family": "naive", "drift": drift}, {})
        return complete.version

    return put


async def play(market: Market, first: int, stop: int) -> list[Any]:
    """Candles come one by one, and after each somebody asks; the answers."""
    answers = []
    for place in range(first, stop):
        await market.candle(place)
        answers.append(await market.forecast())
        await market.app.state.services.shadows.idle()
        await market.app.state.services.register.flush()
    return answers


async def test_a_shadow_is_scored_beside_production_and_shown_to_no_caller(
    running: Any, store: ModelStore, put_drifting: Any
) -> None:
    clock = Clock(NOW)
    async with running(now=clock, build=build, store_poll_seconds=3600.0) as (client, app):
        market = Market(client, app, clock, walk(400))
        await market.begin()
        other = await client.post("/forecast/ETH", json={"model": "naive", "candles": market.candles[:64]})
        production = other.json()["model"]["version"]
        assert (await client.get("/models/naive/shadow")).status_code == 404
        shadow = put_drifting(0.01)
        store.set_shadow("naive", shadow, 1.0)
        await followed(app)
        answers = await play(market, 64, 144)
        assert {answer["model"]["version"] for answer in answers} == {production}
        noted = counted(app, "shadow_forecasts_total", model="naive", outcome="noted")
        assert noted == len(answers)
        await market.accuracy()

        told = (await client.get("/models/naive/shadow")).json()
        assert (told["production"], told["shadow"], told["share"], told["loaded"]) == (production, shadow, 1.0, True)
        [pair] = told["compared"]
        assert (pair["interval"], pair["steps"], pair["symbols"]) == ("1h", "1-8", 1)
        steps = [(origin, step) for origin in range(64, 144) for step in range(1, 5) if origin + step < 144]
        assert pair["shadow"]["steps"] == pair["production"]["steps"] == len(steps)
        assert pair["shadow"]["naive_mae_log_return"] == pytest.approx(pair["production"]["naive_mae_log_return"])
        closes = np.array([row[4] for row in market.candles])
        own = np.mean([abs(log_returns(closes[[o, o + k]])[0]) for o, k in steps])
        moved = np.mean([abs(log_returns(closes[[o, o + k]])[0] - 0.01 * k) for o, k in steps])
        assert pair["production"]["mae_log_return"] == pytest.approx(own, rel=1e-5)
        assert pair["shadow"]["mae_log_return"] == pytest.approx(moved, rel=1e-5)
        assert pair["relative_mae"] == pytest.approx(moved / own, rel=1e-5)

        transport = httpx.ASGITransport(create_admin_app(app.state.services))
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as admin:
            promoted = await admin.post("/models/naive/promote", json={"version": "shadow", "force": "it is a test"})
        assert promoted.json()["shadow"]["compared"] == told["compared"], "the gate shows what it was worth"
        await until(lambda: app.state.services.registry.serving()["naive", "production"] == f"naive@{shadow}")
        assert (await market.forecast())["model"]["version"] == shadow
        assert counted(app, "shadow_forecasts_total", model="naive", outcome="noted") == noted, "it is its own shadow"


async def test_only_requests_for_the_name_alone_are_shadowed_and_a_repeat_once(
    running: Any, store: ModelStore, put_drifting: Any, rows: Any
) -> None:
    async with running(build=build, store_poll_seconds=3600.0) as (client, app):
        body = {"model": "naive", "interval": "1h", "horizon": 3, "candles": rows(16)}
        version = (await client.post("/forecast/BTC", json=body)).json()["model"]["version"]
        shadow = put_drifting(0.01)
        store.set_shadow("naive", shadow, 1.0)
        await followed(app)
        for other in ({"model": f"naive@{version}"}, {"model": "naive@production"}, {"as_of": rows(16)[-1][0]}):
            answer = await client.post("/forecast/ETH", json=body | {"cache": "bypass"} | other)
            assert answer.status_code == 200, answer.text
        await app.state.services.shadows.idle()
        assert counted(app, "shadow_forecasts_total", model="naive", outcome="noted") == 0
        for _ in range(3):
            await client.post("/forecast/ETH", json=body)
            await app.state.services.shadows.idle()
        assert counted(app, "shadow_forecasts_total", model="naive", outcome="noted") == 1
        store.end_shadow("naive")
        await followed(app)
        await client.post("/forecast/SOL", json=body)
        await app.state.services.shadows.idle()
        assert counted(app, "shadow_forecasts_total", model="naive", outcome="noted") == 1
        assert [*app.state.services.registry.loaded()] == [f"naive@{version}"]


async def test_a_busy_service_drops_shadows_and_a_failing_one_is_counted(
    running: Any, store: ModelStore, put_drifting: Any, rows: Any, faulty: Any
) -> None:
    def either(loaded: LoadedVersion, device: str) -> Any:
        return faulty if "drift" in loaded.config else build(loaded, device)

    async with running(build=either, store_poll_seconds=3600.0) as (client, app):
        asked = {"model": "naive", "interval": "1h", "horizon": 3, "candles": rows(16)}
        assert (await client.post("/forecast/BTC", json=asked)).status_code == 200
        store.set_shadow("naive", put_drifting(0.0), 1.0)
        await followed(app)
        faulty.failure = RuntimeError("no memory")
        await client.post("/forecast/BTC", json=asked | {"seed": 99})
        await app.state.services.shadows.idle()
        assert counted(app, "shadow_forecasts_total", model="naive", outcome="failed") == 1
        faulty.open.clear()
        computing = [asyncio.create_task(client.post("/forecast/BTC", json=asked | {"seed": n})) for n in range(9)]
        await until(lambda: counted(app, "shadow_forecasts_total", model="naive", outcome="dropped") >= 1)
        faulty.open.set()
        assert {(await each).status_code for each in computing} == {200}
        await app.state.services.shadows.idle()


def test_the_share_is_of_all_requests_and_the_same_everywhere() -> None:
    digests = [number.to_bytes(8, "big") + b"rest" for number in range(0, 2**64, 2**64 // 1000)]
    assert sum(is_of_share(digest, 0.1) for digest in digests) == 101
    assert all(is_of_share(digest, 1.0) for digest in digests)
    assert is_of_share(bytes(32), 1e-9)


def test_a_rival_with_fewer_targets_is_compared_by_what_naive_was_wrong_by() -> None:
    rng = np.random.default_rng(0)
    sums = np.zeros(40, SUMS)
    sums["count"], sums["naive_error"] = 24, rng.uniform(1, 2, 40)
    sums["error"] = 0.9 * sums["naive_error"]
    rival = sums.copy()
    rival["count"] = 6
    for name in ("error", "naive_error"):
        rival[name] = sums["naive_error"] / 4
    found = compared(sums, rival, 2, interval="1h", group=0, symbols=1)
    assert found
    assert found.relative_mae == pytest.approx(1 / 0.9)
    assert (found.low, found.high) == (pytest.approx(1 / 0.9), pytest.approx(1 / 0.9))
    assert compared(sums, np.zeros(40, SUMS), 2, interval="1h", group=0, symbols=1) is None

"""GET /accuracy, what candles do to it, restatements and splits, and what a forecast says of its model."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import numpy as np
import pytest

from service.app import FastAPI
from tests.service.conftest import NOW, Faulty, Running
from tests.service.test_cache import Clock
from tests.walk import WalkForecaster

pytestmark = pytest.mark.anyio

HOUR = 3_600_000
START = NOW // HOUR * HOUR - 64 * HOUR  # of the first candle
ASKED = {"model": "naive", "horizon": 4}


def walk(count: int, *, seed: int = 0, sigma: float = 0.01) -> list[list[float]]:
    """Hourly ccxt rows from START on."""
    closes = 100 * np.exp(np.cumsum(np.random.default_rng(seed).normal(size=count) * sigma))
    return [
        [START + HOUR * k, close, close * 1.01, close * 0.99, close, 5.0] for k, close in enumerate(closes.tolist())
    ]


class Market:
    """One symbol over HTTP: its candles come, forecasts are asked for."""

    def __init__(self, client: Any, app: FastAPI, clock: Clock, candles: list[list[float]]) -> None:
        self.client, self.app, self.clock, self.candles = client, app, clock, candles

    async def put(self, rows: list[list[float]], **query: Any) -> Any:
        answer = await self.client.put("/candles/BTC", params=query, json={"interval": "1h", "candles": rows})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def candle(self, place: int) -> Any:
        self.clock.now = int(self.candles[place][0]) + HOUR
        return await self.put([self.candles[place]])

    async def begin(self, count: int = 64) -> None:
        self.clock.now = int(self.candles[count - 1][0]) + HOUR
        await self.put(self.candles[:count])

    async def forecast(self, **asked: Any) -> Any:
        answer = await self.client.post("/forecast/BTC", json={**ASKED, **asked})
        assert answer.status_code == 200, answer.text
        await self.app.state.services.register.flush()
        return answer.json()

    async def play(self, first: int, stop: int) -> None:
        """Candles come one by one, and after each somebody asks."""
        for place in range(first, stop):
            await self.candle(place)
            await self.forecast()

    async def accuracy(self) -> Any:
        evaluator = self.app.state.services.evaluator
        await evaluator.caught_up("BTC", "1h")  # evaluating here would race with the evaluator's own task
        await evaluator.summarise()
        answer = await self.client.get("/accuracy/BTC")
        assert answer.status_code == 200, answer.text
        [series] = answer.json()["series"]
        return series


Open = Callable[..., AbstractAsyncContextManager[Market]]


@pytest.fixture
def open_market(running: Running) -> Open:
    @asynccontextmanager
    async def start(*, build: Any = None, **settings: Any) -> AsyncIterator[Market]:
        clock, built = Clock(NOW), {} if build is None else {"build": build}
        async with running(now=clock, **built, **settings) as (client, app):
            market = Market(client, app, clock, walk(400))
            await market.begin()
            yield market

    return start


# -- what is told --------------------------------------------------------------------------------------


async def test_errors_are_those_of_the_candles_that_came(open_market: Open) -> None:
    async with open_market(build=lambda *_: WalkForecaster()) as market:
        answer = await market.forecast()
        assert (await market.accuracy())["standings"] == []
        for place in range(64, 68):
            await market.candle(place)
        series = await market.accuracy()
        [standing] = series["standings"]
        actual = np.array([row[4] for row in market.candles[64:68]])
        errors = np.abs(np.log(actual / market.candles[63][4]))
        assert (standing["model"], standing["steps"]) == ("naive", "1-8")
        assert standing["all"]["steps"] == 4
        assert standing["all"]["mae_log_return"] == pytest.approx(errors.mean(), rel=1e-6)
        assert standing["all"]["naive_mae_log_return"] == pytest.approx(errors.mean(), rel=1e-6)
        assert standing["all"]["relative_mae"] == pytest.approx(1.0, abs=1e-6)
        relative = np.abs(actual - market.candles[63][4]) / market.candles[63][4]
        assert series["last_close"] == market.candles[67][4]
        assert standing["all"]["mae_price"] == pytest.approx(relative.mean() * market.candles[67][4], rel=1e-6)
        band = answer["quantiles"]["close"]
        inside = (np.array(band["0.1"]) <= actual) & (actual <= np.array(band["0.9"]))
        assert standing["all"]["coverage_80"] == inside.mean()
        assert standing["drift"]["state"] == "no_baseline"
        [over_all] = (await market.client.get("/accuracy")).json()["models"]
        assert over_all["all"]["mae_log_return"] == standing["all"]["mae_log_return"]
        assert (over_all["symbols"], over_all["interval"]) == (1, "1h")


async def test_a_symbol_that_nobody_knows_has_no_accuracy(client: Any) -> None:
    for path in ("/accuracy/NOPE", "/forecasts/NOPE"):
        answer = await client.get(path)
        assert answer.status_code == 404
        assert answer.json()["code"] == "unknown_symbol"
    assert (await client.get("/accuracy")).json() == {"models": []}


async def test_an_interval_is_chosen(open_market: Open) -> None:
    async with open_market() as market:
        assert len((await market.client.get("/accuracy/BTC?interval=1h")).json()["series"]) == 1
        assert (await market.client.get("/accuracy/BTC?interval=5m")).status_code == 422


async def test_cached_and_repeated_requests_count_once(open_market: Open) -> None:
    async with open_market() as market:
        for _ in range(5):
            await market.forecast()
            await market.forecast(cache="bypass")
        await market.candle(64)
        [standing] = (await market.accuracy())["standings"]
        assert standing["all"]["steps"] == 1


async def test_forecasts_as_they_were_served(open_market: Open) -> None:
    async with open_market(build=lambda *_: WalkForecaster()) as market:
        first = await market.forecast()
        await market.candle(64)
        await market.forecast()
        everything = (await market.client.get("/forecasts/BTC")).json()
        assert len(everything["rows"]) == 8
        early = (await market.client.get("/forecasts/BTC", params={"as_of": first["issued_at"]})).json()
        steps = [dict(zip(early["columns"], row, strict=True)) for row in early["rows"]]
        assert [step["horizon"] for step in steps] == [1, 2, 3, 4]
        assert [step["target_timestamp"] for step in steps] == [row[0] for row in first["forecast"]]
        for level in ("10", "50", "90"):
            served = first["quantiles"]["close"][f"0.{level[0]}"]
            assert [step[f"predicted_close_p{level}"] for step in steps] == pytest.approx(served)
        refused = await market.client.get("/forecasts/BTC", params={"as_of": "yesterday"})
        assert refused.status_code == 422


# -- what a forecast says ------------------------------------------------------------------------------


async def test_a_forecast_carries_the_realised_skill_of_its_model(open_market: Open) -> None:
    async with open_market(build=lambda *_: WalkForecaster()) as market:
        assert (await market.forecast())["reasons"] == ["no_baseline"]
        await market.play(64, 64 + 24 * 9)
        series = await market.accuracy()
        answer = await market.forecast()
        [standing] = series["standings"]
        assert answer["skill"]["source"] == "realised"
        assert answer["skill"]["relative_mae"] == standing["recent"]["relative_mae"]
        assert answer["skill"]["n"] == standing["recent"]["steps"]
        assert (answer["do_predict"], answer["reasons"]) == (1, [])


async def test_a_model_that_is_surely_worse_than_naive_is_called_that(open_market: Open) -> None:
    class Wrong(WalkForecaster):
        def _forecast(self, item: Any) -> Any:
            found = super()._forecast(item)
            found.quantiles["close"][:] *= 1.03
            return found

    async with open_market(build=lambda *_: Wrong()) as market:
        await market.play(64, 64 + 24 * 9)
        await market.accuracy()
        answer = await market.forecast()
        assert answer["do_predict"] == 0
        assert answer["reasons"] == ["worse_than_naive"]
        assert answer["skill"]["low"] > 1
        auto = await market.forecast(model="auto")
        assert auto["model"]["name"] == "naive"
        assert auto["model"]["version"] == "builtin"
        assert auto["do_predict"] == 0
        assert "worse_than_naive" in auto["reasons"]


@pytest.mark.parametrize(
    ("asked", "pointer"), [({"horizon": 512, "as_of": NOW - HOUR}, "/as_of"), ({"horizon": 513}, "/horizon")]
)
async def test_what_auto_cannot_know_is_refused(client: Any, asked: Any, pointer: str) -> None:
    await client.put("/candles/BTC", json={"interval": "1h", "candles": walk(60)})
    answer = await client.post("/forecast/BTC", json={"model": "auto", **asked})
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["pointer"] == pointer


async def test_an_earlier_instant_knows_no_later_scores(open_market: Open) -> None:
    async with open_market(build=lambda *_: WalkForecaster(spread=0.3), recalibrate="on") as market:
        await market.play(64, 64 + 24 * 9)
        await market.accuracy()
        now = await market.forecast()
        assert now["skill"]["source"] == "realised"
        assert now["calibration"]["scale"]["1-8"] > 1.5
        then = await market.forecast(as_of=int(market.candles[100][0]))
        assert then["skill"] is None
        assert then["calibration"]["scale"]["1-8"] == 1.0


async def test_candles_that_come_while_models_are_summarised_are_not_forgotten(
    open_market: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_market(build=lambda *_: WalkForecaster()) as market:
        evaluator = market.app.state.services.evaluator
        await market.forecast()
        summarise, came = evaluator.summarise, False

        async def during() -> None:
            nonlocal came
            await summarise()
            if not came:
                came = True
                await market.candle(64)

        monkeypatch.setattr(evaluator, "summarise", during)
        evaluator.touch("BTC", "1h")
        async with asyncio.timeout(30):
            while not evaluator.of("BTC", "1h").standings:
                await asyncio.sleep(0.01)


async def test_a_forecast_is_noted_for_whoever_got_it(open_market: Open, faulty: Faulty) -> None:
    async with open_market(build=lambda *_: faulty) as market:
        faulty.open.clear()
        first = asyncio.create_task(market.client.post("/forecast/BTC", json={**ASKED, "timeout_ms": 300}))
        await asyncio.to_thread(faulty.entered.wait, 10)
        second = asyncio.create_task(market.forecast())
        assert (await first).status_code == 504
        faulty.open.set()
        assert (await second)["meta"]["cache"] == "coalesced"
        assert len((await market.client.get("/forecasts/BTC")).json()["rows"]) == 4


@pytest.mark.parametrize("mode", ["off", "shadow", "on"])
async def test_raw_and_calibrated_quantiles_stand_side_by_side(open_market: Open, mode: str) -> None:
    async with open_market(build=lambda *_: WalkForecaster(spread=0.3), recalibrate=mode) as market:
        await market.play(64, 100)
        scale = (await market.accuracy())["calibration"]
        answer = await market.forecast()
        if mode == "off":
            assert answer["calibration"] is None
            return
        told = answer["calibration"]
        assert told["scale"] == {"1-8": next(iter(scale.values()))}
        assert told["scale"]["1-8"] > 1.1
        assert answer["quantiles"] == (told["calibrated"] if mode == "on" else told["raw"])
        for column in ("high", "low", "close"):
            raw, calibrated = told["raw"][column], told["calibrated"][column]
            assert calibrated["0.5"] == pytest.approx(raw["0.5"])
            wider = np.log(np.array(calibrated["0.9"]) / np.array(calibrated["0.5"]))
            assert wider == pytest.approx(told["scale"]["1-8"] * np.log(np.array(raw["0.9"]) / np.array(raw["0.5"])))


# -- restatements and splits ---------------------------------------------------------------------------


async def test_a_jump_is_kept_out_unless_it_is_meant(open_market: Open) -> None:
    async with open_market() as market:
        await market.forecast()
        await market.candle(64)
        halved = [market.candles[63][0], *(value / 2 for value in market.candles[63][1:5]), 10.0]
        kept_out = await market.put([halved])
        assert (kept_out["restated"], kept_out["quarantined"]) == (0, 1)
        meant = await market.put([halved], restate=True)
        assert (meant["restated"], meant["quarantined"], meant["rescored"]) == (1, 0, 1)
        series = await market.accuracy()
        [event] = series["events"]
        assert event == {
            "at": market.clock.now,
            "kind": "restated",
            "first": market.candles[63][0],
            "last": market.candles[63][0],
            "candles": 1,
        }
        [standing] = series["standings"]  # the open forecast followed its origin
        assert standing["all"]["mae_log_return"] == pytest.approx(
            abs(np.log(market.candles[64][4] / halved[4])), rel=1e-6
        )


async def test_a_split_rescales_history_and_open_forecasts_in_one_step(open_market: Open) -> None:
    async with open_market(build=lambda *_: WalkForecaster()) as market:
        await market.forecast()
        await market.candle(64)
        before = await market.accuracy()
        split = {"split": 4, "before": int(market.candles[65][0])}
        market.clock.now += HOUR
        answer = (await market.client.put("/candles/BTC", params=split)).json()
        assert (answer["restated"], answer["received"], answer["warnings"]) == (65, 0, [])
        stored = (await market.client.get("/candles/BTC?limit=3")).json()["candles"]
        assert stored[-1][4] == pytest.approx(market.candles[64][4] / 4)
        assert stored[-1][5] == pytest.approx(market.candles[64][5] * 4)
        assert stored[-1][6] == pytest.approx(market.candles[64][4] * market.candles[64][5], rel=0.05)
        steps = (await market.client.get("/forecasts/BTC")).json()["rows"]
        assert steps[0][6] == pytest.approx(market.candles[63][4] / 4)
        after = await market.accuracy()
        for name in ("steps", "mae_log_return", "coverage_80"):
            assert after["standings"][0]["all"][name] == pytest.approx(before["standings"][0]["all"][name])
        assert after["events"] == [
            {"at": market.clock.now, "kind": "split", "factor": 4.0, "before": market.candles[65][0]}
        ]
        again = (await market.client.put("/candles/BTC", params=split)).json()
        assert again["restated"] == 0
        assert "had been made" in again["warnings"][0]


@pytest.mark.parametrize(
    ("query", "body", "where"),
    [
        ({"split": 4}, None, "before"),
        ({"split": 4, "before": START + 10**12}, None, "before"),
        ({"split": 4, "before": "soon"}, None, "before"),
        ({"split": 4, "before": "9" * 5000}, None, "before"),
        ({"split": 4, "before": START, "interval": "5m"}, None, "interval"),
        ({"split": 0, "before": START}, None, "split"),
        ({"split": "nan", "before": START}, None, "split"),
        ({"split": "inf", "before": START}, None, "split"),
        ({"split": 4, "before": START, "restate": True}, None, "split"),
        ({"split": 4, "before": START}, {"candles": walk(5)}, "split"),
        ({"before": START}, {"candles": walk(5)}, "before"),
        ({"interval": "1h"}, {"candles": walk(5)}, "interval"),
        ({}, None, "/candles"),
    ],
)
async def test_what_makes_no_sense_is_refused(client: Any, query: Any, body: Any, where: str) -> None:
    await client.put("/candles/BTC", json={"interval": "1h", "candles": walk(60)})
    answer = await client.put("/candles/BTC", params=query, **({} if body is None else {"json": body}))
    assert answer.status_code == 422, answer.text
    [error] = answer.json()["errors"]
    assert (error.get("pointer"), error.get("parameter")) == ((where, None) if where[0] == "/" else (None, where))
    stored = (await client.get("/candles/BTC")).json()["candles"]
    assert stored[-1][4] == walk(60)[-1][4]


@pytest.mark.parametrize(
    ("path", "parameter"),
    [
        ("/candles/BTC?interval=5m", "interval"),
        ("/candles/BTC", "interval"),
        ("/candles/BTC?interval=1h&before=soon", "before"),
        ("/candles/BTC?interval=1h&before=-1", "before"),
        ("/candles/BTC?interval=1h&before=1969-12-31T00:00:00Z", "before"),
        (f"/candles/BTC?interval=1h&before={'9' * 5000}", "before"),
        ("/accuracy/BTC?interval=5m", "interval"),
        ("/forecasts/BTC?interval=5m", "interval"),
        ("/forecasts/BTC", "interval"),
        (f"/forecasts/BTC?interval=1h&as_of={'9' * 5000}", "as_of"),
        ("/candles/%20", "symbol"),
        ("/accuracy/%20", "symbol"),
        ("/forecast/%20/latest", "symbol"),
    ],
)
async def test_what_makes_no_sense_in_an_address_is_named(client: Any, path: str, parameter: str) -> None:
    for interval, step in (("1h", HOUR), ("2h", 2 * HOUR)):
        candles = [[START + step * k, *row[1:]] for k, row in enumerate(walk(20))]
        stored = await client.put("/candles/BTC", json={"interval": interval, "candles": candles})
        assert stored.status_code == 200, stored.text
    answer = await client.get(path)
    assert answer.status_code == 422, answer.text
    [error] = answer.json()["errors"]
    assert (error.get("pointer"), error.get("parameter")) == (None, parameter)


async def test_a_split_of_an_unknown_symbol_is_a_404(client: Any) -> None:
    answer = await client.put("/candles/NOPE", params={"split": 2, "before": START})
    assert answer.status_code == 404

"""POST /forecast/{symbol}: what a good request is answered."""

import asyncio
import json
import math
from datetime import UTC, datetime
from typing import Any

import pytest

from bench.service import put_version
from models.forecaster import ForecastInput, Row
from models.naive import NaiveForecaster

pytestmark = pytest.mark.anyio

HOUR = 3_600_000
NAIVE = {"model": "naive", "interval": "1h", "horizon": 3}


async def forecast(client: Any, symbol: str = "BTC-USDT", **body: Any) -> Any:
    answer = await client.post(f"/forecast/{symbol}", json=NAIVE | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_candles_in_the_body_are_forecast(client: Any, rows: Any, now: int) -> None:
    sent = rows()
    answer = await forecast(client, candles=sent)
    last = sent[-1]
    assert [row[0] for row in answer["forecast"]] == [last[0] + HOUR * k for k in (1, 2, 3)]
    assert answer["forecast"][0][1:] == [last[4], last[4], last[4], last[4], last[5]]
    assert answer["quantiles"].keys() == {"high", "low", "close"}
    assert answer["quantiles"]["close"]["0.1"] == [last[4]] * 3
    assert answer["naive"] == {"close": last[4]}
    assert answer["last_close"] == last[4]
    assert answer["as_of"] == last[0] + HOUR
    assert answer["issued_at"] == now
    assert answer["data_age_seconds"] == (now - answer["as_of"]) / 1000
    assert answer["calendar"] == "24/7"
    assert answer["interval"] == "1h"
    assert answer["horizon"] == 3


async def test_a_bare_request_asks_toto_about_the_stored_history(client: Any, rows: Any) -> None:
    assert (await client.put("/candles/AAPL", json={"candles": rows(100)})).status_code == 200
    answer = await client.post("/forecast/aapl")
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"]["name"] == "toto-demo"
    assert answer.json()["symbol"] == "AAPL"
    assert answer.json()["meta"]["context"] == 100


@pytest.mark.parametrize("body", [b"", b"null", b"{}"])
async def test_whatever_asks_for_nothing_asks_for_the_defaults(client: Any, rows: Any, body: bytes) -> None:
    await client.put("/candles/AAPL", json={"candles": rows(100)})
    headers = {"content-type": "application/problem+json; charset=utf-8"}  # any JSON is JSON
    answer = await client.post("/forecast/AAPL", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["horizon"] == 30


async def test_one_seed_gives_identical_bytes_alone_and_among_sixteen(client: Any, rows: Any) -> None:
    body = json.dumps(NAIVE | {"candles": rows(), "seed": 7})
    alone = await client.post("/forecast/A", content=body, headers={"content-type": "application/json"})
    others = [forecast(client, f"B{i}", candles=rows(9 + i)) for i in range(16)]
    again, *_ = await asyncio.gather(
        client.post("/forecast/A", content=body, headers={"content-type": "application/json"}), *others
    )

    def part(text: str) -> str:
        return text[text.index('"forecast":') : text.index('"returns":')]

    assert part(alone.text) == part(again.text)


async def test_the_default_seed_is_a_function_of_the_question(client: Any, rows: Any) -> None:
    first = await forecast(client, candles=rows())
    same = await forecast(client, candles=rows())
    other = await forecast(client, "ETH-USDT", candles=rows())
    assert first["meta"]["seed"] == same["meta"]["seed"] != other["meta"]["seed"]
    assert first["meta"]["seed"] < 2**53


async def test_a_given_seed_is_echoed(client: Any, rows: Any) -> None:
    assert (await forecast(client, candles=rows(), seed=2**63 - 1))["meta"]["seed"] == 2**63 - 1


async def test_the_unclosed_last_candle_is_left_out_and_said_so(client: Any, rows: Any, now: int) -> None:
    sent = rows(9, end=now + HOUR)
    assert sent[-1][0] < now < sent[-1][0] + HOUR
    answer = await forecast(client, candles=sent)
    assert answer["as_of"] == sent[-2][0] + HOUR
    assert answer["last_close"] == sent[-2][4]
    assert any("not closed" in warning for warning in answer["warnings"])


async def test_candles_after_as_of_do_not_count(client: Any, rows: Any) -> None:
    sent = rows(10)
    answer = await forecast(client, candles=sent, as_of=sent[5][0] + HOUR)
    assert answer["last_close"] == sent[5][4]
    earlier = await forecast(client, candles=sent, as_of=sent[5][0] + HOUR - 1)
    assert earlier["last_close"] == sent[4][4]


async def test_as_of_reaches_back_into_the_history(client: Any, rows: Any) -> None:
    sent = rows(10)
    await client.put("/candles/BTC", json={"candles": sent, "interval": "1h"})
    answer = await forecast(client, "BTC", as_of=sent[5][0] + HOUR)
    assert answer["last_close"] == sent[5][4]
    assert "stale_history" not in answer["reasons"]


async def test_lookback_keeps_the_newest_candles(client: Any, rows: Any) -> None:
    assert (await forecast(client, candles=rows(50), lookback=20))["meta"]["context"] == 20
    assert (await forecast(client, candles=rows(50)))["meta"]["context"] == 50


async def test_the_interval_is_taken_from_the_candles_with_a_warning(client: Any, rows: Any) -> None:
    answer = await forecast(client, candles=rows(), interval=None)
    assert answer["interval"] == "1h"
    assert any("interval" in warning for warning in answer["warnings"])


async def test_sixty_minutes_are_an_hour(client: Any, rows: Any) -> None:
    assert (await forecast(client, candles=rows(), interval="60m"))["interval"] == "1h"


async def test_a_pair_may_be_written_with_its_slash(client: Any, rows: Any) -> None:
    answer = await forecast(client, "btc%2Fusdt:usdt", candles=rows())
    assert answer["symbol"] == "BTC-USDT-USDT"


async def test_returns_are_logarithmic(client: Any, rows: Any) -> None:
    answer = await forecast(client, candles=rows())
    assert answer["returns"]["cumulative"]["point"] == [0.0] * 3
    assert answer["returns"]["step"] == {
        "point": [0.0] * 3,
        "quantiles": {"0.1": [0.0] * 3, "0.5": [0.0] * 3, "0.9": [0.0] * 3},
    }
    assert answer["returns"]["prob_up"] == [0.5] * 3


async def test_quantiles_come_back_sorted_and_once(client: Any, rows: Any) -> None:
    answer = await forecast(client, candles=rows(), quantiles=[0.9, 0.05, 0.9])
    assert list(answer["quantiles"]["close"]) == ["0.05", "0.9"]


async def test_every_stage_is_timed(client: Any, rows: Any) -> None:
    timings = (await forecast(client, candles=rows()))["meta"]["timings_ms"]
    assert list(timings) == ["queue", "batch", "prepare", "run", "finish", "total"]
    assert all(value >= 0 for value in timings.values())
    assert timings["total"] >= sum(value for stage, value in timings.items() if stage != "total")


async def test_a_forecast_is_valid_until_its_first_candle_closes(client: Any, rows: Any, now: int) -> None:
    sent = rows()
    answer = await forecast(client, candles=sent)
    assert answer["valid_until"] == sent[-1][0] + 2 * HOUR
    old = await forecast(client, candles=rows(end=now - 500 * HOUR))
    assert old["valid_until"] == now + HOUR


async def test_daily_exchange_candles_are_forecast_on_trading_days(client: Any) -> None:
    days = [1749427200000, 1749513600000, 1749600000000, 1749686400000, 1749772800000]  # Mon 9 – Fri 13 June 2025
    candles = [[day, 10.0, 11.0, 9.0, 10.5, 5.0] for day in days]
    answer = await forecast(client, "AAPL", candles=candles, interval="1d", horizon=5)
    assert answer["calendar"] == "XNYS"
    monday, juneteenth = 1750032000000, 1750291200000
    assert answer["forecast"][0][0] == monday
    assert juneteenth not in [row[0] for row in answer["forecast"]]


class Watching(NaiveForecaster):
    """Keeps what it is asked."""

    def __init__(self) -> None:
        self.seen: list[ForecastInput] = []

    def encode(self, item: ForecastInput) -> Row:
        self.seen.append(item)
        return super().encode(item)


async def test_the_model_is_told_the_time_of_the_exchange_over_summer_time(running: Any) -> None:
    watching = Watching()
    friday = 1709908200000  # 8 March 2024, 9:30 in New York, the last day of winter time there
    opens = [friday + HOUR * k for k in range(7)]
    body = {"candles": [[at, 10.0, 11.0, 9.0, 10.0, 1.0] for at in opens], "interval": "1h", "calendar": "XNYS"}
    async with running(build=lambda *_: watching) as (client, _):
        await forecast(client, **body | {"horizon": 2})
    item = next(each for each in watching.seen if each.timestamps[0] == friday)
    assert item.future_timestamps.tolist() == [at + 71 * HOUR for at in opens[:2]]  # Monday, an hour earlier in UTC
    shown = [f"{datetime.fromtimestamp(at / 1000, UTC):%a %H:%M}" for at in item.local_times.tolist()]
    assert (shown[0], shown[6], shown[7:]) == ("Fri 09:30", "Fri 15:30", ["Mon 09:30", "Mon 10:30"])


async def test_a_version_without_an_evaluation_does_not_predict(client: Any, rows: Any) -> None:
    answer = await forecast(client, candles=rows())
    assert answer["do_predict"] == 0
    assert answer["reasons"] == ["no_baseline"]
    assert answer["skill"] is None


def evaluation(low: float, high: float) -> dict[str, Any]:
    return {
        "windows": "test",
        "symbols": ["AAPL"],
        "start": "2012-01-01",
        "end": "2013-01-01",
        "interval": "1d",
        "horizon": 30,
        "origins": 40,
        "metrics": {
            "mae_log_return": {"value": 0.03, "naive": 0.04},
            "skill_vs_naive": {"value": (low + high) / 2, "low": low, "high": high},
            "coverage_80": {"value": 0.79},
        },
    }


@pytest.mark.parametrize(("high", "do_predict"), [(0.1, 1), (-0.01, 0)])
async def test_only_a_skill_below_zero_beyond_doubt_is_worse_than_naive(
    client: Any, put_naive: Any, rows: Any, high: float, do_predict: int
) -> None:
    put_naive("scored", evaluations=[evaluation(-0.2, high)])
    answer = await forecast(client, model="scored", candles=rows())
    assert answer["do_predict"] == do_predict
    assert answer["reasons"] == ([] if do_predict else ["worse_than_naive"])
    assert answer["skill"] == {
        "source": "evaluation",
        "window": "2012-01-01/2013-01-01",
        "relative_mae": 0.03 / 0.04,
        "low": 1 - high,
        "high": 1.2,
        "coverage_80": 0.79,
        "n": 40,
    }


async def test_an_old_history_is_answered_but_called_stale(client: Any, put_naive: Any, rows: Any, now: int) -> None:
    put_naive("scored", evaluations=[evaluation(0.1, 0.2)])
    await client.put("/candles/OLD", json={"candles": rows(end=now - 1000 * HOUR), "interval": "1h"})
    await client.put("/candles/FRESH", json={"candles": rows(), "interval": "1h"})
    old = await forecast(client, "OLD", model="scored")
    assert old["do_predict"] == 0
    assert old["reasons"] == ["stale_history"]
    assert (await forecast(client, "FRESH", model="scored"))["do_predict"] == 1


async def test_serving_defaults_of_the_version_apply_until_the_request_says_otherwise(
    client: Any, put_naive: Any, rows: Any
) -> None:
    put_naive("brief", serving={"horizon": 5, "lookback": 6})
    await client.put("/candles/BTC", json={"candles": rows(50), "interval": "1h"})
    answer = await client.post("/forecast/BTC", json={"model": "brief"})
    assert answer.json()["horizon"] == 5
    assert answer.json()["meta"]["context"] == 6
    answer = await client.post("/forecast/BTC", json={"model": "brief", "horizon": 2, "lookback": 7})
    assert answer.json()["horizon"] == 2
    assert answer.json()["meta"]["context"] == 7


async def test_every_tuned_setting_of_a_version_is_what_a_request_gets_that_does_not_override_it(
    running: Any, store: Any, tiny: Any, rows: Any
) -> None:
    """Asked for nothing, it answers as the same weights do that are asked for all of it."""
    tuned = {"lookback": 20, "samples": 7, "temperature": 0.6, "top_p": 0.9, "top_k": 9, "aggregate": "mean"}
    config, weights = tiny["kronos"]
    for name, serving in (("plain", {}), ("tuned", tuned)):
        put_version(store, name, "kronos", config, weights, serving=serving)
    async with running(build=lambda version, device: version.build(device)) as (client, _):
        await client.put("/candles/BTC", json={"candles": rows(80), "interval": "1h"})

        async def ask(model: str, **words: Any) -> Any:
            answer = await forecast(client, "BTC", model=model, seed=5, **words)
            return answer["forecast"], answer["quantiles"], answer["meta"]["context"], answer["meta"]["samples"]

        expected = await ask("plain", **tuned)
        assert await ask("tuned") == expected
        usual = {"lookback": 64, "samples": 32, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "aggregate": "median"}
        for name, value in usual.items():
            overridden = await ask("tuned", **{name: value})
            assert overridden == await ask("plain", **{**tuned, name: value})
            assert overridden != expected, name


async def test_extreme_but_valid_candles_never_answer_with_a_number_that_is_none(client: Any, rows: Any) -> None:
    for scale in (1e-12, 1e12):
        sent = [[row[0], *(value * scale for value in row[1:5]), -0.0] for row in rows()]
        answer = await forecast(client, candles=sent)
        assert all(math.isfinite(value) for row in answer["forecast"] for value in row)
        assert answer["forecast"][0][4] == pytest.approx(sent[-1][4])

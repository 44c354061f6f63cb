"""PUT and GET /candles/{symbol}, GET /symbols."""

from datetime import UTC, datetime
from typing import Any

import pytest

pytestmark = pytest.mark.anyio

HOUR = 3_600_000
DAY = 24 * HOUR
MONDAY = 1749427200000  # 9 June 2025, 00:00 UTC


async def put(client: Any, symbol: str, **body: Any) -> Any:
    answer = await client.put(f"/candles/{symbol}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_what_was_put_is_got(client: Any, rows: Any) -> None:
    sent = rows(20)
    answer = await put(client, "btc/usdt".replace("/", "%2F"), candles=sent, interval="1h")
    assert (answer["received"], answer["new"], answer["duplicate"], answer["restated"]) == (20, 20, 0, 0)
    got = (await client.get("/candles/BTC-USDT")).json()
    assert got["interval"] == "1h"
    assert got["calendar"] == "24/7"
    assert [row[:6] for row in got["candles"]] == sent
    few = (await client.get(f"/candles/BTC-USDT?interval=60m&limit=3&before={sent[10][0]}")).json()
    at = datetime.fromtimestamp(sent[10][0] / 1000, UTC).isoformat()
    same = await client.get("/candles/BTC-USDT", params={"interval": "60m", "limit": 3, "before": at})
    assert same.json() == few
    assert [row[0] for row in few["candles"]] == [row[0] for row in sent[7:10]]


async def test_a_second_put_says_what_changed(client: Any, rows: Any) -> None:
    sent = rows(20)
    await put(client, "BTC", candles=sent[5:15], interval="1h")
    sent[6][5] += 1
    answer = await put(client, "BTC", candles=sent, interval="1h")
    assert (answer["new"], answer["duplicate"], answer["restated"]) == (10, 9, 1)


async def test_an_unclosed_candle_is_not_stored(client: Any, rows: Any, now: int) -> None:
    sent = rows(3, end=now + HOUR)
    answer = await put(client, "BTC", candles=sent, interval="1h")
    assert answer["new"] == 2
    assert any("not closed" in warning for warning in answer["warnings"])
    answer = await put(client, "BTC", candles=sent[2:], interval="1h")
    assert answer["received"] == 0


async def test_candles_off_the_stored_grid_are_refused(client: Any, rows: Any) -> None:
    sent = rows(10)
    await put(client, "BTC", candles=sent[:5], interval="1h")
    shifted = [[row[0] - 60_000, *row[1:]] for row in sent[5:]]
    answer = await client.put("/candles/BTC", json={"candles": shifted, "interval": "1h"})
    assert answer.status_code == 422
    assert answer.json()["code"] == "off_grid"
    assert answer.json()["errors"][0]["pointer"] == "/candles/0/0"


async def test_a_given_calendar_is_remembered(client: Any) -> None:
    days = [[MONDAY + DAY * k, 10.0, 11.0, 9.0, 10.0, 1.0] for k in range(4)]
    assert (await put(client, "XYZ", candles=days[:2], interval="1d", calendar="XLON"))["calendar"] == "XLON"
    assert (await put(client, "XYZ", candles=days[2:], interval="1d"))["calendar"] == "XLON"
    listed = (await client.get("/symbols")).json()["symbols"]
    assert listed == [
        {"symbol": "XYZ", "interval": "1d", "calendar": "XLON", "first": MONDAY, "last": MONDAY + 3 * DAY}
    ]
    saturday = [[MONDAY + 5 * DAY, 10.0, 11.0, 9.0, 10.0, 1.0]]
    assert (await client.put("/candles/XYZ", json={"candles": saturday, "interval": "1d"})).status_code == 422


async def test_an_inferred_calendar_is_revised_by_later_candles(client: Any) -> None:
    days = [[MONDAY + DAY * k, 10.0, 11.0, 9.0, 10.0, 1.0] for k in range(6)]
    assert (await put(client, "XYZ", candles=days[:5], interval="1d"))["calendar"] == "XNYS"
    assert (await put(client, "XYZ", candles=days[5:], interval="1d"))["calendar"] == "24/7"
    assert (await client.get("/candles/XYZ")).json()["calendar"] == "24/7"


async def test_candles_around_a_lunch_break_have_a_slot_each(client: Any) -> None:
    opens = [MONDAY + DAY * k + at for k in range(3) for at in (0, 3 * HOUR + HOUR // 2)]  # Tokyo
    sent = [[time, 10.0, 11.0, 9.0, 10.0, 1.0] for time in opens]
    for begun in (0, 1):
        answer = await put(client, "7203.T", candles=sent[begun::2], interval="4h", calendar="XTKS")
        assert (answer["new"], answer["restated"]) == (3, 0)
    got = (await client.get(f"/candles/7203.T?before={opens[-1]}")).json()["candles"]
    assert [row[0] for row in got] == opens[:-1]


@pytest.mark.parametrize("late", [0, -1])
async def test_candles_labelled_by_their_close_are_shifted(client: Any, rows: Any, late: int) -> None:
    sent = rows(5)
    closes = [[row[0] + HOUR + late, *row[1:]] for row in sent]
    await put(client, "BTC", candles=closes, interval="1h", time_is="close")
    assert [row[0] for row in (await client.get("/candles/BTC")).json()["candles"]] == [row[0] for row in sent]


async def test_daily_candles_labelled_by_the_bell_find_their_session(client: Any) -> None:
    bells = [[MONDAY + DAY * k + 20 * HOUR, 10.0, 11.0, 9.0, 10.0, 1.0] for k in range(4)]
    answer = await put(client, "XYZ", candles=bells, interval="1d", time_is="close")
    assert answer["calendar"] == "XNYS"
    got = (await client.get("/candles/XYZ")).json()["candles"]
    assert [row[0] for row in got] == [MONDAY + DAY * k for k in range(4)]


async def test_two_closes_of_one_day_are_refused(client: Any) -> None:
    closes = [MONDAY + 20 * HOUR, MONDAY + DAY, MONDAY + DAY + 20 * HOUR]  # the bell and midnight
    sent = [[time, 10.0, 11.0, 9.0, 10.0, 1.0] for time in closes]
    body = {"candles": sent, "interval": "1d", "time_is": "close", "calendar": "XNYS"}
    for answer in (await client.put("/candles/XYZ", json=body), await client.post("/forecast/XYZ", json=body)):
        assert answer.status_code == 422, answer.text
        assert answer.json()["errors"][0]["pointer"] == "/candles/1/0"


async def test_hourly_session_candles_keep_their_short_last_slot(client: Any) -> None:
    opening = MONDAY + 13 * HOUR + HOUR // 2
    opens = [opening + HOUR * k for k in range(7)]
    closes = [*(time + HOUR for time in opens[:-1]), MONDAY + 20 * HOUR]
    candles = [[time, 10.0, 11.0, 9.0, 10.0, 1.0] for time in closes]
    await put(client, "XYZ", candles=candles, interval="1h", time_is="close", calendar="XNYS")
    assert [row[0] for row in (await client.get("/candles/XYZ")).json()["candles"]] == opens

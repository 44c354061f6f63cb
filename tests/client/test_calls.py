"""Both clients against a server that follows a script: what is sent, tried again, kept and refused."""

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pandas as pd
import pytest

from candlecast_client import (
    Candlecast,
    CandlecastError,
    DeadlineExceeded,
    Invalid,
    NoAnswer,
    NotAllowed,
    NotFound,
    TooManyRequests,
    Unavailable,
)
from candlecast_client import asking as asking_module
from candlecast_client import events as events_module

NOW = 1_750_000_000_000
BUSY = 503, {}, {"detail": "no room", "code": "overloaded", "next_steps": ["Try again later."]}
SYMBOLS = 200, {}, {"symbols": []}


def forecast(**fields: Any) -> dict[str, Any]:
    """The least that an answer must have here."""
    return {
        "symbol": "BTC",
        "issued_at": NOW,
        "valid_until": NOW + 60_000,
        "as_of": NOW,
        "data_age_seconds": 1.5,
        "meta": {"degraded": [], "seed": 1},
        **fields,
    }


@dataclass
class Clock:
    now: float = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What the calls take for the time, which stands still."""
    clock = Clock()
    monkeypatch.setattr(asking_module, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (asking_module, events_module):
        monkeypatch.setattr(module, "_FIRST_WAIT", 0.01)


def test_a_key_is_sent_as_a_bearer_token_and_only_there(client: Any, scripted: Any) -> None:
    server = scripted(SYMBOLS)
    client(server.url, "cc_test_1_secret").symbols()
    assert server.headers[0]["authorization"] == "Bearer cc_test_1_secret"
    assert "secret" not in server.asked[0][1]


def test_what_is_busy_or_hangs_up_is_tried_again(client: Any, scripted: Any) -> None:
    server = scripted(BUSY, 0, (502, {}, "<html>"), (200, {}, forecast()))
    assert client(f"{server.url}/base/").forecast([[1, 2]], symbol="A/B", horizon=3).symbol == "BTC"
    assert {(method, path) for method, path, _ in server.asked} == {("POST", "/base/forecast/A%2FB")}
    assert [(body["candles"], body["horizon"]) for _, _, body in server.asked] == [([[1, 2]], 3)] * 4


def test_the_number_of_tries_is_bounded(client: Any, scripted: Any) -> None:
    server = scripted(*[BUSY] * 3)
    with pytest.raises(Unavailable) as caught:
        client(server.url, retries=2).symbols()
    assert len(server.asked) == 3
    assert (caught.value.status, caught.value.code) == (503, "overloaded")
    assert str(caught.value) == "no room (503 overloaded)\nTry again later."


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 500, 504])
def test_what_no_waiting_changes_is_asked_once(client: Any, scripted: Any, status: int) -> None:
    kinds = {401: NotAllowed, 403: NotAllowed, 404: NotFound, 500: CandlecastError, 504: DeadlineExceeded}
    server = scripted((status, {"Retry-After": "0"}, {"detail": "no", "code": "why"}))
    with pytest.raises(CandlecastError) as caught:
        client(server.url).symbols()
    assert type(caught.value) is kinds.get(status, Invalid)
    assert len(server.asked) == 1


def test_retry_after_is_waited_for(client: Any, scripted: Any) -> None:
    server = scripted((429, {"Retry-After": "1"}, BUSY[2]), SYMBOLS)
    started = time.monotonic()
    client(server.url).symbols()
    assert time.monotonic() - started >= 1


def test_retry_after_may_be_a_date(scripted: Any) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    server = scripted((503, {"Retry-After": later}, BUSY[2]), (503, {"Retry-After": "soon"}, BUSY[2]))
    with Candlecast(server.url, retries=0) as asking:
        with pytest.raises(Unavailable) as dated:
            asking.symbols()
        with pytest.raises(Unavailable) as undated:
            asking.symbols()
    assert 3000 < dated.value.retry_after <= 3600
    assert undated.value.retry_after is None


def test_no_wait_goes_beyond_the_deadline(client: Any, scripted: Any) -> None:
    server = scripted((429, {"Retry-After": "9"}, BUSY[2]))
    with pytest.raises(TooManyRequests) as caught:
        client(server.url, timeout=5).symbols()
    assert caught.value.retry_after == 9


def test_silence_ends_at_the_deadline(client: Any, scripted: Any) -> None:
    with pytest.raises(DeadlineExceeded, match=r"within 0.3 s"):
        client(scripted(60).url).forecast(symbol="BTC", timeout=0.3)


def test_every_step_of_an_exchange_has_what_the_others_left(clock: Clock) -> None:
    deadline = asking_module.Deadline(5)
    assert deadline.get("connect") == 5
    clock.now += 3
    assert deadline.get("read") == 2
    clock.now += 3
    assert 0 < deadline.get("read") < 0.01


def test_the_service_is_told_the_deadline_in_equal_bytes_unless_it_is_a_later_try(client: Any, scripted: Any) -> None:
    server = scripted((200, {}, forecast()), BUSY, (200, {}, forecast()))
    asking = client(server.url, timeout=7)
    for _ in range(2):
        asking.forecast(symbol="BTC")
    first, second, third = (body["timeout_ms"] for _, _, body in server.asked)
    assert (first, second) == (7000, 7000)
    assert third < 7000


def test_a_service_that_is_not_there_is_told(client: Any, scripted: Any) -> None:
    server = scripted()
    server.stop()
    with pytest.raises(NoAnswer, match="does not answer") as caught:
        client(server.url, timeout=5).symbols()
    assert (caught.value.status, caught.value.code) == (None, "no_answer")


def test_another_server_than_candlecast_is_told_from_it(client: Any, scripted: Any) -> None:
    other = client(scripted((200, {}, "<html>"), (404, {}, "Not\nfound"), (302, {"Location": "/login"}, "")).url)
    with pytest.raises(NoAnswer, match="something else"):
        other.symbols()
    with pytest.raises(NotFound, match="answers: Not found"):
        other.symbols()
    with pytest.raises(NoAnswer, match="answers: Found"):
        other.symbols()


def test_a_problem_says_where_and_what_next(client: Any, scripted: Any) -> None:
    told = {
        "type": "about:blank",
        "title": "Unprocessable Content",
        "status": 422,
        "code": "too_few_candles",
        "detail": "5 closed candles are needed, 2 are there",
        "errors": [{"pointer": "/candles", "detail": "too few"}],
        "next_steps": ["Send more."],
        "needed": 5,
        "got": 2,
    }
    with pytest.raises(Invalid) as caught:
        client(scripted((422, {}, told)).url).symbols()
    assert caught.value.facts == {"needed": 5, "got": 2}
    assert str(caught.value).splitlines() == [
        "5 closed candles are needed, 2 are there (422 too_few_candles)",
        "/candles: too few",
        "Send more.",
    ]


def test_the_newest_forecast_is_not_sent_twice_and_told_to_be_stale(client: Any, scripted: Any) -> None:
    first = 200, {"ETag": 'W/"1"', "Age": "3"}, forecast()
    again = 304, {"ETag": 'W/"1"', "Age": "8", "Candlecast-Degraded": "ledger, stale", "Content-Length": "0"}, ""
    other = 200, {"ETag": 'W/"2"', "Age": "0"}, forecast(symbol="NEW")
    server = scripted(first, again, other)
    asking = client(server.url)
    fresh, stale, new = (asking.latest("BTC", model="naive") for _ in range(3))
    assert [each.get("if-none-match") for each in server.headers] == [None, 'W/"1"', 'W/"1"']
    assert (fresh.is_stale, stale.is_stale, new.symbol) == (False, True, "NEW")
    assert stale.meta["degraded"] == ["ledger", "stale"]
    assert stale.issued_at - fresh.issued_at == pd.Timedelta(seconds=5)
    assert stale.answer["data_age_seconds"] == 6.5


def test_a_forecast_is_kept_only_if_asked_and_as_long_as_it_is_valid(client: Any, scripted: Any, clock: Clock) -> None:
    server = scripted(*[(200, {}, forecast())] * 3)
    keeping = client(server.url, keep_forecasts=True)
    kept = keeping.forecast([[1]], symbol="BTC")
    assert keeping.forecast([[1]], symbol="BTC", timeout=9) is kept
    clock.now += 60
    assert keeping.forecast([[1]], symbol="BTC") is not kept
    assert client(server.url).forecast([[1]], symbol="BTC") is not kept
    assert len(server.asked) == 3


@pytest.mark.parametrize("change", ["candles", "option", "symbol", "bypass", "degraded"])
def test_no_other_forecast_is_taken_for_the_kept_one(client: Any, scripted: Any, change: str) -> None:
    degraded = ["runtime"] if change == "degraded" else []
    server = scripted(*[(200, {}, forecast(meta={"degraded": degraded}))] * 2)
    keeping = client(server.url, keep_forecasts=True)
    keeping.forecast([[1]], symbol="BTC")
    keeping.forecast(
        [[2 if change == "candles" else 1]],
        symbol="ETH" if change == "symbol" else "BTC",
        **({"horizon": 2} if change == "option" else {"cache": "bypass"} if change == "bypass" else {}),
    )
    assert len(server.asked) == 2


def test_many_candles_go_in_parts_that_are_counted_together(client: Any, scripted: Any) -> None:
    counts = dict.fromkeys(("received", "new", "duplicate", "restated", "quarantined", "scored", "rescored"), 1)
    answer = {"symbol": "BTC", "interval": "1h", "calendar": "24/7", "warnings": ["so"], **counts}
    server = scripted(*[(200, {}, answer)] * 2)
    hours = pd.date_range("2020-01-01", periods=20_001, freq="h", tz="UTC")
    frame = pd.DataFrame({"open": 1.0, "high": 2.0, "low": 0.5, "close": 1.5, "volume": 1.0}, hours)
    total = client(server.url).put_candles("BTC", frame)
    assert (total["new"], total["warnings"]) == (2, ["so"])
    parts = [body["candles"]["timestamp"] for _, _, body in server.asked]
    assert list(map(len, parts)) == [20_000, 1]
    assert parts[1] == [1000 * int(hours[-1].timestamp())]
    assert [body["interval"] for _, _, body in server.asked] == [None, "1h"]


def test_more_candles_than_a_page_come_page_by_page(client: Any, scripted: Any) -> None:
    def page(first: int, count: int) -> Any:
        rows = [[3_600_000 * hour, 1.0, 2.0, 0.5, 1.5, 1.0, 2.0] for hour in range(first, first + count)]
        return 200, {}, {"interval": "1h", "candles": rows}

    server = scripted(page(105_000, 10_000), page(102_000, 3_000))
    table = client(server.url).candles("BTC", limit=15_000)
    assert len(table) == 13_000
    assert table.index.is_monotonic_increasing
    assert server.asked[0][1] == "/candles/BTC?limit=10000"
    assert server.asked[1][1] == f"/candles/BTC?interval=1h&limit=5000&before={105_000 * 3_600_000}"


def event(name: str, **fields: Any) -> str:
    return f"event: forecast\nid: {name}\ndata: {json.dumps(forecast(**fields))}\n\n"


def test_a_stream_goes_on_after_the_last_whole_event(client: Any, scripted: Any) -> None:
    kind = {"Content-Type": "text/event-stream"}
    server = scripted(
        (200, kind, [": ping\n\n", event("a", symbol="A"), event("b", symbol="B")[:-10]]),
        0,
        BUSY,
        (200, kind, ["event: forecast\nid: b\ndata: ", *event("b", symbol="B").splitlines()[2][6:], "\n\n", None]),
    )
    stream = client(server.url).stream("BTC", model="naive")
    assert [next(stream).symbol, next(stream).symbol] == ["A", "B"]
    stream.close()
    assert [each.get("last-event-id") for each in server.headers] == [None, "a", "a", "a"]
    assert {path for _, path, _ in server.asked} == {"/forecast/BTC/stream?model=naive"}


def test_a_stream_that_nobody_feeds_ends_with_what_is_wrong(
    client: Any, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unwatched = 404, {}, {"detail": "BTC is not on the watch list", "code": "not_watched"}
    server = scripted(unwatched, (503, {"Retry-After": "99"}, BUSY[2]))
    with pytest.raises(NotFound, match="watch list"):
        next(client(server.url).stream("BTC"))
    with pytest.raises(Unavailable):
        next(client(server.url).stream("BTC", patience=60))
    server.stop()
    monkeypatch.setattr(events_module, "_FIRST_WAIT", 99.0)
    with pytest.raises(NoAnswer):
        next(client(server.url).stream("BTC", patience=30))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", ""])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="write http://"):
        Candlecast(url)


@pytest.mark.parametrize("timeout", [0, -1, 601, float("nan")])
def test_a_timeout_that_no_service_takes_is_refused(timeout: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 600"):
        Candlecast(timeout=timeout)


@pytest.mark.parametrize("symbol", ["", ".", "..", " "])
def test_a_symbol_that_would_be_another_path_is_refused(client: Any, symbol: str) -> None:
    with pytest.raises(ValueError, match="name a symbol"):
        client().latest(symbol)

"""The poller over ccxt's own Binance client, against an exchange that fails as exchanges do."""

import json
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from feeds.exchange import Batch, Feed, FeedError, Stopped, connect
from feeds.put import FOREVER, Put, Service
from models.candles import Floats, Millis
from tests.feeds.conftest import wait_for_a_calm_hour

HOUR = 3_600_000

PROGRAM = """
import sys, ccxt
address = sys.argv.pop(1)
class Elsewhere(ccxt.binance):
    def __init__(self, config):
        super().__init__(config | {"options": {"fetchMarkets": {"types": ["spot"]}}, "requests_trust_env": False})
        self.urls["api"]["public"] = address
ccxt.binance = Elsewhere
from candlecast import main
main()
"""


class Noting(Service):
    """The real client; what it sent stays at hand."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.sent: list[tuple[str, list[int]]] = []

    def put(self, symbol: str, timestamps: Millis, candles: Floats, interval: str | None = None) -> Put:
        self.sent.append((symbol, timestamps.tolist()))
        return super().put(symbol, timestamps, candles, interval)

    @property
    def opens(self) -> list[int]:
        return [time for _, times in self.sent for time in times]


@pytest.fixture
def service(url: str) -> Iterator[Noting]:
    client = Noting(url)
    yield client
    client.close()


@pytest.fixture
def coin(exchange: Any, request: pytest.FixtureRequest) -> str:
    """A symbol that no other test has."""
    name = f"T{zlib.crc32(request.node.name.encode())}"
    exchange.symbols.append(f"{name}USDT")
    return f"{name}/USDT"


FeedOf = Callable[..., Feed]


@pytest.fixture
def feed_of(binance: Any, service: Noting, clock: Any, warned: list[str], logged: list[Batch]) -> FeedOf:
    def build(*symbols: str, **options: Any) -> Feed:
        settings = {"log": logged.append, "warn": warned.append, "clock": clock, "patience": 600} | options
        return Feed(binance, service, symbols, settings.pop("interval", "1h"), **settings)

    return build


@pytest.fixture
def warned() -> list[str]:
    return []


@pytest.fixture
def logged() -> list[Batch]:
    return []


def stop() -> None:
    raise Stopped


def newest_closed(clock: Any) -> int:
    return int(clock.now() // HOUR * HOUR - HOUR)


def hours(clock: Any, count: int) -> list[int]:
    """The newest hours that have closed."""
    return [newest_closed(clock) - HOUR * back for back in range(count)][::-1]


def name(coin: str) -> str:
    return coin.replace("/", "-")


# -- what is fetched -------------------------------------------------------------------------------


def test_history_is_filled_page_by_page_without_the_open_candle(
    feed_of: FeedOf, coin: str, clock: Any, stored: Any, expected: Any, logged: list[Batch]
) -> None:
    feed_of(coin, history=2300).run(once=True)
    assert stored(name(coin)) == expected(hours(clock, 2300))
    assert [batch.put.counts["new"] for batch in logged] == [1000, 1000, 300]
    assert str(logged[-1]).startswith(f"{coin} 1h 20")
    assert json.loads(logged[-1].as_json())["last"] == newest_closed(clock)


def test_short_pages_and_hours_without_trades_leave_no_hole(
    feed_of: FeedOf, coin: str, clock: Any, exchange: Any, stored: Any, expected: Any
) -> None:
    opens = hours(clock, 250)
    exchange.page, exchange.missing = 40, set(opens[30:90])
    feed_of(coin, history=250).run(once=True)
    assert stored(name(coin)) == expected(opens[:30] + opens[90:])


def test_an_empty_window_in_the_past_is_passed_over(
    feed_of: FeedOf, binance: Any, coin: str, clock: Any, exchange: Any, stored: Any, expected: Any
) -> None:
    ask = binance.fetch_ohlcv  # other exchanges answer a page as a span of time, candles or none
    binance.fetch_ohlcv = lambda symbol, timeframe, since, limit: ask(
        symbol, timeframe, since, limit, {"until": since + limit * HOUR - 1}
    )
    opens = hours(clock, 3000)
    exchange.missing = set(opens[100:2600])
    feed_of(coin, history=3000).run(once=True)
    assert stored(name(coin)) == expected(opens[:100] + opens[2600:])


def test_a_coin_younger_than_the_history_begins_where_it_was_listed(
    feed_of: FeedOf, coin: str, clock: Any, exchange: Any, stored: Any, expected: Any
) -> None:
    exchange.listed = hours(clock, 12)[0]
    feed_of(coin, history=500).run(once=True)
    assert stored(name(coin)) == expected(hours(clock, 12))


def test_after_a_restart_only_what_is_missing_is_sent(
    feed_of: FeedOf, coin: str, clock: Any, service: Noting, stored: Any, expected: Any
) -> None:
    feed_of(coin, history=20).run(once=True)
    service.sent.clear()
    feed_of(coin, history=20).run(once=True)
    assert service.sent == []
    clock.elapsed += 3 * 3600
    feed_of(coin, history=20).run(once=True)
    assert service.opens == hours(clock, 3)
    assert stored(name(coin)) == expected(hours(clock, 23))


def test_rows_that_are_no_candles_are_left_out_and_told(
    feed_of: FeedOf, coin: str, clock: Any, trouble: Any, stored: Any, warned: list[str]
) -> None:
    opens = hours(clock, 3)
    rows = [[each, "5", "6", "4", "5", "1", each + HOUR - 1, "5", 1, "1", "5", "0"] for each in opens]
    rows[1][2] = "3"
    trouble(200, json.dumps(rows))
    feed_of(coin, history=3).run(once=True)
    assert [row[0] for row in stored(name(coin))] == [opens[0], opens[2]]
    assert "1 rows are no candles" in warned[0]


# -- following -------------------------------------------------------------------------------------


def test_every_candle_comes_once_shortly_after_its_close(
    feed_of: FeedOf, coin: str, clock: Any, service: Noting
) -> None:
    first = newest_closed(clock)
    clock.meanwhile = [lambda: None] * 3 + [stop]
    with pytest.raises(Stopped):
        feed_of(coin, history=5).run()
    assert service.opens == [first - 4 * HOUR + place * HOUR for place in range(8)]
    assert clock.slept == [1802, 3600, 3600, 3600]


def test_a_late_candle_is_asked_for_again_and_again(
    feed_of: FeedOf, coin: str, clock: Any, exchange: Any, service: Noting
) -> None:
    exchange.late = 3_600_000 + 10_000  # the newest closed candle shows ten seconds after its close
    feed_of(coin, history=5).run(once=True)
    clock.meanwhile = [lambda: None] * 4 + [stop]
    with pytest.raises(Stopped):
        feed_of(coin).run()
    assert clock.slept == [1802, 2, 4, 8, pytest.approx(3600 - 14)]
    assert service.opens[-1] == newest_closed(clock)


def test_two_symbols_are_followed_side_by_side(feed_of: FeedOf, coin: str, clock: Any, service: Noting) -> None:
    clock.meanwhile = [lambda: None, stop]
    with pytest.raises(Stopped):
        feed_of("ETH/USDT", coin.lower(), history=2).run()
    assert [symbol for symbol, _ in service.sent] == ["ETH/USDT", coin] * 2


def test_a_gap_of_more_than_a_page_is_caught_up(
    feed_of: FeedOf, coin: str, clock: Any, exchange: Any, stored: Any, expected: Any, warned: list[str]
) -> None:
    clock.began -= 2000 * 3600
    exchange.page = 300
    opens = hours(clock, 5)
    feed = feed_of(coin, history=5)

    def sleep_through() -> None:
        clock.elapsed += 700 * 3600

    clock.meanwhile = [sleep_through, stop]
    with pytest.raises(Stopped):
        feed.run()
    assert stored(name(coin)) == expected([opens[0] + HOUR * place for place in range(706)])
    assert warned == []


def test_the_clock_of_the_exchange_decides_what_has_closed(
    feed_of: FeedOf, coin: str, clock: Any, exchange: Any, service: Noting
) -> None:
    exchange.now = lambda: clock.now() - 2 * HOUR
    feed_of(coin, history=3).run(once=True)
    assert service.opens[-1] == newest_closed(clock) - 2 * HOUR


# -- failures --------------------------------------------------------------------------------------


def test_what_exchanges_do_is_survived_and_told(
    feed_of: FeedOf, coin: str, clock: Any, trouble: Any, stored: Any, expected: Any, warned: list[str]
) -> None:
    trouble(429, '{"code": -1003, "msg": "Too much request weight used."}', Retry_After="7")
    trouble(418, '{"code": -1003, "msg": "Way too much request weight used."}')
    trouble(500, "oops")
    trouble(502, "<html>Bad Gateway</html>", Content_Type="text/html")
    trouble(200, '[[1700006400000, "1.0"')
    trouble(200, '{"surprise": true}')
    feed_of(coin, history=5).run(once=True)
    assert stored(name(coin)) == expected(hours(clock, 5))
    assert clock.slept == [7, 2, 4, 8, 16, 32]
    assert "Too much request weight" in warned[0]
    assert "trying again in 7 s" in warned[0]
    assert "unreadable" in warned[4]
    assert "unreadable" in warned[5]


def test_an_exchange_that_cannot_be_reached_is_waited_for(
    feed_of: FeedOf, coin: str, clock: Any, exchange: Any, stored: Any, expected: Any, warned: list[str]
) -> None:
    exchange.stop()
    clock.meanwhile = [lambda: None, exchange.start]
    feed_of(coin, history=5).run(once=True)
    assert stored(name(coin)) == expected(hours(clock, 5))
    assert len(warned) == 2


def test_a_symbol_that_fails_holds_no_other_up(
    feed_of: FeedOf, coin: str, clock: Any, exchange: Any, service: Noting, warned: list[str]
) -> None:
    clock.meanwhile = [lambda: exchange.delisted.add("ETHUSDT")] + [lambda: None] * 70 + [stop]
    with pytest.raises(Stopped):
        feed_of("ETH/USDT", coin, history=2, patience=FOREVER).run()
    last = [times for symbol, times in service.sent if symbol == coin][-1]
    assert last == [newest_closed(clock)]
    assert all("Invalid symbol" in each for each in warned)


def test_one_that_fails_for_too_long_ends_a_feed_that_should_end(
    feed_of: FeedOf, coin: str, exchange: Any, clock: Any
) -> None:
    exchange.delisted.add(coin.replace("/", ""))
    with pytest.raises(FeedError, match="Invalid symbol"):
        feed_of(coin).run(once=True)
    exchange.stop()
    with pytest.raises(FeedError, match="NetworkError"):
        feed_of(coin, patience=60).run(once=True)
    assert 30 <= sum(clock.slept) <= 60


def test_what_the_service_refuses_is_told_in_its_words(feed_of: FeedOf, exchange: Any) -> None:
    exchange.symbols.append("A" * 40 + "USDT")
    with pytest.raises(FeedError, match="a symbol has 1 to 32 letters"):
        feed_of("A" * 40 + "/USDT").run(once=True)


def test_a_wrong_name_is_told_with_those_that_resemble_it(feed_of: FeedOf) -> None:
    with pytest.raises(FeedError, match="binance has no BTC/USDX; it has BTC/USDT"):
        feed_of("BTC/USDX").run()
    with pytest.raises(FeedError, match=r"binance has no candles of 7m; it has .*15m"):
        feed_of("BTC/USDT", interval="7m")
    with pytest.raises(FeedError, match=r"knows no exchange binanse; it knows .*binance"):
        connect("binanse")


def test_an_exchange_of_ccxt_needs_no_key() -> None:
    assert connect("kraken").id == "kraken"


# -- the verb --------------------------------------------------------------------------------------


@pytest.fixture
def verb(exchange: Any, environment: dict[str, str], url: str) -> Callable[..., subprocess.Popen[str]]:
    """`candlecast feed`, its Binance being that exchange, by the machine's own clock."""
    wait_for_a_calm_hour()
    exchange.now = lambda: time.time_ns() // 1_000_000

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, f"http://127.0.0.1:{exchange.port}/api/v3"]
        return subprocess.Popen(
            [*command, "feed", *words], env=environment | {"CANDLECAST_URL": url}, text=True, stdout=-1, stderr=-1
        )

    return start


def test_once_fills_and_ends(verb: Any, coin: str, stored: Any) -> None:
    done = verb("binance", coin, "--history", "30", "--once", "--json")
    out, errors = done.communicate(timeout=60)
    assert done.returncode == 0, errors
    told = json.loads(out)
    assert told["symbol"] == coin
    assert told["new"] == 30
    assert [row[0] for row in stored(name(coin))] == list(range(told["first"], told["last"] + 1, HOUR))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(verb: Any, coin: str, number: signal.Signals) -> None:
    with verb("binance", coin, "--history", "3") as following:
        assert "3 new" in following.stdout.readline()
        following.send_signal(number)
        _, errors = following.communicate(timeout=60)
    assert following.returncode == 0
    assert errors == ""


def test_without_ccxt_it_says_what_to_install(environment: dict[str, str]) -> None:
    program = "import sys; sys.modules['ccxt'] = None; import candlecast; candlecast.main(['feed', 'binance', 'X'])"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "pip install 'candlecast[feeds]'" in done.stderr

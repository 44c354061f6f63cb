"""Candles as exchanges, brokers and bots hand them out -> the client -> the service -> back: the same candles."""

import json
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from candlecast_client import Candlecast, from_alpaca, from_binance, from_ccxt, from_frame, from_yfinance
from candlecast_client.candles import payload, to_json

HOUR = 3_600_000
COLUMNS = ["open", "high", "low", "close", "volume"]
Form = Callable[[pd.DataFrame], Any]


@pytest.fixture
def service(url: str) -> Iterator[Candlecast]:
    """The blocking client of the real service: formats know nothing of sockets."""
    with Candlecast(url, timeout=300) as client:
        yield client


def candles(opens: pd.DatetimeIndex) -> pd.DataFrame:
    """Valid candles with these opens, as the adapters give them."""
    closes = 100 + 3 * np.sin(np.arange(len(opens)))
    prices = {"open": closes - 0.5, "high": closes + 1.25, "low": closes - 1.5, "close": closes}
    frame = pd.DataFrame(prices | {"volume": 10.0 + np.arange(len(opens))}, opens)
    return frame.rename_axis("timestamp")


HOURS = candles(pd.date_range("2024-03-29 22:00", periods=30, freq="h", tz="UTC"))  # Easter, and a DST change in Europe
NEW_YORK = "America/New_York"
DAYS = pd.DatetimeIndex(["2024-03-06", "2024-03-07", "2024-03-08", "2024-03-11", "2024-03-12"]).tz_localize(NEW_YORK)


def rows(frame: pd.DataFrame) -> list[list[Any]]:
    return [
        [int(at.timestamp() * 1000), *row]
        for at, row in zip(frame.index, frame[COLUMNS].to_numpy().tolist(), strict=True)
    ]


def klines(frame: pd.DataFrame, unit: int = 1) -> list[list[Any]]:
    """Binance's rows: numbers as text, and what was paid."""
    return [
        [at * unit, *map(repr, row), (at + HOUR) * unit - 1, repr(row[3] * row[4]), 12, "1.0", "2.0", "0"]
        for at, *row in rows(frame)
    ]


def bars(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Alpaca's objects."""
    return [
        {"t": f"{at:%Y-%m-%dT%H:%M:%SZ}", **dict(zip("ohlcv", row, strict=True)), "n": 3, "vw": row[3]}
        for at, (_, *row) in zip(frame.index, rows(frame), strict=True)
    ]


def titled(frame: pd.DataFrame) -> pd.DataFrame:
    """The names of yfinance and backtesting.py."""
    return frame.rename(columns=str.title)


def of_tickers(first: int, **frames: pd.DataFrame) -> pd.DataFrame:
    """What yfinance.download gives of several tickers; level 0 are prices (`first` = 0) or tickers (1)."""
    both = pd.concat({name: titled(frame) for name, frame in frames.items()}, axis=1, names=["Ticker", "Price"])
    return both if first else both.swaplevel(axis=1).sort_index(axis=1)


def bar_set(frame: pd.DataFrame) -> Any:
    """alpaca-py's answer: its `df` has rows of (symbol, timestamp)."""
    named = frame.assign(trade_count=3.0, vwap=frame["close"])
    return SimpleNamespace(df=pd.concat({"BTC": named, "ETH": named * 2}, names=["symbol", "timestamp"]))


FORMS: dict[str, tuple[Form, Form]] = {
    "ccxt": (rows, from_ccxt),
    "binance": (klines, from_binance),
    "binance in microseconds": (lambda frame: klines(frame, 1000), from_binance),
    "alpaca": (bars, from_alpaca),
    "alpaca of one": (lambda frame: {"symbol": "BTC", "bars": bars(frame)}, from_alpaca),
    "alpaca of several": (
        lambda frame: {"bars": {"BTC": bars(frame), "ETH": []}, "next_page_token": None},
        lambda sent: from_alpaca(sent, "BTC"),
    ),
    "alpaca-py": (bar_set, lambda sent: from_alpaca(sent, "BTC")),
    "yfinance": (lambda frame: titled(frame).assign(**{"Adj Close": 1.0}), from_yfinance),
    "yfinance of one ticker": (lambda frame: of_tickers(0, BTC=frame), from_yfinance),
    "yfinance by price": (
        lambda frame: of_tickers(0, BTC=frame, ETH=frame * 2),
        lambda sent: from_yfinance(sent, "BTC"),
    ),
    "yfinance by ticker": (
        lambda frame: of_tickers(1, BTC=frame, ETH=frame * 2),
        lambda sent: from_yfinance(sent, "BTC"),
    ),
    "freqtrade": (lambda frame: frame.rename_axis("date").reset_index().assign(rsi=50.0, enter_long=0), from_frame),
    "backtesting.py": (lambda frame: titled(frame.tz_localize(None)), from_frame),
    "columns of milliseconds": (lambda frame: frame.assign(timestamp=[row[0] for row in rows(frame)]), from_frame),
    "another zone": (lambda frame: frame.tz_convert("Asia/Tokyo"), from_frame),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_means_the_same_candles(name: str) -> None:
    write, read = FORMS[name]
    found = read(write(HOURS))
    pd.testing.assert_frame_equal(found[COLUMNS], HOURS, check_freq=False)
    amount = HOURS["close"] * HOURS["volume"] if name.startswith(("binance", "alpaca")) else None
    assert ("amount" in found) == (amount is not None)
    if amount is not None:
        assert found["amount"].tolist() == pytest.approx(amount.tolist())


@pytest.mark.parametrize(
    "name", [name for name in FORMS if name.startswith(("ccxt", "binance", "alpaca", "freqtrade"))]
)
def test_every_form_comes_back_from_the_service_as_it_went_in(service: Candlecast, name: str) -> None:
    write, read = FORMS[name]
    sent = read(write(HOURS))
    symbol = name.replace(" ", "-")
    service.put_candles(symbol, sent, interval="1h")
    got = service.candles(symbol)
    pd.testing.assert_frame_equal(got[list(sent)], sent, check_freq=False)


@pytest.mark.parametrize("write", [rows, klines, bars])
def test_what_exchanges_send_may_be_sent_on_as_it_is(service: Candlecast, write: Form) -> None:
    symbol = f"raw-{write.__name__}"
    service.put_candles(symbol, write(HOURS), interval="1h")
    pd.testing.assert_frame_equal(service.candles(symbol)[COLUMNS], HOURS, check_freq=False)


@pytest.mark.parametrize(
    "symbol", ["BTC/USDT", "BTC/USDT:USDT", "^GSPC", "BRK.B", "BTC-USD", "EURUSD=X", "7203.t", "A_B"]
)
def test_every_kind_of_symbol_is_one_segment_of_a_path(service: Candlecast, symbol: str) -> None:
    service.put_candles(symbol, HOURS, interval="1h", calendar="24/7")
    stored = symbol.replace("/", "-").replace(":", "-").upper()
    assert stored in service.symbols()["symbol"].tolist()
    assert len(service.candles(symbol)) == len(service.candles(stored)) == len(HOURS)
    assert service.forecast(symbol=symbol, model="naive", horizon=1).symbol == stored


def test_days_on_which_only_others_trade_are_left_out() -> None:
    coin = candles(pd.date_range("2024-03-07", periods=4, freq="D", tz="UTC"))
    stock = coin.iloc[[0, 1]]
    both = of_tickers(0, **{"AAPL": stock, "BTC-USD": coin})
    assert len(both) == 4
    pd.testing.assert_frame_equal(from_yfinance(both, "AAPL"), stock, check_freq=False)


def test_yfinance_days_go_on_at_local_midnight_over_summer_time_and_weekends(service: Candlecast) -> None:
    known = titled(candles(DAYS[:3]))
    found = service.forecast(from_yfinance(known), symbol="AAPL", model="naive", interval="1d", horizon=2)
    assert found.answer["calendar"] == "XNYS"
    assert found.timestamps.tz_convert(NEW_YORK).tolist() == DAYS[3:].tolist()
    assert [f"{at:%H}" for at in found.timestamps] == ["04", "04"]  # 05 before summer time


def test_a_holiday_and_the_weekend_behind_it_are_skipped(service: Candlecast) -> None:
    known = candles(pd.DatetimeIndex(["2024-03-25", "2024-03-26", "2024-03-27", "2024-03-28"]).tz_localize("UTC"))
    found = service.forecast(known, symbol="AAPL", model="naive", interval="1d", horizon=1, calendar="XNYS")
    assert found.timestamps[0] == pd.Timestamp("2024-04-01", tz="UTC")  # after Good Friday


def test_hours_of_an_exchange_go_on_at_its_opening(service: Candlecast) -> None:
    opens = pd.date_range("2024-03-08 09:30", periods=7, freq="h", tz=NEW_YORK)
    found = service.forecast(candles(opens), symbol="AAPL", model="naive", interval="1h", horizon=1, calendar="XNYS")
    assert found.timestamps[0] == pd.Timestamp("2024-03-11 09:30", tz=NEW_YORK)
    assert f"{found.timestamps[0]:%H:%M}" == "13:30"


def test_an_open_last_candle_is_left_out_and_told(service: Candlecast) -> None:
    last = int(time.time()) // 3600 * HOUR + HOUR  # of the next hour, if this one ends meanwhile it is still open
    opens = pd.to_datetime([last - 3 * HOUR, last - 2 * HOUR, last - HOUR], unit="ms", utc=True)
    sent = from_ccxt(rows(candles(opens)))
    found = service.forecast(sent, symbol="OPEN", model="naive", interval="1h", horizon=1)
    if found.as_of == opens[-1]:
        assert found.warnings == ["1 candle(s) left out: has not closed yet"]
        assert found.last_close == sent["close"].iloc[-2]
    else:  # the hour ended between the two lines above
        assert found.warnings == []


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (HOURS.drop(columns="low"), "no column low"),
        (HOURS.reset_index(drop=True), "needs their opens"),
        (
            HOURS.assign(close=HOURS["close"].where(HOURS.index != HOURS.index[2])),
            r"2024-03-30 00:00:00\+00:00 has no close",
        ),
        (pd.concat([HOURS, HOURS["close"]], axis=1), "a column twice"),
        (of_tickers(0, BTC=HOURS, ETH=HOURS), "name one of the symbols that are there: BTC, ETH"),
        (of_tickers(0, BTC=HOURS).rename(columns={"Close": "Last"}), "two levels"),
    ],
)
def test_a_frame_that_holds_no_candles_says_why(frame: pd.DataFrame, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        payload(frame)


def test_a_symbol_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="there: BTC, ETH"):
        from_alpaca({"bars": {"BTC": [], "ETH": []}}, "DOGE")


def test_numbers_that_json_does_not_know_are_refused_and_numpys_are_not() -> None:
    with pytest.raises(ValueError, match="not finite"):
        to_json({"candles": [[1, float("nan")]]})
    at = pd.Timestamp("2024-03-30", tz="UTC")
    assert json.loads(to_json({"a": np.int64(3), "b": np.array([0.5]), "at": at})) == {
        "a": 3,
        "b": [0.5],
        "at": "2024-03-30T00:00:00+00:00",
    }


def test_no_candles_at_all_are_a_frame_too() -> None:
    for empty in (from_ccxt([]), from_binance([]), from_alpaca([])):
        assert empty.columns.tolist()[:5] == COLUMNS
        assert len(empty) == 0


def test_an_average_price_that_is_not_there_for_every_bar_is_not_used() -> None:
    sent = bars(HOURS)
    del sent[3]["vw"]
    assert "amount" not in from_alpaca(sent)

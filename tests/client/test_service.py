"""Both clients against a real service."""

import inspect
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from candlecast_client import AsyncCandlecast, Candlecast, Forecast, Invalid, NotFound, from_ccxt

README = Path(__file__).parents[2] / "client" / "README.md"
HOUR = 3_600_000
PRICES = ["open", "high", "low", "close", "volume"]


def test_a_forecast_is_a_frame_on_the_next_candles(service: Any, rows: Any) -> None:
    sent = rows(12)
    found = service.forecast(from_ccxt(sent), symbol="BTC/USDT", model="naive", interval="1h", horizon=3)
    assert isinstance(found, Forecast)
    last = pd.Timestamp(sent[-1][0], unit="ms", tz="UTC")
    assert found.forecast.columns.tolist() == PRICES
    assert found.forecast.index.tolist() == [last + pd.Timedelta(hours=step) for step in (1, 2, 3)]
    assert found.quantiles["close"].columns.tolist() == [0.1, 0.5, 0.9]
    assert (found.quantiles["close"][0.1] <= found.quantiles["close"][0.9]).all()
    assert found.returns.columns.tolist() == ["cumulative", "step", "prob_up"]
    assert (found.symbol, found.interval, found.horizon, found.model["name"]) == ("BTC-USDT", "1h", 3, "naive")
    assert found.naive == found.last_close == sent[-1][4]
    assert found.as_of == last + pd.Timedelta(hours=1)
    assert found.as_of < found.issued_at < found.valid_until
    assert (found.do_predict, found.reasons, found.skill) == (False, ["no_baseline"], None)
    assert (found.paths, found.is_stale, found.warnings, found.meta["context"]) == (None, False, [], 12)
    assert "BTC-USDT 1h" in repr(found)


def test_the_readme_s_example_does_what_its_remarks_say(url: str, rows: Any, capsys: Any) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    printed_url = "http://127.0.0.1:8000"
    assert printed_url in example
    exchange = SimpleNamespace(fetch_ohlcv=lambda symbol, interval, limit: rows(limit))
    names: dict[str, Any] = {"exchange": exchange}
    exec(example.replace(printed_url, url), names)
    names["candlecast"].close()
    found = names["found"]
    assert found.do_predict, found.reasons
    assert found.symbol == "BTC-USDT"
    assert (found.forecast.shape, found.forecast.columns.tolist()) == ((24, 5), PRICES)
    told = [f"{each}" for each in (found.forecast, found.quantiles["close"][0.9], f"{found.naive} {found.skill}")]
    assert capsys.readouterr().out == "\n".join([*told, ""])


def test_rows_and_their_frame_have_one_forecast(service: Any, rows: Any) -> None:
    sent = rows(9)
    asked = {"symbol": "SAME", "model": "naive", "interval": "1h", "horizon": 2, "as_of": sent[-1][0] + HOUR}
    first, second = (service.forecast(candles, **asked) for candles in (sent, from_ccxt(sent)))
    assert first.forecast.equals(second.forecast)
    assert second.meta["cache"] == "hit"


def test_what_was_put_is_got_and_listed(service: Any, rows: Any) -> None:
    sent = from_ccxt(rows(20))
    service.put_candles("put/it", sent, interval="1h")
    again = service.put_candles("put/it", sent, interval="1h")
    assert (again["symbol"], again["received"], again["duplicate"]) == ("PUT-IT", 20, 20)
    got = service.candles("put/it")
    assert got[PRICES].equals(sent)
    assert service.candles("PUT-IT", limit=3, before=sent.index[10])[PRICES].equals(sent[7:10])
    listed = service.symbols().set_index("symbol").loc["PUT-IT"]
    assert (listed["interval"], listed["first"], listed["last"]) == ("1h", sent.index[0], sent.index[-1])
    assert service.forecast(symbol="PUT-IT", model="naive", horizon=2).last_close == sent["close"].iloc[-1]


def test_served_forecasts_are_told_and_scored(service: Any, rows: Any) -> None:
    sent = from_ccxt(rows(20))
    service.put_candles("SCORED", sent, interval="1h")
    found = service.forecast(symbol="SCORED", model="naive", horizon=3)
    end = time.monotonic() + 60
    while (served := service.served("SCORED", limit=1)).empty:  # it is noted after it was answered
        assert time.monotonic() < end
        time.sleep(0.01)
    assert set(served.columns) > {"issued_at", "target_timestamp", "predicted_close_p50"}
    assert served["target_timestamp"].iloc[-1] == found.timestamps[-1]
    assert service.served("SCORED", as_of=sent.index[0]).empty
    assert service.accuracy("SCORED", interval="1h")["series"][0]["interval"] == "1h"
    assert isinstance(service.accuracy_of_models(), list)
    assert [each["name"] for each in service.models()["models"]] == ["kronos-demo", "naive"]


def test_a_watched_symbol_is_streamed_and_at_hand(service: Any, client: Any, url: str, rows: Any) -> None:
    sent, symbol = rows(12), f"WATCHED-{type(service).__name__}"
    service.put_candles(symbol, sent[:-1], interval="1h")
    stream = client(url).stream(symbol)
    first = next(stream)
    service.put_candles(symbol, sent, interval="1h")
    newest = pd.Timestamp(sent[-1][0] + HOUR, unit="ms", tz="UTC")
    following = next(found for found in stream if found.as_of == newest)
    stream.close()
    assert first.horizon == following.horizon == 3
    for _ in range(2):
        at_hand = service.latest(symbol)
        assert at_hand.as_of == newest
        assert at_hand.forecast.equals(following.forecast)


def test_refusals_are_exceptions_that_say_what_to_do(service: Any, rows: Any) -> None:
    with pytest.raises(NotFound, match="no candles of NOBODY are stored") as unknown:
        service.forecast(symbol="NOBODY", model="naive")
    assert "PUT /candles" in unknown.value.next_steps[0]
    with pytest.raises(NotFound, match="unknown_model"):
        service.forecast(rows(), symbol="BTC", model="nobody")
    with pytest.raises(NotFound, match="not_watched"):
        service.latest("NOBODY")
    broken = from_ccxt(rows(6))
    broken.iloc[4, broken.columns.get_loc("high")] = 1.0
    with pytest.raises(Invalid, match="/candles/high/4"):
        service.forecast(broken, symbol="BTC", model="naive", interval="1h")
    with pytest.raises(Invalid, match="/horizon"):
        service.forecast(rows(), symbol="BTC", model="naive", interval="1h", horizon=0)
    with pytest.raises(Invalid) as few:
        service.forecast(rows(1), symbol="BTC", model="naive", interval="1h")
    assert (few.value.facts["needed"], few.value.facts["got"]) == (2, 1)


def test_paths_are_indexed_by_path_and_time() -> None:
    answer: Any = {
        "forecast": [[0, *[1.0] * 5], [HOUR, *[1.0] * 5]],
        "paths": [[[1.0] * 5, [2.0] * 5], [[3.0] * 5] * 2],
    }
    paths = Forecast(answer).paths
    assert paths is not None
    assert paths.index.names == ["path", "timestamp"]
    assert paths.loc[(0, pd.Timestamp(HOUR, unit="ms", tz="UTC")), "close"] == 2.0
    assert paths["close"].groupby("path").last().tolist() == [2.0, 3.0]


def test_both_clients_have_the_same_calls() -> None:
    def calls(kind: Any) -> dict[str, Any]:
        public: dict[str, Callable[..., Any]] = {
            name: each for name, each in vars(kind).items() if inspect.isfunction(each) and name[0] != "_"
        }
        return {name: inspect.signature(each).parameters for name, each in public.items()}

    assert calls(Candlecast) == calls(AsyncCandlecast)

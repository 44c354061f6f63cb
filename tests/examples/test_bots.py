"""The bots trade against a real service, and on nothing that was not known."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from candlecast_client import Candlecast, from_frame
from examples.backtesting_strategy import run
from examples.ccxt_loop import Decision, Replay, decisions
from tests.examples.conftest import with_another_future

pytestmark = pytest.mark.long

BARS = 24  # that are traded
ASKED = {"symbol": "GOOG", "model": "toto", "horizon": 3, "heed": False}  # random weights have shown no skill


@pytest.fixture(scope="module")
def candles(packaged_candles: Callable[[str], Path]) -> pd.DataFrame:
    """The last of GOOG's days that backtesting.py brings."""
    table = pd.read_csv(packaged_candles("GOOG.csv"), index_col=0, parse_dates=True)
    return from_frame(table).iloc[-100:]


def test_the_strategy_decides_by_closed_candles_alone(client: Candlecast, candles: pd.DataFrame) -> None:
    since, known = candles.index[-BARS].tz_localize(None), len(candles) - BARS // 2
    runs = [
        run(each, candles.index[-BARS], client=client, threshold=-1.0, **ASKED)["_strategy"]
        for each in (candles, with_another_future(candles, known))
    ]
    last_known = candles.index[known - 1].tz_localize(None)
    before = [{at: value for at, value in each.expected.items() if at <= last_known} for each in runs]
    assert len(before[0]) == BARS - BARS // 2
    assert before[0] == before[1]
    assert runs[0].expected != runs[1].expected, "the candles make no difference at all"
    (trade,) = runs[0].closed_trades
    assert trade.entry_time == candles.index[1 - BARS].tz_localize(None), "an order is filled at the next open"
    assert min(runs[0].expected) == since


def test_the_loop_decides_by_closed_candles_alone(client: Candlecast, candles: pd.DataFrame) -> None:
    since, known = int(candles.index[-BARS].timestamp() * 1000), len(candles) - BARS // 2

    def decided(each: pd.DataFrame, threshold: float = 0.0) -> list[Decision]:
        asked = {**ASKED, "threshold": threshold}
        return list(decisions(Replay(each, since), client, asked.pop("symbol"), "1d", **asked))

    first, other = decided(candles), decided(with_another_future(candles, known))
    assert len(first) == BARS + 1  # and the day before, which had closed when the replay began
    closed = 1 + BARS - BARS // 2
    assert first[:closed] == other[:closed]
    assert [each.expected for each in first] != [each.expected for each in other], "the candles make no difference"
    assert first[0].price == candles["close"].iloc[-BARS - 1]
    middle = sorted(each.expected for each in first)[BARS // 2]
    traded = decided(candles, middle)
    assert [each.hold for each in traded] == [each.expected > middle for each in first]
    held = np.array([each.hold for each in traded])
    moves = np.array([1.0, *(after.price / each.price for each, after in pairwise(traded))])
    orders = np.diff(held.astype(int), prepend=0) != 0
    worth = np.cumprod(
        np.where(np.roll(held, 1) & (np.arange(len(held)) > 0), moves, 1.0) * np.where(orders, 0.999, 1.0)
    )
    assert [each.equity for each in traded] == pytest.approx(worth.tolist())


def test_a_forecast_that_should_not_be_acted_on_is_not(client: Candlecast, candles: pd.DataFrame) -> None:
    replay = Replay(candles, int(candles.index[-5].timestamp() * 1000))
    found = list(decisions(replay, client, "GOOG", "1d", model="toto", horizon=3))
    assert {(each.hold, each.equity) for each in found} == {(False, 1.0)}

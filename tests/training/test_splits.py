"""Splits that nobody adjusted for, in real candles as they were traded."""

from collections.abc import Callable
from datetime import datetime
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.candles import AMOUNT, CLOSE, PRICES, VOLUME, Floats, check_candles, with_amount
from training.candle_files import Series
from training.sample_data import STOCKS, _packaged, _rows
from training.splits import suspected_splits, without_splits


@pytest.fixture(scope="module")
def as_traded() -> dict[str, Series]:
    """The sample stocks before anything is adjusted."""
    found = {}
    for symbol, group in groupby(
        _rows(_packaged("bokeh_sampledata", "_data/stocks.csv.gz")), lambda row: row["Ticker"]
    ):
        rows = list(group)
        candles = np.array([[float(row[name]) for name in ("Open", "High", "Low", "Close", "Volume")] for row in rows])
        days = np.array([datetime.strptime(row["Date"], "%Y-%m-%d").isoformat() for row in rows], "datetime64[ms]")  # noqa: DTZ007 a date
        found[symbol] = Series(symbol, "1d", days.astype(np.int64), with_amount(candles))
    return found


def told(item: Series) -> list[tuple[str, str]]:
    days = item.timestamps.astype("datetime64[ms]").astype("datetime64[D]")
    return [(str(days[row]), name) for row, _, name in suspected_splits(item.candles)]


def test_real_splits_are_found_and_the_crash_that_halved_apple_is_none(as_traded: dict[str, Series]) -> None:
    assert set(as_traded) == set(STOCKS)
    assert {symbol: told(item) for symbol, item in as_traded.items() if told(item)} == {
        "AAPL": [("2000-06-21", "2:1"), ("2005-02-28", "2:1")],  # and not 2000-09-29, with 12 times the usual amount
        "MSFT": [("2003-02-18", "2:1")],
    }


def test_adjusted_candles_hold_no_split(samples: list[Series]) -> None:
    assert [told(item) for item in samples] == [[]] * len(samples)


def test_undone_splits_are_those_of_the_adjusted_candles(as_traded: dict[str, Series]) -> None:
    apple = without_splits(as_traded["AAPL"])
    assert told(apple) == []
    check_candles(apple.candles)
    before, after = as_traded["AAPL"].candles, apple.candles
    assert after[0, PRICES].tolist() == (before[0, PRICES] / 4).tolist()
    assert after[0, VOLUME] == before[0, VOLUME] * 4
    assert after[-1].tolist() == before[-1].tolist()
    assert (after[:, AMOUNT] == before[:, AMOUNT]).all()  # money is not split
    assert np.abs(np.diff(np.log(after[:, CLOSE]))).max() < 0.75  # the crash stays


def market(seed: int, volatility: float, rows: int = 120) -> Floats:
    rng = np.random.default_rng(seed)
    closes = 50 * np.exp(np.cumsum(rng.normal(0, volatility, rows)))
    opens = np.concatenate([[50.0], closes[:-1]]) * np.exp(rng.normal(0, volatility / 4, rows))
    edges = np.maximum(opens, closes) * 1.001, np.minimum(opens, closes) * 0.999
    return with_amount(np.column_stack([opens, *edges, closes, rng.uniform(1e5, 2e5, rows)]))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([1.5, 2.0, 3.0, 4.0, 7.0, 10.0, 20.0, 1 / 2, 1 / 10]),
    st.integers(30, 118),
    st.booleans(),
)
def test_a_split_is_found_where_it_happened_whether_or_not_volumes_are_known(
    seed: int, ratio: float, row: int, with_volume: bool
) -> None:
    candles = market(seed, 0.01)
    assert suspected_splits(candles) == []
    candles[:row, PRICES] *= ratio
    candles[:row, VOLUME] /= ratio
    if not with_volume:
        candles[:, VOLUME:] = 0
    (found,) = suspected_splits(candles)
    assert (found.row, found.ratio) == (row, pytest.approx(ratio))


def test_a_halving_within_the_candle_or_with_a_storm_of_trading_is_a_crash() -> None:
    within, storm = market(0, 0.01), market(0, 0.01)
    for candles in (within, storm):
        candles[:60, PRICES] *= 2
    within[60, 0] = within[59, CLOSE]
    within[60, 1] = max(within[60, :4])
    storm[60, VOLUME:] *= 10
    assert suspected_splits(within) == suspected_splits(storm) == []


def test_a_few_candles_are_judged_too(make_series: Callable[..., Series]) -> None:
    assert suspected_splits(make_series("A", np.array([100.0])).candles) == []
    (found,) = suspected_splits(make_series("A", np.array([100.0, 50.0])).candles)
    assert found.name == "2:1"

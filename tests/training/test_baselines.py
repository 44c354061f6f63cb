"""What a model must beat, against formulas written out and against statsforecast."""

import math
import sys
from statistics import NormalDist

import numpy as np
import pytest

from models import scoring
from models.candles import CLOSE, DAY_MS, Floats
from models.forecaster import Forecast, ForecastInput, forecast
from models.naive import NaiveForecaster
from training.baselines import BASELINES, baseline, season_length
from training.candle_files import Series
from training.windows import forecast_input, series_calendar

HORIZON = 12
HOUR_MS = DAY_MS // 24


@pytest.fixture(scope="module")
def item(samples: list[Series]) -> ForecastInput:
    apple = next(series for series in samples if series.symbol == "AAPL")
    return forecast_input(apple, 900, horizon=HORIZON, lookback=300, calendar=series_calendar(apple))


def answer(name: str, item: ForecastInput) -> Forecast:
    [found] = forecast(baseline(name), [item])
    return found


def moments(found: Forecast, last_close: float) -> tuple[Floats, Floats]:
    """Mean and sigma of ln(close / last close), read from the quantiles."""
    low, middle, high = np.log(found.quantiles["close"] / last_close)
    return middle, (high - low) / (2 * NormalDist().inv_cdf(0.9))


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_gives_candles_and_rising_quantiles(name: str, item: ForecastInput) -> None:
    found = answer(name, item)
    assert found.point.shape == (HORIZON, 5)
    assert (np.diff(found.quantiles["close"], axis=0) >= 0).all()
    np.testing.assert_allclose(found.point[:, CLOSE], found.quantiles["close"][1])
    assert ((found.prob_up >= 0) & (found.prob_up <= 1)).all()
    assert (found.point[:, -1] == item.candles[-1, 4]).all()


def test_naive_is_the_forecaster_of_every_table() -> None:
    assert isinstance(baseline("naive"), NaiveForecaster)


def test_walk_spreads_with_the_ewma_volatility(item: ForecastInput) -> None:
    mean, sigma = moments(answer("ewma", item), item.last_close)
    volatility = scoring.ewma_volatility(scoring.log_returns(item.candles[:, CLOSE]), 0.94)[-1]
    np.testing.assert_allclose(mean, 0, atol=1e-12)
    np.testing.assert_allclose(sigma, volatility * np.sqrt(np.arange(1, HORIZON + 1)))


def test_drift_goes_on_as_the_line_from_first_to_last_close(item: ForecastInput) -> None:
    found = answer("drift", item)
    mean, sigma = moments(found, item.last_close)
    closes = item.candles[:, CLOSE]
    rate = math.log(closes[-1] / closes[0]) / 299
    for step in (1, 5, HORIZON):
        assert mean[step - 1] == pytest.approx(step * rate)
        spread = np.log(closes[1:] / closes[:-1]).std() * math.sqrt(step * (1 + step / 299))
        assert sigma[step - 1] == pytest.approx(spread)
        assert found.prob_up[step - 1] == pytest.approx(NormalDist().cdf(step * rate / spread))


def test_seasonal_naive_repeats_the_last_week_and_widens_by_the_week(item: ForecastInput) -> None:
    mean, sigma = moments(answer("seasonal", item), item.last_close)
    closes = item.candles[:, CLOSE]
    np.testing.assert_allclose(item.last_close * np.exp(mean), np.tile(closes[-5:], 3)[:HORIZON])
    weekly = math.sqrt(np.mean(np.log(closes[5:] / closes[:-5]) ** 2))
    np.testing.assert_allclose(sigma, weekly * np.sqrt([1] * 5 + [2] * 5 + [3] * 2))


@pytest.mark.parametrize(
    ("step", "count", "season"),
    [(HOUR_MS, 100, 24), (DAY_MS, 30, 7), (7 * DAY_MS, 9, 1), (HOUR_MS // 4, 96, 96), (HOUR_MS // 4, 90, 0)],
)
def test_a_season_is_a_day_or_of_daily_candles_a_week(step: int, count: int, season: int) -> None:
    assert season_length(20_000 * DAY_MS + step * np.arange(count)) == season


def test_trading_days_and_hours_have_their_own_seasons(samples: list[Series], eurusd: Series) -> None:
    assert season_length(samples[0].timestamps) == 5
    assert season_length(eurusd.timestamps) == 24


def test_a_context_without_a_season_is_refused(samples: list[Series]) -> None:
    short = forecast_input(samples[0], 900, horizon=2, lookback=4, calendar=series_calendar(samples[0]))
    with pytest.raises(ValueError, match="4 candles hold no season"):
        answer("seasonal", short)


@pytest.mark.parametrize(("name", "method"), [("autoets", "AutoETS"), ("autotheta", "AutoTheta")])
def test_statistical_baselines_are_statsforecasts_own(name: str, method: str, item: ForecastInput) -> None:
    from statsforecast import models

    closes = np.log(item.candles[:, CLOSE])
    expected = getattr(models, method)(season_length=1).forecast(y=closes, h=HORIZON, level=[80])
    low, middle, high = np.log(answer(name, item).quantiles["close"])
    np.testing.assert_allclose(middle, expected["mean"], rtol=1e-6)
    np.testing.assert_allclose(high - low, expected["hi-80"] - expected["lo-80"], rtol=1e-6)


def test_an_unknown_baseline_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no baseline is called 'arima': there are naive, seasonal"):
        baseline("arima")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "statsforecast", None)
    with pytest.raises(ValueError, match=r"pip install 'candlecast\[stats\]'"):
        baseline("autoets")

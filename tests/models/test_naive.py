"""The naive forecast is the last close, as the baseline and as a model behind the same contract."""

from typing import Any

import numpy as np
import pytest

from models.candles import CLOSE, DAY_MS, VOLUME, check_candles, with_amount
from models.forecaster import Forecast, Forecaster, ForecastInput, forecast
from models.naive import NaiveForecaster, naive_rows

START = 1_700_006_400_000


def request(horizon: int = 5, **fields: Any) -> ForecastInput:
    closes = np.array([10.0, 12.0, 11.0])
    candles = np.column_stack([closes - 1, closes + 1, closes - 2, closes, [5.0, 6.0, 7.0]])
    times = START + DAY_MS * np.arange(3 + horizon)
    return ForecastInput(times[:3], with_amount(candles), times[3:], times, **fields)


def answer(item: ForecastInput) -> Forecast:
    model: Forecaster = NaiveForecaster()
    return forecast(model, [item])[0]


def test_every_price_is_the_last_close_and_volume_the_last_volume() -> None:
    point = answer(request()).point
    assert (point[:, : CLOSE + 1] == 11.0).all()
    assert (point[:, VOLUME] == 7.0).all()
    check_candles(point)


def test_the_baseline_and_the_model_are_one_definition() -> None:
    item = request(9)
    assert (naive_rows(item.candles, 9) == answer(item).point).all()


@pytest.mark.parametrize("levels", [(0.5,), (0.05, 0.1, 0.5, 0.95)])
def test_it_claims_no_spread_at_any_level(levels: tuple[float, ...]) -> None:
    result = answer(request(4, levels=levels))
    assert result.levels == levels
    assert set(result.quantiles) == {"high", "low", "close"}
    for values in result.quantiles.values():
        assert values.shape == (len(levels), 4)
        assert (values == 11.0).all()
    assert (result.prob_up == 0.5).all()
    assert result.step_return_quantiles is not None
    assert (result.step_return_quantiles == 0).all()


def test_a_batch_answers_each_in_its_place() -> None:
    short, long = request(2), request(6)
    first, second = forecast(NaiveForecaster(), [short, long])
    assert (len(first.point), len(second.point)) == (2, 6)


def test_all_requests_share_one_bucket() -> None:
    model = NaiveForecaster()
    assert model.bucket(request(2)) == model.bucket(request(400, seed=3))

"""The contract's own arithmetic: padded rows, buckets, and what a forecast must be before it leaves."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.candles import HIGH, LOW, VOLUME, check_candles
from models.forecaster import (
    Batch,
    Forecast,
    ForecastInput,
    InvalidModelOutput,
    Limits,
    ModelError,
    Raw,
    bucket_of,
    checked,
    forecast,
    pad_rows,
)


def raw_forecast() -> Forecast:
    """High and low on the wrong side, quantiles crossing: what a network may well say."""
    point = np.array([[10.0, 9.0, 11.0, 10.5, -3.0], [10.0, 12.0, 9.0, 10.5, 3.0]])
    crossing = np.array([[12.0, 9.0], [11.0, 10.0], [10.0, 11.0]])
    quantiles = {name: crossing.copy() for name in ("high", "low", "close")}
    return Forecast(point, (0.1, 0.5, 0.9), quantiles, prob_up=np.array([0.4, 0.6]))


@given(st.integers(1, 5000))
def test_padded_rows_are_the_next_power_of_two(count: int) -> None:
    padded = pad_rows(count)
    assert padded.bit_count() == 1
    assert padded // 2 < count <= padded


@given(st.integers(0, 4096))
def test_a_bucket_holds_the_value_and_no_smaller_one_would(value: int) -> None:
    buckets = (64, 512, 4096)
    chosen = bucket_of(value, buckets)
    assert chosen in buckets
    assert value <= chosen
    assert all(smaller < value for smaller in buckets if smaller < chosen)


def test_beyond_the_largest_bucket_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"513 exceeds the largest bucket, 512"):
        bucket_of(513, (64, 512))


def test_a_checked_point_is_a_valid_candle_with_open_and_close_unmoved() -> None:
    point = checked(raw_forecast()).point
    check_candles(point)
    assert point[:, [0, 3]].tolist() == [[10.0, 10.5], [10.0, 10.5]]
    assert (point[0, HIGH], point[0, LOW], point[0, VOLUME]) == (11.0, 9.0, 0.0)


def test_checked_quantiles_no_longer_cross() -> None:
    result = checked(raw_forecast())
    for values in result.quantiles.values():
        assert values.tolist() == [[10.0, 9.0], [11.0, 10.0], [12.0, 11.0]]


@pytest.mark.parametrize("field", ["point", "prob_up", "quantiles", "paths", "step_return_quantiles"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_output_that_is_not_finite_never_leaves(field: str, value: float) -> None:
    good = replace(raw_forecast(), paths=np.ones((4, 2, 5)), step_return_quantiles=np.zeros((3, 2)))
    broken = getattr(good, field)
    (broken["low"] if field == "quantiles" else broken).flat[-1] = value
    with pytest.raises(InvalidModelOutput):
        checked(good)


def test_checking_changes_no_array_of_the_network() -> None:
    before, given_ = raw_forecast(), raw_forecast()
    checked(given_)
    assert (given_.point == before.point).all()
    assert (given_.quantiles["low"] == before.quantiles["low"]).all()


def test_a_model_error_names_the_field_to_blame() -> None:
    error = ModelError("toto has no paths", field="paths")
    assert (error.field, error.code) == ("paths", "unsupported_parameter")


class Recorder:
    """Says in which order it was called."""

    family = "naive"
    limits = Limits(1, 1, 1)

    def __init__(self) -> None:
        self.calls: list[str] = []

    def bucket(self, item: ForecastInput) -> str:
        return ""

    def prepare(self, inputs: object) -> Batch:
        self.calls.append("prepare")
        return Batch([], {"x": 1}, 4)

    def run(self, batch: Batch) -> Raw:
        self.calls.append("run")
        return {"y": batch.tensors["x"] + 1}

    def finish(self, raw: Raw, batch: Batch) -> list[Forecast]:
        self.calls.append(f"finish {raw['y']} {batch.rows}")
        return []


def test_a_forecast_is_prepare_then_run_then_finish() -> None:
    model = Recorder()
    assert forecast(model, []) == []
    assert model.calls == ["prepare", "run", "finish 2 4"]

"""What counts as a candle, and what is said about a row that does not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.candles import (
    AMOUNT,
    CLOSE,
    HIGH,
    LARGEST_PRICE,
    LARGEST_VOLUME,
    LOW,
    OPEN,
    SMALLEST_PRICE,
    VOLUME,
    Floats,
    InvalidCandles,
    TooFewCandles,
    _are_candles,
    candle_faults,
    check_candles,
    check_timestamps,
    interval_ms,
    repair_ohlc,
    with_amount,
)

GOOD = [100.0, 103.0, 99.0, 101.0, 5000.0]
START = 1_700_006_400_000


def rows(count: int = 4) -> Floats:
    return np.array([GOOD] * count)


EDGES = (-1.0, 0.0, 1e-13, SMALLEST_PRICE, 1.0, 2.0, LARGEST_PRICE, 2e15, LARGEST_VOLUME, 2e30)


def test_a_good_series_passes() -> None:
    check_candles(rows())
    check_candles(with_amount(rows()))


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        (CLOSE, np.nan, "not a finite number"),
        (HIGH, np.inf, "not a finite number"),
        (VOLUME, np.nan, "not a finite number"),
        (LOW, 0.0, "not above zero"),
        (LOW, -1.0, "not above zero"),
        (VOLUME, -1.0, "negative volume"),
        (HIGH, 100.5, "high below"),
        (LOW, 100.5, "low above"),
    ],
)
def test_a_broken_candle_is_named_by_its_row(column: int, value: float, said: str) -> None:
    candles = rows()
    candles[2, column] = value
    with pytest.raises(InvalidCandles, match=f"candle 2 .*{said}") as caught:
        check_candles(candles)
    assert caught.value.row == 2
    assert caught.value.code == "invalid_candles"


def test_the_first_of_several_broken_rows_is_named() -> None:
    candles = rows()
    candles[[1, 3], CLOSE] = np.nan
    with pytest.raises(InvalidCandles) as caught:
        check_candles(candles)
    assert caught.value.row == 1


@pytest.mark.parametrize("shape", [(4, 4), (4, 7), (4,), (1, 4, 5)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidCandles, match="5 or 6 columns"):
        check_candles(np.ones(shape))


@given(arrays(np.float64, (2, 6), elements=st.sampled_from([*EDGES, np.nan, np.inf, -np.inf])))
def test_the_quick_look_and_the_close_one_agree(candles: Floats) -> None:
    for columns in (5, 6):
        faults = any(broken.any() for broken, _ in candle_faults(candles[:, :columns]))
        assert _are_candles(candles[:, :columns]) is not faults


def test_a_negative_amount_is_refused() -> None:
    candles = with_amount(rows())
    candles[0, AMOUNT] = -0.1
    with pytest.raises(InvalidCandles, match="amount"):
        check_candles(candles)


def test_zero_volume_is_a_candle() -> None:
    candles = rows()
    candles[:, VOLUME] = 0
    check_candles(candles)


def test_a_flat_candle_is_a_candle() -> None:
    check_candles(np.array([[7.0, 7.0, 7.0, 7.0, 0.0]]))


def test_too_few_candles_says_how_many() -> None:
    error = TooFewCandles(64, 10)
    assert (error.needed, error.got, error.code) == (64, 10, "too_few_candles")
    assert "64" in str(error)
    assert "10" in str(error)


@pytest.mark.parametrize(
    ("offsets", "row", "code"),
    [
        ([0, 60_000, 60_000], 2, "duplicate_timestamp"),
        ([0, 120_000, 60_000], 2, "unsorted_timestamps"),
        ([60_000, 0, 60_000], 1, "unsorted_timestamps"),
    ],
)
def test_timestamps_that_do_not_rise_are_named(offsets: list[int], row: int, code: str) -> None:
    with pytest.raises(InvalidCandles) as caught:
        check_timestamps(START + np.array(offsets))
    assert (caught.value.row, caught.value.code) == (row, code)


@pytest.mark.parametrize("factor", [1e-3, 1e3, 1e6])
def test_seconds_microseconds_and_nanoseconds_are_not_milliseconds(factor: float) -> None:
    with pytest.raises(InvalidCandles, match="not UTC milliseconds") as caught:
        check_timestamps(np.array([START * factor, START * factor + 1], dtype=np.int64))
    assert (caught.value.row, caught.value.code) == (0, "invalid_timestamp")


def test_rising_milliseconds_pass() -> None:
    check_timestamps(START + np.arange(5) * 60_000)


@pytest.mark.parametrize(
    ("interval", "milliseconds"),
    [("1m", 60_000), ("15m", 900_000), ("1h", 3_600_000), ("4h", 14_400_000), ("1d", 86_400_000), ("1w", 604_800_000)],
)
def test_an_interval_is_a_number_of_milliseconds(interval: str, milliseconds: int) -> None:
    assert interval_ms(interval) == milliseconds


@pytest.mark.parametrize("interval", ["", "h", "0h", "1", "1H", "1M", "1.5h", "-1h", " 1h", "1h\n", "12345m", "1hour"])
def test_anything_else_is_no_interval(interval: str) -> None:
    with pytest.raises(ValueError, match="is not an interval"):
        interval_ms(interval)


def test_a_missing_amount_is_mean_price_times_volume() -> None:
    assert with_amount(rows(1))[0].tolist() == [*GOOD, (100 + 103 + 99 + 101) / 4 * 5000]


def test_given_amounts_stay_and_only_missing_ones_are_filled() -> None:
    candles = np.column_stack([rows(2), [42.0, np.nan]])
    filled = with_amount(candles)
    assert filled[:, AMOUNT].tolist() == [42.0, 100.75 * 5000]
    assert np.isnan(candles[1, AMOUNT]), "the caller's array was changed"


_PRICE = st.floats(1e-6, 1e9)


@given(arrays(np.float64, (3, 5), elements=_PRICE), st.floats(-1e9, 1e9))
def test_a_repaired_row_is_always_a_valid_candle(forecast: Floats, volume: float) -> None:
    forecast[:, VOLUME] = volume
    before = forecast.copy()
    repaired = repair_ohlc(forecast)
    check_candles(repaired)
    assert (repaired[:, [OPEN, CLOSE]] == before[:, [OPEN, CLOSE]]).all(), "open or close moved"
    assert (forecast == before).all(), "the caller's array was changed"
    assert (repair_ohlc(repaired) == repaired).all(), "repairing twice changes something"


@given(arrays(np.float64, (2, 4), elements=_PRICE))
def test_repair_leaves_a_valid_candle_alone(prices: Floats) -> None:
    low, *inner, high = np.sort(prices, axis=1).T
    candles = np.column_stack([inner[0], high, low, inner[1], np.ones(2)])
    assert (repair_ohlc(candles) == candles).all()


def test_repair_works_on_paths_too() -> None:
    paths = np.random.default_rng(0).uniform(1, 2, (8, 3, 5))
    repaired = repair_ohlc(paths)
    assert (repaired[5, 1] == repair_ohlc(paths[5, 1:2])[0]).all()


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [(3, 1e-13, "below"), (1, 1e16, "above"), (4, 1e31, "more volume"), (5, 1e31, "more volume")],
)
def test_magnitudes_that_single_precision_cannot_hold_are_refused(column: int, value: float, reason: str) -> None:
    candles = np.full((3, 6), 5.0)
    candles[1, column] = value
    if column == 3:
        candles[1, :4] = value
    with pytest.raises(InvalidCandles, match=f"candle 1 .*{reason}"):
        check_candles(candles)

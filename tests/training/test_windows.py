from datetime import UTC, date, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.calendars import UnknownCalendar, get_calendar
from models.candles import DAY_MS, InvalidCandles, Millis
from training.candle_files import Series
from training.windows import (
    Origins,
    Part,
    Split,
    WindowSampler,
    forecast_input,
    joined,
    rolling_origins,
    series_calendar,
    split_by_dates,
    split_by_fractions,
    split_by_parts,
    split_from_recipe,
)

EVALUATED: tuple[Part, ...] = ("val", "test", "unseen")


def ramp(symbol: str, first_day: int, length: int) -> Series:
    """Candles whose close is their own day, so that a window shows where it comes from."""
    days = first_day + np.arange(length, dtype=np.int64)
    return Series(symbol, "1d", days * DAY_MS, np.repeat(days[:, None], 6, axis=1).astype(np.float64))


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[Series], Split]:
    """Symbols that begin and end on different days, one of them held out, cut on any two days."""
    series = [
        ramp(symbol, draw(st.integers(4000, 4060)), draw(st.integers(2, 160))) for symbol in ("AAA", "BBB", "UNSEEN")
    ]
    cuts = sorted(draw(st.lists(st.integers(3990, 4230), min_size=2, max_size=2)))
    return series, Split(cuts[0] * DAY_MS, cuts[1] * DAY_MS, draw(st.integers(1, 20)), frozenset({"UNSEEN"}))


def target_times(series: list[Series], origins: Origins) -> list[Millis]:
    return [series[i].timestamps[origin + 1 : origin + 1 + origins.horizon] for i, origin in origins.pairs]


# -- the split -------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(splits(), st.integers(2, 40), st.integers(1, 9), st.integers(0, 2**32))
def test_no_training_window_reaches_a_target_of_another_part(
    case: tuple[list[Series], Split], length: int, stride: int, seed: int
) -> None:
    series, split = case
    targets = {
        part: target_times(series, rolling_origins(series, split, part, stride=stride, min_context=2))
        for part in EVALUATED
    }
    for times in targets["val"]:
        assert split.val_from <= times[0] <= times[-1] < split.test_from
    for times in targets["test"] + targets["unseen"]:
        assert times[0] >= split.test_from
    if any(len(split.targets(item, "train")) >= length for item in series):
        drawn = WindowSampler(series, split, length, calendar="24/7").draw(64, np.random.default_rng(seed))
        assert drawn.timestamps.max() < split.val_from
        assert all(series[index].symbol != "UNSEEN" for index in drawn.series)


@settings(max_examples=200, deadline=None)
@given(splits())
def test_parts_are_a_horizon_of_candles_apart(case: tuple[list[Series], Split]) -> None:
    series, split = case
    for item in series[:2]:
        train, val, test = (split.targets(item, part) for part in ("train", "val", "test"))
        later_than_train = [part.start for part in (val, test) if len(part)]
        if len(train) and later_than_train:
            assert min(later_than_train) - train.stop >= split.horizon
        if len(val) and len(test):
            assert test.start - val.stop >= split.horizon


@settings(max_examples=100, deadline=None)
@given(splits(), st.integers(1, 30))
def test_unseen_symbols_are_evaluated_in_the_time_of_the_test_alone(
    case: tuple[list[Series], Split], min_context: int
) -> None:
    series, split = case
    for part in ("train", "val", "test"):
        assert len(split.targets(series[2], part)) == 0
    origins = rolling_origins(series, split, "unseen", stride=1, min_context=min_context)
    assert {series[index].symbol for index, _ in origins.pairs} <= {"UNSEEN"}


def test_fractions_divide_the_pooled_candles_in_time() -> None:
    series = [ramp("AAA", 4000, 100), ramp("BBB", 4050, 100)]
    split = split_by_fractions(series, 0.5, 0.25, horizon=1)
    earlier = sum(int((item.timestamps < split.val_from).sum()) for item in series)
    before_test = sum(int((item.timestamps < split.test_from).sum()) for item in series)
    assert (earlier, before_test) == (100, 150)


@pytest.mark.parametrize(("train", "val"), [(0.0, 0.5), (0.8, 0.2), (0.5, -0.1)])
def test_fractions_without_a_test_are_refused(train: float, val: float) -> None:
    with pytest.raises(ValueError, match="leave nothing to test"):
        split_by_fractions([ramp("AAA", 4000, 100)], train, val, horizon=1)


def test_dates_cut_at_midnight_utc() -> None:
    split = split_by_dates(date(2010, 1, 2), datetime(2010, 1, 3, 12, tzinfo=UTC), horizon=3, unseen=["IBM"])
    assert split.val_from == np.datetime64("2010-01-02", "ms").astype(np.int64)
    assert split.test_from == np.datetime64("2010-01-03T12", "ms").astype(np.int64)
    assert split.unseen == {"IBM"}


def test_dates_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match="val_from lies after its test_from"):
        split_by_dates(date(2010, 1, 2), date(2010, 1, 1), horizon=3)


def test_recipe_gives_fractions_or_dates() -> None:
    series = [ramp("AAA", 4000, 100)]
    assert split_from_recipe({"fractions": [0.5, 0.2]}, series, 4) == split_by_fractions(series, 0.5, 0.2, horizon=4)
    dates = {"val_from": date(1981, 1, 1), "test_from": date(1981, 2, 1), "unseen": ["AAA"]}
    expected = split_by_dates(date(1981, 1, 1), date(1981, 2, 1), horizon=4, unseen=["AAA"])
    assert split_from_recipe(dates, series, 4) == expected


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"val_from": date(1981, 1, 1)},
        {"test_from": date(1981, 1, 1)},
        {"fractions": [0.5, 0.2], "val_from": date(1981, 1, 1), "test_from": date(1981, 1, 1)},
        {"fractions": [0.5, 0.2], "purge": 3},
    ],
)
def test_recipe_that_says_neither_or_more_is_refused(table: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="recipe's split"):
        split_from_recipe(table, [ramp("AAA", 4000, 100)], 4)


def test_holding_out_a_symbol_without_candles_is_refused() -> None:
    with pytest.raises(ValueError, match="holds out XYZ"):
        split_from_recipe({"fractions": [0.5, 0.2], "unseen": ["XYZ"]}, [ramp("AAA", 4000, 100)], 4)


# -- a folder for each part ------------------------------------------------------------------------


def test_parts_cut_where_they_begin_and_a_symbol_of_the_test_alone_is_unseen() -> None:
    train = [ramp("AAA", 4000, 50), ramp("BBB", 4010, 30)]
    val, test = [ramp("AAA", 4060, 20)], [ramp("AAA", 4080, 30), ramp("CCC", 4085, 30)]
    split = split_by_parts([train, val, test], horizon=5, unseen=["AAA"])
    assert (split.val_from, split.test_from) == (4060 * DAY_MS, 4080 * DAY_MS)
    assert split.unseen == {"AAA", "CCC"}
    without_val = split_by_parts([train, [], test], horizon=5)
    assert (without_val.val_from, without_val.test_from) == (4080 * DAY_MS, 4080 * DAY_MS)


def test_a_symbol_of_several_parts_is_one_series_whose_contexts_reach_back() -> None:
    parts = [[ramp("BBB", 4000, 30), ramp("AAA", 4000, 50)], [ramp("AAA", 4050, 20)], [ramp("AAA", 4070, 30)]]
    first, second = joined(parts)
    assert (first.symbol, second.symbol) == ("AAA", "BBB")
    assert first.timestamps.tolist() == ramp("AAA", 4000, 100).timestamps.tolist()
    assert first.candles.tolist() == ramp("AAA", 4000, 100).candles.tolist()
    split = split_by_parts(parts, horizon=5)
    assert len(rolling_origins([first], split, "test", stride=1, min_context=60)) == 26


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            [[ramp("AAA", 4000, 50)], [ramp("AAA", 4049, 9)], [ramp("AAA", 4060, 9)]],
            "AAA ends on 1981-02-01.*AAA begins",
        ),
        ([[ramp("AAA", 4000, 50)], [], [ramp("AAA", 4049, 9)]], "AAA ends on 1981-02-01"),
        ([[ramp("AAA", 4000, 9)], [ramp("AAA", 4049, 9)], [ramp("AAA", 4050, 9)]], "AAA ends on 1981-02-09"),
        ([[ramp("AAA", 4000, 9), ramp("BBB", 4000, 90)], [], [ramp("AAA", 4020, 9)]], "BBB ends on .*AAA begins on"),
        ([[], [], [ramp("AAA", 4000, 9)]], "no candles to train on"),
        ([[ramp("AAA", 4000, 9)], [ramp("AAA", 4020, 9)], []], "or none to test with"),
    ],
)
def test_parts_that_overlap_in_time_or_are_missing_are_refused(parts: list[list[Series]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        split_by_parts(parts, horizon=5)


def test_holding_out_a_symbol_that_the_test_folder_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="holds out BBB"):
        split_by_parts([[ramp("BBB", 4000, 9)], [], [ramp("AAA", 4020, 9)]], horizon=5, unseen=["BBB"])


# -- origins ---------------------------------------------------------------------------------------


def test_every_origin_of_the_test_is_enumerated() -> None:
    split = Split(4040 * DAY_MS, 4050 * DAY_MS, horizon=10)
    origins = rolling_origins([ramp("AAA", 4000, 100)], split, "test", stride=7, min_context=20)
    assert origins.pairs == tuple((0, origin) for origin in range(49, 90, 7))
    assert len(rolling_origins([ramp("AAA", 4000, 100)], split, "test", stride=1, min_context=20)) == 41


def test_contexts_reach_back_and_short_ones_wait() -> None:
    split = Split(4000 * DAY_MS, 4000 * DAY_MS, horizon=5)
    origins = rolling_origins([ramp("AAA", 4000, 60)], split, "test", stride=1, min_context=30)
    assert origins.pairs[0] == (0, 29)


def test_a_shorter_horizon_is_allowed_and_a_longer_one_refused() -> None:
    split, series = Split(4040 * DAY_MS, 4050 * DAY_MS, horizon=10), [ramp("AAA", 4000, 100)]
    assert rolling_origins(series, split, "test", stride=1, min_context=2, horizon=4).pairs[-1] == (0, 95)
    with pytest.raises(ValueError, match="overlaps parts"):
        rolling_origins(series, split, "test", stride=1, min_context=2, horizon=11)


# -- inputs ----------------------------------------------------------------------------------------


def test_input_ends_at_its_origin_and_continues_on_the_calendar(samples: list[Series]) -> None:
    apple = samples[0]
    origin = int(np.searchsorted(apple.timestamps, np.datetime64("2012-11-21", "ms").astype(np.int64)))
    item = forecast_input(apple, origin, horizon=5, lookback=64, calendar=series_calendar(apple))
    assert item.timestamps.tolist() == apple.timestamps[origin - 63 : origin + 1].tolist()
    assert item.candles.tolist() == apple.candles[origin - 63 : origin + 1].tolist()
    assert item.future_timestamps.tolist() == apple.timestamps[origin + 1 : origin + 6].tolist()  # no Thanksgiving
    assert item.local_times.tolist() == apple.timestamps[origin - 63 : origin + 6].tolist()


def test_input_at_the_last_candle_needs_no_later_one(samples: list[Series]) -> None:
    facebook = samples[1]
    item = forecast_input(facebook, 195, horizon=64, lookback=512, calendar=series_calendar(facebook))
    assert (len(item.candles), item.horizon) == (196, 64)
    assert item.future_timestamps[0] > facebook.timestamps[-1]


def test_calendar_is_inferred_or_taken_by_name(samples: list[Series], eurusd: Series) -> None:
    assert series_calendar(samples[0]).name == "XNYS"
    assert series_calendar(eurusd).name == "24/5"
    assert series_calendar(ramp("AAA", 4000, 30)) is get_calendar("24/7")
    assert series_calendar(samples[0], "24/7").name == "24/7"
    with pytest.raises(UnknownCalendar):
        series_calendar(samples[0], "NOWHERE")


def test_candles_off_the_calendar_are_named_with_their_symbol() -> None:
    with pytest.raises(InvalidCandles, match="AAA: candle 1 opens at 1980-12-13") as error:
        series_calendar(ramp("AAA", 3998, 30), "XNYS")
    assert error.value.row == 1


# -- training windows ------------------------------------------------------------------------------


def test_windows_are_consecutive_candles_of_one_series() -> None:
    series = [ramp("AAA", 4000, 50), ramp("BBB", 9000, 70)]
    split = Split(20_000 * DAY_MS, 20_000 * DAY_MS, horizon=5)
    drawn = WindowSampler(series, split, 12).draw(32, np.random.default_rng(0))
    assert drawn.candles.shape == (32, 12, 6)
    assert (np.diff(drawn.timestamps, axis=1) == DAY_MS).all()
    assert (drawn.candles[:, :, 3] * DAY_MS == drawn.timestamps).all()
    assert (drawn.local_times == drawn.timestamps).all()
    assert ((drawn.timestamps[:, 0] >= 9000 * DAY_MS) == (drawn.series == 1)).all()


def test_all_windows_are_equally_likely() -> None:
    series = [ramp("AAA", 4000, 16), ramp("BBB", 4000, 5), ramp("CCC", 4000, 26)]  # the last of each is purged
    sampler = WindowSampler(series, Split(20_000 * DAY_MS, 20_000 * DAY_MS, horizon=1), 10)
    assert len(sampler) == 6 + 0 + 16
    drawn = sampler.draw(22_000, np.random.default_rng(0))
    starts = drawn.series * 100 + drawn.timestamps[:, 0] // DAY_MS - 4000
    places, counts = np.unique(starts, return_counts=True)
    assert places.tolist() == [*range(6), *range(200, 216)]
    assert counts.min() > 850  # of 1000 expected
    assert counts.max() < 1150


def test_windows_depend_on_the_generator_alone(samples: list[Series]) -> None:
    split = split_by_dates(date(2010, 1, 1), date(2011, 1, 1), horizon=30)
    first, again, other = (
        WindowSampler(samples, split, 94).draw(8, np.random.default_rng(seed)).candles for seed in (1, 1, 2)
    )
    assert (first == again).all()
    assert (first != other).any()


def test_hourly_windows_carry_the_exchange_clock(eurusd: Series) -> None:
    sampler = WindowSampler([eurusd], Split(4 * 10**12, 4 * 10**12, horizon=5), 40)
    drawn = sampler.draw(4, np.random.default_rng(0))
    expected = get_calendar("24/5").local(drawn.timestamps[0], "1h")
    assert drawn.local_times[0].tolist() == expected.tolist()


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 51 rows, AAA has 49"):
        WindowSampler([ramp("AAA", 4000, 50)], Split(20_000 * DAY_MS, 20_000 * DAY_MS, horizon=1), 51)

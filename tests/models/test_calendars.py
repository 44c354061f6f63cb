"""When candles happen, on real calendars and real candles."""

from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

import exchange_calendars
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.calendars import UnknownCalendar, calendar_features, get_calendar, infer_calendar
from models.candles import DAY_MS, InvalidCandles, Millis, interval_ms

PACKAGED = Path(str(find_spec("backtesting").origin)).parent / "test"  # type: ignore[union-attr]
HOUR_MS = 3_600_000


def at(*texts: str) -> Millis:
    """UTC wall clocks to milliseconds."""
    epoch, millisecond = datetime.fromtimestamp(0, UTC), timedelta(milliseconds=1)
    return np.array([(datetime.fromisoformat(t).replace(tzinfo=UTC) - epoch) // millisecond for t in texts])


def shown(timestamps: Millis) -> list[str]:
    return [f"{datetime.fromtimestamp(int(t) / 1000, UTC):%Y-%m-%d %H:%M}" for t in timestamps]


def following(calendar: str, interval: str, last: str, count: int) -> list[str]:
    return shown(get_calendar(calendar).following(at(last), interval, count))


def packaged(name: str) -> Millis:
    index = pd.read_csv(PACKAGED / name, index_col=0, parse_dates=True).index
    return index.to_numpy().astype("datetime64[ms]").astype(np.int64)


@pytest.fixture(scope="module")
def eurusd() -> Millis:
    return packaged("EURUSD.csv")


@pytest.fixture(scope="module")
def goog() -> Millis:
    return packaged("GOOG.csv")


# -- 24/7 ---------------------------------------------------------------------------------------


def test_a_market_that_never_closes_goes_on_through_the_weekend() -> None:
    assert following("24/7", "1h", "2024-03-08 22:00", 3) == [
        "2024-03-08 23:00",
        "2024-03-09 00:00",
        "2024-03-09 01:00",
    ]


def test_its_grid_is_that_of_its_own_candles() -> None:
    assert following("24/7", "1d", "2024-03-08 07:30", 2) == ["2024-03-09 07:30", "2024-03-10 07:30"]


def test_its_clock_is_utc_and_a_candle_closes_an_interval_later() -> None:
    calendar, times = get_calendar("24/7"), at("2024-07-01 00:00")
    assert calendar.timezone == "UTC"
    assert (calendar.local(times, "1h") == times).all()
    assert (calendar.closes(times, "4h") == times + 4 * HOUR_MS).all()


@given(st.sampled_from(["1m", "15m", "4h", "1d", "3d", "1w"]), st.integers(1, 300))
def test_its_horizon_is_arithmetic(interval: str, count: int) -> None:
    last = at("2023-12-31 23:00")
    found = get_calendar("24/7").following(last, interval, count)
    assert (found == last + interval_ms(interval) * np.arange(1, count + 1)).all()


def test_a_candle_off_its_grid_is_named_by_its_row() -> None:
    times = at("2024-03-08 00:00", "2024-03-08 01:00", "2024-03-08 02:01", "2024-03-08 03:00")
    with pytest.raises(InvalidCandles, match=r"candle 2 opens at 2024-03-08T02:01.*1h grid of calendar 24/7") as caught:
        get_calendar("24/7").check(times, "1h")
    assert (caught.value.row, caught.value.code) == (2, "off_grid")


def test_a_gap_is_not_off_the_grid() -> None:
    get_calendar("24/7").check(at("2024-03-08 00:00", "2024-03-08 05:00"), "1h")


# -- 24/5 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "first"),
    [
        ("2024-01-12 21:00", "2024-01-14 22:00"),  # winter: 17:00 New York is 22:00 UTC
        ("2024-07-12 20:00", "2024-07-14 21:00"),  # summer: 21:00 UTC
        ("2024-03-08 21:00", "2024-03-10 21:00"),  # summer time begins on that Sunday: 47 hours
        ("2024-11-01 20:00", "2024-11-03 22:00"),  # and ends: 49 hours
    ],
)
def test_spot_fx_pauses_from_friday_to_sunday_17_new_york(last: str, first: str) -> None:
    assert following("24/5", "1h", last, 1) == [first]


@pytest.mark.parametrize("interval", ["1m", "15m", "1h", "4h"])
@pytest.mark.parametrize("count", [1, 64, 512])
@pytest.mark.parametrize("last", ["2024-03-08 20:00", "2024-11-01 20:00", "2024-07-10 12:00"])
def test_the_weekend_never_shortens_the_horizon(last: str, count: int, interval: str) -> None:
    found = get_calendar("24/5").following(at(last), interval, count)
    assert len(found) == count
    get_calendar("24/5").check(np.concatenate([at(last), found]), interval)
    clock = pd.DatetimeIndex(found.astype("datetime64[ms]"), tz="UTC").tz_convert("America/New_York")
    assert not ((clock.dayofweek == 5) | ((clock.dayofweek == 4) & (clock.hour >= 17))).any()
    assert not ((clock.dayofweek == 6) & (clock.hour < 17)).any()


def test_daily_fx_goes_from_friday_to_monday() -> None:
    assert following("24/5", "1d", "2024-03-08 00:00", 6) == [
        f"2024-03-{day} 00:00" for day in ("11", "12", "13", "14", "15", "18")
    ]


def test_a_candle_in_the_middle_of_the_weekend_is_off_the_grid() -> None:
    with pytest.raises(InvalidCandles) as caught:
        get_calendar("24/5").check(at("2024-07-12 19:00", "2024-07-13 12:00"), "1h")
    assert caught.value.row == 1


def test_hourly_eurusd_reproduces_itself_but_for_its_holidays(eurusd: Millis) -> None:
    calendar = get_calendar("24/5")
    calendar.check(eurusd, "1h")
    differing = [
        (shown(eurusd[i : i + 1])[0], shown(eurusd[i + 1 : i + 2])[0])
        for i in range(len(eurusd) - 1)
        if calendar.following(eurusd[: i + 1], "1h", 1)[0] != eurusd[i + 1]
    ]
    assert differing == [
        ("2017-10-06 20:00", "2017-10-06 21:00"),  # a candle after the close
        ("2017-10-20 20:00", "2017-10-20 21:00"),
        ("2017-12-22 21:00", "2017-12-25 22:00"),  # Christmas
        ("2017-12-29 21:00", "2018-01-01 22:00"),  # New Year
    ]


# -- exchanges ----------------------------------------------------------------------------------


def test_friday_is_followed_by_monday() -> None:
    assert following("XNYS", "1d", "2024-03-08", 2) == ["2024-03-11 00:00", "2024-03-12 00:00"]


def test_a_holiday_is_skipped() -> None:
    assert following("XNYS", "1d", "2024-07-03", 1) == ["2024-07-05 00:00"]


def test_summer_time_moves_the_opening_in_utc_and_not_on_the_wall() -> None:
    calendar = get_calendar("XNYS")
    found = calendar.following(at("2024-03-08 20:30"), "1h", 7)
    assert shown(found[:2]) == ["2024-03-11 13:30", "2024-03-11 14:30"]
    assert shown(calendar.local(found[:1], "1h")) == ["2024-03-11 09:30"]


def test_an_early_close_ends_the_day() -> None:
    calendar = get_calendar("XNYS")
    day = calendar.following(at("2024-11-27 20:30"), "1h", 5)  # Thursday is Thanksgiving; Friday closes at 13:00
    assert shown(day) == [
        "2024-11-29 14:30", "2024-11-29 15:30", "2024-11-29 16:30", "2024-11-29 17:30", "2024-12-02 14:30",
    ]  # fmt: skip
    assert shown(calendar.closes(day[3:4], "1h")) == ["2024-11-29 18:00"]


def test_the_last_candle_of_a_day_closes_with_the_session() -> None:
    assert shown(get_calendar("XNYS").closes(at("2024-03-11 19:30"), "1h")) == ["2024-03-11 20:00"]


def test_intraday_candles_may_follow_the_clock_instead_of_the_opening() -> None:
    calendar, times = get_calendar("XNYS"), at("2024-03-11 13:00", "2024-03-11 14:00", "2024-03-11 19:00")
    calendar.check(times, "1h")
    assert shown(calendar.following(times, "1h", 2)) == ["2024-03-12 13:00", "2024-03-12 14:00"]


@pytest.mark.parametrize(
    ("start", "interval"),
    [("14:30", "5m"), ("14:30", "30m"), ("14:30", "1h"), ("14:00", "1h"), ("14:30", "90m"), ("12:00", "4h")],
)
def test_an_alignment_is_kept_over_summer_time(start: str, interval: str) -> None:
    calendar, first = get_calendar("XNYS"), at(f"2024-03-06 {start}")
    series = np.concatenate([first, calendar.following(first, interval, 250)])
    calendar.check(series, interval)
    for cut in (1, 20, 60, 249):
        assert (calendar.following(series[:cut], interval, len(series) - cut) == series[cut:]).all()


def test_a_lunch_break_has_no_candles() -> None:
    assert following("XHKG", "1h", "2024-03-08 01:30", 6) == [  # 09:30 Hong Kong; lunch from 12:00 to 13:00
        "2024-03-08 02:30", "2024-03-08 03:30", "2024-03-08 05:00", "2024-03-08 06:00", "2024-03-08 07:00",
        "2024-03-11 01:30",
    ]  # fmt: skip
    assert shown(get_calendar("XHKG").closes(at("2024-03-08 03:30"), "1h")) == ["2024-03-08 04:00"]


@pytest.mark.parametrize(
    ("name", "interval", "first"),
    [
        *(("24/7", interval, "2024-03-08 07:30") for interval in ("1h", "1d", "1w")),
        ("24/5", "1d", "2024-03-08 00:00"),
        *(("XNYS", "1d", text) for text in ("2024-03-08 00:00", "2024-03-08 05:00", "2024-03-08 14:30")),
        ("XNYS", "1w", "2024-03-08 00:00"),
        ("XNYS", "1h", "2024-03-08 14:30"),
        ("XNYS", "1h", "2024-03-08 15:00"),
        ("XHKG", "1h", "2024-03-08 01:30"),
    ],
)
def test_slots_are_the_candles_there_would_be_without_gaps(name: str, interval: str, first: str) -> None:
    calendar, start = get_calendar(name), at(first)
    whole = np.concatenate([start, calendar.following(start, interval, 300)])
    kept = np.delete(whole, [1, 7, 8, 9, 200])
    assert calendar.slots(kept, interval).tolist() == whole.tolist()


def test_no_candle_is_asked_of_the_hours_beside_a_weekend(eurusd: Millis) -> None:
    calendar = get_calendar("24/5")
    slots = calendar.slots(eurusd, "1h")
    assert set(shown(slots[~np.isin(slots, eurusd)])) <= {
        *shown(at("2017-12-24 23:00") + HOUR_MS * np.arange(23)),  # Christmas,
        *shown(at("2017-12-31 23:00") + HOUR_MS * np.arange(23)),  # New Year
    }


@pytest.mark.parametrize("name", ["XNYS", "XHKG", "XTKS"])
@pytest.mark.parametrize(
    ("interval", "on_the_clock"), [(i, clock) for i in ("15m", "1h", "2h") for clock in (False, True)] + [("4h", False)]
)
def test_the_closes_of_a_week_lead_back_to_its_opens(name: str, interval: str, on_the_clock: bool) -> None:
    calendar, step = get_calendar(name), interval_ms(interval)
    opening = at({"XNYS": "2024-03-06 14:30", "XHKG": "2024-03-06 01:30", "XTKS": "2024-03-06 00:00"}[name])
    first = opening // step * step if on_the_clock else opening
    opens = np.concatenate([first, calendar.following(first, interval, 40)])
    assert (calendar.opens(calendar.closes(opens, interval), interval) == opens).all()


def test_a_candle_at_night_is_off_the_grid() -> None:
    with pytest.raises(InvalidCandles, match="2024-03-12T02:30") as caught:
        get_calendar("XNYS").check(at("2024-03-11 13:30", "2024-03-12 02:30"), "1h")
    assert (caught.value.row, caught.value.code) == (1, "off_grid")


@pytest.mark.parametrize("day", ["2024-03-09", "2024-07-04", "2024-12-25"])
def test_a_daily_candle_on_a_closed_day_is_off_the_grid(day: str) -> None:
    with pytest.raises(InvalidCandles, match="candle 1"):
        get_calendar("XNYS").check(at("2024-03-08", day), "1d")


@pytest.mark.parametrize(
    ("labels", "then"),
    [
        (["2024-03-07", "2024-03-08"], "2024-03-11 00:00"),  # by date
        (["2024-03-07 05:00", "2024-03-08 05:00"], "2024-03-11 04:00"),  # by midnight in New York
        (["2024-03-07 14:30", "2024-03-08 14:30"], "2024-03-11 13:30"),  # by the opening
    ],
)
def test_daily_candles_keep_the_labels_they_came_with(labels: list[str], then: str) -> None:
    calendar, times = get_calendar("XNYS"), at(*labels)
    calendar.check(times, "1d")
    found = calendar.following(times, "1d", 1)
    assert shown(found) == [then]
    assert shown(calendar.local(found, "1d")) == ["2024-03-11 00:00"]
    assert shown(calendar.closes(found, "1d")) == ["2024-03-11 20:00"]


def test_a_london_winter_does_not_hide_labels_by_local_midnight() -> None:
    calendar = get_calendar("XLON")  # in winter local midnight is 00:00 UTC too; in summer it is 23:00 the day before
    times = at("2024-03-28", "2024-04-01 23:00", "2024-04-02 23:00")
    calendar.check(times, "1d")
    assert shown(calendar.local(times, "1d")) == ["2024-03-28 00:00", "2024-04-02 00:00", "2024-04-03 00:00"]
    assert shown(calendar.following(times, "1d", 1)) == ["2024-04-03 23:00"]


def test_tokyo_days_begin_on_the_evening_before_in_utc() -> None:
    calendar, times = get_calendar("XTKS"), at("2024-03-06 15:00", "2024-03-07 15:00")
    calendar.check(times, "1d")
    assert shown(calendar.local(times, "1d")) == ["2024-03-07 00:00", "2024-03-08 00:00"]


def test_daily_goog_reproduces_itself_for_nine_years(goog: Millis) -> None:
    calendar = get_calendar("XNYS")
    calendar.check(goog, "1d")
    assert (calendar.following(goog[:1], "1d", len(goog) - 1) == goog[1:]).all()
    assert len(goog) == 2148


def test_weekly_candles_step_by_weeks_whatever_the_exchange() -> None:
    assert following("XNYS", "1w", "2024-07-01", 2) == ["2024-07-08 00:00", "2024-07-15 00:00"]


@pytest.mark.long
def test_every_calendar_of_the_library_is_built_once() -> None:
    names = exchange_calendars.get_calendar_names(include_aliases=False)
    built = {name: get_calendar(name) for name in names}
    assert [name for name in names if built[name].name != name or get_calendar(name) is not built[name]] == []


def test_a_day_without_midnight_begins_after_the_jump() -> None:
    calendar, days = get_calendar("BVMF"), at("1997-10-02 03:00", "1997-10-03 03:00", "1997-10-06 03:00")
    calendar.check(days, "1d")  # Brazil went from 23:59 to 01:00
    assert shown(calendar.local(days, "1d")) == ["1997-10-02 00:00", "1997-10-03 00:00", "1997-10-06 00:00"]
    assert shown(calendar.following(days, "1d", 1)) == ["1997-10-07 02:00"]


def test_candles_from_1985_have_a_calendar() -> None:
    assert following("XNYS", "1d", "1985-09-26", 1) == ["1985-09-30 00:00"]  # hurricane Gloria closed the 27th


def test_a_horizon_beyond_the_known_sessions_is_refused_not_cut() -> None:
    with pytest.raises(InvalidCandles, match="ends before 100000 more 1d candles"):
        get_calendar("XNYS").following(at("2024-01-05"), "1d", 100_000)


def test_a_candle_beyond_the_known_sessions_is_refused() -> None:
    with pytest.raises(InvalidCandles, match="does not reach"):
        get_calendar("XNYS").check(at("2099-03-02 14:30"), "1h")


FIRST = {"XNYS": "2008-01-02 14:30", "XLON": "2008-01-02 08:00", "XHKG": "2008-01-02 02:00", "24/5": "2008-01-02 08:00"}


@given(st.integers(1, 4000), st.sampled_from(["15m", "1h", "1d"]), st.sampled_from(sorted(FIRST)))
def test_every_horizon_continues_the_grid_it_came_from(away: int, interval: str, name: str) -> None:
    calendar, opening = get_calendar(name), at(FIRST[name])
    start = calendar.following(opening // DAY_MS * DAY_MS if interval == "1d" else opening, interval, away)[-1:]
    found = calendar.following(start, interval, 70)
    series = np.concatenate([start, found])
    assert (np.diff(series) > 0).all()
    calendar.check(series, interval)
    assert (calendar.following(series[:31], interval, 40) == series[31:]).all()
    assert (calendar.closes(found, interval) > found).all()


@pytest.mark.parametrize("name", ["", "NYSE?", "24/6", "../etc", "auto"])
def test_an_unknown_calendar_is_named_with_what_would_do(name: str) -> None:
    with pytest.raises(UnknownCalendar, match="24/7, 24/5, auto or an exchange such as XNYS"):
        get_calendar(name)


# -- auto ---------------------------------------------------------------------------------------


def test_auto_knows_fx_stocks_and_coins_apart(eurusd: Millis, goog: Millis) -> None:
    assert infer_calendar(eurusd, "1h") == "24/5"
    assert infer_calendar(goog, "1d") == "XNYS"
    assert infer_calendar(at("2024-03-01") + DAY_MS * np.arange(30), "1d") == "24/7"
    assert infer_calendar(at("2024-03-05 00:00") + HOUR_MS * np.arange(20), "1h") == "24/7"


@pytest.mark.parametrize("first", ["2024-03-09 11:00", "2024-03-10 01:00", "2024-03-10 20:00", "2024-03-11 00:00"])
@pytest.mark.parametrize("hours", [2, 40, 90])
def test_auto_finds_a_calendar_that_hourly_coins_fit_whenever_they_begin(first: str, hours: int) -> None:
    candles = at(first) + HOUR_MS * np.arange(hours)
    assert infer_calendar(candles, "1h") == "24/7"
    get_calendar("24/7").check(candles, "1h")


def test_auto_sees_a_weekend_pass_between_two_candles() -> None:
    assert infer_calendar(at("2024-03-08 20:00", "2024-03-10 22:00"), "1h") == "24/5"
    assert infer_calendar(at("2024-03-10 22:00", "2024-03-11 00:00"), "1h") == "24/7"


def test_auto_takes_weekly_candles_of_any_market_for_plain_weeks() -> None:
    assert infer_calendar(at("2024-03-04") + 7 * DAY_MS * np.arange(30), "1w") == "24/7"


# -- features -----------------------------------------------------------------------------------


def test_features_are_minute_hour_weekday_day_and_month() -> None:
    assert calendar_features(at("2024-02-29 09:35", "2023-01-01 00:00")).tolist() == [
        [35, 9, 3, 29, 2],
        [0, 0, 6, 1, 1],
    ]


@given(st.datetimes())
def test_features_agree_with_the_standard_library(moment: datetime) -> None:
    local = at(moment.isoformat())
    expected = [moment.minute, moment.hour, moment.weekday(), moment.day, moment.month]
    assert calendar_features(local)[0].tolist() == expected

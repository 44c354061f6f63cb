import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from models.candles import AMOUNT, CLOSE, DAY_MS, OPEN, VOLUME, check_candles
from training.candle_files import CandleFileError, Series, digest, load, read, read_all, read_table

HEADER = "timestamp,open,high,low,close,volume"
ROWS = ["2024-01-01,1,3,0.5,2,10", "2024-01-02,2,4,1.5,3,20", "2024-01-03,3,5,2.5,4,30"]
FIRST_MS = 1_704_067_200_000  # 2024-01-01


def write(folder: Path, *lines: str, name: str = "BTC-USDT.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


# -- columns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        HEADER,
        "Date,Open,High,Low,Close,Volume",
        "timestamps,open,high,low,close,volume",
        "datetime,o,h,l,c,v",
        "ds,O,H,L,C,V",
        "Open time,Open,High,Low,Close,Volume",
        "open_time,open,high,low,close,vol",
        "time,open,high,low,close,volume",
        ",open,high,low,close,volume",
        "<DATE>,<OPEN>,<HIGH>,<LOW>,<CLOSE>,<VOL>",
        "\ufeffTimestamp, Open, High, Low, Close, Volume",
    ],
)
def test_usual_headers_are_understood(tmp_path: Path, header: str) -> None:
    series, report = read(write(tmp_path, header, *ROWS))
    assert series.timestamps.tolist() == [FIRST_MS, FIRST_MS + DAY_MS, FIRST_MS + 2 * DAY_MS]
    assert series.candles[1].tolist() == [2, 4, 1.5, 3, 20, 2.625 * 20]
    assert (series.symbol, series.interval, report.kept) == ("BTC-USDT", "1d", 3)


@pytest.mark.parametrize(
    ("missing", "header"),
    [("timestamp", "when,open,high,low,close,volume"), ("low", "date,open,high,bottom,close,volume")],
)
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, missing: str, header: str) -> None:
    with pytest.raises(CandleFileError, match=f"BTC-USDT.csv has no (column )?{missing}") as error:
        read(write(tmp_path, header, *ROWS))
    assert header.split(",")[0] in str(error.value)


def test_two_columns_of_one_meaning_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CandleFileError, match="more than one close column: close, c"):
        read(write(tmp_path, "date,open,high,low,close,volume,c", *(f"{row},1" for row in ROWS)))


def test_absent_volume_is_zero_and_reported(tmp_path: Path) -> None:
    series, report = read(write(tmp_path, "date,open,high,low,close", *(row.rsplit(",", 1)[0] for row in ROWS)))
    assert report.without_volume
    assert (series.candles[:, VOLUME] == 0).all()


def test_a_given_amount_is_kept_and_a_missing_one_estimated(tmp_path: Path) -> None:
    rows = [f"{ROWS[0]},99", f"{ROWS[1]},", f"{ROWS[2]},77"]
    series, _ = read(write(tmp_path, f"{HEADER},Quote asset volume", *rows))
    assert series.candles[:, AMOUNT].tolist() == [99, 52.5, 77]


def test_adjusted_close_is_applied_only_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path, f"{HEADER},Adj Close", *(f"{row},1" for row in ROWS))
    plain, report = read(path)
    assert plain.candles[:, CLOSE].tolist() == [2, 3, 4]
    assert not report.adjusted
    adjusted, report = read(path, adjust=True)
    assert adjusted.candles[:, CLOSE].tolist() == pytest.approx([1, 1, 1])
    assert adjusted.candles[0, [OPEN, VOLUME]].tolist() == [0.5, 20]
    assert report.adjusted


def test_adjusting_never_breaks_a_valid_candle(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    prices, factors = rng.uniform(1, 100, 500).round(2).tolist(), rng.uniform(0.01, 1, 500).tolist()
    rows = [
        f"{FIRST_MS + i * DAY_MS},{price},{price},{price},{price},5,{price * factor!r}"
        for i, (price, factor) in enumerate(zip(prices, factors, strict=True))
    ]
    series, report = read(write(tmp_path, f"{HEADER},adj close", *rows), adjust=True)
    assert report.kept == 500
    check_candles(series.candles)


def test_adjusting_does_not_mend_a_broken_candle(tmp_path: Path) -> None:
    rows = [f"{row},1" for row in [*ROWS, "2024-01-04,3,2,2.5,4,30"]]  # high below open
    _, report = read(write(tmp_path, f"{HEADER},adj close", *rows), adjust=True)
    assert (report.invalid, report.kept) == (1, 3)


def test_a_column_written_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CandleFileError, match=r"more than one close column: close, close\.1"):
        read(write(tmp_path, f"{HEADER},close", *(f"{row},1" for row in ROWS)))
    with pytest.raises(CandleFileError, match="more than one column date"):
        read(write(tmp_path, "Date,date,open,high,low,close,volume", *(f"2024-01-01,{row}" for row in ROWS)))


# -- layouts ---------------------------------------------------------------------------------------

PAIR = pd.MultiIndex.from_product([["Close", "High", "Low", "Open", "Volume"], ["AAPL", "BRK.B"]])


def downloaded(columns: pd.MultiIndex, *, zone: str | None = None) -> pd.DataFrame:
    """What yfinance gives: BRK.B lacks the second day and is ten times as dear."""
    index = pd.DatetimeIndex(["2024-01-01", "2024-01-02", "2024-01-03"], name="Date").tz_localize(zone)
    fields = {"Open": [1, 2, 3], "High": [3, 4, 5], "Low": [0.5, 1.5, 2.5], "Close": [2, 3, 4], "Volume": [10, 20, 30]}
    table = pd.DataFrame(index=index, columns=columns, dtype=float)
    for pair in columns:
        field, ticker = pair if pair[0] in fields else reversed(pair)
        table[pair] = np.array(fields[field]) * (1.0 if ticker == "AAPL" else 10.0)
        if ticker == "BRK.B":
            table.loc["2024-01-02", pair] = np.nan
    return table


def save(table: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".csv":
        table.to_csv(path)
    else:
        table.to_parquet(path)
    return path


ENDINGS = pytest.mark.parametrize("ending", ["csv", "parquet"])
LEVELS = pytest.mark.parametrize(
    "columns",
    [PAIR.set_names(["Price", "Ticker"]), PAIR, PAIR.swaplevel().set_names(["Ticker", "Price"]).sort_values()],
    ids=["as now", "as once", "by ticker"],
)


@ENDINGS
@LEVELS
def test_a_download_of_several_symbols_is_read_as_several_series(
    tmp_path: Path, columns: pd.MultiIndex, ending: str
) -> None:
    path = save(downloaded(columns), tmp_path / f"download.{ending}")
    (apple, apple_report), (berkshire, berkshire_report) = read_all(path)
    assert (apple.symbol, berkshire.symbol) == ("AAPL", "BRK.B")
    assert apple.candles[1].tolist() == [2, 4, 1.5, 3, 20, 2.625 * 20]
    assert berkshire.candles[:, CLOSE].tolist() == [20, 40]
    assert berkshire.timestamps.tolist() == [FIRST_MS, FIRST_MS + 2 * DAY_MS]
    assert (apple_report.rows, berkshire_report.rows, berkshire_report.invalid) == (3, 2, 0)
    assert [item.symbol for item in load(tmp_path)[0]] == ["AAPL", "BRK.B"]


@ENDINGS
@LEVELS
def test_a_download_of_one_symbol_is_called_as_its_file(tmp_path: Path, columns: pd.MultiIndex, ending: str) -> None:
    chosen = columns[(columns.get_level_values(0) == "AAPL") | (columns.get_level_values(1) == "AAPL")]
    series, report = read(save(downloaded(chosen), tmp_path / f"apple.{ending}"))
    assert series.symbol == "APPLE"
    assert series.candles[:, CLOSE].tolist() == [2, 3, 4]
    assert (report.rows, report.unreadable) == (3, 0)


def test_where_one_series_is_wanted_several_are_refused(tmp_path: Path) -> None:
    path = save(downloaded(PAIR), tmp_path / "download.csv")
    with pytest.raises(CandleFileError, match=r"several symbols \(AAPL, BRK\.B\)"):
        read(path)
    with pytest.raises(CandleFileError, match=r"several symbols \(AAPL, BRK\.B\)"):
        read_table(path, "it")


@ENDINGS
def test_rows_of_several_symbols_are_told_apart_by_their_column_and_not_mixed(tmp_path: Path, ending: str) -> None:
    table = downloaded(PAIR).stack(level=1, future_stack=True).rename_axis(["Date", "Ticker"])
    (apple, _), (berkshire, report) = read_all(save(table, tmp_path / f"long.{ending}"))
    assert apple.candles[:, CLOSE].tolist() == [2, 3, 4]
    assert berkshire.candles[:, CLOSE].tolist() == [20, 40]
    assert (report.symbol, report.invalid) == ("BRK.B", 1)


def test_the_fault_of_one_of_several_symbols_names_it(tmp_path: Path) -> None:
    table = downloaded(PAIR)
    table.loc["2024-01-03", table.columns.get_level_values(1) == "BRK.B"] = np.nan
    with pytest.raises(CandleFileError, match=r"download\.csv \(BRK\.B\) holds 1 candles in 1 rows"):
        read_all(save(table, tmp_path / "download.csv"))


@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York"])
@pytest.mark.parametrize("place", ["index", "unnamed index", "column"])
def test_parquet_times_are_taken_from_index_or_column_with_their_zone(
    tmp_path: Path, zone: str | None, place: str
) -> None:
    table = downloaded(PAIR, zone=zone).xs("AAPL", axis=1, level=1)
    if place == "column":
        table = table.reset_index()
    if place == "unnamed index":
        table.index.name = None
    series, report = read(save(table, tmp_path / "A.parquet"))
    midnight = FIRST_MS + (5 * 3_600_000 if zone == "America/New_York" else 0)
    assert series.timestamps.tolist() == [midnight + day * DAY_MS for day in range(3)]
    assert series.candles[1].tolist() == [2, 4, 1.5, 3, 20, 2.625 * 20]
    assert (report.rows, report.kept) == (3, 3)


def stamps_of(kind: str) -> "pd.Series[Any]":
    days = pd.Series(pd.DatetimeIndex(["2024-01-01", "2024-01-02"]))
    kinds: dict[str, Any] = {
        "date": days.dt.date,
        "text": days.dt.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "ms": days.astype("datetime64[ms]").astype("int64"),
        "seconds": days.astype("datetime64[s]").astype("int64").astype(float),
        "us": days.astype("datetime64[us]"),
    }
    return kinds[kind]


@pytest.mark.parametrize("kind", ["date", "text", "ms", "seconds", "us"])
@pytest.mark.parametrize("numbers", ["float64", "float32", "Float64", "Int64", "string", "decimal"])
def test_parquet_columns_may_have_any_type_that_means_the_same(tmp_path: Path, kind: str, numbers: str) -> None:
    table = pd.DataFrame({"open": [1, 2], "high": [3, 4], "low": [1, 2], "close": [2, 3], "volume": [10, None]})
    typed = table.astype("Int64").astype(str) if numbers == "string" else table
    if numbers == "decimal":
        typed = table.map(lambda cell: None if pd.isna(cell) else Decimal(int(cell)), na_action=None)
    elif numbers != "string":
        typed = table.astype(numbers)
    typed.insert(0, "Timestamp", stamps_of(kind))
    extra = pd.DataFrame({**typed.iloc[:1], "Timestamp": stamps_of(kind).iloc[1:].to_numpy()})
    path = save(pd.concat([typed, extra], ignore_index=True), tmp_path / "A.parquet")
    series, report = read(path)
    assert series.timestamps.tolist() == [FIRST_MS, FIRST_MS + DAY_MS]
    assert series.candles.tolist() == [[1, 3, 1, 2, 10, 17.5]] * 2
    assert (report.invalid, report.rows) == (1, 3)  # a volume is missing


def test_row_numbers_of_a_parquet_file_are_never_taken_for_timestamps(tmp_path: Path) -> None:
    table = pd.DataFrame({"open": [1.0] * 3, "high": [1.0] * 3, "low": [1.0] * 3, "close": [1.0] * 3}, index=[7, 8, 9])
    with pytest.raises(CandleFileError, match=r"A\.parquet has no timestamp column; it has open"):
        read(save(table, tmp_path / "A.parquet"))


def test_a_parquet_file_is_read_as_the_csv_of_its_candles(tmp_path: Path, samples: list[Series]) -> None:
    apple = samples[0]
    columns = dict(zip(("Open", "High", "Low", "Close", "Volume"), apple.candles.T, strict=False))
    index = pd.to_datetime(apple.timestamps, unit="ms").rename("Date")
    save(pd.DataFrame(columns, index=index), tmp_path / "AAPL.parquet")
    assert digest(load(tmp_path)[0]) == digest([apple])


def test_a_broken_parquet_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "A.parquet").write_bytes(b"date,open")
    with pytest.raises(CandleFileError, match=r"A\.parquet is not a Parquet file"):
        read(tmp_path / "A.parquet")


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(downloaded(PAIR), tmp_path / "A.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        CandleFileError, match=r"A\.parquet: Parquet needs pyarrow: pip install 'candlecast\[parquet\]'"
    ):
        read_all(path)


# -- timestamps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1e-3, 1, 1e3, 1e6])
def test_seconds_to_nanoseconds_are_told_apart(tmp_path: Path, unit: float) -> None:
    rows = [f"{int((FIRST_MS + i * 60_000) * unit)},1,3,0.5,2,10" for i in range(5)]
    series, _ = read(write(tmp_path, HEADER, *rows))
    assert series.timestamps.tolist() == [FIRST_MS + i * 60_000 for i in range(5)]
    assert series.interval == "1m"


@pytest.mark.parametrize(
    "first",
    [
        "2024-01-01 05:00:00",
        "2024-01-01 00:00:00-05:00",
        "2024-01-01 05:00:00+00",
        "2024-01-01 05:00:00 UTC",
        "2024-01-01T05:00:00.000Z",
    ],
)
def test_zones_count_and_their_absence_means_utc(tmp_path: Path, first: str) -> None:
    series, _ = read(write(tmp_path, HEADER, f"{first},1,3,0.5,2,10", "2024-01-02T05:00:00,1,3,0.5,2,10"))
    assert series.timestamps.tolist() == [FIRST_MS + 5 * 3_600_000, FIRST_MS + 29 * 3_600_000]


@pytest.mark.parametrize("dates", [("1/4/1999", "1/14/1999"), ("4/1/1999", "14/1/1999")])
def test_slashed_dates_are_read_in_the_order_that_fits(tmp_path: Path, dates: tuple[str, str]) -> None:
    series, _ = read(write(tmp_path, HEADER, *(f"{date},1,3,0.5,2,10" for date in dates)))
    assert series.timestamps.astype("datetime64[ms]").astype("datetime64[D]").astype(str).tolist() == [
        "1999-01-04",
        "1999-01-14",
    ]


def test_slashed_dates_that_fit_both_orders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CandleFileError, match="month/day or day/month"):
        read(write(tmp_path, HEADER, "1/4/1999,1,3,0.5,2,10", "1/5/1999,1,3,0.5,2,10"))


def test_date_and_time_columns_are_read_together(tmp_path: Path) -> None:
    rows = [f"2024-01-01,0{hour}:00,1,3,0.5,2,10" for hour in range(4)]
    series, report = read(write(tmp_path, "date,time,open,high,low,close,volume", *rows))
    assert (series.interval, report.duplicates) == ("1h", 0)


def test_row_numbers_are_never_taken_for_timestamps(tmp_path: Path) -> None:
    rows = [f"{number},1,3,0.5,2,10" for number in range(1990, 2030)]
    with pytest.raises(CandleFileError, match="holds 0 candles in 40 rows"):
        read(write(tmp_path, ",open,high,low,close,volume", *rows))


@pytest.mark.parametrize(
    ("minutes", "interval"),
    [(1, "1m"), (15, "15m"), (60, "1h"), (240, "4h"), (1440, "1d"), (10080, "1w")],
)
def test_interval_is_the_median_step(tmp_path: Path, minutes: int, interval: str) -> None:
    places = [0, 1, 2, 3, 9, 10, 11]  # one gap
    rows = [f"{FIRST_MS + place * minutes * 60_000},1,3,0.5,2,10" for place in places]
    series, _ = read(write(tmp_path, HEADER, *rows))
    assert series.interval == interval
    assert len(series) == len(places)  # the gap stays


def test_a_step_that_is_no_interval_is_refused(tmp_path: Path) -> None:
    rows = [f"{FIRST_MS + i * 1500},1,3,0.5,2,10" for i in range(5)]
    with pytest.raises(CandleFileError, match="1500 ms"):
        read(write(tmp_path, HEADER, *rows))


# -- rows ------------------------------------------------------------------------------------------


def test_every_dropped_row_is_counted(tmp_path: Path) -> None:
    bad = [
        "2024-01-04,3,2,2.5,4,30",  # high below open
        "2024-01-05,0,2,0,1,30",
        "2024-01-06,1,2,,1,30",
        "2024-01-07,1,2,0.5,1,-1",
        "yesterday,1,2,0.5,1,1",
        ",1,2,0.5,1,1",
        "1971-01-01,1,2,0.5,1,1",
    ]
    series, report = read(write(tmp_path, HEADER, *bad, *ROWS, ROWS[0]))
    assert (report.rows, report.kept, report.invalid, report.unreadable, report.duplicates) == (11, 3, 4, 3, 1)
    assert len(series) == 3


def test_rows_are_sorted_and_of_duplicates_the_last_stays(tmp_path: Path) -> None:
    restated = "2024-01-01,1,3,0.5,2.5,11"
    series, report = read(write(tmp_path, HEADER, ROWS[2], ROWS[0], ROWS[1], restated))
    assert (np.diff(series.timestamps) > 0).all()
    assert series.candles[:, CLOSE].tolist() == [2.5, 3, 4]
    assert report.duplicates == 1


def test_a_single_candle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CandleFileError, match="holds 1 candles"):
        read(write(tmp_path, HEADER, ROWS[0]))


# -- folders ---------------------------------------------------------------------------------------


def test_folder_is_loaded_by_symbol(tmp_path: Path) -> None:
    write(tmp_path, HEADER, *ROWS, name="b.csv")
    write(tmp_path, HEADER, *ROWS, name="A.CSV")
    write(tmp_path, "no candles", name="notes.txt")
    series, reports = load(tmp_path)
    assert [item.symbol for item in series] == [report.symbol for report in reports] == ["A", "B"]


def test_two_files_of_one_symbol_are_refused(tmp_path: Path) -> None:
    write(tmp_path, HEADER, *ROWS, name="b.csv")
    write(tmp_path, HEADER, *ROWS, name="B.csv")
    with pytest.raises(CandleFileError, match="another file of the folder holds B too"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["with space.csv", "é.csv", "-A.csv", "A" * 33 + ".csv"])
def test_a_file_name_that_is_no_symbol_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CandleFileError, match="is not a symbol"):
        read(write(tmp_path, HEADER, *ROWS, name=name))


def test_a_folder_without_csv_files_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CandleFileError, match=r"holds no \.csv or \.parquet file"):
            load(folder)


def test_rows_longer_than_the_header_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CandleFileError, match="more cells than its header"):
        read(write(tmp_path, HEADER, *(f"{row}," for row in ROWS)))


def test_an_empty_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CandleFileError, match=r"BTC-USDT\.csv is not a CSV file"):
        read(write(tmp_path, ""))


def test_hourly_currency_candles_keep_their_weekend_gaps(eurusd: Series) -> None:
    assert (eurusd.symbol, eurusd.interval, len(eurusd)) == ("EURUSD", "1h", 5000)
    assert np.diff(eurusd.timestamps).max() > 40 * 3_600_000


# -- digest ----------------------------------------------------------------------------------------


def test_digest_changes_with_any_fact_and_not_with_the_order(samples: list[Series]) -> None:
    first, *rest = samples
    original = digest(samples)
    assert digest(reversed(samples)) == original
    candles = first.candles.copy()
    candles[100, CLOSE] = np.nextafter(candles[100, CLOSE], np.inf)
    for changed in (
        replace(first, candles=candles),
        replace(first, timestamps=first.timestamps + 1),
        replace(first, symbol="OTHER"),
        replace(first, interval="1h"),
    ):
        assert digest([changed, *rest]) != original

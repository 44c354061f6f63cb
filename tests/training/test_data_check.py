"""The check of a folder names what is wrong with each symbol, and goes on past files that hold none."""

import csv
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from models.candles import DAY_MS, PRICES, VOLUME
from training.candle_files import CandleFileError, Series, load
from training.data_check import check, write_summary

HEADER = "timestamp,open,high,low,close,volume"


def write(path: Path, item: Series, *more: str) -> None:
    rows = np.column_stack([item.timestamps, item.candles[:, :5]]).tolist()
    path.write_text("\n".join([HEADER, *(",".join(f"{value:.17g}" for value in row) for row in rows), *more, ""]))


@pytest.fixture
def item(make_series: Callable[..., Series]) -> Series:
    return make_series("A", 100 * np.exp(np.cumsum(np.random.default_rng(0).normal(0, 0.01, 300))))


def without(item: Series, *rows: int) -> Series:
    return Series(item.symbol, item.interval, np.delete(item.timestamps, rows), np.delete(item.candles, rows, axis=0))


def test_the_samples_have_no_warning_and_are_cut_as_evaluation_cuts_them(sample_folder: Path) -> None:
    options = {"val_from": date(2009, 1, 1), "test_from": date(2010, 6, 1), "unseen": ["IBM"], "horizon": 64}
    findings = check(sample_folder, **options)
    assert findings.unreadable == ()
    by_symbol = {found.symbol: found for found in findings.series}
    assert {symbol for symbol, found in by_symbol.items() if found.warnings} == {"FB"}
    assert by_symbol["FB"].warnings == ("nothing to train on",)  # it was listed in 2012
    ibm, apple = by_symbol["IBM"], by_symbol["AAPL"]
    assert (ibm.unseen, ibm.train_rows, ibm.val_rows) == (True, 0, 0)
    assert ibm.test_rows == apple.test_rows == 693
    assert apple.train_rows + 64 + apple.val_rows + 64 + apple.test_rows == apple.rows


def test_gaps_are_counted_by_the_calendar_of_the_candles(samples: list[Series], item: Series, tmp_path: Path) -> None:
    write(tmp_path / "AAPL.csv", without(samples[0], 500, 1000, 1001, 1002))
    write(tmp_path / "BTC.csv", without(item, 7))
    stock, coin = check(tmp_path).series
    day = str(samples[0].timestamps[1000].astype("datetime64[ms]").astype("datetime64[D]"))
    assert stock.warnings == (f"4 of 3270 candles of calendar XNYS are missing, 3 in a row from {day}",)
    assert coin.warnings == ("1 of 300 candles of calendar 24/7 are missing, 1 in a row from 2002-11-16",)


def test_a_weekend_of_currencies_is_no_gap_and_christmas_is(packaged_candles: Callable[[str], Path]) -> None:
    folder = packaged_candles("EURUSD.csv").parent
    (found,) = (found for found in check(folder).series if found.symbol == "EURUSD")
    assert found.warnings == ("46 of 4962 candles of calendar 24/5 are missing, 23 in a row from 2017-12-24T23:00Z",)


def test_candles_off_the_grid_are_told(item: Series, tmp_path: Path) -> None:
    write(tmp_path / "A.csv", Series("A", "1d", item.timestamps + np.eye(300, dtype=np.int64)[9] * 7, item.candles))
    assert "candle 9 opens at" in check(tmp_path, calendar="24/7").series[0].warnings[0]


def test_every_bad_row_is_counted_by_its_fault(item: Series, tmp_path: Path) -> None:
    last = int(item.timestamps[-1])
    bad = ["yesterday,1,1,1,1,1", f"{last},1,1,1,1,1", f"{last + DAY_MS},1,,1,1,1", f"{last + DAY_MS},0,1,1,1,1"]
    write(tmp_path / "A.csv", item, *bad)
    assert check(tmp_path).series[0].warnings[:3] == (
        "1 of 304 rows without a timestamp between 1980 and 2100: left out",
        "2 of 304 rows that are no candles: left out",
        "1 of 304 rows with a timestamp that comes again: left out",
    )


def test_suspected_splits_are_dated_and_the_rest_of_many_counted(item: Series, tmp_path: Path) -> None:
    for row in (50, 100, 150, 200, 250):
        item.candles[:row, PRICES] *= 2
        item.candles[:row, VOLUME] /= 2
    write(tmp_path / "A.csv", item)
    (*dated, rest) = check(tmp_path).series[0].warnings
    assert [text[:33] for text in dated] == [
        f"{np.datetime64(int(item.timestamps[row]), 'ms').astype('datetime64[D]')} looks like a 2:1 split"
        for row in (50, 100, 150)
    ]
    assert rest == "2 more suspected splits"


def test_unreadable_files_are_named_and_the_others_checked(item: Series, tmp_path: Path) -> None:
    write(tmp_path / "A.csv", item)
    write(tmp_path / "a.csv", item)
    (tmp_path / "B.csv").write_text("no candles\n")
    (tmp_path / "C.parquet").write_bytes(b"PAR1 it is not")
    findings = check(tmp_path)
    assert [found.symbol for found in findings.series] == ["A"]
    names = ("B.csv has no", "C.parquet is not a Parquet file", "another file of the folder holds A too")
    assert [name in text for name, text in zip(names, findings.unreadable, strict=True)] == [True] * 3


def test_a_folder_of_unreadable_files_alone_is_checked_too(tmp_path: Path) -> None:
    (tmp_path / "B.csv").write_text("no candles\n")
    findings = check(tmp_path)
    assert (findings.series, findings.split, len(findings.unreadable)) == ((), None, 1)
    with pytest.raises(CandleFileError, match=r"no \.csv"):
        check(tmp_path / "nowhere")


def test_the_summary_has_a_row_for_each_series_and_is_not_read_as_candles(item: Series, tmp_path: Path) -> None:
    write(tmp_path / "A.csv", without(item, 7))
    findings = check(tmp_path)
    write_summary(findings, tmp_path / "data_summary.csv")
    with (tmp_path / "data_summary.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["symbol"], row["rows"], row["unseen"]) == ("A", "299", "False")
    assert int(row["train_rows"]) + int(row["val_rows"]) + int(row["test_rows"]) <= 299
    assert "are missing" in row["warnings"]
    assert [found.symbol for found in load(tmp_path)[0]] == ["A"]


def test_one_date_alone_or_an_unknown_symbol_held_out_is_refused(item: Series, tmp_path: Path) -> None:
    write(tmp_path / "A.csv", item)
    with pytest.raises(ValueError, match="holds out B, of which there are no candles"):
        check(tmp_path, unseen=["A", "B"])
    with pytest.raises(ValueError, match="go together"):
        check(tmp_path, val_from=date(2009, 1, 1))

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.calendars import get_calendar, infer_calendar
from models.candles import CLOSE, SYMBOL, VOLUME, check_candles
from training.candle_files import Series
from training.sample_data import MissingSamples, _packaged, write_samples


def by_symbol(samples: list[Series], symbol: str) -> Series:
    return next(item for item in samples if item.symbol == symbol)


def day(series: Series, date: str) -> int:
    return int(np.searchsorted(series.timestamps, np.datetime64(date, "ms").astype(np.int64)))


def test_every_sample_is_daily_candles_on_new_york_sessions(samples: list[Series]) -> None:
    assert [item.symbol for item in samples] == ["AAPL", "FB", "GOOG", "GSPC", "IBM", "IXIC", "MSFT"]
    assert [len(item) for item in samples] == [3270, 196, 2148, 5031, 3270, 5031, 3270]
    for item in samples:
        assert SYMBOL.fullmatch(item.symbol)
        assert item.interval == "1d"
        check_candles(item.candles)
        assert infer_calendar(item.timestamps, "1d") == "XNYS"
        get_calendar("XNYS").check(item.timestamps, "1d")


def test_splits_leave_no_jump_and_a_genuine_crash_stays(samples: list[Series]) -> None:
    apple = by_symbol(samples, "AAPL")
    returns = np.diff(np.log(apple.candles[:, CLOSE]))
    split, crash = day(apple, "2005-02-28"), day(apple, "2000-09-29")
    assert abs(returns[split - 1]) < 0.02  # two for one
    assert returns[crash - 1] == pytest.approx(-0.7312, abs=1e-3)
    assert np.abs(np.delete(returns, crash - 1)).max() < 0.25


def test_adjustment_scales_volume_the_other_way(samples: list[Series]) -> None:
    apple = by_symbol(samples, "AAPL")
    before, factor = day(apple, "2000-03-01"), 4.186662803811 / 130.31
    assert apple.candles[before, CLOSE] == pytest.approx(4.186662803811)
    assert apple.candles[before, VOLUME] == pytest.approx(9_616_100 / factor, abs=1)


def test_samples_are_the_same_bytes_every_time(sample_folder: Path, tmp_path: Path) -> None:
    again = write_samples(tmp_path / "again")
    assert len(again) == 7
    for path in again:
        assert path.read_bytes() == (sample_folder / path.name).read_bytes()


def test_a_missing_package_is_named_with_what_to_install() -> None:
    with pytest.raises(MissingSamples, match=r"no_such_package.*pip install 'candlecast\[samples\]'"):
        _packaged("no_such_package", "data.csv.gz")


def test_writing_samples_imports_none_of_the_packages(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from training.sample_data import write_samples;"
        "write_samples(Path(sys.argv[1]));"
        "print(sorted({'arch', 'bokeh_sampledata', 'pandas', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

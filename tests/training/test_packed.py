"""Packed candles are the parsed ones, bit for bit, stay current, and stay out of memory."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training import candle_files
from training.candle_files import CandleFileError, Series, digest
from training.packed import Packed, pack, pack_folder
from training.windows import WindowSampler, split_by_fractions

ROOT = Path(__file__).parents[2]
LINES = "date,open,high,low,close,volume\n2024-01-01,1,3,0.5,2,10\n2024-01-02,2,4,1.5,3,20\n"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths that were parsed."""
    parsed: list[Path] = []
    read_all = candle_files.read_all
    monkeypatch.setattr(
        candle_files, "read_all", lambda path, **options: parsed.append(path) or read_all(path, **options)
    )
    return parsed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "candles"
    place.mkdir()
    for name in ("A", "B"):
        (place / f"{name}.csv").write_text(LINES)
    return place


def test_packed_series_and_their_windows_are_the_parsed_ones_bit_for_bit(
    sample_folder: Path, samples: list[Series], tmp_path: Path
) -> None:
    packed = pack_folder(sample_folder, tmp_path)
    assert [item.symbol for item in packed] == [item.symbol for item in samples]
    assert digest(packed) == digest(samples)
    split = split_by_fractions(samples, 0.7, 0.1, horizon=30)
    ours, theirs = (WindowSampler(s, split, 94).draw(16, np.random.default_rng(1)) for s in (packed, samples))
    for name in ("candles", "timestamps", "local_times", "series"):
        assert (getattr(ours, name) == getattr(theirs, name)).all()


def test_a_folder_is_parsed_once(folder: Path, tmp_path: Path, counted: list[Path]) -> None:
    assert len(pack_folder(folder, tmp_path)) == 2
    assert len(counted) == 2
    assert len(pack_folder(folder, tmp_path)) == 2
    assert len(counted) == 2


@pytest.mark.parametrize("change", ["a new file", "a file gone", "other bytes of the same length and time", "a copy"])
def test_a_change_of_the_files_is_noticed(folder: Path, tmp_path: Path, change: str) -> None:
    kept = pack_folder(folder, tmp_path)
    path = folder / "B.csv"
    if change == "a new file":
        (folder / "C.csv").write_text(LINES)
    elif change == "a file gone":
        path.unlink()
    elif change == "a copy":
        path.write_text(LINES.replace("3,20", "3.5,21"))
    else:
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        path.write_text(LINES.replace("3,20", "3,21"))
        os.utime(path, ns=times)
    now = pack_folder(folder, tmp_path)
    assert digest(now) == digest(candle_files.load(folder)[0]) != digest(kept)
    assert len(list(tmp_path.glob("*.candles"))) == 1  # the stale one is gone,
    assert kept[1].candles[1].tolist() == [2, 4, 1.5, 3, 20, 52.5]  # and whoever holds it still reads it


def test_adjusted_candles_and_undone_splits_are_packed_apart(folder: Path, tmp_path: Path) -> None:
    for options in ({}, {"adjust": True}, {"undo_splits": True}, {}):
        pack_folder(folder, tmp_path, **options)
    assert len(list(tmp_path.glob("*.candles"))) == 3


def test_a_broken_file_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    (folder / "C.csv").write_text("no candles\n")
    with pytest.raises(CandleFileError, match=r"C\.csv"):
        pack_folder(folder, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_series_of_one_interval_are_chosen_without_reading_the_rest(samples: list[Series], eurusd: Series) -> None:
    packed = pack([eurusd, *samples])
    assert [item.symbol for item in packed.of_interval("1h")] == ["EURUSD"]
    assert [item.symbol for item in packed.of_interval("1d")] == [item.symbol for item in packed[1:]]
    with pytest.raises(IndexError):
        packed.of_interval("1m")[0]


def test_nobody_writes_into_packed_candles(folder: Path) -> None:
    packed: Packed = pack_folder(folder)
    with pytest.raises(ValueError, match="read-only"):
        packed[0].candles[0, 0] = 1.0


DRAW = """
import sys
from pathlib import Path
import numpy as np
from models.calendars import get_calendar
from models.candles import DAY_MS, with_amount
from training.candle_files import Series
from training.packed import pack
from training.windows import WindowSampler, Split

symbols, rows, batches, calendar = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
start = np.array([10_959 * DAY_MS])
times = get_calendar(calendar).following(start, "1d", rows)
rng = np.random.default_rng(0)

def walk(number):
    closes = 100 * np.exp(np.cumsum(rng.normal(0, 0.02, rows)))
    prices = np.column_stack([closes, closes * 1.01, closes * 0.99, closes, np.full(rows, 1e6)])
    return Series(f"S{number}", "1d", times, with_amount(prices))

def peak():  # what getrusage says includes what the parent had
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

packed = pack(map(walk, range(symbols)), Path(sys.argv[5]))
before = peak()
split = Split(int(times[-rows // 5]), int(times[-rows // 10]), 64)
samplers = [WindowSampler(packed, split, 576 * bars, calendar=calendar) for bars in (1, 2, 3)]
for number in range(batches):
    drawn = samplers[number % 3].draw(32, rng)
    assert drawn.candles.shape == (32, 576 * (number % 3 + 1), 6)
    assert number % 3 or drawn.local_times.shape == drawn.timestamps.shape
print(before, peak())
"""


def peaks(place: Path, *words: Any, first: str = "") -> tuple[int, int]:
    """Peak resident bytes of a process before and after it draws windows, all that it has mapped included."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"{first}{DRAW}", *map(str, words), str(place)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    return before, after


def test_drawing_windows_keeps_the_series_out_of_memory(tmp_path: Path) -> None:
    symbols, rows = 800, 5000
    before, after = peaks(tmp_path, symbols, rows, 100, "24/7")
    assert after - before < symbols * rows * 56 / 2


@pytest.mark.long
def test_ten_thousand_symbols_of_five_thousand_rows_are_drawn_from_in_less_than_two_gigabytes(tmp_path: Path) -> None:
    _, after = peaks(tmp_path, 10_000, 5_000, 1000, "XNYS", first="import training.train")
    assert after < 2e9

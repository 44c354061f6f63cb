"""What a folder's candles are worth before anything is trained on them: parts, gaps, bad rows, suspected splits."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich import box
from rich.table import Table

from models.candles import CLOSE, DAY_MS, InvalidCandles, interval_ms
from training.candle_files import CandleFileError, FileReport, Series, candle_paths, read_all
from training.splits import suspected_splits
from training.windows import Split, day, series_calendar, split_from_recipe

_FRACTIONS: Final = (0.7, 0.15)  # train and val, where no dates are given
_TOLD: Final = 3  # suspected splits by date; the rest are counted


@dataclass(frozen=True)
class Checked:
    """One series, how many of its candles the targets of each part may cover, and what to look at."""

    symbol: str
    interval: str
    first: str
    last: str
    rows: int
    train_rows: int
    val_rows: int
    test_rows: int
    unseen: bool
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """Every series of a folder, and the files that hold none."""

    split: Split | None
    series: tuple[Checked, ...]
    unreadable: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For a machine."""
        cuts = self.split and {"val_from": _time(self.split.val_from), "test_from": _time(self.split.test_from)}
        return {"split": cuts, "series": [asdict(item) for item in self.series], "unreadable": self.unreadable}


def check(
    folder: Path,
    *,
    val_from: date | None = None,
    test_from: date | None = None,
    unseen: Sequence[str] = (),
    horizon: int = 64,
    calendar: str = "auto",
) -> Findings:
    """Read every candle file of `folder`, one at a time, and go on past those that hold no candles.

    Without dates the first 70 % of all candles are for training and the next 15 % for validation. CandleFileError
    if there is no file.
    """
    series: dict[str, Series] = {}
    warnings, unreadable = [], []
    for path in candle_paths(folder):
        try:
            found = read_all(path)
            if twice := series.keys() & {item.symbol for item, _ in found}:
                raise CandleFileError(f"{path}: another file of the folder holds {', '.join(sorted(twice))} too")
        except (CandleFileError, OSError) as error:
            unreadable.append(str(error))
            continue
        for item, report in found:
            warnings.append((*_of_rows(report), *_of_times(item, calendar), *_of_prices(item)))
            series[item.symbol] = replace(item, candles=np.empty((0, 6)))  # their memory is not needed any more
    split = _split(list(series.values()), val_from, test_from, horizon, unseen) if series else None
    checked = (_checked(item, split, found) for item, found in zip(series.values(), warnings, strict=True) if split)
    return Findings(split, tuple(checked), tuple(unreadable))


def _split(
    series: Sequence[Series], val_from: date | None, test_from: date | None, horizon: int, unseen: Sequence[str]
) -> Split:
    if (val_from is None) != (test_from is None):
        raise ValueError("--val-from and --test-from go together")
    cuts = {"val_from": val_from, "test_from": test_from} if val_from else {"fractions": _FRACTIONS}
    return split_from_recipe({**cuts, "unseen": unseen}, series, horizon)


def _checked(item: Series, split: Split, warnings: tuple[str, ...]) -> Checked:
    unseen = item.symbol in split.unseen
    train, val, test = (len(split.targets(item, part)) for part in ("train", "val", "unseen" if unseen else "test"))
    return Checked(
        symbol=item.symbol,
        interval=item.interval,
        first=_time(item.timestamps[0], item.interval),
        last=_time(item.timestamps[-1], item.interval),
        rows=len(item),
        train_rows=train,
        val_rows=val,
        test_rows=test,
        unseen=unseen,
        warnings=warnings if train or unseen else (*warnings, "nothing to train on"),
    )


# -- warnings --------------------------------------------------------------------------------------


def _of_rows(report: FileReport) -> Iterator[str]:
    counts = {
        "without a timestamp between 1980 and 2100": report.unreadable,
        "that are no candles": report.invalid,
        "with a timestamp that comes again": report.duplicates,
    }
    yield from (f"{count} of {report.rows} rows {fault}: left out" for fault, count in counts.items() if count)
    if report.without_volume:
        yield "no volume"


def _of_times(item: Series, name: str) -> Iterator[str]:
    try:
        calendar = series_calendar(item, name)
    except InvalidCandles as error:
        yield str(error)
        return
    slots = calendar.slots(item.timestamps, item.interval)
    absent = ~np.isin(slots, item.timestamps, assume_unique=True)
    if absent.any():
        length, first = _longest_run(absent)
        yield (
            f"{absent.sum()} of {len(slots)} candles of calendar {calendar.name} are missing,"
            f" {length} in a row from {_time(slots[first], item.interval)}"
        )


def _longest_run(mask: np.ndarray) -> tuple[int, int]:
    """Length and place of the longest stretch of true."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    longest = int(lengths.argmax())
    return int(lengths[longest]), int(starts[longest])


def _of_prices(item: Series) -> Iterator[str]:
    found = suspected_splits(item.candles)
    for row, _, name in found[:_TOLD]:
        before, after = item.candles[row - 1 : row + 1, CLOSE]
        when = _time(item.timestamps[row], item.interval)
        yield f"{when} looks like a {name} split: close {before:.6g}, then {after:.6g}"
    if len(found) > _TOLD:
        yield f"{len(found) - _TOLD} more suspected splits"


def _time(millis: int | np.int64, interval: str = "1m") -> str:
    if interval_ms(interval) >= DAY_MS:
        return day(int(millis))
    return f"{np.datetime64(int(millis), 'ms').astype('datetime64[m]')}Z"


# -- output ----------------------------------------------------------------------------------------


def write_summary(findings: Findings, path: Path) -> None:
    """One row for each series."""
    rows = [asdict(item) | {"warnings": "; ".join(item.warnings)} for item in findings.series]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, Checked.__dataclass_fields__)
        writer.writeheader()
        writer.writerows(rows)


def findings_table(findings: Findings) -> Table:
    """For people. It fits 100 columns."""
    title = "no candles"
    if split := findings.split:
        title = f"val from {_time(split.val_from)}, test from {_time(split.test_from)}, {split.horizon} candles apart"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("symbol", max_width=20, overflow="fold")
    table.add_column("interval")
    table.add_column("first\nlast", no_wrap=True)
    for name in ("rows", "train", "val", "test"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("warnings", overflow="fold")
    for item in findings.series:
        parts = (item.rows, item.train_rows, item.val_rows, item.test_rows)
        symbol = f"{item.symbol} (unseen)" if item.unseen else item.symbol
        told = "\n".join(item.warnings)
        table.add_row(symbol, item.interval, f"{item.first}\n{item.last}", *map(str, parts), told)
    return table

"""The report as a reader of a terminal sees it."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.rows import Curve, Report, Row


def print_report(report: Report, console: Console | None = None) -> None:
    """The table of rows, the curves and what failed."""
    console = console or Console(width=180)
    if report.rows:
        console.print(_table(report))
    for curve in report.curves:
        console.print(_curve(curve))
    for failure in report.failures:
        console.print(f"FAILED {failure.name}: {failure.error}", markup=False)


def _table(report: Report) -> Table:
    table = Table("work", "reached", "to reach", "against", "verdict", "by", "measured")
    for row in report.rows:
        by = " ".join(str(row.detail[key]) for key in ("runtime", "dtype") if key in row.detail)
        reached, reach = row.shown()
        cells = (row.work, reached + _interval(row), reach, row.against, row.verdict, by, _sides(row))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _interval(row: Row) -> str:
    if "interval" not in row.detail:
        return ""
    low, high = row.detail["interval"]
    return f" [{low:.3g}, {high:.3g}]"


def _sides(row: Row) -> str:
    """What the two sides took, or did in a second."""
    times, rates = row.detail.get("milliseconds", {}), row.detail.get("per_second", {})
    return ", ".join(
        [f"{side} {value:.4g} ms" for side, value in times.items()]
        + [f"{side} {value:.4g}/s" for side, value in rates.items()]
    )


def _curve(curve: Curve) -> Table:
    table = Table(f"ms per forecast, {curve.title}: {curve.axis}", *map(str, curve.values))
    for label, values in curve.milliseconds.items():
        table.add_row(label, *(f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in values))
    return table

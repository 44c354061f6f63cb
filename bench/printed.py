"""The report as a reader of a terminal sees it."""

from rich.console import Console
from rich.table import Table

from bench.rows import Curve, Report


def print_report(report: Report, console: Console | None = None) -> None:
    """The table of rows, the curves and what failed."""
    console = console or Console(width=150)
    if report.rows:
        console.print(_table(report))
    for curve in report.curves:
        console.print(_curve(curve))
    for failure in report.failures:
        console.print(f"FAILED {failure.name}: {failure.error}", markup=False)


def _table(report: Report) -> Table:
    table = Table("work", "reached", "to reach", "against", "verdict", "by")
    for row in report.rows:
        by = " ".join(str(row.detail[key]) for key in ("runtime", "dtype") if key in row.detail)
        interval = ""
        if "interval" in row.detail and row.unit == "×":
            low, high = row.detail["interval"]
            interval = f" [{low:.3g}, {high:.3g}]"
        reached, reach = row.shown()
        table.add_row(row.work, reached + interval.replace("[", "\\["), reach, row.against, row.verdict, by)
    return table


def _curve(curve: Curve) -> Table:
    table = Table(f"ms per forecast, {curve.title}: {curve.axis}", *map(str, curve.values))
    for label, values in curve.milliseconds.items():
        table.add_row(label, *(f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in values))
    return table

"""What came of a replay, as a table."""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from rich import box
from rich.table import Table

from service.api.schemas import ScoresAnswer, StandingAnswer
from service.replay import AUTO, Replayed, Worst

_NAMES = ("symbol", "model", "steps")
_NUMBERS = ("skill vs naive", "CRPS", "coverage\nof 80 %", "lowest over\n250 candles", "drift")


def replay_table(replayed: Replayed) -> Table:
    """Every model over all symbols, then every series. It fits 100 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    for name in _NAMES:
        table.add_column(name, overflow="fold")
    for name in _NUMBERS:
        table.add_column(name, justify="right", no_wrap=True)
    for model in replayed.models:
        table.add_row(*_cells("all", model, None))
    lowest = {(each.symbol, each.interval, each.model, each.steps): each for each in replayed.worst}
    for name, series in replayed.series.items():
        symbol, _, interval = name.rpartition(":")
        table.add_section()
        for standing in series.standings:
            exact = f"{standing.model}@{standing.version}"
            table.add_row(*_cells(symbol, standing, lowest.get((symbol, interval, exact, standing.steps))))
    table.caption = "\n".join(_caption(replayed))
    return table


def _cells(symbol: str, standing: StandingAnswer, worst: Worst | None) -> Iterator[str]:
    scores = standing.all
    exact = f"{standing.model}@{standing.version}"
    yield from (symbol, standing.model, standing.steps)
    yield _skill(scores)
    yield f"{2 * sum(scores.pinball.values()) / len(scores.pinball):.5f}"
    yield _pair(scores.coverage_80, scores.coverage_80_calibrated)
    yield _pair(worst.coverage_80, worst.coverage_80_calibrated) if worst else ""
    yield "" if exact == AUTO else standing.drift.state


def _skill(scores: ScoresAnswer) -> str:
    if scores.skill_vs_naive is None:
        return ""
    interval = scores.skill_interval
    return f"{scores.skill_vs_naive:+.3f}" + (f"\n[{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else "")


def _pair(raw: float, calibrated: float) -> str:
    return f"{raw:.3f} > {calibrated:.3f}"


def _caption(replayed: Replayed) -> Iterable[str]:
    yield f"{replayed.candles} candles, {replayed.forecasts} forecasts; a > b: as the model says > recalibrated."
    yield "Errors and CRPS are log-returns; brackets are 95 % intervals."
    if not replayed.alarms:
        yield "No drift alarm was raised."
    for alarm in replayed.alarms:
        day, where = datetime.fromtimestamp(alarm.at / 1000, UTC), "all" if alarm.symbol == "*" else alarm.symbol
        yield f"{day:%Y-%m-%d} drift alarm: {where} {alarm.model} {alarm.steps}"

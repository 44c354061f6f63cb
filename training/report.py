"""Evaluations as a table for people and as JSON for machines."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from rich import box
from rich.table import Table

from model_store.manifest import Evaluation, Metric

Entry = tuple[str, Evaluation]  # the model's name, one evaluation of it

_COLUMNS: Final[Mapping[str, tuple[str, str]]] = {
    "skill_vs_naive": ("skill\nvs naive", "+.3f"),
    "crps_ratio_walk": ("CRPS\n/ walk's", ".3f"),
    "coverage_80": ("coverage\nof 80 %", ".3f"),
    "mae_log_return": ("MAE\nlog-ret.", ".4f"),
    "crps": ("CRPS\nlog-ret.", ".4f"),
    "mae_price": ("MAE\nprice", ".4g"),
}
_WITH_INTERVAL: Final = ("skill_vs_naive", "crps_ratio_walk")


def table(entries: Sequence[Entry]) -> Table:
    """Model rows of each set of windows, then what the naive forecast and the random walk score there.

    Under skill and CRPS ratio stands the 95 % interval. It fits 100 columns.
    """
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    result.add_column("model", max_width=34, overflow="fold")
    for heading, _ in _COLUMNS.values():
        result.add_column(heading, justify="right", no_wrap=True)
    ordered = sorted(entries, key=lambda entry: _windows(entry[1]))
    groups = {title: list(group) for title, group in groupby(ordered, key=lambda entry: _windows(entry[1]))}
    for group in groups.values():
        _add_windows(result, group)
    result.caption = "\n".join(groups)
    return result


def as_json(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The same evaluations, one object for each."""
    return [{"model": name, **evaluation.model_dump(mode="json")} for name, evaluation in entries]


def _windows(evaluation: Evaluation) -> str:
    return (
        f"{evaluation.windows}: {evaluation.origins} origins of {', '.join(evaluation.symbols)},"
        f" {evaluation.horizon} steps of {evaluation.interval}, {evaluation.start[:10]} to {evaluation.end[:10]}"
    )


def _add_windows(result: Table, entries: Sequence[Entry]) -> None:
    result.add_row(entries[0][1].windows, style="bold")
    for name, evaluation in entries:
        result.add_row(name, *(_cell(evaluation.metrics[key], key) for key in _COLUMNS))
    result.add_row("naive", *_reference_cells(entries[0][1], "naive"), style="dim")
    for estimator, evaluation in {evaluation.crps_estimator: evaluation for _, evaluation in entries}.items():
        kinds = len({evaluation.crps_estimator for _, evaluation in entries})
        name = "random walk" if kinds == 1 else f"random walk ({estimator})"
        result.add_row(name, *_reference_cells(evaluation, "walk"), style="dim")
    result.add_section()


def _cell(metric: Metric, key: str) -> str:
    form = _COLUMNS[key][1]
    if key not in _WITH_INTERVAL or metric.low is None or metric.high is None:
        return f"{metric.value:{form}}"
    return f"{metric.value:{form}}\n{metric.low:{form}}…{metric.high:{form}}"


def _reference_cells(evaluation: Evaluation, column: str) -> list[str]:
    values = ((getattr(evaluation.metrics[key], column), form) for key, (_, form) in _COLUMNS.items())
    return ["" if value is None else f"{value:{form}}" for value, form in values]

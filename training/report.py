"""Evaluations as a table for people, as JSON for machines, and as a folder with a page for both."""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich import box
from rich.table import Table

from model_store.manifest import Evaluation, Metric
from models.candles import Floats
from training.baselines import BASELINES
from training.judged import Judged, windows
from training.metrics import Curve
from training.page import page
from training.scores import LEVELS

Entry = tuple[str, Evaluation]  # the name of a model or baseline, one evaluation of it

METRICS_FORMAT: Final = 1
_COLUMNS: Final[Mapping[str, tuple[str, str]]] = {
    "skill_vs_naive": ("skill\nvs naive", "+.3f"),
    "crps_ratio_walk": ("CRPS\n/ walk's", ".3f"),
    "coverage_80": ("coverage\nof 80 %", ".3f"),
    "mae_log_return": ("MAE\nlog-ret.", ".4f"),
    "mase": ("MASE", ".2f"),
    "win_rate": ("windows\nwon", ".0%"),
}
_WITH_INTERVAL: Final = ("skill_vs_naive", "crps_ratio_walk")
_REFERENCES: Final = {"naive": "naive", "ewma": "walk"}  # the baseline, and the column of it that every metric has


def table(entries: Sequence[Entry]) -> Table:
    """Rows of each set of windows: models, then baselines, the naive forecast and the EWMA walk always among them.

    Under a name stands whether it differs from naive, and from what it was tuned from, beyond chance; that follows,
    where there is such. Under skill and CRPS ratio stands the 95 % interval.
    It fits 100 columns.
    """
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    result.add_column("model", max_width=34, overflow="fold")
    for heading, _ in _COLUMNS.values():
        result.add_column(heading, justify="right", no_wrap=True)
    ordered = sorted(entries, key=lambda entry: windows(entry[1]))
    groups = {title: list(group) for title, group in groupby(ordered, key=lambda entry: windows(entry[1]))}
    for group in groups.values():
        _add_windows(result, group)
    result.caption = "\n".join(groups)
    return result


def as_json(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The same evaluations, one object for each."""
    return [{"model": name, **evaluation.model_dump(mode="json")} for name, evaluation in entries]


def write_report(judged: Sequence[Judged], folder: Path) -> None:
    """Write `metrics.json` and `report.html` of everything that was judged into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": METRICS_FORMAT, "evaluations": [_in_full(each) for each in judged]}
    (folder / "metrics.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(judged), encoding="utf-8")


def _in_full(judged: Judged) -> dict[str, Any]:
    """What `metrics.json` says of one model or baseline on one set of windows; null is not known.

    `model` and the fields of an Evaluation; `by_step`: metric -> value, low, high of every step; `by_symbol`: symbol
    -> metrics and versus_naive; `reliability`: of each level the share of closes below its quantile; `pit`: shares of
    closes between neighbouring levels.
    """
    [entry] = as_json([(judged.name, judged.evaluation)])
    below = judged.scores.below()
    return entry | {
        "by_step": {name: _curve(curve) for name, curve in judged.by_step.items()},
        "by_symbol": {
            symbol: {
                "metrics": {name: metric.model_dump() for name, metric in metrics.items()},
                "versus_naive": compared and compared.model_dump(),
            }
            for symbol, (metrics, compared) in judged.by_symbol.items()
        },
        "reliability": {"levels": LEVELS, "below": below.tolist()},
        "pit": np.diff(below, prepend=0, append=1).tolist(),
    }


def _curve(curve: Curve) -> dict[str, list[float | None]]:
    return {"value": _known(curve.value), "low": _known(curve.low), "high": _known(curve.high)}


def _known(values: Floats) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in values.tolist()]


def _add_windows(result: Table, entries: Sequence[Entry]) -> None:
    result.add_row(entries[0][1].windows, style="bold")
    for name, evaluation in entries:
        comparisons = () if name in _REFERENCES else (evaluation.versus_naive, evaluation.versus_base)
        told = "\n  ".join([name, *(each.sentence for each in comparisons if each)])
        cells = [_cell(evaluation.metrics.get(key), key) for key in _COLUMNS]
        result.add_row(told, *cells, style="dim" if name in BASELINES else "")
        if any(metric.base is not None for metric in evaluation.metrics.values()):
            result.add_row("its base", *_reference_cells(evaluation, "base"), style="dim")
    for name, column in _REFERENCES.items():
        if name not in dict(entries):
            result.add_row(name, *_reference_cells(entries[0][1], column), style="dim")
    result.add_section()


def _cell(metric: Metric | None, key: str) -> str:
    form = _COLUMNS[key][1]
    if metric is None:
        return ""
    if key not in _WITH_INTERVAL or metric.low is None or metric.high is None:
        return f"{metric.value:{form}}"
    return f"{metric.value:{form}}\n{metric.low:{form}}…{metric.high:{form}}"


def _reference_cells(evaluation: Evaluation, column: str) -> list[str]:
    found = {key: evaluation.metrics.get(key) for key in _COLUMNS}
    values = {key: metric and getattr(metric, column) for key, metric in found.items()}
    return ["" if value is None else f"{value:{_COLUMNS[key][1]}}" for key, value in values.items()]

"""The picture of a search: what it tried, what each setting was worth, and the test that decided."""

import math
from collections.abc import Mapping
from html import escape

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from training.outcomes import Outcomes
from training.page import document, grid
from training.recipe import Knob, Value
from training.search import Decision, Found, told
from training.svg import Plot, span
from training.windows import day

_WHOLE, _ENDED, _BEST = "var(--c0)", "var(--muted)", "var(--c1)"


def search_page(sentence: str, found: Found, space: Mapping[str, Knob], facts: Mapping[str, Outcomes]) -> str:
    """One HTML page without network or script."""
    title = f"Settings searched: {sentence.partition(':')[0]}"
    charts = [_history(found), *(_worth(found, name, knob) for name, knob in space.items())]
    if found.decision:
        charts.insert(1, _interval(found.decision))
    return document(
        title,
        [
            f"<h1>{escape(title)}</h1><p>{escape(sentence)}.</p>",
            f"<p>{escape(_windows(facts))}</p>",
            "<h2>The search</h2><p>Gain: 1 − loss / the current settings' loss, on the windows of the search, where the"
            " best of many looks better than it is. Grey trials ended early, at the gain they had then.</p>",
            grid(charts, 2),
            f"<h2>The trials</h2><div class='card'>{_table(found)}</div>",
        ],
    )


def _windows(facts: Mapping[str, Outcomes]) -> str:
    told = {
        name: f"{len(each.symbols)} windows of {', '.join(np.unique(each.symbols))}, {each.horizon} steps of"
        f" {each.interval}, targets from {day(int(each.target_times.min()))} to {day(int(each.target_times.max()))}"
        for name, each in facts.items()
    }
    return f"Searched on {told['search']}. Decided, once and for the best trial alone, on {told['decision']}."


def _colour(found: Found, trial: FrozenTrial) -> str:
    if found.best and trial.number == found.best.number:
        return _BEST
    return _WHOLE if trial.state == TrialState.COMPLETE else _ENDED


def _history(found: Found) -> Plot:
    gains = [100 * found.gain(trial) for trial in found.trials]
    places = np.arange(1, len(gains) + 1)
    whole = [trial.state == TrialState.COMPLETE for trial in found.trials]
    best = np.maximum.accumulate(np.where(whole, gains, -np.inf))
    limits = span([[0.0], np.clip(gains, -20, None)])  # a trial that failed badly must not flatten the others
    plot = Plot("Trials in order", (0.5, len(gains) + 0.5), limits, x_label="trial", y_label="gain in %")
    plot.rule("current settings", y=0)
    plot.line(places, np.where(np.isfinite(best), best, np.nan), _BEST, "best so far", width=1.3)
    for place, (trial, gain) in enumerate(zip(found.trials, gains, strict=True), 1):
        if math.isfinite(gain):
            plot.dot(place, gain, _colour(found, trial), f"trial {place}: {gain:+.2f} %")
    return plot


def _interval(decision: Decision) -> Plot:
    low, gain, high = (100 * value for value in (decision.low, decision.gain, decision.high))
    plot = Plot(
        f"The best trial on {decision.windows} unseen windows",
        span([np.array([low, high, 0.0])]),
        (1, -1),
        x_label=f"gain in %, {decision.confidence:.4g} interval, p = {decision.p_value:.3f}",
        y_names=["best"],
    )
    plot.rule("current", x=0)
    plot.line((low, high), (0, 0), _BEST, f"{low:+.2f} % to {high:+.2f} %", width=5)
    plot.dot(gain, 0, "var(--ink)", f"{gain:+.2f} %")
    return plot


def _worth(found: Found, name: str, knob: Knob) -> Plot:
    """Gain by value of one setting: a choice by its place, a logarithmic range by powers of ten."""
    tried = [trial for trial in found.trials if name in trial.params and trial.intermediate_values]
    gains = [100 * found.gain(trial) for trial in tried]
    at = [_place(knob, trial.params[name]) for trial in tried]
    choices = ", ".join(f"{place}: {value}" for place, value in enumerate(knob.choices))
    label = choices or (f"log10 of {name}" if knob.log else name)
    ends = [_place(knob, value) for value in knob.ends]
    plot = Plot(
        name.rpartition(".")[2].replace("_", " "),
        span([ends]),
        span([[0.0], np.clip(gains, -20, None)]),
        x_label=label,
        y_label="gain in %",
        x_ticks=range(len(knob.choices)) if knob.choices else None,
    )
    plot.rule("current settings", y=0)
    for trial, x, gain in zip(tried, at, gains, strict=True):
        plot.dot(x, gain, _colour(found, trial), f"{trial.params[name]}: {gain:+.2f} %")
    return plot


def _place(knob: Knob, value: Value) -> float:
    if knob.choices:
        return float(knob.choices.index(value))
    return math.log10(float(value)) if knob.log else float(value)


def _table(found: Found) -> str:
    names = list(dict.fromkeys(name for trial in found.trials for name in trial.params))
    head = "".join(f"<th>{escape(name.rpartition('.')[2])}</th>" for name in names)
    rows = []
    for place, trial in enumerate(found.trials, 1):
        cells = "".join(f"<td>{escape(told(trial.params[name]))}</td>" for name in names)
        ended = "" if trial.state == TrialState.COMPLETE else " ended early"
        kind = " class='good'" if found.best and trial.number == found.best.number else ""
        rows.append(f"<tr><td>{place}{ended}</td>{cells}<td{kind}>{found.gain(trial):+.2%}</td></tr>")
    return f"<table><thead><tr><th>trial</th>{head}<th>gain</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"

"""The report as one HTML page without network or script: the table, then the pictures that explain it."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Final

import numpy as np

from model_store.manifest import Evaluation, Metric
from models.candles import CLOSE, Floats
from models.scoring import EQUAL
from training.judged import Judged, windows
from training.scores import BANDS, LEVELS
from training.svg import Plot, span
from training.windows import day

_TEMPLATE: Final = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
_PAST: Final = 60  # candles before the origin in a fan chart
_ROWS: Final = 40  # symbols in a chart, at most: beyond them the best and the worst
_COLUMNS: Final[Mapping[str, tuple[str, str]]] = {
    "skill_vs_naive": ("skill<br>vs naive", "+.3f"),
    "crps_ratio_walk": ("CRPS /<br>walk's", ".3f"),
    "coverage_50": ("in 50 %<br>band", ".1%"),
    "coverage_80": ("in 80 %<br>band", ".1%"),
    "coverage_95": ("in 95 %<br>band", ".1%"),
    "mae_log_return": ("MAE<br>log-ret.", ".4f"),
    "rmse_log_return": ("RMSE<br>log-ret.", ".4f"),
    "mae_pct_of_price": ("MAE<br>% of price", ".2f"),
    "mase": ("MASE", ".2f"),
    "pinball": ("pinball<br>log-ret.", ".4f"),
    "bias": ("bias<br>log-ret.", "+.4f"),
    "rank_ic": ("RankIC", "+.3f"),
    "win_rate": ("windows<br>won", ".0%"),
}
_WITH_INTERVAL: Final = ("skill_vs_naive", "crps_ratio_walk", "coverage_80")  # elsewhere it is the cell's tooltip
_WORDS: Final[Mapping[str, str]] = {
    "skill vs naive": "1 − MAE / MAE of the last close held for ever, same windows and steps. Above 0 is better.",
    "CRPS / walk's": "Error of the whole distribution over that of a driftless Gaussian random walk (EWMA 0.94)."
    " Below 1 is better.",
    "in n % band": "Share of closes inside the band; it should be n %.",
    "MASE": "MAE over the mean move of one candle before the origin.",
    "pinball": "Mean loss of the quantiles 0.05 to 0.95; lower is better.",
    "bias": "Mean of ln(actual / forecast); positive where forecasts were too low.",
    "RankIC": "Mean Spearman correlation of forecast and actual returns; empty where forecasts rank nothing.",
    "windows won": "Share of windows with a MAE below naive's; equal ones count half.",
    "brackets, bars and shades": "95 % intervals of a circular block bootstrap, blocks as long as the horizon.",
    "p": "Two-sided Diebold-Mariano test of the windows' MAE against naive's.",
}

Colours = Mapping[str, str]


def page(judged: Sequence[Judged]) -> str:
    """The page of one or several sets of windows, in the order given."""
    names = list(dict.fromkeys(each.name for each in judged))
    colours = {name: f"var(--c{k % 8})" for k, name in enumerate(names)}
    parts = [list(group) for _, group in groupby(judged, key=lambda each: windows(each.evaluation))]
    models = ", ".join(dict.fromkeys(each.name for each in judged if not each.is_baseline))
    title = f"Forecasts judged: {models}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>Rolling origins, every forecast on the same windows. Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.</p>",
        *(_part(part, colours) for part in parts),
        "<h2>Words</h2><div class='card'><dl>",
        *(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in _WORDS.items()),
        "</dl></div>",
    ]
    return document(title, body)


def document(title: str, body: Sequence[str]) -> str:
    """A page of pieces of HTML, with the styles of all reports."""
    return _TEMPLATE.substitute(title=escape(title), body="\n".join(body))


def _part(part: Sequence[Judged], colours: Colours) -> str:
    evaluation = part[0].evaluation
    models = [each for each in part if not each.is_baseline]
    spread = [each for each in part if each.scores.has_spread]
    ranked = f" RankIC ranks {evaluation.ranked}." if any("rank_ic" in e.evaluation.metrics for e in part) else ""
    legend = "".join(
        f"<span><span class='key' style='background:{colours[each.name]}'></span>{escape(each.name)}</span>"
        for each in part
    )
    charts = [
        _by_step(part, colours, "skill_vs_naive", "Skill by step", "1 − MAE / naive's", "naive", 0),
        _by_step(spread, colours, "crps_ratio_walk", "CRPS by step", "CRPS / random walk's", "random walk", 1),
        _reliability(spread, colours),
        _symbols(models, colours),
    ]
    return "\n".join(
        [
            f"<h2>{escape(evaluation.windows.capitalize())} windows</h2><p>{escape(_facts(evaluation))}.{ranked}</p>",
            f"<div class='card'>{_table(part, colours)}</div><h3>Where it comes from</h3>",
            "<p>Shades and whiskers are 95 % intervals. Calibrated forecasts lie on the diagonal: the share of closes"
            " below a quantile is its level.</p>",
            f"<div class='legend'>{legend}</div>",
            grid(charts, 2),
            "<h3>Where the closes fell within the forecast distribution (PIT)</h3><p>Flat is calibrated; a hump is a"
            " band too wide, a bowl one too narrow, a slope a bias.</p>",
            grid([_pit(each, colours[each.name]) for each in spread], 3),
            *(_fans(each, colours[each.name]) for each in models),
        ]
    )


def _facts(evaluation: Evaluation) -> str:
    return windows(evaluation).partition(": ")[2]


def grid(charts: Sequence[Plot], columns: int) -> str:
    """Cards side by side."""
    cards = "".join(f"<div class='card'>{chart.svg()}</div>" for chart in charts)
    return f"<div class='grid-{columns}'>{cards}</div>"


# -- the table -------------------------------------------------------------------------------------


def _table(part: Sequence[Judged], colours: Colours) -> str:
    shown = {key: column for key, column in _COLUMNS.items() if any(key in e.evaluation.metrics for e in part)}
    head = "".join(f"<th>{heading}</th>" for heading, _ in shown.values())
    first = next((each.name for each in part if each.is_baseline), None)
    rows = []
    for each in part:
        compared = each.evaluation.versus_naive
        sentence = f"<small>{escape(compared.sentence)}</small>" if compared and each.name != "naive" else ""
        key = f"<span class='key' style='background:{colours[each.name]}'></span>"
        cells = "".join(_cell(each.evaluation.metrics.get(k), k, form) for k, (_, form) in shown.items())
        kind = " class='first-baseline'" if each.name == first else ""
        rows.append(f"<tr{kind}><td>{key}{escape(each.name)}{sentence}</td>{cells}</tr>")
    return f"<table><thead><tr><th>model</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(metric: Metric | None, name: str, form: str) -> str:
    if metric is None:
        return "<td>–</td>"
    interval = below = ""
    if metric.low is not None and metric.high is not None:
        low, high = f"{metric.low:{form}}", f"{metric.high:{form}}"
        interval = f"{low} … {high}"
        below = f"<small>{interval}</small>" if name in _WITH_INTERVAL and low != high else ""
    kind = _band_of(metric) if name == "skill_vs_naive" else ""
    return f"<td class='{kind}' title='{interval}'>{metric.value:{form}}{below}</td>"


def _band_of(skill: Metric) -> str:
    """The one judgement in colour: the whole interval of the skill lies on one side of zero, beyond rounding."""
    if skill.low is None or skill.high is None:
        return ""
    return "good" if skill.low > EQUAL else "bad" if skill.high < -EQUAL else ""


# -- the pictures ----------------------------------------------------------------------------------


def _by_step(
    part: Sequence[Judged], colours: Colours, metric: str, title: str, label: str, reference: str, level: float
) -> Plot:
    """Models with their intervals, baselines as thin lines; whoever equals the reference throughout is its rule."""
    curves = {each: each.by_step[metric] for each in part}
    curves = {each: curve for each, curve in curves.items() if (np.abs(curve.value - level) > EQUAL).any()}
    steps = np.arange(1, part[0].scores.outcomes.horizon + 1) if part else np.array([1, 2])
    shown = [v for each, c in curves.items() if not each.is_baseline for v in (c.value, c.low, c.high)]
    usual = [np.nanquantile(curve.value, [0.1, 0.9]) for each, curve in curves.items() if each.is_baseline]
    limits = span([level, *shown, *usual])  # a baseline that is far off at some steps must not flatten the models
    plot = Plot(title, (1, max(2, len(steps))), limits, x_label="step", y_label=label)
    plot.rule(reference, y=level)
    for each, curve in curves.items():
        if not each.is_baseline:
            plot.band(steps, curve.low, curve.high, colours[each.name], f"{each.name}: 95 % interval")
        plot.line(steps, curve.value, colours[each.name], each.name, width=1.2 if each.is_baseline else 2.2)
    return plot


def _reliability(part: Sequence[Judged], colours: Colours) -> Plot:
    plot = Plot("Reliability", (0, 1), (0, 1), x_label="level of the quantile", y_label="share of closes below it")
    plot.line((0, 1), (0, 1), "var(--muted)", "calibrated", width=1.2, dashed=True)
    for each in part:
        width = 1.2 if each.is_baseline else 2.2
        plot.line(LEVELS, each.scores.below(), colours[each.name], each.name, width=width)
    return plot


def _pit(judged: Judged, colour: str) -> Plot:
    edges = (0.0, *LEVELS, 1.0)
    density = np.diff(judged.scores.below(), prepend=0, append=1) / np.diff(edges)
    top = max(2.0, float(density.max()) * 1.05)
    plot = Plot(judged.name, (0, 1), (0, top), x_label="PIT", y_label="density", size=(330, 220))
    for left, right, height in zip(edges, edges[1:], density, strict=False):
        plot.bar((left, right), (0, height), colour, f"{left:g} to {right:g}: {height:.2f}")
    plot.rule("calibrated", y=1)
    return plot


def _symbols(models: Sequence[Judged], colours: Colours) -> Plot:
    """A bar with its interval for each model and symbol; where symbols are many, the first model's best and worst."""
    found = {s: m["skill_vs_naive"].value for s, (m, _) in models[0].by_symbol.items()} if models else {}
    ordered = sorted(found, key=found.__getitem__, reverse=True)
    title = "Skill by symbol"
    if len(ordered) > _ROWS:
        title = f"Skill of the {_ROWS // 2} best and worst of {len(ordered)} symbols"
        ordered = ordered[: _ROWS // 2] + ordered[-_ROWS // 2 :]
    skills = {
        (row, m): e.by_symbol[s][0]["skill_vs_naive"] for row, s in enumerate(ordered) for m, e in enumerate(models)
    }
    edges = [value for s in skills.values() for value in (s.value, s.low, s.high, 0.0) if value is not None]
    height = max(290, 90 + 9 * len(skills))
    rows = (len(ordered) - 0.5, -0.5)
    plot = Plot(title, span([np.array(edges)]), rows, x_label="1 − MAE / naive's", y_names=ordered, size=(460, height))
    thick = 0.8 / max(1, len(models))
    for (row, m), skill in skills.items():
        colour, name = colours[models[m].name], f"{models[m].name}, {ordered[row]}: {skill.value:+.3f}"
        at = row - 0.4 + m * thick
        plot.bar((0, skill.value), (at, at + thick * 0.85), colour, name, opacity=0.45)
        if skill.low is not None and skill.high is not None:
            middle = at + thick * 0.425
            plot.line(
                (skill.low, skill.high), (middle, middle), colour, f"{name} [{skill.low:+.3f}, {skill.high:+.3f}]"
            )
    plot.line((0, 0), rows, "var(--muted)", "naive", width=1.2, dashed=True)
    return plot


# -- fans ------------------------------------------------------------------------------------------


def _fans(judged: Judged, colour: str) -> str:
    """The windows whose CRPS, in volatilities known at the origin, is least, in the middle and greatest."""
    facts = judged.scores.outcomes
    order = np.argsort((judged.scores.crps / facts.scale).mean(axis=1))
    chosen = {"Best": order[0], "Median": order[len(order) // 2], "Worst": order[-1]}
    charts = [_fan(judged, int(row), word, colour) for word, row in chosen.items()]
    return (
        f"<h3>Best, median and worst window of {escape(judged.name)}</h3>"
        "<p>By CRPS in volatilities known at the origin. Close (dark), forecast median and its 50, 80 and 95 % bands;"
        f" the dashed line is naive.</p>{grid(charts, 3)}"
    )


def _fan(judged: Judged, row: int, word: str, colour: str) -> Plot:
    scores, facts = judged.scores, judged.scores.outcomes
    symbol = str(facts.symbols[row])
    item, last_close = judged.series[symbol], facts.last_close[row]
    origin = int(np.searchsorted(item.timestamps, facts.origin_times[row]))
    past = item.candles[max(0, origin - _PAST) : origin + 1, CLOSE]
    before, ahead = np.arange(1 - len(past), 1), np.arange(facts.horizon + 1)
    issued = day(int(facts.origin_times[row]))

    def prices(level: float) -> Floats:
        return np.asarray(last_close * np.exp(np.concatenate([[0.0], scores.quantile(level)[row]])))

    actual = np.concatenate([[last_close], facts.actual[row]])
    limits = span([past, actual, prices(0.025), prices(0.975)])
    plot = Plot(
        f"{word}: {symbol} after {issued}",
        (float(before[0]), float(ahead[-1])),
        limits,
        x_label=f"candles of {item.interval} from the origin",
        y_label="price",
        size=(380, 260),
    )
    for percent in sorted(BANDS, reverse=True):
        low, high = BANDS[percent]
        plot.band(ahead, prices(low), prices(high), colour, f"{percent} % band", opacity=0.17)
    plot.line((0, float(ahead[-1])), (last_close, last_close), "var(--muted)", "naive", width=1.2, dashed=True)
    plot.line(ahead, prices(0.5), colour, "median", width=1.8)
    plot.line(before, past, "var(--ink)", "close", width=1.3)
    plot.line(ahead, actual, "var(--ink)", "close, not known at the origin", width=1.3)
    return plot

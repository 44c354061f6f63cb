"""The table, metrics.json and the page, as a person and a program read them."""

import io
import json
import re
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from model_store.manifest import Evaluation
from models.naive import NaiveForecaster
from tests.walk import WalkForecaster
from training.baselines import baseline
from training.candle_files import Series
from training.evaluate import evaluate, summary
from training.judged import Judged, judge
from training.page import page
from training.report import as_json, table, write_report
from training.scores import LEVELS
from training.svg import Plot, span, ticks
from training.windows import Part, rolling_origins, split_by_dates

HORIZON = 12
LONG_NAME = "kronos-demo-<of>-somebody@0123456789"


@pytest.fixture(scope="module")
def judged(samples: list[Series]) -> list[Judged]:
    """A model and three baselines on two sets of windows."""
    split = split_by_dates(date(2010, 1, 1), date(2011, 1, 1), horizon=HORIZON, unseen=["IBM"])
    by_symbol = {item.symbol: item for item in samples}
    entrants = {
        LONG_NAME: WalkForecaster(with_paths=True, spread=1.3),
        "naive": NaiveForecaster(),
        "ewma": baseline("ewma"),
        "drift": baseline("drift"),
    }
    found = []
    parts: tuple[Part, ...] = ("test", "unseen")
    for part in parts:
        origins = rolling_origins(samples, split, part, stride=30, min_context=64)
        for name, forecaster in entrants.items():
            found.append(judge(name, evaluate(forecaster, samples, origins, lookback=64), by_symbol))
    return found


@pytest.fixture(scope="module")
def written(judged: list[Judged], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "new"
    write_report(judged, folder)
    return folder


# -- the table -------------------------------------------------------------------------------------


def rendered(entries: list[tuple[str, Evaluation]]) -> list[str]:
    printed = io.StringIO()
    Console(width=100, file=printed).print(table(entries))
    return printed.getvalue().splitlines()


def test_table_shows_models_then_baselines_within_100_columns(judged: list[Judged]) -> None:
    lines = rendered([(each.name, each.evaluation) for each in judged])
    assert max(map(len, lines)) <= 100
    firsts = [line.split()[0] for line in lines if line.startswith(" ") and line[1:2].strip()]
    names = [word for word in firsts if word in ("test", "unseen", "naive", "ewma", "drift") or word[:6] == "kronos"]
    assert [name[:6] for name in names] == ["test", *(order := ["kronos", "naive", "ewma", "drift"]), "unseen", *order]
    assert any("than naive, p" in line or "undecided, p = " in line for line in lines)


def test_naive_and_walk_stand_in_the_table_of_a_stored_evaluation(judged: list[Judged]) -> None:
    """What `store show` prints, of manifests too that knew six metrics."""
    old = judged[0].evaluation.model_dump(exclude={"versus_naive", "ranked"})
    kept = ("mae_log_return", "mae_price", "skill_vs_naive", "coverage_80", "crps", "crps_ratio_walk")
    old["metrics"] = {name: old["metrics"][name] for name in kept}
    lines = rendered([("toto-demo", Evaluation.model_validate(old))])
    assert [line.split()[0] for line in lines if re.match(r" (toto|naive|ewma)", line)] == [
        "toto-demo",
        "naive",
        "ewma",
    ]
    assert "naive, p" not in "".join(lines)


def test_a_tuned_version_is_shown_with_its_base(judged: list[Judged]) -> None:
    lines = rendered([("toto-base", summary(judged[0].scores, judged[3].scores))])
    [base] = [line.removeprefix(" its base").split() for line in lines if line.startswith(" its base ")]
    [drift] = [line.split()[1:] for line in rendered([("drift", judged[3].evaluation)]) if line.startswith(" drift ")]
    assert base == drift
    assert any("than base, p" in line or "undecided beside base, p" in line for line in lines)


def test_json_carries_every_metric_with_its_columns(judged: list[Judged]) -> None:
    [entry] = json.loads(json.dumps(as_json([("toto", judged[0].evaluation)])))
    assert entry.pop("model") == "toto"
    assert all(metric["naive"] is not None for metric in entry["metrics"].values() if metric["walk"] is not None)
    assert Evaluation.model_validate(entry) == summary(judged[0].scores)


# -- metrics.json ----------------------------------------------------------------------------------


def test_metrics_file_holds_pooled_steps_symbols_and_calibration(judged: list[Judged], written: Path) -> None:
    content = json.loads((written / "metrics.json").read_text())
    assert content["format"] == 1
    assert [entry["model"] for entry in content["evaluations"]] == [each.name for each in judged]
    first: dict[str, Any] = content["evaluations"][0]
    assert first["metrics"]["skill_vs_naive"]["value"] == judged[0].evaluation.metrics["skill_vs_naive"].value
    assert first["versus_naive"]["sentence"] == "equal to naive"
    assert set(first["by_step"]["crps"]) == {"value", "low", "high"}
    assert len(first["by_step"]["crps"]["value"]) == HORIZON
    assert set(first["by_symbol"]) == set(first["symbols"])
    assert first["by_symbol"]["AAPL"]["versus_naive"]["times"] > 5
    assert first["reliability"]["levels"] == list(LEVELS)
    assert sum(first["pit"]) == pytest.approx(1)
    assert len(first["pit"]) == len(LEVELS) + 1


# -- the page --------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Elements, and what they refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.refers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append(tag)
        self.refers += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "onload")]


def test_page_needs_no_network_and_no_script(written: Path) -> None:
    text = (written / "report.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.refers == []
    assert {"script", "link", "iframe", "img", "object"} & set(reader.opened) == set()
    assert not re.search(r"https?://|@import|url\(", text)


def test_page_shows_every_picture_of_every_set_of_windows(judged: list[Judged], written: Path) -> None:
    text = (written / "report.html").read_text()
    titles = re.findall(r'aria-label="([^"]+)"', text)
    for title in ("Skill by step", "CRPS by step", "Reliability", "Skill by symbol", "ewma", "drift"):
        assert titles.count(title) == 2, title
    for word in ("Best", "Median", "Worst"):
        assert sum(title.startswith(f"{word}: ") for title in titles) == 2
    assert "naive" not in titles  # a point has no PIT
    assert judged[0].evaluation.versus_naive is not None
    assert "equal to naive" in text
    assert f"{judged[0].evaluation.origins} origins" in text
    assert not re.search(r"\bnan\b", text)


def test_names_are_text_to_the_page(written: Path) -> None:
    text = (written / "report.html").read_text()
    assert LONG_NAME not in text
    assert LONG_NAME.replace("<", "&lt;").replace(">", "&gt;") in text


def test_page_judges_skill_alone_and_only_beyond_its_interval(written: Path) -> None:
    """No percentage is called good: 1 % of an index is nothing, and 10 % of a coin may be skill."""
    text = (written / "report.html").read_text()
    assert not re.search(r"excellent|moderate|poor|acceptable", text)
    assert set(re.findall(r"<td class='(\w+)'", text)) <= {"good", "bad"}
    for kind, value in re.findall(r"<td class='(good|bad)' title='[^']*'>([+-][\d.]+)", text):
        assert (float(value) > 0) == (kind == "good")


def test_fan_of_the_best_window_is_the_one_with_the_least_crps(judged: list[Judged], written: Path) -> None:
    scores = judged[0].scores
    best = int(np.argmin((scores.crps / scores.outcomes.scale).mean(axis=1)))
    day = np.datetime64(int(scores.outcomes.origin_times[best]), "ms").astype("datetime64[D]")
    assert f"Best: {scores.outcomes.symbols[best]} after {day}" in (written / "report.html").read_text()


def test_many_symbols_show_the_best_and_the_worst(judged: list[Judged]) -> None:
    many = {f"S{k:03}": judged[0].by_symbol["AAPL"] for k in range(60)}
    crowded = Judged(**(vars(judged[0]) | {"by_symbol": many}))
    assert "Skill of the 20 best and worst of 60 symbols" in page([crowded])


# -- plots -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.13, 0.12, [-0.1, -0.05, 0, 0.05, 0.1]),
        (980, 1510, [1000, 1200, 1400]),
    ],
)
def test_ticks_are_round_numbers_inside_the_axis(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_span_ignores_what_is_not_known() -> None:
    assert span([[1.0, np.nan], 3.0], margin=0.5) == (0.0, 4.0)
    assert span([[np.nan]], margin=0) == (0.0, 1.0)


def test_a_gap_in_the_data_is_a_gap_in_the_line() -> None:
    plot = Plot("gap", (0, 4), (0, 1))
    plot.line(range(5), [0.5, 0.5, np.nan, 0.5, 0.5], "red", "five")
    [path] = re.findall(r'<path d="([^"]+)" fill="none"', plot.svg())
    assert (path.count("M"), path.count("L")) == (2, 2)

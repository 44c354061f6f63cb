"""Traps that training and evaluation of price forecasts are known for, where no other file is their home."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console

from bench.service import put_version
from model_store.manifest import WEIGHTS
from model_store.store import ModelStore
from models.families import build_forecaster
from models.layers import WeightsMismatch
from tests.training.small import small_recipe
from training.baselines import baseline
from training.candle_files import load
from training.evaluate import evaluate, summary
from training.recipe import Recipe, read_recipe
from training.report import table
from training.train import train
from training.windows import rolling_origins, split_by_fractions

ROOT = Path(__file__).parents[2]
HORIZON = 8


@pytest.fixture
def make_recipe(sample_folder, tmp_path):
    def make(family, folder=sample_folder, **tables):
        path = tmp_path / f"{family}.toml"
        choose = "[select]\nevery = 2\nstride = 400\nsamples = 8\n"
        path.write_text(small_recipe(family, folder, choose, steps=4, bars=[1]))
        content = read_recipe(path).model_dump()
        return Recipe.model_validate(content | {name: content[name] | table for name, table in tables.items()})

    return make


def tuned(recipe, **tune):
    return Recipe.model_validate(recipe.model_dump() | {"network": {}, "tune": tune})


# -- leaks -----------------------------------------------------------------------------------------


def test_leak_neither_training_nor_selection_reads_the_test(make_recipe, sample_folder, tmp_path):
    """Another market after the test began: the same weights, bit for bit, of the same step."""
    changed = tmp_path / "changed"
    changed.mkdir()
    found = []
    for name in ("AAPL.csv", "IBM.csv"):
        header, *lines = (sample_folder / name).read_text().splitlines()
        cells = [line.split(",") for line in lines]
        tenfold = [
            [row[0], *(repr(10 * float(price)) for price in row[1:5]), *row[5:]] if row[0] >= "2010-06-01" else row
            for row in cells
        ]
        (changed / name).write_text("\n".join([header, *(",".join(row) for row in tenfold), ""]))
    for folder in (sample_folder, changed):
        recipe = make_recipe("toto", folder, data={"symbols": ["AAPL"]})
        found.append(train(recipe, ModelStore(tmp_path / folder.name / "store"), lambda *_: None, tmp_path))
    first, second = found
    assert first.files[WEIGHTS] == second.files[WEIGHTS]
    assert first.training.notes == second.training.notes
    assert "lowest CRPS on val" in first.training.notes[0]
    assert first.training.data_digest != second.training.data_digest
    assert first.evaluation("test").metrics != second.evaluation("test").metrics


# -- units and what a table says -------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(sample_folder):
    """Pooled metrics of the drift forecast, prices of each symbol multiplied."""
    series = load(sample_folder)[0][::3]
    split = split_by_fractions(series, 0.6, 0.2, horizon=HORIZON)
    origins = rolling_origins(series, split, "test", stride=40, min_context=64)

    def score(*factors):
        dearer = [
            replace(item, candles=item.candles * np.array([factor] * 4 + [1.0, factor]))
            for item, factor in zip(series, factors, strict=True)
        ]
        return summary(evaluate(baseline("drift"), dearer, origins, lookback=64))

    return score


def shown(evaluation):
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table([("drift-demo", evaluation)]))
    return captured.get()


def test_units_prices_in_other_money_change_metrics_of_price_alone(scored):
    """Whatever is not called so is a log-return, a share, a ratio or a percentage of the price."""
    dollars, cents = scored(1, 1, 1).metrics, scored(100, 100, 100).metrics
    for name, metric in dollars.items():
        factor = 100 if name in {"mae_price", "rmse_price"} else 1
        assert cents[name].value == pytest.approx(factor * metric.value, rel=1e-9), name
        assert cents[name].naive == (metric.naive and pytest.approx(factor * metric.naive, rel=1e-9)), name


def test_a_dear_symbol_never_decides_a_headline(scored):
    """A price a thousand times as high moves mean errors in money, and nothing that is shown, chosen or gated by."""
    plain, dear = scored(1, 1, 1), scored(1, 1000, 1)
    assert dear.metrics["mae_price"].value > 100 * plain.metrics["mae_price"].value
    for name in plain.metrics.keys() - {"mae_price", "rmse_price"}:
        assert dear.metrics[name].value == pytest.approx(plain.metrics[name].value, rel=1e-9), name
    assert shown(dear) == shown(plain)


def test_horizon_mismatch_never_shares_a_table_with_what_it_cannot_be_compared_with(scored):
    """Another horizon, another stride: each under its own title, beside its own naive forecast."""
    evaluation = scored(1, 1, 1)
    others = [evaluation, evaluation.model_copy(update={"horizon": 1}), evaluation.model_copy(update={"origins": 9})]
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table([(f"model-{k}", each) for k, each in enumerate(others)]))
    assert captured.get().count("\n naive ") == len(others)


def test_no_percentage_error_of_returns_is_anywhere():
    """A MAPE of returns divides by almost nothing, and a bare pct_mae says not what it is a percentage of."""
    forbidden = re.compile(r"\bs?mape\b|pct_mae|mae_percent|percentage_error", re.IGNORECASE)
    packages = ("models", "model_store", "training", "service", "monitoring", "client", "feeds")
    found = [
        path.relative_to(ROOT)
        for package in packages
        for path in (ROOT / package).rglob("*")
        if path.suffix in {".py", ".html", ".js", ".yml", ".json"} and forbidden.search(path.read_text())
    ]
    assert found == []


# -- what is trained -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tables", "named"),
    [
        ("toto", {"serving": {"temperature": 0.5}}, "temperature"),
        ("toto", {"serving": {"top_k": 5, "top_p": 0.9}}, "top_k, top_p"),
        ("toto", {"objective": {"ahead": 8}}, "ahead"),
        ("kronos", {"objective": {"loss": "huber"}}, "loss"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(make_recipe, family, tables, named):
    with pytest.raises(ValidationError, match=f"{named} would change nothing"):
        make_recipe(family, **tables)


def test_settings_of_adapters_are_refused_where_there_are_none(make_recipe):
    with pytest.raises(ValidationError, match="rank would change nothing"):
        tuned(make_recipe("toto"), base="toto-demo", train="full", rank=4)


def test_no_stub_is_trained_in_a_networks_place(make_recipe, tmp_path, monkeypatch, put_tiny):
    store = ModelStore(tmp_path / "store")
    put_version(store, "nothing", "naive", {}, {})
    with pytest.raises(ValueError, match="is of the family naive, not toto"):
        train(tuned(make_recipe("toto"), base="nothing"), store, lambda *_: None, tmp_path)
    put_tiny(store, "toto")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RuntimeError, match=r"adapters need pip install 'candlecast\[train\]'"):
        train(tuned(make_recipe("toto"), base="toto-demo", train="lora"), store, lambda *_: None, tmp_path)
    assert store.models() == ["nothing", "toto-demo"]


@pytest.mark.parametrize("family", ["toto", "kronos"])
def test_wrapped_keys_of_an_adapter_are_never_loaded_by_halves(tiny, family):
    config, weights = tiny[family]
    name = next(name for name in weights if name.endswith(("wQKV.weight", "q_proj.weight")))
    wrapped = name.replace(".weight", ".base_layer.weight")
    renamed = {wrapped if key == name else key: tensor for key, tensor in weights.items()}
    with pytest.raises(WeightsMismatch) as raised:
        build_forecaster(family, config, renamed)
    short = name.removeprefix("predictor.")
    assert short in str(raised.value)
    assert short.replace(".weight", ".base_layer.weight") in str(raised.value)

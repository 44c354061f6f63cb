"""One adapter per symbol of one base: its own windows, judged beside the base, published, gone on with."""

import json
from datetime import UTC, date, datetime

import pytest
from click.testing import CliRunner
from rich.console import Console

import candlecast
from model_store.manifest import ADAPTER, SCORES, WEIGHTS
from model_store.store import ModelStore
from models.families import build_forecaster
from tests.training.small import small_recipe
from training import per_symbol, train
from training.evaluate import evaluate
from training.loop import Diverged
from training.per_symbol import outcomes_table, train_per_symbol
from training.recipe import Recipe, read_recipe
from training.windows import rolling_origins, split_by_dates

STRIDE = 200


@pytest.fixture
def store(tmp_path, put_tiny):
    store = ModelStore(tmp_path / "store")
    put_tiny(store, "toto")
    return store


@pytest.fixture
def make_recipe(sample_folder, tmp_path):
    def make(symbols=("AAPL", "FB", "MSFT"), **tune):
        path = tmp_path / "recipe.toml"
        path.write_text(small_recipe("toto", sample_folder, steps=3, bars=[1]))
        content = read_recipe(path).model_dump() | {"name": "each", "network": {}}
        content["data"]["symbols"] = symbols
        content["evaluate"] |= {"stride": STRIDE, "baseline_stride": STRIDE}
        return Recipe.model_validate(
            content | {"tune": {"base": "toto-demo", "train": "lora", "per_symbol": True, **tune}}
        )

    return make


def by_symbol(outcomes):
    return {outcome.symbol: outcome for outcome in outcomes}


def test_each_symbol_has_a_version_of_the_base_judged_beside_it_on_its_own_windows(
    store, make_recipe, samples, tmp_path, monkeypatch
):
    loads = []
    load = ModelStore.load
    monkeypatch.setattr(ModelStore, "load", lambda self, reference: loads.append(reference) or load(self, reference))
    recipe, before = make_recipe(), store.aliases("toto-demo")
    found = by_symbol(train_per_symbol(recipe, store, lambda *_: None, tmp_path))
    assert loads == ["toto-demo"]  # however many symbols
    assert store.aliases("toto-demo") == before  # no symbol's version becomes everybody's
    assert found["FB"].manifest is None  # it was listed after training ends
    assert found["FB"].status == "failed: training needs 128 rows, FB has 0 at most"
    base = load(store, "toto-demo")
    for symbol in ("AAPL", "MSFT"):
        manifest = found[symbol].manifest
        assert (manifest.model, manifest.symbol) == ("toto-demo", symbol)
        assert manifest.origin.revision == base.manifest.version
        assert manifest.training.symbols == (symbol,)
        assert set(manifest.files) == {"config.json", WEIGHTS, ADAPTER, SCORES}
        test = manifest.evaluation("test")
        assert test.symbols == (symbol,)
        crps = test.metrics["crps"]
        assert crps.base == pytest.approx(crps_on_test(base, symbol, samples))
        assert test.metrics["crps_ratio_base"].value == pytest.approx(crps.value / crps.base)
        assert crps.value != crps.base
        assert {baseline.symbol for baseline in manifest.baselines} == {"*", symbol}
    assert found["AAPL"].manifest.files[WEIGHTS] != found["MSFT"].manifest.files[WEIGHTS]
    assert "failed:" in rendered(found.values())


def test_no_symbol_has_a_part_in_the_weights_of_another(store, make_recipe, tmp_path, put_tiny):
    """Trained in full, where a base whose tensors moved would show."""
    found = by_symbol(
        train_per_symbol(make_recipe(("AAPL", "MSFT"), train="full"), store, lambda *_: None, tmp_path / "both")
    )
    other = ModelStore(tmp_path / "other")
    put_tiny(other, "toto")
    [alone] = train_per_symbol(make_recipe(("MSFT",), train="full"), other, lambda *_: None, tmp_path / "alone")
    assert alone.manifest.files[WEIGHTS] == found["MSFT"].manifest.files[WEIGHTS]
    assert alone.manifest.evaluations == found["MSFT"].manifest.evaluations


def crps_on_test(version, symbol, samples):
    split = split_by_dates(date(2009, 1, 1), date(2010, 6, 1), horizon=16)
    series = [item for item in samples if item.symbol == symbol]
    origins = rolling_origins(series, split, "test", stride=STRIDE, min_context=64)
    forecaster = build_forecaster("toto", version.config, version.weights)
    return evaluate(forecaster, series, origins, lookback=64).crps.mean()


def rendered(outcomes):
    console = Console(width=100)
    with console.capture() as shown:
        console.print(outcomes_table(list(outcomes)))
    return shown.get()


def test_the_same_command_goes_on_with_what_is_missing(store, make_recipe, tmp_path, monkeypatch):
    """Of three symbols one has too few rows and one diverges; the second time only these are tried again."""
    fit = train.fit_phases

    def diverging(prepared, track, folder):
        if prepared.symbol == "MSFT":
            raise Diverged("the loss is nan at step 0")
        return fit(prepared, track, folder)

    recipe = make_recipe()
    monkeypatch.setattr(per_symbol, "fit_phases", diverging)
    first = by_symbol(train_per_symbol(recipe, store, lambda *_: None, tmp_path))
    assert [first[symbol].status[:7] for symbol in ("AAPL", "FB", "MSFT")] == ["trained", "failed:", "failed:"]
    assert "the loss is nan" in first["MSFT"].status
    monkeypatch.setattr(per_symbol, "fit_phases", fit)
    second = by_symbol(train_per_symbol(recipe, store, lambda *_: None, tmp_path))
    assert [second[symbol].status[:7] for symbol in ("AAPL", "FB", "MSFT")] == ["kept", "failed:", "trained"]
    assert second["AAPL"].manifest == first["AAPL"].manifest


def test_another_recipe_or_a_restart_trains_anew(store, make_recipe, tmp_path):
    recipe = make_recipe(("AAPL",))
    adjusted = recipe.model_copy(update={"data": recipe.data.model_copy(update={"adjust": True})})
    calls = [(recipe, False), (recipe, False), (recipe, True), (adjusted, False)]
    found = [train_per_symbol(each, store, lambda *_: None, tmp_path, restart=anew)[0] for each, anew in calls]
    assert [outcome.status for outcome in found] == ["trained", "kept", "trained", "trained"]


def test_the_command_tells_every_symbol_and_fails_if_one_did(store, tmp_path, sample_folder):
    path = tmp_path / "each.toml"
    tune = '[tune]\nbase = "toto-demo"\ntrain = "lora"\nper_symbol = true\n'
    text = small_recipe("toto", sample_folder, tune, steps=2, bars=[1])
    text = text[: text.index("[network]")] + text[text.index("[phases.network]") :]
    text = text.replace("[data]", '[data]\nsymbols = ["AAPL", "FB"]')
    path.write_text(text)
    words = ["train", str(path), "--store", str(store.root), "--home", str(tmp_path / "home")]
    done = CliRunner().invoke(candlecast.main, [*words, "--json"])
    assert done.exit_code == 1
    assert "1 of 2 symbols failed" in done.stderr
    apple, facebook = json.loads(done.stdout)
    assert (apple["status"], facebook["status"][:7]) == ("trained", "failed:")
    shown = CliRunner().invoke(candlecast.main, words)
    assert shown.exit_code == 1
    version = apple["manifest"]["version"]
    for told in ("kept", version, f"{apple['manifest']['evaluations'][0]['metrics']['crps']['base']:.5f}"):
        assert told in shown.stdout
    assert f"promote toto-demo@{version} --symbol AAPL" in shown.stdout
    refused = CliRunner().invoke(candlecast.main, ["train", str(path), str(path)])
    assert refused.exit_code == 2
    assert "trained alone" in refused.stderr


def test_an_adapter_of_one_symbol_is_no_candidate_for_all(store, make_recipe, tmp_path):
    [outcome] = train_per_symbol(make_recipe(("AAPL",)), store, lambda *_: None, tmp_path)
    for symbol in (None, "MSFT"):
        with pytest.raises(RuntimeError, match="was trained for AAPL alone"):
            store.promote(outcome.reference, symbol=symbol)
    store.promote(outcome.reference, symbol="AAPL", force="three steps of training need not help")
    assert store.aliases("toto-demo")["AAPL"] == outcome.manifest.version
    assert store.resolve("toto-demo")[1] == outcome.manifest.origin.revision


def test_symbols_choose_what_is_trained_on_and_an_unknown_one_is_named_with_what_there_is(make_recipe):
    prepared = train.prepare(make_recipe(("AAPL", "MSFT")))
    assert [item.symbol for item in prepared.series] == ["AAPL", "IBM", "MSFT"]  # IBM is held out
    with pytest.raises(ValueError, match=r"no candles of AMD, NVDA; there is AAPL, FB, .*, MSFT$"):
        train.prepare(make_recipe(("NVDA", "AAPL", "AMD")))


def test_leak_a_base_that_has_seen_the_held_out_part_is_refused(store, make_recipe, tmp_path):
    """Of the tuned version too: what its base has seen, it has seen."""
    recipe = make_recipe(("AAPL",))
    [outcome] = train_per_symbol(recipe, store, lambda *_: None, tmp_path)
    earlier = recipe.model_dump()
    earlier["split"] |= {"val_from": datetime(2007, 1, 1, tzinfo=UTC)}
    earlier["tune"]["base"] = outcome.reference
    with pytest.raises(ValueError, match=r"was trained on candles up to 2008-12-\d\d: let the val part begin later"):
        train_per_symbol(Recipe.model_validate(earlier), store, lambda *_: None, tmp_path)
    later = recipe.model_dump()
    later["tune"]["base"] = outcome.reference
    later["data"]["symbols"] = ["MSFT"]
    [child] = train_per_symbol(Recipe.model_validate(later), store, lambda *_: None, tmp_path)
    assert child.manifest.training.symbols == ("AAPL", "MSFT")
    later["split"]["unseen"] = ["AAPL"]
    with pytest.raises(ValueError, match="was trained on AAPL: that is not unseen"):
        train.train(Recipe.model_validate(later), store, lambda *_: None, tmp_path)


def test_weights_of_a_version_are_those_that_were_judged(store, make_recipe, samples, tmp_path):
    """Reload parity: loaded from the store, the version scores what its manifest says."""
    [outcome] = train_per_symbol(make_recipe(("AAPL",)), store, lambda *_: None, tmp_path)
    found = crps_on_test(store.load(outcome.reference), "AAPL", samples)
    assert found == pytest.approx(outcome.manifest.evaluation("test").metrics["crps"].value, rel=1e-5)

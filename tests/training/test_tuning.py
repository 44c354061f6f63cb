"""Training goes on from a version in the store: what moves, what is published, and what it forecasts when loaded."""

import json

import pytest
import torch
from pydantic import ValidationError

from bench.service import put_version
from model_store.canary import check_canary
from model_store.manifest import ADAPTER, SCORES, WEIGHTS
from models.families import build_forecaster
from models.forecaster import Sampling
from models.kronos.network import KronosPredictor, PredictorConfig
from models.toto.network import TotoConfig, TotoNetwork
from tests.training.small import small_recipe
from training.evaluate import evaluate
from training.recipe import Recipe, read_recipe
from training.train import based, prepare, train
from training.tuning import TuneTable, merged, open_up
from training.windows import rolling_origins

BACKBONES = {"toto": "transformer.", "kronos": "predictor.transformer."}
STRIDE = 400


@pytest.fixture
def make_recipe(sample_folder, tmp_path):
    def make(family, **tune):
        path = tmp_path / "recipe.toml"
        choose = f"[select]\nevery = 2\nstride = {STRIDE}\nsamples = 8\n"
        path.write_text(small_recipe(family, sample_folder, choose, steps=4))
        content = read_recipe(path).model_dump() | {"name": "tuned", "network": {}}
        content["phases"].pop("tokenizer", None)
        return Recipe.model_validate(content | {"tune": {"base": f"{family}-demo", **tune}})

    return make


def crps_on_val(recipe, config, weights):
    prepared = prepare(recipe)
    origins = rolling_origins(prepared.series, prepared.split, "val", stride=STRIDE, min_context=recipe.context)
    forecaster = build_forecaster(recipe.family, config, weights)
    sampling = Sampling(samples=8, top_p=recipe.serving.top_p or Sampling().top_p)
    return evaluate(forecaster, prepared.series, origins, sampling=sampling, lookback=recipe.context).crps.mean()


@pytest.mark.parametrize("how", ["full", "head", "lora"])
@pytest.mark.parametrize("family", ["toto", "kronos"])
def test_reload_gives_the_validation_metric_of_training(store, make_recipe, tmp_path, family, how):
    """Of the weights as published, and of those that the base and the adapter make when merged again."""
    recipe = make_recipe(family, train=how)
    manifest = train(recipe, store, lambda *_: None, tmp_path)
    (log,) = tmp_path.glob("runs/*/training.log")
    judged = [line["crps"] for line in map(json.loads, log.read_text().splitlines()) if "crps" in line]
    version, base = store.load("tuned@candidate"), store.load(f"{family}-demo")
    assert crps_on_val(recipe, version.config, version.weights) == pytest.approx(min(judged), rel=1e-5)
    assert manifest.origin.revision == base.manifest.version
    assert version.config == base.config  # the architecture is the checkpoint's, whatever a recipe says
    assert version.weights.keys() == base.weights.keys()
    moved = {name for name, tensor in version.weights.items() if not torch.equal(tensor, base.weights[name])}
    assert moved
    assert any(name.startswith(BACKBONES[family]) for name in moved) == (how != "head")
    assert not any(name.startswith("tokenizer.") for name in moved)
    assert set(manifest.files) == {"config.json", WEIGHTS, SCORES} | ({ADAPTER} if how == "lora" else set())
    if how == "lora":
        again = merge_again(recipe, base, version.adapter)
        for name, tensor in again.items():
            torch.testing.assert_close(tensor, version.weights[name], rtol=1e-5, atol=1e-7)
        assert crps_on_val(recipe, version.config, again) == pytest.approx(min(judged), rel=1e-5)
        beside = base.build().adapted(store.matrices("tuned@candidate"))
        assert check_canary(manifest.canary, beside) < 1e-3
        assert manifest.adapts == (f"{family}-demo@{base.manifest.version}", 2.0)


def merge_again(recipe, base, adapter):
    """The base's weights with the stored adapter, loaded strictly, added in."""
    if recipe.family == "toto":
        network = TotoNetwork(TotoConfig.from_published(base.config["network"]))
        network.load_state_dict(base.weights)
        prefix = ""
    else:
        network = KronosPredictor(PredictorConfig.from_published(base.config["predictor"]))
        prefix = "predictor."
        own = {name: tensor for name, tensor in base.weights.items() if name.startswith(prefix)}
        network.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in own.items()})
    open_up(network, recipe.family, recipe.tune)
    found = network.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in adapter.items()}, strict=False
    )
    assert not found.unexpected_keys
    assert not [name for name in found.missing_keys if ".lora_" in name]
    return {**base.weights, **{prefix + name: tensor for name, tensor in merged(network).items()}}


def test_modules_that_an_adapter_would_not_reach_are_refused(store, make_recipe, tmp_path):
    """Toto's head is composed into one map: an adapter beside its matrices would be ignored."""
    with pytest.raises(ValueError, match=r"no adapter for \['unembed'\]"):
        train(make_recipe("toto", train="lora", modules=("unembed",)), store, lambda *_: None, tmp_path)


def test_a_base_that_cannot_do_what_is_asked_is_refused_before_training(store, make_recipe, tmp_path):
    far = make_recipe("toto").model_copy(update={"horizon": 10_000})
    with pytest.raises(ValueError, match=r"toto-demo@[0-9a-f]{12} takes \d+ candles and \d+ steps at most"):
        train(far, store, lambda *_: None, tmp_path)
    other = make_recipe("kronos").model_copy(update={"tune": TuneTable(base="toto-demo")})
    with pytest.raises(ValueError, match="is of the family toto, not kronos"):
        train(other, store, lambda *_: None, tmp_path)


def test_serving_defaults_are_the_bases_unless_the_recipe_has_others(store, make_recipe, tiny):
    config, weights = tiny["kronos"]
    put_version(store, "sharp", "kronos", config, weights, serving={"top_p": 0.7, "temperature": 0.6})
    recipe = make_recipe("kronos").model_copy(update={"tune": TuneTable(base="sharp")})
    assert recipe.serving.top_p == 1.0
    serving = based(recipe, store)[0].serving
    assert (serving.top_p, serving.temperature) == (1.0, 0.6)


def test_training_starts_from_scratch_or_from_a_version(make_recipe):
    recipe = make_recipe("toto")
    for change in ({"tune": None}, {"network": {"network": {}}}):
        with pytest.raises(ValidationError, match="give network"):
            Recipe.model_validate(recipe.model_dump() | change)

"""A base and a folder of candles are enough to fine-tune: the preset becomes a whole recipe."""

import shutil

import pytest
from click.testing import CliRunner

from candlecast import main
from training.presets import PRESETS, write_recipe
from training.recipe import parse_recipe
from training.train import prepare, train


@pytest.mark.parametrize("family", ["toto", "kronos"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_recipe_that_fits_its_candles(store, sample_folder, tmp_path, family, preset):
    text = write_recipe(preset, store, f"{family}-demo", sample_folder, cache=tmp_path)
    recipe = parse_recipe(text)
    assert (recipe.name, recipe.family, recipe.data.interval) == (f"{family}-demo-tuned", family, "1d")
    assert "tokenizer" not in recipe.phases  # Kronos' stays as it is
    prepared = prepare(recipe, tmp_path)
    for origins in (*prepared.origins.values(), prepared.choosing):
        assert PRESETS[preset] * 0.7 < len(origins) < PRESETS[preset] * 1.3
    train_rows, rows = (sum(map(len, spans)) for spans in (targets(prepared), prepared.series))
    assert 0.65 < train_rows / rows < 0.7  # the purge gap is the horizon of every series


def targets(prepared):
    return [prepared.split.targets(item, "train") for item in prepared.series]


def test_symbols_held_out_are_named_in_the_recipe_and_what_they_lack_in_the_error(store, sample_folder, tmp_path):
    recipe = parse_recipe(write_recipe("full", store, "toto-demo", sample_folder, unseen=["IBM"], cache=tmp_path))
    assert recipe.split["unseen"] == ["IBM"]
    with pytest.raises(ValueError, match=r"512 candles of context and 64 in the part, IBM has \d+ before and \d+ in"):
        prepare(recipe, tmp_path)


def test_a_quick_preset_publishes_a_version_tuned_from_its_base(store, sample_folder, tmp_path):
    text = write_recipe("quick", store, "toto-demo", sample_folder, name="mine")
    short = text.replace("steps = 100", "steps = 2").replace("every = 25", "every = 2")
    manifest = train(parse_recipe(short), store, lambda *_: None, tmp_path / "home", tensorboard=tmp_path / "events")
    assert manifest.model == "mine"
    assert manifest.origin.revision == store.manifest("toto-demo").version
    assert manifest.training.recipe["tune"]["train"] == "lora"
    assert list((tmp_path / "events").glob("mine-*/events.out.tfevents.*"))


def command(store, *arguments):
    done = CliRunner().invoke(main, ["train", *map(str, arguments), "--store", str(store.root)])
    return done.exit_code, done.output


def test_the_recipe_of_a_preset_is_printed_to_start_ones_own_from(store, sample_folder, tmp_path):
    base = ("--base", "toto-demo", "--data", sample_folder, "--home", tmp_path)
    code, printed = command(store, *base, "--print-recipe")
    assert code == 0
    assert parse_recipe(printed) == parse_recipe(write_recipe("quick", store, "toto-demo", sample_folder))
    assert "# " in printed


def test_a_base_without_candles_and_a_recipe_beside_a_base_are_refused(store, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.touch()
    for arguments in ((), ("--base", "toto-demo"), (recipe, "--base", "toto-demo", "--data", tmp_path)):
        code, said = command(store, *arguments)
        assert code == 2
        assert "give a RECIPE, or --base and --data" in said


def test_a_folder_of_several_intervals_asks_for_one(store, sample_folder, tmp_path, packaged_candles):
    shutil.copy(next(sample_folder.glob("AAPL*.csv")), tmp_path)
    shutil.copy(packaged_candles("EURUSD.csv"), tmp_path)
    with pytest.raises(ValueError, match="1d, 1h: say which with --interval"):
        write_recipe("quick", store, "toto-demo", tmp_path)
    recipe = parse_recipe(write_recipe("quick", store, "toto-demo", tmp_path, interval="1h"))
    assert len({item.symbol for item in prepare(recipe).series}) == 1

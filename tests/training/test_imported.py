"""Hyperparameter files of a research repository: read by one table, tried first, and proven like any other."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.small import small_recipe
from training.imported import first_trials, read_imported, widened
from training.recipe import Knob, Recipe, parse_recipe

KRONOS = {"name": "kronos_1", "temperature": 1, "top_p": 0.8, "top_k": 16, "sample_count": 12, "max_context": 512}
SPACE = {
    "serving.temperature": Knob(low=0.8, high=1.2),
    "serving.top_p": Knob(choices=(0.9, 1.0)),
    "serving.samples": Knob(choices=(16, 32)),
    "serving.lookback": Knob(choices=(32, 64)),
}
CURRENT = {"serving.temperature": 1.1, "serving.top_p": 0.9, "serving.samples": 32, "serving.lookback": 64}


@pytest.fixture
def recipe(sample_folder: Path) -> Recipe:
    return parse_recipe(small_recipe("kronos", sample_folder))


def write(path: Path, config: dict[str, Any], **more: Any) -> Path:
    path.write_text(json.dumps({"config": config, "validation": {"price_mae": 1.0}, "windows": {}, **more}))
    return path


def test_a_file_is_a_whole_trial_and_what_has_no_counterpart_is_named(tmp_path: Path, recipe: Recipe) -> None:
    write(tmp_path / "aapl.json", {**KRONOS, "clip": 2.0}, metadata={"source": "x"})
    [imported] = read_imported(tmp_path)
    assert (imported.symbol, imported.left) == ("AAPL", ("clip",))
    said: list[str] = []
    [trial] = first_trials([imported], recipe, SPACE, CURRENT, (2, 400), said.append)
    assert trial == {**CURRENT, **dict(zip(SPACE, (1.0, 0.8, 12, 400), strict=True))}
    assert "clip, serving.top_k" in said[0]
    assert "lookback of 512 becomes 400" in said[1]
    wide = widened(SPACE, [trial])
    assert wide["serving.top_p"].choices == (0.9, 1.0, 0.8)
    assert (wide["serving.temperature"].low, wide["serving.temperature"].high) == (0.8, 1.2)
    assert widened(SPACE, [{"serving.temperature": 0.3}])["serving.temperature"].low == 0.3


def test_what_a_file_does_not_say_stays_as_it_is(tmp_path: Path, recipe: Recipe) -> None:
    imported = read_imported(write(tmp_path / "MSFT.json", {"num_samples": 256}))
    assert first_trials(imported, recipe, SPACE, CURRENT, (2, 400), print) == [{**CURRENT, "serving.samples": 256}]


def test_a_file_of_the_other_family_is_left_out(tmp_path: Path, recipe: Recipe) -> None:
    imported = read_imported(write(tmp_path / "MSFT.json", {"num_samples": 256}, model="toto"))
    said: list[str] = []
    assert first_trials(imported, recipe, SPACE, CURRENT, (2, 400), said.append) == []
    assert "it is of toto" in said[0]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"clip": 2.0}, "has no setting of temperature"),
        ({"aggregate": "sometimes"}, "unknown aggregate"),
        ({"temperature": "hot"}, "no file of settings"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_by_name(tmp_path: Path, config: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"MSFT.json .*{told}"):
        read_imported(write(tmp_path / "MSFT.json", config))


def test_a_value_that_no_model_takes_is_refused_by_name(tmp_path: Path, recipe: Recipe) -> None:
    imported = read_imported(write(tmp_path / "MSFT.json", {"top_p": 7}))
    with pytest.raises(ValueError, match=r"MSFT.json: .*(?s:.*)less than or equal to 1"):
        first_trials(imported, recipe, SPACE, CURRENT, (2, 400), print)


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \.json file"):
        read_imported(tmp_path)

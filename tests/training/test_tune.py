"""candlecast tune: settings of tiny models, which end as a child version, as trained weights, or not at all."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from click.testing import CliRunner, Result

import candlecast
from bench.service import put_version
from model_store.manifest import CONFIG, WEIGHTS, Manifest
from model_store.store import CANDIDATE, PRODUCTION, ModelStore
from tests.training.small import small_recipe
from training.compare import load_forecaster
from training.recipe import Knob, Recipe, parse_recipe
from training.study import Plan
from training.tune import tune_recipe, tune_version

# A random network forecasts about the mean of what it sees: the fewer candles, the nearer to the last close.
SHORT = {"serving.lookback": Knob(choices=(3, 5)), "serving.aggregate": Knob(choices=("median", "mean"))}
LONG = {"serving.lookback": Knob(choices=(100, 120))}
PLAN = Plan(trials=2, stride=12)


def ignore(*_: object) -> None:
    """The progress."""


@pytest.fixture
def put_served(store: ModelStore, tiny: dict[str, Any], sample_folder: Path) -> Callable[..., Manifest]:
    """Store a random kronos-demo, as if it had been trained on the samples."""

    def put(until: str = "2008-12-01") -> Manifest:
        recipe = parse_recipe(small_recipe("kronos", sample_folder, horizon=4))
        training = {
            "recipe": recipe.model_dump(mode="json"),
            "data_digest": "",
            "symbols": ["AAPL"],
            "interval": "1d",
            "start": "2000-01-03",
            "end": until,
            "steps": 1,
            "seconds": 1,
            "seed": 0,
        }
        config, weights = tiny["kronos"]
        fields = {"serving": {"samples": 4, "top_p": 0.9}, "training": training}
        return store.manifest(put_version(store, "kronos-demo", "kronos", config, weights, **fields))

    return put


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Candles are parsed once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def home(parsed: Path, tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "cache").symlink_to(parsed)
    return tmp_path / "home"


@pytest.fixture
def command(store: ModelStore, home: Path, tmp_path: Path) -> Callable[..., Result]:
    """Searches kronos-demo's settings."""

    def run(space: dict[str, Knob], *words: str) -> Result:
        knobs = [f'"{name}" = {{ choices = {json.dumps(knob.choices)} }}' for name, knob in space.items()]
        (tmp_path / "space.toml").write_text("\n".join(["[search]", *knobs]))
        places = [
            "--search",
            str(tmp_path / "space.toml"),
            "--store",
            str(store.root),
            "--home",
            str(home),
        ]
        return CliRunner().invoke(
            candlecast.main, ["tune", "--model", "kronos-demo", "--trials", "2", "--stride", "12", *places, *words]
        )

    return run


def test_better_settings_become_a_child_version_that_is_evaluated_as_it_serves(
    store: ModelStore, command: Callable[..., Result], put_served: Callable[[], Manifest]
) -> None:
    parent = put_served()
    done = command(SHORT, "--json")
    assert done.exit_code == 0, done.output
    [told] = json.loads(done.stdout)
    child = store.manifest(told["version"])
    assert store.aliases("kronos-demo")[CANDIDATE] == child.version
    assert store.aliases("kronos-demo")[PRODUCTION] == parent.version
    assert [child.files[name] for name in (CONFIG, WEIGHTS)] == [parent.files[name] for name in (CONFIG, WEIGHTS)]
    assert (child.origin.kind, child.origin.revision) == ("child", parent.version)
    assert child.training == parent.training
    assert (child.chose_by_val, parent.chose_by_val) == (True, False)
    chosen = {name.removeprefix("serving."): value for name, value in told["best"].items()}
    assert child.serving == {"samples": 4, "top_p": 0.9, **chosen}

    selected, test = child.selected_on, child.evaluation("test")
    assert selected is not None
    assert test is not None
    assert selected.settings == told["best"]
    assert (selected.trials, selected.horizon, selected.interval) == (2, 4, "1d")
    assert selected.before == f"kronos-demo@{parent.version}"
    assert selected.symbols == ("AAPL", "GOOG", "GSPC", "IXIC", "MSFT")  # IBM is unseen, FB was not listed yet
    decision = told["decision"]
    assert [selected.gain, selected.low, selected.p_value] == [decision[key] for key in ("gain", "low", "p_value")]
    assert 0 < selected.low < selected.gain < selected.high
    days = [selected.search_start, selected.search_end, selected.decision_start, selected.decision_end, test.start]
    assert days == sorted(days)
    assert days[0] >= "2009-01-01"
    assert days[3] < "2010-06-01"

    assert test.samples == 4  # as it serves, not as the recipe evaluates
    assert test.metrics["mae_log_return"].value < (test.metrics["mae_log_return"].base or 0)
    _, _, lookback, sampling, aggregate = load_forecaster(store, told["version"])
    assert (lookback, sampling.samples, aggregate) == (chosen["lookback"], 4, chosen["aggregate"])
    report = Path(told["report"]).read_text()
    assert f"{selected.gain:+.2%}" in report
    assert report.count("<svg viewBox") == 4  # trials in order, the decision, two settings

    again = command(SHORT)  # there is nothing left to do
    assert (again.exit_code, store.versions("kronos-demo")[-1]) == (0, child.version)
    assert f"store promote {told['version']}" in again.stdout


def test_candles_that_the_version_was_trained_on_decide_nothing(
    command: Callable[..., Result], put_served: Callable[..., Manifest]
) -> None:
    put_served(until="2009-06-01")
    done = command(SHORT)
    assert done.exit_code == 1
    assert "was trained on candles up to 2009-06-01" in done.output


def test_without_better_settings_the_command_says_so_and_ends_with_a_code_of_its_own(
    store: ModelStore, command: Callable[..., Result], put_served: Callable[[], Manifest]
) -> None:
    served = put_served()
    done = command(LONG)
    assert done.exit_code == candlecast.NOTHING_KEPT
    assert "nothing is kept: none of 2 trials was better than the current settings" in done.stdout
    assert store.aliases("kronos-demo").keys() == {PRODUCTION, "previous"}
    assert store.aliases("kronos-demo")[PRODUCTION] == served.version


def test_settings_from_elsewhere_are_the_first_trial_and_must_prove_themselves(
    command: Callable[..., Result], put_served: Callable[[], Manifest], tmp_path: Path
) -> None:
    put_served()
    (tmp_path / "AAPL.json").write_text(json.dumps({"config": {"max_context": 4, "clip": 2.0, "aggregate": "p40"}}))
    done = command(LONG, "--trials", "1", "--try", str(tmp_path / "AAPL.json"), "--json")
    assert "AAPL.json: not tried" in done.stderr
    assert "clip, serving.aggregate" in done.stderr
    [told] = json.loads(done.stdout)
    assert told["best"] == {"serving.lookback": 4}
    assert told["kept"] == (done.exit_code == 0)
    assert told["decision"] is not None


@pytest.mark.long
def test_two_workers_find_what_one_does(store: ModelStore, put_served: Callable[[], Manifest], home: Path) -> None:
    put_served()
    plan = Plan(trials=2, stride=20, horizon=2)
    alone = next(tune_version("kronos-demo", store, ignore, home, plan, space=LONG))
    (home / "tune").rename(home / "alone")
    both = next(tune_version("kronos-demo", store, ignore, home, replace(plan, workers=2), space=LONG))
    assert [(trial.params, trial.intermediate_values) for trial in both.found.trials] == [
        (trial.params, trial.intermediate_values) for trial in alone.found.trials
    ]
    assert both.found.current == alone.found.current


def test_each_symbol_has_a_search_and_a_version_of_its_own_and_they_share_the_risk(
    store: ModelStore, put_served: Callable[[], Manifest], home: Path, sample_folder: Path, tmp_path: Path
) -> None:
    put_served()
    plan = Plan(trials=1, stride=2, horizon=2)
    folder = copytree(sample_folder, tmp_path / "folder")
    rows = (folder / "AAPL.csv").read_text().splitlines(keepends=True)
    (folder / "NEW.csv").write_text("".join([rows[0], *(row for row in rows if "2009-01" < row[:7] < "2009-07")]))
    told: list[str] = []
    found = tune_version("kronos-demo", store, ignore, home, plan, folder, SHORT, per_symbol=True, warn=told.append)
    tuned = [next(found), next(found)]
    [left_out] = told
    assert left_out.startswith("NEW: left out, ")
    assert [each.found.decision.confidence for each in tuned if each.found.decision] == [pytest.approx(0.99)] * 2
    for each, symbol in zip(tuned, ("AAPL", "GOOG"), strict=True):
        assert each.manifest is not None, each.sentence
        assert each.manifest.symbol == symbol
        assert each.manifest.selected_on is not None
        assert each.manifest.selected_on.symbols == (symbol,)
        assert each.promotable.endswith(f" --symbol {symbol}")
    assert CANDIDATE not in store.aliases("kronos-demo")


def test_better_training_settings_become_a_candidate_with_the_weights_that_were_decided_about(
    store: ModelStore, sample_folder: Path, home: Path
) -> None:
    search = '[search]\n"serving.lookback" = { choices = [3, 5] }\n"phases.predictor.steps" = { low = 2, high = 3 }\n'
    text = small_recipe("kronos", sample_folder, search, steps=2, horizon=4, anchor="false")
    recipe = parse_recipe(text.replace("[network]\ncontext = 64", "[network]\ncontext = 128"))
    tuned = tune_recipe(recipe, store, ignore, home, PLAN)
    assert tuned.found.winner is not None, tuned.sentence
    manifest = tuned.manifest
    assert manifest is not None
    assert store.aliases("kronos-demo")[CANDIDATE] == manifest.version != store.aliases("kronos-demo")[PRODUCTION]
    assert manifest.training is not None
    assert manifest.selected_on is not None
    trained = Recipe.model_validate(manifest.training.recipe)
    assert manifest.selected_on.settings == tuned.found.winner
    assert trained == trained.with_settings(tuned.found.winner)
    assert manifest.serving["lookback"] == tuned.found.winner["serving.lookback"]
    assert manifest.training.steps == 2 + trained.phases["predictor"].steps
    assert manifest.selected_on.before == "kronos-demo.toml"
    assert {each.windows for each in manifest.evaluations} == {"test", "unseen"}
    assert not (tuned.report.parent / "runs").exists()


def test_a_search_of_what_the_recipe_lacks_or_is_judged_by_is_refused(sample_folder: Path) -> None:
    for name, knob, told in (
        ("phases.network.rate", "low = 1e-6, high = 1e-5", "no setting 'phases.network.rate'"),
        ("split.val_from", "choices = [1, 2]", "no setting 'split.val_from'"),
        ("phases.network.clip", "low = -1.0, high = 1.0", "greater than 0"),
        ("serving.top_p", "low = 0.5, high = 0.9", "top_p would change nothing here"),
        ("phases.network.steps", "low = 5, high = 2", "goes up from low"),
    ):
        with pytest.raises(ValueError, match=told):
            parse_recipe(small_recipe("toto", sample_folder, f'[search]\n"{name}" = {{ {knob} }}'))

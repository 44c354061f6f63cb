"""The command line as a user types it: candles, two tiny trainings, evaluation, forecast, store, service.

In this process where that shows no difference: to load torch takes longer than what most verbs do.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from candlecast import main
from tests.conftest import write_short_recipes

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"

Candlecast = Callable[..., Result]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def environment(place: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("CANDLECAST_")}
    return own | {
        "CANDLECAST_STORE_ROOT": str(place / "store"),
        "CANDLECAST_HOME": str(place / "home"),
        "CANDLECAST_PORT": "0",
        "CANDLECAST_ADMIN_PORT": "0",
    }


@pytest.fixture(scope="module")
def candlecast(place: Path, environment: dict[str, str]) -> Candlecast:
    others = {name: None for name in os.environ if name.startswith("CANDLECAST_")}

    def run(*words: str) -> Result:
        with contextlib.chdir(place):
            return CliRunner().invoke(main, words, env=others | environment)

    return run


@pytest.fixture(scope="module")
def trained(place: Path, candlecast: Candlecast) -> dict[str, dict[str, Any]]:
    """Manifests of the two demo recipes, cut down to a few steps."""
    assert candlecast("sample-data", "--json").exit_code == 0
    write_short_recipes(place)
    names = ("toto-demo", "kronos-demo")
    done = candlecast("train", *(f"{name}.toml" for name in names), "--json")
    assert done.exit_code == 0, done.stderr
    return {name: json.loads(line) for name, line in zip(names, done.stdout.splitlines(), strict=True)}


def test_training_publishes_a_version_with_its_scores(trained: dict[str, dict[str, Any]]) -> None:
    for manifest in trained.values():
        assert {e["windows"] for e in manifest["evaluations"]} == {"test", "unseen"}
        for evaluation in manifest["evaluations"]:
            for metric in ("mae_log_return", "skill_vs_naive", "coverage_80", "crps"):
                assert evaluation["metrics"][metric]["naive"] is not None
        assert "IBM" not in manifest["training"]["symbols"]
        assert manifest["training"]["end"] < "2009-01-01"
        assert manifest["baselines"]


def test_training_again_with_if_missing_trains_nothing(candlecast: Candlecast, trained: Any) -> None:
    done = candlecast("train", "toto-demo.toml", "--if-missing", "--json")
    assert json.loads(done.stdout)["version"] == trained["toto-demo"]["version"]


def test_store_lists_shows_and_verifies(candlecast: Candlecast, trained: Any) -> None:
    rows = json.loads(candlecast("store", "list", "--json").stdout)
    assert {row["model"].split("@")[0] for row in rows} == {"toto-demo", "kronos-demo"}
    assert all(row["aliases"] == "candidate,production" for row in rows)
    assert json.loads(candlecast("store", "show", "toto-demo", "--json").stdout) == trained["toto-demo"]
    assert "skill" in candlecast("store", "show", "toto-demo").stdout
    assert candlecast("store", "verify", "kronos-demo").exit_code == 0
    assert candlecast("store", "promote", "kronos-demo", "--force", "a test").exit_code == 0


def test_verify_waits_for_a_version_that_another_process_stores(
    trained: dict[str, dict[str, Any]], place: Path, environment: dict[str, str]
) -> None:
    command = [sys.executable, str(ROOT / "candlecast.py"), "store", "verify", "toto-demo", "kronos-demo", "--json"]
    command += ["--wait", "60", "--store", str(place / "late")]
    waiting = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert waiting.stderr is not None
        assert "the store has no toto-demo@production" in waiting.stderr.readline()
        shutil.copytree(place / "store", place / "copied")
        (place / "copied").rename(place / "late")  # whole at once, as a version comes
        told, _ = waiting.communicate(timeout=60)
    finally:
        waiting.kill()
    assert waiting.returncode == 0
    assert [json.loads(line)["version"] for line in told.splitlines()] == [each["version"] for each in trained.values()]


@pytest.mark.usefixtures("trained")
def test_verify_fails_when_any_of_its_versions_is_damaged(candlecast: Candlecast, place: Path) -> None:
    shutil.copytree(place / "store", place / "damaged")
    (weights,) = (place / "damaged" / "kronos-demo").glob("*/weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    done = candlecast("store", "verify", "toto-demo", "kronos-demo", "--wait", "60", "--store", str(place / "damaged"))
    assert done.exit_code == 1
    assert "kronos-demo" in done.stderr


@pytest.mark.usefixtures("trained")
def test_data_check_prints_writes_and_fails_only_if_a_file_is_unreadable(candlecast: Candlecast, place: Path) -> None:
    words = ("--val-from", "2009-01-01", "--test-from", "2010-06-01", "--unseen", "IBM")
    done = candlecast("data", "check", *words)
    assert done.exit_code == 0, done.stderr
    assert "IBM (unseen)" in done.stdout
    assert "nothing to train on" in done.stdout  # a warning
    assert len((place / "data_summary.csv").read_text().splitlines()) == 8
    (place / "broken").mkdir()
    (place / "broken" / "AAPL.csv").write_text("no candles\n")
    done = candlecast("data", "check", "broken", "--json", "--summary", "broken.csv")
    assert done.exit_code == 1
    assert "broken/AAPL.csv has no timestamp column" in done.stderr
    assert json.loads(done.stdout)["unreadable"] == ["broken/AAPL.csv has no timestamp column; it has no candles"]


@pytest.mark.usefixtures("trained")
def test_training_refuses_folders_that_overlap_in_time(candlecast: Candlecast) -> None:
    roots = ("--train-root", "data/samples", "--test-root", "data/samples")
    done = candlecast("train", "toto-demo.toml", *roots)
    assert done.exit_code == 1
    assert "training would have seen what it is judged by" in done.stderr
    assert "go together" in candlecast("train", "toto-demo.toml", *roots[:2]).stderr


@pytest.mark.usefixtures("trained")
def test_forecast_prints_a_table_and_draws_the_fan(candlecast: Candlecast, place: Path) -> None:
    done = candlecast("forecast", "aapl", "--model", "kronos-demo", "--plot", "aapl.png", "--horizon", "5")
    assert done.exit_code == 0, done.stderr
    assert "2013-03-04" in done.stdout  # the Monday after the last candle
    assert (place / "aapl.png").read_bytes().startswith(PNG)
    rows = json.loads(candlecast("forecast", "AAPL", "--horizon", "5", "--json").stdout)["forecast"]
    assert len(rows) == 5


@pytest.mark.usefixtures("trained")
def test_evaluate_scores_models_side_by_side_on_the_same_origins(candlecast: Candlecast) -> None:
    words = ("evaluate", "--models", "toto-demo,kronos-demo", "--stride", "400", "--samples", "8", "--json")
    entries = json.loads(candlecast(*words).stdout)
    assert [entry["model"].split("@")[0] for entry in entries] == ["toto-demo", "kronos-demo", "naive", "ewma"]
    assert len({entry["origins"] for entry in entries}) == 1
    assert len({entry["metrics"]["mae_log_return"]["naive"] for entry in entries}) == 1


@pytest.mark.usefixtures("trained")
def test_evaluate_writes_a_page_and_every_metric_of_both_parts(candlecast: Candlecast, place: Path) -> None:
    words = ("evaluate", "--models", "toto-demo", "--baselines", "drift,autoets", "--part", "test", "--part", "unseen")
    done = candlecast(*words, "--stride", "400", "--horizon", "5", "--out", "report")
    assert done.exit_code == 0, done.stderr
    assert "report/report.html" in done.stderr
    assert re.search(r"^ autoets", done.stdout, re.MULTILINE)
    evaluations = json.loads((place / "report" / "metrics.json").read_text())["evaluations"]
    assert [e["windows"] for e in evaluations] == ["test"] * 3 + ["unseen"] * 3
    assert {e["horizon"] for e in evaluations} == {5}
    assert "Unseen windows" in (place / "report" / "report.html").read_text()
    refused = candlecast("evaluate", "--models", "toto-demo", "--baselines", "arima")
    assert "no baseline is called 'arima'" in refused.stderr


@pytest.mark.long
@pytest.mark.usefixtures("trained")
def test_two_replays_give_the_same_numbers_and_a_table(candlecast: Candlecast) -> None:
    words = ("replay", "data/samples", "--from", "2018-01-01", "--every", "60", "--horizon", "8")
    first, second = (candlecast(*words, "--json") for _ in range(2))
    assert first.exit_code == 0, first.stderr
    assert first.stdout == second.stdout
    told = json.loads(first.stdout)
    assert 300 < told["candles"] <= 2 * 260
    assert sorted(told["series"]) == ["GSPC:1d", "IXIC:1d"]
    assert {each["model"] for each in told["models"]} == {"toto-demo", "kronos-demo", "auto"}
    table = candlecast(*words, "--speed", "max")
    assert "candles of all symbols a second" in table.stdout
    assert "kronos-demo" in table.stdout
    assert "--speed is `max` or a number" in candlecast("replay", "--speed", "fast").stderr


@pytest.mark.usefixtures("trained")
def test_evaluating_on_candles_a_model_was_trained_on_is_refused(candlecast: Candlecast) -> None:
    done = candlecast("evaluate", "--models", "toto-demo", "--val-from", "2005-01-01")
    assert done.exit_code == 1
    assert "was trained on candles up to" in done.stderr
    done = candlecast("evaluate", "--models", "toto-demo", "--unseen", "AAPL", "--part", "unseen")
    assert "trained on AAPL" in done.stderr


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("forecast", "TSLA"), "it has: AAPL"),
        (("forecast", "AAPL", "--model", "nobody"), "no nobody@production"),
        (("store", "verify", "toto-demo@000000000000"), "toto-demo@000000000000"),
        (("train", "nowhere.toml"), "does not exist"),
        (("forecast", "AAPL", "--model", "kronos-demo", "--horizon", "200"), "126 steps at most"),
        (("forecast", "AAPL", "--model", "toto-demo", "--horizon", "600"), "512 steps at most"),
        (
            ("export", "toto-demo", "--runtime", "onnx", "--dtype", "bfloat16"),
            "onnx has no bfloat16: use eager-float32",
        ),
        (("export", "toto-demo", "--runtime", "eager"), "eager-float32 needs no export"),
        (("export", "nobody", "--runtime", "eager", "--dtype", "bfloat16"), "no nobody@production"),
    ],
)
def test_errors_are_one_line_that_says_what_is_missing(
    candlecast: Candlecast, words: tuple[str, ...], said: str
) -> None:
    done = candlecast(*words)
    assert done.exit_code in (1, 2)
    assert said in done.stderr
    assert isinstance(done.exception, SystemExit)  # anything else is a traceback


@pytest.mark.long
def test_export_says_how_far_it_is_from_float32_and_timing_chooses(
    candlecast: Candlecast, trained: dict[str, dict[str, Any]]
) -> None:
    words = ("export", "toto-demo", "--runtime", "eager", "--dtype", "bfloat16", "--windows", "8")
    done = candlecast(*words, "--json")
    assert done.exit_code == 0, done.stderr
    artefact = json.loads(done.stdout)
    assert (artefact["runtime"], artefact["dtype"]) == ("eager", "bfloat16")
    assert artefact["parity"]["mae_log_return_float32"] > 0
    again = candlecast(*words).stdout
    assert "0.9 quantile moved by" in again
    assert json.loads(candlecast(*words, "--json").stdout) == artefact

    exact = f"toto-demo@{trained['toto-demo']['version']}"
    choice = json.loads(candlecast("models", "time", "toto-demo", "--json").stdout)[exact]
    assert set(choice["times_ms"]) == {"eager-float32", "eager-bfloat16"}
    assert choice["label"] in choice["times_ms"]
    assert "ms alone" in candlecast("models", "time").stdout


@pytest.mark.usefixtures("trained")
def test_service_answers_both_models_from_the_loaded_history(place: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, str(ROOT / "candlecast.py"), "serve", "--load", "data/samples", "--json"]
    service = subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert service.stdout is not None
        line = service.stdout.readline()
        assert line, service.stderr and service.stderr.read()
        url = json.loads(line)["url"]
        for model, horizon in (("kronos", 30), ("toto", 64)):
            first, again = (_post(f"{url}/forecast/AAPL", {"model": model, "seed": 1}) for _ in range(2))
            assert len(first["forecast"]) == horizon
            assert first["calendar"] == "XNYS"
            assert first["forecast"] == again["forecast"]
            assert first["quantiles"] == again["quantiles"]
            assert "stale_history" in first["reasons"]
    finally:
        service.send_signal(signal.SIGTERM)
        _, errors = service.communicate(timeout=30)
    assert service.returncode in (0, -signal.SIGTERM), errors


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)

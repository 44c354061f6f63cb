"""`candlecast forecasts export`: what was served by an instant, and nothing that was known later."""

import json
import time
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner, Result

from bench.service import put_version
from candlecast import main
from feeds.forecasts import COLUMNS
from model_store.store import ModelStore

HOUR = 3_600_000


@pytest.fixture(scope="module")
def served(url: str, environment: dict[str, str]) -> dict[str, Any]:
    """Two forecasts of one symbol with an hour of its candles and two seconds between them, and one of another."""
    store = ModelStore(Path(environment["CANDLECAST_STORE_ROOT"]))
    put_version(store, "naive", "naive", {"family": "naive"}, {})
    last = int(time.time() * 1000) // HOUR * HOUR - HOUR
    rows = [[last - HOUR * back, 10.0, 11.0, 9.0, 10.0 + back % 5 / 8, 1.0] for back in range(40)][::-1]
    answers = {}
    for symbol, stop in (("EXP-1", 39), ("EXP-1", 40), ("EXP-2", 40)):
        _send(url, "PUT", f"/candles/{symbol}", {"interval": "1h", "candles": rows[:stop]})
        asked = {"model": "naive", "horizon": 5, "cache": "bypass"}
        answers[symbol, stop] = _send(url, "POST", f"/forecast/{symbol}", asked)
        time.sleep(2)  # issues are kept to the second
    return answers


def _send(url: str, method: str, path: str, body: Any) -> Any:
    content, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, content, headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture
def export(url: str, tmp_path: Path) -> Callable[..., tuple[Result, pd.DataFrame]]:
    def run(*words: str) -> tuple[Result, pd.DataFrame]:
        path = tmp_path / "forecasts.parquet"
        done = CliRunner().invoke(main, ["forecasts", "export", str(path), *words, "--url", url])
        assert done.exit_code == 0, done.stderr
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
        return done, pd.read_parquet(path)

    return run


def test_the_columns_are_those_that_bots_read(served: Any, export: Any) -> None:
    done, table = export("--symbols", "EXP-1", "--json")
    assert list(table.columns) == list(COLUMNS)
    assert json.loads(done.stdout)["rows"] == len(table) == 4 + 5  # the first step of the first came before it
    newest = table[table["timestamp"] == table["timestamp"].max()]
    answer = served["EXP-1", 40]
    assert newest["horizon"].tolist() == [1, 2, 3, 4, 5]
    assert _millis(newest["target_timestamp"]) == [row[0] for row in answer["forecast"]]
    assert newest["predicted_close_p50"].tolist() == pytest.approx(answer["quantiles"]["close"]["0.5"])
    assert newest["predicted_high_p50"].tolist() == pytest.approx(answer["quantiles"]["high"]["0.5"])
    assert _millis(newest["issued_at"]) == [-(-answer["issued_at"] // 1000) * 1000] * 5
    assert set(table["interval"]) == {"1h"}
    assert table["model"].str.startswith("naive@").all()


def test_an_earlier_instant_knows_nothing_of_later_forecasts(served: Any, export: Any) -> None:
    instant = datetime.fromtimestamp(served["EXP-1", 39]["issued_at"] / 1000 + 1, UTC)
    _, table = export("--as-of", instant.isoformat())
    mine = table[table["symbol"].str.startswith("EXP-")]
    assert set(mine["symbol"]) == {"EXP-1"}
    assert len(set(mine["timestamp"])) == 1
    assert (mine["issued_at"] <= instant).all()
    _, none = export("--as-of", "2020-01-01T00:00Z")
    assert none.empty
    assert list(none.columns) == list(COLUMNS)


@pytest.mark.usefixtures("served")
def test_all_symbols_are_written_by_default(export: Any) -> None:
    done, table = export()
    assert {"EXP-1", "EXP-2"} <= set(table["symbol"])
    assert "steps of" in done.stdout


@pytest.mark.usefixtures("served")
def test_symbols_are_written_as_the_service_takes_them(export: Any) -> None:
    _, table = export("--symbols", "exp/1, exp:2")
    assert set(table["symbol"]) == {"EXP-1", "EXP-2"}


@pytest.mark.usefixtures("served")
def test_a_symbol_that_is_not_stored_is_told_and_nothing_is_written(url: str, tmp_path: Path) -> None:
    path = tmp_path / "forecasts.parquet"
    words = ["forecasts", "export", str(path), "--symbols", "EXP-1,nope/x", "--url", url]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    assert done.stderr == "Error: no candles of NOPE-X are stored; GET /symbols lists what is\n"
    assert list(tmp_path.iterdir()) == []


def _millis(times: Any) -> list[int]:
    return [int(each.timestamp() * 1000) for each in times]

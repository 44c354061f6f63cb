"""Rows of the table measured on networks so small that it takes seconds: every part runs, no number matters."""

import json

import pytest
from click.testing import CliRunner

from bench import capacity, curves, evaluation, floor, forecasts, http
from bench.__main__ import MEASURES, main
from bench.facts import header, machine_facts
from bench.printed import print_report
from bench.published import KRONOS, TOTO_TINY
from bench.rows import Curve, Row
from bench.run import measure
from bench.workbench import Workbench

SMALL = {"n_layers": 1, "d_model": 64, "n_heads": 4, "ff_dim": 64}
KRONOS_TINY = {**KRONOS["mini"], "predictor": KRONOS["mini"]["predictor"] | SMALL}


@pytest.fixture(scope="module")
def bench():
    with Workbench(pace=0.01, kronos_config=KRONOS_TINY, toto_network=TOTO_TINY, exported={}) as bench:
        yield bench


@pytest.mark.long
def test_a_forecast_is_timed_beside_the_reference(bench):
    [row] = forecasts.kronos_one_path(bench)
    assert row.reached > 0
    assert set(row.detail["milliseconds"]) == {"reference", "eager float32"}
    assert (row.detail["runtime"], row.detail["dtype"]) == ("eager", "float32")
    low, high = row.detail["interval"]
    assert low <= row.reached <= high


def test_quantiles_in_a_hurry_are_held_to_as_many_samples_as_were_drawn(bench):
    [row] = forecasts.toto_quantiles(bench)
    assert row.against == "reference, 16 samples"
    assert row.reach == 500 * 16 / 256


@pytest.mark.parametrize(
    "take",
    [
        evaluation.toto,
        pytest.param(evaluation.kronos, marks=pytest.mark.long),
        pytest.param(evaluation.tuning, marks=pytest.mark.long),
    ],
)
def test_windows_of_a_core_are_counted_beside_the_references_loop(bench, take):
    [row] = take(bench)
    assert (row.detail["windows"], set(row.detail["per_second"])) == (16, {"reference", "eager float32"})
    low, high = row.detail["interval"]
    assert 0 < low <= row.reached <= high


def test_engine_is_timed_beside_its_floor(bench):
    for [row] in (floor.kronos_floor(bench, symbols=2, paths=4), floor.toto_floor(bench)):
        assert row.reached > 1
        assert row.detail["floor_gflop"] > 0


def test_a_curve_has_a_time_for_every_value(bench):
    [curve] = curves.curve_of_context(bench)
    assert curve.values == [64, 1024, 4096]
    assert all(len(times) == 3 for times in curve.milliseconds.values())


@pytest.mark.long
def test_service_is_measured_over_http(bench):
    middle, worst = http.overhead(bench)
    assert 0 < middle.reached <= worst.reached
    assert middle.detail["requests"] > 0


@pytest.mark.long
def test_a_watched_forecast_is_asked_for(bench):
    [row] = http.latest(bench)
    assert 0 < row.detail["latency_ms"]["p50"] <= row.reached
    assert row.detail["bytes"] > 0


@pytest.mark.long
def test_capacity_is_measured_of_two_replicas_a_load_and_redis(bench):
    rows = list(capacity.replicas(bench))
    assert len(rows) == 4
    assert all(set(row.detail["per_second"]) == {"one replica", "two replicas", "a core's time"} for row in rows)
    assert all(row.detail["megabytes"]["grown"] > 0 for row in capacity.memory(bench))
    memory, *spent = capacity.redis(bench)
    assert memory.detail["kilobytes per symbol"]["candles"] * 1e3 > 2000 * 56
    assert memory.detail["kilobytes per symbol"]["forecast"] * 1e3 > 64 * 52
    assert all(row.detail["commands"] > 1 for row in spent)


def test_a_measurement_that_fails_loses_no_other_and_is_shown(capsys):
    def fail(_):
        raise RuntimeError("no measurement")

    def succeed(_):
        return [Row("work", "against", 3.0, 2.0, "higher", "×"), Curve("title", "paths", [1], {"eager float32": [0.5]})]

    report = measure(Workbench(), {"broken": fail, "sound": succeed}, {})
    assert [row.work for row in report.rows] == ["work"]
    assert [failure.error for failure in report.failures] == ["RuntimeError: no measurement"]
    print_report(report)
    printed = capsys.readouterr().out
    assert "reached" in printed
    assert "FAILED broken: RuntimeError: no measurement" in printed


@pytest.mark.parametrize("fails", [False, True])
def test_exit_status_tells_whether_everything_was_measured(monkeypatch, tmp_path, fails):
    def take(_):
        if fails:
            raise RuntimeError("no")
        return [Row("work", "against", 3.0, 2.0, "higher", "×")]

    monkeypatch.setitem(MEASURES, "start", take)
    result = CliRunner().invoke(main, ["--only", "start", "--results", str(tmp_path)])
    assert result.exit_code == int(fails)
    [path] = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert len(content["rows"]) == 1 - fails
    assert content["machine"]["cores"] > 0


def test_facts_name_neither_host_nor_folder():
    import socket
    from pathlib import Path

    told = json.dumps(machine_facts("cpu")) + header(machine_facts("cpu"))
    assert socket.gethostname() not in told
    assert str(Path.cwd()) not in told

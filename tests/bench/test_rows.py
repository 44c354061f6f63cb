"""What a row claims and what stands in the file that trackers read."""

import json

import pytest

from bench.rows import Curve, Failure, Report, Row


def row(reached, better, reach=2.0):
    return Row("work", "against", reached, reach, better, "×", {"runtime": "eager", "dtype": "float32"})


@pytest.mark.parametrize(
    ("reached", "better", "verdict"),
    [(2.0, "higher", "reached"), (1.9, "higher", "missed"), (2.0, "lower", "reached"), (2.1, "lower", "missed")],
)
def test_verdict_follows_the_direction(reached, better, verdict):
    assert row(reached, better).verdict == verdict


def test_a_number_that_is_none_is_no_row():
    with pytest.raises(ValueError, match="not a measurement"):
        row(float("nan"), "higher")


@pytest.mark.parametrize(
    ("reached", "shown"), [(1234.6, "1235×"), (12.345, "12.3×"), (0.01234, "0.0123×"), (3.0, "3×")]
)
def test_numbers_are_shown_without_an_exponent(reached, shown):
    assert row(reached, "higher").shown() == (shown, "≥ 2×")


def test_file_holds_the_rows_and_what_failed(tmp_path):
    curve = Curve("title", "paths", [1, 4], {"eager float32": [0.5, 0.7]})
    report = Report({"cpu": "a processor"}, [row(3.0, "higher")], [curve], [Failure("http", "no")])
    path = report.write(tmp_path / "results", "2025-01-01-cpu")
    content = json.loads(path.read_text())
    assert path.name == "2025-01-01-cpu.json"
    assert content["machine"] == {"cpu": "a processor"}
    assert {"work": "work", "reached": 3.0, "reach": 2.0, "better": "higher"}.items() <= content["rows"][0].items()
    assert content["rows"][0]["verdict"] == "reached"
    assert content["curves"][0]["milliseconds"] == {"eager float32": [0.5, 0.7]}
    assert content["failures"] == [{"name": "http", "error": "no"}]

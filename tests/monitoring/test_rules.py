"""Prometheus' and Alertmanager's own tools read what is in monitoring/; every alert is tried and has a runbook."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from service.metrics import Metrics
from tests.monitoring.conftest import MONITORING, RULES, check

TRIALS = sorted((MONITORING / "rules" / "tests").glob("*.yml"))
RUNBOOKS = (MONITORING / "RUNBOOKS.md").read_text()
FIRING = re.compile(r'count\(ALERTS\{alertname="(\w+)",alertstate="firing"\}\)')


def groups(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((MONITORING / "rules" / name).read_text())["groups"]
    return found


ALERTS = {rule["alert"]: rule for group in groups("alerts.yml") for rule in group["rules"]}


def test_the_tools_accept_the_configurations_and_rules() -> None:
    check("promtool", "check", "config", str(MONITORING / "prometheus.yml"))
    check("promtool", "check", "rules", "--lint=all", "--lint-fatal", *map(str, RULES))
    check("amtool", "check-config", str(MONITORING / "alertmanager.yml"))


@pytest.mark.parametrize("trial", TRIALS, ids=lambda path: path.stem)
def test_alerts_fire_and_stay_silent_as_they_should(trial: Path) -> None:
    check("promtool", "test", "rules", str(trial))


def test_every_alert_is_tried_both_ways() -> None:
    seen: dict[str, set[bool]] = defaultdict(set)
    for trial in TRIALS:
        for case in yaml.safe_load(trial.read_text())["tests"]:
            for expected in case["promql_expr_test"]:
                match = FIRING.fullmatch(expected["expr"])
                assert match, expected
                seen[match[1]].add(bool(expected["exp_samples"]))
    assert seen.pop("CandlecastWatchdog") == {True}  # it is never silent
    assert seen == {name: {True, False} for name in ALERTS if name != "CandlecastWatchdog"}


@pytest.mark.parametrize(
    ("alert", "key", "trial"),
    [
        ("CandlecastRedisDown", "for", "service"),
        ("CandlecastRedisDown", "keep_firing_for", "service"),
        ("CandlecastModelDrift", "for", "quality"),
        ("CandlecastModelDrift", "keep_firing_for", "quality"),
        ("CandlecastSymbolDrift", "keep_firing_for", "quality"),
    ],
)
def test_an_alert_that_flaps_would_be_noticed(alert: str, key: str, trial: str, tmp_path: Path) -> None:
    cases = yaml.safe_load((MONITORING / "rules" / "tests" / f"{trial}.yml").read_text())
    cases["rule_files"] = ["alerts.yml"]
    cases["tests"] = [case for case in cases["tests"] if f'"{alert}"' in str(case)]
    (tmp_path / "trial.yml").write_text(yaml.safe_dump(cases))
    rule = {name: value for name, value in ALERTS[alert].items() if name != key}
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump({"groups": [{"name": "flapping", "rules": [rule]}]}))
    with pytest.raises(AssertionError, match=alert):
        check("promtool", "test", "rules", str(tmp_path / "trial.yml"))


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_says_what_it_means_and_what_to_do(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("page", "ticket", "none")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"monitoring/RUNBOOKS.md#{alert.lower()}"
    assert f"\n## {alert}\n" in RUNBOOKS


def test_no_runbook_is_of_an_alert_that_is_gone() -> None:
    assert set(re.findall(r"^## (\w+)$", RUNBOOKS, re.MULTILINE)) == set(ALERTS)


def test_the_latency_objective_is_a_bound_of_the_histogram() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.http_seconds.labels("/forecast/{symbol}", "POST")
    bounds = set(re.findall(r'duration_seconds_bucket\{le="([^"]+)"', generate_latest(metrics.registry).decode()))
    rules = (MONITORING / "rules" / "recording.yml").read_text()
    [objective] = set(re.findall(r'le="([^"]+)"', rules.partition("groups:")[2]))
    assert objective in bounds


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        ("alertname=CandlecastWatchdog severity=none", "nobody"),
        ("alertname=CandlecastRedisDown severity=page", "team"),
        ("alertname=CandlecastModelDrift severity=ticket", "team"),
    ],
)
def test_alerts_reach_whom_they_should(labels: str, receiver: str) -> None:
    config = str(MONITORING / "alertmanager.yml")
    check(
        "amtool",
        "config",
        "routes",
        "test",
        f"--config.file={config}",
        f"--verify.receivers={receiver}",
        *labels.split(),
    )


def test_inhibition_names_alerts_that_exist() -> None:
    rules = yaml.safe_load((MONITORING / "alertmanager.yml").read_text())["inhibit_rules"]
    assert set(re.findall(r"Candlecast\w+", str(rules))) <= set(ALERTS)

"""The dashboards: current, complete, drawn without overlap, and of metrics that exist."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring.dashboards import DASHBOARDS, FOLDER, Dashboard, as_json
from service.app import build_services
from service.settings import Settings
from tests.monitoring.conftest import RULES, check

NAME = re.compile(r"(?<![:\w])(?:candlecast|process|python)_[a-z0-9_]+(?![:\w])")
UNITS = {"reqps", "s", "percentunit", "none", "short", "cps", "ops", "bytes"}
NOT_SHOWN = {
    "python_gc_objects_collected",
    "python_gc_objects_uncollectable",
    "process_virtual_memory_bytes",
}
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",), "info": ("_info",)}

by_name = pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda each: each.uid)


def loaded(dashboard: Dashboard) -> Any:
    return json.loads(as_json(dashboard))


def expressions() -> list[str]:
    """Every expression of every panel, Grafana's variables replaced."""
    panels = [panel for each in DASHBOARDS for panel in loaded(each)["panels"]]
    found = [target["expr"] for panel in panels for target in panel["targets"]]
    return [re.sub(r"\$(instance|model|interval|steps|symbol)\b", ".*", expr) for expr in found]


@by_name
def test_the_files_are_what_the_tables_say(dashboard: Dashboard) -> None:
    path = FOLDER / f"{dashboard.uid.removeprefix('candlecast-')}.json"
    assert path.read_text() == as_json(dashboard), "run make dashboards"


def test_no_file_is_left_over() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {each.uid.removeprefix("candlecast-") for each in DASHBOARDS}


@by_name
def test_every_panel_says_what_it_shows(dashboard: Dashboard) -> None:
    for panel in loaded(dashboard)["panels"]:
        assert panel["title"], panel
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert "<" not in re.sub(r"<(?= )", "", target["expr"]), target["expr"]


@by_name
def test_panels_have_a_place_and_a_name_of_their_own(dashboard: Dashboard) -> None:
    panels = loaded(dashboard)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    taken = set()
    for place in (panel["gridPos"] for panel in panels):
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        assert columns.stop <= 24
        cells = set(itertools.product(columns, rows))
        assert not cells & taken
        taken |= cells


@by_name
def test_every_variable_is_used_and_every_one_used_exists(dashboard: Dashboard) -> None:
    model = loaded(dashboard)
    exprs = " ".join(target["expr"] for panel in model["panels"] for target in panel["targets"])
    used = set(re.findall(r"\$(?!__)(\w+)", exprs)) | {"datasource"}
    assert used == {variable["name"] for variable in model["templating"]["list"]}


def test_prometheus_can_parse_every_expression(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expr.replace("$__rate_interval", "5m")}
        for number, expr in enumerate(expressions())
    ]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    check("promtool", "check", "rules", str(file))


def test_every_metric_that_is_shown_exists_and_every_one_that_exists_is_shown(tmp_path: Path) -> None:
    registry = build_services(Settings(home=tmp_path, store_root=tmp_path / "store")).metrics.registry
    exists = {family.name: {family.name + end for end in SUFFIXES[family.type]} for family in registry.collect()}
    rules = [str(yaml.safe_load(path.read_text())) for path in RULES]
    variables = [str(each.variables) for each in DASHBOARDS]
    named = set(NAME.findall(" ".join([*expressions(), *rules, *variables])))
    assert named - set().union(*exists.values()) == set()
    assert {name for name, forms in exists.items() if not forms & named} == NOT_SHOWN

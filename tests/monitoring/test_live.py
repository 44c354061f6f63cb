"""The real service under load, scraped by a real Prometheus: every panel and every rule has something to say.

Two processes share one Redis: one of role api, which is loaded, and an evaluator. What the evaluator keeps score of was
played into that Redis before, candle by candle. `pytest -s` prints every panel with the value that it shows.
"""

import asyncio
import contextlib
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from bench.processes import free_port, server, wait_until_listening
from bench.published import HOUR_MS, walk
from bench.service import put_version
from model_store.store import ModelStore
from models.candles import with_amount
from models.families import build_forecaster
from monitoring.dashboards import DASHBOARDS, as_json
from service.app import build_services
from service.engine.registry import LoadedModel
from service.replay import Clock, Plan, replay, series_of
from service.settings import Settings
from tests.monitoring.conftest import MONITORING, binary, check

pytestmark = pytest.mark.long

PATIENCE = 120.0  # seconds for what takes a few on an idle machine
RATE_INTERVAL = "30s"
MAY_BE_EMPTY = {  # on a healthy machine without a GPU
    "GPU memory",
    "Redis: operations and errors: {{op}} {{kind}}",
}
SELECTOR = re.compile(r'(?<![\w:])(?:candlecast_|process_|up\b|job:)[\w:]*(?:\{(?:[^"}]|"[^"]*")*\})?')


@dataclass(frozen=True)
class Observed:
    """A loaded service as Prometheus sees it."""

    prometheus: str
    alertmanager: str
    api: Mapping[str, str]  # url and admin_url
    evaluator: Mapping[str, str]
    client: httpx.Client

    def ask(self, expr: str) -> list[tuple[str, float]]:
        """Labels and value of every series that has one now."""
        answer = self.client.get(f"{self.prometheus}/api/v1/query", params={"query": expr}).json()
        assert answer["status"] == "success", (expr, answer)
        result = answer["data"]["result"]
        if answer["data"]["resultType"] == "scalar":
            result = [{"metric": {}, "value": result}]
        pairs = [(",".join(each["metric"].values()), float(each["value"][1])) for each in result]
        return [(labels, value) for labels, value in pairs if math.isfinite(value)]

    def metrics(self, at: Mapping[str, str]) -> str:
        """What a process publishes."""
        return self.client.get(f"{at['admin_url']}/metrics").text


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.2)


def rows(count: int, seed: int) -> list[list[float]]:
    """Hourly ccxt rows; the last closed within this hour."""
    last = time.time_ns() // 1_000_000 // HOUR_MS * HOUR_MS - HOUR_MS
    prices = walk(count, seed=seed).round(4).tolist()
    return [[last - HOUR_MS * (count - 1 - place), *row[:5]] for place, row in enumerate(prices)]


def put_models(store: ModelStore, tiny: Any) -> list[str]:
    """Of random weights, with baselines that make drift of the one and not of the other."""
    found = []
    for family, rho0 in (("toto", 1.0), ("kronos", 50.0)):
        baselines = [
            {"symbol": "*", "interval": "1h", "group": group, "horizon": last, "n_blocks": 40, "rho0": rho0}
            | {"mae_log_return": 0.01 * rho0, "naive_mae_log_return": 0.01, "sd_block": 0.5, "coverage_80": 0.8}
            | {"pinball": {}}
            for group, last in enumerate((8, 30))
        ]
        config, weights = tiny[family]
        cloned = {name: tensor.clone() for name, tensor in weights.items()}
        found.append(put_version(store, f"{family}-demo", family, config, cloned, baselines=baselines))
    return found


async def play(redis_url: str, home: Path, store: ModelStore, references: list[str]) -> None:
    """Twelve days of two symbols: forecasts, and the candles that score them."""
    clock = Clock()
    parts = build_services(Settings(redis_url=redis_url, home=home, store_root=store.root), now=clock)
    found = [store.load(reference) for reference in references]
    models = [LoadedModel(it.manifest, build_forecaster(it.manifest.family, it.config, it.weights)) for it in found]
    series = []
    for seed, symbol in enumerate(("BTC", "ETH")):
        table = np.array(rows(300, seed))
        series.append(series_of(symbol, "1h", table[:, 0].astype(np.int64), with_amount(table[:, 1:])))
    await parts.state.start()
    await replay(parts, clock, models, series, Plan(start=0, every=8, horizon=12))
    await parts.state.stop()


def load(url: str) -> None:
    """Forecasts of every kind, candles, and what callers do wrong."""
    body = {"candles": rows(128, seed=5), "interval": "1h"}
    kinds: list[dict[str, Any]] = [
        {"model": "toto", "horizon": 12},
        {"model": "kronos", "horizon": 6, "samples": 4},
        {"model": "auto", "horizon": 6},
        {"model": "toto", "horizon": 6, "cache": "bypass"},
        {"model": "toto", "horizon": 6, **body},
        {"model": "nobody"},
        {"model": "toto", "candles": [[1, 2, 3, 4, 5, 6]], "interval": "1h"},
        {"model": "kronos", "horizon": 30, "samples": 64, "timeout_ms": 1, "cache": "bypass"},
    ]
    with httpx.Client(base_url=url, timeout=PATIENCE) as client, ThreadPoolExecutor(4) as callers:
        for number in range(6):
            seed = {"seed": number // 2}  # the second of each pair finds the first one's forecast
            list(callers.map(lambda asked: client.post("/forecast/BTC", json=asked | seed), kinds * 2))  # noqa: B023
            client.put(f"/candles/NEW{number % 2}", json={"interval": "1h", "candles": rows(80, number)})
            for path in ("/symbols", "/accuracy/BTC", "/forecast/BTC/latest", "/nowhere"):
                client.get(path)


def configure(folder: Path, targets: list[str], prometheus: str, alertmanager: str) -> Path:
    """monitoring/ as it is, but for addresses and how often it looks."""
    shutil.copytree(MONITORING, folder)
    path = folder / "prometheus.yml"
    config = yaml.safe_load(path.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [alertmanager]
    addresses = {"candlecast": targets, "prometheus": [prometheus]}
    for job in config["scrape_configs"]:
        job["static_configs"][0]["targets"] = addresses[job["job_name"]]
    path.write_text(yaml.safe_dump(config))
    return path


@contextlib.contextmanager
def monitored(folder: Path, targets: list[str]) -> Iterator[tuple[str, str]]:
    """Prometheus and Alertmanager, running; their addresses."""
    ports = {"prometheus": free_port(), "prometheus-alertmanager": free_port()}
    prometheus, alertmanager = (f"127.0.0.1:{port}" for port in ports.values())
    config = configure(folder / "monitoring", targets, prometheus, alertmanager)
    options = {
        "prometheus": [
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            "--rules.alert.resend-delay=1s",  # the first attempt comes before it knows of Alertmanager
        ],
        "prometheus-alertmanager": [
            f"--config.file={config.parent / 'alertmanager.yml'}",
            *(f"--storage.path={folder / 'alerts'}", "--cluster.listen-address="),
        ],
    }
    with contextlib.ExitStack() as running:
        for name, port in ports.items():
            log = folder / f"{name}.log"
            command = [binary(name), *options[name], f"--web.listen-address=127.0.0.1:{port}"]
            wait_until_listening(running.enter_context(server(command, log)), port, log)
        yield f"http://{prometheus}", f"http://{alertmanager}"


@contextlib.contextmanager
def serving(home: Path, store: ModelStore, **settings: str) -> Iterator[dict[str, str]]:
    """`candlecast serve` on free ports; its addresses."""
    home.mkdir()
    chosen = {"home": str(home), "store_root": str(store.root), "port": "0", "admin_port": "0", **settings}
    environment = {f"CANDLECAST_{name.upper()}": value for name, value in chosen.items()}
    command = [sys.executable, "-m", "candlecast", "serve", "--json"]
    with server(command, home / "service.log", environment) as process:
        assert process.stdout
        line = process.stdout.readline()
        assert line, (home / "service.log").read_text()
        yield json.loads(line)


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Iterator[Observed]:
    folder = tmp_path_factory.mktemp("live")
    store = ModelStore(folder / "store")
    models = put_models(store, tiny)
    with serving(folder / "home", store, role="api", watch="BTC@1h:toto:6") as api:
        redis_url = f"unix://{folder / 'home' / 'redis' / 'redis.sock'}"
        asyncio.run(play(redis_url, folder / "replay", store, models))
        with serving(folder / "evaluator", store, role="evaluator", redis_url=redis_url) as evaluator:
            targets = [at["admin_url"].removeprefix("http://") for at in (api, evaluator)]
            with monitored(folder, targets) as addresses, httpx.Client(timeout=PATIENCE) as client:
                found = Observed(*addresses, api, evaluator, client)
                until(lambda: len(found.ask('up{job="candlecast"} == 1')) == 2)
                load(api["url"])
                until(lambda: bool(found.ask("candlecast_symbol_drift_state")))
                before = time.time()  # whatever happened is in the next scrape, and in the rules after it
                until(lambda: min(value for _, value in found.ask('timestamp(up{job="candlecast"})')) > before + 2)
                yield found


# -- what it shows -------------------------------------------------------------------------------------


def panels() -> Iterator[tuple[str, str, str]]:
    """Name, with the legend where there are several; expression; unit."""
    for dashboard in DASHBOARDS:
        for panel in json.loads(as_json(dashboard))["panels"]:
            for target in panel["targets"]:
                several = len(panel["targets"]) > 1
                name = f"{panel['title']}: {target['legendFormat']}" if several else panel["title"]
                expr = re.sub(r"\$(instance|model|interval|steps|symbol)\b", ".*", target["expr"])
                expr = expr.replace("$__rate_interval", RATE_INTERVAL)
                yield f"{dashboard.title.partition(' / ')[2]} | {name}", expr, panel["fieldConfig"]["defaults"]["unit"]


def test_every_panel_shows_something(observed: Observed) -> None:
    found = {name: (expr, observed.ask(expr), unit) for name, expr, unit in panels()}
    for name, (expr, values, unit) in found.items():
        shown = "; ".join(f"{labels} {value:.6g}".strip() for labels, value in values[:3])
        print(f"{name} | {unit} | {expr} | {len(values)} series: {shown}")  # noqa: T201
    empty = {name.partition(" | ")[2] for name, (_, values, _) in found.items() if not values}
    assert empty - MAY_BE_EMPTY == set()


def rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "rules" / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_every_recording_rule_has_a_value(observed: Observed) -> None:
    for rule in rules("recording.yml"):
        assert observed.ask(rule["record"]), rule["record"]
        assert observed.ask(rule["expr"]), rule["expr"]


def test_every_alert_looks_at_something(observed: Observed) -> None:
    """An alert is empty while all is well; what it is computed from must not be."""
    for rule in rules("alerts.yml"):
        observed.ask(rule["expr"])
        for selector in SELECTOR.findall(rule["expr"]):
            assert observed.ask(selector), (rule, selector)


def test_alerts_reach_alertmanager(observed: Observed) -> None:
    def firing() -> set[str]:
        alerts = observed.client.get(f"{observed.alertmanager}/api/v2/alerts").json()
        return {alert["labels"]["alertname"] for alert in alerts}

    until(lambda: "CandlecastWatchdog" in firing())


def test_promtool_finds_no_fault_with_the_metrics(observed: Observed) -> None:
    for at in (observed.api, observed.evaluator):
        check("promtool", "check", "metrics", text=observed.metrics(at))


# -- the two roles -------------------------------------------------------------------------------------


def test_symbols_are_in_the_metrics_of_the_evaluator_alone(observed: Observed) -> None:
    assert "BTC" not in observed.metrics(observed.api)
    series = 'candlecast_symbol_relative_mae_ratio{interval="1h",model="toto-demo",steps="1-8",symbol="BTC"'
    assert series in observed.metrics(observed.evaluator)
    states = dict(observed.ask('max by (model) (candlecast_model_drift_state{steps="1-8"})'))
    assert (states["toto-demo"], states["kronos-demo"]) == (2, 0)


def test_the_evaluator_forecasts_nothing_and_says_so(observed: Observed) -> None:
    with httpx.Client(base_url=observed.evaluator["url"], timeout=PATIENCE) as client:
        refused = [client.post("/forecast/BTC", json={}), client.get("/forecast/BTC/latest")]
        assert [(answer.status_code, answer.json()["code"]) for answer in refused] == [(404, "forecasts_elsewhere")] * 2
        assert client.get("/readyz").status_code == 200
        assert client.get("/livez").status_code == 200
        assert len(client.get("/accuracy/BTC").json()["series"]) == 1
    assert not observed.ask(f'candlecast_model_info{{instance="{observed.evaluator["admin_url"][7:]}"}}')

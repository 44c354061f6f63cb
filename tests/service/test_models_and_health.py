"""GET /models, the probes, the metrics."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.app import create_admin_app
from service.metrics import LOAD_FAILURES
from tests.service.conftest import HOUR, NOW

pytestmark = pytest.mark.anyio

NAIVE = {"model": "naive", "interval": "1h", "horizon": 3}


async def test_models_say_what_they_are_asked_for_as(client: Any, rows: Any) -> None:
    await client.post("/forecast/BTC", json=NAIVE | {"candles": rows()})
    listed = {model["name"]: model for model in (await client.get("/models")).json()["models"]}
    assert listed.keys() == {"naive", "toto-demo"}
    assert listed["naive"]["loaded"]
    assert not listed["toto-demo"]["loaded"]
    assert listed["toto-demo"]["asked_for_as"][:2] == ["toto", "toto-demo"]
    assert "production" in listed["naive"]["aliases"]
    assert listed["naive"]["limits"]["max_horizon"] == 512


async def test_requests_for_one_version_share_one_load(running: Any, rows: Any, faulty: Any) -> None:
    loads = []

    def build(version: Any, _: str) -> Any:
        loads.append(version.manifest.family)
        return faulty

    async with running(build=build) as (client, _):
        body = NAIVE | {"candles": rows()}
        answers = await asyncio.gather(*(client.post("/forecast/BTC", json=body) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert loads == ["naive"]


async def test_a_version_that_does_not_load_is_503_and_tried_again(running: Any, rows: Any, faulty: Any) -> None:
    failures = [ValueError("weights do not fit")]

    def build(*_: Any) -> Any:
        if failures:
            raise failures.pop()
        return faulty

    async with running(build=build) as (client, _):
        body = NAIVE | {"candles": rows()}
        refused = await client.post("/forecast/BTC", json=body)
        assert refused.status_code == 503
        assert refused.json()["code"] == "model_unavailable"
        assert "weights" not in refused.text
        assert (await client.post("/forecast/BTC", json=body)).status_code == 200


async def test_damaged_weights_are_never_served(running: Any, rows: Any, store: Any, put_naive: Any) -> None:
    manifest = put_naive("broken")
    path = Path(store.root) / "broken" / manifest.version / "config.json"
    path.write_bytes(path.read_bytes() + b" ")
    async with running() as (client, app):
        answer = await client.post("/forecast/BTC", json=NAIVE | {"model": "broken", "candles": rows()})
        assert answer.status_code == 503
        assert answer.json()["code"] == "model_unavailable"
        failed = {"model": "broken", "reason": "verification"}
        registry = app.state.services.metrics.registry
        assert registry.get_sample_value("candlecast_model_load_failures_total", failed) == 1
        assert registry.get_sample_value("candlecast_model_ready", {"model": "broken"}) is None


async def test_the_first_failure_to_load_a_default_model_is_an_increase(running: Any) -> None:
    async with running() as (_, app):
        registry = app.state.services.metrics.registry
        for reason in LOAD_FAILURES:
            failed = {"model": app.state.services.settings.toto, "reason": reason}
            assert registry.get_sample_value("candlecast_model_load_failures_total", failed) == 0


async def test_a_broken_manifest_hides_no_other_model(
    running: Any, store: Any, put_naive: Any, caplog: pytest.LogCaptureFixture
) -> None:
    version = put_naive("broken").version
    put_naive("tangled")
    (Path(store.root) / "broken" / version / "manifest.json").write_bytes(b"{")
    (Path(store.root) / "tangled" / "aliases" / "production.json").write_bytes(b"[]")
    async with running() as (client, _):
        for _ in range(2):
            answer = await client.get("/models")
            assert answer.status_code == 200
            assert answer.json()["broken"] == [f"broken@{version}", "tangled"]
            assert {model["name"] for model in answer.json()["models"]} == {"naive", "toto-demo"}
    assert len([record for record in caplog.records if "broken@" in record.getMessage()]) == 1


async def test_probes_are_green_while_the_service_runs(client: Any) -> None:
    for probe in ("livez", "readyz", "startupz"):
        answer = await client.get(f"/{probe}")
        assert answer.status_code == 200
        assert answer.json() == {"status": "ok", "degraded": []}


async def scrape(app: Any) -> str:
    transport = httpx.ASGITransport(create_admin_app(app.state.services))
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as admin:
        answer = await admin.get("/metrics")
        assert answer.status_code == 200
        return answer.text


async def test_metrics_count_what_happened(running: Any, rows: Any) -> None:
    async with running(role="api") as (client, app):
        await client.put("/candles/BTC", json={"candles": rows(), "interval": "1h"})
        await client.post("/forecast/BTC", json=NAIVE)
        await client.post("/forecast/BTC", json=NAIVE | {"samples": 3})
        await client.post("/forecast/BTC", json=NAIVE | {"candles": [[1, 2, 3, 4, 5, 6]]})
        await client.post("/forecast/BTC", json=NAIVE | {"model": "unknown"})
        forming = rows(1, end=NOW // HOUR * HOUR + HOUR)
        await client.put("/candles/BTC", json={"candles": forming, "interval": "1h"})
        text = await scrape(app)
    for line in (
        'candlecast_forecast_requests_total{model="naive",outcome="ok"} 1.0',
        'candlecast_forecast_requests_total{model="naive",outcome="invalid"} 2.0',
        'candlecast_forecast_requests_total{model="naive",outcome="timeout"} 0.0',
        'candlecast_forecast_requests_total{model="_unknown",outcome="invalid"} 1.0',
        'candlecast_http_requests_total{code="200",method="POST",route="/forecast/{symbol}"} 1.0',
        'candlecast_http_requests_total{code="422",method="POST",route="/forecast/{symbol}"} 2.0',
        'candlecast_candles_ingested_total{result="new"} 8.0',
        'candlecast_candles_ingested_total{result="unclosed"} 1.0',
        'candlecast_candle_rejections_total{reason="invalid_timestamp"} 1.0',
        'candlecast_batch_size_count{model="naive"} 1.0',
        'candlecast_forecast_stage_duration_seconds_count{model="naive",stage="total"} 1.0',
        'candlecast_forecast_stage_duration_seconds_count{model="naive",stage="run"} 1.0',
        'candlecast_model_ready{model="naive"} 1.0',
        "candlecast_queue_depth 0.0",
        'candlecast_redis_command_duration_seconds_count{op="history_read"} 3.0',
    ):
        assert line in text, line
    assert "_created" not in text
    assert "BTC" not in text


async def test_strange_paths_and_symbols_add_no_series(running: Any, rows: Any) -> None:
    async with running() as (client, app):
        body = NAIVE | {"candles": rows()}
        await client.post("/forecast/FIRST", json=body)
        await client.get("/nowhere/first")
        before = len((await scrape(app)).splitlines())
        for number in range(20):
            await client.post(f"/forecast/S{number}", json=body)
            await client.get(f"/nowhere/{number}")
        assert len((await scrape(app)).splitlines()) == before


async def test_the_documentation_describes_the_body_and_the_answer(client: Any) -> None:
    described = (await client.get("/openapi.json")).json()["components"]["schemas"]
    assert described["ForecastRequest"]["properties"].keys() >= {"model", "candles", "horizon", "seed", "as_of"}
    assert described["ForecastAnswer"]["properties"].keys() >= {"forecast", "quantiles", "returns", "skill", "meta"}


async def test_every_series_of_a_loaded_model_starts_at_zero(running: Any, rows: Any) -> None:
    async with running() as (client, app):
        await client.post("/forecast/BTC", json=NAIVE | {"candles": rows()})
        text = await scrape(app)
    for line in (
        'candlecast_batch_released_total{model="naive",reason="idle"} 1.0',
        'candlecast_batch_released_total{model="naive",reason="full"} 0.0',
        'candlecast_computed_rows_total{kind="asked",model="naive"} 1.0',
        'candlecast_computed_rows_total{kind="padding",model="naive"} 0.0',
        'candlecast_batches_abandoned_total{model="naive"} 0.0',
        'candlecast_refusals_total{reason="deadline"} 0.0',
        'candlecast_refusals_total{reason="queue"} 0.0',
        'candlecast_refusals_total{reason="full"} 0.0',
        'candlecast_cache_requests_total{result="miss"} 1.0',
        'candlecast_cache_requests_total{result="hit"} 0.0',
        'candlecast_cache_requests_total{result="coalesced"} 0.0',
        'candlecast_cache_requests_total{result="bypass"} 0.0',
    ):
        assert line in text, line


async def test_what_the_engine_did_is_counted(running: Any, rows: Any, faulty: Any, faulty_build: Any) -> None:
    body = NAIVE | {"candles": rows(), "cache": "bypass"}
    async with running(build=faulty_build) as (client, app):
        registry = app.state.services.metrics.registry
        await client.post("/forecast/BTC", json=body)
        faulty.guilty = 7
        await client.post("/forecast/BTC", json=body | {"seed": 7})
        faulty.failure = MemoryError()
        await client.post("/forecast/BTC", json=body)
        name, model = "candlecast_inference_failures_total", {"model": "naive"}
        reasons = ("invalid_output", "out_of_memory", "error")
        assert [registry.get_sample_value(name, model | {"reason": each}) for each in reasons] == [1, 1, 0]
        assert registry.get_sample_value("candlecast_inference_busy_seconds_total", model) > 0
        assert registry.get_sample_value("candlecast_http_requests_in_flight") == 0
        [info] = [family for family in registry.collect() if family.name == "candlecast_model_info"]
        assert [sample.labels["model"] for sample in info.samples] == ["naive"]

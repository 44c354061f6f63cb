"""What the service is measured against answers what it should."""

import asyncio
import json
import os
import threading

import httpx
import pytest

from bench.baselines import create_bytes_app, create_reference_app
from bench.load import SEED
from bench.service import forecast_body

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Predictor:
    """Says what it was asked."""

    def predict(self, body):
        return {"forecast": [[body["horizon"], body["samples"], len(body["candles"])]]}


def client(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_reference_answers_the_very_body_that_the_service_takes():
    body = forecast_body("kronos", 64, horizon=30, samples=1).replace(SEED, b"7")
    async with client(create_reference_app(Predictor())) as caller:
        answer = await caller.post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert answer.json() == {"forecast": [[30, 1, 64]]}


async def test_reference_is_never_asked_by_two_threads_at_once():
    alone, overlaps = threading.Lock(), []

    class Slow(Predictor):
        def predict(self, body):
            overlaps.append(not alone.acquire(blocking=False))
            os.sched_yield()
            alone.release()
            return super().predict(body)

    body = json.loads(forecast_body("kronos", 64, horizon=30, samples=1))
    async with client(create_reference_app(Slow())) as caller:
        await asyncio.gather(*(caller.post("/predict", json=body) for _ in range(16)))
    assert overlaps == [False] * 16


async def test_bare_endpoint_answers_its_bytes():
    async with client(create_bytes_app(b'{"a":1}')) as caller:
        answer = await caller.post("/forecast/BTC", content=b"{}")
    assert answer.content == b'{"a":1}'
    assert answer.headers["content-type"] == "application/json"


def test_a_body_without_candles_asks_for_the_history():
    assert "candles" not in json.loads(forecast_body("toto", None).replace(SEED, b"7"))


def test_reference_predictor_forecasts_each_body_of_a_batch():
    from bench.predictor import ReferencePredictor

    body = json.loads(forecast_body("kronos", 16, horizon=2, samples=1).replace(SEED, b"7"))
    found = ReferencePredictor().predict_batch([body, body])
    assert [len(each["forecast"]) for each in found] == [2, 2]
    assert len(found[0]["forecast"][0]) == 6

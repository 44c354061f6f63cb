"""Toto and Kronos themselves behind the API: tiny networks with random weights, real batches."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest

from model_store.store import LoadedVersion, ModelStore
from models.candles import check_candles, with_amount

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client(tmp_path: Any, running: Any, put_tiny: Any) -> AsyncIterator[httpx.AsyncClient]:
    store = ModelStore(tmp_path / "networks")
    for family in ("toto", "kronos"):
        put_tiny(store, family)
    async with running(build=LoadedVersion.build, store_root=store.root) as (client, _):
        yield client


@pytest.mark.parametrize("model", ["toto", "kronos"])
async def test_every_row_of_a_real_forecast_is_a_valid_candle(client: Any, rows: Any, model: str) -> None:
    answer = await client.post("/forecast/BTC", json={"model": model, "candles": rows(100), "interval": "1h"})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["horizon"] == len(body["forecast"]) == (64 if model == "toto" else 30)

    forecast = np.array(body["forecast"])
    check_candles(with_amount(forecast[:, 1:]))
    assert (np.diff(forecast[:, 0]) == 3_600_000).all()
    assert ("quantiles" in body["returns"]["step"] and body["returns"]["step"]["quantiles"] is not None) == (
        model == "kronos"
    )


@pytest.mark.parametrize("model", ["toto", "kronos"])
async def test_forecast_has_the_same_bytes_alone_and_among_sixteen_others(client: Any, rows: Any, model: str) -> None:
    body = {"model": model, "candles": rows(64), "interval": "1h", "seed": 7, "cache": "bypass"}
    alone = (await client.post("/forecast/BTC", json=body)).json()
    others = [{**body, "seed": 100 + i, "candles": rows(64 - i)} for i in range(16)]
    requests = [*others[:9], body, *others[9:]]
    answers = await asyncio.gather(*(client.post("/forecast/BTC", json=request) for request in requests))
    together = answers[9].json()
    assert together["meta"]["batch_rows"] > 1
    assert together["forecast"] == alone["forecast"]
    assert together["quantiles"] == alone["quantiles"]
    assert together["returns"] == alone["returns"]


async def test_another_seed_gives_other_paths(client: Any, rows: Any) -> None:
    body = {"model": "kronos", "candles": rows(64), "interval": "1h", "paths": True, "samples": 8}
    one, other = [(await client.post("/forecast/BTC", json={**body, "seed": seed})).json() for seed in (1, 2)]
    assert len(one["paths"]) == 8
    assert one["paths"] != other["paths"]


@pytest.mark.parametrize(("model", "aggregate"), [("toto", "trimmed_mean_10"), ("kronos", "avg")])
async def test_aggregate_that_the_model_cannot_give_is_422(client: Any, rows: Any, model: str, aggregate: str) -> None:
    body = {"model": model, "candles": rows(64), "interval": "1h", "aggregate": aggregate}
    answer = await client.post("/forecast/BTC", json=body)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/aggregate"
    assert f"'{aggregate}'" not in answer.text


async def test_mean_of_totos_mixture_is_answered(client: Any, rows: Any) -> None:
    body = {"model": "toto", "candles": rows(64), "interval": "1h", "aggregate": "mean"}
    assert (await client.post("/forecast/BTC", json=body)).status_code == 200

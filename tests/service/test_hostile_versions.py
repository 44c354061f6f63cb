"""A service that is asked for a version that was made to break it answers that it cannot, and goes on."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model_store.store import LoadedVersion, ModelStore
from tests.forged import forge, tensor_file

pytestmark = pytest.mark.anyio


def evil_file(store: ModelStore, config: Any, _: Any) -> str:
    header = {"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 8]}}
    return forge(store, config, tensor_file(header, bytes(8)))


def evil_numbers(store: ModelStore, config: Any, weights: Any) -> str:
    return forge(store, config, {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()})


def evil_config(store: ModelStore, config: Any, weights: Any) -> str:
    return forge(store, config | {"network": config["network"] | {"num_layers": 10**9}}, weights)


def evil_pipe(store: ModelStore, config: Any, weights: Any) -> str:
    reference = forge(store, config, weights)
    path = Path(store.root) / reference.replace("@", "/") / "weights.safetensors"
    path.unlink()
    os.mkfifo(path)
    return reference


@pytest.mark.parametrize("attack", [evil_file, evil_numbers, evil_config, evil_pipe])
async def test_a_hostile_version_stops_nothing(
    attack: Callable[..., str], running: Any, rows: Any, tiny: Any, put_tiny: Any, tmp_path: Path
) -> None:
    store = ModelStore(tmp_path / "networks")
    put_tiny(store, "toto")
    evil = attack(store, *tiny["toto"])
    body = {"candles": rows(100), "interval": "1h", "cache": "bypass"}
    async with running(build=LoadedVersion.build, store_root=store.root) as (client, app):
        before = await client.post("/forecast/BTC", json=body | {"model": "toto-demo"})
        assert before.status_code == 200, before.text
        refused = await client.post("/forecast/BTC", json=body | {"model": evil})
        assert (refused.status_code, refused.json()["code"]) == (503, "model_unavailable")
        after = await client.post("/forecast/BTC", json=body | {"model": "toto-demo"})
        assert after.json()["forecast"] == before.json()["forecast"]
        failed = {"model": "evil", "reason": "verification"}
        registry = app.state.services.metrics.registry
        assert registry.get_sample_value("candlecast_model_load_failures_total", failed) == 1

"""A service whose store lies in a bucket, and what it says to the store of what it holds."""

import errno
import logging
from pathlib import Path
from typing import Any

import pytest

from model_store.gc import unused
from model_store.store import ModelStore
from service.engine.leases import announce_once
from tests.service.test_hot_swap import followed

pytestmark = pytest.mark.anyio

NAIVE = {"model": "naive", "interval": "1h", "horizon": 3}


def put(store: ModelStore, number: int) -> str:
    fields = {
        "model": "naive",
        "family": "naive",
        "origin": {"kind": "trained", "source": "test"},
        "limits": {"min_context": 2, "max_context": 4096, "max_horizon": 512},
        "created_at": f"2025-01-01T00:00:{number:02d}Z",
    }
    return store.put(fields, {}, {}).version


async def test_a_service_serves_from_a_bucket_and_follows_its_aliases(
    running: Any, rows: Any, url: str, tmp_path: Path
) -> None:
    store = ModelStore(url, tmp_path / "elsewhere")
    first, second = put(store, 1), put(store, 2)
    store.promote(f"naive@{first}")
    async with running(store_root=url) as (client, app):
        answer = await client.post("/forecast/BTC", json=NAIVE | {"candles": rows()})
        assert answer.json()["model"]["version"] == first
        assert [model["version"] for model in (await client.get("/models")).json()["models"]] == [first, second]
        store.promote(f"naive@{second}")
        await followed(app)
        answer = await client.post("/forecast/BTC", json=NAIVE | {"candles": rows(9)})
        assert answer.json()["model"]["version"] == second
        assert app.state.services.registry.store.root.is_relative_to(tmp_path / "home" / "store-cache")


async def test_what_is_in_memory_is_not_collected(running: Any, rows: Any, store: ModelStore) -> None:
    async with running() as (client, app):
        held = store.resolve("naive")[1]
        await client.post("/forecast/BTC", json=NAIVE | {"candles": rows()})
        newer = [put(store, number) for number in range(1, 4)]
        for version in newer[:2]:
            store.promote(f"naive@{version}", force="a test")
        assert [manifest.version for manifest in unused(store, keep=1)] == [held]
        announce_once(app.state.services.registry, set())
        assert unused(store, keep=1) == []


async def test_a_store_that_cannot_be_written_to_is_said_once(
    running: Any, rows: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(ModelStore, "hold", refuse)
    async with running() as (client, app):
        await client.post("/forecast/BTC", json=NAIVE | {"candles": rows()})
        refused: set[str] = set()
        for _ in range(3):
            announce_once(app.state.services.registry, refused)
    assert caplog.text.count("Read-only file system") == 1

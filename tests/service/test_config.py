"""GET /config: what is in force and why, without what is secret."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from service.app import create_admin_app, create_app
from service.settings import Settings

pytestmark = pytest.mark.anyio


async def settings_of(settings: Settings) -> dict[str, tuple[Any, str]]:
    transport = httpx.ASGITransport(create_admin_app(create_app(settings).state.services))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/config")
    assert answer.status_code == 200, answer.text
    return {each["variable"]: (each["value"], each["source"]) for each in answer.json()["settings"]}


async def test_each_setting_says_where_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "candlecast_toto").write_text("big-toto")
    (secrets / "candlecast_kronos").write_text("big-kronos")
    monkeypatch.setitem(Settings.model_config, "secrets_dir", secrets)
    monkeypatch.setenv("CANDLECAST_KRONOS", "small-kronos")
    monkeypatch.setenv("CANDLECAST_WATCH", "AAPL:kronos:30")
    monkeypatch.setenv("candlecast_max_queue", "7")
    told = await settings_of(Settings(home=tmp_path))
    assert told.keys() == {f"CANDLECAST_{name.upper()}" for name in Settings.model_fields}
    assert told["CANDLECAST_TOTO"] == ("big-toto", "secret file")
    assert told["CANDLECAST_KRONOS"] == ("small-kronos", "environment")
    assert told["CANDLECAST_MAX_QUEUE"] == (7, "environment")
    assert told["CANDLECAST_WATCH"][1] == "environment"
    assert told["CANDLECAST_HOME"] == (str(tmp_path), "argument")
    assert told["CANDLECAST_PORT"] == (8000, "default")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:hush@redis:6379/0", "redis://***@redis:6379/0"),
        ("rediss://user:hu@s/h@redis:6379/0", "rediss://***@redis:6379/0"),  # pragma: allowlist secret # made up
        ("redis://redis:6379/0?password=hush", "redis://redis:6379/0?***"),
        ("redis://redis:6379/0", "redis://redis:6379/0"),
    ],
)
async def test_no_password_is_told(tmp_path: Path, url: str, shown: str) -> None:
    told = await settings_of(Settings(home=tmp_path, redis_url=url))
    assert told["CANDLECAST_REDIS_URL"] == (shown, "argument")

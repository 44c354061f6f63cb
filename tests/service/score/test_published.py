"""Series of single symbols: of whom, of how many, and for how long."""

import asyncio
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from service.app import FastAPI, build_services
from service.settings import Settings
from tests.service.conftest import Clock

pytestmark = pytest.mark.anyio

HOUR = 3_600_000


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever wakes the evaluator makes it look at everything."""
    monkeypatch.setattr("service.score.evaluator._EVERY_SECONDS", 0.0)


def series(app: FastAPI) -> dict[str, dict[str | None, float]]:
    """Name to symbol to value."""
    found: dict[str, dict[str | None, float]] = defaultdict(dict)
    for family in app.state.services.metrics.registry.collect():
        for sample in family.samples:
            found[sample.name][sample.labels.get("symbol")] = sample.value
    return found


async def score(client: Any, app: FastAPI, clock: Clock, symbol: str, rows: Any) -> None:
    """One forecast of a symbol, and the candle that scores its first step."""
    before = clock.now
    await client.put(f"/candles/{symbol}", json={"interval": "1h", "candles": rows(end=before)})
    await client.post(f"/forecast/{symbol}", json={"model": "naive", "horizon": 2})
    await app.state.services.register.flush()
    clock.now += HOUR
    answer = await client.put(f"/candles/{symbol}", json={"interval": "1h", "candles": rows(1, end=clock.now)})
    assert answer.json()["scored"] == 1
    clock.now = before


async def looked(app: FastAPI) -> None:
    """Return when the evaluator has looked at all series once more."""
    evaluator = app.state.services.evaluator
    for _ in range(2):  # a look may be under way
        last = evaluator.last_success
        evaluator.touch("NOBODY", "1h")
        while evaluator.last_success == last:
            await asyncio.sleep(0.01)


async def test_a_symbol_has_series_until_it_is_gone(running: Any, rows: Any, clock: Clock) -> None:
    async with running(now=clock) as (client, app):
        await score(client, app, clock, "BTC", rows)
        await looked(app)
        found = series(app)
        last_close = (clock.now + HOUR) // HOUR * HOUR / 1000
        assert found["candlecast_symbol_mae_log_return"].keys() == {"BTC"}
        assert found["candlecast_symbol_drift_state"] == {"BTC": 4}
        assert found["candlecast_candles_last_close_timestamp_seconds"] == {"BTC": last_close}
        assert found["candlecast_candles_stale_timestamp_seconds"] == {"BTC": last_close + 3 * 3600 + 0.001}
        await app.state.services.state.redis.flushall()
        await looked(app)
        assert all("BTC" not in symbols for symbols in series(app).values())


async def test_beyond_the_cap_symbols_count_in_their_model_alone(running: Any, rows: Any, clock: Clock) -> None:
    async with running(now=clock, metric_symbols=2) as (client, app):
        for symbol in ("CCC", "AAA", "DDD", "BBB"):
            await score(client, app, clock, symbol, rows)
        await looked(app)
        found = series(app)
        assert {symbol for symbols in found.values() for symbol in symbols} == {"AAA", "BBB", None}
        assert found["candlecast_symbol_mae_log_return"].keys() == {"AAA", "BBB"}
        assert found["candlecast_evaluator_symbols_omitted"] == {None: 2}
        assert found["candlecast_model_symbols"] == {None: 4}


def test_scores_are_no_older_than_the_process(tmp_path: Path) -> None:
    """Or each start would look like a standstill of half a century."""
    started = time.time()
    parts = build_services(Settings(home=tmp_path, store_root=tmp_path))
    known = parts.metrics.registry.get_sample_value("candlecast_evaluator_last_success_timestamp_seconds")
    assert known is not None
    assert known >= started

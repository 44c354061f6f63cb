"""Real history through the loop: the numbers are the service's, do not depend on the run, and keep their promises."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from io import StringIO
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import numpy as np
import pytest
from rich.console import Console

from model_store.store import ModelStore
from service.app import build_services, create_app
from service.engine.registry import LoadedModel
from service.engine.series import Series
from service.replay import AUTO, Clock, Plan, Replayed, first_unseen, replay, series_of
from service.replay_table import replay_table
from service.services import Services
from service.settings import Settings
from tests.walk import WalkForecaster
from training.candle_files import read
from training.sample_data import write_samples

pytestmark = pytest.mark.anyio

HORIZON = 30
SPREADS = {"narrow": 0.7, "walk": 1.0, "wide": 1.6}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def whole(path: Path) -> Series:
    found = read(path)[0]
    return series_of(found.symbol, found.interval, found.timestamps, found.candles)


@pytest.fixture(scope="module")
def spx(tmp_path_factory: pytest.TempPathFactory) -> Series:
    """S&P 500, days of 1999 to 2018."""
    folder = tmp_path_factory.mktemp("samples")
    write_samples(folder)
    return whole(folder / "GSPC.csv")


@pytest.fixture(scope="module")
def eurusd(packaged_candles: Callable[[str], Path]) -> Series:
    return whole(packaged_candles("EURUSD.csv"))


def part(series: Series, first: int, stop: int) -> Series:
    return Series(
        series.symbol,
        series.interval,
        series.calendar,
        series.timestamps[first:stop],
        series.candles[first:stop],
        "history",
    )


@asynccontextmanager
async def parts_of(home: Path, store: ModelStore, clock: Clock) -> AsyncIterator[Services]:
    parts = build_services(Settings(home=home, store_root=store.root, toto="walk"), now=clock)
    await parts.state.start()
    try:
        yield parts
    finally:
        await parts.state.stop()


def walks(store: ModelStore) -> list[LoadedModel]:
    """Three promoted versions: one knows how wide its bands should be."""
    found = []
    for name, spread in SPREADS.items():
        if "production" not in store.aliases(name):
            manifest = {
                "model": name,
                "family": "naive",
                "origin": {"kind": "trained", "source": f"a walk times {spread}"},
                "limits": {"min_context": 2, "max_context": 4096, "max_horizon": 512},
                "serving": {"lookback": 256},
                "created_at": "2025-01-01T00:00:00Z",
            }
            complete = store.put(manifest, {"family": "naive"}, {})
            store.promote(f"{name}@{complete.version}", force="test")
        found.append(LoadedModel(store.manifest(name), WalkForecaster(spread=spread)))
    return found


async def played(folder: Path, series: Sequence[Series], **plan: Any) -> Replayed:
    folder.mkdir()
    store, clock = ModelStore(folder / "store"), Clock()
    async with parts_of(folder / "home", store, clock) as parts:
        return await replay(parts, clock, walks(store), series, Plan(**{"start": 0, "horizon": HORIZON, **plan}))


@pytest.fixture(scope="module")
def decades(tmp_path_factory: pytest.TempPathFactory, spx: Series, eurusd: Series) -> Replayed:
    return asyncio.run(played(tmp_path_factory.mktemp("decades") / "all", [spx, eurusd], every=4))


def scores_of(replayed: Replayed, name: str, model: str, steps: str) -> Any:
    [found] = [each for each in replayed.series[name].standings if (each.model, each.steps) == (model, steps)]
    return found.all


def crps(scores: Any) -> float:
    return float(2 * np.mean(list(scores.pinball.values())))


# -- the numbers are the service's -------------------------------------------------------------------


async def test_a_replay_scores_what_the_service_scores(tmp_path: Path, spx: Series) -> None:
    series, every = part(spx, 0, 200), 6
    ledgers = {}
    store, clock = ModelStore(tmp_path / "store"), Clock()
    models = walks(store)
    async with parts_of(tmp_path / "replayed", store, clock) as parts:
        await replay(parts, clock, models[:1], [series], Plan(0, every, HORIZON))
        ledgers["replayed"] = await parts.ledger.blocks("GSPC", "1d")
    app = create_app(
        Settings(home=tmp_path / "served", store_root=store.root),
        build=lambda *_: WalkForecaster(spread=0.7),
        now=clock,
    )
    async with app.router.lifespan_context(app), _caller(app) as client:
        await _live(client, app.state.services, clock, series, every)
        ledgers["served"] = await app.state.services.ledger.blocks("GSPC", "1d")
    owners = [owner for owner in ledgers["replayed"] if owner[0] != AUTO]
    assert sorted(owners) == sorted(ledgers["served"])
    assert len(owners) == 2
    for owner in owners:
        replayed, served = ledgers["replayed"][owner], ledgers["served"][owner]
        assert replayed.numbers.tolist() == served.numbers.tolist()
        assert replayed.sums.tobytes() == served.sums.tobytes()
        assert (served.sums["covered"] != served.sums["covered_calibrated"]).any()


def _caller(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def _live(client: httpx.AsyncClient, parts: Services, clock: Clock, series: Series, every: int) -> None:
    """A feed and a bot: candles come one by one, a forecast is asked for after every sixth."""
    closes = series.calendar.closes(series.timestamps, series.interval)
    for row, (time, candle, close) in enumerate(
        zip(series.timestamps.tolist(), series.candles.tolist(), closes.tolist(), strict=True)
    ):
        clock.instant = close
        body = {"interval": "1d", "calendar": "XNYS", "candles": [[time, *candle]]}
        assert (await client.put("/candles/GSPC", json=body)).status_code == 200
        if row >= 63 and row % every == 0 and row + 1 < len(closes):
            await parts.evaluator.caught_up("GSPC", "1d")
            answer = await client.post("/forecast/GSPC", json={"model": "narrow", "horizon": HORIZON})
            assert answer.status_code == 200, answer.text
            await parts.register.flush()


async def test_two_replays_give_the_same_numbers(tmp_path: Path, spx: Series, eurusd: Series) -> None:
    series = [part(spx, 1000, 1400), part(eurusd, 0, 400)]
    first = await played(tmp_path / "first", series, every=7)
    second = await played(tmp_path / "second", series, every=7)
    assert json.dumps(first.as_json()) == json.dumps(second.as_json())
    assert first.candles > 600


async def test_no_forecast_is_made_from_candles_before_the_start(tmp_path: Path, spx: Series) -> None:
    series = part(spx, 0, 500)
    replayed = await played(tmp_path / "late", [series], every=5, start=int(series.timestamps[400]))
    assert 90 <= replayed.candles <= 100
    assert replayed.forecasts == 3 * 20


async def test_nothing_to_play_is_said(tmp_path: Path, spx: Series) -> None:
    with pytest.raises(ValueError, match="enough"):
        await played(tmp_path / "short", [part(spx, 0, 50)])


async def test_the_bar_hears_of_every_candle(tmp_path: Path, spx: Series) -> None:
    store, clock, heard = ModelStore(tmp_path / "store"), Clock(), list[tuple[int, int]]()
    async with parts_of(tmp_path / "home", store, clock) as parts:
        series = [part(spx, 0, 150)]
        await replay(parts, clock, walks(store)[:1], series, Plan(0, 10, 8), lambda *seen: heard.append(seen))
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert heard[-1][0] == heard[-1][1]


async def test_a_replay_can_be_slowed_down(tmp_path: Path, spx: Series) -> None:
    began = monotonic()
    await played(tmp_path / "slow", [part(spx, 0, 100)], speed=36.0, every=4)
    assert monotonic() - began >= 0.9


def test_forecasts_begin_after_what_a_version_was_trained_and_validated_on(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    walks(store)
    assert first_unseen(store, list(SPREADS)) == 0


# -- what it promises ---------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("steps", ["1-8", "9-30"])
@pytest.mark.parametrize("name", ["GSPC:1d", "EURUSD:1h"])
def test_recalibration_mends_bands_that_are_too_narrow(decades: Replayed, name: str, steps: str) -> None:
    scores = scores_of(decades, name, "narrow", steps)
    assert scores.coverage_80 < 0.72
    assert 0.78 <= scores.coverage_80_calibrated <= 0.82
    assert scores.interval_score_calibrated <= scores.interval_score
    [worst] = [
        each
        for each in decades.worst
        if f"{each.symbol}:{each.interval}" == name and each.model.startswith("narrow@") and each.steps == steps
    ]
    assert worst.coverage_80_calibrated > worst.coverage_80


@pytest.mark.long
@pytest.mark.parametrize("steps", ["1-8", "9-30"])
@pytest.mark.parametrize("name", ["GSPC:1d", "EURUSD:1h"])
def test_recalibration_leaves_bands_nearly_alone_that_are_right(decades: Replayed, name: str, steps: str) -> None:
    scores = scores_of(decades, name, "walk", steps)
    assert 0.78 <= scores.coverage_80_calibrated <= 0.82
    assert scores.interval_score_calibrated <= 1.03 * scores.interval_score


@pytest.mark.long
@pytest.mark.parametrize("steps", ["1-8", "9-30"])
@pytest.mark.parametrize("name", ["GSPC:1d", "EURUSD:1h"])
def test_auto_is_nearly_as_good_as_the_best_model(decades: Replayed, name: str, steps: str) -> None:
    each = {model: crps(scores_of(decades, name, model, steps)) for model in SPREADS}
    auto = crps(scores_of(decades, name, "auto", steps))
    assert auto <= 1.02 * min(each.values())
    assert auto < np.mean(list(each.values()))


@pytest.mark.long
def test_a_table_shows_every_series_and_model(decades: Replayed) -> None:
    out = StringIO()
    Console(file=out, width=100).print(replay_table(decades))
    text = out.getvalue()
    for word in ("GSPC", "EURUSD", "narrow", "auto", "no_baseline", "No drift alarm"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 100

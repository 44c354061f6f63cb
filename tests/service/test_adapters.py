"""Versions for one symbol each, served as adapters of one base in memory: batches of both, memory, swaps, faults."""

import asyncio
import json
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from bench.published import merged_with, random_adapter
from bench.service import put_version
from model_store.canary import canary_of
from model_store.manifest import ADAPTER, WEIGHTS
from model_store.store import LoadedVersion, ModelStore
from models.families import build_forecaster
from tests.service.test_engine import counted, until
from tests.service.test_hot_swap import NEVER, TOTO, answered_by, corrupt, followed, post

pytestmark = pytest.mark.anyio

ALPHA, RANK = 16, 4
RECORD = {
    **dict.fromkeys(("data_digest", "interval", "start", "end"), "test"),
    **dict.fromkeys(("steps", "seconds", "seed"), 1),
    "symbols": ("BTC",),
}
PutAdapter = Callable[..., str]


@pytest.fixture
def base(store: ModelStore, tiny: Any) -> str:
    """The version of toto-demo that adapters are trained beside."""
    return put_version(store, "toto-demo", "toto", *copied(*tiny["toto"])).partition("@")[2]


@pytest.fixture
def put_adapter(store: ModelStore, tiny: Any, base: str) -> PutAdapter:
    """Store a version of toto-demo as training does, and make it that of a symbol."""

    def put(symbol: str, seed: int, rank: int = RANK, factor: float = 1.0, **changed: Any) -> str:
        """`factor` is of what the weights have added in, over what the manifest says."""
        config, weights = copied(*tiny["toto"])
        adapter = random_adapter("toto", weights, rank, seed)
        whole = merged_with(weights, adapter, factor * ALPHA / rank)
        built = build_forecaster("toto", config, whole)
        limits = built.limits
        manifest = {
            "model": "toto-demo",
            "symbol": symbol,
            "family": "toto",
            "origin": {"kind": "trained", "source": "test", "revision": base},
            "limits": {name: getattr(limits, name) for name in ("min_context", "max_context", "max_horizon")},
            "training": {
                "recipe": {"tune": {"base": "toto-demo", "rank": rank, "alpha": ALPHA}, "phases": {"network": {}}},
                **RECORD,
            },
            "canary": canary_of(built),
            "created_at": "2025-01-01T00:00:00Z",
            **changed,
        }
        version = store.put(manifest, config, whole, adapter).version
        store.promote(f"toto-demo@{version}", symbol=symbol, force="test")
        return version

    return put


def copied(config: Any, weights: Any) -> tuple[Any, Any]:
    return config, {name: tensor.clone() for name, tensor in weights.items()}


def size_of(store: ModelStore, version: str, *names: str) -> int:
    files = store.manifest(f"toto-demo@{version}").files
    return sum(entry.bytes for name, entry in files.items() if not names or name in names)


async def told_of(client: Any, version: str) -> dict[str, Any]:
    """What GET /models says of the runtime of a version."""
    models = (await client.get("/models")).json()["models"]
    [found] = [each["runtime"] for each in models if each["version"] == version]
    return dict(found)


def gated(forecaster: Any) -> tuple[threading.Event, threading.Event]:
    """Hold the batches that the base runs: set once one is there, and to be set for it to go on."""
    entered, go_on, plain = threading.Event(), threading.Event(), forecaster.functions

    def forward(*arguments: Any) -> Any:
        entered.set()
        assert go_on.wait(10)
        return plain["forward"](*arguments)

    forecaster.functions = {**plain, "forward": forward}
    return entered, go_on


async def test_symbols_and_their_base_share_a_batch_and_each_is_answered_by_its_own(
    running: Any, rows: Any, store: ModelStore, base: str, put_adapter: PutAdapter
) -> None:
    versions = {symbol: put_adapter(symbol, seed, rank) for seed, (symbol, rank) in enumerate([("BTC", 4), ("ETH", 8)])}
    (store.root / "toto-demo" / versions["BTC"] / WEIGHTS).write_bytes(b"")  # nobody reads the merged weights
    body = TOTO | {"candles": rows(32), "seed": 5, "cache": "bypass"}
    async with running(build=LoadedVersion.build, store_poll_seconds=NEVER) as (client, app):

        async def ask(symbol: str, **fields: Any) -> Any:
            answer = await client.post(f"/forecast/{symbol}", json=body | fields)
            assert answer.status_code == 200, answer.text
            return answer.json()

        alone = {symbol: await ask(symbol) for symbol in ("SOL", *versions)}
        registry = app.state.services.registry
        await registry.idle()
        entered, go_on = gated(registry.loaded()[f"toto-demo@{base}"].forecaster)
        first = asyncio.create_task(ask("SOL", seed=6))
        await until(entered.is_set)
        waiting = {symbol: asyncio.create_task(ask(symbol)) for symbol in alone}
        await until(lambda: app.state.services.engine._batcher.depth == len(waiting))
        go_on.set()
        together = {symbol: await task for symbol, task in waiting.items()}
        await first
        told, size = await told_of(client, versions["BTC"]), registry.bytes
        assert counted(app, "model_info", **labels_of(versions["BTC"], "adapter")) == 1
    for symbol, answer in together.items():
        assert answer["meta"]["batch_rows"] == len(together)
        assert (answer["forecast"], answer["quantiles"]) == (alone[symbol]["forecast"], alone[symbol]["quantiles"])
    assert len({json.dumps(answer["forecast"]) for answer in together.values()}) == len(together)
    for symbol, version in versions.items():
        model = {"family": "toto", "name": "toto-demo", "runtime": "adapter", "dtype": "float32", "weights": None}
        assert together[symbol]["model"] == model | {"version": version}
    assert (together["SOL"]["model"]["version"], together["SOL"]["model"]["runtime"]) == (base, "eager")
    assert (told["name"], told["base"], told["settled"]) == ("adapter", f"toto-demo@{base}", True)
    assert told["canary_moved"] < 1e-4
    assert size == size_of(store, base) + sum(size_of(store, version, ADAPTER) for version in versions.values())


def labels_of(version: str, runtime: str) -> dict[str, str]:
    return {"model": "toto-demo", "version": version, "runtime": runtime, "dtype": "float32", "device": "cpu"}


async def test_swaps_of_an_adapter_under_load_fail_no_request_and_mix_no_versions(
    running: Any, rows: Any, store: ModelStore, base: str, put_adapter: PutAdapter
) -> None:
    others = [put_adapter("BTC", seed, rank) for seed, rank in ((1, 4), (2, 8), (3, 4))]
    put_adapter("ETH", 9)
    store.promote(f"toto-demo@{others[0]}", symbol="BTC", force="test")
    body = json.dumps(TOTO | {"candles": rows(32), "seed": 1, "cache": "bypass"}).encode()
    seen: list[tuple[str, str, Any]] = []
    done = asyncio.Event()

    async with running(build=LoadedVersion.build, store_poll_seconds=NEVER) as (client, app):

        async def call(symbol: str) -> None:
            while not done.is_set():
                status, content = await post(app, f"/forecast/{symbol}", body)
                assert status == 200, content
                told = json.loads(content)
                seen.append((symbol, told["model"]["version"], told["forecast"]))

        async with asyncio.TaskGroup() as callers:
            for symbol in ("BTC", "BTC", "ETH", "SOL"):
                callers.create_task(call(symbol))
            for version in others:
                store.promote(f"toto-demo@{version}", symbol="BTC", force="test")
                await app.state.services.registry.look()
                await until(lambda version=version: any(seen_one[1] == version for seen_one in seen[-8:]), seconds=60)
            done.set()
        expected = {version: await forecast_of(client, rows, version) for version in {each[1] for each in seen}}
    assert {each[1] for each in seen if each[0] == "BTC"} == set(others)
    assert {each[1] for each in seen if each[0] == "SOL"} == {base}
    for _, version, forecast in seen:
        assert forecast == expected[version]


async def forecast_of(client: Any, rows: Any, version: str) -> Any:
    """What a version answers alone."""
    asked = TOTO | {"candles": rows(32), "seed": 1, "cache": "bypass", "model": f"toto-demo@{version}"}
    return (await client.post("/forecast/BTC", json=asked)).json()["forecast"]


async def test_an_adapter_stays_with_its_base_which_stays_as_long_as_it_is_needed(
    running: Any, rows: Any, store: ModelStore, base: str, put_adapter: PutAdapter, tinies: Any
) -> None:
    own = put_adapter("BTC", 1)
    async with running(build=LoadedVersion.build, store_poll_seconds=NEVER) as (client, app):
        registry = app.state.services.registry
        assert await answered_by(client, rows) == own
        before = await forecast_of(client, rows, own)
        tensors = [weakref.ref(low.up) for low in registry.loaded()[f"toto-demo@{own}"].forecaster._adapter.values()]
        registry._held[f"toto-demo@{own}"].by_version = False
        newer = put_version(store, "toto-demo", "toto", *copied(*tinies(8)["toto"])).partition("@")[2]
        await followed(app)
        assert await answered_by(client, rows, "SOL") == newer
        assert {*registry.loaded()} == {f"toto-demo@{version}" for version in (own, base, newer)}
        assert await answered_by(client, rows) == own
        assert await forecast_of(client, rows, own) == before
        registry._held[f"toto-demo@{own}"].by_version = False
        store.rollback("toto-demo", symbol="BTC")
        await followed(app)
        assert await answered_by(client, rows) == newer
        assert [*registry.loaded()] == [f"toto-demo@{newer}"]
        assert registry.bytes == size_of(store, newer)
        assert {tensor() for tensor in tensors} == {None}


async def test_a_damaged_adapter_is_one_clear_line_and_what_answered_goes_on(
    running: Any, rows: Any, store: ModelStore, base: str, put_adapter: PutAdapter
) -> None:
    good = put_adapter("BTC", 1)
    async with running(build=LoadedVersion.build, store_poll_seconds=NEVER) as (client, app):
        assert await answered_by(client, rows) == good
        bad = put_adapter("BTC", 2)
        corrupt(store, bad, file=ADAPTER)
        await followed(app)
        assert await answered_by(client, rows) == good
        await app.state.services.registry.idle()
        assert await answered_by(client, rows) == good
        [failure] = (await client.get("/models")).json()["failures"]
        assert failure["detail"] == f"toto-demo@{bad}: adapter.safetensors is not what was stored"
        assert await answered_by(client, rows, "SOL") == base


async def test_where_memory_is_short_adapters_make_room_for_each_other_and_their_base_stays(
    running: Any, rows: Any, store: ModelStore, base: str, put_adapter: PutAdapter
) -> None:
    versions = {symbol: put_adapter(symbol, seed) for seed, symbol in enumerate(["BTC", "ETH", "SOL"])}
    room = size_of(store, base) + 2.5 * size_of(store, versions["BTC"], ADAPTER)
    async with running(build=LoadedVersion.build, store_poll_seconds=NEVER, memory_budget_gb=room / 1e9) as (
        client,
        app,
    ):
        for symbol in ("BTC", "ETH", "SOL", "BTC"):
            assert await answered_by(client, rows, symbol) == versions[symbol]
            await app.state.services.registry.idle()
        held = [f"toto-demo@{version}" for version in (base, versions["SOL"], versions["BTC"])]
        assert [*app.state.services.registry.loaded()] == held
        app.state.services.registry._budget = lambda: 1
        assert await answered_by(client, rows, "ETH") == versions["ETH"], "as one that would be alone"


async def test_what_its_base_cannot_serve_is_loaded_whole(running: Any, rows: Any, put_adapter: PutAdapter) -> None:
    elsewhere = {"kind": "trained", "source": "test", "revision": "0" * 12}
    more = {"recipe": {"tune": {"base": "toto-demo", "rank": RANK, "alpha": ALPHA}, "phases": {"tokenizer": {}}}}
    whole = {
        "BTC": put_adapter("BTC", 1, origin=elsewhere),
        "ETH": put_adapter("ETH", 2, training=more | RECORD),
        "SOL": put_adapter("SOL", 3, factor=5.0),  # the canary says that the weights have something else added in
    }
    async with running(build=LoadedVersion.build, store_poll_seconds=NEVER) as (client, app):
        for symbol, version in whole.items():
            assert await answered_by(client, rows, symbol) == version
            await app.state.services.registry.idle()
            told = await told_of(client, version)
            assert (told["name"], told["base"], told["canary_moved"]) == ("eager", None, None)
        assert {*app.state.services.registry.loaded()} == {f"toto-demo@{version}" for version in whole.values()}

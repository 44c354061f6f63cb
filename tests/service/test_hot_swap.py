"""A moved alias: the version that answered goes on until the next one is ready, and goes when nobody needs it."""

import asyncio
import itertools
import json
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from bench.service import put_version
from model_store.files import VersionNotFound
from model_store.manifest import WEIGHTS
from model_store.store import LoadedVersion, ModelStore
from models.naive import NaiveForecaster
from service.app import create_admin_app
from service.engine.following import CHANNEL
from service.engine.memory import default_budget
from service.engine.registry import Registry
from service.engine.selection import Selection
from service.metrics import Metrics
from service.state import PrivateRedis
from tests.service.test_engine import counted, held, until

pytestmark = pytest.mark.anyio

NAIVE = {"model": "naive", "interval": "1h", "horizon": 3}
TOTO = {"model": "toto", "interval": "1h", "horizon": 2}
SWAPS = 5
CALLERS = 16
REQUESTS = 2000
NEVER = 3600.0  # seconds until the store is looked at of its own accord


@pytest.fixture
def put_toto(store: ModelStore, tinies: Any) -> Callable[..., str]:
    """Store and promote a tiny toto-demo with weights of its own; its version."""

    def put(seed: int, spoil: Callable[[dict[str, Any]], None] = lambda weights: None) -> str:
        config, weights = tinies(seed)["toto"]
        copied = {name: tensor.clone() for name, tensor in weights.items()}
        spoil(copied)
        return put_version(store, "toto-demo", "toto", config, copied).partition("@")[2]

    return put


def corrupt(store: ModelStore, version: str, model: str = "toto-demo", file: str = WEIGHTS) -> Path:
    """Flip a bit of the weights, or of another file; where they lie."""
    path = Path(store.root) / model / version / file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


async def followed(app: Any) -> None:
    """Return when the service has seen the store as it is now and done what follows from it."""
    await app.state.services.registry.look()
    await app.state.services.registry.idle()


async def answered_by(client: Any, rows: Any, symbol: str = "BTC", **body: Any) -> str:
    """The version that answers."""
    answer = await client.post(f"/forecast/{symbol}", json=TOTO | {"candles": rows(32)} | body)
    assert answer.status_code == 200, answer.text
    version: str = answer.json()["model"]["version"]
    return version


@asynccontextmanager
async def admin_of(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_admin_app(app.state.services), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as admin:
        yield admin


# -- under load ----------------------------------------------------------------------------------------


async def test_swaps_under_load_fail_no_request_and_mix_no_versions(
    running: Any, rows: Any, store: ModelStore, put_toto: Any
) -> None:
    versions = [put_toto(seed) for seed in range(SWAPS + 1)]
    store.promote(f"toto-demo@{versions[0]}", force="test")
    bodies = [
        json.dumps(TOTO | {"candles": rows(32 - 2 * place), "cache": "use" if place % 4 else "bypass"}).encode()
        for place in range(8)
    ]
    seen: list[list[tuple[int, str, Any]]] = [[] for _ in range(CALLERS)]
    done = asyncio.Event()

    async with running(build=LoadedVersion.build, store_poll_seconds=NEVER) as (client, app), admin_of(app) as admin:
        assert await answered_by(client, rows) == versions[0]
        await app.state.services.registry.idle()

        async def call(mine: list[tuple[int, str, Any]], first: int) -> None:
            for place in itertools.count(first):
                status, content = await post(app, "/forecast/BTC", bodies[place % len(bodies)])
                assert status == 200, content
                told = json.loads(content)
                mine.append((place % len(bodies), told["model"]["version"], (told["forecast"], told["quantiles"])))
                if done.is_set():
                    return

        async with asyncio.TaskGroup() as callers:
            for number, mine in enumerate(seen):
                callers.create_task(call(mine, number))
            for count, version in enumerate(versions[1:], start=1):
                await until(lambda count=count: sum(map(len, seen)) >= count * REQUESTS / (SWAPS + 1), seconds=60)
                promoted = await admin.post(
                    "/models/toto/promote", json={"version": version, "force": "random weights cannot be evaluated"}
                )
                assert promoted.status_code == 200, promoted.text
                await until(lambda version=version: any(mine[-1][1] == version for mine in seen), seconds=60)
            await until(lambda: sum(map(len, seen)) >= REQUESTS, seconds=60)
            done.set()
        expected = {
            (place, version): await exactly(client, body, version)
            for (place, body), version in itertools.product(enumerate(bodies), versions)
        }
        assert counted(app, "model_swaps_total", model="toto-demo", outcome="done") == SWAPS
    assert sum(map(len, seen)) >= REQUESTS
    assert len({json.dumps(each) for each in expected.values()}) == len(expected)
    for mine in seen:
        order = [versions.index(version) for _, version, _ in mine]
        assert order == sorted(order), "an earlier version came back"
        for place, version, told in mine:
            assert told == expected[place, version]
    assert set(Counter(version for mine in seen for _, version, _ in mine)) == set(versions)


async def post(app: Any, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of an answer, as a server would get them: a client's own work would be most of the test's."""
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": head}
    sent: list[Any] = []
    received = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        return next(received, None) or await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope | {"query_string": b"", "http_version": "1.1", "root_path": ""}, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


async def exactly(client: Any, body: bytes, version: str) -> Any:
    """What a version answers alone."""
    asked = json.loads(body) | {"model": f"toto-demo@{version}", "cache": "bypass"}
    told = (await client.post("/forecast/BTC", json=asked)).json()
    assert told["model"]["version"] == version
    return told["forecast"], told["quantiles"]


async def test_the_old_version_answers_until_the_new_one_is_loaded_and_finishes_what_it_began(
    running: Any, rows: Any, put_naive: Any, faulty: Any
) -> None:
    loading, builds = threading.Event(), []

    def build(*_: Any) -> Any:
        builds.append(None)
        if len(builds) == 1:
            return faulty
        assert loading.wait(10)
        return NaiveForecaster()

    async with running(build=build, store_poll_seconds=NEVER) as (client, app):
        first = await held(client, rows, faulty)
        moved = put_naive(created_at="2025-02-02T00:00:00Z").version
        await app.state.services.registry.look()
        await until(lambda: len(builds) == 2)
        while_loading = asyncio.create_task(client.post("/forecast/BTC", json=NAIVE | {"candles": rows(8), "seed": 1}))
        await until(lambda: app.state.services.engine._batcher.depth == 1)
        loading.set()
        await asyncio.sleep(0)
        faulty.open.set()
        before = [(await each).json()["model"]["version"] for each in (first, while_loading)]
        await app.state.services.registry.idle()
        after = (await client.post("/forecast/BTC", json=NAIVE | {"candles": rows(8)})).json()["model"]["version"]
    assert moved == after
    assert moved not in before


async def test_the_memory_of_a_version_that_was_swapped_is_given_back(running: Any, rows: Any, put_toto: Any) -> None:
    put_toto(1)
    async with running(build=LoadedVersion.build, store_poll_seconds=NEVER) as (client, app):
        registry = app.state.services.registry
        for _ in range(3):  # the third is answered by the short cut
            await answered_by(client, rows)
        await registry.idle()
        ((_, model),) = registry.loaded().items()
        weights = [weakref.ref(weight) for weight in model.forecaster.decoder.parameters()]
        size = registry.bytes
        del model
        moved = put_toto(2)
        await followed(app)
        assert [*registry.loaded()] == [f"toto-demo@{moved}"]
        assert {weight() for weight in weights} == {None}
        assert registry.bytes == pytest.approx(size, rel=0.01)
        assert await answered_by(client, rows) == moved


# -- how a service hears of it -------------------------------------------------------------------------


async def test_a_promotion_elsewhere_is_seen_at_the_next_look(running: Any, rows: Any, put_toto: Any) -> None:
    first = put_toto(1)
    async with running(build=LoadedVersion.build, store_poll_seconds=0.02) as (client, app):
        assert await answered_by(client, rows) == first
        moved = put_toto(2)
        await until(lambda: f"toto-demo@{moved}" in app.state.services.registry.serving().values())
        assert await answered_by(client, rows) == moved


async def test_a_promotion_through_one_process_is_heard_of_by_the_others(
    running: Any, rows: Any, store: ModelStore, put_naive: Any, tmp_path: Path
) -> None:
    url = f"unix://{tmp_path / 'home' / 'redis' / PrivateRedis.SOCKET}"
    async with (
        running(store_poll_seconds=NEVER) as (_, one),
        running(store_poll_seconds=NEVER, redis_url=url) as (client, other),
        admin_of(one) as admin,
    ):
        before = (await client.post("/forecast/BTC", json=NAIVE | {"candles": rows(8)})).json()["model"]["version"]
        other_version = put_naive(created_at="2024-01-01T00:00:00Z").version
        store.promote(f"naive@{before}", force="test")
        while (await one.state.services.state.redis.pubsub_numsub(CHANNEL))[0][1] < 2:
            await asyncio.sleep(0.01)
        promoted = await admin.post("/models/naive/promote", json={"version": other_version})
        assert promoted.json() == {"model": "naive", "version": other_version, "symbol": None, "shadow": None}
        serving = other.state.services.registry.serving
        await until(lambda: serving()["naive", "production"] == f"naive@{other_version}")


async def test_the_gate_refuses_with_its_reason(running: Any, store: ModelStore, put_naive: Any) -> None:
    scored = {"skill_vs_naive": {"value": 0.2, "low": 0.1, "high": 0.3}}
    windows = {"windows": "test", "symbols": ["A"], "start": "2025-01-01", "end": "2025-02-01", "interval": "1h"}
    put_naive(evaluations=[{**windows, "horizon": 3, "origins": 9, "metrics": scored}])
    current = store.aliases("naive")["production"]
    worse = store.aliases("naive")["previous"]
    async with running() as (client, app), admin_of(app) as admin:
        store.promote(f"naive@{current}", force="test")
        refused = await admin.post("/models/naive/promote", json={"version": worse})
        assert refused.status_code == 409
        assert refused.json()["code"] == "promotion_refused"
        assert "skill_vs_naive" in refused.json()["detail"]
        assert store.aliases("naive")["production"] == current
        unknown = await admin.post("/models/naive/promote", json={"version": "0" * 12})
        assert unknown.status_code == 404
        assert (await client.post("/models/naive/promote", json={"version": worse})).status_code in (404, 405)
        forced = await admin.post("/models/naive/promote", json={"version": worse, "force": "a test"})
        assert forced.status_code == 200
        assert store.log("naive")[-1]["force"] == "a test"


# -- versions that do not take over --------------------------------------------------------------------


def poison(weights: dict[str, Any]) -> None:
    """Finite weights, of which no forecast can be made."""
    for weight in weights.values():
        weight.fill_(3e38)


@pytest.mark.parametrize("reason", ["verification", "rehearsal"])
async def test_a_bad_version_never_replaces_a_good_one(
    running: Any, rows: Any, store: ModelStore, put_toto: Any, reason: str
) -> None:
    good = put_toto(1)
    async with running(build=LoadedVersion.build, store_poll_seconds=NEVER) as (client, app):
        assert await answered_by(client, rows) == good
        bad = put_toto(2, spoil=poison if reason == "rehearsal" else lambda weights: None)
        if reason == "verification":
            corrupt(store, bad)  # after the gate has seen it
        await followed(app)
        assert await answered_by(client, rows) == good
        told = (await client.get("/models")).json()
        [failure] = told["failures"]
        assert (failure["version"], failure["reason"], failure["tries"]) == (bad, reason, 1)
        assert bad in failure["detail"]
        assert str(store.root) not in failure["detail"]
        [serving] = [each for each in told["models"] if each["answers_for"]]
        assert (serving["version"], serving["answers_for"]) == (good, ["production"])
        assert counted(app, "model_load_failures_total", model="toto-demo", reason=reason) == 1
        assert counted(app, "model_swaps_total", model="toto-demo", outcome="failed") == 1
        assert counted(app, "model_swap_pending", model="toto-demo") == 1

        better = put_toto(3)
        await followed(app)
        assert await answered_by(client, rows) == better
        assert counted(app, "model_swap_pending", model="toto-demo") == 0


async def test_a_version_that_fails_is_tried_again_less_and_less_often_and_at_once_when_an_alias_moves(
    running: Any, rows: Any, store: ModelStore, put_toto: Any
) -> None:
    good = put_toto(1)
    async with running(build=LoadedVersion.build, store_poll_seconds=NEVER) as (client, app):
        assert await answered_by(client, rows) == good
        bad = put_toto(2)
        path = corrupt(store, bad)
        for _ in range(5):
            await followed(app)
        failure = app.state.services.registry.failures.all()[f"toto-demo@{bad}"]
        assert failure.tries == 2
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
        store.set_alias("toto-demo", "candidate", bad)
        await followed(app)
        assert await answered_by(client, rows) == bad
        assert (await client.get("/models")).json()["failures"] == []


# -- memory --------------------------------------------------------------------------------------------


async def test_versions_that_no_alias_needs_make_room_and_what_does_not_fit_is_refused(
    running: Any, rows: Any, store: ModelStore, put_toto: Any
) -> None:
    older, first = put_toto(1), put_toto(2)
    size = sum(entry.bytes for entry in store.manifest("toto-demo").files.values())
    async with running(build=LoadedVersion.build, store_poll_seconds=NEVER, memory_budget_gb=2.5 * size / 1e9) as (
        client,
        app,
    ):
        registry = app.state.services.registry
        assert await answered_by(client, rows) == first
        assert await answered_by(client, rows, model=f"toto-demo@{older}") == older
        await registry.idle()
        assert registry.bytes == pytest.approx(2 * size, rel=0.01)
        second = put_toto(3)
        await followed(app)
        assert [*registry.loaded()] == [f"toto-demo@{second}"]
        registry._budget = lambda: int(1.5 * size)
        third = put_toto(4)
        await followed(app)
        assert await answered_by(client, rows) == second
        [failure] = (await client.get("/models")).json()["failures"]
        assert (failure["version"], failure["reason"]) == (third, "memory")
        assert "CANDLECAST_MEMORY_BUDGET_GB" in failure["detail"]
        refused = await client.post("/forecast/BTC", json=TOTO | {"model": f"toto-demo@{older}", "candles": rows(32)})
        assert refused.status_code == 503


def test_the_budget_follows_the_container(tmp_path: Path) -> None:
    limit, none = tmp_path / "memory.max", tmp_path / "absent"
    limit.write_text("1000000\n")
    assert default_budget("cpu", (none, limit)) == 500_000
    whole = default_budget("cpu", (none,))
    assert whole > 2**27
    limit.write_text("max\n")
    assert default_budget("cpu", (limit,)) == whole


# -- references ----------------------------------------------------------------------------------------


async def test_a_symbol_may_have_a_version_of_its_own(
    running: Any, rows: Any, store: ModelStore, put_toto: Any
) -> None:
    own, common = put_toto(1), put_toto(2)
    async with running(build=LoadedVersion.build, store_poll_seconds=NEVER) as (client, app):
        for symbol in ("BTC", "ETH"):
            assert await answered_by(client, rows, symbol) == common
        store.promote(f"toto-demo@{own}", symbol="BTC", force="test")
        await followed(app)
        assert await answered_by(client, rows, "btc") == common, "until its own is loaded"
        await app.state.services.registry.idle()
        assert await answered_by(client, rows, "BTC") == own
        assert await answered_by(client, rows, "ETH") == common
        assert await answered_by(client, rows, "BTC", model=f"toto-demo@{common}") == common
        assert await answered_by(client, rows, "BTC", model="toto@production") == common
    async with running(build=LoadedVersion.build) as (client, _):
        assert await answered_by(client, rows, "BTC") == own, "the first request already"


async def test_an_alias_is_followed_and_an_alias_that_is_gone_is_unknown(
    running: Any, rows: Any, store: ModelStore, put_toto: Any
) -> None:
    first, second = put_toto(1), put_toto(2)
    async with running(build=LoadedVersion.build, store_poll_seconds=NEVER) as (client, app):
        assert await answered_by(client, rows) == second
        store.set_alias("toto-demo", "candidate", first)
        assert await answered_by(client, rows, model="toto@candidate") == first
        store.set_alias("toto-demo", "candidate", second)
        await followed(app)
        assert await answered_by(client, rows, model="toto@candidate") == second
        (Path(store.root) / "toto-demo" / "aliases" / "candidate.json").unlink()
        (Path(store.root) / "toto-demo" / "aliases").touch()
        await followed(app)
        answer = await client.post("/forecast/BTC", json=TOTO | {"model": "toto@candidate", "candles": rows(32)})
        assert answer.status_code == 404


class Watched(ModelStore):
    """A store that tells from where it is asked, and whose aliases may move while it answers."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked_by: list[threading.Thread] = []
        self.promoted_next: str | None = None

    def aliases(self, model: str) -> dict[str, str]:
        found = super().aliases(model)
        self.asked_by.append(threading.current_thread())
        moved, self.promoted_next = self.promoted_next, None
        if moved:
            self.promote(moved, force="test")
        return found


async def as_it_is(_: Any) -> None:
    """Nothing is rehearsed."""


def registry_of(store: ModelStore, rehearse: Callable[[Any], Awaitable[None]] = as_it_is) -> Registry:
    selection, metrics = Selection(store, store.root.parent / "home", "cpu", None), Metrics(CollectorRegistry())
    return Registry(store, lambda *_: NaiveForecaster(), {}, "cpu", selection, rehearse, lambda: 2**30, metrics)


async def test_an_alias_that_moves_while_it_is_read_is_read_again(store: ModelStore, put_naive: Any) -> None:
    newer = put_naive(created_at="2025-02-01T00:00:00Z").version
    older = put_naive().version
    watched = Watched(store.root)
    registry = registry_of(watched)
    watched.promoted_next = f"naive@{newer}"
    assert (await registry.get("naive")).version == older
    await registry.look()
    await registry.idle()
    assert (await registry.get("naive")).version == newer


async def test_a_version_promoted_while_another_is_rehearsed_is_the_one_that_takes_over(
    store: ModelStore, put_naive: Any
) -> None:
    first, *others = [put_naive(created_at=f"2025-0{month}-01T00:00:00Z").version for month in (1, 2, 3)]
    store.promote(f"naive@{first}", force="test")
    rehearsed = []

    async def rehearse(model: Any) -> None:
        rehearsed.append(model.version)
        if len(rehearsed) == 1:
            store.promote(f"naive@{others[1]}", force="test")
            await registry.look()

    registry = registry_of(store, rehearse)
    assert (await registry.get("naive")).version == first
    store.promote(f"naive@{others[0]}", force="test")
    await registry.look()
    await registry.idle()
    assert rehearsed == others
    assert [*registry.loaded()] == [f"naive@{others[1]}"]
    assert (await registry.get("naive")).version == others[1]


async def test_the_store_is_read_off_the_event_loop(store: ModelStore, put_naive: Any) -> None:
    put_naive()
    watched = Watched(store.root)
    registry = registry_of(watched)
    await registry.get("naive")
    await registry.look()
    assert threading.current_thread() not in watched.asked_by
    assert watched.asked_by


async def test_invented_names_are_not_followed(store: ModelStore, put_naive: Any) -> None:
    put_naive()
    registry = registry_of(store)
    for number in range(3):
        with pytest.raises(VersionNotFound):
            await registry.get(f"invented{number}")
    assert registry._known == {}

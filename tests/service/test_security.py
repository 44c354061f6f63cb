"""Who may call: every route says it, nothing is read before it is known, and no key is ever told."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
import uvicorn
from click.testing import CliRunner
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from candlecast import _load_history, main
from feeds.put import FOREVER, Service
from service.api.errors import Unauthorized
from service.api.security import PUBLIC, Access, GuardedRoute, NoKeys, is_loopback
from service.app import create_admin_app, create_app
from service.keys import KeyFile, Quota, Scope, grant
from service.metrics import Metrics
from service.settings import Settings
from tests.service.conftest import NOW
from tests.service.test_engine import until
from tests.service.test_latest import Stream, put, settled

pytestmark = pytest.mark.anyio

PROBES = {"/livez", "/readyz", "/startupz", "/v2/health/live", "/v2/health/ready"}
OPEN_TO = {
    "POST /forecast/{symbol}": {"forecast"},
    "GET /watch": {"forecast"},
    "GET /forecast/{symbol}/latest": {"forecast"},
    "GET /forecast/{symbol}/stream": {"forecast"},
    "GET /forecasts/{symbol}": {"forecast"},
    "GET /accuracy": {"forecast"},
    "GET /accuracy/{symbol}": {"forecast"},
    "GET /candles/{symbol}": {"forecast", "ingest"},
    "PUT /candles/{symbol}": {"ingest"},
    "GET /symbols": {"forecast", "ingest"},
    "GET /models": {"forecast", "admin"},
    "GET /models/{name}/shadow": {"forecast", "admin"},
    "GET /models/{name}/weights": {"forecast", "admin"},
    "GET /v2": {"forecast"},
    "GET /v2/models/{name}": {"forecast"},
    "GET /v2/models/{name}/ready": {"forecast"},
    "POST /v2/models/{name}/infer": {"forecast"},
    "GET /v2/models/{name}/versions/{version}": {"forecast"},
    "GET /v2/models/{name}/versions/{version}/ready": {"forecast"},
    "POST /v2/models/{name}/versions/{version}/infer": {"forecast"},
    "POST /models/{name}/weights": {"admin"},
    "POST /models/{name}/promote": {"admin"},
    "GET /config": {"admin"},
}

CLOSED = Access("on", "127.0.0.1", Path("there/is/none"), lambda: 0, Metrics(CollectorRegistry()))

Make = Callable[..., dict[str, str]]


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    """The file of keys of `running`."""
    return KeyFile(tmp_path / "home" / "keys.json")


@pytest.fixture
def make(file: KeyFile) -> Make:
    """The header with a new key, by its scopes."""

    def make(*scopes: Scope, **fields: Any) -> dict[str, str]:
        key, _ = file.make(grant(name=fields.pop("name", "trader"), scopes=scopes, **fields))
        return {"Authorization": f"Bearer {key}"}

    return make


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request looks at the file of keys."""
    monkeypatch.setattr("service.api.security._LOOK_SECONDS", -1.0)


def body(rows: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "naive", "interval": "1h", "candles": rows(), "horizon": 2, **fields}


def both_apps(tmp_path: Path, **settings: Any) -> list[FastAPI]:
    app = create_app(Settings(home=tmp_path, store_root=tmp_path / "store", **settings))
    return [app, create_admin_app(app.state.services)]


# -- every route ---------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["all", "evaluator"])
def test_each_route_declares_its_scopes_or_is_known_to_be_public(tmp_path: Path, role: str) -> None:
    public, opened = set(), {}
    for app in both_apps(tmp_path, role=role):
        routers = [app.router, *(each.original_router for each in app.routes if hasattr(each, "original_router"))]
        for route in (route for router in routers for route in router.routes if hasattr(route, "path")):
            if isinstance(route, GuardedRoute) and route.scopes:
                opened |= {f"{method} {route.path}": route.scopes for method in route.methods}
            else:
                public.add(route.path)
    documentation = {"/docs", "/openapi.json", "/docs/oauth2-redirect"}
    assert public == PROBES | {"/metrics", "/", "/page/{name}"} | documentation
    assert opened == OPEN_TO


def test_a_route_that_declares_nothing_cannot_be_made() -> None:
    async def endpoint() -> None: ...

    with pytest.raises(TypeError, match="/new does not declare who may call it"):
        GuardedRoute("/new", endpoint)
    assert not GuardedRoute("/new", endpoint, openapi_extra=PUBLIC).scopes


def test_the_description_names_the_key_and_the_refusals(tmp_path: Path) -> None:
    described = both_apps(tmp_path)[0].openapi()
    assert described["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    asked = described["paths"]["/forecast/{symbol}"]["post"]
    assert asked["security"] == [{"key": ["forecast"]}]
    assert {"401", "403", "429"} <= asked["responses"].keys()
    assert described["paths"]["/livez"]["get"]["security"] == []


@pytest.mark.parametrize("scope", ["forecast", "ingest", "admin"])
async def test_a_key_opens_the_routes_of_its_scope_and_no_other(running: Any, make: Make, scope: Scope) -> None:
    key = make(scope)
    async with running() as (client, app):
        admin = httpx.ASGITransport(create_admin_app(app.state.services), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=admin, base_url="http://test") as admin_client:
            for described, scopes in OPEN_TO.items():
                method, path = described.split()
                at = admin_client if path == "/config" or (method == "POST" and path.startswith("/models")) else client
                path = path.format(symbol="BTC", name="naive", version="none")
                if path.endswith("stream"):
                    continue
                without, with_it = await at.request(method, path), await at.request(method, path, headers=key)
                assert without.status_code == 401, described
                assert without.json().get("code") == (None if path.startswith("/v2") else "key_required"), described
                assert (with_it.status_code == 403) == (scope not in scopes), described
                assert with_it.status_code != 401, described
            for path in PROBES:
                assert (await client.get(path)).status_code == 200
            assert "candlecast_denials_total" in (await admin_client.get("/metrics")).text


# -- what is no key ------------------------------------------------------------------------------


async def test_refusals_say_what_is_wrong_and_repeat_nothing(running: Any, make: Make, file: KeyFile) -> None:
    good = make("forecast")["Authorization"]
    unknown = file.path.parent / "elsewhere" / "keys.json"
    stranger, _ = KeyFile(unknown).make(grant(name="x", scopes=["forecast"]))
    async with running() as (client, _):
        cases = [
            ("key_required", []),
            ("malformed_key", [good[:-1]]),
            ("malformed_key", [good.replace("Bearer", "Basic")]),
            ("malformed_key", [good, good]),
            ("malformed_key", ["Bearer " + "a" * 5000]),
            ("unknown_key", [f"Bearer {stranger}"]),
        ]
        for code, sent in cases:
            answer = await client.get("/symbols", headers=[("Authorization", each) for each in sent])
            assert (answer.status_code, answer.json()["code"]) == (401, code)
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
            assert answer.json()["next_steps"]
            assert len(answer.content) < 1024
            assert not any(each[10:] in answer.text for each in sent)
        assert (await client.get("/symbols", headers={"authorization": good.replace("Bearer", "bEARER")})).is_success
        assert (await client.get(f"/symbols?key={good[7:]}&access_token={good[7:]}")).status_code == 401


@given(st.lists(st.binary(max_size=300) | st.binary(max_size=200).map(lambda tail: b"Bearer cc_" + tail), max_size=3))
def test_no_bytes_in_the_header_are_taken_for_a_key_or_break_the_check(sent: list[bytes]) -> None:
    scope = {"headers": [(b"authorization", each) for each in sent], "path_params": {}}
    with pytest.raises(Unauthorized) as raised:
        CLOSED.admit(scope, frozenset({"forecast"}))
    assert raised.value.code == ("malformed_key" if sent else "key_required")


async def test_a_stranger_s_body_is_not_read_and_takes_no_permit(running: Any, make: Make) -> None:
    make("forecast")
    async with running() as (_, app):
        sent: list[Any] = []

        async def receive() -> Any:
            pytest.fail("the body was read")

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/forecast/BTC",
            "query_string": b"",
            "headers": [(b"content-length", b"1000000")],
        }
        app.state.services.door.permit = None
        await app(scope, receive, send)
        assert sent[0]["status"] == 401


async def test_a_wrong_secret_costs_as_much_work_as_an_unknown_name(file: KeyFile, monkeypatch: Any) -> None:
    key, _ = file.make(grant(name="x", scopes=["forecast"]))
    stranger, _ = KeyFile(file.path.parent / "elsewhere" / "keys.json").make(grant(name="x", scopes=["forecast"]))
    keys, hashed = file.read(), []
    monkeypatch.setattr("service.keys._hash", lambda pepper, text: hashed.append(text) or "")
    assert keys.find(stranger.encode()) is keys.find(key.encode()) is keys.find(b"nothing") is None
    assert hashed == [stranger.encode(), key.encode(), b"nothing"]


# -- symbols and quotas --------------------------------------------------------------------------


async def test_a_key_for_some_symbols_reads_and_writes_no_others(running: Any, make: Make, rows: Any) -> None:
    key, whole = make("forecast", "ingest", symbols=["btc/*"]), make("ingest")
    stored = {"candles": rows(), "interval": "1h"}
    async with running() as (client, _):
        for symbol in ("BTC-USDT", "ETH-USDT"):
            assert (await client.put(f"/candles/{symbol}", json=stored, headers=whole)).is_success
        for allowed in ("BTC-USDT", "btc%2Fusdt", "btc:usdt"):
            assert (await client.get(f"/candles/{allowed}", headers=key)).status_code == 200
        for path in ("/candles/ETH-USDT", "/accuracy/eth%2Fusdt", "/forecasts/ETH-USDT"):
            answer = await client.get(path, headers=key)
            assert (answer.status_code, answer.json()["code"]) == (403, "symbol_not_allowed")
        assert (await client.put("/candles/ETH-USDT", json=stored, headers=key)).status_code == 403
        assert (await client.post("/forecast/ETH-USDT", json=body(rows), headers=key)).status_code == 403
        listed = (await client.get("/symbols", headers=key)).json()["symbols"]
        assert [each["symbol"] for each in listed] == ["BTC-USDT"]


@pytest.mark.usefixtures("patient")
async def test_a_forecast_costs_the_candles_that_are_read_and_drawn(running: Any, make: Make, rows: Any) -> None:
    key = make("forecast", quota=Quota(candles=20, seconds=3600))
    async with running() as (client, app):
        await settled(app)
        answers = [await client.post("/forecast/BTC", json=body(rows), headers=key) for _ in range(2)]
        assert [each.headers["RateLimit"].partition(";t=")[0] for each in answers] == [
            '"candles";r=10',  # 8 candles and 2 steps
            '"candles";r=9',  # the same bytes again
        ]
        assert answers[0].headers["RateLimit-Policy"] == '"candles";q=20;qu="candles";w=3600'
        refused = await client.post("/forecast/BTC", json=body(rows, horizon=3), headers=key)
        assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
        assert int(refused.headers["Retry-After"]) > 0
        assert refused.headers["RateLimit"].startswith('"candles";r=9;')
        assert refused.json()["next_steps"]
        never = await client.post("/forecast/BTC", json=body(rows, horizon=30), headers=key)
        assert (never.status_code, never.json()["code"]) == (403, "quota_too_small")
        assert (await client.get("/symbols", headers=key)).is_success


@pytest.mark.usefixtures("patient")
async def test_the_keys_of_one_client_share_its_quota_and_others_have_their_own(running: Any, make: Make) -> None:
    quota = Quota(candles=2, seconds=3600)
    first, second, other = make("forecast", quota=quota), make("forecast", quota=quota), make("forecast", name="other")
    async with running() as (client, _):
        statuses = [(await client.get("/symbols", headers=each)).status_code for each in (first, second, first)]
        assert statuses == [200, 200, 429]
        unlimited = await client.get("/symbols", headers=other)
        assert (unlimited.status_code, "RateLimit" in unlimited.headers) == (200, False)


@pytest.mark.usefixtures("patient")
async def test_stored_candles_cost_what_they_are(running: Any, make: Make, rows: Any) -> None:
    key = make("ingest", quota=Quota(candles=10, seconds=3600))
    async with running() as (client, _):
        stored = {"candles": rows(), "interval": "1h"}
        assert (
            (await client.put("/candles/BTC", json=stored, headers=key))
            .headers["RateLimit"]
            .startswith('"candles";r=2')
        )
        assert (await client.put("/candles/ETH", json=stored, headers=key)).status_code == 429
        assert (await client.get("/candles/ETH", headers=key)).status_code == 404


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("quota", [None, Quota(candles=10_000, seconds=60)])
async def test_a_request_asks_redis_once_for_its_quota_and_never_without_one(
    running: Any, make: Make, rows: Any, quota: Quota | None
) -> None:
    key = make("forecast", quota=quota)
    async with running() as (client, app):
        asked, ask = [], app.state.services.state.line.ask

        async def counted(*commands: Any) -> Any:
            asked.extend(command[0] for command in commands if command[0] == "EVAL")
            return await ask(*commands)

        app.state.services.state.line.ask = counted
        for count in range(1, 4):
            assert (await client.post("/forecast/BTC", json=body(rows), headers=key)).is_success
            assert asked == (["EVAL"] * count if quota else [])


# -- the file changes ----------------------------------------------------------------------------


@pytest.mark.usefixtures("forget")
async def test_changes_count_without_a_restart_and_a_lost_file_changes_nothing(
    running: Any, make: Make, file: KeyFile
) -> None:
    async with running() as (client, app):

        async def status(headers: dict[str, str] | None = None) -> int:
            return (await client.get("/symbols", headers=headers)).status_code

        assert await status() == 200  # loopback, and no keys yet
        key = make("forecast")
        assert (await status(), await status(key)) == (401, 200)
        text = file.path.read_bytes()
        file.path.write_text("{")
        assert (await status(), await status(key)) == (401, 200)
        degraded = app.state.services.metrics.registry.get_sample_value
        assert degraded("candlecast_degraded", {"reason": "keys"}) == 1
        file.path.unlink()
        assert (await status(), await status(key)) == (401, 200)
        file.path.write_bytes(text)
        assert await status(key) == 200
        assert degraded("candlecast_degraded", {"reason": "keys"}) == 0
        file.revoke(key["Authorization"].split("_")[2])
        assert await status(key) == 401


@pytest.mark.usefixtures("forget")
async def test_keys_that_can_never_be_read_let_nobody_in(running: Any, file: KeyFile) -> None:
    async with running() as (client, _):
        file.path.write_text("{")
        assert (await client.get("/symbols")).status_code == 401
        assert (await client.get("/livez")).status_code == 200


def test_a_key_counts_until_its_time_is_over(file: KeyFile) -> None:
    key, record = file.make(grant(name="x", scopes=["forecast"]), timedelta(hours=1))
    ends, clock = record.expires_at, [datetime.now(UTC)]
    assert ends
    access = Access("auto", "::", file.path, lambda: int(1000 * clock[0].timestamp()), Metrics(CollectorRegistry()))
    scope = {"headers": [(b"authorization", f"Bearer {key}".encode())], "path_params": {}}
    caller = access.admit(scope, frozenset({"forecast"}))
    assert access.holds(caller)
    clock[0] = ends
    with pytest.raises(Unauthorized, match="time is over"):
        access.admit(scope, frozenset({"forecast"}))
    assert not access.holds(caller)


@pytest.mark.usefixtures("forget")
async def test_a_stream_ends_once_its_key_was_revoked(running: Any, make: Make, file: KeyFile, rows: Any) -> None:
    key, feed = make("forecast")["Authorization"], make("ingest")
    async with running(watch="BTC:naive:3") as (client, app):
        client.headers.update(feed)
        await put(client, rows(8)[:-1])
        stream = Stream(app, authorization=key)
        await until(lambda: stream.events)
        file.revoke(key.split("_")[2])
        await put(client, rows(8))
        await asyncio.wait_for(stream.task, 60)
        assert len(stream.events) == 1


async def test_keys_count_while_redis_is_down_and_after_it_was_flushed(running: Any, make: Make, rows: Any) -> None:
    key = make("forecast", quota=Quota(candles=1000, seconds=60))
    async with running() as (client, app):
        await app.state.services.state.redis.flushall()
        assert (await client.post("/forecast/BTC", json=body(rows), headers=key)).status_code == 200
        app.state.services.state._server._process.kill()
        assert (await client.post("/forecast/BTC", json=body(rows, horizon=3), headers=key)).status_code == 200
        assert (await client.post("/forecast/BTC", json=body(rows, horizon=3))).status_code == 401


# -- where it listens ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "only_here"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "10.1.2.3", "", "example.com", "localhost.example.com")],
)
def test_without_keys_only_this_machine_may_call(tmp_path: Path, host: str, only_here: bool) -> None:
    def access(auth: Any = "auto") -> Access:
        return Access(auth, host, tmp_path / "keys.json", lambda: 0, Metrics(CollectorRegistry()))

    nobody: Any = {"headers": [], "path_params": {}}
    assert is_loopback(host) is only_here
    if only_here:
        access().admit(nobody, frozenset({"admin"}))
    else:
        with pytest.raises(NoKeys, match="candlecast keys make"):
            access()
    access("off").admit(nobody, frozenset({"admin"}))
    with pytest.raises(Unauthorized):
        access("on").admit(nobody, frozenset({"forecast"}))


def test_serve_says_in_one_line_why_it_does_not_listen(tmp_path: Path) -> None:
    places = {"HOST": "0.0.0.0", "HOME": str(tmp_path), "PORT": "0", "ADMIN_PORT": "0", "STORE_ROOT": str(tmp_path)}
    done = CliRunner().invoke(main, ["serve"], env={f"CANDLECAST_{name}": value for name, value in places.items()})
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: others can call what listens on 0.0.0.0, and there are no keys")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("settings", "status"), [({}, 200), ({"docs": False}, 404), ({"host": "::"}, 404)])
async def test_documentation_is_shown_here_and_elsewhere_only_if_asked(
    running: Any, settings: dict[str, Any], status: int
) -> None:
    async with running(auth="off", **settings) as (client, _):
        for path in ("/docs", "/openapi.json"):
            assert (await client.get(path)).status_code == status
        assert ('href="docs"' in (await client.get("/")).text) == (status == 200), "the page leads nowhere else"
    async with running(auth="off", host="::", docs=True) as (client, _):
        assert (await client.get("/docs")).status_code == 200


# -- browsers ------------------------------------------------------------------------------------


async def test_web_pages_may_call_only_from_the_origins_of_the_setting(running: Any, make: Make) -> None:
    key = make("forecast")
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with running() as (client, _):
        closed = await client.options("/forecast/BTC", headers={"Origin": "https://desk.example", **asks})
        assert "access-control-allow-origin" not in closed.headers
    async with running(cors_origins="https://desk.example, https://two.example") as (client, _):
        for origin, expected in (("https://desk.example", "https://desk.example"), ("https://evil.example", None)):
            preflight = await client.options("/forecast/BTC", headers={"Origin": origin, **asks})
            answer = await client.get("/symbols", headers={"Origin": origin, **key})
            assert preflight.headers.get("access-control-allow-origin") == expected
            assert answer.headers.get("access-control-allow-origin") == expected
            assert "access-control-allow-credentials" not in answer.headers


async def test_every_answer_says_how_browsers_must_take_it(running: Any, make: Make) -> None:
    make("forecast")
    async with running(max_body_bytes=10) as (client, _):
        answers = [await client.get(path) for path in ("/livez", "/symbols", "/nowhere", "/docs")]
        answers.append(await client.post("/forecast/BTC", content=b"a" * 11))
    assert [answer.status_code for answer in answers] == [200, 401, 404, 200, 413]
    for answer in answers:
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Cache-Control"] == "no-store"


# -- nothing is told -----------------------------------------------------------------------------


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Everything that is logged at any level, tracebacks too."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(logging.Formatter().format(record))  # type: ignore[method-assign]
    loggers = [logging.getLogger(), *(logging.getLogger(f"uvicorn{name}") for name in ("", ".access", ".asgi"))]
    before = [(each.level, each.propagate) for each in loggers]
    for each in loggers:
        each.addHandler(handler)
        each.setLevel(1)
    yield lines
    for each, (level, propagate) in zip(loggers, before, strict=True):
        each.removeHandler(handler)
        each.setLevel(level)
        each.propagate = propagate


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[str]:
    """The URL of a real server at its most talkative."""
    config = uvicorn.Config(app, port=0, lifespan="off", log_config=None, log_level="trace", access_log=True)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    try:
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        yield "http://{}:{}".format(*server.servers[0].sockets[0].getsockname())
    finally:
        server.should_exit = True
        await task


async def test_no_key_is_ever_logged_or_answered(
    running: Any, make: Make, rows: Any, logged: list[str], faulty: Any, faulty_build: Any
) -> None:
    key = make("forecast")["Authorization"].removeprefix("Bearer ")
    wrong, answers = key[:-9] + "0" * 9, []
    faulty.failure = RuntimeError("the model broke")
    async with running(build=faulty_build) as (_, app), serving(app) as url:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            for sent in (key, wrong):
                headers = {"Authorization": f"Bearer {sent}"}
                answers.append(await client.post("/forecast/BTC", json=body(rows, cache="bypass"), headers=headers))
                answers += [await client.get(path, headers=headers) for path in ("/symbols", "/models")]
        parts = app.state.services
        told = [*logged, *(each.text + str(each.headers) for each in answers), f"{parts!r}", f"{vars(parts.access)}"]
    assert [each.status_code for each in answers] == [500, 200, 200, 401, 401, 401]
    assert any("the model broke" in line for line in logged)
    assert any("GET /symbols" in line for line in logged)
    for secret in (key, wrong, parts.access.own_key):
        assert secret[20:40] not in " ".join(told[:-1])
    assert key[20:40] not in told[-1]


@pytest.mark.usefixtures("patient")
async def test_serve_loads_candles_and_feeds_wait_for_their_quota(
    running: Any, make: Make, rows: Any, tmp_path: Path
) -> None:
    key = make("ingest", quota=Quota(candles=10, seconds=3600))["Authorization"].removeprefix("Bearer ")
    candles, clock = rows(), [NOW]
    times, values = np.array([row[0] for row in candles]), np.array([row[1:] for row in candles])
    names = ("timestamp", "open", "high", "low", "close", "volume")
    (tmp_path / "data").mkdir()
    pd.DataFrame(dict(zip(names, zip(*candles, strict=True), strict=True))).to_csv(tmp_path / "data" / "IBM.csv")

    def wait(seconds: float) -> None:
        clock[0] += int(1000 * seconds)

    def put_twice(url: str) -> list[str]:
        said: list[str] = []
        with closing(Service(url, key=key, patience=FOREVER, say=said.append, sleep=wait)) as service:
            for symbol in ("BTC", "ETH"):
                service.put(symbol, times, values, "1h")
        return said

    async with running(now=lambda: clock[0]) as (_, app), serving(app) as url:
        own_key = app.state.services.access.own_key
        assert await asyncio.to_thread(_load_history, tmp_path / "data", url, own_key) == ["IBM"]
        assert await asyncio.to_thread(_load_history, tmp_path / "data", url, None) == []
        (said,) = await asyncio.to_thread(put_twice, url)
        assert "429" in said
        assert [each.symbol for each in await app.state.services.history.symbols()] == ["BTC", "ETH", "IBM"]

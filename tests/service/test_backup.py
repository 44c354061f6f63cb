"""What was backed up comes back: every answer, the whole of one instant, or nothing at all."""

import asyncio
import json
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.service import redis_running
from candlecast import main
from model_store.files import VerificationFailed
from model_store.store import ModelStore
from service.backup import DIGEST, HISTORY, INDEX, RestoreRefused, _take_snapshot, backup, restore
from service.settings import Settings
from service.state import StateError, connect
from tests.service.conftest import Clock

pytestmark = pytest.mark.anyio

HOUR = 3_600_000
AHEAD = 80  # within the week in which a candle that comes is scored
NAIVE = {"model": "naive", "horizon": AHEAD, "seed": 7}
ASKED = (
    "/symbols",
    "/candles/BTC",
    "/accuracy",
    "/accuracy/BTC",
    "/forecasts/BTC",
    "/models",
)


@pytest.fixture
def there(tmp_path: Path) -> Settings:
    """A machine that has nothing yet."""
    return Settings(home=tmp_path / "h2", store_root=tmp_path / "elsewhere")


@asynccontextmanager
async def remote(folder: Path) -> AsyncIterator[str]:
    """A server of somebody else, and the URL of a database of it that is not the first."""
    async with redis_running(folder) as (url, _):
        yield f"{url}?db=3"


async def keep(client: Any, app: Any, rows: Any, clock: Clock, come: int = 3) -> None:
    """A history of which a forecast was made, and some candles that came after it."""
    stored = {"interval": "1h", "candles": rows(40, end=clock.now)}
    assert (await client.put("/candles/BTC", json=stored)).json()["new"] == 40
    assert (await client.post("/forecast/BTC", json=NAIVE)).status_code == 200
    await app.state.services.register.flush()
    clock.now += AHEAD * HOUR
    later = rows(AHEAD, end=clock.now)[:come]
    if later:
        assert (await client.put("/candles/BTC", json={"interval": "1h", "candles": later})).json()["scored"] == come


async def answers(client: Any, app: Any) -> dict[str, bytes]:
    """All that can be asked, once the evaluator has looked at it."""
    evaluator = app.state.services.evaluator
    evaluator.touch("BTC", "1h")
    await evaluator.caught_up("BTC", "1h")
    await evaluator.summarise()
    forecast = (await client.post("/forecast/BTC", json=NAIVE)).json()
    del forecast["meta"]["timings_ms"]
    found = {path: (await client.get(path)).content for path in ASKED}
    return found | {"POST": json.dumps(forecast).encode()}


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.score.evaluator._EVERY_SECONDS", 0.0)


@pytest.fixture
async def archive(running: Any, rows: Any, clock: Clock, tmp_path: Path) -> Path:
    async with running(now=clock) as (client, app):
        await keep(client, app, rows, clock)
        await backup(app.state.services.settings, tmp_path / "all.tar")
    return tmp_path / "all.tar"


async def stored(settings: Settings) -> dict[bytes, bytes]:
    """Every key of the private server and what it holds."""
    async with redis_running(settings.home / "redis") as (_, client):
        return {key: await client.dump(key) async for key in client.scan_iter()}  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("is_remote", [False, True])
async def test_another_machine_answers_every_question_as_the_first_did(
    running: Any, rows: Any, clock: Clock, tmp_path: Path, there: Settings, is_remote: bool
) -> None:
    archive = tmp_path / "all.tar"
    async with remote(tmp_path / "r1") as first, remote(tmp_path / "r2") as second:
        place = {"redis_url": first} if is_remote else {}
        async with running(now=clock, **place) as (client, app):
            await keep(client, app, rows, clock)
            index = await backup(app.state.services.settings, archive)
            before = await answers(client, app)
        assert json.loads(before["/accuracy"])["models"]
        target = there.model_copy(update={"redis_url": second}) if is_remote else there
        assert await restore(target, archive) == index
        chosen = target.model_dump(include={"home", "store_root", "redis_url"})
        async with running(now=clock, **chosen) as (client, app):
            assert await answers(client, app) == before


async def test_what_a_backup_holds_is_of_one_instant_while_candles_come(
    running: Any, rows: Any, clock: Clock, tmp_path: Path, there: Settings
) -> None:
    async with running(now=clock) as (client, app):
        await keep(client, app, rows, clock, come=0)
        coming, came = rows(AHEAD, end=clock.now), 0

        async def come() -> None:
            nonlocal came
            for each in coming:
                assert (await client.put("/candles/BTC", json={"interval": "1h", "candles": [each]})).is_success
                came += 1
                await asyncio.sleep(0.005)

        writer = asyncio.create_task(come())
        while came < 10 and not writer.done():
            await asyncio.sleep(0)
        earliest = came
        await backup(app.state.services.settings, tmp_path / "all.tar")
        latest = came + 1  # one may be stored and not yet be answered
        await writer
    assert earliest + 1 < latest
    await restore(there, tmp_path / "all.tar")
    async with running(now=clock, home=there.home, store_root=there.store_root) as (client, app):
        kept = len((await client.get("/candles/BTC")).json()["candles"]) - 40
        assert earliest <= kept <= latest
        rest = (await client.put("/candles/BTC", json={"interval": "1h", "candles": coming})).json()
        assert (rest["new"], rest["scored"]) == (AHEAD - kept, AHEAD - kept)
        blocks = await app.state.services.ledger.blocks("BTC", "1h")
        assert sum(each.sums["count"].sum() for each in blocks.values()) == AHEAD


async def test_a_promotion_during_the_snapshot_has_it_taken_again(
    there: Settings, store: ModelStore, put_naive: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_naive()
    here = there.model_copy(update={"store_root": store.root})
    (here.home / "redis").mkdir(parents=True)
    versions = []

    def take(*arguments: Any) -> Any:
        if len(versions) < 2:
            versions.append(put_naive(created_at=f"2025-02-0{len(versions) + 1}T00:00:00Z").version)
        return _take_snapshot(*arguments)

    monkeypatch.setattr("service.backup._take_snapshot", take)
    index = await backup(here, tmp_path / "all.tar")
    await restore(there, tmp_path / "all.tar")
    assert ModelStore(there.store_root).resolve("naive") == ("naive", versions[-1])
    assert {f"store/naive/{version}/manifest.json" for version in versions} < index.files.keys()


async def test_one_changed_byte_anywhere_and_nothing_is_restored(archive: Path, there: Settings) -> None:
    with tarfile.open(archive) as tar:
        members = {member.name: (member.offset, member.offset_data, member.size) for member in tar}
    whole = archive.read_bytes()
    assert {HISTORY, INDEX, DIGEST} < members.keys()
    for name, (header, data, size) in members.items():
        for place in (header, data, data + size // 2, data + size - 1):
            archive.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(VerificationFailed, match=r"all\.tar"):
                await restore(there, archive)
        for length in (header, data, data + size // 2):
            archive.write_bytes(whole[:length])
            with pytest.raises(VerificationFailed, match=r"all\.tar"):
                await restore(there, archive)
        assert not there.home.exists(), name
        assert not Path(there.store_root).exists(), name


async def test_a_history_or_an_alias_that_is_there_stays_unless_it_is_to_be_replaced(
    archive: Path, there: Settings, store: ModelStore, put_naive: Any
) -> None:
    await restore(there, archive)
    before = await stored(there)
    with pytest.raises(RestoreRefused, match="a history already"):
        await restore(there, archive)
    other = ModelStore(there.store_root)
    later = put_naive(created_at="2025-02-01T00:00:00Z")  # in the first store
    other.put_files(later, store.files(f"naive@{later.version}")[1], reason="later")
    other.promote(f"naive@{later.version}", force="test")
    with pytest.raises(RestoreRefused, match="another production"):
        await restore(there, archive)
    assert await stored(there) == before
    assert other.resolve("naive") == ("naive", later.version)
    await restore(there, archive, replace=True)
    assert await stored(there) == before
    assert other.resolve("naive") != ("naive", later.version)
    assert later.version in other.versions("naive")


async def test_a_restore_that_fails_halfway_leaves_no_alias_and_no_key(
    archive: Path, there: Settings, tmp_path: Path
) -> None:
    other = ModelStore(there.store_root)
    in_the_way = Path(there.store_root) / "toto-demo" / "aliases"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    with pytest.raises(OSError, match="aliases"):
        await restore(there, archive)
    in_the_way.unlink()
    assert await stored(there) == {}
    assert not other.aliases("naive")
    async with remote(tmp_path / "r") as url:
        full = connect(url)
        await full.config_set("maxmemory", 1)
        with pytest.raises(StateError, match="memory"):
            await restore(there.model_copy(update={"redis_url": url}), archive)
        assert await full.dbsize() == 0
        await full.aclose()
    assert not other.aliases("naive")
    await restore(there, archive)


async def test_a_service_that_runs_is_not_restored_under(running: Any, archive: Path, there: Settings) -> None:
    async with running(home=there.home, store_root=there.store_root):
        with pytest.raises(StateError, match="another service"):
            await restore(there, archive)


async def test_a_server_that_forbids_snapshots_is_named(there: Settings, tmp_path: Path) -> None:
    async with remote(tmp_path / "r") as url:
        admin = connect(url)
        await admin.execute_command("ACL", "SETUSER", "default", "-sync")  # type: ignore[no-untyped-call]
        with pytest.raises(StateError, match="NOPERM"):
            await backup(there.model_copy(update={"redis_url": url}), tmp_path / "all.tar")
        await admin.aclose()
    assert not (tmp_path / "all.tar").exists()


def test_the_verbs_back_up_without_a_service_and_without_keys(
    tmp_path: Path, store: ModelStore, put_naive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_naive()
    archive = tmp_path / "all.tar"
    monkeypatch.setenv("CANDLECAST_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CANDLECAST_STORE_ROOT", str(store.root))
    run = CliRunner().invoke
    assert "holds no history" in run(main, ["backup", str(archive)]).output
    (tmp_path / "home" / "redis").mkdir(parents=True)
    assert run(main, ["keys", "make", "desk", "--scope", "forecast"]).exit_code == 0
    told = run(main, ["backup", str(archive), "--json"])
    assert told.exit_code == 0, told.output
    assert archive.stat().st_mode & 0o777 == 0o600
    with tarfile.open(archive) as tar:
        assert {name.split("/")[0] for name in tar.getnames()} == {HISTORY, "store", INDEX, DIGEST}
    assert "exists" in run(main, ["backup", str(archive)]).output
    monkeypatch.setenv("CANDLECAST_HOME", str(tmp_path / "h2"))
    monkeypatch.setenv("CANDLECAST_STORE_ROOT", str(tmp_path / "elsewhere"))
    assert run(main, ["restore", str(archive), "--json"]).output == told.output
    assert ModelStore(tmp_path / "elsewhere").log("naive") == store.log("naive")
    assert not list(tmp_path.glob(".backup-*"))

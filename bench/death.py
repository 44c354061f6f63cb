"""Services that are ended: in turn under load, while they load a model, and by SIGKILL."""

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Final, NamedTuple, Protocol
from urllib.parse import urlsplit

from redis import Redis

from bench.balancer import Balancer
from bench.load import SEED, Record, Target, open_loop, poisson
from bench.service import Service, forecast_body, put_version, redis_running, start_naive_service, start_service
from model_store.store import ModelStore
from service.state import PrivateRedis

DRAIN_SECONDS: Final = 10  # as in k8s/base; the balancer notices after two, where the machine is not busy
_FORECASTS: Final = 1000  # at least
_RATE: Final = 50.0  # a second
_STRETCH_SECONDS: Final = 2.0
_PATIENCE: Final = 300.0
_LOADS_FOR_EVER: Final = """
import json, sys, time
from functools import partial
from pathlib import Path
from service import main
from service.settings import Settings

def build(version, device):
    Path(sys.argv[1]).touch()
    time.sleep(3600)

main.create_app = partial(main.create_app, build=build)
main.serve(Settings(), lambda at: print(json.dumps({"url": at.url, "admin_url": at.admin_url}), flush=True))
"""


class Backend(Protocol):
    """A running service of this machine."""

    @property
    def port(self) -> int:
        """For callers."""

    async def stop(self) -> int:
        """End it by SIGTERM; its exit status."""


class Rolled(NamedTuple):
    """What became of a load, and of the services that were ended under it."""

    records: Sequence[Record]
    exits: Sequence[int]
    seconds: Sequence[float]  # from SIGTERM to the end of the process

    @property
    def failed(self) -> Counter[tuple[int, bytes]]:
        """Requests without an answer of 200, by status and answer."""
        return Counter((record.status, record.body) for record in self.records if record.status != 200)


async def roll(running: Sequence[Backend], start: Callable[[], Awaitable[Backend]], path: str, body: bytes) -> Rolled:
    """Replace services by others in turn, while a balancer leads a steady load of a thousand forecasts or more to them.

    TimeoutError if that does not come to an end.
    """
    balancer, records = Balancer(), list[Record]()
    async with asyncio.timeout(_PATIENCE), balancer.listening() as port:
        await asyncio.gather(*(balancer.add(each.port) for each in running))
        rolling = asyncio.create_task(_replace(balancer, running, start))
        target = Target("127.0.0.1", port, path, body)
        while not rolling.done() or len(records) < _FORECASTS:
            arrivals = poisson(_RATE, _STRETCH_SECONDS, seed=len(records))
            records += await open_loop(target, arrivals, first_seed=len(records))
        exits, seconds = zip(*await rolling, strict=True)
    return Rolled(records, exits, seconds)


async def _replace(
    balancer: Balancer, running: Sequence[Backend], start: Callable[[], Awaitable[Backend]]
) -> list[tuple[int, float]]:
    ended = []
    for old in running:
        ending = asyncio.create_task(_end(old))
        await balancer.add((await start()).port)
        ended.append(await ending)
        await balancer.remove(old.port)
    return ended


async def _end(backend: Backend) -> tuple[int, float]:
    begun = time.monotonic()
    return await backend.stop(), time.monotonic() - begun


class _Started:
    def __init__(self, service: Service) -> None:
        self.port = urlsplit(service.url).port or 0
        self._service = service

    async def stop(self) -> int:
        return (await asyncio.to_thread(self._service.end))[0]


async def roll_two(folder: Path) -> Rolled:
    """Two services on one Redis, each replaced once."""
    store = ModelStore(folder / "store")
    put_version(store, "naive", "naive", {"family": "naive"}, {})
    async with contextlib.AsyncExitStack() as stack:
        url, _ = await stack.enter_async_context(redis_running(folder / "redis"))
        settings = {"CANDLECAST_REDIS_URL": url, "CANDLECAST_DRAIN_SECONDS": str(DRAIN_SECONDS)}
        homes = (folder / f"home-{number}" for number in range(4))

        async def start() -> _Started:
            starting = start_service(store, next(homes), settings)
            service = await asyncio.to_thread(starting.__enter__)
            stack.callback(starting.__exit__, None, None, None)
            return _Started(service)

        running = [await start(), await start()]
        return await roll(running, start, "/forecast/BENCH", forecast_body("naive", 64, horizon=5))


def ended_while_loading(folder: Path) -> tuple[int, float]:
    """SIGTERM to a service that loads a model, and would for an hour: its exit status, and the seconds until then."""
    store, loading = ModelStore(folder / "store"), folder / "loading"
    put_version(store, "naive", "naive", {"family": "naive"}, {})
    with start_service(store, folder / "home", {}, ("-c", _LOADS_FOR_EVER, str(loading))) as service:
        at = urlsplit(service.forecast_url())
        caller = HTTPConnection(at.hostname or "", at.port)
        body = forecast_body("naive", 64, horizon=5).replace(SEED, b"0")
        caller.request("POST", at.path, body, {"Content-Type": "application/json"})
        while not loading.exists():
            time.sleep(0.01)
        caller.close()
        return service.end()


class Restarted(NamedTuple):
    """A service that was killed and started again."""

    seconds: float  # until it was ready
    before: Sequence[bytes]  # its candles, and the forecasts that wait for others
    after: Sequence[bytes]
    log: str  # of the second


def restarted(folder: Path, *, redis_too: bool) -> Restarted:
    """SIGKILL to a service with a Redis of its own, and to that as well or not; then its start in the same home."""
    with start_naive_service(folder, {}) as service:
        service.ask(forecast_body("naive", None, interval="1h", horizon=5), symbol="BTC-USDT")
        while not (before := _kept(service))[1].count(b"naive@"):  # it is noted behind the answer
            time.sleep(0.01)
        with Redis(unix_socket_path=str(folder / "home" / "redis" / PrivateRedis.SOCKET)) as redis:
            server = int(redis.info("server")["process_id"])
        service.end(signal.SIGKILL)
        if redis_too:
            os.kill(server, signal.SIGKILL)
    with start_service(ModelStore(folder / "store"), folder / "home", {}) as service:
        return Restarted(service.ready_seconds, before, _kept(service), (folder / "home" / "service.log").read_text())


def _kept(service: Service) -> list[bytes]:
    return [service.get(f"/{what}/BTC-USDT") for what in ("candles", "forecasts")]

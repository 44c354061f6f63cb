"""A balancer that learns late who is ready, as one before a Kubernetes Service does, and tries nothing twice."""

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from bench.connection import Answer, Connection

_PATIENCE: Final = 10.0  # with one that is slow to say whether it is ready
_LENGTH: Final = re.compile(rb"(?mi)^content-length: *(\d+)")


@dataclass
class _Backend:
    port: int
    ready: bool = False  # as far as the balancer knows
    idle: list[Connection] = field(default_factory=list)
    follower: asyncio.Task[None] | None = None


class Balancer:
    """Leads each request to the next backend of this machine whose /readyz answered 200 when it was asked last.

    Each is asked every `every` seconds, and what it answers counts `lag` seconds later. Connections are kept alive on
    both sides. A request whose backend breaks the connection is answered 502, and 503 where none is ready.
    """

    def __init__(self, every: float = 1.0, lag: float = 1.0) -> None:
        self._every, self._lag = every, lag
        self._backends: dict[int, _Backend] = {}
        self._turn = itertools.count()
        self._clients: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Its port, for as long as the block lasts."""
        server = await asyncio.start_server(self._serve, "127.0.0.1")
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for port in list(self._backends):
                await self.remove(port)
            for each in self._clients:
                each.cancel()
            await asyncio.gather(*self._clients, return_exceptions=True)

    async def add(self, port: int) -> None:
        """Follow a backend; returns when requests are led to it."""
        backend = self._backends[port] = _Backend(port)
        backend.follower = asyncio.create_task(self._follow(backend))
        while not backend.ready:
            await asyncio.sleep(0.02)

    async def remove(self, port: int) -> None:
        """Forget a backend that has ended."""
        backend = self._backends.pop(port)
        assert backend.follower
        backend.follower.cancel()
        await asyncio.wait({backend.follower})
        for connection in backend.idle:
            connection.close()

    async def _follow(self, backend: _Backend) -> None:
        def believe(ready: bool) -> None:
            backend.ready = ready

        while True:
            asyncio.get_running_loop().call_later(self._lag, believe, await _is_ready(backend.port))
            await asyncio.sleep(self._every)

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._clients.add(task)
        try:
            while head := await client.readuntil(b"\r\n\r\n"):
                length = _LENGTH.search(head)
                answer = await self._forward(head + await client.readexactly(int(length[1]) if length else 0))
                said = b"HTTP/1.1 %d \r\nContent-Length: %d\r\n\r\n" % (answer.status, len(answer.body))
                to_client.write(said + answer.body)
                await to_client.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):  # it has hung up, or all ends here
            pass
        finally:
            self._clients.discard(task)
            to_client.close()

    async def _forward(self, request: bytes) -> Answer:
        ready = [backend for backend in self._backends.values() if backend.ready]
        if not ready:
            return Answer(503, b"no backend is ready")
        backend = ready[next(self._turn) % len(ready)]
        connection = backend.idle.pop() if backend.idle else Connection("127.0.0.1", backend.port)
        try:
            answer = await connection.send(request)
        except OSError as error:
            return Answer(502, str(error).encode())
        backend.idle.append(connection)
        return answer


async def _is_ready(port: int) -> bool:
    connection = Connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(_PATIENCE):
            return (await connection.get("/readyz")).status == 200
    except OSError:  # also one that has not answered in time
        return False
    finally:
        connection.close()

"""A TCP proxy that hurts on purpose; its faults are named as in toxiproxy."""

import asyncio
import contextlib
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, Literal

Fault = Literal["none", "down", "timeout", "latency", "limit_data", "slicer", "garbage"]

_READ_BYTES: Final = 65_536
_SLICED_BYTES: Final = 256  # of every piece; the rest goes at once, for the sake of the test's own time
_GREETINGS: Final = (b"HELLO", b"CLIENT", b"SELECT")  # a cut within these would keep every command from the server


class FaultProxy:
    """Listens on a port of its own and passes bytes to a server's unix socket, as its fault allows.

    `down` refuses connections and cuts those there are; `timeout` swallows what clients send; `latency` holds every
    piece of a reply for `seconds`; `limit_data` cuts the connection within a reply, after the server has done what it
    replies to; `slicer` passes replies byte by byte; `garbage` spoils every byte of them.
    """

    def __init__(self, target: Path, seconds: float = 0.5) -> None:
        self.port = 0
        self._target = target
        self._seconds = seconds
        self._fault: Fault = "none"
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where clients find the server."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    async def become(self, fault: Fault) -> None:
        """Have this fault from now on; connections end where it changes what is under way in them."""
        self._fault = fault
        if fault == "down":
            await self._stop_listening()
        elif self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]
        if fault in ("none", "down"):
            await self._cut()

    async def stop(self) -> None:
        """End all connections and listen no more."""
        await self.become("down")

    async def _stop_listening(self) -> None:
        if self._server:
            self._server.close()
            self._server = None

    async def _cut(self) -> None:
        for each in self._connections:
            each.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._connections.add(task)
        writers, asked = [to_client], asyncio.Event()
        try:
            server, to_server = await asyncio.open_unix_connection(str(self._target))
            writers.append(to_server)
            await self._join(self._requests(client, to_server, asked), self._replies(server, to_client, asked))
        except (OSError, asyncio.CancelledError):  # the server is gone, or `_cut`
            pass
        finally:
            self._connections.discard(task)
            for writer in writers:
                writer.transport.abort()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    async def _join(self, *directions: Coroutine[Any, Any, None]) -> None:
        """Until either direction ends."""
        tasks = [asyncio.ensure_future(each) for each in directions]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _requests(
        self, client: asyncio.StreamReader, to_server: asyncio.StreamWriter, asked: asyncio.Event
    ) -> None:
        while data := await client.read(_READ_BYTES):
            if not any(word in data for word in _GREETINGS):
                asked.set()
            if self._fault != "timeout":
                to_server.write(data)
                await to_server.drain()

    async def _replies(
        self, server: asyncio.StreamReader, to_client: asyncio.StreamWriter, asked: asyncio.Event
    ) -> None:
        while data := await server.read(_READ_BYTES):
            if self._fault == "latency":
                await asyncio.sleep(self._seconds)
            if self._fault == "limit_data" and asked.is_set():
                to_client.write(data[: len(data) // 2])
                await to_client.drain()
                return
            if self._fault == "garbage":
                data = bytes(byte ^ 0xA5 for byte in data)
            sliced = min(len(data), _SLICED_BYTES) if self._fault == "slicer" else 0
            for place in range(sliced):
                to_client.write(data[place : place + 1])
                await asyncio.sleep(0)
            to_client.write(data[sliced:])
            await to_client.drain()

"""One keep-alive HTTP/1.1 connection: as little as a load client needs, so that the client is not what is measured."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import httptools


@dataclass(frozen=True)
class Answer:
    """A response; `body` is whole, and the names of `headers` are in lower case."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class Connection:
    """Sends one request at a time, over a new socket where the server has closed the last one.

    `key` is an API key, where one is asked for.
    """

    def __init__(self, host: str, port: int, key: str | None = None) -> None:
        self._host, self._port = host, port
        fields = [f"Host: {host}\r\n", *([f"Authorization: Bearer {key}\r\n"] if key else [])]
        self._head = "".join(fields).encode()
        self._socket: _Socket | None = None

    async def post(self, path: str, body: bytes) -> Answer:
        """The answer to a POST of JSON; ConnectionError if the connection breaks before it is whole."""
        head = b"POST %b HTTP/1.1\r\n%bContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        return await self.send(head % (path.encode(), self._head, len(body)) + body)

    async def get(self, path: str) -> Answer:
        """The answer to a GET, likewise."""
        return await self.send(b"GET %b HTTP/1.1\r\n%b\r\n" % (path.encode(), self._head))

    async def send(self, request: bytes) -> Answer:
        """The answer to a whole request, sent as it is; likewise."""
        if self._socket is None or self._socket.closed:
            _, self._socket = await asyncio.get_running_loop().create_connection(_Socket, self._host, self._port)
        return await self._socket.exchange(request)

    def close(self) -> None:
        """Close the connection if it is open."""
        if self._socket is not None:
            self._socket.close()


class _Socket(asyncio.Protocol):
    """One TCP connection; also the callbacks of httptools' parser."""

    def __init__(self) -> None:
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[Answer] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._headers: dict[str, str] = {}

    async def exchange(self, request: bytes) -> Answer:
        assert self._transport is not None
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._waiting

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.close()

    # -- asyncio.Protocol ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"the answer is not HTTP: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._fail(ConnectionError("the server closed the connection before it had answered"))

    # -- httptools -------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, part: bytes) -> None:
        self._parts.append(part)

    def on_message_complete(self) -> None:
        answer = Answer(self._parser.get_status_code(), b"".join(self._parts), self._headers)
        if not self._parser.should_keep_alive():
            self.close()
        self._parser, self._parts, self._headers = httptools.HttpResponseParser(self), [], {}
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(answer)

    def _fail(self, error: Exception) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error)

"""One keep-alive HTTP/1.1 connection: as little as a load client needs, so that the client is not what is measured."""

import asyncio
from dataclasses import dataclass, field

import httptools


@dataclass
class Answer:
    """A response; `body` is whole."""

    status: int
    body: bytes


@dataclass
class Connection(asyncio.Protocol):
    """Sends one request at a time; the server may close between two."""

    host: str
    port: int
    _transport: asyncio.Transport | None = None
    _parser: httptools.HttpResponseParser | None = None
    _waiting: asyncio.Future[Answer] | None = None
    _body: list[bytes] = field(default_factory=list)

    async def post(self, path: str, body: bytes) -> Answer:
        """The answer to a POST of JSON; ConnectionError if the connection breaks before it is whole."""
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            self._transport, _ = await loop.create_connection(lambda: self, self.host, self.port)
        self._parser = httptools.HttpResponseParser(self)
        self._body.clear()
        self._waiting = loop.create_future()
        self._transport.write(
            b"POST %b HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (path.encode(), self.host.encode(), len(body), body)
        )
        return await self._waiting

    def close(self) -> None:
        """Close the connection if it is open."""
        if self._transport is not None:
            self._transport.close()

    # -- asyncio.Protocol ------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"the answer is not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail(ConnectionError("the server closed the connection before it had answered"))

    # -- httptools -------------------------------------------------------------------------------

    def on_body(self, part: bytes) -> None:
        self._body.append(part)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(Answer(self._parser.get_status_code(), b"".join(self._body)))

    def _fail(self, error: Exception) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error)

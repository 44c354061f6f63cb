"""Callers' connections: HTTP/1.1 as uvicorn speaks it, and an end to those that hold one without using it."""

import asyncio
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MOST_HEAD_BYTES: Final = 65_536  # beside what came in one piece with its beginning
_MOST_PIPELINED: Final = 100  # uvicorn itself reads on while one is answered, without end


class Connection(HttpToolsProtocol):
    """Is cut after `seconds` of waiting for the rest of a request, or for the caller to take more of an answer."""

    seconds = 30.0
    _owed: asyncio.TimerHandle | None = None  # runs until a request is whole
    _stalled: asyncio.TimerHandle | None = None  # runs while the caller takes nothing
    _head_bytes: int | None = None  # None outside a head

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self.resume_writing()
        self._expect_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._expect()
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if (self._head_bytes or 0) > _MOST_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= _MOST_PIPELINED:
            raise ValueError("too many requests wait for this connection's answers")  # the parser makes it a 400
        super().on_message_begin()
        self._head_bytes = 0
        self._expect()

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._expect_no_more()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self._stalled or self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled:
            self._stalled.cancel()
            self._stalled = None

    def _expect(self) -> None:
        self._owed = self._owed or self.loop.call_later(self.seconds, self.transport.abort)

    def _expect_no_more(self) -> None:
        if self._owed:
            self._owed.cancel()
            self._owed = None

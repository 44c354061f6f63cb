"""The log: lines of text or of JSON, each with the id of the request that it is about.

What a batch meets is logged by the engine's thread, for several requests at once and with no id.
"""

import json
import logging
import re
import secrets
import time
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Final, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LogFormat = Literal["text", "json"]

REQUEST_ID: Final = "x-request-id"
request_id: Final[ContextVar[str | None]] = ContextVar("request_id", default=None)
trace_id: Final[ContextVar[str | None]] = ContextVar("trace_id", default=None)

_HEADER: Final = REQUEST_ID.encode()
_answers = logging.getLogger("service.answers")
_WELLFORMED: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def set_up(kind: LogFormat) -> None:
    """Log warnings to stderr, as JSON a line for every answer too; takes the place of whatever logged before."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines() if kind == "json" else _TextLines("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    _answers.setLevel(logging.INFO if kind == "json" else logging.WARNING)


class _TextLines(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        known = request_id.get()
        return super().formatMessage(record) + (f" [{known}]" if known else "")


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if known := request_id.get():
            told["request_id"] = known
        if traced := trace_id.get():
            told["trace_id"] = traced
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told)


def method_and_route(scope: Scope) -> tuple[str, str]:
    """What a request asked, by the template of its route; nothing that a caller made up."""
    method = scope["method"] if scope["method"] in _METHODS else "_other"
    return method, getattr(scope.get("route"), "path", "_none")


class StatusSeen:
    """What an application sends, passed on; `status` is that of its answer, and 500 where none came."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 500

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


class KnownRequests:
    """Every request has an id, the caller's own where it is well formed; its answer says it, and its lines in the log.

    The id stays after the answer: what a server logs about a failure comes later, in the same context.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, seen = time.monotonic(), StatusSeen(send)
        sent = [value for name, value in scope["headers"] if name == _HEADER]
        known = sent[0].decode() if len(sent) == 1 and _WELLFORMED.fullmatch(sent[0]) else secrets.token_hex(8)
        request_id.set(known)
        trace_id.set(None)  # in a pipeline one request's context goes on from another's

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [each for each in message["headers"] if each[0] != _HEADER]
                message["headers"] = [*others, (_HEADER, known.encode())]
            await seen(message)

        try:
            await self.app(scope, receive, told)
        finally:
            if _answers.isEnabledFor(logging.INFO):
                method, route = method_and_route(scope)
                ms = round(1e3 * (time.monotonic() - started), 3)
                facts = {"method": method, "route": route, "status": seen.status, "ms": ms}
                _answers.info("answered", extra={"facts": facts})

"""Between the socket and the routes: strict JSON, bounded bodies, slashes in symbols, connections, counts."""

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar
from urllib.parse import unquote

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import BodyTooLarge, MalformedBody, in_protocol, problem
from service.api.security import GuardedRoute
from service.logs import StatusSeen, method_and_route
from service.metrics import Metrics

T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)

_MOST_VALUES: Final = 500_000  # twice the cells of 20,000 candles in the widest form
_MOST_OBJECTS: Final = 40_000  # twice 20,000 candles; Python looks at each
_MOST_MEMBERS: Final = 100  # several times as many as any request has


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class StrictRequest(Request):
    """JSON that means one thing: UTF-8, no key twice, no depth or number that only an attack has."""

    async def json(self) -> Any:
        return strict_json(await self.body())


def strict_json(body: bytes) -> Any:
    """What a body says; MalformedBody or BodyTooLarge if it does not mean one thing, or too many."""
    if (objects := body.count(b"{")) > _MOST_OBJECTS:
        raise BodyTooLarge(f"the body holds more than {_MOST_OBJECTS} objects")
    if len(body) > _MOST_VALUES and objects + body.count(b",") + body.count(b"[") > _MOST_VALUES:
        raise BodyTooLarge(f"the body holds more than {_MOST_VALUES} values")
    parsed = _plain_object(body) if objects == 1 else None
    return _any_json(body) if parsed is None else _first(parsed)


async def read_body(request: StrictRequest, kind: type[Body]) -> Body | None:
    """The body as `kind`, None where there is none; MalformedBody or RequestValidationError if it is something else."""
    body: Any = await request.body()
    if not body:
        return None
    if _is_json(request.headers.get("content-type", "")):
        body = await request.json()
    return None if body is None else validated(body, kind)


def validated(body: Any, kind: type[Body]) -> Body:
    """What was read, as `kind`; RequestValidationError if it is something else."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in found]) from None


def names_tag(header: str | None, tag: str) -> bool:
    """Whether an If-None-Match names a tag, weakly."""
    named = [each.strip().removeprefix("W/") for each in (header or "").split(",")]
    return "*" in named or tag.removeprefix("W/") in named


class StrictRoute(GuardedRoute):
    """A route that reads its body as StrictRequest does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict


class BodyLimit:
    """Refuse bodies over a limit: at once where their length is announced, else while they arrive."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.limit:
            error = BodyTooLarge(f"the body is longer than {self.limit} bytes")
            refusal = problem(413, error.code, error.detail, headers={"Connection": "close"})
            return await in_protocol(scope["path"], refusal)(scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise BodyTooLarge(f"the body is longer than {self.limit} bytes")
            return message

        await self.app(scope, counted, send)


class SymbolPaths:
    """`/forecast/BTC%2FUSDT` is one segment: servers decode the slash, which would end the symbol there."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw: bytes = scope.get("raw_path") or b""
        if b"%2f" in raw.lower():
            segments = raw.partition(b"?")[0].decode("latin-1").split("/")
            scope["path"] = "/".join(unquote(segment).replace("/", "-") for segment in segments)
        await self.app(scope, receive, send)


class ClosedConnections:
    """Every answer of a service that is about to stop ends its connection, so that the caller's next one finds another.

    Else a balancer of connections would lead those that are kept alive to it until it has gone.
    """

    def __init__(self, app: ASGIApp, draining: Callable[[], bool]) -> None:
        self.app = app
        self.draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self.app(scope, receive, closing if self.draining() else send)


class CountedAnswers:
    """Counts and times every answer by the template of its route, never by its path."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = time.monotonic()
        self.metrics.http_in_flight.inc()
        seen = StatusSeen(send)
        try:
            await self.app(scope, receive, seen)
        finally:
            self.metrics.http_in_flight.dec()
            method, route = method_and_route(scope)
            self.metrics.http_requests.labels(route, method, str(seen.status)).inc()
            self.metrics.http_seconds.labels(route, method).observe(time.monotonic() - started)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the caller hangs up; ClientGone then."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_hung_up(request.receive))
    watcher.add_done_callback(lambda _: task.cancel())
    try:
        return await task
    except asyncio.CancelledError:
        if watcher.done():
            raise ClientGone from None
        raise
    finally:
        watcher.cancel()


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _is_json(content_type: str) -> bool:
    main, _, sub = content_type.partition(";")[0].strip().lower().partition("/")
    return main == "application" and (sub == "json" or sub.endswith("+json"))


def _plain_object(body: bytes) -> dict[str, Any] | None:
    """The JSON of a body that is one object without members further inside, read fast; None if it may be anything else.

    The fast parser lets a later key win; where there are as many colons as keys, no key came twice.
    """
    try:
        parsed = from_json(body)
    except ValueError:  # the thorough parser says what is wrong
        return None
    return parsed if isinstance(parsed, dict) and body.count(b":") == len(parsed) else None


def _any_json(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError:
        raise MalformedBody("the body is not UTF-8") from None
    except RecursionError:
        raise MalformedBody("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise MalformedBody(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # an integer of thousands of digits
        raise MalformedBody("the body holds a number that is too long") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise MalformedBody("an object holds one key twice")
    return _first(found)


def _first(found: dict[str, Any]) -> dict[str, Any]:
    """The first members of an object that has more than any request's: they already say that it is none."""
    return found if len(found) <= _MOST_MEMBERS else dict(itertools.islice(found.items(), _MOST_MEMBERS))

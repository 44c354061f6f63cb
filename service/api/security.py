"""Who may call: keys and their scopes, asked for before anything of a request's body is read.

Each route declares beside itself what its callers need, in OpenAPI's own words: `openapi_extra=open_to("forecast")`, or
PUBLIC. One that declares nothing cannot be made.
"""

import ipaddress
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import Depends, Request
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as HttpScope

from service.api.errors import Forbidden, QuotaExceeded, Unauthorized, problems
from service.api.quotas import Quotas
from service.api.schemas import normalise_symbol
from service.keys import ApiKey, Auth, Grant, KeyFile, Keys, KeysUnreadable, Scope, is_wellformed, make_key
from service.metrics import Metrics

_log = logging.getLogger(__name__)

PUBLIC: Final[dict[str, Any]] = {"security": []}
_COST: Final = "x-candlecast-cost"
_LOOK_SECONDS: Final = 1.0  # from one look at the file of keys to the next
_BEARER: Final = re.compile(rb"[Bb][Ee][Aa][Rr][Ee][Rr] +([!-~]{1,256})")
_HEADERS: Final = (  # unless a route has its own
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)


class NoKeys(RuntimeError):
    """Others than this machine could call, and nobody would have to show a key; the message says what to do."""


def open_to(*scopes: Scope, cost: str | None = None) -> dict[str, Any]:
    """For a route's `openapi_extra`: a key with any of these scopes opens it; `cost` says what its endpoint charges."""
    told = {
        401: "No key, or none that counts.",
        403: "The key is not for this, or not for this symbol.",
        429: "The key's quota is spent; Retry-After says for how long.",
    }
    refusals = {str(status): problems(status)[status] | {"description": text} for status, text in told.items()}
    return {
        "security": [{"key": [scope]} for scope in scopes],
        "responses": refusals,
        **({_COST: cost} if cost else {}),
    }


@dataclass
class Caller:
    """Whose request it is: a key's, or anybody's where none is asked for."""

    kid: str | None = None
    grant: Grant | None = None
    headers: Sequence[tuple[bytes, bytes]] = ()  # about the quota

    @property
    def client(self) -> str | None:
        """Whose key it is; None where none is asked for."""
        return self.grant.name if self.grant else None

    def may_ask(self, symbol: str) -> bool:
        """Whether a normalised symbol is one that the key is for."""
        return self.grant is None or self.grant.covers(symbol)


ANYBODY: Final = Caller()


class Access:
    """Looks at keys. The file of keys is read again soon after it has changed.

    With `auto` keys are asked for from when the file exists, and from then on always; NoKeys if it does not and others
    than this machine could call. A file that can be read no more leaves the keys as they were; one that could never be
    read lets nobody in.
    """

    def __init__(self, auth: Auth, host: str, path: Path, now: Callable[[], int], metrics: Metrics) -> None:
        self._auth = auth
        self._file = KeyFile(path)
        self._now = now
        self._metrics = metrics
        self._keys: Keys | None = None
        self._seen: tuple[int, ...] | None = None
        self._next_look = 0.0
        ours = Grant(name="serve", scopes=("ingest",))
        self._own_key, self._own = make_key(secrets.token_bytes(32), ours, datetime.now(UTC))  # for this process's life
        if auth == "off":
            return
        if path.exists():
            self._seen = self._signature()
            self._take(self._file.read())
        elif auth == "on":
            self._take(_NONE_YET)
        elif not is_loopback(host):
            raise NoKeys(
                f"others can call what listens on {host}, and there are no keys: make one with `candlecast keys make"
                " NAME`, or set CANDLECAST_AUTH=off where something else keeps strangers away"
            )

    @property
    def own_key(self) -> str | None:
        """A key of this process's own, to store candles with, where keys are asked for."""
        return self._own_key if self._current() else None

    def admit(self, scope: HttpScope, scopes: frozenset[str]) -> Caller:
        """The caller of a request to a route that these open; Unauthorized, Forbidden, or InputError for its symbol."""
        keys = self._current()
        if keys is None:
            return ANYBODY
        try:
            return self._admitted(scope, scopes, keys)
        except (Unauthorized, Forbidden) as error:
            self._metrics.denials.labels(error.code).inc()
            raise

    def require(self, caller: Caller, symbol: str) -> None:
        """Forbidden unless the caller's key is for a normalised symbol; for a route whose path does not name it."""
        try:
            _refuse_foreign(caller, symbol)
        except Forbidden as error:
            self._metrics.denials.labels(error.code).inc()
            raise

    def holds(self, caller: Caller) -> bool:
        """Whether a caller who was admitted before has a key that still counts."""
        keys = self._current()
        if keys is None or caller.kid is None:
            return keys is None
        key = keys.named(caller.kid)
        return key is not None and not self._has_expired(key)

    async def charge(self, caller: Caller, cost: int, quotas: Quotas) -> None:
        """Spend candles of the caller's quota; QuotaExceeded if they are not there. No quota: no wait."""
        if caller.grant is None or caller.grant.quota is None:
            return
        quota = caller.grant.quota
        standing = await quotas.spend(caller.grant.name, quota, cost)
        caller.headers = standing.headers
        if standing.fits:
            return
        detail = f"this costs {cost} candles of {quota.candles} in {quota.seconds} s"
        refusal = QuotaExceeded(detail, standing.wait) if standing.wait else Forbidden("quota_too_small", detail)
        self._metrics.denials.labels(refusal.code).inc()
        raise refusal

    def _admitted(self, scope: HttpScope, scopes: frozenset[str], keys: Keys) -> Caller:
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        if not sent:
            raise Unauthorized("key_required", "send a key: Authorization: Bearer cc_...")
        bearer = _BEARER.fullmatch(sent[0]) if len(sent) == 1 else None
        if bearer is None or not is_wellformed(bearer[1]):
            raise Unauthorized("malformed_key", "what was sent is no key, or one that was mistyped")
        key = keys.find(bearer[1])
        if key is None:
            raise Unauthorized("unknown_key", "no key that counts is this one")
        if self._has_expired(key):
            raise Unauthorized("expired_key", "the key's time is over")
        grant = key.grant
        if scopes.isdisjoint(grant.scopes):
            raise Forbidden("scope_missing", f"this takes a key with the scope {' or '.join(sorted(scopes))}")
        caller, symbol = Caller(key.kid, grant), scope["path_params"].get("symbol")
        if symbol is not None and grant.symbols:
            _refuse_foreign(caller, normalise_symbol(symbol))
        return caller

    def _has_expired(self, key: ApiKey) -> bool:
        return key.expires_at is not None and key.has_expired(datetime.fromtimestamp(self._now() / 1000, UTC))

    def _current(self) -> Keys | None:
        if self._auth != "off" and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            self._look()
        return self._keys

    def _look(self) -> None:
        """Read the file if it is another one than at the last look."""
        seen = self._signature()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._take(self._file.read())
        except (KeysUnreadable, OSError) as error:
            _log.error("the keys stay as they were: %s", error)
            self._metrics.degraded.labels("keys").set(1)
            if self._keys is None:
                self._take(_NONE_YET)
        else:
            self._metrics.degraded.labels("keys").set(0)

    def _take(self, keys: Keys) -> None:
        self._keys = keys.beside(self._own_key, self._own)

    def _signature(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self._file.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


_NONE_YET: Final = Keys(secrets.token_bytes(32))


class GuardedRoute(APIRoute):
    """A route that is reached with a key of the scopes declared beside it, before anything of the body is read.

    It costs 1 unless the declaration says otherwise; then the endpoint charges.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **described: Any) -> None:
        super().__init__(path, endpoint, **described)
        declared = self.openapi_extra or {}
        if "security" not in declared:
            raise TypeError(f"{path} does not declare who may call it: open_to(...) or PUBLIC")
        self.scopes: frozenset[str] = frozenset(scope for way in declared["security"] for scope in way["key"])
        self._charges = _COST in declared

    async def handle(self, scope: HttpScope, receive: Receive, send: Send) -> None:
        if self.scopes:
            services = scope["app"].state.services
            access: Access = services.access
            scope["caller"] = caller = access.admit(scope, self.scopes)
            if not self._charges:
                await access.charge(caller, 1, services.quotas)
        await super().handle(scope, receive, send)


def _refuse_foreign(caller: Caller, symbol: str) -> None:
    if not caller.may_ask(symbol):
        raise Forbidden("symbol_not_allowed", "the key is not for this symbol")


def caller_of(request: Request) -> Caller:
    """Who sent a request that a GuardedRoute has admitted."""
    caller: Caller = request.scope["caller"]
    return caller


async def _asking(request: Request) -> Caller:  # async, or FastAPI takes a thread for it
    return caller_of(request)


Asking = Annotated[Caller, Depends(_asking)]


class SafeAnswers:
    """What every answer says to browsers, and to callers with a quota."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: HttpScope, receive: Receive, send: Send) -> None:
        async def safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message["headers"])
                names = {name for name, _ in headers}
                headers += [header for header in _HEADERS if header[0] not in names]
                caller: Caller = scope.get("caller", ANYBODY)
                message["headers"] = headers + list(caller.headers)
            await send(message)

        await self.app(scope, receive, safe)


def describe_keys(schema: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI description with what the routes' declarations refer to."""
    schema["components"]["securitySchemes"] = {
        "key": {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "cc_<env>_<kid>_<secret>",
            "description": "Made by `candlecast keys make`; not asked for where CANDLECAST_AUTH says so.",
        }
    }
    return schema


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

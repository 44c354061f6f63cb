"""Every failure a caller can meet: one table from exception to status, one shape (RFC 9457).

Values that were sent are never sent back: a problem says where (`errors[].pointer`) and what.
"""

import http
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from model_store.files import StoreError, VersionNotFound
from model_store.gate import PromotionRefused
from models.calendars import UnknownCalendar
from models.candles import InvalidCandles
from models.forecaster import InvalidModelOutput, ModelError
from service.engine.batcher import DeadlineExceeded, EngineStopped, OutOfMemory, Overloaded
from service.engine.failures import ModelUnavailable
from service.engine.history import HistoryUnavailable, UnknownSymbol
from service.logs import REQUEST_ID, request_id

PROBLEM_JSON: Final = "application/problem+json"
_MOST_ERRORS: Final = 10
_PROBLEM: Final[Mapping[str, Any]] = {
    "type": "object",
    "title": "Problem",
    "description": "RFC 9457; some codes bring members of their own.",
    "required": ["type", "title", "status", "code", "detail", "errors", "next_steps"],
    "properties": {
        **{name: {"type": "string"} for name in ("type", "title", "code", "detail")},
        "status": {"type": "integer"},
        "errors": {
            "type": "array",
            "description": "What is wrong where: a JSON pointer into the body, or the name of a parameter.",
            "items": {
                "type": "object",
                "required": ["detail"],
                "properties": {name: {"type": "string"} for name in ("pointer", "parameter", "detail")},
            },
        },
        "next_steps": {"type": "array", "items": {"type": "string"}},
        "request_id": {"type": "string", "description": "As in the header X-Request-ID and in the service's log."},
    },
}
_LONGEST_POINTER: Final = 200
_Handler = Callable[[Request, Exception], Coroutine[Any, Any, Response]]


class InputError(ValueError):
    """The request is at fault at `pointer` into its body, or in its parameter of that name.

    `facts` become members of the problem.
    """

    def __init__(self, detail: str, pointer: str, code: str = "invalid_input", **facts: int | str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.pointer = pointer
        self.code = code
        self.facts = facts


class MalformedBody(HTTPException):
    """The body is not JSON that means one thing."""

    code = "malformed_json"

    def __init__(self, detail: str) -> None:
        super().__init__(400, detail)


class BodyTooLarge(HTTPException):
    """The body is more than the service reads."""

    code = "body_too_large"

    def __init__(self, detail: str) -> None:
        super().__init__(413, detail)


class Unauthorized(HTTPException):
    """No key was sent, or none that counts."""

    def __init__(self, code: str, detail: str) -> None:
        challenge = "Bearer" if code == "key_required" else 'Bearer error="invalid_token"'
        super().__init__(401, detail, headers={"WWW-Authenticate": challenge})
        self.code = code


class Forbidden(HTTPException):
    """The key counts, and is not for this."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(403, detail, headers={"WWW-Authenticate": 'Bearer error="insufficient_scope"'})
        self.code = code


class QuotaExceeded(HTTPException):
    """The key's quota does not cover this before `wait` seconds."""

    code = "quota_exceeded"

    def __init__(self, detail: str, wait: int) -> None:
        super().__init__(429, detail, headers={"Retry-After": str(wait)})


class NotWatched(LookupError):
    """Nothing on the watch list fits."""


class NoForecastYet(RuntimeError):
    """It is on the watch list, and its first forecast is not there."""


class TooManyStreams(RuntimeError):
    """As many streams are open as may be."""


class ForecastsElsewhere(LookupError):
    """This process keeps score of forecasts, and makes none."""


class _Answer(NamedTuple):
    status: int
    code: str
    detail: str | None = None  # None: the exception's own words, which hold no input
    retry_after: int | None = None


_TABLE: Final[Mapping[type[Exception], _Answer]] = {
    UnknownSymbol: _Answer(404, "unknown_symbol"),
    VersionNotFound: _Answer(404, "unknown_model", "the store has no such model, version or alias"),
    NotWatched: _Answer(404, "not_watched"),
    ForecastsElsewhere: _Answer(404, "forecasts_elsewhere", "this process keeps score, and forecasts nothing"),
    NoForecastYet: _Answer(503, "no_forecast_yet", retry_after=2),
    TooManyStreams: _Answer(503, "too_many_streams", retry_after=30),
    UnknownCalendar: _Answer(422, "unknown_calendar", "no calendar has this name"),
    Overloaded: _Answer(503, "overloaded"),
    OutOfMemory: _Answer(503, "out_of_memory", retry_after=2),
    EngineStopped: _Answer(503, "not_ready", retry_after=2),
    HistoryUnavailable: _Answer(503, "history_unavailable", retry_after=2),
    RedisError: _Answer(503, "history_unavailable", "Redis does not answer", 2),
    PromotionRefused: _Answer(409, "promotion_refused"),
    ModelUnavailable: _Answer(503, "model_unavailable", retry_after=30),
    StoreError: _Answer(503, "model_unavailable", "the model store cannot be read", 30),
    InvalidCandles: _Answer(422, "invalid_candles"),
    DeadlineExceeded: _Answer(504, "deadline_exceeded"),
    InvalidModelOutput: _Answer(500, "model_output_invalid", "the model produced something that is no forecast"),
}

_UNFORESEEN: Final = _Answer(500, "internal_error", "something went wrong here; the service's log says what")

_POINTERS: Final[Mapping[type[Exception], str]] = {
    UnknownCalendar: "/calendar",
    VersionNotFound: "/model",
    InvalidCandles: "/candles",
}

NEXT_STEPS: Final[Mapping[str, str]] = {
    "unknown_symbol": "Send candles in the body, or store some with PUT /candles/{symbol}; GET /symbols lists them.",
    "not_watched": "Add it to CANDLECAST_WATCH, such as AAPL:kronos:30, and restart; or POST /forecast/{symbol}.",
    "forecasts_elsewhere": "Ask a process whose CANDLECAST_ROLE is api or all.",
    "no_forecast_yet": "Store candles with PUT /candles/{symbol}; if there are enough, the service's log says why.",
    "too_many_streams": "Close one, raise CANDLECAST_MAX_STREAMS, or poll GET /forecast/{symbol}/latest.",
    "unknown_model": "GET /models lists what can be asked for.",
    "unknown_interval": "GET /symbols lists the intervals that are stored.",
    "unknown_calendar": "Use 24/7, 24/5, auto or an exchange such as XNYS.",
    "unknown_weights": "GET /models/{name}/weights lists them.",
    "overloaded": "Try again after Retry-After seconds.",
    "out_of_memory": "Try again after Retry-After seconds, or ask for fewer samples, candles or steps.",
    "not_ready": "Try again after Retry-After seconds.",
    "draining": "Connect anew: another process answers where there are several.",
    "history_unavailable": "Send the candles in the body: that needs no stored history.",
    "model_unavailable": "Name another version; GET /models says why this one is not served.",
    "promotion_refused": "Train or evaluate further, or send `force` with the reason.",
    "deadline_exceeded": "Raise timeout_ms, or ask for fewer samples or a shorter horizon.",
    "too_few_candles": "Send or store more candles, or lower lookback.",
    "unsupported_parameter": "Leave the parameter out, or choose a model that uses it.",
    "off_grid": "Check interval, calendar and time_is against the timestamps.",
    "future_timestamp": "Timestamps are candle opens in UTC milliseconds; check time_is and the clock.",
    "body_too_large": "Send fewer candles: a model reads only the newest.",
    "key_required": "Send Authorization: Bearer KEY; whoever runs the service makes one with `candlecast keys make`.",
    "malformed_key": "Copy the whole key, from cc_ to its last character, and send it once.",
    "unknown_key": "Ask whoever runs the service for a key that counts; `candlecast keys list` shows them there.",
    "expired_key": "Ask whoever runs the service for a new key.",
    "scope_missing": "Use a key with that scope.",
    "symbol_not_allowed": "Use a key that is for this symbol.",
    "quota_too_small": "Send fewer candles, ask for a shorter horizon or fewer samples; or ask for a larger quota.",
    "quota_exceeded": "Wait for Retry-After seconds, or ask for fewer candles, a shorter horizon or fewer samples.",
    "malformed_json": "Send one JSON object, each key once, with Content-Type: application/json.",
}


def problem(
    status: int,
    code: str,
    detail: str,
    *,
    errors: Sequence[Mapping[str, str]] = (),
    headers: Mapping[str, str] | None = None,
    facts: Mapping[str, int | str] | None = None,
) -> Response:
    """An RFC 9457 answer; `facts` become members of their own."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": http.HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": detail,
        "errors": list(errors),
        "next_steps": [NEXT_STEPS[code]] if code in NEXT_STEPS else [],
        **(facts or {}),
    }
    if (known := request_id.get()) is not None:
        body["request_id"] = known
        headers = {**(headers or {}), REQUEST_ID: known}  # an unforeseen failure is answered outside of all middleware
    return Response(json.dumps(body).encode(), status, headers, PROBLEM_JSON)


def in_protocol(path: str, refusal: Response) -> Response:
    """A problem as the protocol that a path belongs to says it: in that of `/v2` one text says what is wrong where."""
    if not f"{path}/".startswith("/v2/"):
        return refusal
    told = json.loads(bytes(refusal.body))
    where = [f"{each.get('pointer') or each.get('parameter')}: {each['detail']}" for each in told["errors"]]
    headers = {name: value for name, value in refusal.headers.items() if not name.startswith("content-")}
    return JSONResponse({"error": "; ".join(where) or told["detail"]}, refusal.status_code, headers)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The failures of a route, for its documentation."""
    content = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": http.HTTPStatus(status).phrase, "content": content} for status in statuses}


def describe_problems(schema: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI description with what `problems` refers to."""
    schema["components"]["schemas"]["Problem"] = _PROBLEM
    return schema


def install(app: FastAPI) -> None:
    """Make every failure of `app` a problem."""
    handlers: dict[type[Exception], _Handler] = {
        InputError: _on_input_error,
        ModelError: _on_model_error,
        RequestValidationError: _on_validation_error,
        HTTPException: _on_http_exception,
        **dict.fromkeys((*_TABLE, Exception), _on_exception),
    }
    for kind, handle in handlers.items():
        app.add_exception_handler(kind, partial(_refuse, handle))


async def _refuse(handle: _Handler, request: Request, error: Exception) -> Response:
    return in_protocol(request.scope["path"], await handle(request, error))


async def _on_input_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, InputError)
    where = {"pointer" if error.pointer.startswith("/") else "parameter": error.pointer, "detail": error.detail}
    return problem(422, error.code, error.detail, errors=[where], facts=error.facts)


async def _on_model_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ModelError)
    where = {"pointer": f"/{error.field}", "detail": str(error)}
    return problem(422, error.code, str(error), errors=[where])


async def _on_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    where = [_located(entry["loc"], str(entry["msg"])) for entry in found[:_MOST_ERRORS]]
    return problem(422, "invalid_input", f"{len(found)} part(s) of the request are not as described", errors=where)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = getattr(error, "code", None) or http.HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    headers = {"Allow": _allowed(request, error)} if error.status_code == 405 else error.headers
    return problem(error.status_code, code, error.detail, headers=headers)


def _allowed(request: Request, error: HTTPException) -> str:
    """The methods of a path: the route that refused knows only its own."""
    found = set((error.headers or {}).get("Allow", "").split(", "))
    for route in request.app.routes:
        if route.matches(request.scope)[0] is Match.PARTIAL:
            found |= getattr(route, "methods", found)
    return ", ".join(sorted(found))


async def _on_exception(_: Request, error: Exception) -> Response:
    answer = next((_TABLE[kind] for kind in type(error).__mro__ if kind in _TABLE), _UNFORESEEN)
    retry_after = getattr(error, "retry_after", answer.retry_after)
    headers = {"Retry-After": str(retry_after)} if retry_after else None
    detail = answer.detail or str(error)
    errors = [{"pointer": pointer, "detail": detail} for kind, pointer in _POINTERS.items() if isinstance(error, kind)]
    return problem(answer.status, getattr(error, "code", answer.code), detail, errors=errors, headers=headers)


def _located(location: Sequence[int | str], detail: str) -> dict[str, str]:
    """Where pydantic found something: a JSON pointer into the body, or the name of a parameter."""
    source, *path = location
    if source == "body":
        pointer = "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)
        return {"pointer": pointer[:_LONGEST_POINTER], "detail": detail}
    return {"parameter": str(path[0]) if path else "", "detail": detail}

"""What can go wrong, in the service's own words: its problem documents (RFC 9457) as exceptions."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx


class CandlecastError(Exception):
    """No answer, or none that was asked for.

    `status` is None where the service did not answer; `errors` say where in the request (`pointer` or `parameter`);
    `retry_after` is in seconds; `facts` are what else the problem tells, such as `needed` and `got` candles.
    """

    def __init__(
        self,
        detail: str,
        *,
        code: str,
        status: int | None = None,
        errors: Sequence[Mapping[str, str]] = (),
        next_steps: Sequence[str] = (),
        retry_after: float | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code
        self.status = status
        self.errors = tuple(errors)
        self.next_steps = tuple(next_steps)
        self.retry_after = retry_after
        self.facts = dict(facts or {})

    def __str__(self) -> str:
        places = [f"{each.get('pointer', each.get('parameter', ''))}: {each.get('detail', '')}" for each in self.errors]
        what = f"{self.detail} ({' '.join(str(part) for part in (self.status, self.code) if part)})"
        return "\n".join([what, *places, *self.next_steps])


class NoAnswer(CandlecastError):
    """Nothing answers, it hung up, or what answers is not Candlecast."""


class DeadlineExceeded(CandlecastError, TimeoutError):
    """There was no answer in time."""


class Unavailable(CandlecastError):
    """The service cannot answer now: it is busy, starting or stopping, or lacks what the answer needs."""


class TooManyRequests(CandlecastError):
    """The key's quota is used up for now."""


class NotAllowed(CandlecastError):
    """The key is missing, wrong, or not for this."""


class NotFound(CandlecastError):
    """There is no such symbol, model or path."""


class Invalid(CandlecastError):
    """The request is at fault: `errors` say where."""


_KINDS: Mapping[int, type[CandlecastError]] = {
    401: NotAllowed,
    403: NotAllowed,
    404: NotFound,
    429: TooManyRequests,
    502: Unavailable,
    503: Unavailable,
    504: DeadlineExceeded,
}
_MEMBERS = frozenset({"type", "title", "status", "code", "detail", "errors", "next_steps", "instance"})


def error_of(response: httpx.Response) -> CandlecastError:
    """The exception that an answer other than 2xx means."""
    status = response.status_code
    kind = _KINDS.get(status, Invalid if 400 <= status < 500 else CandlecastError)
    wait = retry_after(response)
    told = _problem(response.text)
    if told is None:
        words = " ".join(response.text.split())[:200] or response.reason_phrase
        kind = kind if kind is not CandlecastError and kind is not Invalid else NoAnswer
        return kind(f"{response.url} answers: {words}", code="unknown_answer", status=status, retry_after=wait)
    return kind(
        str(told["detail"]),
        code=str(told["code"]),
        status=status,
        errors=told.get("errors", ()),
        next_steps=told.get("next_steps", ()),
        retry_after=wait,
        facts={name: value for name, value in told.items() if name not in _MEMBERS},
    )


def retry_after(response: httpx.Response) -> float | None:
    """Seconds that the answer asks to wait, which it may say as a number or as a date."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a zone
        return None


def _problem(text: str) -> dict[str, Any] | None:
    try:
        told = json.loads(text)
    except ValueError:
        return None
    return told if isinstance(told, dict) and {"code", "detail"} <= told.keys() else None

"""A client of the service, waited for while it does not answer: the one place that PUTs candles."""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from models.candles import COLUMNS, Floats, Millis

COUNTS: Final = ("received", "new", "duplicate", "restated", "quarantined", "scored", "rescored")
PUT_ROWS: Final = 20_000  # of candles in one request: a third of the longest body that a service reads
PATIENCE: Final = 60.0  # seconds
FOREVER: Final = math.inf  # the patience of a feed, which outlives the service
_TIMEOUT: Final = 30.0  # seconds without a byte
_MOST_STEPS: Final = 1_000_000  # of forecasts in one answer
_FIRST_WAIT: Final = 0.5
_LONGEST_WAIT: Final = 30.0
_BUSY: Final = frozenset({429, 502, 503, 504})  # the service, a proxy before it, or a quota: later it may answer
_ROW: Final = re.compile(r"/candles/(?:\w+/)?(\d+)")


class NoAnswer(RuntimeError):
    """The service did not answer for as long as the caller would wait."""


class Refused(RuntimeError):
    """The service will not have this; `row` is the candle it points at, in the put that was refused."""

    def __init__(self, symbol: str, detail: str, status: int, code: str, row: int | None) -> None:
        super().__init__(f"{symbol} was refused: {detail} ({status} {code})")
        self.code = code
        self.row = row


class Put(NamedTuple):
    """What the service made of candles."""

    interval: str
    counts: Counter[str]  # by COUNTS


def _to_nobody(_: str) -> None:
    pass


class Service:
    """A client of one service. What fails for want of an answer is tried again: a PUT may come twice."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        patience: float = PATIENCE,
        say: Callable[[str], None] = _to_nobody,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"{url} is no URL of a service: write http://127.0.0.1:8000")
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self.url = url.rstrip("/")
        self._connection = kind(parts.netloc.rpartition("@")[2], timeout=_TIMEOUT)
        self._key = {"Authorization": f"Bearer {key}"} if key else {}
        self._base = parts.path.rstrip("/")
        self._patience = patience
        self._say = say
        self._sleep = sleep

    def put(self, symbol: str, timestamps: Millis, candles: Floats, interval: str | None = None) -> Put:
        """Store `[T]` opens with `[T, 5]` or `[T, 6]` candles; Refused or NoAnswer, with the first requests stored."""
        counts: Counter[str] = Counter()
        for first in range(0, len(timestamps), PUT_ROWS):
            rows = slice(first, first + PUT_ROWS)
            names = COLUMNS[: candles.shape[1]]
            columns = {name: candles[rows, index].tolist() for index, name in enumerate(names)}
            body: dict[str, Any] = {"candles": {"timestamp": timestamps[rows].tolist(), **columns}}
            if interval is not None:
                body["interval"] = interval
            answer = self._ask(symbol, "PUT", f"/candles/{quote(symbol, safe='')}", body, first)
            interval = str(answer["interval"])  # as found in the first part, which is longer than the last may be
            counts.update({name: int(answer.get(name, 0)) for name in COUNTS})
        return Put(interval or "", counts)

    def newest(self, symbol: str, interval: str) -> int | None:
        """When the newest stored candle opens, None where none is stored."""
        query = urlencode({"interval": interval, "limit": 1})
        try:
            answer = self._ask(symbol, "GET", f"/candles/{quote(symbol, safe='')}?{query}")
        except Refused as error:
            if error.code in ("unknown_symbol", "unknown_interval"):
                return None
            raise
        return int(answer["candles"][-1][0]) if answer["candles"] else None

    def stored(self) -> list[tuple[str, str]]:
        """Symbol and interval of every stored series."""
        return [(each["symbol"], each["interval"]) for each in self._ask("the list", "GET", "/symbols")["symbols"]]

    def forecasts(self, symbol: str, interval: str, as_of: datetime | None = None) -> Mapping[str, Any]:
        """What was served of a series by an instant, as GET /forecasts/{symbol} answers it."""
        query = {"interval": interval, "limit": str(_MOST_STEPS)} | ({"as_of": as_of.isoformat()} if as_of else {})
        return self._ask(symbol, "GET", f"/forecasts/{quote(symbol, safe='')}?{urlencode(query)}")

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def _ask(self, symbol: str, method: str, path: str, body: Any = None, first: int = 0) -> Mapping[str, Any]:
        """The answer's JSON, as soon as there is one."""
        content = None if body is None else json.dumps(body).encode()
        wait, gives_up = _FIRST_WAIT, time.monotonic() + self._patience
        while True:
            status, text, retry_after = self._try(method, self._base + path, content)
            if status is not None and status not in _BUSY:
                return _read(symbol, status, text, first)
            why = f"does not answer ({text})" if status is None else f"is not ready ({status} {_problem(text)[0]})"
            pause = max(wait, retry_after)
            if time.monotonic() + pause > gives_up:
                raise NoAnswer(f"{self.url} {why}")
            self._say(f"{self.url} {why}: trying again in {pause:g} s")
            self._sleep(pause)
            wait = min(2 * wait, _LONGEST_WAIT)

    def _try(self, method: str, path: str, content: bytes | None) -> tuple[int | None, str, float]:
        """Status, text and Retry-After of one answer; without a status the text says why there is none."""
        headers = {**self._key, **({"Content-Type": "application/json"} if content else {})}
        idle = self._connection.sock is not None
        try:
            self._connection.request(method, path, content, headers)
            answer = self._connection.getresponse()
            text = answer.read().decode(errors="replace")
        except (OSError, HTTPException) as error:
            self._connection.close()
            if idle:  # the service hung up on a connection that was long unused: that says nothing about it
                return self._try(method, path, content)
            return None, f"{error}" or type(error).__name__, 0.0
        retry_after = answer.getheader("Retry-After", "")
        return answer.status, text, float(retry_after) if retry_after.isdigit() else 0.0


def _read(symbol: str, status: int, text: str, first: int) -> Mapping[str, Any]:
    if status >= 300:
        detail, code, row = _problem(text)
        raise Refused(symbol, detail, status, code, None if row is None else first + row)
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or not {"interval", "symbols"} & answer.keys():
        raise Refused(symbol, "the answer is not one of Candlecast's", status, "unknown_answer", None)
    return answer


def _problem(text: str) -> tuple[str, str, int | None]:
    """Detail, code and the row pointed at of an RFC 9457 answer; of any other its first words."""
    try:
        told = json.loads(text)
        detail, code = str(told["detail"]), str(told["code"])
    except (ValueError, LookupError, TypeError):
        return " ".join(text.split())[:200] or "without a reason", "unknown_answer", None
    details = dict.fromkeys([detail, *(str(each.get("detail")) for each in told.get("errors", ()))])
    rows = [_ROW.match(str(each.get("pointer"))) for each in told.get("errors", ())]
    return "; ".join(details), code, next((int(row[1]) for row in rows if row), None)

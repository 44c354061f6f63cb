"""A stream of forecasts that outlives its connections, without the socket: server-sent events in, forecasts out."""

import json
import random
import time
from typing import Final

import httpx

from candlecast_client.asking import failure_of, passes
from candlecast_client.errors import NoAnswer
from candlecast_client.forecast import Forecast

_SILENCE: Final = 45.0  # seconds: three times the pause between two signs of life of an idle stream
_FIRST_WAIT: Final = 0.25
_LONGEST_WAIT: Final = 15.0


class Tail:
    """What is known of a stream: the last event, and when the service last gave a sign of life.

    It ends when there was none for `patience` seconds, or when the service says what no patience changes.
    """

    def __init__(self, url: str, headers: dict[str, str], patience: float) -> None:
        self.url = url
        self.timeout = httpx.Timeout(min(_SILENCE, patience))
        self._headers = {**headers, "Accept": "text/event-stream"}
        self._patience = patience
        self._alive = time.monotonic()
        self._wait = _FIRST_WAIT
        self._last: str | None = None
        self._id: str | None = None
        self._data: list[str] = []

    def headers(self) -> dict[str, str]:
        """Of the next connection, which goes on after the last event."""
        return self._headers if self._last is None else {**self._headers, "Last-Event-ID": self._last}

    def read(self, line: str) -> Forecast | None:
        """The forecast that this line completes."""
        self._alive, self._wait = time.monotonic(), _FIRST_WAIT
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                self._data.append(value)
            elif name == "id":
                self._id = value
            return None
        data, self._data = self._data, []
        self._last = self._id
        return Forecast(json.loads("\n".join(data))) if data else None

    def ended(self, outcome: httpx.Response | httpx.TransportError) -> float:
        """Seconds to wait before the next connection; raises what ended it if there is to be none."""
        self._data, self._id = [], self._last  # the rest of an event that broke off
        error = failure_of(outcome, self.url, self._patience)
        silent = isinstance(outcome, httpx.TimeoutException)
        if error is not None and not silent and not passes(error):
            raise error
        pause = max(error.retry_after or 0.0 if error else 0.0, self._wait * random.uniform(0.5, 1))
        if time.monotonic() + pause - self._alive > self._patience:
            raise error or NoAnswer(f"{self.url} ends again and again", code="no_answer")
        self._wait = min(2 * self._wait, _LONGEST_WAIT)
        return pause

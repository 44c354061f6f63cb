"""Requests that were answered before: equal bytes need no second reading while all that decided the answer holds."""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from service.engine.registry import Executed
from service.engine.revisions import Revision

_MOST: Final = 4096


@dataclass(frozen=True)
class StoredAs:
    """The stored series that a request was answered from, as it was then."""

    symbol: str
    interval: str
    revision: Revision | None  # None: not known, and never the same


@dataclass(frozen=True)
class Facts:
    """What an answer says about its request, beside the forecast."""

    model: str
    as_of: int  # UTC ms
    seed: int
    samples: int | None
    context: int
    degraded: tuple[str, ...]


@dataclass(frozen=True)
class Repeat:
    """A request that a kept forecast answers from `since` until `until` (UTC ms), as long as `reference` is `model`.

    Reading the request again would settle it in the same way, because whatever its settling depends on is either in
    its bytes, in the version, in the stored series, or goes by the clock. By the clock it changes when a candle that
    was left out closes, or when history becomes stale; `until` is not after either, nor after the forecast expires.
    What had opened or lay in the past at `since` still does later.
    """

    reference: str
    model: Executed  # what it executed; the model itself would outlive its successor here
    stored: StoredAs | None  # None: the candles are among the bytes
    key: bytes  # of the forecast
    facts: Facts
    standings: object  # of the series, whose scores the answer shows: another object as soon as one changes
    series: tuple[str, str]  # symbol, interval
    since: int
    until: float

    def covers(self, now: int) -> bool:
        """The clock has not passed it."""
        return self.since <= now < self.until


class Repeats:
    """The newest requests by the digest of their bytes; least recently used first out."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, Repeat] = OrderedDict()

    def get(self, digest: bytes, now: int) -> Repeat | None:
        """The request of that digest unless the clock has passed it."""
        repeat = self._known.get(digest)
        if repeat is None or not repeat.covers(now):
            return None
        self._known.move_to_end(digest)
        return repeat

    def put(self, digest: bytes, repeat: Repeat) -> None:
        """Remember a request that was answered."""
        self._known[digest] = repeat
        self._known.move_to_end(digest)
        if len(self._known) > _MOST:
            self._known.popitem(last=False)


def request_digest(symbol: str, content_type: str, body: bytes) -> bytes:
    """A digest of all of a request that decides its answer."""
    digest = hashlib.sha256(repr((symbol, content_type)).encode())
    digest.update(body)
    return digest.digest()

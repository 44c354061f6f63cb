"""Why versions are not served, and when each is tried again."""

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final

from model_store.files import StoreError, VerificationFailed
from service.metrics import Metrics

_log = logging.getLogger(__name__)

_FIRST_PAUSE: Final = 1.0  # seconds after the second failure in a row until the next try; twice as long after each
_LONGEST_PAUSE: Final = 300.0
_LONGEST_DETAIL: Final = 300


class ModelUnavailable(RuntimeError):
    """The store has the version, but it cannot be loaded."""


class NoRoom(RuntimeError):
    """The version does not fit into memory beside those that are needed."""


class Unfit(RuntimeError):
    """The version was loaded, and does not forecast."""


@dataclass(frozen=True)
class Failure:
    """What went wrong with a version the last time."""

    reason: str  # of LOAD_FAILURES
    detail: str
    at: float  # UTC seconds
    tries: int
    again: float  # when it is tried again, in time.monotonic() seconds


class Failures:
    """By `name@version`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._known: dict[str, Failure] = {}

    def __contains__(self, exact: str) -> bool:
        return exact in self._known

    def all(self) -> dict[str, Failure]:
        """As they are now."""
        return dict(self._known)

    def note(self, exact: str, error: Exception) -> None:
        """Log and count a failure."""
        known = self._known.get(exact)
        tries = known.tries + 1 if known else 1
        pause = 0.0 if tries == 1 else min(_FIRST_PAUSE * 2 ** min(tries - 2, 20), _LONGEST_PAUSE)
        reason, detail = _told(exact, error)
        self._known[exact] = Failure(reason, detail, time.time(), tries, time.monotonic() + pause)
        self._metrics.model_load_failures.labels(exact.partition("@")[0], reason).inc()
        _log.error("%s", detail, exc_info=error if reason == "error" else None)

    def is_recent(self, exact: str) -> bool:
        """It is too early to try again."""
        failure = self._known.get(exact)
        return failure is not None and time.monotonic() < failure.again

    def loaded(self, exact: str) -> None:
        """It was loaded, which says nothing of how it forecasts."""
        if exact in self._known and self._known[exact].reason != "rehearsal":
            del self._known[exact]

    def forget(self, exact: str) -> None:
        """It is as it should be."""
        self._known.pop(exact, None)

    def moved(self, name: str, wanted: Collection[str]) -> None:
        """Aliases of a name have moved: try at once what they mean, and forget the rest."""
        for exact in [exact for exact in self._known if exact.startswith(f"{name}@")]:
            failure = self._known.pop(exact)
            if exact in wanted:
                self._known[exact] = replace(failure, again=0.0)

    def unavailable(self, exact: str) -> ModelUnavailable:
        """What a caller who asks for the version gets."""
        failure = self._known.get(exact)
        return ModelUnavailable(failure.detail if failure else f"{exact} cannot be loaded")


def _told(exact: str, error: Exception) -> tuple[str, str]:
    """Of LOAD_FAILURES, and what may be said to anybody: our own words hold neither paths nor secrets."""
    for kind, reason in ((VerificationFailed, "verification"), (NoRoom, "memory"), (Unfit, "rehearsal")):
        if isinstance(error, kind):
            return reason, str(error)[:_LONGEST_DETAIL]
    words = str(error) if isinstance(error, StoreError) else f"{exact} cannot be loaded: {type(error).__name__}"
    return "error", words[:_LONGEST_DETAIL]

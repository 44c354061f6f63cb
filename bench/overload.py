"""Ten times as many requests as the service can answer: what it answers still, what a refusal costs, what comes after.

One client floods. Another asks for a tenth of what the service can: before, meanwhile and afterwards.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from bench.load import Record, Target, open_loop, poisson
from bench.processes import resident_bytes
from bench.published import KRONOS, random_weights
from bench.service import Service, forecast_body, put_version, start_service
from model_store.store import ModelStore
from service.keys import KEYS_FILE, KeyFile, grant

TIMES: Final = 10  # what the service can
_CLIENTS: Final = 32  # of the closed loop that finds that out: two batches
_MODEL: Final = "kronos-mini"  # the smallest that is published
_ASKED: Final[dict[str, Any]] = {"model": _MODEL, "candles": 64, "horizon": 30, "samples": 4}
_KEYS_SECONDS: Final = 2.0  # keys count within one
_SETTINGS: Final = {
    "CANDLECAST_RUNTIME": "eager-float32",  # the same from the first request on
    "CANDLECAST_THREADS": "1",  # for the networks, beside that of the event loop
    "CANDLECAST_MAX_BATCH_ROWS": str(_CLIENTS // 2),
}


@dataclass(frozen=True)
class Overload:
    """What both clients saw; instants in seconds since the flood began."""

    capacity: float  # answers per second
    deadline: float  # seconds
    seconds: float  # of the flood
    flood: Sequence[Record]
    other: Sequence[Record]
    resident_mb: tuple[float, float]  # the most that the service had held before the flood, and after it
    client_cores: float  # that the flood's sender took of those that it shares with the service

    @property
    def meanwhile(self) -> Sequence[Record]:
        """The other client's requests during the flood."""
        return [record for record in self.other if 0 <= record.due < self.seconds]

    def in_time(self, records: Sequence[Record]) -> int:
        """Answers within the deadline."""
        return sum(record.status == 200 and record.latency <= self.deadline for record in records)

    @property
    def goodput(self) -> float:
        """What was answered in time during the flood, as a share of what the service can."""
        return (self.in_time(self.flood) + self.in_time(self.meanwhile)) / self.seconds / self.capacity

    @property
    def refused(self) -> Sequence[Record]:
        """The flood's requests that were turned away."""
        return [record for record in self.flood if record.status == 503]

    @property
    def unforeseen(self) -> int:
        """Outcomes that no caller is told how to meet: neither an answer, nor late, nor a refusal with Retry-After."""
        fine = sum(record.status in (200, 504) for record in self.flood)
        return len(self.flood) - fine - sum(record.retry_after is not None for record in self.refused)

    @property
    def recovery(self) -> float:
        """Seconds from the end of the flood until the other client is answered as fast as before it."""
        usual = max((each.latency for each in self.other if each.due < 0), default=math.inf)
        after = [each for each in self.other if each.due >= self.seconds and each.status == 200]
        return min((each.done - self.seconds for each in after if each.latency <= usual), default=math.inf)


async def overload(folder: Path, seconds: float = 60.0) -> Overload:
    """Find out what the service can, and ask for ten times that for so long."""
    store = ModelStore(folder / "store")
    put_version(store, _MODEL, "kronos", KRONOS["mini"], random_weights("kronos", KRONOS["mini"]))
    with start_service(store, folder / "home", _SETTINGS) as service:
        body = forecast_body(**_ASKED)
        service.warm_up(body)
        service.client.run(service.forecast_url(), body, clients=_CLIENTS, seconds=seconds / 4)  # until it is usual
        closed = service.client.run(service.forecast_url(), body, clients=_CLIENTS, seconds=seconds / 4)
        keys = KeyFile(folder / "home" / KEYS_FILE)
        flood, other = (keys.make(grant(name=name, scopes=["forecast"]))[0] for name in ("flood", "other"))
        await asyncio.sleep(_KEYS_SECONDS)
        return await _flooded(service, closed.per_second, seconds, flood, other)


async def _flooded(service: Service, capacity: float, seconds: float, flood: str, other: str) -> Overload:
    deadline = 2 * _CLIENTS / capacity  # twice as long as an answer takes where so many wait
    body = forecast_body(**_ASKED, timeout_ms=round(1000 * deadline))
    calm = seconds / 4
    at = urlsplit(service.forecast_url())
    target = Target(at.hostname or "", at.port or 80, at.path, body, other)
    before = resident_bytes(service.process, "VmHWM") / 1e6
    begun = time.monotonic()
    asking = asyncio.create_task(open_loop(target, poisson(capacity / TIMES, seconds + 3 * calm), first_seed=2**40))
    await asyncio.sleep(calm)
    load = await asyncio.to_thread(
        service.client.run, service.forecast_url(), body, seconds=seconds, rate=TIMES * capacity, key=flood
    )
    seen = await asking
    late = load.summary["ended"] - max(record["done"] for record in load.records) - begun  # that the flood began
    shifted = [replace(each, due=each.due - late, sent=each.sent - late, done=each.done - late) for each in seen]
    fields = ("due", "sent", "done", "status", "retry_after")
    return Overload(
        capacity,
        deadline,
        seconds,
        [Record(**{name: record[name] for name in fields}, body=b"") for record in load.records],
        shifted,
        (before, resident_bytes(service.process, "VmHWM") / 1e6),
        load.summary["client_cores"],
    )

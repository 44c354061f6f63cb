"""A load client without coordinated omission.

Open loop (`--rate`): requests arrive by a Poisson process whose instants are drawn before the run, and a latency counts
from the instant at which its request should have been sent. A server that stalls delays everybody who would have come
meanwhile, and all of them are counted; a client that waits for answers before it sends would hide them.
Closed loop (`--clients`): so many callers, each of which sends as soon as it is answered.

Runs in a process of its own: python -m bench.load http://127.0.0.1:8000/forecast/BTC --body body.json --rate 50
"""

import argparse
import asyncio
import gc
import itertools
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from bench.connection import Connection

SEED: Final = b'"@seed@"'  # in a body: replaced by a number that no other request of the run has
_PERCENTILES: Final = (50, 90, 99, 99.9)
_BROKEN: Final = 0  # the status of a request whose connection broke


@dataclass(frozen=True)
class Target:
    """Where to send what; without a body it is asked for by GET."""

    host: str
    port: int
    path: str
    body: bytes | None
    key: str | None = None

    def bodies(self, first_seed: int) -> Iterator[bytes | None]:
        """The body over and over, each with its own seed."""
        if self.body is None:
            yield from itertools.repeat(None)
            return
        for seed in itertools.count(first_seed):
            yield self.body.replace(SEED, b"%d" % seed)


@dataclass(frozen=True)
class Record:
    """One request; times in seconds since the run began."""

    due: float  # when it should have been sent
    sent: float
    done: float
    status: int
    body: bytes
    retry_after: str | None = None  # seconds, where the answer says when to come again

    @property
    def latency(self) -> float:
        return self.done - self.due


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of sorted `values`."""
    return values[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def poisson(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Instants of a Poisson process of `rate` per second, over `seconds`."""
    draw = random.Random(seed)
    gaps = iter(lambda: draw.expovariate(rate), None)
    return list(itertools.takewhile(lambda instant: instant < seconds, itertools.accumulate(gaps)))


async def open_loop(target: Target, arrivals: Sequence[float], first_seed: int = 0) -> list[Record]:
    """Send one request at each instant of `arrivals`, whatever has become of those before."""
    idle: list[Connection] = []
    bodies, started = target.bodies(first_seed), time.perf_counter()

    async def one(due: float, body: bytes | None) -> Record:
        await asyncio.sleep(due - (time.perf_counter() - started))
        connection = idle.pop() if idle else Connection(target.host, target.port, target.key)
        record = await _send(connection, target.path, body, due, started)
        idle.append(connection)
        return record

    try:
        return await asyncio.gather(*(one(due, body) for due, body in zip(arrivals, bodies, strict=False)))
    finally:
        for connection in idle:
            connection.close()


async def closed_loop(target: Target, clients: int, seconds: float, first_seed: int = 0) -> list[Record]:
    """`clients` callers for `seconds`; a request counts if it was sent in that time."""
    records: list[Record] = []
    bodies, started = target.bodies(first_seed), time.perf_counter()

    async def caller() -> None:
        connection = Connection(target.host, target.port, target.key)
        while (now := time.perf_counter() - started) < seconds:
            records.append(await _send(connection, target.path, next(bodies), now, started))
        connection.close()

    await asyncio.gather(*(caller() for _ in range(clients)))
    return records


async def _send(connection: Connection, path: str, body: bytes | None, due: float, started: float) -> Record:
    sent = time.perf_counter() - started
    try:
        answer = await (connection.get(path) if body is None else connection.post(path, body))
    except OSError:
        return Record(due, sent, time.perf_counter() - started, _BROKEN, b"")
    done = time.perf_counter() - started
    return Record(due, sent, done, answer.status, answer.body, answer.headers.get("retry-after"))


def summary(records: Sequence[Record], clients: int | None = None) -> dict[str, Any]:
    """Counts, rate and percentiles of latency in milliseconds; those of failures are left out of both.

    The rate is answers over the time until the last of them, for `clients` callers over the time each was busy.
    """
    fine = [record for record in records if record.status == 200]
    latencies = sorted(1e3 * record.latency for record in fine)
    lags = sorted(1e3 * (record.sent - record.due) for record in records)
    busy = sum(record.latency for record in records) / clients if clients else max((r.done for r in records), default=0)
    return {
        "requests": len(records),
        "statuses": dict(Counter(str(record.status) for record in records)),
        "per_second": len(fine) / busy if busy else 0.0,
        "latency_ms": {f"p{p:g}": percentile(latencies, p) for p in _PERCENTILES} if latencies else {},
        "client_lag_ms": {f"p{p:g}": percentile(lags, p) for p in (50, 99)} if lags else {},
    }


def details(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Per request what is known of it, with the model and `meta` that the service put into its answer."""
    return [{**asdict(record), "body": None, **_said(record)} for record in records]


def _said(record: Record) -> dict[str, Any]:
    if record.status != 200:
        return {}
    try:
        answer = json.loads(record.body)
    except ValueError:
        return {}
    return {name: answer[name] for name in ("meta", "model") if name in answer} if isinstance(answer, dict) else {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one load and print its summary as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("url")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--rate", type=float, help="Arrivals per second of an open loop.")
    how.add_argument("--clients", type=int, help="Callers of a closed loop.")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--body", type=Path, help=f"File with the JSON to POST; {SEED.decode()} becomes a number.")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--key", help="API key, where one is asked for.")
    parser.add_argument("--records", type=Path, help="Write one JSON object per request to this file.")
    options = parser.parse_args(arguments)
    url = urlsplit(options.url)
    body = options.body.read_bytes() if options.body else None
    target = Target(url.hostname or "127.0.0.1", url.port or 80, url.path, body, options.key)
    gc.disable()
    begun, used = time.monotonic(), time.process_time()
    if options.rate:
        records = asyncio.run(open_loop(target, poisson(options.rate, options.seconds), options.first_seed))
    else:
        records = asyncio.run(closed_loop(target, options.clients, options.seconds, options.first_seed))
    ended = time.monotonic()
    cores = (time.process_time() - used) / (ended - begun)
    if options.records:
        options.records.write_text(json.dumps(details(records)))
    json.dump({**summary(records, options.clients), "client_cores": cores, "ended": ended}, sys.stdout)


if __name__ == "__main__":
    main()

"""A long run at half of what the service can: what it holds stays flat, and so does its latency.

The service over HTTP with tiny networks of both families, and mixed requests of which no two are equal:
python -m bench.soak --seconds 3600
"""

import argparse
import asyncio
import contextlib
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit
from urllib.request import urlopen

from bench.connection import Connection
from bench.gates import Figure, show
from bench.load import SEED, Record, Target, closed_loop, open_loop, percentile, poisson, summary
from bench.processes import resident_bytes
from bench.published import KRONOS_TINY, TOTO_TINY, random_weights, toto_config
from bench.service import Service, forecast_body, put_version, start_service
from model_store.store import ModelStore

_LENGTHS: Final = (20, 40, 64, 90, 256)
_HORIZONS: Final = (1, 5, 8, 30)
_NOTHING: Final[list[dict[str, int]]] = [{}]
_PATHS: Final = [{"samples": samples} for samples in (2, 4, 8)]
_CLIENTS: Final = 8
_LAPS: Final = 20
_LONGEST_LAP: Final = 30.0  # seconds: all of a lap's requests are in this process at once
_WARM_UP_SECONDS: Final = 20.0
_SETTLING_SECONDS: Final = 0.6
_SHOWN: Final = "tests/bench/test_soak.py"
_CACHE_BYTES: Final = 2**20  # full, and at work, long before the first size that counts


def mixed_bodies(seed: int = 0) -> Iterator[bytes]:
    """Requests of both networks, with lengths, horizons and paths at random; no two are equal."""
    draw, number = random.Random(seed), 0
    kinds = [
        forecast_body(f"{family}-tiny", length, horizon=horizon, **extra)
        for family in ("toto", "kronos")
        for length in _LENGTHS
        for horizon in _HORIZONS
        if family == "toto" or length + horizon <= KRONOS_TINY["context"]
        for extra in (_NOTHING if family == "toto" else _PATHS)
    ]
    while True:
        number += 1
        yield draw.choice(kinds).replace(SEED, b"%d" % number)


class Held(NamedTuple):
    """What a process holds between two laps, when no request is open."""

    resident_mb: float
    descriptors: int
    threads: int
    tasks: int  # of its event loop
    series: int  # that it publishes


@dataclass(frozen=True)
class Mixed(Target):
    """Mixed bodies, which go on from one load to the next."""

    mixed: Iterator[bytes] = field(default_factory=mixed_bodies)

    def bodies(self, first_seed: int) -> Iterator[bytes | None]:
        """All that are left; they have their seeds."""
        return self.mixed


@contextlib.contextmanager
def _service(folder: Path) -> Iterator[tuple[Service, Mixed]]:
    store = ModelStore(folder / "store")
    for family, config in (("toto", toto_config(TOTO_TINY, 512)), ("kronos", KRONOS_TINY)):
        put_version(store, f"{family}-tiny", family, config, random_weights(family, config))
    with start_service(store, folder / "home", {"CANDLECAST_CACHE_BYTES": str(_CACHE_BYTES)}) as service:
        at = urlsplit(service.forecast_url())
        yield service, Mixed(at.hostname or "127.0.0.1", at.port or 80, at.path, None)


def held(service: Service) -> Held:
    """After a moment, in which what belonged to the last request goes."""
    time.sleep(_SETTLING_SECONDS)
    with urlopen(f"{service.admin_url}/metrics") as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    tasks = next(float(line.split()[1]) for line in lines if line.startswith("candlecast_event_loop_tasks "))
    process = Path(f"/proc/{service.process}")
    return Held(
        resident_mb=resident_bytes(service.process) / 1e6,
        descriptors=len(os.listdir(process / "fd")),
        threads=len(os.listdir(process / "task")),
        tasks=int(tasks),
        series=len(lines),
    )


def soak(folder: Path, requests: int, *, every: int = 1000, clients: int = 8) -> list[Held]:
    """What the service holds after each `every` requests; RuntimeError if one is not answered."""
    with _service(folder) as (service, target):
        laps = []
        for _ in range(requests // every):
            asyncio.run(_ask(target, every, clients))
            laps.append(held(service))
        return laps


async def _ask(target: Mixed, requests: int, clients: int) -> None:
    async def ask(count: int) -> None:
        connection = Connection(target.host, target.port)
        for _ in range(count):
            answer = await connection.post(target.path, next(target.mixed))
            if answer.status != 200:
                raise RuntimeError(f"status {answer.status}: {answer.body[:300]!r}")
        connection.close()

    await asyncio.gather(*(ask(requests // clients) for _ in range(clients)))


def soak_for(folder: Path, seconds: float) -> list[Figure]:
    """Find out what the service can, ask half of it for so long, and compare the last quarter with the first."""
    laps = 4 * max(_LAPS // 4, math.ceil(seconds / _LONGEST_LAP / 4))
    with _service(folder) as (service, target):
        warm_up = min(_WARM_UP_SECONDS, seconds / 4)
        asyncio.run(closed_loop(target, _CLIENTS, warm_up))
        rate = summary(asyncio.run(closed_loop(target, _CLIENTS, warm_up)), _CLIENTS)["per_second"] / 2
        records: list[list[Record]] = []
        kept: list[Held] = []
        for lap in range(laps):
            found = asyncio.run(open_loop(target, poisson(rate, seconds / laps, seed=lap)))
            records.append([replace(each, body=b"") for each in found])
            kept.append(held(service))
    return [*_answers(records, rate), *_flatness(kept)]


def _answers(laps: Sequence[Sequence[Record]], rate: float) -> Iterator[Figure]:
    everything = [record for lap in laps for record in lap]
    failed = sum(record.status != 200 for record in everything)
    quarter = len(laps) // 4
    first, last = (
        percentile(sorted(1e3 * record.latency for lap in part for record in lap), 99)
        for part in (laps[:quarter], laps[-quarter:])
    )
    yield Figure(f"{len(everything)} requests, {rate:.1f} a second: without an answer", failed, "", 0, "")
    yield Figure(f"p99 of the last quarter (the first: {first:.1f} ms)", last, "ms", 1.1 * first, "")


def _flatness(laps: Sequence[Held]) -> Iterator[Figure]:
    """Medians of the last quarter; more than in the first by 5 %, and of what is counted by one more, is no noise."""
    quarter = len(laps) // 4
    for name in Held._fields:
        first, last = (
            statistics.median(float(getattr(lap, name)) for lap in part) for part in (laps[:quarter], laps[-quarter:])
        )
        slack = 0 if name == "resident_mb" else 1
        label = f"{name.replace('_mb', ' memory')} at the end (in the first quarter: {first:.4g})"
        yield Figure(label, last, "MB" if name == "resident_mb" else "", 1.05 * first + slack, _SHOWN)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the figures; exit 1 if one of them is worse than it may be."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="candlecast-soak-") as folder:
        figures = soak_for(Path(folder), options.seconds)
    show(figures)
    sys.exit(any(each.verdict == "NOT MET" for each in figures))


if __name__ == "__main__":
    main()

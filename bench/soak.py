"""Memory over many mixed requests: the service over HTTP with tiny networks, its resident size every 1,000 requests.

python -m bench.soak --requests 10000
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from bench.connection import Connection
from bench.load import SEED
from bench.published import KRONOS_TINY, TOTO_TINY, random_weights, toto_config
from bench.service import Service, forecast_body, put_version, start_service
from model_store.store import ModelStore

_LENGTHS: Final = (20, 40, 64, 90, 256)
_HORIZONS: Final = (1, 5, 8, 30)
_NOTHING: Final[list[dict[str, int]]] = [{}]
_PATHS: Final = [{"samples": samples} for samples in (2, 4, 8)]
_CACHE_BYTES: Final = 2**20  # full, and at work, long before the first size that counts


def resident_bytes(process: int | str, kind: str = "VmRSS") -> int:
    """Memory that a process holds; the most that it has held is of the kind VmHWM."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


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


def soak(folder: Path, requests: int, *, every: int = 1000, clients: int = 8) -> list[int]:
    """The service's resident bytes after each `every` requests; RuntimeError if one is not answered."""
    store = ModelStore(folder / "store")
    for family, config in (("toto", toto_config(TOTO_TINY, 512)), ("kronos", KRONOS_TINY)):
        put_version(store, f"{family}-tiny", family, config, random_weights(family, config))
    with start_service(store, folder / "home", {"CANDLECAST_CACHE_BYTES": str(_CACHE_BYTES)}) as service:
        return asyncio.run(_sizes(service, requests, every, clients))


async def _sizes(service: Service, requests: int, every: int, clients: int) -> list[int]:
    url, bodies = urlsplit(service.forecast_url()), mixed_bodies()
    sizes: list[int] = []
    connections = [Connection(url.hostname or "127.0.0.1", url.port or 80) for _ in range(clients)]

    async def ask(connection: Connection, count: int) -> None:
        for _ in range(count):
            answer = await connection.post(url.path, next(bodies))
            if answer.status != 200:
                raise RuntimeError(f"status {answer.status}: {answer.body[:300]!r}")

    for done in range(every, requests + 1, every):
        await asyncio.gather(*(ask(connection, every // clients) for connection in connections))
        sizes.append(resident_bytes(service.process))
        print(json.dumps({"requests": done, "resident_mb": round(sizes[-1] / 1e6, 1)}), flush=True)  # noqa: T201
    for connection in connections:
        connection.close()
    return sizes


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the sizes; exit 1 if the last exceeds that after 2,000 requests by 5 %."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="candlecast-soak-") as folder:
        sizes = soak(Path(folder), options.requests)
    sys.exit(len(sizes) > 1 and sizes[-1] > 1.05 * sizes[1])


if __name__ == "__main__":
    main()

"""The wall-clock figures behind the service's promises, which no test may fail on, beside the tests of what counts.

python -m bench.gates --only refusals
"""

import argparse
import asyncio
import contextlib
import http.client
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, get_args
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from bench.connection import Connection
from bench.death import DRAIN_SECONDS, ended_while_loading, restarted, roll_two
from bench.fault_proxy import Fault, FaultProxy
from bench.hostile import Hostile, corpus
from bench.load import SEED, percentile
from bench.overload import TIMES, overload
from bench.service import Service, forecast_body, redis_running, start_naive_service
from service.state import PrivateRedis

_ROUNDS: Final = 5
_FORECASTS: Final = 200  # at each fault
_REPLICAS: Final = "tests/service/test_replicas.py"
_SERVE: Final = "tests/service/test_serve.py"


class Figure(NamedTuple):
    """One line of the table; `bound` is the most, or `at_least`, that `reached` may be, None where it is only told."""

    gate: str
    reached: float
    unit: str
    bound: float | None
    test: str
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.bound is None:
            return ""
        return "met" if (self.reached >= self.bound if self.at_least else self.reached <= self.bound) else "NOT MET"


def refusals(folder: Path) -> Sequence[Figure]:
    """Milliseconds from a hostile request to its refusal: of every body the median, and of those the worst."""
    with start_naive_service(folder, {}) as service:
        took = {hostile.name: _milliseconds(service, hostile) for hostile in corpus()}
    shown = "tests/service/test_hostile.py"
    worst = max(took, key=lambda name: took[name])
    return [
        Figure(f"refusing bad input, worst of {len(took)}: {worst}", took[worst], "ms", 50, shown),
        Figure("refusing bad input, median", statistics.median(took.values()), "ms", 50, shown),
    ]


def _milliseconds(service: Service, hostile: Hostile) -> float:
    at = urlsplit(service.url)
    connection = http.client.HTTPConnection(at.hostname or "", at.port)
    took = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        connection.request(hostile.method, hostile.path, hostile.body, dict(hostile.headers))
        connection.getresponse().read()
        took.append(1000 * (time.perf_counter() - begun))
    connection.close()
    return statistics.median(took)


def redis_faults(folder: Path) -> Sequence[Figure]:
    """Forecasts of sent candles while the connection to Redis fails in each way there is."""
    return asyncio.run(_redis_faults(folder))


async def _redis_faults(folder: Path) -> Sequence[Figure]:
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(redis_running(folder / "redis"))
        proxy = FaultProxy(folder / "redis" / PrivateRedis.SOCKET)
        await proxy.become("none")
        stack.push_async_callback(proxy.stop)
        started = start_naive_service(folder, {"CANDLECAST_REDIS_URL": proxy.url})
        service = await asyncio.to_thread(started.__enter__)
        stack.callback(started.__exit__, None, None, None)
        at = urlsplit(service.url)
        connection = Connection(at.hostname or "", at.port or 80)
        stack.callback(connection.close)
        _, usual = await _forecasts(connection)
        added, recovery, failed = {}, {}, 0
        for fault in (each for each in get_args(Fault) if each != "none"):
            await proxy.become(fault)
            missed, slowest = await _forecasts(connection)
            await proxy.become("none")
            healed = time.monotonic()
            while b'"degraded":[]' not in (await connection.get("/readyz")).body and time.monotonic() < healed + 60:
                await asyncio.sleep(0.02)
            added[fault], recovery[fault], failed = slowest - usual, time.monotonic() - healed, failed + missed
    shown = "tests/service/score/test_faults.py"
    slow, late = max(added, key=lambda each: added[each]), max(recovery, key=lambda each: recovery[each])
    return [
        Figure(f"forecasts that failed while Redis did, of {len(added) * _FORECASTS}", failed, "", 0, shown),
        Figure(f"p99 added while Redis fails, worst: {slow}", added[slow], "ms", 150, shown),
        Figure(f"recovery once Redis is back, worst: {late}", recovery[late], "s", 5, shown),
    ]


async def _forecasts(connection: Connection) -> tuple[int, float]:
    """How many of some forecasts failed, and the 99th percentile of their milliseconds."""
    body, failed, took = forecast_body("naive", 64, horizon=5), 0, []
    for _ in range(_FORECASTS):
        begun = time.perf_counter()
        answer = await connection.post("/forecast/BENCH", body.replace(SEED, b"%d" % (time.monotonic_ns() % 2**40)))
        took.append(1000 * (time.perf_counter() - begun))
        failed += answer.status != 200
    return failed, statistics.quantiles(took, n=100)[-1]


def overloads(folder: Path) -> Sequence[Figure]:
    """A minute of ten times the requests that the service can answer, and another client beside it."""
    seen = asyncio.run(overload(folder))
    shown = "tests/service/test_door.py"
    refusals = sorted(1000 * (record.done - record.sent) for record in seen.refused)
    accepted = sorted(1000 * record.latency for record in seen.flood if record.status == 200)
    late = sum(record.status == 504 for record in seen.flood)
    before, most = seen.resident_mb
    shares = 100 * seen.goodput, 100 * seen.in_time(seen.meanwhile) / len(seen.meanwhile)
    load = f"{TIMES} x {seen.capacity:.3g} a second"
    return [
        Figure(f"{load}: answered in time, of what the service can", shares[0], "%", 80, shown, at_least=True),
        Figure(f"{load}: refusals, p99 of {len(refusals)}", percentile(refusals, 99), "ms", 50, shown),
        Figure(f"{load}: neither answer, late, nor 503 with Retry-After", seen.unforeseen, "", 0, shown),
        Figure(f"{load}: p99 of {len(accepted)} answers", percentile(accepted, 99), "ms", 1000 * seen.deadline, shown),
        Figure(f"{load}: admitted and then late", 100 * late / (late + len(accepted)), "%", None, ""),
        Figure(f"{load}: another client's requests answered in time", shares[1], "%", 95, shown, at_least=True),
        Figure(f"{load}: most memory held (before it: {before:.4g} MB)", most, "MB", 1.1 * before, ""),
        Figure(f"{load}: recovery", seen.recovery, "s", 10, ""),
        Figure(f"{load}: what sending it took", seen.client_cores, "cores", None, ""),
    ]


def endings(folder: Path) -> Sequence[Figure]:
    """Services that are replaced under load, end while they load a model, and are killed."""
    rolled = asyncio.run(roll_two(folder / "rolled"))
    _, loading = ended_while_loading(folder / "loading")
    again = max(restarted(folder / str(redis_too), redis_too=redis_too).seconds for redis_too in (False, True))
    failed = Figure(f"replacing two services: failed of {len(rolled.records)}", rolled.failed.total(), "", 0, _REPLICAS)
    return [
        failed,
        Figure(
            f"SIGTERM under load to exit, {DRAIN_SECONDS} s of it the drain", max(rolled.seconds), "s", 25, _REPLICAS
        ),
        Figure("SIGTERM while a model is loaded to exit", loading, "s", 5, _SERVE),
        Figure("start after SIGKILL to ready", again, "s", None, _SERVE),
    ]


GATES: Final[Mapping[str, Callable[[Path], Sequence[Figure]]]] = {
    "refusals": refusals,
    "redis-faults": redis_faults,
    "overload": overloads,
    "endings": endings,
}


def show(figures: Iterable[Figure]) -> None:
    """Print them as a table."""
    table = Table("gate", "reached", "bound", "verdict", "what can be counted is shown by")
    for each in figures:
        bound = "" if each.bound is None else f"{'≥' if each.at_least else '≤'} {each.bound:.4g} {each.unit}"
        table.add_row(each.gate, f"{each.reached:.4g} {each.unit}", bound, each.verdict, each.test)
    Console(width=180).print(table)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.gates", description=__doc__)
    parser.add_argument("--only", action="append", choices=GATES, help="once per measurement")
    chosen = parser.parse_args().only or GATES
    figures: list[Figure] = []
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="candlecast-gates-") as folder:
            figures += GATES[name](Path(folder))
    show(figures)


if __name__ == "__main__":
    main()

"""The service over HTTP: what it adds to the engine, what it holds under load, how fast it starts.

Loads come from a process of their own (bench/load.py); what they are compared with takes turns with them.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, Final

from bench.load import SEED, percentile
from bench.processes import Load, ServerFailed, free_port, server, wait_until_answering, wait_until_listening
from bench.published import request
from bench.rows import Row
from bench.service import WATCHED, Service, forecast_body, start_service
from bench.timing import wall_time
from bench.workbench import KRONOS_SMALL, TOTO, Workbench
from models.forecaster import Forecaster, forecast, pad_rows

CANDLES: Final = 512
# `batch` is the encoding of candles that was not done while another batch ran: without a service, `prepare` does it.
_ENGINE: Final = ("batch", "prepare", "run", "finish")
_IMPORTS: Final = "import candlecast, service.main"
_MANY: Final = 64
_CALLERS: Final = 16  # of the reference predictor, which takes seconds for each
_LOAD: Final = 0.8


def overhead(bench: Workbench) -> list[Row]:
    """What HTTP, parsing, queueing and answering add to the engine's time of the same request.

    Beside it what a plain endpoint adds to a sleep of that length: after a pause nothing is in the processor's caches.
    """
    service, body = bench.service, forecast_body("toto", CANDLES)
    settled = service.warm_up(body)
    load = computed(service.client.run(service.forecast_url(), body, clients=1, seconds=bench.seconds(20)))
    added = sorted(1e3 * (record["done"] - record["due"]) - engine_ms(record) for record in load.records)
    engine = percentile(sorted(map(engine_ms, load.records)), 50)
    with _bytes_server(bench, service.ask(body, seed=1), wait_ms=engine) as url:
        waits = _answered(service.client.run(url, body, clients=1, seconds=bench.seconds(10)))
    plain = sorted(1e3 * (record["done"] - record["due"]) - engine for record in waits.records)
    work, against = f"HTTP at concurrency 1, {CANDLES}-candle JSON body", "engine time of the same request"
    rows = []
    for percent, reach in ((50, 1.0), (99, 3.0)):
        measured = {"engine": engine, "added by a plain endpoint that sleeps so long": percentile(plain, percent)}
        detail = {**model_facts(settled), "requests": len(added), "milliseconds": measured}
        value = percentile(added, percent)
        rows.append(Row(f"{work}: added p{percent}", against, value, reach, "lower", " ms", detail))
    return rows


@contextlib.contextmanager
def _bytes_server(bench: Workbench, content: bytes, wait_ms: float = 0.0) -> Iterator[str]:
    """The address of a bare endpoint that answers `content`."""
    answer, port, log = bench.folder / "answer.json", free_port(), bench.folder / "bytes.log"
    answer.write_bytes(content)
    command = [sys.executable, "-m", "bench.baselines", "bytes", "--port", str(port), "--answer", str(answer)]
    with server([*command, "--wait-ms", str(wait_ms)], log) as process:
        wait_until_listening(process, port, log)
        yield f"http://127.0.0.1:{port}/forecast/BENCH"


def under_load(bench: Workbench) -> list[Row]:
    """Closed loops of 1, 8 and 64 callers against the engine alone, then a Poisson load of 80 % of what it held."""
    service, body = bench.service, forecast_body("toto", CANDLES)
    settled = service.warm_up(body)
    url, seconds = service.forecast_url(), bench.seconds(15)
    forecaster = bench.toto[f"{settled['model']['runtime']} {settled['model']['dtype']}"]
    rows = fastest_batch(forecaster, most=8 if bench.quick else 32)
    offline, held = [], []
    for _ in range(1 if bench.quick else 2):
        offline.append(_offline(forecaster, rows, seconds))
        held.append(computed(service.client.run(url, body, clients=_MANY, seconds=seconds)).per_second)
    few = {
        count: computed(service.client.run(url, body, clients=count, seconds=seconds / 2)).per_second
        for count in (1, 8)
    }
    capacity = median(held)
    detail = {**model_facts(settled), "offline_rows": rows}
    held_by = {f"{count} callers": rate for count, rate in {**few, _MANY: capacity}.items()}
    closed = {"per_second": {"offline": median(offline), **held_by}, "rounds": len(held)}
    work = f"forecasts/s over HTTP at concurrency {_MANY}"
    ratio = capacity / median(offline)
    return [
        Row(work, "the engine's offline batched throughput", ratio, 0.9, "higher", "×", detail | closed),
        _poisson(bench, service, body, _LOAD * capacity, model_facts(settled)),
    ]


def _poisson(bench: Workbench, service: Service, body: bytes, rate: float, model: Mapping[str, Any]) -> Row:
    """The slowest hundredth of an open loop, in service times of one batch."""
    load = computed(service.client.run(service.forecast_url(), body, rate=rate, seconds=bench.seconds(45)))
    batch_ms = median(map(engine_ms, load.records))
    latencies = load.summary["latency_ms"]
    detail = {
        **model,
        "rate": rate,
        "requests": len(load.records),
        "batch_ms": batch_ms,
        "batch_rows": median(record["meta"]["batch_rows"] for record in load.records),
        "latency_ms": latencies,
        "client_lag_ms": load.summary["client_lag_ms"],
    }
    work = f"open-loop Poisson at {_LOAD:.0%} of capacity: p99"
    return Row(work, "one batch's service time", latencies["p99"] / batch_ms, 2.5, "lower", "×", detail)


def against_plain_fastapi(bench: Workbench) -> list[Row]:
    """The same callers at the reference predictor in an ordinary sync endpoint."""
    command = [sys.executable, "-m", "bench.baselines", "reference", "--device", bench.device]
    return [against_server(bench, "the reference predictor in plain FastAPI", command)]


def against_server(bench: Workbench, name: str, command: Sequence[str], envelope: bytes = b"%b") -> Row:
    """Forecasts/s of ours over those of a server that wraps the reference predictor at `/predict`.

    `command` serves on the `--port` appended to it and takes the request in `envelope`. Both are asked for one path,
    the reference's own default.
    """
    clients, seconds = 8 if bench.quick else _CALLERS, bench.seconds(10)
    body = forecast_body("kronos", 64, horizon=30, samples=1)
    settled = bench.service.warm_up(body)
    run = bench.service.client.run
    port, log = free_port(), bench.folder / "reference.log"
    with server([*command, "--port", str(port)], log) as process:
        wait_until_listening(process, port, log)
        url, theirs = f"http://127.0.0.1:{port}/predict", envelope % body
        wait_until_answering(bench.service.client, url, theirs, log)
        before = computed(run(bench.service.forecast_url(), body, clients=clients, seconds=seconds))
        reference = _answered(run(url, theirs, clients=clients, seconds=seconds))
        after = computed(run(bench.service.forecast_url(), body, clients=clients, seconds=seconds))
    per_second = median([before.per_second, after.per_second])
    detail = {
        **model_facts(settled),
        "clients": clients,
        "per_second": {"ours": per_second, "reference": reference.per_second},
        "latency_ms": {"ours": after.summary["latency_ms"], "reference": reference.summary["latency_ms"]},
    }
    work = f"Kronos-small 64→30 over HTTP at concurrency {clients}, forecasts/s"
    return Row(work, name, per_second / reference.per_second, 20, "higher", "×", detail)


def cached(bench: Workbench) -> list[Row]:
    """A forecast from the stored history that has been asked for before, against an endpoint that sends its bytes."""
    service, body = (
        bench.service,
        forecast_body("toto", None, interval="1h", lookback=CANDLES).replace(SEED, b"7"),
    )
    service.warm_up(forecast_body("toto", CANDLES))
    service.put_history(CANDLES)
    service.ask(body)
    content = service.ask(body)
    if b'"cache":"hit"' not in content.replace(b" ", b""):
        raise ServerFailed("the service did not answer a repeated request from its cache")
    with _bytes_server(bench, content) as bare:
        run = partial(service.client.run, body=body, clients=8, seconds=bench.seconds(4))
        pairs = [(_answered(run(service.forecast_url())).per_second, _answered(run(bare)).per_second) for _ in range(3)]
    ours, theirs = (median(side) for side in zip(*pairs, strict=True))
    ratio = median(one / other for one, other in pairs)
    detail = {"per_second": {"ours": ours, "bare": theirs}, "rounds": len(pairs), "bytes": len(content)}
    work = "cached forecast, requests/s"
    return [Row(work, "a FastAPI endpoint returning the same bytes", ratio, 0.5, "higher", "×", detail)]


def latest(bench: Workbench) -> list[Row]:
    """A watched forecast, by one caller over one connection; nobody else asks, and nothing is refreshed meanwhile.

    Beside it what a plain endpoint takes to send the same bytes, which tells how busy the machine is with other things.
    """
    service = bench.service
    settled = service.warm_up(forecast_body("toto", CANDLES))
    service.put_history(CANDLES, WATCHED)
    content = service.wait_for_latest()
    run = partial(service.client.run, clients=1, seconds=bench.seconds(10))
    times = _answered(run(service.latest_url(), None)).summary["latency_ms"]
    with _bytes_server(bench, content) as bare:
        plain = _answered(run(bare, b"{}")).summary["latency_ms"]
    milliseconds = {"p50": times["p50"], "a plain endpoint p50": plain["p50"], "its p99": plain["p99"]}
    detail = {**model_facts(settled), "milliseconds": milliseconds, "latency_ms": times, "bytes": len(content)}
    return [Row("GET latest: p99", "one caller, an idle service", times["p99"], 5, "lower", " ms", detail)]


def start(bench: Workbench) -> list[Row]:
    """A fresh process over a store that holds both networks, until both ports answer."""
    imports, ready = [], []
    settings = {"CANDLECAST_TOTO": TOTO, "CANDLECAST_KRONOS": KRONOS_SMALL, "CANDLECAST_DEVICE": bench.device}
    for turn in range(1 if bench.quick else 3):
        command = [sys.executable, "-c", _IMPORTS]
        imports.append(wall_time(lambda command=command: subprocess.run(command, check=True)))  # type: ignore[misc]
        with start_service(bench.store, bench.folder / f"start-{turn}", settings) as service:
            ready.append(service.ready_seconds)
    after = median(whole - part for whole, part in zip(ready, imports, strict=True))
    detail = {"imports_seconds": median(imports), "ready_seconds": median(ready), "rounds": len(ready)}
    work = "process start to ready, versions in the store, after imports"
    return [Row(work, "—", max(0.0, after), 5, "lower", " s", detail)]


def engine_ms(record: Mapping[str, Any]) -> float:
    """What the forecaster took for the batch of this request."""
    timings = record["meta"]["timings_ms"]
    return float(sum(timings[stage] for stage in _ENGINE))


def fastest_batch(forecaster: Forecaster, most: int) -> int:
    """The batch size with the highest throughput offline."""
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if size == pad_rows(size) and size <= most]
    sizes = [size for size in sizes if size <= forecaster.max_rows(request(CANDLES, 64, 0))]
    return max(sizes, key=lambda size: _offline(forecaster, size, 1.0))


def _offline(forecaster: Forecaster, rows: int, seconds: float) -> float:
    """Forecasts/s of whole batches without a service."""
    items = [request(CANDLES, 64, seed) for seed in range(rows)]
    forecast(forecaster, items)
    spent, done = 0.0, 0
    while spent < seconds:
        spent += wall_time(lambda: forecast(forecaster, items))
        done += rows
    return done / spent


def computed(load: Load) -> Load:
    """`load`, each of whose requests was answered by a computation of its own."""
    shared = [record for record in _answered(load).records if record["meta"]["cache"] in ("hit", "coalesced")]
    if shared:
        raise ServerFailed(f"{len(shared)} of {len(load.records)} requests were not computed: their seeds do not count")
    return load


def _answered(load: Load) -> Load:
    """`load`, all of whose requests were answered."""
    if load.failed or not load.records:
        raise ServerFailed(f"{load.failed} of {len(load.records)} requests failed: {load.summary['statuses']}")
    return load


def model_facts(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What computed an answer, as the table shows it."""
    return {"runtime": answer["model"]["runtime"], "dtype": answer["model"]["dtype"]}

"""Late binding, deadlines, cancellation, faults: what the engine does with what waits."""

import asyncio
import ctypes
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.anyio

NAIVE = {"model": "naive", "interval": "1h", "horizon": 3}


async def until(condition: Any, seconds: float = 10) -> None:
    """Give other tasks and the engine's thread their turn until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.002)


def ask(client: Any, rows: Any, **body: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(client.post("/forecast/BTC", json=NAIVE | {"candles": rows(8), **body}))


async def held(client: Any, rows: Any, faulty: Any, **body: Any) -> asyncio.Task[Any]:
    """A request that the engine is computing and will go on computing until `faulty.open` is set."""
    faulty.open.clear()
    faulty.entered.clear()
    first = ask(client, rows, seed=0, **body)
    await until(faulty.entered.is_set)
    return first


def counted(app: Any, name: str, **labels: str) -> float:
    """The value of a series."""
    value = app.state.services.metrics.registry.get_sample_value(f"candlecast_{name}", labels)
    assert value is not None, f"{name} {labels} does not exist"
    return float(value)


def waiting(app: Any) -> float:
    return counted(app, "queue_depth")


def body_of(rows: Any, **fields: Any) -> bytes:
    return json.dumps(NAIVE | {"candles": rows(8), **fields}).encode()


def caller(body: bytes, hang_up: asyncio.Event) -> Any:
    """What a server hands to the application: a body, and a message when its sender hangs up."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        for message in messages:
            return message
        await hang_up.wait()
        return {"type": "http.disconnect"}

    return receive


async def over_asgi(app: Any, receive: Any) -> list[Any]:
    """The messages of an answer over ASGI itself."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/forecast/BTC",
        "raw_path": b"/forecast/BTC",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    await app(scope, receive, send)
    return sent


async def test_whatever_waits_becomes_one_batch(running: Any, rows: Any, faulty: Any, faulty_build: Any) -> None:
    async with running(build=faulty_build) as (client, app):
        first = await held(client, rows, faulty)
        others = [ask(client, rows, seed=seed) for seed in range(1, 13)]
        await until(lambda: waiting(app) == 12)
        faulty.open.set()
        answers = [answer.json() for answer in await asyncio.gather(first, *others)]
    assert [answer["meta"]["batch_rows"] for answer in answers] == [1] + [12] * 12
    assert sorted(faulty.batches[1]) == list(range(1, 13))


async def test_a_batch_holds_no_more_than_its_rows(running: Any, rows: Any, faulty: Any, faulty_build: Any) -> None:
    async with running(build=faulty_build, max_batch_rows=4) as (client, app):
        first = await held(client, rows, faulty)
        others = [ask(client, rows, seed=seed) for seed in range(1, 11)]
        await until(lambda: waiting(app) == 10)
        faulty.open.set()
        await asyncio.gather(first, *others)
    assert [len(batch) for batch in faulty.batches] == [1, 4, 4, 2]


async def test_the_bucket_with_the_oldest_deadline_goes_first(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build) as (client, app):
        first = await held(client, rows, faulty)
        others = []
        for seed, (horizon, timeout) in enumerate([(5, 9000), (7, 6000), (5, 9000), (7, 8000)], 1):
            others.append(ask(client, rows, seed=seed, horizon=horizon, timeout_ms=timeout))
            await until(lambda seed=seed: waiting(app) == seed)
        faulty.open.set()
        await asyncio.gather(first, *others)
    assert faulty.batches == [[0], [2, 4], [1, 3]]


async def test_a_late_request_answers_504_and_is_never_computed(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build) as (client, _):
        first = await held(client, rows, faulty)
        late = await ask(client, rows, seed=1, timeout_ms=30)
        assert late.status_code == 504
        assert late.json()["code"] == "deadline_exceeded"
        faulty.open.set()
        assert (await first).status_code == 200
        assert (await ask(client, rows, seed=2)).status_code == 200
    assert faulty.batches == [[0], [2]]


async def test_what_cannot_be_in_time_is_refused_at_once(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build) as (client, app):
        version = (await ask(client, rows, seed=7)).json()["model"]["version"]
        batcher = app.state.services.engine._batcher
        batcher.record(((f"naive@{version}", "eager", "float32"), 3), 1, 25.0)  # two fifths of it count
        batcher.record(((f"naive@{version}", "eager", "float32"), 5), 1, 1000.0)
        hopeless = await ask(client, rows, seed=1, timeout_ms=90_000, horizon=5)
        assert (hopeless.status_code, hopeless.json()["code"]) == (504, "deadline_exceeded")
        assert counted(app, "refusals_total", reason="deadline") == 1
        first = await held(client, rows, faulty, timeout_ms=600_000)
        crowded = await ask(client, rows, seed=2, timeout_ms=15_000)
        assert crowded.status_code == 503
        assert crowded.json()["code"] == "overloaded"
        assert 1 <= int(crowded.headers["retry-after"]) <= 11
        assert counted(app, "refusals_total", reason="queue") == 1
        faulty.open.set()
        assert (await first).status_code == 200
    assert faulty.batches == [[7], [0]]


async def test_a_cancelled_row_is_dropped_before_the_batch(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build, max_queue=2, max_batch_rows=2) as (client, app):
        first = await held(client, rows, faulty)
        gone, kept = ask(client, rows, seed=1), ask(client, rows, seed=2)
        await until(lambda: waiting(app) == 2)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        in_its_place = ask(client, rows, seed=3)
        await until(lambda: 3 in faulty.encoded)
        faulty.open.set()
        answers = await asyncio.gather(first, kept, in_its_place)
        assert {answer.status_code for answer in answers} == {200}
    assert faulty.batches == [[0], [2, 3]]


async def test_a_failing_batch_fails_its_requests_and_nothing_else(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build) as (client, _):
        faulty.failure = RuntimeError("secret of the machine")
        broken = await ask(client, rows)
        assert broken.status_code == 500
        assert broken.json()["code"] == "internal_error"
        assert "secret" not in broken.text
        assert broken.headers["content-type"] == "application/problem+json"
        assert (await ask(client, rows)).status_code == 200
        assert (await client.get("/livez")).status_code == 200


async def test_a_forecast_that_is_not_finite_never_leaves(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build) as (client, app):
        faulty.spoil = True
        answer = await ask(client, rows, seed=1)
        assert (answer.status_code, answer.json()["code"]) == (500, "model_output_invalid")
        assert "NaN" not in answer.text
        faulty.spoil = False
        again = await ask(client, rows, seed=1)
        assert (again.status_code, again.json()["meta"]["cache"]) == (200, "miss")
        parts = app.state.services
        await parts.register.flush()
        assert len(list(await parts.ledger.steps("BTC", "1h", parts.now()))) == NAIVE["horizon"]


async def test_one_row_without_a_forecast_fails_no_other(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build) as (client, app):
        first = await held(client, rows, faulty)
        others = [ask(client, rows, seed=seed) for seed in (1, 2, 3)]
        await until(lambda: waiting(app) == 3)
        faulty.guilty = 2
        faulty.open.set()
        answers = await asyncio.gather(first, *others)
        assert [answer.status_code for answer in answers] == [200, 200, 500, 200]
        assert answers[2].json()["code"] == "model_output_invalid"
        assert [answer.json()["meta"]["batch_rows"] for answer in (answers[1], answers[3])] == [1, 1]
        assert (await ask(client, rows, seed=4)).status_code == 200


async def batch_of(client: Any, app: Any, rows: Any, faulty: Any, count: int) -> list[Any]:
    """Answers to so many requests that wait while another, with the seed 0, is computed."""
    first = await held(client, rows, faulty)
    others = [ask(client, rows, seed=seed) for seed in range(1, count + 1)]
    await until(lambda: waiting(app) == count)
    faulty.open.set()
    return (await asyncio.gather(first, *others))[1:]


async def test_rows_that_do_not_fit_into_memory_are_computed_in_smaller_batches(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build, cache_bytes=0) as (client, app):
        whole = await batch_of(client, app, rows, faulty, 7)
        faulty.fits = 4
        halves = await batch_of(client, app, rows, faulty, 7)
        assert [len(batch) for batch in faulty.batches] == [1, 7, 1, 7, 4, 3]
        for one, other in zip(whole, halves, strict=True):
            assert one.json()["forecast"] == other.json()["forecast"]
            assert other.json()["meta"]["degraded"] == ["memory"]
            assert other.headers["candlecast-degraded"] == "memory"
        assert counted(app, "inference_failures_total", model="naive", reason="out_of_memory") == 1
        assert counted(app, "batch_released_total", model="naive", reason="memory") == 2


async def test_what_does_not_fit_in_a_smaller_batch_either_is_refused_and_the_next_request_is_whole(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build, cache_bytes=0) as (client, app):
        faulty.fits = 1
        for answer in await batch_of(client, app, rows, faulty, 7):
            assert (answer.status_code, answer.json()["code"]) == (503, "out_of_memory")
            assert answer.headers["retry-after"] == "2"
        faulty.fits = 1000
        for answer in await batch_of(client, app, rows, faulty, 7):
            assert answer.status_code == 200
            assert (answer.json()["meta"]["batch_rows"], answer.json()["meta"]["degraded"]) == (7, [])
        faulty.fits = 0
        assert (await ask(client, rows, seed=9)).json()["code"] == "out_of_memory"
        assert (await client.get("/livez")).status_code == 200


async def test_a_timeout_inside_the_model_is_no_deadline(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build) as (client, _):
        faulty.failure = TimeoutError()
        assert (await ask(client, rows)).status_code == 500


async def test_whatever_waits_at_shutdown_is_answered_503(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build) as (client, app):
        first = await held(client, rows, faulty)
        second = ask(client, rows, seed=1)
        await until(lambda: waiting(app) == 1)
        stopping = asyncio.create_task(app.state.services.engine.stop())
        refused = await second
        assert refused.status_code == 503
        assert refused.json()["code"] == "not_ready"
        too_late = await ask(client, rows, seed=2, timeout_ms=3000)
        assert too_late.status_code == 503
        faulty.open.set()
        await stopping
        assert (await first).status_code == 200
        assert (await ask(client, rows)).status_code == 503
        assert (await client.get("/readyz")).status_code == 503


async def test_a_disconnected_caller_leaves_the_queue(running: Any, rows: Any, faulty: Any, faulty_build: Any) -> None:
    async with running(build=faulty_build) as (client, app):
        first = await held(client, rows, faulty)
        hang_up = asyncio.Event()
        call = asyncio.create_task(over_asgi(app, caller(body_of(rows, seed=1), hang_up)))
        await until(lambda: waiting(app) == 1)
        hang_up.set()
        await call
        faulty.open.set()
        await first
        assert counted(app, "forecast_requests_total", model="naive", outcome="cancelled") == 1
    assert faulty.batches == [[0]]


async def test_a_batch_that_nobody_waits_for_is_given_up_between_steps(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build) as (client, app):
        faulty.steps = True
        first = await held(client, rows, faulty)
        second = ask(client, rows, seed=1)
        await until(lambda: waiting(app) == 1)
        first.cancel()
        await until(lambda: waiting(app) == 0)
        assert counted(app, "batches_abandoned_total", model="naive") == 1
        faulty.open.set()
        assert (await second).status_code == 200
        assert (await client.get("/livez")).status_code == 200
    assert faulty.batches == [[1]]


async def test_a_lone_request_passes_through_one_thread(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build) as (client, _):
        await ask(client, rows)
    assert faulty.threads == ["engine", "engine"]


async def test_requests_are_encoded_while_a_batch_runs(running: Any, rows: Any, faulty: Any, faulty_build: Any) -> None:
    async with running(build=faulty_build) as (client, _):
        first = await held(client, rows, faulty)
        others = [ask(client, rows, seed=seed) for seed in (1, 2, 3)]
        await until(lambda: len(faulty.encoded) == 4)
        faulty.open.set()
        await asyncio.gather(first, *others)
    assert sorted(faulty.encoded) == [0, 1, 2, 3]


async def test_a_batch_is_finished_beside_the_run_of_a_whole_batch_that_waits(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build, max_batch_rows=2) as (client, app):
        first = await held(client, rows, faulty)
        others = [ask(client, rows, seed=seed) for seed in (1, 2)]
        await until(lambda: waiting(app) == 2)
        faulty.may_finish.clear()
        faulty.open.set()
        await until(lambda: len(faulty.batches) == 2)
        assert not first.done()
        faulty.may_finish.set()
        assert {answer.status_code for answer in await asyncio.gather(first, *others)} == {200}


async def test_a_run_that_hangs_fails_liveness_until_it_ends(
    running: Any, rows: Any, faulty: Any, faulty_build: Any
) -> None:
    async with running(build=faulty_build, watchdog_seconds=0.1) as (client, app):
        first = await held(client, rows, faulty)
        await until(lambda: not app.state.services.engine.alive)
        assert (await client.get("/livez")).status_code == 503
        assert (await ask(client, rows, seed=1)).json()["code"] == "not_ready"
        faulty.open.set()
        assert (await first).status_code == 200
        assert (await client.get("/livez")).status_code == 200


async def test_networks_run_on_as_many_threads_as_the_setting_says(
    running: Any, rows: Any, faulty: Any, faulty_build: Any, monkeypatch: Any
) -> None:
    known, run, counts = torch.get_num_threads(), faulty.run, []
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    openmp = [ctypes.CDLL(path) for path in mapped]  # to ask torch would change what it says

    def counting(*given: Any) -> Any:
        counts.append(max(each.omp_get_max_threads() for each in openmp))
        return run(*given)

    monkeypatch.setattr(faulty, "run", counting)
    try:
        async with running(build=faulty_build, threads=known + 1) as (client, _):
            assert (await ask(client, rows)).status_code == 200
    finally:
        torch.set_num_threads(known)
    assert set(counts) == {known + 1}


@pytest.mark.filterwarnings("ignore:Exception in thread engine")
async def test_an_engine_that_ended_fails_liveness(running: Any, rows: Any, faulty: Any, faulty_build: Any) -> None:
    async with running(build=faulty_build) as (client, app):
        faulty.failure = SystemExit()
        lost = ask(client, rows)
        await until(lambda: not app.state.services.engine.alive)
        assert (await client.get("/livez")).status_code == 503
        lost.cancel()


async def test_stages_are_told_in_the_answer_and_in_its_header(client: Any, rows: Any) -> None:
    answer = await ask(client, rows)
    timings = answer.json()["meta"]["timings_ms"]
    header = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    assert list(header) == ["queue", "batch", "prepare", "run", "finish", "total"]
    assert {stage: float(value) for stage, value in header.items()} == pytest.approx(timings, abs=1e-3)
    assert timings["total"] >= sum(timings.values()) - timings["total"] > 0

"""Bad input is a 4xx that names the place, never a 5xx, and never an echo."""

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.anyio

HOUR = 3_600_000
JSON = {"content-type": "application/json"}
NAIVE = {"model": "naive", "interval": "1h", "horizon": 3}


def assert_problem(answer: Any, status: int, code: str, pointer: str | None = None) -> Any:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert body["code"] == code
    assert {"type", "title", "detail", "errors", "next_steps"} <= body.keys()
    assert len(answer.content) <= 4096
    if pointer is not None:
        assert [error.get("pointer") for error in body["errors"]] == [pointer]
    return body


def cell(row: int, column: int, value: Any) -> Callable[[list[list[Any]]], None]:
    def change(rows: list[list[Any]]) -> None:
        rows[row][column] = value

    return change


def swap(first: int, second: int) -> Callable[[list[list[Any]]], None]:
    def change(rows: list[list[Any]]) -> None:
        rows[first], rows[second] = rows[second], rows[first]

    return change


BAD_CANDLES = {
    "NaN": (cell(2, 4, float("nan")), "invalid_candles", "/candles/2/4"),
    "infinity": (cell(2, 2, float("inf")), "invalid_candles", "/candles/2/2"),
    "zero price": (cell(3, 1, 0), "invalid_candles", "/candles/3/1"),
    "negative price": (cell(3, 3, -1.5), "invalid_candles", "/candles/3/3"),
    "negative volume": (cell(3, 5, -1), "invalid_candles", "/candles/3/5"),
    "high below low": (cell(1, 2, 1.0), "invalid_candles", "/candles/1/2"),
    "low above open": (cell(1, 3, 103.0), "invalid_candles", "/candles/1/3"),
    "boolean": (cell(4, 5, True), "invalid_candles", "/candles/4/5"),
    "text": (cell(4, 5, "12.5"), "invalid_candles", "/candles/4/5"),
    "null": (cell(4, 1, None), "invalid_candles", "/candles/4/1"),
    "integer of 400 digits": (cell(4, 1, 10**400), "invalid_candles", "/candles/4/1"),
    "unsorted": (swap(3, 4), "unsorted_timestamps", "/candles/4/0"),
    "seconds": (cell(0, 0, 1_700_000_000), "invalid_timestamp", "/candles/0/0"),
    "2^63": (cell(0, 0, 2**63), "invalid_timestamp", "/candles/0/0"),
    "boolean timestamp": (cell(0, 0, True), "invalid_timestamp", "/candles/0/0"),
    "half a millisecond": (cell(0, 0, 1749960000000.5), "invalid_timestamp", "/candles/0/0"),
    "time without offset": (cell(0, 0, "2025-06-15T00:00:00"), "invalid_timestamp", "/candles/0/0"),
    "short row": (lambda rows: rows[5].pop(), "invalid_input", "/candles/5"),
    "row that is none": (lambda rows: rows.__setitem__(5, 7), "invalid_input", "/candles/5"),
}


@pytest.mark.parametrize("name", BAD_CANDLES)
async def test_bad_candles_are_named(client: Any, rows: Any, name: str) -> None:
    change, code, pointer = BAD_CANDLES[name]
    sent = rows()
    change(sent)
    for method, path in (("POST", "/forecast/BTC"), ("PUT", "/candles/BTC")):
        body = {"candles": sent, "interval": "1h"} | (NAIVE if method == "POST" else {})
        answer = await client.request(method, path, content=json.dumps(body), headers=JSON)
        assert_problem(answer, 422, code, pointer)


async def test_a_step_too_long_for_a_name_is_no_interval(client: Any, rows: Any) -> None:
    sent = rows(step=10_007 * 60_000)
    for method, path, body in (("POST", "/forecast/BTC", {"model": "naive"}), ("PUT", "/candles/BTC", {})):
        answer = await client.request(method, path, json=body | {"candles": sent})
        assert_problem(answer, 422, "unknown_interval", "/interval")


async def test_a_repeated_timestamp_is_named(client: Any, rows: Any) -> None:
    sent = rows()
    sent[4][0] = sent[3][0]
    answer = await client.post("/forecast/BTC", json=NAIVE | {"candles": sent})
    assert_problem(answer, 422, "duplicate_timestamp", "/candles/4/0")


async def test_a_candle_from_the_future_is_refused(client: Any, rows: Any, now: int) -> None:
    sent = rows(9, end=now + 3 * HOUR)
    answer = await client.post("/forecast/BTC", json=NAIVE | {"candles": sent})
    assert_problem(answer, 422, "future_timestamp", "/candles/7/0")


async def test_a_candle_between_the_slots_is_refused(client: Any, rows: Any) -> None:
    sent = rows()
    sent[3][0] += 60_000
    answer = await client.post("/forecast/BTC", json=NAIVE | {"candles": sent})
    assert_problem(answer, 422, "off_grid", "/candles/3/0")


async def test_too_few_candles_say_how_many_are_needed(client: Any, rows: Any) -> None:
    answer = await client.post("/forecast/BTC", json=NAIVE | {"candles": rows(1)})
    body = assert_problem(answer, 422, "too_few_candles", "/candles")
    assert (body["needed"], body["got"]) == (2, 1)
    answer = await client.post("/forecast/BTC", json=NAIVE | {"candles": rows(8), "lookback": 20})
    body = assert_problem(answer, 422, "too_few_candles", "/lookback")
    assert (body["needed"], body["got"]) == (20, 8)


async def test_no_candles_at_all_are_too_few(client: Any) -> None:
    for empty in ([], {name: [] for name in ("timestamp", "open", "high", "low", "close", "volume")}):
        body = assert_problem(
            await client.post("/forecast/BTC", json=NAIVE | {"candles": empty}), 422, "too_few_candles", "/candles"
        )
        assert body["got"] == 0


BAD_FIELDS = {
    "horizon zero": ({"horizon": 0}, "invalid_input", "/horizon"),
    "horizon text": ({"horizon": "3"}, "invalid_input", "/horizon"),
    "horizon boolean": ({"horizon": True}, "invalid_input", "/horizon"),
    "horizon too long": ({"horizon": 513}, "horizon_too_long", "/horizon"),
    "huge horizon": ({"horizon": 10**300}, "horizon_too_long", "/horizon"),
    "unknown field": ({"horizn": 3}, "invalid_input", "/horizn"),
    "interval": ({"interval": "1y"}, "invalid_input", "/interval"),
    "quantile one": ({"quantiles": [0.1, 1.0]}, "invalid_input", "/quantiles"),
    "quantile too low": ({"quantiles": [0.0009]}, "invalid_input", "/quantiles"),
    "quantile too high": ({"quantiles": [0.5, 0.9991]}, "invalid_input", "/quantiles"),
    "temperature near zero": ({"temperature": 0.009}, "invalid_input", "/temperature"),
    "no quantiles": ({"quantiles": []}, "invalid_input", "/quantiles"),
    "quantile NaN": ({"quantiles": [float("nan")]}, "invalid_input", "/quantiles/0"),
    "calendar": ({"calendar": "XXXX"}, "unknown_calendar", "/calendar"),
    "samples": ({"samples": 8}, "unsupported_parameter", "/samples"),
    "temperature": ({"temperature": 0.5}, "unsupported_parameter", "/temperature"),
    "top_p": ({"top_p": 0.5}, "unsupported_parameter", "/top_p"),
    "top_k": ({"top_k": 5}, "unsupported_parameter", "/top_k"),
    "paths": ({"paths": True}, "unsupported_parameter", "/paths"),
    "aggregate": ({"aggregate": "mean"}, "unsupported_parameter", "/aggregate"),
    "lookback": ({"lookback": 5000}, "lookback_out_of_range", "/lookback"),
    "auto with paths": ({"model": "auto", "paths": True}, "unsupported_parameter", "/paths"),
    "auto with samples": ({"model": "auto", "samples": 4}, "unsupported_parameter", "/samples"),
    "model path": ({"model": "../../etc"}, "invalid_input", "/model"),
    "as_of future": ({"as_of": 1_750_000_000_001}, "future_timestamp", "/as_of"),
    "as_of text": ({"as_of": "yesterday"}, "invalid_timestamp", "/as_of"),
    "candles number": ({"candles": 7}, "invalid_input", None),
    "candles object": ({"candles": {"open": [1]}}, "invalid_input", "/candles"),
    "seed": ({"seed": -1}, "invalid_input", "/seed"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
async def test_bad_fields_are_named(client: Any, rows: Any, name: str) -> None:
    fields, code, pointer = BAD_FIELDS[name]
    body = json.dumps(NAIVE | {"candles": rows()} | fields)
    assert_problem(await client.post("/forecast/BTC", content=body, headers=JSON), 422, code, pointer)


async def test_an_interval_that_is_none_is_not_echoed(client: Any, rows: Any) -> None:
    body = NAIVE | {"candles": rows(), "interval": "<b>1y"}
    for answer in (await client.post("/forecast/BTC", json=body), await client.get("/candles/BTC?interval=<b>1y")):
        assert answer.status_code == 422
        assert "1y" not in answer.text


async def test_toto_refuses_what_it_does_not_use(client: Any, put_naive: Any, rows: Any) -> None:
    put_naive("toto-demo", family="toto")
    for fields in ({"samples": 8}, {"paths": True}, {"top_k": 1}):
        answer = await client.post("/forecast/BTC", json={"candles": rows(), **fields})
        assert_problem(answer, 422, "unsupported_parameter", f"/{next(iter(fields))}")
    assert (await client.post("/forecast/BTC", json={"candles": rows(), "seed": 3})).status_code == 200


async def test_toto_draws_paths_beyond_one_pass_but_knows_no_temperature(
    client: Any, put_naive: Any, rows: Any
) -> None:
    put_naive("toto-demo", family="toto")
    body = {"candles": rows(), "horizon": 65}
    for fields in ({"temperature": 0.5}, {"top_p": 0.5}, {"top_k": 1}):
        answer = await client.post("/forecast/BTC", json=body | fields)
        assert_problem(answer, 422, "unsupported_parameter", f"/{next(iter(fields))}")
    answer = await client.post("/forecast/BTC", json=body | {"samples": 8, "paths": True})
    assert answer.status_code == 200
    assert answer.json()["meta"]["samples"] == 8


async def test_a_toto_stored_with_one_pass_keeps_its_limit(client: Any, put_naive: Any, rows: Any) -> None:
    put_naive("toto-demo", family="toto", limits={"min_context": 2, "max_context": 4096, "max_horizon": 64})
    answer = await client.post("/forecast/BTC", json={"candles": rows(), "horizon": 65})
    assert_problem(answer, 422, "horizon_too_long", "/horizon")


async def test_kronos_counts_lookback_and_horizon_together(client: Any, put_naive: Any, rows: Any) -> None:
    limits = {"min_context": 2, "max_context": 511, "max_horizon": 510, "max_total": 512}
    put_naive("kronos-demo", family="kronos", limits=limits)
    answer = await client.post("/forecast/BTC", json={"model": "kronos", "candles": rows(500), "horizon": 100})
    assert answer.status_code == 200
    assert answer.json()["meta"]["context"] == 412
    assert answer.json()["meta"]["samples"] == 32
    body = {"model": "kronos", "candles": rows(500), "horizon": 100, "lookback": 413}
    assert_problem(await client.post("/forecast/BTC", json=body), 422, "lookback_out_of_range", "/lookback")


async def test_unknown_symbol_and_model_are_404(client: Any, rows: Any) -> None:
    assert_problem(await client.post("/forecast/NOBODY", json={"model": "naive"}), 404, "unknown_symbol")
    assert_problem(await client.get("/candles/NOBODY"), 404, "unknown_symbol")
    for model in ("nothing", "naive@nothing", "naive@000000000000", "kronos"):
        answer = await client.post("/forecast/BTC", json={"model": model, "candles": rows()})
        assert_problem(answer, 404, "unknown_model", "/model")


async def test_an_interval_that_is_not_stored_is_refused(client: Any, rows: Any) -> None:
    await client.put("/candles/BTC", json={"candles": rows(), "interval": "1h"})
    answer = await client.post("/forecast/BTC", json={"model": "naive", "interval": "4h"})
    assert_problem(answer, 422, "unknown_interval", "/interval")
    await client.put("/candles/BTC", json={"candles": rows(step=4 * HOUR), "interval": "4h"})
    answer = await client.post("/forecast/BTC", json={"model": "naive"})
    assert_problem(answer, 422, "unknown_interval", "/interval")


@pytest.mark.parametrize("symbol", ["-BTC", "A" * 33, "B{T}C", "%C3%9F", "A%20B", "A*"])
async def test_what_is_no_symbol_is_refused(client: Any, rows: Any, symbol: str) -> None:
    answer = await client.post(f"/forecast/{symbol}", json=NAIVE | {"candles": rows()})
    assert_problem(answer, 422, "invalid_symbol")


BAD_BODIES = {
    "no JSON": b"{",
    "duplicate key": b'{"horizon": 1, "horizon": 2}',
    "duplicate key in a candle": b'{"candles": [{"t": 1, "t": 2}]}',
    "depth": b'{"candles": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "integer of 5000 digits": b'{"horizon": ' + b"9" * 5000 + b"}",
    "invalid UTF-8": b'{"model": "\xff\xfe"}',
}


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_bodies_that_are_no_json_are_400(client: Any, name: str) -> None:
    answer = await client.post("/forecast/BTC", content=BAD_BODIES[name], headers=JSON)
    assert_problem(answer, 400, "malformed_json")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"[]", "application/json"),
        (b"7", "application/json"),
        (b'{"model": "\\ud800"}', "application/json"),
        (b"model=naive", "application/x-www-form-urlencoded"),
        (b"\x1f\x8b\x08\x00" + b"\x00" * 64, "application/json"),
        (b'{"interval": 1e999, "top_p": 1e999}', "application/json"),
    ],
)
async def test_other_bodies_are_4xx(client: Any, content: bytes, kind: str) -> None:
    answer = await client.post("/forecast/BTC", content=content, headers={"content-type": kind})
    assert 400 <= answer.status_code < 500
    assert_problem(answer, answer.status_code, answer.json()["code"])


async def test_nothing_that_was_sent_comes_back(client: Any) -> None:
    marker = "attack-at-dawn"
    for body in ({"interval": marker}, {"candles": marker}, {"candles": [[marker] * 6]}, {"calendar": marker}):
        answer = await client.post("/forecast/BTC", json=body)
        assert 400 <= answer.status_code < 500
        assert marker not in answer.text


async def test_many_errors_are_cut_short(client: Any) -> None:
    answer = await client.post("/forecast/BTC", json={"x" * 3000 + str(i): 1 for i in range(500)})
    body = assert_problem(answer, 422, "invalid_input")
    assert len(body["errors"]) == 10


async def test_routing_failures_are_problems_too(client: Any) -> None:
    assert_problem(await client.get("/nowhere"), 404, "not_found")
    answer = await client.delete("/symbols")
    assert_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET"
    assert_problem(await client.get("/candles/BTC?limit=0"), 422, "invalid_input")


async def test_a_large_body_is_413_announced_or_not(running: Any) -> None:
    async def chunks() -> Any:
        for _ in range(40):
            yield b" " * 100

    async with running(max_body_bytes=2000) as (client, _):
        for content in (b" " * 4000, chunks()):
            answer = await client.post("/forecast/BTC", content=content, headers=JSON)
            assert_problem(answer, 413, "body_too_large")
        assert_problem(await client.request("GET", "/symbols", content=b" " * 4000), 413, "body_too_large")
        answer = await client.post("/forecast/BTC", content=b"{}" + b" " * 1990, headers=JSON)
        assert answer.status_code == 404  # read to its end: the symbol is not stored

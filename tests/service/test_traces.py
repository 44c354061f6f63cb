"""Traces, as a collector receives them."""

import ast
import json
import logging
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

import service
from service.app import create_app
from service.logs import set_up
from service.settings import Settings

pytestmark = pytest.mark.anyio

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
STAGES = ["queue", "batch", "prepare", "run", "finish"]


class Collector:
    """Takes traces over HTTP, none before it `may_answer`."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.asked = threading.Event()
        self.was_waited_for = False
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                collector.asked.set()
                collector.was_waited_for |= not collector.may_answer.wait(20)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def resource(self) -> dict[str, Any]:
        return facts(self.requests[0].resource_spans[0].resource)

    def spans(self) -> list[Span]:
        """In the order in which they began."""
        scopes = [scope for sent in self.requests for each in sent.resource_spans for scope in each.scope_spans]
        return sorted((span for scope in scopes for span in scope.spans), key=lambda span: span.start_time_unix_nano)

    def requested(self) -> list[Span]:
        return [span for span in self.spans() if span.kind == Span.SPAN_KIND_SERVER]


def facts(described: Any) -> dict[str, Any]:
    return {each.key: each.value.string_value or each.value.int_value for each in described.attributes}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Where the environment has traces sent."""
    made = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{made.server.server_address[1]}")
    yield made
    made.may_answer.set()
    for thread in threading.enumerate():
        if thread.name.startswith("OtelBatch"):
            thread.join()
    made.server.shutdown()
    made.server.server_close()


async def test_a_forecast_is_a_span_of_its_caller_s_trace_with_its_stages_inside(
    running: Any, rows: Any, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "desk")
    async with running() as (client, _):
        headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "X-Request-ID": "order-42"}
        answer = await client.post("/forecast/btc%2Fusdt", json={"candles": rows()}, headers=headers)
    assert answer.status_code == 200, answer.text
    assert collector.resource()["service.name"] == "desk"
    (request,) = collector.requested()
    assert request.trace_id.hex() == TRACE
    assert request.parent_span_id.hex() == CALLER
    assert request.name == "POST /forecast/{symbol}"
    assert facts(request) == {
        "http.request.method": "POST",
        "http.route": "/forecast/{symbol}",
        "http.response.status_code": 200,
        "url.path": "/forecast/btc/usdt",
        "url.scheme": "http",
        "candlecast.request_id": "order-42",
        "candlecast.symbol": "BTC-USDT",
        "candlecast.model": "toto-demo",
        "candlecast.cache": "miss",
    }
    stages = sorted((span for span in collector.spans() if span != request), key=lambda span: span.end_time_unix_nano)
    assert [span.name for span in stages] == STAGES
    assert {span.parent_span_id for span in stages} == {request.span_id}
    timings = answer.json()["meta"]["timings_ms"]
    for span in stages:
        lasted = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6
        assert lasted == pytest.approx(timings[span.name], abs=1e-3)
    assert all(one.end_time_unix_nano == next_.start_time_unix_nano for one, next_ in pairwise(stages))
    assert stages[-1].end_time_unix_nano <= request.end_time_unix_nano


async def test_what_is_recalled_has_no_stages_a_failure_is_one_and_probes_leave_no_trace(
    running: Any, rows: Any, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    async with running() as (client, app):
        for _ in range(2):
            await client.post("/forecast/BTC", json={"candles": rows(), "model": "naive"})
        for path in ("/livez", "/readyz", "/nowhere"):
            await client.get(path)
        monkeypatch.setattr(app.state.services.registry, "at_hand", fail)
        assert (await client.post("/forecast/BTC", json={"candles": rows(), "model": "naive"})).status_code == 500
    assert collector.resource()["service.name"] == "candlecast"
    first, again, nowhere, failed = collector.requested()
    parents = [span.parent_span_id for span in collector.spans() if span.kind != Span.SPAN_KIND_SERVER]
    assert parents == [first.span_id] * len(STAGES)
    assert facts(again)["candlecast.cache"] == "hit"
    assert (nowhere.name, nowhere.status.code) == ("GET", Status.STATUS_CODE_UNSET)
    assert facts(nowhere)["http.response.status_code"] == 404
    assert failed.status.code == Status.STATUS_CODE_ERROR
    assert facts(failed)["error.type"] == "ZeroDivisionError"


async def test_lines_of_the_log_name_the_trace(
    running: Any, collector: Collector, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, answers = logging.getLogger(), logging.getLogger("service.answers")
    monkeypatch.setattr(root, "handlers", root.handlers[:])
    monkeypatch.setattr(answers, "level", answers.level)
    set_up("json")
    async with running() as (client, _):
        await client.get("/symbols")
        await client.get("/livez")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    told = {line["route"]: line.get("trace_id") for line in lines if line["logger"] == "service.answers"}
    assert told == {"/symbols": collector.requested()[0].trace_id.hex(), "/livez": None}


async def test_a_silent_collector_keeps_neither_a_request_nor_the_end_waiting(
    running: Any, rows: Any, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    monkeypatch.setattr("service.traces._LAST_SECONDS", 0.05)
    collector.may_answer.clear()
    async with running() as (client, _):
        for _ in range(2):
            assert (await client.post("/forecast/BTC", json={"candles": rows()})).status_code == 200
            assert collector.asked.wait(20)
    assert not collector.was_waited_for


async def test_a_collector_that_is_down_fails_no_request(
    running: Any, rows: Any, collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")  # no second try
    collector.server.shutdown()
    collector.server.server_close()
    async with running() as (client, _):
        assert (await client.post("/forecast/BTC", json={"candles": rows()})).status_code == 200
    assert "Failed to export spans" in caplog.text


async def test_traces_without_opentelemetry_are_refused_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(RuntimeError, match=r"pip install 'candlecast\[otel\]'"):
        create_app(Settings(home=tmp_path, traces=True))
    assert caplog.text == ""
    create_app(Settings(home=tmp_path))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:4318/v1/traces")
    create_app(Settings(home=tmp_path, traces=False))
    assert caplog.text == ""
    create_app(Settings(home=tmp_path))
    assert "candlecast[otel]" in caplog.text


def test_nothing_of_opentelemetry_is_imported_before_it_is_wanted() -> None:
    for path in Path(service.__path__[0]).rglob("*.py"):
        imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert "opentelemetry" not in " ".join(map(ast.unparse, imports)), path

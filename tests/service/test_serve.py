"""The process: two ports, ready before it says so, gone after SIGTERM."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.death import ended_while_loading, restarted
from service.listening import reachable
from service.main import ServeError, serve
from service.settings import Settings

PROGRAM = """
import json, sys
from service.main import serve
from service.settings import Settings
serve(Settings(), lambda at: print(json.dumps({"url": at.url, "admin": at.admin_url}), flush=True))
"""


@pytest.fixture
def process(request: Any, tmp_path: Path, store: Any, put_naive: Any) -> Iterator[Any]:
    """A service with the settings of `@pytest.mark.parametrize("process", […], indirect=True)`."""
    put_naive()
    environment = os.environ | {
        "CANDLECAST_HOME": str(tmp_path / "home"),
        "CANDLECAST_STORE_ROOT": str(store.root),
        "CANDLECAST_PORT": "0",
        "CANDLECAST_ADMIN_PORT": "0",
        **getattr(request, "param", {}),
    }
    command = [sys.executable, "-c", PROGRAM]
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True) as child,
    ):
        yield child
        child.kill()


def listening(process: Any) -> dict[str, str]:
    line = process.stdout.readline()
    assert line, "the service ended before it was ready"
    return dict(json.loads(line))


@pytest.mark.parametrize("process", [{"CANDLECAST_LOG": "json"}], indirect=True)
def test_both_ports_answer_as_soon_as_it_says_so(process: Any, rows: Any, tmp_path: Path) -> None:
    at = listening(process)
    body = {"model": "naive", "interval": "1h", "candles": rows(), "horizon": 2}
    assert httpx.get(f"{at['url']}/readyz").status_code == 200
    assert httpx.post(f"{at['url']}/forecast/BTC%2FUSDT", json=body, timeout=60).json()["symbol"] == "BTC-USDT"
    assert "candlecast_http_requests_total" in httpx.get(f"{at['admin']}/metrics").text
    headers = {"X-Request-ID": "q7", "Authorization": "Bearer hush"}
    assert httpx.get(f"{at['url']}/metrics?key=hush", headers=headers).status_code == 404
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert not (tmp_path / "home" / "redis" / "redis.sock").exists()
    log = (tmp_path / "log").read_text()
    answered = [line for line in map(json.loads, log.splitlines()) if line["logger"] == "service.answers"]
    assert [(line["method"], line["route"], line["status"]) for line in answered] == [
        ("GET", "/readyz", 200),
        ("POST", "/forecast/{symbol}", 200),
        ("GET", "/metrics", 200),
        ("GET", "_none", 404),
    ]
    names = {"time", "level", "logger", "message", "method", "route", "status", "ms", "request_id"}
    assert all(line.keys() == names for line in answered)
    assert answered[-1]["request_id"] == "q7"
    assert "hush" not in log


def test_an_open_request_is_finished_after_sigterm(process: Any, rows: Any) -> None:
    at = listening(process)
    host, port = at["url"].removeprefix("http://").split(":")
    body = json.dumps({"model": "naive", "interval": "1h", "candles": rows(), "horizon": 2}).encode()
    kind, length = "Content-Type: application/json", f"Content-Length: {len(body)}"
    head = "\r\n".join(["POST /forecast/BTC HTTP/1.1", "Host: x", kind, length, "", ""])
    with socket.create_connection((host, int(port))) as caller:
        caller.sendall(head.encode() + body[:-10])
        httpx.get(f"{at['url']}/livez")
        process.send_signal(signal.SIGTERM)
        threading.Event().wait(0.5)
        caller.sendall(body[-10:])
        assert caller.recv(65536).startswith(b"HTTP/1.1 200")
    assert process.wait(20) == 0


@pytest.mark.parametrize("process", [{"CANDLECAST_DRAIN_SECONDS": "600"}], indirect=True)
def test_a_drain_sends_callers_away_while_it_answers_until_it_is_interrupted(process: Any, rows: Any) -> None:
    at = listening(process)
    body = {"model": "naive", "interval": "1h", "candles": rows(), "horizon": 2}
    with httpx.Client(base_url=at["url"], timeout=60) as kept_alive:
        assert "connection" not in kept_alive.get("/livez").headers
        process.send_signal(signal.SIGTERM)
        while (ready := httpx.get(f"{at['url']}/readyz", timeout=60)).status_code == 200:
            pass
        assert (ready.status_code, ready.json()["code"]) == (503, "draining")
        process.send_signal(signal.SIGTERM)
        threading.Event().wait(0.5)  # in which it would stop, if one more meant that
        answer = kept_alive.post("/forecast/BTC", json=body)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert httpx.get(f"{at['url']}/livez", timeout=60).status_code == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0


def test_sigterm_while_a_model_is_loaded_does_not_wait_for_it(tmp_path: Path) -> None:
    status, _ = ended_while_loading(tmp_path)
    assert status == 0


@pytest.mark.long
@pytest.mark.parametrize("redis_too", [True, False])
def test_a_service_that_was_killed_starts_again_with_what_it_had(tmp_path: Path, redis_too: bool) -> None:
    found = restarted(tmp_path, redis_too=redis_too)
    assert found.after == found.before
    assert "ERROR" not in found.log


def test_a_taken_port_says_which_variable_to_set(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings(home=tmp_path, port=taken.getsockname()[1], admin_port=0)
        with pytest.raises(ServeError, match="CANDLECAST_PORT"):
            serve(settings, lambda at: None)


@pytest.mark.parametrize(("host", "asked"), [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("10.1.2.3", "10.1.2.3")])
def test_a_service_on_every_address_is_asked_on_this_machines_own(host, asked):
    assert reachable(host) == asked

"""A service on real sockets, and callers who mean it no good."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from bench.fuzz import fuzz
from bench.hostile import MARKER, corpus
from bench.service import Service, start_naive_service

SECONDS = 2.0  # until a caller who dawdles is cut
PATIENCE = 30.0
GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /forecast/BTC HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
PUT = POST.replace(b"POST /forecast", b"PUT /candles")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = {
        "CANDLECAST_CLIENT_SECONDS": str(SECONDS),
        "CANDLECAST_KEEP_ALIVE_SECONDS": "1",
        "CANDLECAST_WATCH": "BTC-USDT:naive:3",
    }
    with start_naive_service(tmp_path_factory.mktemp("hostile"), settings) as service:
        yield service
        assert httpx.get(f"{service.url}/livez", timeout=PATIENCE).status_code == 200


def connect(service: Service, **options: int) -> socket.socket:
    at = urlsplit(service.url)
    caller = socket.socket()
    for name, value in options.items():
        caller.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    caller.settimeout(PATIENCE)
    caller.connect((at.hostname, at.port))
    return caller


def answered(service: Service, sent: bytes) -> bytes:
    """What comes back until the service ends the connection."""
    got = b""
    with connect(service) as caller, suppress(ConnectionError):
        caller.sendall(sent)
        while piece := caller.recv(65536):
            got += piece
    return got


def test_what_is_sent_in_bad_faith_is_refused_in_few_words(service: Service) -> None:
    with httpx.Client(base_url=service.url, timeout=PATIENCE) as client:
        for hostile in corpus():
            answer = client.request(hostile.method, hostile.path, content=hostile.body, headers=hostile.headers)
            told = f"{hostile.name}: {answer.status_code} {answer.text[:300]}"
            assert 400 <= answer.status_code < 500, told
            assert answer.headers["content-type"] == "application/problem+json", told
            assert len(answer.content) <= 4096, told
            assert MARKER not in answer.text, told


def test_a_body_of_more_values_than_any_request_is_not_parsed(service: Service) -> None:
    for unit, count in ((b"1,", 500_001), (b"[],", 500_001), (b"{},", 40_001)):
        body = b'{"candles": [' + unit * count + b"1]}"
        answer = httpx.put(
            f"{service.url}/candles/BTC",
            content=body,
            headers={"Content-Type": "application/json"},
            timeout=PATIENCE,
        )
        assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


NO_HTTP = {
    "garbage": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a line that is none": b"GET\r\n\r\n",
    "a method that is none": b"FROBNICATE /livez HTTP/1.1\r\nHost: x\r\n\r\n",
    "another version": b"GET /livez HTTP/9.9\r\n\r\n",
    "preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "CONNECT": b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    "header without a colon": GET + b"nothing\r\n\r\n",
    "blank in a name": GET + b"a b: c\r\n\r\n",
    "zero byte in a value": GET + b"A: \0\r\n\r\n",
    "length that is none": POST + b"Content-Length: x\r\n\r\n{}",
    "negative length": POST + b"Content-Length: -1\r\n\r\n{}",
    "length beyond 64 bits": POST + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a length and pieces": POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a coding that is none": POST + b"Transfer-Encoding: gzip\r\n\r\n{}",
    "a piece of no size": POST + b"Transfer-Encoding: chunked\r\n\r\nx\r\n{}\r\n0\r\n\r\n",
    "a piece of any size": POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"F" * 32 + b"\r\n",
    "an endless line": b"GET /" + b"a" * 1_000_000,
    "an endless header": GET + b"A: " + b"a" * 1_000_000,
    "endless headers": GET + b"A: a\r\n" * 200_000,
}


@pytest.mark.parametrize("name", NO_HTTP)
def test_what_is_no_request_ends_its_connection(service: Service, name: str) -> None:
    got = answered(service, NO_HTTP[name])
    assert got == b"" or got.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), got[:300]
    assert len(got) <= 4096


def test_a_length_that_lies_reaches_no_other_request(service: Service) -> None:
    shorter = answered(service, POST + b'Content-Length: 2\r\n\r\n{}{"horizon": 1}' + GET + b"\r\n")
    assert shorter.startswith(b"HTTP/1.1 400")
    assert shorter.count(b"HTTP/1.1") == 1
    assert answered(service, POST + b"Content-Length: 99\r\n\r\n{}") == b""


def test_a_connection_that_lies_idle_is_closed(service: Service) -> None:
    assert answered(service, GET + b"\r\n").startswith(b"HTTP/1.1 200")


PATHS = (
    "/%00",
    "/%ff",
    "/forecast/%00",
    "/candles/%F0%9F",
    "/models/..%2F..%2Fetc/shadow",
    "//livez",
    "/" + "a" * 9000,
)


@pytest.mark.parametrize("path", [*PATHS, *(f"/candles/BTC?limit={'9' * 5000}", "/candles/BTC?before=%00", "/x?%ff=1")])
def test_paths_that_lead_nowhere_are_4xx(service: Service, path: str) -> None:
    got = answered(service, b"GET " + path.encode() + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 4"), got[:200]
    assert len(got) <= 4096


def drip(service: Service, sent: bytes, drops: bytes) -> bytes:
    """Send `sent`, then `drops` one by one and over again, until the service has had enough."""
    end = time.monotonic() + PATIENCE
    with connect(service) as caller:
        caller.sendall(sent)
        caller.settimeout(0.05)
        while time.monotonic() < end:
            for drop in drops:
                try:
                    caller.send(bytes([drop]))
                    if not caller.recv(1):
                        return b"cut"
                except TimeoutError:
                    pass
                except ConnectionError:
                    return b"cut"
    return b"still there"


def test_callers_who_dawdle_are_cut_and_hold_up_nobody(service: Service) -> None:
    slow = {
        "says nothing": (b"", b""),
        "slow head": (GET, b"A: a\r\n"),
        "slow line": (b"GET /", b"a"),
        "blank lines": (b"", b"\r\n"),
        "slow forecast": (POST + b"Content-Length: 100000\r\n\r\n", b" "),
        "slow candles": (PUT + b"Content-Length: 100000\r\n\r\n", b" "),
        "slow pieces": (PUT + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        "body after a refusal": (PUT.replace(b"BTC", b"{}") + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    }
    with ThreadPoolExecutor(len(slow)) as callers:
        cut = {name: callers.submit(drip, service, *what) for name, what in slow.items() if what[1]}
        silent = callers.submit(answered, service, b"")
        assert httpx.get(f"{service.url}/readyz", timeout=PATIENCE).status_code == 200
        assert {name: each.result() for name, each in cut.items()} == dict.fromkeys(cut, b"cut")
        assert silent.result() == b""


def is_held(caller: socket.socket) -> bool:
    """Whether the other end of a connection belongs to a process."""
    port = f":{caller.getsockname()[1]:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(remote.endswith(port) and inode != "0" for _, _, remote, *_, inode in (line[:10] for line in lines))


def test_a_caller_who_takes_no_answer_is_cut(service: Service) -> None:
    service.put_history(10_000, "LONG")
    end = time.monotonic() + PATIENCE
    with connect(service, SO_RCVBUF=4096) as caller:
        caller.sendall(b"GET /candles/LONG?limit=10000 HTTP/1.1\r\nHost: x\r\n\r\n" * 20)  # 12 MB
        while not is_held(caller):
            assert time.monotonic() < end
        while is_held(caller):
            assert time.monotonic() < end
            time.sleep(0.05)


def test_nobody_has_more_requests_waiting_than_a_hundred(service: Service) -> None:
    assert b"HTTP/1.1 400" in answered(service, (GET + b"\r\n") * 5000)


def test_both_ports_do_what_their_documents_say(service: Service) -> None:
    """Schemathesis: examples, coverage, fuzzing, sequences of calls; `make fuzz` goes on for longer."""
    options = ["--max-examples", "3", "--generation-deterministic", "--no-color"]
    assert fuzz(service, options) == []

"""The load client against servers that misbehave on purpose."""

import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

from bench.connection import Connection
from bench.load import SEED, Record, Target, closed_loop, details, open_loop, percentile, poisson, summary

pytestmark = pytest.mark.anyio

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Server:
    """HTTP/1.1 over asyncio streams; `answer` makes each response of a request's body and number."""

    def __init__(self, answer: Callable[[bytes, int], bytes] = lambda body, number: ANSWER) -> None:
        self.answer = answer
        self.bodies: list[bytes] = []
        self.connections = 0
        self.stall = asyncio.Event()
        self.stall.set()
        self.tasks: set[asyncio.Task[None]] = set()

    async def handle(self, reader, writer):
        self.connections += 1
        self.tasks.add(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while response := self.answer(await self.read(reader), len(self.bodies)):
                await self.stall.wait()
                writer.write(response)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def read(self, reader):
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = 0 if head.startswith(b"get ") else int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        self.bodies.append(await reader.readexactly(length))
        return self.bodies[-1]


@contextlib.asynccontextmanager
async def listening(server):
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    async with listener:
        yield Target("127.0.0.1", listener.sockets[0].getsockname()[1], "/forecast/X", b'{"seed": %b}' % SEED)
    await asyncio.wait(server.tasks, timeout=5)


async def test_requests_that_would_have_come_during_a_stall_are_counted_late():
    server, rate, stall = Server(), 200, 1.0
    arrivals = [index / rate for index in range(2 * rate)]

    async def stall_once():
        await asyncio.sleep(0.5)
        server.stall.clear()
        await asyncio.sleep(stall)
        server.stall.set()

    async with listening(server) as target:
        records, _ = await asyncio.gather(open_loop(target, arrivals), stall_once())
    assert len(records) == len(arrivals)
    late = [record for record in records if record.latency > 0.1 * stall]
    assert len(late) >= 0.85 * rate * stall  # all but those of the stall's last tenth
    assert max(record.latency for record in records) >= 0.95 * stall
    # Their waits are spread over the stall: a client that waits for answers would have seen it once.
    assert percentile(sorted(record.latency for record in late), 50) >= 0.4 * stall


async def test_callers_that_wait_for_answers_see_a_stall_once():
    server = Server()
    server.stall.clear()
    asyncio.get_running_loop().call_later(0.4, server.stall.set)
    async with listening(server) as target:
        records = await closed_loop(target, clients=2, seconds=0.6)
    assert 2 <= sum(record.latency > 0.2 for record in records) < 10


async def test_latency_counts_from_the_intended_arrival():
    async with listening(Server()) as target:
        records = await open_loop(target, [0.0, 0.0, 0.0])
    assert all(record.due == 0 for record in records)
    assert all(record.sent > 0 for record in records)
    assert all(record.latency == record.done for record in records)


async def test_every_request_has_its_own_seed():
    server = Server()
    async with listening(server) as target:
        await open_loop(target, [0.0] * 20, first_seed=100)
    assert sorted(json.loads(body)["seed"] for body in server.bodies) == list(range(100, 120))


async def test_connections_are_kept_alive():
    server = Server()
    async with listening(server) as target:
        records = await closed_loop(target, clients=3, seconds=0.2)
    assert server.connections == 3
    assert len(records) > 6


async def test_a_broken_connection_is_a_failure_and_the_next_request_opens_another():
    server = Server(lambda body, number: b"" if number == 1 else ANSWER)
    async with listening(server) as target:
        records = await closed_loop(target, clients=1, seconds=0.2)
    assert [record.status for record in records[:2]] == [0, 200]
    assert server.connections == 2
    assert summary(records)["statuses"]["0"] == 1


async def test_an_answer_in_pieces_is_put_together():
    chunked = b'HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{"a\r\n4\r\n": 1\r\n1\r\n}\r\n0\r\n\r\n'
    async with listening(Server(lambda body, number: chunked)) as target:
        connection = Connection(target.host, target.port)
        answer = await connection.post("/", b"{}")
        connection.close()
    assert (answer.status, answer.body) == (503, b'{"a": 1}')


async def test_without_a_body_it_asks_by_get():
    async with listening(server := Server()) as target:
        records = await closed_loop(replace(target, body=None), clients=1, seconds=0.05)
    assert {record.status for record in records} == {200}
    assert set(server.bodies) == {b""}


async def test_a_server_that_closes_after_every_answer_is_asked_over_a_new_connection():
    server = Server(lambda body, number: ANSWER.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    async with listening(server) as target:
        records = await closed_loop(target, clients=1, seconds=0.1)
    assert {record.status for record in records} == {200}
    assert server.connections == len(records) > 1


async def test_what_is_not_http_is_a_broken_connection():
    async with listening(Server(lambda body, number: b"nonsense\r\n\r\n")) as target:
        connection = Connection(target.host, target.port)
        with pytest.raises(ConnectionError, match="not HTTP"):
            await connection.post("/", b"{}")
        connection.close()


def test_gaps_of_a_poisson_process_are_exponential():
    instants = poisson(rate=100, seconds=200, seed=5)
    gaps = [after - before for before, after in itertools.pairwise(instants)]
    mean = sum(gaps) / len(gaps)
    assert len(instants) == pytest.approx(20_000, rel=0.03)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1)
    assert poisson(100, 200, seed=5) == instants


@pytest.mark.parametrize(("percent", "expected"), [(50, 5), (90, 9), (99, 10), (100, 10)])
def test_percentile_is_a_value_that_occurred(percent, expected):
    assert percentile(range(1, 11), percent) == expected


def test_failures_are_in_neither_rate_nor_latency():
    records = [Record(0, 0, 1, 200, b""), Record(0, 0, 9, 503, b""), Record(1, 1, 2, 200, b"")]
    found = summary(records)
    assert found["per_second"] == pytest.approx(2 / 9)
    assert found["latency_ms"]["p99.9"] == 1000
    assert found["statuses"] == {"200": 2, "503": 1}


def test_rate_of_a_closed_loop_counts_only_the_time_that_callers_were_busy():
    records = [Record(0, 0, 4, 200, b""), Record(0, 0, 2, 200, b"")]
    assert summary(records, clients=2)["per_second"] == pytest.approx(2 / 3)


def test_details_hold_what_the_service_said_of_its_answer():
    said = {"meta": {"batch_rows": 2}, "model": {"runtime": "eager"}, "forecast": [1]}
    [detail] = details([Record(0, 0, 1, 200, json.dumps(said).encode())])
    assert detail["meta"] == {"batch_rows": 2}
    assert "forecast" not in detail


async def test_command_prints_its_summary_and_writes_its_records(tmp_path):
    body, seen = tmp_path / "body.json", tmp_path / "records.json"
    body.write_bytes(b'{"seed": %b}' % SEED)
    async with listening(Server()) as target:
        url = f"http://{target.host}:{target.port}{target.path}"
        command = [sys.executable, "-m", "bench.load", url, "--rate", "100", "--seconds", "0.3"]
        files = ["--body", str(body), "--records", str(seen)]
        done = await asyncio.to_thread(subprocess.run, [*command, *files], capture_output=True, check=True)
    found = json.loads(done.stdout)
    assert found["requests"] == len(json.loads(seen.read_text())) > 0
    assert found["statuses"] == {"200": found["requests"]}
    assert set(found["latency_ms"]) == {"p50", "p90", "p99", "p99.9"}

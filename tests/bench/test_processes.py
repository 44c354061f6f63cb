"""Programs that the benchmark starts: none outlives it, and one that fails says why."""

import contextlib
import http.server
import os
import sys
import threading
import time
from typing import ClassVar

import pytest

from bench.load import SEED
from bench.processes import LoadClient, ServerFailed, free_port, server, wait_until_listening

PARENT = "import subprocess, sys; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"


def is_running(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


def test_workers_of_a_server_end_with_it(tmp_path):
    with server([sys.executable, "-c", PARENT], tmp_path / "log") as process:
        worker = int(process.stdout.readline())
        assert is_running(worker)
    end = time.monotonic() + 10
    while is_running(worker) and time.monotonic() < end:
        os.sched_yield()
    assert not is_running(worker)


def test_a_server_that_ends_says_why(tmp_path):
    log = tmp_path / "log"
    with (
        server([sys.executable, "-c", "raise SystemExit('no weights')"], log) as process,
        pytest.raises(ServerFailed, match="no weights"),
    ):
        wait_until_listening(process, free_port(), log)


class Recorder(http.server.BaseHTTPRequestHandler):
    """Answers an empty object and keeps the bodies."""

    bodies: ClassVar[list[bytes]] = []

    def do_POST(self):
        self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


def test_a_load_client_never_sends_a_seed_twice(tmp_path):
    client = LoadClient(tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{listener.server_port}/"
        loads = [client.run(url, SEED, rate=100, seconds=0.2), client.run(url, SEED, clients=2, seconds=0.1)]
        listener.shutdown()
    assert all(load.records and not load.failed for load in loads)
    assert len(Recorder.bodies) == sum(len(load.records) for load in loads)
    assert len(set(Recorder.bodies)) == len(Recorder.bodies)

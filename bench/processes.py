"""Programs that the benchmark starts: servers until they listen, load clients until they are done."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_PATIENCE: Final = 180.0  # seconds for a server to listen


class ServerFailed(RuntimeError):
    """A server ended, or did not listen in time; the message holds the end of its log."""


@dataclass(frozen=True)
class Load:
    """What a load client saw: its summary, and one object per request."""

    summary: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]

    @property
    def per_second(self) -> float:
        return float(self.summary["per_second"])

    @property
    def failed(self) -> int:
        """Requests without an answer of 200."""
        statuses: Mapping[str, int] = self.summary["statuses"]
        return sum(count for status, count in statuses.items() if status != "200")


class LoadClient:
    """Runs `bench.load`, never with the same seeds twice."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._next_seed = 1

    def run(
        self,
        url: str,
        body: bytes | None,
        *,
        seconds: float,
        clients: int | None = None,
        rate: float = 0,
        key: str | None = None,
    ) -> Load:
        """A closed loop of `clients`, or an open one at `rate` per second; without a body of GETs."""
        sent, seen = self._folder / "body.json", self._folder / "records.json"
        if body is not None:
            sent.write_bytes(body)
        how = ["--clients", str(clients)] if clients else ["--rate", str(rate)]
        seeds = ["--first-seed", str(self._next_seed), *(["--key", key] if key else [])]
        files = [*(["--body", str(sent)] if body is not None else []), "--records", str(seen)]
        arguments = [url, *how, "--seconds", str(seconds), *seeds, *files]
        printed = output_of("bench.load", *arguments, doing="the load client")
        load = Load(json.loads(printed), json.loads(seen.read_text()))
        self._next_seed += len(load.records) + 1
        return load


def resident_bytes(process: int | str, kind: str = "VmRSS") -> int:
    """Memory that a process holds; the most that it has held is of the kind VmHWM."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def output_of(module: str, *arguments: str, doing: str) -> str:
    """What a module of this package prints in a process of its own; RuntimeError that says what `doing` failed."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{doing} failed: {done.stderr[-500:]}")
    return done.stdout


@contextlib.contextmanager
def server(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A program that is ended with its block, and with it whatever it started; its standard error goes to `log`."""
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # workers that outlive their parent


def wait_until_listening(process: subprocess.Popen[str], port: int, log: Path) -> None:
    """Return when a TCP connection to `port` succeeds; ServerFailed if the process ends first."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ServerFailed(f"the server ended with {process.returncode}: {log.read_text()[-500:]}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise ServerFailed(f"nothing listens on port {port} after {_PATIENCE:.0f} s: {log.read_text()[-500:]}")


def wait_until_answering(client: LoadClient, url: str, body: bytes, log: Path) -> None:
    """Return when a request is answered by 200: some servers listen long before they can."""
    end = time.monotonic() + _PATIENCE
    while (load := client.run(url, body, clients=1, seconds=0.05)).failed:
        if time.monotonic() > end:
            raise ServerFailed(f"{load.summary['statuses']} after {_PATIENCE:.0f} s: {log.read_text()[-500:]}")
        time.sleep(0.5)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port

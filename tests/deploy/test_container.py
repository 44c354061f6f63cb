"""The Dockerfile: linted, and everything it names is there; `candlecast health`, and SIGTERM to process 1."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from service.settings import Settings

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, str(ROOT / "candlecast.py")]

Instructions = list[tuple[str, str]]


def reaches_the_build(path: str) -> bool:
    """What .dockerignore says of a path: the last line that matches it or a folder above it wins."""
    above = [path, *map(str, PurePosixPath(path).parents)]
    reaches = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if any(fnmatchcase(each, line.removeprefix("!")) for each in above if each != "."):
            reaches = line.startswith("!")
    return reaches


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_the_image_is_made_of_reaches_the_build(dockerfile: Instructions) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    package = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    named = [*package, project["project"]["readme"], *project["project"]["license-files"], "training/recipes/x.toml"]
    copied = [words for keyword, words in dockerfile if keyword == "COPY" and "--from" not in words]
    named += [word for words in copied for word in words.split()[:-1] if word != "."]
    assert "requirements.lock" in named
    for path in named:
        assert path.endswith("x.toml") or (ROOT / path).exists(), path
        assert reaches_the_build(path), path


@pytest.mark.parametrize(
    "path", [".git/HEAD", ".venv/bin/python", "data/x.csv", "model_store/artifacts/x", "var/x", "models/__pycache__/x"]
)
def test_what_belongs_to_a_machine_stays_out_of_the_build(path: str) -> None:
    assert not reaches_the_build(path)


def test_the_cpu_image_asks_for_onnxruntime_and_not_for_its_gpu_twin(dockerfile: Instructions, tmp_path: Path) -> None:
    (change,) = [found for _, words in dockerfile for found in re.findall(r"sed -i .* pyproject\.toml", words)]
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    subprocess.run(["sh", "-c", change], cwd=tmp_path, check=True)
    before, after = (
        tomllib.loads((folder / "pyproject.toml").read_text())["project"]["dependencies"] for folder in (ROOT, tmp_path)
    )
    twins = [each for each in before if each.startswith("onnxruntime")]
    assert [each for each in after if each not in before] == [twins[0].partition(";")[0]]
    assert [each for each in before if each not in after] == twins


def test_every_setting_in_the_image_exists(dockerfile: Instructions) -> None:
    (environment,) = [words for keyword, words in dockerfile if keyword == "ENV" and "CANDLECAST" in words]
    fields = {f"CANDLECAST_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"CANDLECAST_\w+", environment)) - fields == set()


def health(port: int, *words: str, host: str = "0.0.0.0") -> subprocess.CompletedProcess[str]:
    environment = {"CANDLECAST_HOST": host, "CANDLECAST_PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
    return subprocess.run([*PROGRAM, "health", *words], env=environment, capture_output=True, text=True, timeout=60)


def answer(listener: socket.socket, status: str, body: dict[str, Any]) -> None:
    connection, _ = listener.accept()
    with connection:
        assert connection.recv(4096).startswith(b"GET /readyz ")
        text = json.dumps(body)
        connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())


def test_health_fails_in_one_line_where_nothing_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        done = health(taken.getsockname()[1])
    assert done.returncode == 1
    assert re.fullmatch(
        r"Error: 0\.0\.0\.0:\d+ does not answer: .*refused; `candlecast serve` starts one\n", done.stderr
    )


@pytest.mark.parametrize(
    ("status", "body", "code", "said"),
    [
        ("200 OK", {"degraded": []}, 0, "ready"),
        ("200 OK", {"degraded": ["redis_state"]}, 0, "ready, redis_state"),
        ("503 Service Unavailable", {}, 1, "is not ready: 503"),
    ],
)
def test_health_tells_ready_from_not_ready(status: str, body: dict[str, Any], code: int, said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:
        answered = pool.submit(answer, listener, status, body)
        done = health(listener.getsockname()[1])
        answered.result(10)
    assert done.returncode == code
    assert (done.stdout + done.stderr).strip().endswith(said)


def test_process_1_ends_on_sigterm_whatever_it_does() -> None:
    """The kernel drops what process 1 does not handle; here a process that takes itself for it inherits as much."""
    code = "import os; os.getpid = lambda: 1; import candlecast; candlecast.main()"
    command = [sys.executable, "-c", code, "ingest", "-", "--symbol", "X"]
    drop = partial(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, preexec_fn=drop) as process:
        deadline = time.monotonic() + 180
        while process.poll() is None and time.monotonic() < deadline:
            process.terminate()
            time.sleep(0.05)
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM


def test_health_imports_nothing_heavy() -> None:
    code = "import sys, candlecast; candlecast.main(['health', '--port', '1'], standalone_mode=False)"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "http.client" in imported
    assert imported & {"torch", "numpy", "pydantic", "service.settings", "asyncio"} == set()

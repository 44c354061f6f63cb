"""The commands of the README and docs/, run as they are printed beside a service of their own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from bench.processes import server
from tests.conftest import write_short_recipes
from tests.test_docs import PAGES, ROOT, shell_lines

pytestmark = pytest.mark.long

NOT_RUN = {
    r"^(\w+=\S+ )*docker |^kubectl ": "wants Docker or a cluster: tests/deploy tries what they are given",
    r"^make ": "installs, or runs for minutes: `make` itself is how this came to run",
    r"^pip install": "everything is installed",
    r"hf://|^hf |[Kk]ronos-small|runs/best_model|Open-Base": "wants the hub's files: tests/model_store has a hub",
    r" feed ": "wants an exchange: tests/feeds has one",
    r"candlecast serve": "runs already",
    r"^tail ": "never ends",
    r"0123456789ab": "a version that somebody else has",
    r"--preset full|torchrun|candlecast tune": "takes many minutes: tests/training has them small",
    r"--ray": "tests/training/test_cluster.py has a cluster",
    r"candlecast keys": "would lock the other commands out: tests/service/test_keys.py",
    r"candlecast restore": "wants a service that is stopped: tests/service/test_backup.py",
    r"store rollback": "nothing served before the first version: tests/model_store/test_store.py",
    r"rollback\": true": "there are no former weights yet: tests/service/test_ensemble.py",
}
ENDLESS = 124  # what `timeout` answers for what went on


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reader")


@pytest.fixture(scope="module")
def environment(place: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("CANDLECAST_")}
    (place / "candlecast").write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "candlecast.py"} "$@"\n')
    (place / "candlecast").chmod(0o755)
    return own | {
        "PATH": f"{place}:{os.environ['PATH']}",
        "CANDLECAST_STORE_ROOT": str(place / "store"),
        "CANDLECAST_HOME": str(place / "home"),
        "CANDLECAST_PORT": "0",
        "CANDLECAST_ADMIN_PORT": "0",
        "CANDLECAST_WATCH": "AAPL:kronos:30",
    }


@pytest.fixture(scope="module")
def ports(place: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """The two ports of the documents, and those of a service with the sample candles and quickly trained demos."""
    write_short_recipes(place)
    prepared = "candlecast sample-data data/samples && candlecast train toto-demo.toml kronos-demo.toml"
    subprocess.run(["bash", "-c", prepared], env=environment, cwd=place, check=True, capture_output=True)
    serve = [str(place / "candlecast"), "serve", "--load", str(place / "data" / "samples"), "--json"]
    with server(serve, place / "service.log", environment) as service:
        assert service.stdout
        at = json.loads(service.stdout.readline())
        urls = {"8000": at["url"], "8001": at["admin_url"]}
        yield {printed: str(urlsplit(url).port) for printed, url in urls.items()}


def printed_commands() -> list[str]:
    """Each once, without its remark."""
    return list(dict.fromkeys(re.sub(r"\s+#.*", "", line) for page in PAGES for line in shell_lines(page)))


def test_every_reason_not_to_run_a_command_fits_one() -> None:
    for pattern in NOT_RUN:
        assert any(re.search(pattern, line) for line in printed_commands()), pattern


def test_every_command_does_what_it_says(place: Path, environment: dict[str, str], ports: dict[str, str]) -> None:
    own = environment | {"CANDLECAST_URL": f"http://127.0.0.1:{ports['8000']}"}
    failed = []
    for line in printed_commands():
        if any(re.search(pattern, line) for pattern in NOT_RUN):
            continue
        line = re.sub(r"127\.0\.0\.1:(800[01])", lambda found: f"127.0.0.1:{ports[found[1]]}", line)
        is_stream = line.startswith("curl -sN")
        line = re.sub("^curl -s", "timeout 10 curl -fs" if is_stream else "timeout 300 curl -fs", line)
        done = subprocess.run(["bash", "-c", line], env=own, cwd=place, capture_output=True, text=True, timeout=900)
        well = done.returncode == ENDLESS and "data:" in done.stdout if is_stream else done.returncode == 0
        if not well:
            failed.append(f"{line}\n{done.stdout[-300:]}{done.stderr[-600:]}")
    assert not failed, "\n\n".join(failed)

"""`candlecast ingest` into a real service, and the client that PUTs."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from candlecast import main
from feeds.put import NoAnswer, Refused, Service
from tests.feeds.conftest import wait_for_a_calm_hour

ROOT = Path(__file__).parents[2]
HOUR = 3_600_000
FIRST = 1_700_006_400_000
HEADER = "timestamp,open,high,low,close,volume"


def csv_row(place: int, step: int = HOUR) -> str:
    return f"{FIRST + place * step},1.5,3.25,0.5,{2 + place % 3 / 8},10"


@pytest.fixture
def ingest(url: str) -> Callable[..., Result]:
    return lambda *words: CliRunner().invoke(main, ["ingest", *map(str, words), "--url", url])


def test_a_csv_goes_in_under_the_name_of_its_file(ingest: Any, stored: Any, tmp_path: Path) -> None:
    path = tmp_path / "sol-usdt.csv"
    path.write_text("\n".join([HEADER, *map(csv_row, range(25_000))]))
    done = ingest(path, "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["lines"], told["sent"], told["new"], told["bad"]) == (25_001, 25_000, 25_000, 0)
    assert len(stored("SOL-USDT")) == 10_000  # the most that one answer holds
    again = ingest(path)
    assert again.stdout == "25000 candles sent: 0 new, 25000 duplicate\n"


def test_a_csv_of_several_symbols_goes_in_at_once(ingest: Any, stored: Any, tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    rows = [f"{symbol},{csv_row(place)}" for place in range(5) for symbol in ("m/one", "m/two")]
    path.write_text("\n".join([f"symbol,{HEADER}", *rows]))
    assert ingest(path).exit_code == 0
    assert len(stored("M-ONE")) == len(stored("M-TWO")) == 5


def test_the_interval_given_is_the_one_stored(ingest: Any, stored: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("\n".join([HEADER, csv_row(0), csv_row(3)]))
    assert ingest(path, "--symbol", "SPARSE", "--interval", "60m").exit_code == 0
    assert len(stored("SPARSE", "1h")) == 2


def test_a_candle_that_is_still_open_is_told(ingest: Any, tmp_path: Path) -> None:
    wait_for_a_calm_hour()
    path = tmp_path / "open.csv"
    newest = int(time.time() * 1000) // HOUR * HOUR
    rows = [f"{newest - back * HOUR},1,3,0.5,2,10" for back in (3, 2, 1, 0)]
    path.write_text("\n".join([HEADER, *rows]))
    assert json.loads(ingest(path, "--json").stdout)["not_closed"] == 1


def test_the_first_bad_line_ends_it_unless_it_may_be_left_out(ingest: Any, stored: Any, tmp_path: Path) -> None:
    path = tmp_path / "holes.csv"
    path.write_text("\n".join([HEADER, *map(csv_row, range(4)), "1700020800000,,,,,", csv_row(5)]))
    done = ingest(path)
    assert done.exit_code == 1
    assert "line 6 holds a value that is not a finite number; --skip-bad leaves it out" in done.stderr
    assert "before that 4 candles sent" in done.stderr
    assert len(stored("HOLES")) == 4
    done = ingest(path, "--skip-bad")
    assert done.exit_code == 0
    assert "1 line(s) left out, the first of them line 6: holds a value that is not a finite number" in done.stderr
    assert len(stored("HOLES")) == 5


def test_a_refusal_names_the_line_the_symbol_and_the_reason(ingest: Any, tmp_path: Path) -> None:
    path = tmp_path / "future.csv"
    path.write_text("\n".join([HEADER, *map(csv_row, range(3)), f"{4_000_000_000_000},1,3,0.5,2,10"]))
    done = ingest(path, "--json")
    assert done.exit_code == 1
    assert "future.csv line 5: future was refused: candle 3 opens in the future (422 future_timestamp)" in done.stderr
    assert json.loads(done.stdout)["sent"] == 0
    done = ingest(path, "--symbol", "a b")
    assert "a b was refused: a symbol has 1 to 32 letters" in done.stderr


def test_a_file_of_something_else_says_so(ingest: Any, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary,\nnothing happened\n")
    done = ingest(path)
    assert done.exit_code == 1
    assert "has no timestamp column" in done.stderr


@pytest.fixture
def piped(environment: dict[str, str], url: str) -> Callable[..., "subprocess.Popen[str]"]:
    def start(*words: str) -> "subprocess.Popen[str]":
        command = [sys.executable, str(ROOT / "candlecast.py"), "ingest", "-", "--json", *words]
        return subprocess.Popen(
            command, env=environment | {"CANDLECAST_URL": url}, text=True, stdin=-1, stdout=-1, stderr=-1
        )

    return start


def wait_for(stored: Any, symbol: str, count: int) -> None:
    deadline = time.monotonic() + 60
    while (found := len(stored(symbol))) < count:
        assert time.monotonic() < deadline, f"after a minute {found} of {count} candles of {symbol} are stored"
        time.sleep(0.05)


def test_json_lines_on_standard_input_go_in_as_they_come(piped: Any, stored: Any) -> None:
    with piped("--interval", "1h") as running:
        for place in range(2):
            row = {"symbol": "STREAM", "timestamp": FIRST + place * HOUR, "o": 1, "h": 3, "l": 0.5, "c": 2, "v": 1}
            running.stdin.write(json.dumps(row) + "\n")
            running.stdin.flush()
            wait_for(stored, "STREAM", place + 1)
        running.stdin.write(json.dumps(row))  # without an end of line, and once more
        running.stdin.close()
        told, errors = json.loads(running.stdout.read()), running.stderr.read()
    assert (running.returncode, errors) == (0, "")
    assert (told["new"], told["duplicate"]) == (2, 1)


def test_a_csv_on_standard_input_tells_its_interval_after_three_candles(piped: Any, stored: Any) -> None:
    with piped("--symbol", "STREAMED") as running:
        for line in (HEADER, *map(csv_row, range(3))):
            running.stdin.write(line + "\n")
            running.stdin.flush()
        wait_for(stored, "STREAMED", 3)
        running.stdin.write(csv_row(3) + "\n")
        running.stdin.flush()
        wait_for(stored, "STREAMED", 4)
        running.stdin.close()
        assert json.loads(running.stdout.read())["new"] == 4


# -- the client ------------------------------------------------------------------------------------


STORED = 200, {}, {"symbol": "A", "interval": "1h", "received": 2, "new": 2}
TIMES = np.array([FIRST, FIRST + HOUR])
CANDLES = np.array([[1.0, 3.0, 0.5, 2.0, 10.0]] * 2)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def slept() -> list[float]:
    return []


@pytest.fixture
def client(said: list[str], slept: list[float]) -> Iterator[Callable[..., Service]]:
    clients: list[Service] = []

    def build(url: str, **options: Any) -> Service:
        clients.append(Service(url, say=said.append, sleep=slept.append, **options))
        return clients[-1]

    yield build
    for each in clients:
        each.close()


def test_what_is_busy_or_hangs_up_is_tried_again(
    scripted: Any, client: Any, said: list[str], slept: list[float]
) -> None:
    busy = 503, {"Retry-After": "3"}, {"detail": "not ready yet", "code": "not_ready", "errors": []}
    server = scripted(busy, 0, 0, (502, {}, "<html>"), STORED)
    put = client(server.url + "/base/").put("A/B", TIMES, CANDLES)
    assert (put.interval, put.counts["new"]) == ("1h", 2)
    assert slept == [3, 1, 2]
    assert "is not ready (503 not ready yet): trying again in 3 s" in said[0]
    assert "does not answer" in said[1]
    assert {(method, path) for method, path, _ in server.asked} == {("PUT", "/base/candles/A%2FB")}
    assert server.asked[-1][2] == server.asked[0][2]


def test_a_service_that_is_not_there_is_given_up_in_time(scripted: Any, client: Any, slept: list[float]) -> None:
    server = scripted()
    server.stop()
    with pytest.raises(NoAnswer, match=r"does not answer .*refused"):
        client(server.url, patience=5).put("A", TIMES, CANDLES)
    assert slept[:3] == [0.5, 1, 2]


def test_a_connection_that_was_hung_up_meanwhile_is_no_failure(scripted: Any, client: Any, said: list[str]) -> None:
    server = scripted(STORED, 0, STORED)
    service = client(server.url)
    service.put("A", TIMES, CANDLES)
    service.put("A", TIMES, CANDLES)
    assert (len(server.asked), said) == (3, [])


def test_another_server_than_candlecast_is_told_from_it(scripted: Any, client: Any) -> None:
    service = client(scripted((200, {}, "<html>"), (404, {}, "Not\nfound")).url)
    with pytest.raises(Refused, match="the answer is not one of Candlecast's"):
        service.put("A", TIMES, CANDLES)
    with pytest.raises(Refused, match=r"A was refused: Not found \(404"):
        service.put("A", TIMES, CANDLES)


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="write http://"):
        Service("localhost:8000")
